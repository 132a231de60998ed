"""What the long texts alone buy: the teacher itself, trained on the conversion's long stage, with and without stretched rotations.

`python -m sala.demo.controls --work FOLDER --out FILE [--only NAME ...]`; interrupted, the same command resumes. The table that it
writes separates the architecture from the training: a hybrid that reads far is worth something if these do not.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sala.bench import environment
from sala.data import load_tokenizer
from sala.demo.measure import TEACHER, measure_language, measure_retrieval, read_ground
from sala.demo.plan import Plan
from sala.demo.progress import Moment, Observer, Say
from sala.demo.story import EMBEDDED_TEACHER, summary_lines
from sala.demo.trials import SEEDS, full_plan, log_moment, write_json
from sala.errors import InputError, RecipeError, nearest, require_writable
from sala.model import MiniCPMSALAConfig
from sala.model.checkpoint import find_checkpoint
from sala.model.families import load_config, load_model
from sala.recipe import TrainingRecipe, load_recipe, parse_recipe
from sala.runs import run_recipe
from sala.runs.identity import FINAL
from sala.train import Progress

logger = logging.getLogger("sala.demo.controls")

LONGEST = 16384


def unchanged(config: MiniCPMSALAConfig) -> dict[str, Any]:
    return {}


def yarn(config: MiniCPMSALAConfig) -> dict[str, Any]:
    """Return the fields that stretch the trained length to the longest by YaRN (arXiv 2309.00071)."""
    trained = config.max_position_embeddings
    scaling = {"rope_type": "yarn", "factor": LONGEST / trained, "original_max_position_embeddings": trained}
    return {"rope_scaling": scaling, "max_position_embeddings": LONGEST}


def larger_base(config: MiniCPMSALAConfig) -> dict[str, Any]:
    """Return the fields that slow the slowest rotation down by the same factor: base * factor^(d / (d - 2))."""
    width = config.head_dim
    assert width is not None
    factor = LONGEST / config.max_position_embeddings
    return {"rope_theta": config.rope_theta * factor ** (width / (width - 2)), "max_position_embeddings": LONGEST}


@dataclass(frozen=True, slots=True)
class Control:
    """One teacher: how its rotations are changed, and the seed of its long stage; None: it is not trained further."""

    about: str
    positions: Callable[[MiniCPMSALAConfig], dict[str, Any]] = unchanged
    seed: int | None = None


CONTROLS: dict[str, Control] = {"teacher": Control("the teacher as it is")} | {
    f"{name}-{seed}": Control(about, positions, seed)
    for name, about, positions in (
        ("long", "the long stage, rotations as they are", unchanged),
        ("long-yarn", "the long stage, rotations stretched by YaRN", yarn),
        ("long-base", "the long stage, rotations with a larger base", larger_base),
    )
    for seed in SEEDS
}


def control_recipe(recipe: str, seed: int) -> TrainingRecipe:
    """Return a conversion's longest stage alone, for a model whose layers are all full attention.

    Raises:
        RecipeError: the recipe's longest stage needs a teacher.
    """
    base = load_recipe(recipe).resolved
    longest = max(base["stages"], key=lambda stage: stage["length"])
    stage = {name: value for name, value in longest.items() if value is not None} | {
        "sparse": False,
        "logits_scaling": False,
    }
    kept = {name: base[name] for name in ("optimizer", "precision", "compile", "stored_as")}
    control = parse_recipe({**kept, "name": f"{recipe}-control", "seed": seed, "stages": [stage]}, recipe)
    if not isinstance(control, TrainingRecipe):
        raise RecipeError(f"recipe {recipe!r}: its longest stage needs a teacher; expected one that trains by itself")
    return control


def run_controls(
    work: Path,
    out: Path,
    *,
    recipe: str = "demo",
    teacher: str = EMBEDDED_TEACHER,
    only: Sequence[str] = (),
    plan: Plan | None = None,
    say: Say = lambda line: None,
    observer: Observer = lambda moment: None,
) -> dict[str, Any]:
    """Train and measure what is missing in the folder `work`, and return all of it, written to the file `out`.

    Raises:
        InputError: a control that is not in `CONTROLS`.
    """
    for name in only:
        if name not in CONTROLS:
            raise InputError(
                f"control {name!r} is unknown{nearest(name, CONTROLS)}; expected one of {', '.join(CONTROLS)}"
            )
    plan = plan or full_plan(recipe)
    work.mkdir(parents=True, exist_ok=True)
    for name in only or CONTROLS:
        path = work / f"{name}.json"
        if path.exists():
            say(f"{name}: measured before")
            continue
        say(f"{name}: {CONTROLS[name].about}")
        run = {"name": name, "about": CONTROLS[name].about} | _run(
            CONTROLS[name], recipe, teacher, plan, work / name, observer
        )
        write_json(path, run)
        for line in summary_lines(run["retrieval"]):
            say(f"  {line}")
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in work.glob("*.json")}
    summary = {"environment": environment(), "runs": {name: found[name] for name in CONTROLS if name in found}}
    write_json(out, summary)
    return summary


def _run(control: Control, recipe: str, teacher: str, plan: Plan, folder: Path, observer: Observer) -> dict[str, Any]:
    tokenizer = load_tokenizer(find_checkpoint(teacher))
    model = load_model(teacher, dtype=torch.float32, **control.positions(load_config(teacher)))
    resolved = None
    if control.seed is not None:
        training = control_recipe(recipe, control.seed)
        resolved = training.resolved
        if not (folder / FINAL).is_dir():
            run_recipe(training, folder, tokenizer=tokenizer, model=model, observer=_steps(observer))
        model = load_model(folder / FINAL, dtype=torch.float32)
    ground, models = read_ground(tokenizer), {TEACHER: model}
    return {
        "recipe": resolved,
        "rope_theta": model.config.rope_theta,
        "rope_scaling": model.config.rope_scaling,
        "retrieval": [
            {name: value for name, value in point.items() if name != "depths"}
            for point in measure_retrieval(models, ground, plan, observer)
        ],
        "language": measure_language(models, ground, min(plan.lengths)),
        "environment": environment(),
    }


def _steps(observer: Observer) -> Callable[[Progress], None]:
    def note(progress: Progress) -> None:
        left = progress.seconds_left
        observer(
            Moment("convert", progress.stage, progress.step, progress.steps, loss=progress.loss, seconds_left=left)
        )

    return note


def controls_table(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown: a row a run and haystack, a column a length."""
    lengths = sorted({point["length"] for run in summary["runs"].values() for point in run["retrieval"]})
    lines = [f"| | {' | '.join(map(str, lengths))} | nats a token |", "|---" * (len(lengths) + 2) + "|"]
    for name, run in summary["runs"].items():
        for haystack in dict.fromkeys(point["haystack"] for point in run["retrieval"]):
            cells = [f"{point['accuracy']:.3f}" for point in run["retrieval"] if point["haystack"] == haystack]
            loss = run["language"][0]["text"]["loss"]
            lines.append(f"| {name}, {haystack} | {' | '.join(cells)} | {loss:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/controls"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/controls.json"), help="the summary")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--only", nargs="*", default=[], help=f"of: {', '.join(CONTROLS)}")
    parser.add_argument("--questions", type=int, default=256, help="a point")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    require_writable(arguments.out)
    plan = full_plan(arguments.recipe, arguments.questions)
    summary = run_controls(
        arguments.work,
        arguments.out,
        recipe=arguments.recipe,
        only=arguments.only,
        plan=plan,
        say=logger.info,
        observer=log_moment,
    )
    print(controls_table(summary))


if __name__ == "__main__":
    main()
