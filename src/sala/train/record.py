"""What a run writes about itself: a line a step, TensorBoard's event files, and Weights & Biases when asked for."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sala.errors import InputError
from sala.train.loop import Progress

METRICS, TENSORBOARD, WANDB = "metrics.jsonl", "tensorboard", "wandb.json"
GIB = 2**30

# a step as it is read back: the fields of `Progress`
Row = Mapping[str, Any]


def scalars(progress: Progress) -> dict[str, float]:
    """Return what is drawn of a step, by name; what is not known of it is left out."""
    values = {
        "loss": progress.loss,
        "learning_rate": progress.learning_rate,
        "gradient_norm": progress.gradient_norm,
        "tokens_per_s": progress.tokens_per_s,
        "mfu": progress.mfu,
        "memory_gib": progress.memory_bytes / GIB or None,
    }
    values |= {f"layer_errors/{layer:02d}": error for layer, error in enumerate(progress.layer_errors)}
    return {name: value for name, value in values.items() if value is not None}


class Record:
    """The observer that writes a run down in its folder; of many ranks one has it.

    Everything is with the system after each step: a process that is killed leaves at most half a line. A run that goes
    on from a checkpoint calls `rewind` before its first step.

    Steps are numbered over all stages in TensorBoard ("global step") and in Weights & Biases ("global_step").

    Args:
        folder: of the run; it exists.
        config: the resolved recipe, `Recipe.resolved`.
        wandb_project: also log to this project of Weights & Biases; the run's id is kept in `wandb.json`, and a later
            Record of the same folder continues it.

    Raises:
        InputError: `wandb` is not installed, or the folder's run belongs to another project.
    """

    def __init__(self, folder: Path, *, config: Mapping[str, Any], wandb_project: str | None = None):
        self._folder = folder
        self._stage_starts = list(accumulate((stage["steps"] for stage in config["stages"]), initial=0))
        self._wandb = None if wandb_project is None else _wandb_run(folder, wandb_project, config)
        self._metrics = (folder / METRICS).open("ab")
        self._tensorboard = _tensorboard(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        step, values = self._stage_starts[progress.stage_index] + progress.step, scalars(progress)
        self._metrics.write(json.dumps(dataclasses.asdict(progress)).encode() + b"\n")
        self._metrics.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"global_step": step, **values})

    def rewind(self, stage_index: int, step: int) -> None:
        """Forget the steps after `step` of a stage, and half a line of a process that was killed.

        Weights & Biases forgets nothing: steps that are taken again are there twice, at the same place.
        """
        kept = takewhile(lambda line: (line[1]["stage_index"], line[1]["step"]) <= (stage_index, step), self._lines())
        os.truncate(self._folder / METRICS, sum(len(text) for text, _ in kept))
        self._tensorboard.close()
        self._tensorboard = _tensorboard(self._folder, purge_step=self._stage_starts[stage_index] + step + 1)

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        return whole_lines(self._folder / METRICS)

    def close(self) -> None:
        self._metrics.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line, its object) of a file of JSON lines, up to the first line that is not whole."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            yield line, row


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the steps of a run so far, in order, each with the fields of `Progress`.

    Raises:
        InputError: this is no folder of a run, or of one without a step.
    """
    path = folder / METRICS
    if not path.is_file():
        what = f"no folder {str(folder)!r}" if not folder.is_dir() else f"{str(folder)!r} has no {METRICS}"
        raise InputError(f"{what}; right would be the folder of a run, such as --out of sala train")
    rows = [row for _, row in whole_lines(path)]
    if not rows:
        raise InputError(f"{path} has no step yet; right would be a run that has made one")
    names = {field.name for field in dataclasses.fields(Progress)}
    for row in rows:
        if missing := names - row.keys():
            raise InputError(f"{path} lacks {', '.join(sorted(missing))}; right would be a file that sala train wrote")
    return rows


def in_stages(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the steps of each stage."""
    return [list(steps) for _, steps in groupby(rows, lambda row: row["stage_index"])]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours: a fiftieth of them, at least ten; fewer at the ends.

    Neighbours of both sides, because a mean of the past alone lags behind a loss that falls.
    """
    reach = max(5, len(values) // 100)
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def short(number: float) -> str:
    """Return 1500000 as 1.5M and 0.0003 as 3e-4: decimal units, as tokens are counted."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    if not 0 < number < 0.01:
        return f"{number:.3g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _tensorboard(folder: Path, purge_step: int | None = None) -> Any:
    # seconds of import, which a plan or a plot has no use for
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / TENSORBOARD), purge_step=purge_step)


def _wandb_run(folder: Path, project: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError("--wandb needs the package `wandb`: pip install 'sala[wandb]'") from error
    path = folder / WANDB
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"project": project, "id": None}
    if known["project"] != project:
        raise InputError(f"--wandb {project}: this run is in project {known['project']!r}, which would be right")
    run = wandb.init(
        project=project,
        id=known["id"],
        resume="allow",
        name=folder.resolve().name,
        config=dict(config),
        dir=str(folder),
    )
    # its own count of steps cannot go back to where a run is resumed
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    path.write_text(json.dumps({"project": project, "id": run.id}) + "\n", encoding="utf-8")
    return run
