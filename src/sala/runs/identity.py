"""Whether a folder holds the run that is asked for: the same recipe, from the same start, as far as it has come."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sala.errors import CheckpointError, InputError, RecipeError
from sala.recipe import Recipe, load_recipe
from sala.runs.manifest import newest_facts
from sala.runs.measured import Measured
from sala.runs.start import START, require_same_start
from sala.train.parallel import ONE_PROCESS

FINAL = "final"
RECIPE, MEASURED, CHECKPOINTS = "recipe.yaml", "measured", "checkpoints"

# how a recipe is run, not what comes out: these may change from one start of a run to the next
HOW = ("mesh", "compile", "validation", "card")
HOW_OF_STAGE = ("mesh", "micro_batch", "activation_checkpointing")


class Finished(InputError):
    """The run is finished: nothing is left to do."""

    exit_code = 0


def require_own(path: Path, recipe: Recipe, start: Mapping[str, Any]) -> None:
    """Require that `path` is new, or the run of `recipe` from `start` that can go on."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{str(path)!r} is a file; expected a new folder")
    if not path.exists() or not _begun(path):
        return
    if not (path / RECIPE).is_file():
        raise InputError(f"{str(path)!r} exists and is no folder of a run; expected a new folder")
    recorded = load_recipe(path / RECIPE)
    begun = _stages_begun(path, recorded)
    _require_same(_what(recorded, begun), _what(recipe, begun), path)
    if (there := Measured(path / MEASURED, ONE_PROCESS).known(START)) is not None:
        unread = recipe.sources.keys() - _sources_read(recipe, begun)
        data = {name: description for name, description in start["data"].items() if name not in unread}
        require_same_start(there, {**start, "data": data}, path)
    if (path / FINAL).exists():
        raise Finished(f"the run in {str(path)!r} is finished: its model is {str(path / FINAL)!r}")


def _begun(path: Path) -> bool:
    """Return whether a folder has more than a run that was killed in its first moments left in it."""
    left = [entry.name for entry in path.iterdir() if not entry.name.startswith(f".{RECIPE}.")]
    return bool(left) and not (left == [CHECKPOINTS] and not any((path / CHECKPOINTS).glob("step-*")))


def _stages_begun(path: Path, recipe: Recipe) -> int:
    """Return how many stages of a run have begun, at least one: up to that of its newest checkpoint. The others may change."""
    try:
        facts = newest_facts(path / CHECKPOINTS)
    except CheckpointError:
        # what it had begun is not known; whoever reads the checkpoint says what is wrong with it
        facts = {"stage": len(recipe.stages) - 1}
    if (path / FINAL).exists():
        return len(recipe.stages)
    return 1 if facts is None else facts["stage"] + 1


def _sources_read(recipe: Recipe, begun: int) -> set[str]:
    return {name for stage in recipe.stages[:begun] for name in stage.data}


def _what(recipe: Recipe, begun: int) -> dict[str, Any]:
    """Return a recipe as plain values, without how it is run and without the stages that have not begun."""
    resolved = recipe.resolved
    what = {name: value for name, value in resolved.items() if name not in HOW}
    what["stages"] = [
        {name: value for name, value in stage.items() if name not in HOW_OF_STAGE}
        for stage in resolved["stages"][:begun]
    ]
    read = _sources_read(recipe, begun)
    what["sources"] = {name: source for name, source in resolved["sources"].items() if name in read}
    return what


def _require_same(there: Any, given: Any, path: Path, place: str = "") -> None:
    if isinstance(there, dict) and isinstance(given, dict):
        for name in there | given:
            _require_same(there.get(name), given.get(name), path, f"{place}.{name}" if place else str(name))
    elif isinstance(there, list) and isinstance(given, list) and len(there) == len(given):
        for index, (left, right) in enumerate(zip(there, given, strict=True)):
            _require_same(left, right, path, f"{place}.{index}")
    elif isinstance(there, list) and isinstance(given, list):
        _require_same(len(there), len(given), path, f"the number of {place}")
    elif there != given:
        raise RecipeError(
            f"the run in {str(path)!r} has {place} = {there!r}, this recipe {given!r}; expected its own recipe "
            f"({path / RECIPE}), or a new folder"
        )
