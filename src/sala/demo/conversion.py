"""The report of a conversion: what the run did, and what the hybrid can do beside its teacher."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sala.bench import environment, latency
from sala.convert.step_zero import divergence, log_probs
from sala.data import Document, encode_stream, library_documents, load_tokenizer
from sala.demo.answers import answers
from sala.demo.conversion_page import write_conversion_page
from sala.demo.folder import RESULTS, report_folder
from sala.errors import InputError
from sala.eval import LocalReader, Setting, tasks_named
from sala.eval import Plan as EvalPlan
from sala.eval import run as evaluate
from sala.eval.language import text_windows
from sala.model.checkpoint import find_checkpoint, read_json
from sala.model.families import load_model
from sala.recipe import ConversionRecipe, load_recipe
from sala.runs.identity import FINAL, MEASURED, RECIPE
from sala.runs.record import in_stages, read_metrics, smooth
from sala.runs.start import START
from sala.train.losses import following
from sala.train.passes import MicroBatch

TEACHER, HYBRID = "teacher", "hybrid"
DIVERGENCE_LENGTH = 512
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short polite e-mail that moves a meeting to Friday.",
    "What is 17 times 3?",
)


@dataclass(frozen=True, slots=True)
class ReportPlan:
    """What is measured: tasks of `sala eval` at lengths, the time of lengths, answers to prompts.

    prose: a file of text for `ppl` and haystacks; the standard library's source code when None.
    divergence_windows: for KL(teacher || hybrid), of `DIVERGENCE_LENGTH` tokens.
    """

    lengths: tuple[int, ...] = (512, 2048)
    tasks: tuple[str, ...] = ("ppl", "niah_single_2")
    samples: int = 8
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 64
    prose: Path | None = None
    divergence_windows: int = 8


def report_conversion(
    run: Path, out: Path, plan: ReportPlan, *, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure the finished conversion in the folder `run` into the folder `out`; return what stands in its `results.json`.

    `out` appears when everything is done (see `report_folder`); beside `index.html` and `results.json` it holds the samples
    of the evaluation. Both models compute in float32.

    Raises:
        InputError: `run` is no finished conversion, or its teacher is not where it was.
    """
    recipe, teacher_name = _conversion_of(run)
    with report_folder(out) as folder:
        say("loading both models")
        names = {TEACHER: teacher_name, HYBRID: str(run / FINAL)}
        models = {name: load_model(find_checkpoint(place), dtype=torch.float32) for name, place in names.items()}
        tokenizer = load_tokenizer(run / FINAL)
        setting = Setting(tokenizer, files={} if plan.prose is None else {"prose": plan.prose})
        text = _text(setting, max(DIVERGENCE_LENGTH, *plan.lengths))
        quality = {}
        for name, model in models.items():
            say(f"{', '.join(plan.tasks)}: {name}")
            quality[name] = _quality(model, name, setting, plan, folder / name)
        say("divergence from the teacher")
        kl = _divergence(models[TEACHER], models[HYBRID], text, tokenizer.bos_token_id, plan.divergence_windows)
        say("time to first token")
        costs = latency(models, torch.from_numpy(text), dict.fromkeys(plan.lengths, 1))
        chat = tokenizer.chat_template is not None
        del models
        said = list(
            answers(
                list(names.values()), plan.prompts, chat=chat, max_new_tokens=plan.new_tokens, dtype="float32", say=say
            )
        )
        results = {
            "environment": environment(),
            "teacher": teacher_name,
            "plan": asdict(plan) | {"prose": None if plan.prose is None else str(plan.prose)},
            "recipe": recipe.resolved,
            "report": read_json(run / FINAL / "report.json"),
            "stages": stages_of(read_metrics(run)),
            "quality": quality,
            "divergence": kl,
            "latency": [asdict(point) for point in costs],
            "answers": [
                asdict(one) | {"model": next(name for name, place in names.items() if place == one.model)}
                for one in said
            ],
        }
        write_conversion_page(results, run, folder)
        (folder / RESULTS).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def _conversion_of(run: Path) -> tuple[ConversionRecipe, str]:
    """Return the recipe of a finished conversion and where its teacher is."""
    if not (run / FINAL).is_dir():
        raise InputError(f"{str(run)!r} has no folder {FINAL}; expected a finished run of `sala convert`")
    recipe = load_recipe(run / RECIPE)
    start = read_json(run / MEASURED / f"{START}.json")
    if not isinstance(recipe, ConversionRecipe) or start["checkpoint"] is None:
        raise InputError(f"the run in {str(run)!r} converts nothing; expected one of `sala convert`")
    if start["checkpoint"]["place"] is None:
        raise InputError(f"the run in {str(run)!r} was given a teacher without a name, which cannot be found again")
    return recipe, start["checkpoint"]["place"]


def stages_of(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each stage did: its last loss, smoothed, the first one, and the validation losses with their tokens."""
    stages = []
    for rows in in_stages(steps):
        losses = smooth([row["loss"] for row in rows])
        looks = [[row["tokens"], row["validation_loss"]] for row in rows if row["validation_loss"] is not None]
        stages.append(
            {
                "name": rows[0]["stage"],
                "steps": rows[-1]["step"],
                "tokens": rows[-1]["tokens"],
                "first_loss": losses[0],
                "loss": losses[-1],
                "validation": looks,
            }
        )
    return stages


def _quality(model: Any, name: str, setting: Setting, plan: ReportPlan, out: Path) -> list[dict[str, Any]]:
    tasks, _ = tasks_named(plan.tasks, setting.files)
    asked = EvalPlan(tuple(tasks), plan.lengths, plan.samples, {"model": name})
    rows = evaluate(asked, LocalReader(model, setting.tokenizer, name=name), setting, out)
    return [asdict(row) for row in rows]


def _text(setting: Setting, least: int) -> np.ndarray:
    """Return the tokens of the given prose, or of the standard library's test split."""
    given = [Document("prose", setting.read("prose"))] if "prose" in setting.files else library_documents("test")
    ids = encode_stream(setting.tokenizer, given, [])
    if len(ids) < least:
        raise InputError(f"the text has {len(ids):,} tokens; expected at least {least:,}")
    return ids


@torch.no_grad()
def _divergence(teacher: Any, hybrid: Any, text: np.ndarray, begin: int | None, windows: int) -> dict[str, Any]:
    """Return the mean KL(teacher || hybrid) on held-out text in nats a token, with its standard error over windows."""
    each = []
    for ids_T in text_windows(text, begin, length=DIVERGENCE_LENGTH, windows=windows):
        ids_1T = ids_T[None]
        sample = MicroBatch(ids_1T, following(ids_1T), torch.ones(ids_1T.shape))
        each.append(divergence(log_probs(teacher, sample), hybrid, sample))
    return {"mean": float(np.mean(each)), "error": float(np.std(each, ddof=1) / len(each) ** 0.5), "windows": len(each)}
