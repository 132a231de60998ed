"""Layer selection gives the published sets, and its tables and options are checked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sala.convert.select import LayerScores, importance, ranking, read_scores, select, uniform
from sala.errors import InputError, RecipeError

TABLE = Path(__file__).parent / "layer_scores.json"
MODELS = json.loads(TABLE.read_text())["models"]


def kept_of(model: str, keep: int, **options: Any) -> tuple[int, ...]:
    scores = read_scores(TABLE, model)
    return select(scores.num_layers, keep, scores=scores, **options)


@pytest.mark.parametrize("epsilon", [1e-10, 1e-6, 1e-3])
@pytest.mark.parametrize(
    ("model", "kept"),
    [("hypenet-2b", (2, 3, 6, 8, 9, 21, 25)), ("hypenet-4b", (0, 1, 7, 14, 15, 22, 24, 33, 34))],
)
def test_the_formula_gives_the_published_sets(model: str, kept: tuple[int, ...], epsilon: float) -> None:
    assert kept_of(model, len(MODELS[model]["layers"]) // 4, epsilon=epsilon) == kept


@pytest.mark.parametrize("model", list(MODELS))
def test_the_whole_order_is_that_of_the_papers_table(model: str) -> None:
    assert list(ranking(importance(read_scores(TABLE, model), epsilon=1e-3))) == MODELS[model]["table7"]


def test_recall_drop_is_the_order_of_the_other_method_in_the_table() -> None:
    expected = MODELS["hypenet-2b"]["table7_recall_drop"]
    for keep in range(1, 28):
        assert kept_of("hypenet-2b", keep, method="recall_drop") == tuple(sorted(expected[:keep]))


def test_the_score_is_the_recall_lost_for_the_language_lost() -> None:
    scores = LayerScores(recall=(0.5, 0.9, 0.7), language=(0.8, 0.4, 0.6))
    assert importance(scores, epsilon=0.1) == pytest.approx((0.4 / 0.1, 0.0, 0.2 / 0.3))


def test_first_and_last_are_kept_and_counted() -> None:
    scores = read_scores(TABLE, "hypenet-2b")
    kept = select(28, 7, scores=scores, first_last=True)
    assert kept == (0, 2, 3, 9, 21, 25, 27)
    assert select(28, 2, scores=scores, first_last=True) == (0, 27)


def test_uniform_layers_are_evenly_spread() -> None:
    assert select(8, 2, method="uniform") == (2, 6)
    assert select(28, 7, method="uniform") == uniform(28, 7) == (2, 6, 10, 14, 18, 22, 26)
    assert len(set(select(9, 8, method="uniform"))) == 8
    assert select(12, 4, method="uniform", first_last=True) == (0, 3, 8, 11)


def test_no_layer_is_kept_by_none() -> None:
    assert select(8, 0, method="none") == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep is 0; with 4 layers it must be 1 to 4"),
        ({"keep": 5}, "keep is 5"),
        ({"keep": 1, "first_last": True}, "first and last are kept"),
        ({"keep": 2, "method": "hallo"}, "did you mean 'halo'"),
        ({"keep": 2, "scores": None}, "needs scores of every layer"),
        ({"keep": 2, "epsilon": 0.0}, "epsilon is 0.0"),
        ({"keep": 2, "epsilon": math.inf}, "epsilon is inf"),
        ({"keep": 2, "scores": LayerScores((0.0,) * 3, (0.0,) * 3)}, "scores of 3 layers were given for a model of 4"),
    ],
)
def test_what_cannot_be_selected_is_refused(arguments: dict, message: str) -> None:
    arguments = {"scores": LayerScores((0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1))} | arguments
    with pytest.raises(RecipeError, match=message):
        select(4, **arguments)


def row(layer: float, recall: object = 0.5, language: object = 0.5) -> dict:
    return {"layer": layer, "retrieval": {"avg": recall}, "commonsense": {"avg": language}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not a JSON table"),
        ("[1, 2]", "has no object 'models'"),
        ({"models": {"hypnet": {}}}, "has no model 'hypenet'; it has: hypnet; did you mean 'hypnet'"),
        ({"models": {"hypenet": {"layers": []}}}, "has no list 'layers'"),
        ({"models": {"hypenet": {"layers": [row(0), {"layer": 1}]}}}, "model 'hypenet': row 1 .*KeyError: 'retrieval'"),
        ({"models": {"hypenet": {"layers": [row(0, "high")]}}}, "row 0 .*ValueError"),
        ({"models": {"hypenet": {"layers": [row(0), row(2)]}}}, r"are \[0, 2\]; 0 to 1 once each"),
        ({"models": {"hypenet": {"layers": [row(0), row(0)]}}}, "once each"),
        ({"models": {"hypenet": {"layers": [row(0.5)]}}}, "row 0 .*'float' object cannot be interpreted as an integer"),
        ({"models": {"hypenet": {"layers": [row(0, 10**400)]}}}, "row 0 .*OverflowError"),
        ('{"models": 1' + "0" * 5000 + "}", "is not a JSON table"),
        ("[" * 100_000, "is not a JSON table"),
        ({"models": {"hypenet": {"layers": [row(0, float("nan"))]}}}, "recall score of layer 0 is nan"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_scores(path, "hypenet")


def test_the_table_of_a_conversion_has_one_model(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    path.write_text(json.dumps({"layers": [{"layer": 0, "recall": 0.5, "language": 0.25, "kept": True}]}))
    assert read_scores(path) == LayerScores((0.5,), (0.25,))
    with pytest.raises(InputError, match="'hypenet' must be left out"):
        read_scores(path, "hypenet")
    with pytest.raises(InputError, match="needs a model's name; it has: hypenet-2b, hypenet-4b"):
        read_scores(TABLE)
    path.write_text(json.dumps({"layers": [{"layer": 0, "kept": True}]}))
    with pytest.raises(InputError, match="row 0 is not {layer, recall, language} with numbers .KeyError: 'recall'"):
        read_scores(path)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_scores(tmp_path / "absent.json", "hypenet")
