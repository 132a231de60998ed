"""`sala train plot` draws runs, and `sala train RECIPE` is still a verb of its own."""

import dataclasses
import json

import pytest

from sala.train.loop import Progress

PNG = b"\x89PNG"


@pytest.fixture
def run_folder(tmp_path):
    steps = (
        Progress("align", number, 4, 1.0 / number, 1e-3, 0.5, 64 * number, 100.0, 1.0, stage_index=0)
        for number in (1, 2, 3)
    )
    text = "".join(json.dumps(dataclasses.asdict(progress)) + "\n" for progress in steps)
    folder = tmp_path / "run"
    folder.mkdir()
    # the process that wrote it was killed
    (folder / "metrics.jsonl").write_text(text + '{"stage": "al')
    return folder


def test_an_interrupted_run_is_drawn(sala, run_folder):
    outcome = sala("train", "plot", run_folder)
    assert outcome.code == 0
    assert outcome.out.strip() == str(run_folder / "training.png")
    assert (run_folder / "training.png").read_bytes().startswith(PNG)


def test_a_picture_goes_where_it_is_asked_for(sala, run_folder, tmp_path):
    assert sala("train", "plot", run_folder, "--out", tmp_path / "a.png").code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert not (run_folder / "training.png").exists()


def test_what_is_no_run_is_named(sala, run_folder, tmp_path):
    for folder, what in ((tmp_path / "none", "no folder"), (tmp_path, "has no metrics.jsonl")):
        outcome = sala("train", "plot", folder)
        assert outcome.code == 2
        assert what in outcome.err and "the folder of a run" in outcome.err
    (run_folder / "metrics.jsonl").write_text("")
    assert "has no step yet" in sala("train", "plot", run_folder).err
    (run_folder / "metrics.jsonl").write_text('{"stage": "align"}\n')
    assert "lacks gradient_norm" in sala("train", "plot", run_folder).err


def test_a_picture_is_a_png(sala, run_folder, tmp_path):
    outcome = sala("train", "plot", run_folder, "--out", tmp_path / "a.pdf")
    assert outcome.code == 2
    assert "a.png" in outcome.err


def test_help_names_both_and_a_recipe_is_still_an_argument(sala):
    assert "train plot" in sala("--help").out
    assert "train plot RUN" in " ".join(sala("train", "--help").out.split())
    assert "RUN" in sala("train", "plot", "--help").out
    assert "--out is missing" in sala("train", "smoke").err
    assert "no recipe" in sala("train", "plots").err
