"""The page of a conversion's report: one HTML file that needs nothing else."""

import re
from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from sala.demo.folder import PAGE
from sala.demo.page import STEP_ZERO_NAMES, duration, embedded, pairs, size, table, versions
from sala.demo.plots import length_label
from sala.model.kinds import KINDS
from sala.runs.identity import FINAL
from sala.runs.plot import plot_run

TRAINING, SELECTION = "training.png", "selection.png"
Results = dict[str, Any]


def write_conversion_page(results: Results, run: Path, folder: Path) -> None:
    """Write the page into `folder`, with the picture of the training and, where layers were scored, of the selection."""
    plot_run(run, folder / TRAINING)
    pictures = [(folder / TRAINING, "Training: loss of each stage, learning rate, gradient norm, speed.")]
    if (run / FINAL / SELECTION).is_file():
        pictures.append((run / FINAL / SELECTION, "Which layers stay attention, and why."))
    teacher, steps = escape(Path(results["teacher"]).name), results["stages"]
    body = [
        f"<h1>{teacher} as a hybrid</h1>",
        f"<p>Converted by the recipe <code>{escape(results['recipe']['name'])}</code> on "
        f"{sum(stage['tokens'] for stage in steps):,} tokens. Everything below is measured on this machine, in float32.</p>",
        *_section("Layers", _layers(results)),
        *_section("Quality by length", _quality(results)),
        *_section("Time and memory by length", _costs(results)),
        *_section("Stages", _stages(results)),
        *_section("Before any training", _step_zero(results)),
        *_section("What both answer", _answers(results)),
        *(
            f'<figure><img alt="" src="{embedded(path)}"><figcaption>{words}</figcaption></figure>'
            for path, words in pictures
        ),
        *_section("Made with", versions(results["environment"]["versions"])),
    ]
    (folder / PAGE).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{teacher} as a hybrid</title>\n'
        f"<style>{_style()}</style></head>\n<body><main>\n{chr(10).join(body)}\n</main></body></html>\n",
        encoding="utf-8",
    )


def _style() -> str:
    """Return the style of the demo's page."""
    page = resources.files("sala.demo").joinpath("page.html").read_text(encoding="utf-8")
    found = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert found is not None
    return found[1].replace("$$", "$")


def _section(title: str, content: str) -> Iterator[str]:
    yield f"<h2>{title}</h2>"
    yield f'<section class="card scroll">{content}</section>'


def _layers(results: Results) -> str:
    kinds = results["report"]["mixer_types"]
    cells = "".join(
        f'<div class="layer {kind}"><b>{index}</b> {escape(KINDS[kind].word)}</div>' for index, kind in enumerate(kinds)
    )
    kept = results["report"]["kept"]
    return f'<div class="layers">{cells}</div><p>{len(kept)} of {len(kinds)} layers stay attention.</p>'


def _quality(results: Results) -> str:
    rows = []
    cells = {(row["task"], row["length"], name): row for name, found in results["quality"].items() for row in found}
    for task, length in dict.fromkeys((task, length) for task, length, _ in cells):
        both = [cells[task, length, name] for name in results["quality"]]
        rows.append((f"{escape(task)}, {length_label(length)}", *map(_score, both), escape(both[0]["measure"])))
    kl = results["divergence"]
    note = (
        f"<p>KL(teacher || hybrid) on {kl['windows']} held-out windows of 512 tokens: {kl['mean']:.3f} ± {kl['error']:.3f} nats a "
        "token. Ranges are 95 % bootstrap intervals over samples.</p>"
    )
    return table(("task, tokens", *results["quality"], "measure"), rows) + note


def _score(row: dict[str, Any]) -> str:
    if row["score"] is None:
        return f"none, {row['errors']} failed"
    return f"{row['score']:.3f} <small>{row['low']:.3f} to {row['high']:.3f}</small>"


def _costs(results: Results) -> str:
    points = results["latency"]
    rows = [
        (
            f"{escape(point['model'])}, {length_label(point['length'])}",
            duration(point["first_token_s"]),
            duration(point["decode_s"]),
            size(point["cache_bytes"]),
            size(point["peak_bytes"]),
        )
        for point in sorted(points, key=lambda point: point["length"])
    ]
    return table(("model, tokens", "to the first token", "a further token", "cache", "memory above the start"), rows)


def _stages(results: Results) -> str:
    rows = []
    for stage in results["stages"]:
        looks = stage["validation"]
        validation = f"{looks[0][1]:.4g} to {looks[-1][1]:.4g}" if looks else "not measured"
        losses = f"{stage['first_loss']:.4g} to {stage['loss']:.4g}"
        rows.append((escape(stage["name"]), f"{stage['steps']:,}", f"{stage['tokens']:,}", losses, validation))
    return table(("stage", "steps", "tokens", "loss", "validation loss"), rows)


def _step_zero(results: Results) -> str:
    rows = (
        (escape(STEP_ZERO_NAMES[name]), f"{nats:.3f} nats") for name, nats in results["report"]["step_zero"].items()
    )
    return pairs(rows) + "<p>KL from the teacher, in nats a token, with each kind of change alone.</p>"


def _answers(results: Results) -> str:
    said: dict[str, list[str]] = {}
    for one in results["answers"]:
        said.setdefault(one["prompt"], []).append(f"{escape(one['model'])}: {escape(one['text'])}")
    return pairs((escape(prompt), "<br><br>".join(texts)) for prompt, texts in said.items())
