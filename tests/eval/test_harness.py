"""lm-evaluation-harness with our readers, where it is installed (`make lm-eval`)."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sala.eval import TASKS, LocalReader, Plan, Setting, run
from sala.model.families import load_model

if find_spec("lm_eval") is None:
    pytest.skip("needs `lm_eval`", allow_module_level=True)

from sala.eval import harness

TASK = """
task: values_found
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def reader(tokenizer: Any) -> LocalReader:
    return LocalReader(load_model("embedded-hybrid", dtype=torch.float32), tokenizer)


def test_a_local_task_is_scored_through_the_harness(reader: LocalReader, tokenizer: Any, tmp_path: Path) -> None:
    keys = ["@amber @birch", "@delta @maple", "@olive @onyx", "@raven @reed"]
    values = [" @cedar @lotus", " @indigo @iris", " @quartz @quill", " @sage @walnut"]
    pairs = "\n".join(f"[set] {key}{value}" for key, value in zip(keys, values, strict=True))
    rows = [{"text": f"{pairs}\n[get] {key}", "choices": values, "answer": i} for i, key in enumerate(keys)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl", kind="multiple_choice"))
    found = harness.run_suites(reader, Setting(tokenizer), ["values_found"], include=tmp_path)
    assert found["results"]["values_found"]["acc,none"] == 1.0


def test_a_task_of_ours_has_the_same_score_in_the_harness_as_in_a_run(
    reader: LocalReader, tokenizer: Any, tmp_path: Path
) -> None:
    setting, task = Setting(tokenizer), TASKS["cwe"]
    [row] = run(Plan((task,), (512,), 3), reader, setting, tmp_path)
    found = harness.run_suites(reader, setting, [harness.harness_task(task, setting, 512, 3)])
    assert found["results"]["cwe_512"]["score,none"] == pytest.approx(row.score)
    # the embedded hybrid repeats words of the list, so that this is not two zeros
    assert row.score
