"""What holds for every test: one thread, a fixed seed, and fresh memory that reads NaN."""

from collections.abc import Iterator

import pytest
import torch


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
