"""What holds for every test: one thread, fixed seeds, fresh memory that reads NaN, and where Triton runs."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, settings

# the same examples every time, however busy the machine; `--hypothesis-profile=random` draws new ones
for name, same in (("same", True), ("random", False)):
    settings.register_profile(name, derandomize=same, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

GPU = torch.cuda.is_available()
# without it torch refuses products of matrices on a GPU where all must be deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not GPU:
    # before anything imports Triton, which decides for good whether it compiles or interprets
    os.environ["TRITON_INTERPRET"] = "1"
# what a verb prints is the same in a terminal, in a pipe and in CI: rich reads these, typer when it is imported
for variable in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
    os.environ.pop(variable, None)
os.environ["COLUMNS"] = "80"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("real") and not _fetched():
            item.add_marker(pytest.mark.skip(reason="needs `sala fetch smollm2-135m-instruct`"))


def _fetched() -> bool:
    # not before the environment is as Triton and typer are to find it
    from sala.model.fetch import FETCHABLE

    return all(row.place.is_file() for row in FETCHABLE.values())


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # the suite runs one process per core; more threads only wait for each other
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_every_time() -> Iterator[None]:
    """Seed each test by itself; `empty` is filled with NaN, so that a number never written is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def chosen_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what lets the kernels of operators be chosen on another type of device than a GPU."""
    # imported when it is known where Triton runs
    from sala.ops import dispatch, gpu

    if (why_not := gpu.unavailable()) is not None:
        pytest.skip(why_not)

    def choose(device: str, *ops: str, **changes: object) -> None:
        kernels = {op: {"triton": replace(dispatch.BACKENDS[op]["triton"], devices=(device,), **changes)} for op in ops}
        monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, **kernels})

    return choose
