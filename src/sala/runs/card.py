"""The model card of an exported folder: its README.md, with what the hub wants to know on top."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
import yaml

import sala
from sala.model.kinds import KINDS, runs
from sala.runs.record import in_stages, short, smooth

LOSSES = {
    "align": "mean squared error of each layer's linear twin against the attention that it may replace",
    "distill": "KL divergence from the teacher, nats a token",
    "next_token": "cross-entropy of the next token, nats",
}
VALIDATION = (
    "The validation loss is of held-out windows: alignment's own loss, and in every other stage the cross-entropy of the next "
    "token. "
)


def versions() -> dict[str, str]:
    """Return the versions that a card names."""
    return {
        "sala": sala.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }


def model_card(
    *,
    name: str,
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    parameters: int,
    metrics: Sequence[Mapping[str, Any]],
    data: Mapping[str, str],
    tokenizer_sha256: str,
    versions: Mapping[str, str],
    teacher: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Return the card of a model that a recipe made, or is making, as Markdown under a YAML header.

    Args:
        name: the card's title.
        recipe: resolved, `Recipe.resolved`.
        config: of the model, as in config.json.
        parameters: their number, tied ones once.
        metrics: the run's steps so far, `record.read_metrics`.
        data: what the stages drew from, name -> description with hashes.
        tokenizer_sha256: `sala.data.shards.tokenizer_hash`.
        versions: `versions()`.
        teacher: the model whose weights were converted or trained further; None when it started from random weights.
        base_model, license: the same model's name on the hub and its licence, where they are known; the recipe's `card` goes
            before them.
    """
    sections = {
        "How it was made": _stages(recipe, metrics),
        "Data": _data(data, tokenizer_sha256),
        "Versions": _versions(versions, recipe["seed"]),
        "Use": _use(name),
        "Limits": _limits(recipe, metrics, teacher, recipe["card"]["license"] or license),
    }
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    header = _metadata(config, recipe["card"], base_model, license)
    return f"---\n{header}---\n# {name}\n\n{_summary(recipe, config, parameters, teacher)}\n{body}"


def _metadata(config: Mapping[str, Any], given: Mapping[str, Any], base_model: str | None, license: str | None) -> str:
    kinds = set(config["mixer_types"])
    tags = ["sala", config["model_type"]]
    tags += ["linear-attention"] * runs(kinds, "lightning") + ["sparse-attention"] * runs(kinds, "infllm")
    facts = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    known = {
        "base_model": given["base_model"] or base_model,
        "license": given["license"] or license,
        "datasets": list(given["datasets"]),
        "language": list(given["language"]),
    }
    return yaml.safe_dump({name: value for name, value in known.items() if value} | facts, sort_keys=False)


def _summary(recipe: Mapping[str, Any], config: Mapping[str, Any], parameters: int, teacher: str | None) -> str:
    kinds = config["mixer_types"]
    layers = []
    for kind, facts in KINDS.items():
        places = [index for index, mixer in enumerate(kinds) if mixer == kind]
        if places:
            # those that are most of them need no list
            where = "" if len(places) > len(kinds) / 2 else f" (number {', '.join(map(str, places))}, from 0)"
            layers.append(f"{len(places)} of {facts.label}{where}")
    return (
        f"A causal language model of {parameters:,} parameters in {len(kinds)} layers: {', '.join(layers)}.\n"
        f"It was {_origin(recipe, teacher)} by the recipe `{recipe['name']}`, with sala."
    )


def _origin(recipe: Mapping[str, Any], teacher: str | None) -> str:
    if "conversion" in recipe:
        return f"converted from {teacher or 'a teacher without a name'}"
    return "trained from random weights" if teacher is None else f"trained further from {teacher}"


def _stages(recipe: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    begun = {rows[0]["stage_index"]: rows for rows in in_stages(metrics)}
    validated = recipe["validation"] is not None
    lines = [
        "| stage | loss | trains | length | tokens | learning rate | steps | final loss |"
        + " validation |" * validated,
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: |" + " ---: |" * validated,
        *(f"| {' | '.join(_row(stage, begun.get(i, ()), validated))} |" for i, stage in enumerate(recipe["stages"])),
    ]
    kinds = dict.fromkeys(stage["loss"] for stage in recipe["stages"])
    return (
        "\n".join(lines)
        + "\n\nThe final loss is a mean over the last steps, on training data. "
        + (VALIDATION if validated else "")
        + "; ".join(f"{kind}: {LOSSES[kind]}" for kind in kinds)
        + ".\nEvery number of the recipe is in `recipe.yaml` beside this card."
    )


def _row(stage: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], validated: bool) -> Iterator[str]:
    yield stage["name"]
    yield stage["loss"]
    yield "linear twins" if stage["loss"] == "align" else _trained(stage)
    yield f"{stage['length']:,}"
    done = rows[-1]["step"] if rows else 0
    yield short(done * stage["batch"] * stage["length"])
    yield _learning_rate(stage["learning_rate"])
    yield f"{done:,}" if done == stage["steps"] else f"{done:,} of {stage['steps']:,}"
    yield f"{smooth([row['loss'] for row in rows])[-1]:.4g}" if rows else "not begun"
    if validated:
        looks = [row["validation_loss"] for row in rows if row["validation_loss"] is not None]
        yield f"{looks[-1]:.4g}" if looks else "none"


def _trained(stage: Mapping[str, Any]) -> str:
    what = stage["trainable"].replace("_", " ")
    return f"{what}, queries and keys frozen" if stage["freeze_qk"] else what


def _learning_rate(curve: Mapping[str, Any]) -> str:
    course = f"{curve['peak']:g}" if curve["final"] is None else f"{curve['peak']:g} to {curve['final']:g}"
    warm_up = f", {curve['warmup_steps']:,} steps up" if curve["warmup_steps"] else ""
    return f"{course}, {curve['curve']}{warm_up}"


def _data(data: Mapping[str, str], tokenizer_sha256: str) -> str:
    rows = [f"- {name}: {description}" for name, description in data.items()]
    return "\n".join([*rows, f"- tokenizer: sha256 {tokenizer_sha256}"])


def _versions(versions: Mapping[str, str], seed: int) -> str:
    return f"{', '.join(f'{name} {number}' for name, number in versions.items())}; seed {seed}."


def _use(name: str) -> str:
    return f"""```python
import sala  # registers the architecture with transformers; nothing needs trust_remote_code
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # wherever this folder lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
```

On the command line: `sala generate --model {name} --prompt "Once upon a time"`."""


def _limits(
    recipe: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], teacher: str | None, license: str | None
) -> str:
    stages = recipe["stages"]
    begun = {row["stage_index"] for row in metrics}
    limits = []
    if not metrics or metrics[-1]["stage_index"] < len(stages) - 1 or metrics[-1]["step"] < metrics[-1]["steps"]:
        limits.append("The training is not finished: this is the model in the middle of its recipe.")
    if begun:
        longest = max(stages[index]["length"] for index in begun)
        limits.append(f"It was trained on windows of at most {longest:,} tokens; nothing is known of it beyond.")
    where = "" if recipe["validation"] else "The losses above are of training data. "
    limits.append(f"{where}No evaluation is part of this card: measure before you rely on it.")
    whose = "its data" if teacher is None else f"{teacher} and its data"
    terms = f"The licence is stated as {license}" if license else "Its licence follows from theirs"
    limits.append(f"What {whose} get wrong, it does too. {terms}; nobody has checked it here.")
    return "\n".join(f"- {limit}" for limit in limits)
