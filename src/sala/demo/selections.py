"""Ways to choose the layers, side by side: what each chooses after the same alignment, its cost, and what the choice gives.

`python -m sala.demo.selections --work FOLDER --out FILE`; interrupted, the same command goes on with the next seed.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sala.bench import environment
from sala.convert.choose import score_layers
from sala.convert.methods import Choice, as_rows, by_scores, greedy, joint_gates, kl_guided
from sala.convert.select import uniform
from sala.data import encode_documents, library_documents, load_tokenizer
from sala.demo.measure import HYBRID_FULL, measure_language, measure_retrieval, read_ground, variants
from sala.demo.orderings import orderings_plan
from sala.demo.trials import SEEDS, log_moment, write_json
from sala.errors import require_writable
from sala.eval import layer_scorers
from sala.eval.language import text_windows
from sala.model.checkpoint import find_checkpoint
from sala.model.families import load_model
from sala.recipe import ConversionRecipe, Keep, Stage, load_recipe
from sala.runs import make_model
from sala.runs.stages import StageRunner, ignore
from sala.train import Progress, read_data

logger = logging.getLogger("sala.demo.selections")

TEACHER = "embedded-teacher"
LENGTHS, QUESTIONS = (512, 2048), 128
# of 512 tokens, for the methods that ask for KL
WINDOWS = 16
RETRIEVAL = {"text_retrieval": 0.5, "noise_retrieval": 0.5}


class Aligned(StageRunner):
    """Aligns once: a second conversion is given the twins of the first."""

    known: dict[str, Any] = {}  # noqa: RUF012 - one alignment for all runners of a seed

    def __call__(self, model: Any, stage: Stage, *, teacher: Any = None) -> Progress:
        if stage.loss != "align":
            return super().__call__(model, stage, teacher=teacher)
        if stage.name not in self.known:
            last = super().__call__(model, stage, teacher=teacher)
            self.known[stage.name] = last, model, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        last, _, state = self.known[stage.name]
        model.load_state_dict(state)
        return last


def choices_of(teacher: Any, twins: Sequence[Any], tokenizer: Any, data: Any, recipe: ConversionRecipe) -> list[Choice]:
    """Return what every method keeps of a teacher with aligned twins: as many layers as the recipe, and what that costs."""
    layers = len(twins)
    keep = max(1, int(layers * (recipe.conversion.keep.fraction or 0)))
    scorers = layer_scorers(tokenizer, **recipe.conversion.scoring.model_dump())
    _, outcomes = score_layers(teacher, twins, scorers, lambda count, one: [one(i) for i in range(count)], logger.info)
    assert outcomes is not None
    text = encode_documents(tokenizer, library_documents("valid"))
    windows = text_windows(text, tokenizer.bos_token_id, length=512, windows=WINDOWS)
    retrieval = recipe.stages[0].model_copy(update={"data": RETRIEVAL, "batch": 4, "length": 256})

    def loss(model: Any, seed: int, step: int) -> tuple[Tensor, int]:
        batch = data.batches(retrieval, 7000 + seed)(step)
        logits = model(batch.input_ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
        weights = (batch.loss_weights[:, 1:] >= 1).float().flatten()
        return (each * weights).sum() / weights.sum(), batch.input_ids.numel()

    epsilon, seed = recipe.conversion.keep.epsilon, recipe.seed
    return [
        by_scores("halo", outcomes, keep, scorers.tokens, epsilon=epsilon, seed=seed),
        by_scores("recall_drop", outcomes, keep, scorers.tokens, epsilon=epsilon, seed=seed),
        kl_guided(teacher, twins, windows, keep, seed),
        greedy(teacher, twins, windows, keep, seed),
        joint_gates(teacher, twins, loss, keep),
        Choice("uniform", uniform(layers, keep), 0.0, tuple(float(i in uniform(layers, keep)) for i in range(layers))),
    ]


def run_seed(seed: int) -> dict[str, Any]:
    """Align once, choose by every method, train every distinct choice further in the same way, and measure it."""
    recipe = load_recipe("orderings", (f"seed={seed}",))
    assert isinstance(recipe, ConversionRecipe)
    tokenizer = load_tokenizer(find_checkpoint(TEACHER))
    teacher, data, ground = (
        load_model(TEACHER, dtype=torch.float32),
        read_data(recipe, tokenizer),
        read_ground(tokenizer),
    )
    Aligned.known.clear()

    def trained(keep: Keep, stages: Sequence[Stage]) -> Any:
        conversion = recipe.conversion.model_copy(update={"keep": keep})
        own = recipe.model_copy(update={"conversion": conversion, "stages": tuple(stages)})
        return make_model(teacher, Aligned(own, data, ignore), layer_scorers(tokenizer))[0]

    trained(Keep(count=1, method="uniform"), recipe.stages[:1])
    twins = list(Aligned.known[recipe.stages[0].name][1].twins)
    choices = choices_of(teacher, twins, tokenizer, data, recipe)
    results = []
    for kept in dict.fromkeys(choice.kept for choice in choices):
        logger.info("seed %s: training with layers %s", seed, kept)
        hybrid = {HYBRID_FULL: variants(trained(Keep(layers=kept), recipe.stages))[HYBRID_FULL]}
        points = measure_retrieval(hybrid, ground, orderings_plan(QUESTIONS, LENGTHS), log_moment)
        results.append(
            {
                "kept": list(kept),
                "recall": [{name: p[name] for name in ("haystack", "length", "questions", "accuracy")} for p in points],
                "language": measure_language(hybrid, ground, min(LENGTHS)),
            }
        )
    return {"seed": seed, "recipe": recipe.resolved, "choices": as_rows(choices), "results": results}


def summarize_selections(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one table: a row a method with what it chose, its cost, and recall and loss after the same further training."""
    rows = []
    for method in dict.fromkeys(choice["method"] for run in runs for choice in run["choices"]):
        chosen = [next(c for c in run["choices"] if c["method"] == method) for run in runs]
        given = [next(r for r in run["results"] if r["kept"] == c["kept"]) for run, c in zip(runs, chosen, strict=True)]
        recall = [mean(point["accuracy"] for point in result["recall"]) for result in given]
        loss = [result["language"][0]["text"]["loss"] for result in given]
        rows.append(
            {
                "method": method,
                "kept": [choice["kept"] for choice in chosen],
                "tokens": round(mean(choice["tokens"] for choice in chosen)),
                "frequency": [choice["frequency"] for choice in chosen],
                "recall": {"mean": mean(recall), "spread": stdev(recall) if len(recall) > 1 else None},
                "loss": {"mean": mean(loss), "spread": stdev(loss) if len(loss) > 1 else None},
            }
        )
    return {"environment": environment(), "teacher": TEACHER, "rows": rows, "runs": list(runs)}


def run_selections(work: Path, out: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Run the seeds that `work` does not have yet, and write the summary to `out` after each."""
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in seeds:
        path = work / f"seed-{seed}.json"
        if not path.exists():
            write_json(path, run_seed(seed))
        runs.append(json.loads(path.read_text(encoding="utf-8")))
        summary = summarize_selections(runs)
        write_json(out, summary)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sala.demo.selections", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the seeds")
    parser.add_argument("--out", type=Path, required=True, help="the summary, JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    require_writable(given.out)
    for row in run_selections(given.work, given.out, given.seeds)["rows"]:
        print(f"{row['method']}: {row['kept']}, {row['tokens']:,} tokens, recall {row['recall']['mean']:.3f}")


if __name__ == "__main__":
    main()
