"""Laws of the choice of a backend."""

import pytest

from sala.errors import BackendError
from sala.ops.dispatch import BACKENDS, choose, explain, unavailable


@pytest.mark.parametrize("op", BACKENDS)
def test_the_definition_is_never_chosen_for_the_user(op: str) -> None:
    name, reason = explain(op)
    assert name == ("cpu" if unavailable(op, "cpu") is None else "eager")
    assert reason
    assert choose(op).__name__ == f"sala.ops.{op}.{name}"
    assert not BACKENDS[op]["reference"].automatic


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in BACKENDS for name in BACKENDS[op]])
def test_a_name_runs_the_file_of_that_name(op: str, name: str) -> None:
    assert choose(op, name).__name__ == f"sala.ops.{op}.{name}"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(BackendError, match=r"'eagr'; it has auto, cpu, eager, reference; did you mean 'eager'\?"):
        choose("lightning", "eagr")
