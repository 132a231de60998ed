"""The committed experiment: several seeds, a second teacher and ablations, each run once and kept.

`python -m sala.demo.trials --work FOLDER --out FILE [--second-teacher FOLDER] [--only NAME ...]`
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch

from sala.bench import environment
from sala.data import load_tokenizer
from sala.demo.measure import (
    HYBRID_FULL,
    HYBRID_SPARSE,
    TEACHER,
    measure_cache,
    measure_language,
    measure_retrieval,
    read_ground,
)
from sala.demo.measure import variants as hybrid_variants
from sala.demo.plan import Amount, Plan
from sala.demo.progress import Moment, Observer, Say
from sala.demo.story import EMBEDDED_TEACHER, convert, describe, summary_lines
from sala.errors import InputError, RecipeError, nearest, require_writable
from sala.model.checkpoint import find_checkpoint
from sala.model.families import load_model
from sala.recipe import ConversionRecipe, load_recipe, parse_recipe

logger = logging.getLogger("sala.demo.trials")

Values = dict[str, Any]
Change = Callable[[Values], None]

SEEDS = (0, 1, 2)
LENGTHS = (512, 1024, 4096, 16384)
# where an ablation is asked: inside the training length, and far beyond it
ABLATION_LENGTHS = (512, 16384)
# a cache is the size it says at any two of them
CACHE_LENGTHS = (64, 192)
# bars that the summary compares with: haystack, model -> share at the longest length
BARS = {("text", HYBRID_FULL): 0.97, ("noise", HYBRID_FULL): 0.90, ("text", HYBRID_SPARSE): 0.88}
# of the teacher's accuracy at its training length
SHORT_BAR = 0.98
UNREAD_BAR = 0.75


def full_plan(recipe: str, questions: int = 256, lengths: Sequence[int] = LENGTHS) -> Plan:
    """Return the plan of a trial: the same number of questions everywhere."""
    return Plan(
        recipe=recipe,
        # the teacher, all softmax, is slow to ask at the longest and has long forgotten there
        questions={
            length: Amount(min(questions, 64) if length == max(lengths) else questions, questions) for length in lengths
        },
        repeats={},
        needle_length=0,
    )


def unchanged(values: Values) -> None:
    pass


def keep_rope(values: Values) -> None:
    values["conversion"]["attention_rope"] = True


def uniform(values: Values) -> None:
    values["conversion"]["keep"] = {"fraction": 0.25, "method": "uniform"}


def all_linear(values: Values) -> None:
    values["conversion"]["keep"] = {"method": "none"}


def without_scaling(values: Values) -> None:
    values["conversion"]["logits_scaling"] = None
    for stage in values["stages"]:
        stage["logits_scaling"] = False


def long_stage_dense(values: Values) -> None:
    for stage in values["stages"]:
        stage["sparse"] = False


def without_long_stage(values: Values) -> None:
    longest = max(stage["length"] for stage in values["stages"])
    values["stages"] = [stage for stage in values["stages"] if stage["length"] < longest]


def without_alignment(values: Values) -> None:
    values["stages"] = [stage for stage in values["stages"] if stage["loss"] != "align"]


def full_attention(hybrid: Any) -> dict[str, Any]:
    """Return the hybrid with full attention in its kept layers, by its name."""
    return {HYBRID_FULL: hybrid_variants(hybrid)[HYBRID_FULL]}


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: a change to the recipe, its seed, and which teacher.

    views: the models to measure, by name, of the finished hybrid; an ablation's are `full_attention`.
    """

    about: str
    change: Change = unchanged
    seed: int = 0
    second_teacher: bool = False
    views: Callable[[Any], dict[str, Any]] | None = None

    @property
    def ablates(self) -> bool:
        return self.change is not unchanged

    @property
    def asks_teacher(self) -> bool:
        """Whether its teacher is measured too: once each, for it does not depend on the conversion."""
        return not self.ablates and self.seed == 0

    def models(self, hybrid: Any) -> dict[str, Any]:
        views = self.views or (full_attention if self.ablates else hybrid_variants)
        return views(hybrid)


Trials = Mapping[str, Trial]
Summarize = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

TRIALS: dict[str, Trial] = {f"seed-{seed}": Trial("the recipe as it is", seed=seed) for seed in SEEDS} | {
    "second-teacher": Trial("another teacher, of another seed and depth", second_teacher=True),
    "rope-kept": Trial("rotary positions stay on the kept layers", keep_rope),
    "uniform": Trial("kept layers spread evenly instead of chosen", uniform),
    "all-linear": Trial("no layer stays attention", all_linear),
    "without-long-stage": Trial("trained without its longest windows", without_long_stage),
    "long-stage-dense": Trial("the long stage trained with full attention", long_stage_dense),
    "without-scaling": Trial("no logit scale on the kept layers", without_scaling),
    "without-alignment": Trial("layers scored and distilled with copied weights", without_alignment),
}


def run_trials(
    work: Path,
    out: Path,
    *,
    recipe: str = "demo",
    teacher: str = EMBEDDED_TEACHER,
    second_teacher: str | None = None,
    only: Sequence[str] = (),
    plan: Plan | None = None,
    trials: Trials = TRIALS,
    summary_of: Summarize | None = None,
    observer: Observer = lambda moment: None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Run what is missing in the folder `work` and return the summary of all that is there, written to the file `out`.

    `out` is written anew after every run. In `work` a run has its hybrid and, once it is complete, one JSON, so that an
    interrupted experiment goes on where it stopped; a run of another recipe, plan or teacher is refused rather than
    mixed in.

    Args:
        second_teacher: needed by the trial of that name, which is left out without one.
        only: names in `trials`; all when empty.
        summary_of: the runs in the order of `trials` -> what is written; `summarize` when None.

    Raises:
        InputError: an unknown trial, or a run of another experiment in `work`.
    """
    for name in only:
        if name not in trials:
            raise InputError(f"trial {name!r} is unknown{nearest(name, trials)}; known: {', '.join(trials)}")
    if second_teacher is None and any(trials[name].second_teacher for name in only):
        raise InputError("a trial of the second teacher needs one; expected --second-teacher FOLDER")
    names = only or [name for name, trial in trials.items() if second_teacher is not None or not trial.second_teacher]
    plan = plan or full_plan(recipe)
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    summary = _summary_of_all(work, trials, summary_of or summarize)
    for name in names:
        trial = trials[name]
        source = second_teacher if trial.second_teacher and second_teacher is not None else teacher
        resolved, own_plan = trial_recipe(trial, plan.recipe), trial_plan(trial, plan)
        path = work / f"{name}.json"
        if path.exists():
            _require_same(path, Path(source).name, resolved, own_plan)
            say(f"{name}: done before")
            continue
        say(f"{name}: {trial.about}")
        run = {"name": name, "about": trial.about} | _run(trial, source, resolved, own_plan, work / name, observer, say)
        write_json(path, run)
        summary = _summary_of_all(work, trials, summary_of or summarize)
        write_json(out, summary)
        for line in summary_lines(run["retrieval"]):
            say(f"  {line}")
    write_json(out, summary)
    return summary


def _summary_of_all(work: Path, trials: Trials, summary_of: Summarize) -> dict[str, Any]:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in work.glob("*.json")}
    return summary_of([found[name] for name in trials if name in found])


def trial_plan(trial: Trial, plan: Plan) -> Plan:
    """Return what the trial measures: all but the seeds, and those with views of their own, are asked where a difference
    would show."""
    if trial.views is not None or not (trial.ablates or trial.second_teacher):
        return plan
    ends = {length: amount for length, amount in plan.questions.items() if length in ABLATION_LENGTHS}
    return replace(plan, questions=ends or plan.questions)


def trial_recipe(trial: Trial, recipe: str) -> ConversionRecipe:
    """Return the recipe with the trial's change and seed."""
    base = load_recipe(recipe)
    if not isinstance(base, ConversionRecipe):
        raise RecipeError(f"recipe {recipe!r} trains a model from scratch; trials need a conversion")
    # only what was written: a default that is written out can disagree with a change
    values = base.model_dump(mode="json", exclude_unset=True)
    values["seed"] = trial.seed
    trial.change(values)
    changed = parse_recipe(values, f"{recipe}, changed")
    assert isinstance(changed, ConversionRecipe)
    return changed


def _run(
    trial: Trial, teacher: str, recipe: ConversionRecipe, plan: Plan, folder: Path, observer: Observer, say: Say
) -> dict[str, Any]:
    model = load_model(teacher, dtype=torch.float32)
    tokenizer = load_tokenizer(find_checkpoint(teacher))
    ground = read_ground(tokenizer)
    started = perf_counter()
    if folder.exists():
        say(f"{folder.name}: converted before, measuring it")
        conversion: dict[str, Any] = {"report": json.loads((folder / "report.json").read_text(encoding="utf-8"))}
    else:
        conversion = convert(model, tokenizer, recipe, folder, observer, say)
    converted_s = perf_counter() - started
    hybrid = load_model(folder, dtype=torch.float32)
    models = trial.models(hybrid)
    if trial.asks_teacher:
        models = {TEACHER: model} | models
    started = perf_counter()
    points = measure_retrieval(models, ground, plan, observer)
    return {
        "teacher": {"name": Path(teacher).name} | describe(model),
        "hybrid": describe(hybrid),
        "recipe": recipe.resolved,
        "plan": _plain(plan),
        "conversion": conversion["report"],
        "retrieval": points,
        "language": measure_language(models, ground, min(plan.lengths)),
        "cache": measure_cache(models, ground, CACHE_LENGTHS),
        "seconds": {"convert": converted_s, "retrieval": perf_counter() - started},
        "environment": environment(),
    }


def _require_same(path: Path, teacher: str, recipe: ConversionRecipe, plan: Plan) -> None:
    run = json.loads(path.read_text(encoding="utf-8"))
    for what, found, wanted in (
        ("teacher", run["teacher"]["name"], teacher),
        ("recipe", run["recipe"], recipe.resolved),
        ("plan", run["plan"], _plain(plan)),
    ):
        if found != wanted:
            raise InputError(f"{path} was run with another {what}; expected a new folder, or delete this run")


def _plain(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON gives it back: keys are text, tuples are lists."""
    return json.loads(json.dumps(asdict(plan)))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that the file is whole or not there."""
    working = path.with_suffix(".json.part")
    working.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    working.rename(path)


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all runs' figures in one table: every point, mean and spread over the seeds, and the bars."""
    seeds = [run for run in runs if run["name"].startswith("seed-")]
    return {
        "environment": environment(),
        "bars": _bars(seeds) if seeds else [],
        "over_seeds": _over_seeds(seeds) if seeds else [],
        "runs": {
            run["name"]: {
                "about": run["about"],
                "kept": run["conversion"]["kept"],
                "seed": run["recipe"]["seed"],
                "teacher": run["teacher"]["name"],
                "seconds": run["seconds"],
                "commit": run["environment"]["commit"],
                "hardware": run["environment"]["hardware"],
                "command": run["environment"]["command"],
                "points": [
                    {name: value for name, value in point.items() if name != "depths"} for point in run["retrieval"]
                ],
                "language": run["language"],
            }
            for run in runs
        },
    }


def _figures(runs: Sequence[Mapping[str, Any]], model: str, haystack: str, length: int, field: str) -> list[float]:
    wanted = (model, haystack, length)
    points = [point for run in runs for point in run["retrieval"]]
    return [p[field] for p in points if (p["model"], p["haystack"], p["length"]) == wanted and p[field] is not None]


def _over_seeds(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, standard deviation over seeds, and extremes of every point."""
    keys = dict.fromkeys((p["model"], p["haystack"], p["length"], p["questions"]) for p in runs[0]["retrieval"])
    rows = []
    for model, haystack, length, questions in keys:
        values = _figures(runs, model, haystack, length, "accuracy")
        unread = _figures(runs, model, haystack, length, "unread_share")
        rows.append(
            {
                "model": model,
                "haystack": haystack,
                "length": length,
                "questions_each": questions,
                "seeds": len(values),
                "mean": mean(values),
                "spread": stdev(values) if len(values) > 1 else None,
                "lowest": min(values),
                "highest": max(values),
                "unread_share": mean(unread) if unread else None,
            }
        )
    return rows


def _bars(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every bar with its figure: the mean over seeds, and whether it is met."""
    lengths = [point["length"] for point in runs[0]["retrieval"]]
    shortest, longest = min(lengths), max(lengths)
    rows = []

    def row(what: str, bar: float, values: Sequence[float]) -> None:
        if values:
            figure = mean(values)
            rows.append({"what": what, "bar": bar, "mean": figure, "lowest": min(values), "met": figure >= bar})

    for haystack in dict.fromkeys(point["haystack"] for point in runs[0]["retrieval"]):
        teacher = _figures(runs, TEACHER, haystack, shortest, "accuracy")
        hybrid = _figures(runs, HYBRID_FULL, haystack, shortest, "accuracy")
        if any(teacher):
            row(f"hybrid over teacher at {shortest} in {haystack}", SHORT_BAR, [mean(hybrid) / mean(teacher)])
    for (haystack, model), bar in BARS.items():
        row(f"{model} at {longest} in {haystack}", bar, _figures(runs, model, haystack, longest, "accuracy"))
    unread = _figures(runs, HYBRID_SPARSE, "text", longest, "unread_share")
    row(f"blocks unread at {longest}", UNREAD_BAR, unread)
    return rows


def summary_table(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown: bars, then every run at every length."""
    lines = ["| bar | wanted | mean over seeds | lowest | met |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['bar']:.2f} | {row['mean']:.3f} | {row['lowest']:.3f} | {'yes' if row['met'] else 'no'} |"
        for row in summary["bars"]
    ]
    for name, run in summary["runs"].items():
        points = run["points"]
        lengths = sorted({point["length"] for point in points})
        lines += ["", f"{name}: {run['about']}; kept layers {run['kept']}"]
        lines += [f"| | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
        for model, haystack in dict.fromkeys((point["model"], point["haystack"]) for point in points):
            row = [p for p in points if (p["model"], p["haystack"]) == (model, haystack)]
            lines.append(f"| {model}, {haystack} | {' | '.join(format(p['accuracy'], '.3f') for p in row)} |")
    return "\n".join(lines)


def log_moment(moment: Moment) -> None:
    """Log every fiftieth step, and the last."""
    if moment.step == moment.steps or moment.step % 50 == 0:
        loss = "" if moment.loss is None else f", loss {moment.loss:.4f}"
        left = "" if moment.seconds_left is None else f", {moment.seconds_left:.0f} s left"
        logger.info("%s %s/%s%s%s %s", moment.stage, moment.step, moment.steps, loss, left, moment.detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/trials"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/retrieval.json"), help="the summary")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--teacher", default=EMBEDDED_TEACHER)
    parser.add_argument("--second-teacher")
    parser.add_argument("--only", nargs="*", default=[], help=f"of: {', '.join(TRIALS)}")
    parser.add_argument("--questions", type=int, default=256, help="a point")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    require_writable(arguments.out)
    summary = run_trials(
        arguments.work,
        arguments.out,
        recipe=arguments.recipe,
        teacher=arguments.teacher,
        second_teacher=arguments.second_teacher,
        only=arguments.only,
        plan=full_plan(arguments.recipe, arguments.questions),
        observer=log_moment,
        say=logger.info,
    )
    print(summary_table(summary))


if __name__ == "__main__":
    main()
