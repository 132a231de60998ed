"""Choices on items that were drawn again."""

import itertools

import numpy as np
import pytest

from sala.convert.bootstrap import Outcomes, bootstrap
from sala.convert.select import LayerScores, select
from sala.errors import InputError

LAYERS, QUESTIONS, PIECES = 6, 40, 30


def outcomes(seed: int = 0) -> Outcomes:
    rng = np.random.default_rng(seed)
    right = rng.random((LAYERS, QUESTIONS)) < np.linspace(0.5, 0.9, LAYERS)[:, None]
    return Outcomes(right.astype(float), 0.4 + 0.1 * rng.random((LAYERS, PIECES)))


@pytest.mark.parametrize("method", ["halo", "recall_drop"])
@pytest.mark.parametrize("first_last", [False, True])
def test_a_resample_is_a_selection_on_its_own_items(method: str, first_last: bool) -> None:
    table, rng, times = outcomes(), np.random.default_rng(3), 50
    drawn = [rng.multinomial(size, np.full(size, 1 / size), size=times) for size in (QUESTIONS, PIECES)]
    counts = np.zeros(LAYERS)
    # of equal layers the higher ones are taken: in all orders together each gets its share
    inner = range(1, LAYERS - 1) if first_last else range(LAYERS)
    ends = ([0], [LAYERS - 1]) if first_last else ([], [])
    orders = [[*ends[0], *order, *ends[1]] for order in itertools.permutations(inner)]
    for questions, pieces in zip(*drawn, strict=True):
        recall = np.repeat(table.recall, questions, axis=1).mean(axis=1)
        language = np.repeat(table.language, pieces, axis=1).mean(axis=1)
        for order in orders:
            scores = LayerScores(tuple(recall[order]), tuple(language[order]))
            kept = select(LAYERS, 3, method=method, scores=scores, epsilon=0.01, first_last=first_last)
            counts[[order[place] for place in kept]] += 1 / len(orders)
    found = bootstrap(table, 3, method=method, epsilon=0.01, first_last=first_last, resamples=times, seed=3)
    assert found.frequency == pytest.approx(counts / times)
    assert sum(found.frequency) == pytest.approx(3)
    assert min(found.frequency[1:-1]) > 0 or first_last, "the items are few enough for the choice to move"


def test_errors_are_those_of_a_mean() -> None:
    table = outcomes()
    found = bootstrap(table, 2, resamples=4000)
    np.testing.assert_allclose(found.recall_errors, table.recall.std(axis=1) / QUESTIONS**0.5, rtol=0.06)
    np.testing.assert_allclose(found.language_errors, table.language.std(axis=1) / PIECES**0.5, rtol=0.06)
    assert (found.questions, found.pieces, found.resamples) == (QUESTIONS, PIECES, 4000)


def test_luck_that_all_layers_share_is_no_noise() -> None:
    table = outcomes()
    level = 0.1 * np.arange(LAYERS)[:, None]
    shared = bootstrap(Outcomes(table.recall, table.language[:1] + level), 2)
    assert shared.language_noise < 1e-12 < min(shared.language_errors)
    assert bootstrap(table, 2).language_noise > 1e-3


def test_a_choice_that_hangs_on_nothing_is_certain() -> None:
    clear = np.ones((4, 20))
    clear[2] = 0
    assert bootstrap(Outcomes(clear, np.full((4, 10), 0.5)), 1).frequency == (0, 0, 1, 0)


def test_layers_that_nothing_tells_apart_are_kept_as_often() -> None:
    nothing = Outcomes(np.zeros((4, 20)), outcomes().language[:4])
    assert bootstrap(nothing, 1).frequency == (0.25, 0.25, 0.25, 0.25)
    assert bootstrap(nothing, 3, first_last=True).frequency == (1, 0.5, 0.5, 1)


def test_the_seed_decides_the_resamples() -> None:
    first, again, other = (bootstrap(outcomes(), 2, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_scores_are_the_means_of_items() -> None:
    scores = Outcomes.of([(1, 0), (1, 1)], [(0.5, 0.25), (0.0, 1.0)]).scores
    assert scores == LayerScores((0.5, 1.0), (0.375, 0.5))


@pytest.mark.parametrize(
    ("recall", "message"),
    [
        ([(1, 0), (1, 0, 1)], "recall scores of layer 0 have 2 items, those of layer 1 have 3"),
        ([(1,), (0,)], "have 1 items; expected 2 or more"),
        ([(), ()], "have 0 items"),
    ],
)
def test_items_that_cannot_be_compared_are_refused(recall: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Outcomes.of(recall, [(1, 0), (1, 0)])
