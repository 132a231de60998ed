"""Options that several verbs share, and what they do before the work starts."""

import warnings
from typing import Annotated

import typer

Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads; as many as there are cores when left out.", rich_help_panel="Machine"),
]


def prepare(threads: int | None) -> None:
    """Set the number of threads and keep the remarks of libraries, which are for programmers, off the terminal."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers)\b")
    if threads is not None:
        torch.set_num_threads(threads)
