"""An evaluation over HTTP has the samples, answers and scores of one in this process."""

import pytest

from sala.eval import TASKS, LocalReader, Plan, Setting, read_samples, run
from sala.eval.endpoint import EndpointReader

ASKED = ("niah_single_1", "cwe", "retrieval_text", "ppl")


def test_a_run_against_the_server_has_the_records_of_a_local_one(live, checkpoint, network, tmp_path):
    setting = Setting(checkpoint.tokenizer)
    plan = Plan(tuple(TASKS[name] for name in ASKED), (512, 700), 2)
    run(plan, LocalReader(network, checkpoint.tokenizer), setting, tmp_path / "local")
    reader = EndpointReader(f"{live.url}/v1", "embedded-hybrid", concurrency=4)
    run(plan, reader, setting, tmp_path / "remote")
    for ours, theirs in zip(read_samples(tmp_path / "local"), read_samples(tmp_path / "remote"), strict=True):
        told = {"score", "by_position", "finish"}
        assert {k: v for k, v in ours.items() if k not in told} == {k: v for k, v in theirs.items() if k not in told}
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
