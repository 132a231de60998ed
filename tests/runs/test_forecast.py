"""What a run takes, told before it; and recipes cut to a budget."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sala.convert import Scorers
from sala.data import Document, train_tokenizer
from sala.errors import InputError
from sala.recipe import load_recipe
from sala.runs.forecast import Budget, Forecast, StageForecast, cut, fitting, forecast, parse_budget, within_budget
from sala.train import read_corpus
from sala.train.parallel import ONE_PROCESS

TEXT = "def read(path):\n    return open(path).read()\n" * 40
SCORERS = Scorers(lambda model: 0.0, lambda model: 0.0, tokens=5120)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2h", Budget(seconds=7200)),
        ("90min", Budget(seconds=5400)),
        ("45s", Budget(seconds=45)),
        ("5M", Budget(tokens=5_000_000)),
        ("1.5K", Budget(tokens=1500)),
        ("300", Budget(tokens=300)),
    ],
)
def test_a_budget_is_time_or_tokens(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0h", "2 h", "-3M", "2m", "h", "nan"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a time such as 2h or 90min, or tokens such as 5M"):
        parse_budget(text)


def recipe() -> Any:
    return load_recipe("smoke", ["stages.align.steps=40", "stages.distill.steps=60", "stages.long.steps=100"])


def test_stages_are_cut_alike() -> None:
    given = load_recipe("smollm2")
    half = cut(given, 0.5)
    assert [stage.steps for stage in half.stages] == [stage.steps // 2 for stage in given.stages]
    least = cut(given, 1e-6)
    assert all(stage.steps == 2 and stage.learning_rate.warmup_steps == 0 for stage in least.stages)


def test_a_budget_of_time_pays_for_the_choice_of_layers_first() -> None:
    given = recipe()
    known = Forecast(tuple(StageForecast(stage.name, stage.tokens, 100.0, 0) for stage in given.stages), 60.0)
    fitted = fitting(given, Budget(seconds=210), known)
    assert [stage.steps for stage in fitted.stages] == [20, 30, 50]
    with pytest.raises(InputError, match="choosing the layers alone takes 1 min here"):
        fitting(given, Budget(seconds=50), known)
    tokens = fitting(given, Budget(tokens=sum(stage.tokens for stage in given.stages) // 4), known)
    assert [stage.steps for stage in tokens.stages] == [10, 15, 25]


def test_a_stage_takes_as_long_as_its_operations(teacher_of: Callable, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([Document("a.py", TEXT)], vocab_size=300)
    teacher, data = teacher_of(vocab_size=len(tokenizer)), read_corpus(tokenizer, [Document("a.py", TEXT)])
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    told = forecast(teacher, recipe(), SCORERS, data, ONE_PROCESS)
    assert [stage.name for stage in told.stages] == ["align", "distill", "long"]
    assert all(stage.seconds > 0 and stage.memory_bytes > 0 for stage in told.stages) and told.selection_s > 0
    assert all((teacher.state_dict()[name] == tensor).all() for name, tensor in before.items()), "the teacher stays"

    said: list[str] = []
    given: dict[str, Any] = {"model": teacher, "scorers": SCORERS, "data": data, "world": ONE_PROCESS}
    fitted = within_budget(recipe(), Budget(tokens=6400), tmp_path, say=said.append, **given)
    assert [line.partition(":")[0] for line in said[1:]] == ["align", "distill", "long", "choosing the layers"]
    # a run that has begun keeps its steps, whatever a second look at the clock says
    fitted.save(tmp_path / "recipe.yaml")
    again = within_budget(recipe(), Budget(seconds=1e9), tmp_path, say=said.append, **given)
    assert again.resolved == fitted.resolved
