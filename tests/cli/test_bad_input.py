"""Bad input gets one clear line and exit code 2, and leaves nothing half-written."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from sala.model import MiniCPMSALAForCausalLM


@pytest.fixture
def broken(hybrid, tmp_path):
    """A copy of the hybrid that a test may break."""
    return shutil.copytree(hybrid, tmp_path / "broken")


def edit(folder, change):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def remove_shard(folder):
    model = MiniCPMSALAForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def reshape(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"][:7].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


CHECKPOINTS = {
    "missing shard": (remove_shard, "lacks model-00002-of-"),
    "truncated shard": (truncate, "truncated"),
    "wrong shape": (reshape, "has shape (7,); expected (32,)"),
    "unknown model type": (
        lambda f: edit(f, lambda c: c.update(model_type="mamba")),
        "model_type 'mamba' is not supported",
    ),
    "unknown field": (lambda f: edit(f, lambda c: c.update(scale_dept=1.4)), "did you mean 'scale_depth'"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken configuration": (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
}


def assert_refused(outcome, message):
    assert outcome.code == 2
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("sala: ")
    assert message in lines[0]


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_broken_checkpoint_is_refused(case, sala, broken):
    damage, message = CHECKPOINTS[case]
    damage(broken)
    assert_refused(sala("generate", "--model", broken, "--prompt", "x"), message)


@pytest.mark.parametrize("options", [[], ["--temperature", "1"]])
def test_weights_that_are_not_finite_are_no_answer(options, sala, broken):
    state = load_file(broken / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 1] = math.inf
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    outcome = sala("generate", "--model", broken, "--prompt", "x", *options)
    assert_refused(outcome, "tensor 'model.layers.0.mlp.up_proj.weight' holds infinity; expected finite weights")


@pytest.mark.parametrize("case", [case for case in CHECKPOINTS if case != "no tokenizer"])
def test_a_broken_checkpoint_is_not_described(case, sala, broken):
    damage, message = CHECKPOINTS[case]
    damage(broken)
    assert_refused(sala("inspect", broken), message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("empty.txt", b"", "is empty"), ("image.png", b"PNG\0", "binary file"), (None, b"", "no file or folder")],
)
def test_a_file_that_is_no_text_is_refused(name, content, message, sala, hybrid, tmp_path):
    path = tmp_path / (name or "nowhere.txt")
    if name:
        path.write_bytes(content)
    assert_refused(sala("generate", "--model", hybrid, "--file", path), message)


def test_a_prompt_longer_than_memory_is_refused(sala, hybrid, tmp_path, monkeypatch):
    monkeypatch.setattr("sala.engine.memory.available_bytes", lambda device: 50 * 2**20)
    path = tmp_path / "book.txt"
    path.write_text("a word and another\n" * 10_000)
    outcome = sala("generate", "--model", hybrid, "--file", path)
    assert_refused(outcome, "50 MiB are available")
    assert "tokens fit" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0.5"], "no effect at temperature 0"),
        (["--temperature", "-1"], "temperature = -1.0"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--device", "gpu"], "device 'gpu' is not on this machine"),
        (["--chat"], "has no chat template"),
        (["--dtype", "packed"], "dtype 'packed' with"),
    ],
)
def test_options_without_meaning_are_refused(options, message, sala, hybrid):
    assert_refused(sala("generate", "--model", hybrid, "--prompt", "x", *options), message)


OVER = "1" + "0" * 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", OVER], "seed = 1"),
        (["--seed", "-1"], "seed = -1; expected 0 to 18446744073709551615"),
        (["--temperature", "inf"], "temperature = inf; expected 0 (the likeliest token)"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--temperature", "1e-40"], "temperature = 1e-40"),
        (["--top-p", "0", "--temperature", "1"], "top_p = 0.0"),
        (["--top-p", "nan", "--temperature", "1"], "top_p = nan"),
        (["--top-k", "-1", "--temperature", "1"], "top_k = -1"),
        (["--repetition-penalty", "inf"], "repetition_penalty = inf"),
        (["--repetition-penalty", "1e-320"], "repetition_penalty = 1e-320"),
        (["-n", "0"], "max_new_tokens = 0"),
        (["-n", OVER], "tokens fit"),
        (["--threads", OVER], "expected 1 to 1,024"),
        (["--device", "meta"], "device 'meta' is not on this machine"),
        (["--file", ""], "a source is ''"),
        (["--file", "a" * 5000], "cannot be read: File name too long"),
        (["--prompt", "\udcff"], "character 1 of the prompt is no whole character"),
    ],
)
def test_options_at_their_extremes_are_one_line(options, message, sala, hybrid):
    assert_refused(sala("generate", "--model", hybrid, "--prompt", "x", *options), message)


def test_a_chunk_longer_than_any_prompt_changes_nothing(sala, hybrid):
    run = ("generate", "--model", hybrid, "--prompt", "x", "-n", "2")
    assert sala(*run, "--chunk", OVER).out == sala(*run).out


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (["plan", "--model", "embedded-hybrid", "--length", "9" * 5000], "at most 1,099,511,627,776"),
        (["plan", "--model", "embedded-hybrid", "--memory", "1e300"], "at most 1EiB"),
        (["bench", "ops", "--length", OVER], "at most 1,099,511,627,776"),
        (["bench", "latency", "--length", OVER], "at most 1,099,511,627,776"),
        (["bench", "train", "--tokens", OVER], "at most 1,099,511,627,776"),
        (["bench", "train", "--blocks-length", OVER], "at most 1,099,511,627,776"),
        (["bench", "ops", "--threads", OVER], "expected 1 to 1,024"),
        (["bench", "ops", "--device", "meta"], "device 'meta' is not on this machine"),
        (["train", "smoke", "--dry-run", "--threads", OVER], "expected 1 to 1,024"),
        (["data", "", "--tokenizer", "embedded-teacher", "--out", "out"], "a source is ''"),
        (
            ["data", __file__, "--tokenizer", "embedded-teacher", "--out", "a" * 5000],
            "cannot be written: File name too long",
        ),
        (
            ["data", __file__, "--tokenizer", "embedded-teacher", "--out", "out", "--threads", OVER],
            "expected 1 to 1,024",
        ),
        (["train", "plot", "a" * 5000], "File name too long; expected a shorter name"),
        (["select", "--scores", "scores.json", "--keep", "1", "--plot", ""], "expected 'layers.png'"),
    ],
)
def test_extremes_of_other_verbs_are_one_line(verb, message, sala, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(sala(*verb), message)


@pytest.mark.parametrize("option", ["--limit", "--once"])
@pytest.mark.parametrize("value", ["nan", "-1"])
def test_a_time_that_is_none_is_refused(option, value, sala):
    outcome = sala("bench", "latency", f"{option}={value}")
    assert outcome.code == 2
    assert f"Invalid value for '{option}'" in outcome.err


def test_an_unknown_option_exits_with_two(sala):
    assert sala("generate", "--promt", "x").code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "smok"], "did you mean 'smoke'"),
        (["--recipe", "smoke", "--set", "stages.align.step=3"], "did you mean 'steps'"),
        (["--recipe", "smoke", "--set", "stages.align.steps"], "has no '='"),
        (["--recipe", "nowhere.yaml"], "no such recipe file"),
    ],
)
def test_a_recipe_that_is_none_is_refused(options, message, sala, teacher, tmp_path):
    assert_refused(sala("convert", "--teacher", teacher, "--out", tmp_path / "out", *options), message)
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(sala, teacher, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert_refused(
        sala("convert", "--teacher", teacher, "--recipe", "smoke", "--out", tmp_path / "out"), "is no folder of a run"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_recipes_without_what_they_start_from_are_refused(sala, teacher, tmp_path):
    train = ("train", "--out", tmp_path / "out")
    assert_refused(sala(*train, "smoke"), "converts a teacher; expected --teacher CHECKPOINT alone")
    assert_refused(sala(*train, "smoke", "--teacher", teacher, "--model", teacher), "--teacher CHECKPOINT alone")
    assert_refused(sala(*train, "teacher", "--teacher", teacher), "has no teacher; expected --model CHECKPOINT")
    assert_refused(sala(*train, "teacher", "--model", teacher), "describes a new model")
    assert not (tmp_path / "out").exists()
    assert_refused(
        sala("convert", "--teacher", teacher, "--recipe", "teacher", "--out", tmp_path / "out"), "sala train"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "hypenet", "--keep", "3"], "did you mean"),
        (["--model", "m", "--keep", "9"], "keep is 9"),
        (["--model", "m", "--keep", "1", "--first-last"], "first and last"),
        (["--model", "m", "--keep", "1", "--eps", "0"], "above 0"),
        (["--keep", "1"], "needs a model's name; it has: m, hypenet-2b"),
        (["--model", "m", "--keep", "1", "--plot", "layers.jpg"], "expected 'layers.png'"),
        (["--model", "m", "--keep", "1", "--plot", "absent/layers.png"], "No such file or directory"),
    ],
)
def test_scores_that_give_no_choice_are_refused(options, message, sala, tmp_path):
    path = tmp_path / "scores.json"
    rows = [{"layer": i, "retrieval": {"avg": 1.0 - i}, "commonsense": {"avg": 0.5}} for i in range(3)]
    path.write_text(json.dumps({"models": {"m": {"layers": rows}, "hypenet-2b": {"layers": rows}}}))
    assert_refused(sala("select", "--scores", path, *options), message)
