"""The table and the plot of a selection."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from sala.convert.bootstrap import Outcomes, bootstrap
from sala.convert.select import LayerScores, importance, read_scores, select
from sala.convert.selection import KEPT, LINEAR, Selection, _legend, plot_selection

LAYERS = 6


def scored(keep: int = 2, epsilon: float = 1e-3, method: str = "halo") -> Selection:
    rng = np.random.default_rng(0)
    right = rng.random((LAYERS, 64)) < np.array([0.9, 0.2, 0.8, 0.7, 0.9, 0.9])[:, None]
    outcomes = Outcomes(right.astype(float), 0.4 + 0.05 * rng.random((LAYERS, 16)))
    scores = outcomes.scores
    return Selection(
        num_layers=LAYERS,
        method=method,
        epsilon=epsilon,
        first_last=False,
        kept=select(LAYERS, keep, scores=scores, epsilon=epsilon, method=method),
        scores=scores,
        importance=importance(scores, epsilon, method),
        bootstrap=bootstrap(outcomes, keep, epsilon=epsilon, method=method),
    )


def pixels(path: Path, color: str) -> int:
    return int((np.abs(imread(path)[..., :3] - to_rgb(color)).max(axis=-1) < 0.01).sum())


def test_the_table_says_what_was_chosen_and_how_sure_that_is(tmp_path: Path) -> None:
    selection = scored()
    assert selection.bootstrap is not None
    selection.write(tmp_path)
    table = json.loads((tmp_path / "selection.json").read_text())
    assert (table["method"], table["epsilon"], tuple(table["kept"])) == ("halo", 1e-3, selection.kept)
    assert table["language_noise"] == selection.bootstrap.language_noise
    assert (table["questions"], table["pieces"], table["resamples"]) == (64, 16, 1000)
    assert [row["layer"] for row in table["layers"]] == list(range(LAYERS))
    assert tuple(row["layer"] for row in table["layers"] if row["kept"]) == selection.kept
    for name, values in (
        ("importance", selection.importance),
        ("frequency", selection.bootstrap.frequency),
        ("recall_error", selection.bootstrap.recall_errors),
        ("language_error", selection.bootstrap.language_errors),
    ):
        assert tuple(row[name] for row in table["layers"]) == values
    # and the layers can be chosen again from it
    assert read_scores(tmp_path / "selection.json") == selection.scores


@pytest.mark.parametrize("method", ["halo", "recall_drop"])
def test_kept_layers_are_marked_and_the_same_selection_is_the_same_picture(tmp_path: Path, method: str) -> None:
    selection = scored(method=method)
    selection.write(tmp_path)
    drawn = tmp_path / "selection.png"
    assert pixels(drawn, KEPT) > 1000 and pixels(drawn, LINEAR) > 1000
    plot_selection(tmp_path / "again.png", selection)
    assert (tmp_path / "again.png").read_bytes() == drawn.read_bytes()
    # without items there is one panel, and when all are kept none is marked as linear but in the legend
    alone = dataclasses.replace(selection, bootstrap=None, kept=tuple(range(LAYERS)))
    plot_selection(tmp_path / "alone.png", alone)
    assert imread(tmp_path / "alone.png").shape[0] < imread(drawn).shape[0]
    assert pixels(tmp_path / "alone.png", LINEAR) < 1000


def test_layers_that_needed_no_scores_have_a_table_and_no_plot(tmp_path: Path) -> None:
    Selection(num_layers=4, method="uniform", epsilon=1e-3, first_last=True, kept=(0, 3)).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["selection.json"]
    table = json.loads((tmp_path / "selection.json").read_text())
    assert table["first_last"] is True
    assert table["layers"] == [{"layer": layer, "kept": layer in (0, 3)} for layer in range(4)]


def test_an_epsilon_below_the_noise_is_told() -> None:
    noise = scored().bootstrap.language_noise  # type: ignore[union-attr]
    below, above = scored(epsilon=0.9 * noise), scored(epsilon=1.1 * noise)
    assert below.warning is not None and f"noise of the language scores, {noise:.2g}" in below.warning
    assert above.warning is None
    assert dataclasses.replace(below, method="recall_drop").warning is None, "it has no epsilon"
    assert dataclasses.replace(below, bootstrap=None).warning is None, "its noise is not known"


def equal(recall: tuple[float, ...], keep: int, first_last: bool = False) -> Selection:
    scores = LayerScores(recall, tuple(0.1 * layer for layer in range(len(recall))))
    return Selection(
        num_layers=len(recall),
        method="halo",
        epsilon=1e-3,
        first_last=first_last,
        kept=select(len(recall), keep, scores=scores, first_last=first_last),
        scores=scores,
        importance=importance(scores),
    )


@pytest.mark.parametrize(
    ("recall", "keep", "message"),
    [
        ((0.0, 0.0, 0.0, 0.0), 1, "1 of 4 equal layers are kept, an arbitrary choice: recall is 0 whichever layer is"),
        (
            (0.5, 0.5, 0.5, 0.5),
            3,
            "3 of 4 equal layers are kept, an arbitrary choice: recall is 0.5 whichever layer is",
        ),
        ((0.5, 0.1, 0.5, 0.5), 2, "1 of 3 equal layers are kept, an arbitrary choice (the higher layers)"),
        ((0.5, 0.1, 0.5, 0.5), 1, None),
        ((0.5, 0.5, 0.5, 0.5), 4, None),
    ],
)
def test_a_choice_among_equals_says_that_it_is_arbitrary(
    recall: tuple[float, ...], keep: int, message: str | None, tmp_path: Path
) -> None:
    selection = equal(recall, keep)
    selection.write(tmp_path)
    table = json.loads((tmp_path / "selection.json").read_text())
    if message is None:
        assert selection.warning is None and "warning" not in table
        return
    assert selection.warning is not None and selection.warning.startswith(message)
    assert table["warning"] == selection.warning
    assert selection.arbitrary in _legend(selection)


def test_layers_that_are_kept_unasked_are_no_choice() -> None:
    ends = equal((0.0, 0.0, 0.0, 0.0), 2, first_last=True)
    assert ends.kept == (0, 3) and ends.warning is None
    assert equal((0.0, 0.0, 0.0, 0.0), 3, first_last=True).equals == (1, 2)
