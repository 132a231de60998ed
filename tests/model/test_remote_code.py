"""A folder that we write is loaded by programs that do not import the package: transformers runs the module in it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from model.shapes import tiny_model
from sala.data import load_tokenizer
from sala.model.checkpoint import BUILTIN
from sala.model.config import AUTO_MAP, REMOTE_CODE, REMOTE_CODE_TEXT
from sala.model.families import load_model

LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
assert "sala" not in sys.modules
folder, again, text = sys.argv[1:]
AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
for part in (model, tokenizer):
    part.save_pretrained(again)
write = pipeline("text-generation", model=again, trust_remote_code=True)
print(write(text, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"])
"""
TEXT = "[set] @amber @birch @cedar @lotus\n[get] @amber @birch"


def fresh(*arguments: str | Path, **environment: str) -> str:
    """Run Python anew, where nobody has imported the package."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_process_loads_saves_and_generates(tmp_path):
    folder, again = BUILTIN["embedded-hybrid"], tmp_path / "again"
    answer = fresh("-c", LOAD, folder, again, TEXT, HF_MODULES_CACHE=str(tmp_path / "modules"))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = tokenizer(TEXT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert answer.rstrip("\n") == tokenizer.decode(ids, skip_special_tokens=True)
    for written in (folder, again):
        assert (written / REMOTE_CODE).read_text() == REMOTE_CODE_TEXT
        assert json.loads((written / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert [file.name for file in again.glob("*.py")] == [REMOTE_CODE]


def test_both_models_of_the_package_and_every_saved_one_have_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for folder in (*BUILTIN.values(), tmp_path):
        assert (folder / REMOTE_CODE).read_text() == REMOTE_CODE_TEXT
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


TASK = """
task: values_found
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs `lm_eval`")
def test_lm_eval_measures_a_folder_from_its_own_command_line(tmp_path):
    keys = ["@amber @birch", "@delta @maple", "@olive @onyx", "@raven @reed"]
    values = [" @cedar @lotus", " @indigo @iris", " @quartz @quill", " @sage @walnut"]
    pairs = "\n".join(f"[set] {key}{value}" for key, value in zip(keys, values, strict=True))
    rows = [{"text": f"{pairs}\n[get] {key}", "choices": values, "answer": i} for i, key in enumerate(keys)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "values_found.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    fresh(
        *("-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "2"),
        *("--model_args", f"pretrained={BUILTIN['embedded-hybrid']},trust_remote_code=True"),
        *("--tasks", "values_found", "--include_path", tmp_path, "--output_path", tmp_path / "out"),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
        HF_DATASETS_CACHE=str(tmp_path / "datasets"),
        HF_HUB_OFFLINE="1",
    )
    (report,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["values_found"]["acc,none"] == 1.0
