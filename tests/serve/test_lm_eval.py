"""lm_eval's own command line measures a server, by the log-probabilities of an echo and by token ids."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from model.test_remote_code import TASK
from sala.model.checkpoint import BUILTIN

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs `lm_eval`")


def test_lm_eval_measures_a_server_from_its_own_command_line(serving, tmp_path):
    keys = ["@amber @birch", "@delta @maple", "@olive @onyx", "@raven @reed"]
    values = [" @cedar @lotus", " @indigo @iris", " @quartz @quill", " @sage @walnut"]
    pairs = "\n".join(f"[set] {key}{value}" for key, value in zip(keys, values, strict=True))
    rows = [{"text": f"{pairs}\n[get] {key}", "choices": values, "answer": i} for i, key in enumerate(keys)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "values_found.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    with serving(template=None) as live:
        arguments = f"model=embedded-hybrid,base_url={live.url}/v1/completions,tokenizer={BUILTIN['embedded-hybrid']}"
        subprocess.run(
            [
                *(sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments),
                *("--tasks", "values_found", "--include_path", tmp_path, "--output_path", tmp_path / "out"),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
            check=True,
            timeout=300,
        )
        live.settled()
    (report,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["values_found"]["acc,none"] == 1.0
