"""What a conversion costs in tokens: the hybrid's loss on unseen text while it learns, against its teacher's.

`python -m sala.demo.learning_curve --work FOLDER --out FILE --plot FILE`; interrupted, the same command goes on.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from sala.bench import environment
from sala.data import load_tokenizer
from sala.demo.measure import TEACHER, measure_language, read_ground, variants
from sala.demo.plots import INK, save_plot
from sala.demo.story import EMBEDDED_TEACHER
from sala.demo.trials import SEEDS, write_json
from sala.errors import InputError, RecipeError, require_writable
from sala.eval import layer_scorers, text_loss
from sala.model.checkpoint import find_checkpoint
from sala.model.families import load_model
from sala.recipe import ConversionRecipe, Stage, TrainingRecipe, load_recipe
from sala.runs import make_model
from sala.runs.stages import StageRunner
from sala.train import Progress, read_data

logger = logging.getLogger("sala.demo.learning_curve")

# what the teacher was trained with
TEACHER_RECIPE = "teacher"
# of the loss of the teacher, and of its training tokens
BAR, SHARE = 0.02, 0.25
WINDOWS = 64
# a recipe's tokens between two looks
EVERY = 1 / 20


def learning_curve(recipe: ConversionRecipe, teacher: str = EMBEDDED_TEACHER, windows: int = WINDOWS) -> dict[str, Any]:
    """Convert `teacher` and return its hybrid's loss on unseen text against the tokens trained on.

    The loss is that of windows of the teacher's training length, in nats a token, measured whenever a twentieth of the
    recipe's tokens has passed, alignment's included, at the start of the first stage that trains a hybrid and at the end
    of each stage.
    """
    model = load_model(teacher, dtype=torch.float32)
    tokenizer = load_tokenizer(find_checkpoint(teacher))
    ground = read_ground(tokenizer)
    length = model.config.max_position_embeddings
    planned = sum(stage.tokens for stage in recipe.stages)
    points: list[dict[str, Any]] = []
    trained: list[Any] = []
    tokens = 0

    def look(stage: str) -> None:
        loss = text_loss(trained[-1], ground.text, ground.words.begin, length=length, windows=windows).loss
        points.append({"stage": stage, "tokens": tokens, "loss": loss})
        logger.info("%s, %s tokens: %.4f", stage, f"{tokens:,}", loss)

    class Watched(StageRunner):
        def __call__(self, model: Any, stage: Stage, *, teacher: Any = None) -> Progress:
            if stage.loss != "align":
                trained.append(model)
                if not points:
                    look(stage.name)
            return super().__call__(model, stage, teacher=teacher)

    sizes = {stage.name: stage.batch * stage.length for stage in recipe.stages}

    def note(progress: Progress) -> None:
        nonlocal tokens
        tokens += sizes[progress.stage]
        last = points[-1]["tokens"] if points else 0
        if trained and (progress.step == progress.steps or tokens - last >= EVERY * planned):
            look(progress.stage)

    runner = Watched(recipe, read_data(recipe, tokenizer), note)
    scorers = layer_scorers(tokenizer, **recipe.conversion.scoring.model_dump())
    hybrid, report = make_model(model, runner, scorers, say=logger.info)
    assert report is not None
    models = {TEACHER: model} | variants(hybrid)
    return {
        "seed": recipe.seed,
        "kept": list(report.kept),
        "teacher_loss": text_loss(model, ground.text, ground.words.begin, length=length, windows=windows).loss,
        "windows": windows,
        "length": length,
        "points": points,
        "language": measure_language(models, ground, length),
        "recipe": recipe.resolved,
        "environment": environment(),
    }


def run_curves(
    work: Path, out: Path, *, recipe: str = "language", teacher: str = EMBEDDED_TEACHER, seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    """Run the seeds that the folder `work` does not have yet; write the summary of those asked for to `out` after each.

    Raises:
        InputError: a run of another recipe in `work`.
        RecipeError: the recipe is no conversion.
    """
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in seeds:
        path = work / f"seed-{seed}.json"
        wanted = load_recipe(recipe, (f"seed={seed}",))
        if not isinstance(wanted, ConversionRecipe):
            raise RecipeError(f"recipe {recipe!r} trains a model from scratch; a learning curve needs a conversion")
        if not path.exists():
            write_json(path, learning_curve(wanted, teacher))
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["recipe"] != wanted.resolved:
            raise InputError(f"{path} was run with another recipe; expected a new folder, or delete this run")
        runs.append(run)
        summary = summarize_curves(runs, teacher_tokens())
        write_json(out, summary)
    return summary


def teacher_tokens() -> int:
    """Return the tokens that the embedded teacher was trained on."""
    recipe = load_recipe(TEACHER_RECIPE)
    assert isinstance(recipe, TrainingRecipe)
    return sum(stage.tokens for stage in recipe.stages)


def summarize_curves(runs: Sequence[Mapping[str, Any]], tokens_of_teacher: int) -> dict[str, Any]:
    """Return the runs with the last loss over the teacher's (mean and spread over seeds) and what the tokens are a share of."""
    ratios = [run["points"][-1]["loss"] / run["teacher_loss"] for run in runs]
    share = runs[0]["points"][-1]["tokens"] / tokens_of_teacher
    return {
        "environment": environment(),
        "bar": {"loss_over_teacher": 1 + BAR, "share_of_tokens": SHARE},
        "loss_over_teacher": {
            "mean": mean(ratios),
            "spread": stdev(ratios) if len(ratios) > 1 else None,
            "highest": max(ratios),
        },
        "teacher_tokens": tokens_of_teacher,
        "share_of_tokens": share,
        "met": mean(ratios) <= 1 + BAR and share <= SHARE,
        "runs": list(runs),
    }


def draw_curves(axes: Axes, summary: dict[str, Any]) -> None:
    """Draw loss against tokens, a line a seed, with the teacher's loss and the bar above it."""
    first = summary["runs"][0]
    for run, style in zip(summary["runs"], ("-", "--", ":", "-."), strict=False):
        tokens = [point["tokens"] for point in run["points"]]
        axes.plot(
            tokens, [p["loss"] for p in run["points"]], style, color="#0072B2", label=f"hybrid, seed {run['seed']}"
        )
    teacher = first["teacher_loss"]
    axes.axhline(teacher, color="#D55E00", label=f"teacher, {summary['teacher_tokens'] / 1e6:.2f}M tokens")
    axes.axhspan(teacher, teacher * (1 + BAR), color="#D55E00", alpha=0.15, linewidth=0, label=f"within {BAR:.0%}")
    ends = {point["stage"]: point["tokens"] for point in first["points"]}
    for end in list(ends.values())[:-1]:
        axes.axvline(end, color="#9aa3ae", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}M"))
    axes.set_xlabel("tokens trained on, alignment included", color=INK)
    axes.set_ylabel("nats a token of unseen text", color=INK)
    axes.set_title("Conversion: loss against tokens", fontsize=11, color=INK, loc="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/learning-curve"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning-curve.json"), help="the summary")
    parser.add_argument("--plot", type=Path, default=Path("docs/learning-curve.png"))
    parser.add_argument("--recipe", default="language")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for path in (arguments.out, arguments.plot):
        require_writable(path)
    summary = run_curves(arguments.work, arguments.out, recipe=arguments.recipe, seeds=arguments.seeds)
    save_plot(arguments.plot, draw_curves, summary)
    figure = summary["loss_over_teacher"]
    print(
        f"loss over the teacher's: {figure['mean']:.4f} (spread {figure['spread']}, highest {figure['highest']:.4f}), "
        f"with {summary['share_of_tokens']:.1%} of its tokens: {'met' if summary['met'] else 'not met'}"
    )


if __name__ == "__main__":
    main()
