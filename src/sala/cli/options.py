"""Options that several verbs share, and what they do before the work starts."""

import logging
import warnings
from typing import Annotated

import typer

from sala.errors import InputError

# more than machines have cores; every thread takes memory of its own
MOST_THREADS = 1024

Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads; as many as there are cores when left out.", rich_help_panel="Machine"),
]


def prepare(threads: int | None) -> None:
    """Set the number of threads, show what `sala` says of its own choices, and keep other libraries' remarks out."""
    import torch
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("sala").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers)\b")
    if threads is not None:
        if threads > MOST_THREADS:
            raise InputError(f"--threads {threads}; expected 1 to {MOST_THREADS:,}, as many as there are cores at most")
        torch.set_num_threads(threads)
