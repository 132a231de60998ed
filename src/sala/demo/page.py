"""The report's page: one HTML file that needs nothing else, made from the results alone."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from sala.demo.folder import PAGE
from sala.demo.measure import HYBRID_FULL, HYBRID_SPARSE, TEACHER
from sala.demo.plots import FIRST_STEPS, PLOTS, length_label
from sala.model.kinds import KINDS

STEP_ZERO_NAMES = {
    "gates": "output gates on the kept layers",
    "positions": "no rotary positions on the kept layers",
    "linear_layers": "linear attention in the other layers",
    "all": "all of them: where training starts",
}
MIB = 2**20

Results = dict[str, Any]


def write_page(results: Results, folder: Path) -> None:
    """Write the page into `folder`, with the plots that lie there inside it."""
    template = Template(resources.files("sala.demo").joinpath("page.html").read_text(encoding="utf-8"))
    images = {
        f"image_{name.removeprefix('retrieval-').removesuffix('.png').replace('-', '_')}": embedded(folder / name)
        for name in PLOTS
    }
    sections = (_opening, _layers, _retrieval, _costs, _needle, _conversion, _environment)
    texts = {name: text for section in sections for name, text in section(results).items()}
    (folder / PAGE).write_text(template.substitute(texts | images), encoding="utf-8")


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table of names and values; both are HTML already."""
    body = "\n".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="pairs"><tbody>\n{body}\n</tbody></table>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table; cells are HTML already."""
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>\n{body}\n</tbody></table>"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def size(number_bytes: float | None) -> str:
    return "not measurable here" if number_bytes is None else f"{number_bytes / MIB:,.1f} MiB"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def versions(packages: Mapping[str, str | None]) -> str:
    """Return the packages with their versions, and which of them are not there."""
    there = ", ".join(f"{name} {version}" for name, version in packages.items() if version is not None)
    missing = ", ".join(name for name, version in packages.items() if version is None)
    return f"{there}; not installed: {missing}" if missing else there


def embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _point(results: Results, model: str, haystack: str, length: int) -> dict[str, Any] | None:
    for point in results["retrieval"]:
        if (point["model"], point["haystack"], point["length"]) == (model, haystack, length):
            return point
    return None


def _longest(results: Results) -> int:
    return max(point["length"] for point in results["retrieval"])


def _lengths(results: Results) -> list[int]:
    return sorted({point["length"] for point in results["retrieval"]})


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(point["model"] for point in results["retrieval"]))


def _sparsest(results: Results) -> str:
    return HYBRID_SPARSE if HYBRID_SPARSE in _models(results) else HYBRID_FULL


def _opening(results: Results) -> dict[str, str]:
    longest, trained = _longest(results), results["trained_length"]
    best, teacher = (_point(results, name, "text", longest) for name in (_sparsest(results), TEACHER))
    assert best is not None and teacher is not None
    headline = (
        f"At {length_label(longest)} tokens of source code the hybrid finds {percent(best['accuracy'])} of what was "
        f"hidden, its teacher {percent(teacher['accuracy'])}"
    )
    introduction = (
        f"The teacher is a Transformer of {results['teacher']['parameters']:,} parameters, trained on windows of "
        f"{trained['teacher']:,} tokens. The conversion, {duration(results['seconds']['convert'])} on this machine, made "
        f"layers linear, took the rotary positions out of those it kept, and trained on windows of up to "
        f"{trained['hybrid']:,} tokens."
    )
    return {
        "headline": escape(headline),
        "introduction": escape(introduction),
        "facts": "\n".join(_facts(results)),
    }


def _facts(results: Results) -> list[str]:
    longest, needle = _longest(results), results["needle"]
    cards = []
    for haystack, place in (("text", "source code"), ("noise", "noise, the hard haystack")):
        lines = []
        for name in _models(results):
            point = _point(results, name, haystack, longest)
            if point is not None:
                lines.append(f"<dt>{escape(name)}</dt><dd>{percent(point['accuracy'])}</dd>")
        if lines:
            cards.append(f"<small>found in {length_label(longest)} tokens of {place}</small><dl>{''.join(lines)}</dl>")
    unread = [
        point["unread_share"]
        for point in results["retrieval"]
        if point["length"] == longest and point["unread_share"] is not None
    ]
    if unread:
        share = percent(sum(unread) / len(unread))
        cards.append(f"<b>{share}</b>of the blocks stay unread at {length_label(longest)} with sparse attention")
    outcome = "found" if needle["correct"] else "missed"
    cards.append(
        f"<b>{outcome}</b>one needle in {needle['length']:,} tokens of real source code, read in "
        f"{duration(needle['read_s'])}"
    )
    return [f'<div class="fact">{card}</div>' for card in cards]


def _layers(results: Results) -> dict[str, str]:
    report = results["conversion"]["report"]
    selection = report["selection"]
    scores, importance = selection["scores"], selection["importance"]
    if scores is None:
        shown, meaning = "", "Which layers stay attention was set by the recipe. No scores were needed."
    else:
        head = [
            "if this layer alone is linear",
            "values found",
            "text tokens predicted",
            "importance",
            "kept in resamples",
        ]
        columns = (scores["recall"], scores["language"], importance, selection["bootstrap"]["frequency"])
        rows = [
            (f"layer {layer}", percent(recall), percent(language), f"{value:.2f}", percent(frequency))
            for layer, (recall, language, value, frequency) in enumerate(zip(*columns, strict=True))
        ]
        shown = table(head, rows)
        meaning = (
            "Each layer in turn was replaced by its linear twin, and what the model then could still find and predict was "
            "scored. A layer whose loss costs much recall and little language is kept as attention; the others stay linear, "
            "with a state whose size does not depend on the document. The last column is how often a layer would be kept if "
            "the questions and the text were drawn again from those that were asked."
        )
    return {
        "layer_meaning": escape(meaning),
        "teacher_layers": _layer_map(results["teacher"]["mixer_types"]),
        "hybrid_layers": _layer_map(results["hybrid"]["mixer_types"]),
        "layer_table": shown,
    }


def _layer_map(mixer_types: Sequence[str]) -> str:
    return "\n".join(
        f'<div class="layer {escape(kind)}"><b>{layer}</b>{escape(KINDS[kind].word)}</div>'
        for layer, kind in enumerate(mixer_types)
    )


def _retrieval(results: Results) -> dict[str, str]:
    plan, lengths = results["plan"], _lengths(results)
    meaning = (
        f"Each document hides {plan['needles']} keys with values and asks for all of them at its end; keys, values and "
        "text were never seen in training, and an answer counts only when both of its tokens are right. The number of "
        "questions stands beside every figure, with the 95 % interval."
    )
    rows = []
    for haystack in plan["haystacks"]:
        for name in _models(results):
            found = [_point(results, name, haystack, length) for length in lengths]
            rows.append((f"{escape(name)}<small>in {haystack}</small>", *(_accuracy_cell(point) for point in found)))
    unread = [_point(results, HYBRID_SPARSE, "text", length) for length in lengths]
    if any(unread):
        cells = [percent(p["unread_share"]) if p and p["unread_share"] is not None else "" for p in unread]
        rows.append(("blocks unread at the questions<small>sparse, in text</small>", *cells))
    return {
        "retrieval_meaning": escape(meaning),
        "caption_text": escape(
            "The haystack is source code, where a key's words occur nowhere else. The band is the 95 % interval; right of a "
            "dashed line documents are longer than anything that model was trained on."
        ),
        "caption_noise": escape(
            "The haystack is random words of the keys' own alphabet, so that halves of keys occur everywhere. This is the "
            "hard case: the share found here shows how sharply the kept layer can tell one key from all the others."
        ),
        "retrieval_table": table(["tokens", *map(length_label, lengths)], rows),
        **_depths(results),
    }


def _accuracy_cell(point: dict[str, Any] | None) -> str:
    if point is None:
        return ""
    interval = f"{100 * point['low']:.0f}–{100 * point['high']:.0f}"
    return f"{percent(point['accuracy'])}<small>{interval} · n {point['questions']}</small>"


def _depths(results: Results) -> dict[str, str]:
    longest = _longest(results)
    points = [point for point in results["retrieval"] if point["length"] == longest]
    head = [f"{length_label(longest)} tokens", *(_depth_name(part) for part in points[0]["depths"])]
    rows = [
        (
            f"{escape(point['model'])}<small>in {point['haystack']}</small>",
            *(
                f"{percent(part['correct'] / part['questions'])}<small>n {part['questions']}</small>"
                if part["questions"]
                else ""
                for part in point["depths"]
            ),
        )
        for point in points
    ]
    return {
        "depth_meaning": escape(
            "The longest documents again, by where in the document the value was hidden. A model with a short reach finds "
            "only what stands near the end, in the last column."
        ),
        "depth_table": table(head, rows),
    }


def _depth_name(part: dict[str, Any]) -> str:
    return f"{100 * part['from_depth']:.0f}–{100 * part['to_depth']:.0f} %"


def _costs(results: Results) -> dict[str, str]:
    points = results["latency"]
    lengths = sorted({point["length"] for point in points})
    rows = []
    for name in dict.fromkeys(point["model"] for point in points):
        row = [point for point in points if point["model"] == name]
        rows.append((f"{escape(name)}<small>to first token</small>", *(duration(p["first_token_s"]) for p in row)))
        rows.append(("<small>a further token</small>", *(duration(p["decode_s"]) for p in row)))
        rows.append(("<small>cache</small>", *(size(p["cache_bytes"]) for p in row)))
        rows.append(("<small>peak of the process above its start</small>", *(size(p["peak_bytes"]) for p in row)))
    repeats = {point["length"]: point["repeats"] for point in points}
    rows.append(
        ("<small>runs, models taking turns; the figure is their median</small>", *(str(repeats[n]) for n in lengths))
    )
    return {
        "caption_first_token": escape(
            "The time from an empty cache to the first token of the answer. Full attention grows with the square "
            "of the length in every layer that has it; linear layers grow with the length."
        ),
        "caption_memory": escape(
            "Keys and values of the softmax layers grow with the document; a linear layer's state does not. Sparse "
            "attention keeps two small tiers of compressed keys besides, so it saves reading, not memory."
        ),
        "latency_table": table(["tokens", *map(length_label, lengths)], rows),
    }


def _needle(results: Results) -> dict[str, str]:
    needle = results["needle"]
    times = needle["length"] / results["trained_length"]["hybrid"]
    return {
        "needle_meaning": escape(
            f"The standard library's own source, files that were not trained on, one after the other: {needle['length']:,} "
            f"tokens, {times:g} times the longest window of the conversion, with one key and its value at "
            f"{100 * needle['depth']:.0f} % of it. The model reads it in chunks and then generates the answer."
        ),
        "needle_table": pairs(
            [
                ("model", escape(needle["model"])),
                ("hidden value", escape(needle["wanted_text"])),
                ("answer", f"{escape(needle['answer_text'])} ({'right' if needle['correct'] else 'wrong'})"),
                ("time to first token", duration(needle["read_s"])),
                ("tokens read a second", f"{needle['read_tokens_per_s']:,.0f}"),
                ("cache", size(needle["cache_bytes"])),
                ("peak memory of the process", size(needle["peak_bytes"])),
                ("of that, taken by this run", size(needle["added_bytes"])),
            ],
        ),
    }


def _conversion(results: Results) -> dict[str, str]:
    report = results["conversion"]["report"]
    step_zero = [(STEP_ZERO_NAMES.get(name, name), f"{loss:.3f}") for name, loss in report["step_zero"].items()]
    language = [
        (
            escape(row["model"]),
            percent(row["copy_accuracy"]),
            f"{row['text']['loss']:.3f}",
            percent(row["text"]["accuracy"]),
        )
        for row in results["language"]
    ]
    return {
        "caption_training": escape(
            f"The loss of every stage, relative to the mean of its first {FIRST_STEPS} steps: they have losses of different "
            "kinds. Alignment fits linear layers to the teacher's, distillation the hybrid to the teacher's predictions, the "
            "last stage trains on longer windows."
        ),
        "step_zero_meaning": escape(
            "What each change costs before any training of the hybrid: the divergence of the changed teacher's predictions "
            "from the teacher's own, in nats a token. What is small here was free; the rest is what distillation repairs."
        ),
        "step_zero_table": table(["change", "KL, nats a token"], step_zero),
        "language_meaning": escape(
            f"Short abilities that a conversion should not cost, at {results['language'][0]['length']} tokens. Lower loss is "
            "better; the embedded models are small, and their language is weak before and after."
        ),
        "language_table": table(["", "copying", "text loss, nats a token", "text tokens predicted"], language),
    }


def _environment(results: Results) -> dict[str, str]:
    environment = results["environment"]
    hardware = environment["hardware"]
    seconds = ", ".join(f"{name} {duration(value)}" for name, value in results["seconds"].items())
    memory = hardware["memory_bytes"]
    rows = [
        ("command", environment["command"]),
        ("date", environment["date"]),
        ("commit", environment["commit"] or "not in a repository"),
        (
            "processor",
            f"{hardware['cpu'] or 'unknown'}, {hardware['cores']} cores, {hardware['torch_threads']} threads used",
        ),
        ("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"),
        ("versions", versions(environment["versions"])),
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in results["seeds"].items())),
        ("time", seconds),
    ]
    return {
        "environment_table": pairs((escape(name), escape(str(value))) for name, value in rows),
        "recipe": escape(yaml.safe_dump(results["recipe"], sort_keys=False)),
    }
