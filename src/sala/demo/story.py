"""The whole story on the embedded teacher: convert it, ask both, measure both, and write a report."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sala.bench import environment, latency, peak_memory
from sala.data import load_tokenizer
from sala.demo.folder import RESULTS, report_folder
from sala.demo.measure import (
    HYBRID_FULL,
    HYBRID_SPARSE,
    TEACHER,
    Ground,
    layer_weight,
    measure_language,
    measure_retrieval,
    read_ground,
    variants,
    work_of,
)
from sala.demo.page import write_page
from sala.demo.plan import FULL, QUICK, Plan
from sala.demo.plots import write_plots
from sala.demo.progress import Meter, Moment, Observer, Say
from sala.engine import DEFAULT_CHUNK
from sala.errors import RecipeError
from sala.eval import find_needle, layer_scorers
from sala.eval.needle import SEED as NEEDLE_SEED
from sala.eval.retrieval import EVALUATION_SEED
from sala.model.checkpoint import find_checkpoint, output_folder, read_json
from sala.model.families import load_model
from sala.recipe import ConversionRecipe, load_recipe
from sala.runs import make_model
from sala.runs.final import write_final
from sala.runs.stages import StageRunner
from sala.train import Progress, read_data

EMBEDDED_TEACHER = "embedded-teacher"


def run_demo(
    out: Path,
    quick: bool = False,
    *,
    teacher: str | Path = EMBEDDED_TEACHER,
    plan: Plan | None = None,
    settings: tuple[str, ...] = (),
    observer: Observer = lambda moment: None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Run the demo into the folder `out` and return what stands in its `results.json`.

    `out` appears when everything is done, and replaces an earlier report only then (see `report_folder`). In it:
    `index.html`, which needs nothing else, the plots as PNG, `results.json`, and `hybrid/`, a checkpoint folder.

    Args:
        quick: the plan that takes two minutes instead of ten.
        teacher: a checkpoint whose tokenizer has the task words.
        plan: other numbers than those of `quick`.
        settings: changes to the plan's recipe, `a.b=c`.
        observer: told every step. say: told every line worth reading.

    Raises:
        InputError: `out` is something else than a report; the tokenizer has no task words.
        RecipeError: the plan's recipe is not a conversion, or does not fit the teacher.
    """
    plan = plan or (QUICK if quick else FULL)
    recipe = load_recipe(plan.recipe, settings)
    if not isinstance(recipe, ConversionRecipe):
        raise RecipeError(f"recipe {plan.recipe!r} trains a model from scratch; the demo needs a conversion")
    seconds: dict[str, float] = {}
    with report_folder(out) as folder:
        model = load_model(teacher, dtype=torch.float32)
        tokenizer = load_tokenizer(find_checkpoint(teacher))
        ground = read_ground(tokenizer)
        with _timed(seconds, "convert"):
            conversion = convert(model, tokenizer, recipe, folder / "hybrid", observer, say)
        # what is measured is what was written
        hybrid = load_model(folder / "hybrid", dtype=torch.float32)
        models = {TEACHER: model} | variants(hybrid)
        with _timed(seconds, "retrieval"):
            points = measure_retrieval(models, ground, plan, observer)
            language = measure_language(models, ground, min(plan.lengths))
        for line in summary_lines(points):
            say(line)
        with _timed(seconds, "latency"):
            costs = _latency(models, ground, plan, observer)
        with _timed(seconds, "needle"):
            needle = _needle(models, tokenizer, ground, plan, observer)
        say(needle_line(needle))
        observer(Moment("report", "report", 0, 1))
        results = {
            "quick": quick,
            "environment": environment(),
            "seeds": {"conversion": recipe.seed, "evaluation": EVALUATION_SEED, "needle": NEEDLE_SEED},
            "plan": asdict(plan),
            "recipe": recipe.resolved,
            "trained_length": {
                "teacher": model.config.max_position_embeddings,
                "hybrid": max(stage.length for stage in recipe.stages),
            },
            "teacher": describe(model),
            "hybrid": describe(hybrid),
            "conversion": conversion,
            "retrieval": points,
            "language": language,
            "latency": costs,
            "needle": needle,
            "seconds": seconds | {"total": sum(seconds.values())},
        }
        write_plots(results, folder)
        write_page(results, folder)
        (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        observer(Moment("report", "report", 1, 1))
    return results


def convert(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: ConversionRecipe,
    out: Path,
    observer: Observer,
    say: Say,
) -> dict[str, Any]:
    """Convert `model` into the checkpoint folder `out`; return HALO's report and the loss of every step."""
    steps: list[dict[str, Any]] = []

    def watch(progress: Progress) -> None:
        steps.append(asdict(progress))
        observer(
            Moment(
                "convert",
                progress.stage,
                progress.step,
                progress.steps,
                loss=progress.loss,
                learning_rate=progress.learning_rate,
                gradient_norm=progress.gradient_norm,
                tokens_per_s=progress.tokens_per_s,
                seconds_left=progress.seconds_left,
                mfu=progress.mfu,
                memory_bytes=progress.memory_bytes,
            )
        )

    data = read_data(recipe, tokenizer)
    runner = StageRunner(recipe, data, watch)
    # in memory: an interrupted demo begins anew
    scorers = layer_scorers(tokenizer, **recipe.conversion.scoring.model_dump())
    hybrid, report = make_model(model, runner, scorers, say=say)
    with output_folder(out) as folder:
        write_final(folder, hybrid, report, tokenizer, recipe, data, steps, None)
    shown = ("stage", "step", "loss", "tokens_per_s")
    return {"report": read_json(out / "report.json"), "steps": [{name: row[name] for name in shown} for row in steps]}


def describe(model: Any) -> dict[str, Any]:
    """Return what a reader of the results needs to know of a model."""
    config = model.config
    return {
        "mixer_types": list(config.mixer_types),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "sparse_config": config.sparse_config,
        "attn_logits_scaling": config.attn_logits_scaling,
    }


def summary_lines(points: list[dict[str, Any]]) -> list[str]:
    """Return one line a model and haystack: accuracy at every length."""
    lines = []
    for name, haystack in dict.fromkeys((point["model"], point["haystack"]) for point in points):
        row = [point for point in points if (point["model"], point["haystack"]) == (name, haystack)]
        values = "  ".join(f"{point['length']:,}: {point['accuracy']:.1%}" for point in row)
        lines.append(f"{name}, {haystack}: {values}")
    return lines


def needle_line(needle: dict[str, Any]) -> str:
    found = "found" if needle["correct"] else "not found"
    return (
        f"needle in {needle['length']:,} tokens of source code: {found}, {needle['read_s']:.0f} s, "
        f"{needle['read_tokens_per_s']:,.0f} tokens/s"
    )


def _latency(models: Mapping[str, Any], ground: Ground, plan: Plan, observer: Observer) -> list[dict[str, Any]]:
    runs = [(length, name) for length, times in plan.repeats.items() for _ in range(times) for name in models]
    costs = [work_of(length, layer_weight(models[name])) for length, name in runs]
    meter = Meter(observer, "latency", len(runs), sum(costs))

    def note(done: int, total: int) -> None:
        length, name = runs[done - 1]
        meter.advance(f"{name}, {length:,} tokens", costs[done - 1])

    tokens_T = torch.from_numpy(ground.text[: max(plan.repeats)])
    points = latency(models, tokens_T, plan.repeats, on_run=note)
    return [asdict(point) for point in points]


def _needle(
    models: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    ground: Ground,
    plan: Plan,
    observer: Observer,
) -> dict[str, Any]:
    """One needle in the library's source from its start on, read by the sparsest model there is."""
    name = HYBRID_SPARSE if HYBRID_SPARSE in models else HYBRID_FULL
    meter = Meter(observer, "needle", -(-plan.needle_length // DEFAULT_CHUNK), plan.needle_length)
    done, started = 0, perf_counter()

    def note(tokens: int) -> None:
        nonlocal done
        done += tokens
        meter.advance(f"{name}, {plan.needle_length:,} tokens", tokens, done / (perf_counter() - started))

    with peak_memory() as memory:
        result = find_needle(
            models[name],
            tokenizer,
            ground.text,
            length=plan.needle_length,
            depth=plan.needle_depth,
            chunk_size=DEFAULT_CHUNK,
            on_tokens=note,
        )
    return {
        "model": name,
        "wanted_text": str(tokenizer.decode(list(result.wanted))).strip(),
        "answer_text": str(tokenizer.decode(list(result.answer))).strip(),
        "peak_bytes": memory.peak_bytes,
        "added_bytes": memory.added_bytes,
    } | asdict(result)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = perf_counter()
    yield
    seconds[name] = perf_counter() - started
