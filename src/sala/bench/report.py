"""Plots and a table from files of measurements: the paper's Figures 2 and 3, operators' ratios, memory, training."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from sala.bench.fla import FLA
from sala.bench.length import length_label
from sala.bench.ops import AGAINST, SDPA
from sala.bench.pair import BASELINE, HYBRID, WHO, times_faster
from sala.bench.results import write_atomically
from sala.bench.train import DISTILL, NEXT_TOKEN, overheads
from sala.errors import InputError

# further tokens of the paper's end-to-end figure
ANSWER_TOKENS = 1024
# colours that people with any colour vision tell apart (Okabe and Ito), and a marker each for print
STYLES: Mapping[str, dict[str, Any]] = {
    BASELINE: {"color": "#D55E00", "marker": "o", "linestyle": "--", "zorder": 3},
    HYBRID: {"color": "#0072B2", "marker": "s", "zorder": 4},
}
CASE_STYLES: Mapping[str, dict[str, Any]] = {
    "lightning prefill": {"color": "#0072B2", "marker": "s"},
    "lightning training": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "lightning step": {"color": "#56B4E9", "marker": "D"},
    "infllm prefill": {"color": "#D55E00", "marker": "o"},
    "infllm training": {"color": "#D55E00", "marker": "o", "linestyle": "--"},
    "infllm selection": {"color": "#CC79A7", "marker": "v"},
    "infllm step": {"color": "#E69F00", "marker": "^"},
    "dense prefill": {"color": "#009E73", "marker": "P"},
    "dense step": {"color": "#7a7a7a", "marker": "X"},
}
SIZE_INCHES, DOTS_PER_INCH = (6.4, 4.2), 180
INK, GRID, FAINT = "#333a45", "#e3e6ea", "#6b7480"
GIB = 2**30

Results = dict[str, Any]


def write_report(folder: Path, out: Path) -> tuple[str, list[Path]]:
    """Draw what the measurements in `folder` allow into `out` as PNG; return a Markdown table and the files.

    Raises:
        InputError: no such folder, a file that is no JSON, or nothing of `sala bench` in it.
    """
    measured = read_results(folder)
    files = []
    for name, draw in _figures(measured):
        figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK, labelsize=9)
        draw(axes)
        # below the plot, where no curve can pass through it
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
        # the program's version in the file would make equal results differ
        write_atomically(out / name, partial(figure.savefig, format="png", metadata={"Software": None}))
        files.append(out / name)
    return markdown(measured), files


def read_results(folder: Path) -> dict[str, Results]:
    """Return the files of `sala bench` in a folder, by their names without the ending; other JSON is passed over."""
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}; expected one with the files of sala bench")
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid JSON: {error}") from error
        if isinstance(results, dict) and results.get("kind") in ROWS:
            found[path.stem] = results
    if not found:
        raise InputError(
            f"no file in {str(folder)!r} is of sala bench {', '.join(ROWS)}; expected one that --out wrote"
        )
    return found


def _figures(measured: Mapping[str, Results]) -> Iterator[tuple[str, Callable[[Axes], None]]]:
    for stem, results in measured.items():
        for name, draw in FIGURES[results["kind"]].items():
            if name not in NEEDS or NEEDS[name](results):
                yield f"{stem}-{name}.png", partial(draw, results=results)


def first_token(point: Mapping[str, Any]) -> float:
    return point["first_token_s"]


def end_to_end(point: Mapping[str, Any]) -> float:
    """Return the time of a prompt and `ANSWER_TOKENS` tokens more, at the speed of those that were decoded."""
    return point["first_token_s"] + (ANSWER_TOKENS - 1) * point["decode_s"]


def _draw_first_token(axes: Axes, results: Results) -> None:
    _draw_seconds(axes, results, first_token, "Time to first token")
    hybrid = {p["length"]: p["first_token_s"] for p in _measured(results, HYBRID)}
    for length, figure, times in times_faster(results["points"]):
        if figure == "first_token_s":
            axes.annotate(
                f"{times:.1f}x",
                (length, hybrid[length]),
                xytext=(0, -15),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=STYLES[HYBRID]["color"],
            )


def _draw_end_to_end(axes: Axes, results: Results) -> None:
    title = f"End to end: a prompt and {ANSWER_TOKENS:,} tokens at the measured decoding speed"
    _draw_seconds(axes, results, end_to_end, title)


def _measured(results: Results, who: str) -> list[dict[str, Any]]:
    return [point for point in results["points"] if point["who"] == who and point["status"] == "measured"]


def _draw_seconds(axes: Axes, results: Results, value: Callable[[Mapping[str, Any]], float], title: str) -> None:
    contestants = [who for who in WHO if who in results["models"]]
    for who in contestants:
        points = _measured(results, who)
        x, y = [p["length"] for p in points], [value(p) for p in points]
        axes.plot(x, y, label=results["models"][who]["name"], linewidth=2, markersize=6, **STYLES[who])
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # room for the ratios below the curves and for what was not measured above them
    axes.set_ylim(low / (high / low) ** 0.1, high * (high / low) ** 0.22)
    for line, who in enumerate(contestants):
        for point in results["points"]:
            if point["who"] == who and point["status"] != "measured":
                _mark_missing(axes, point, line)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("seconds", color=INK)
    axes.margins(x=0.08)
    _length_axis(axes, sorted({point["length"] for point in results["points"]}), "prompt, tokens")
    _title(axes, title, results)


def _mark_missing(axes: Axes, point: Mapping[str, Any], line: int) -> None:
    """Mark in the band above the curves what ran out of memory or of time, as the paper marks OOM."""
    label = f"not run\n~{_seconds(point['expected_s'])}" if point["status"] == "skipped" else point["status"]
    axes.text(
        point["length"],
        0.985 - 0.085 * line,
        label,
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="top",
        fontsize=7.5,
        linespacing=1.0,
        color=STYLES[point["who"]]["color"],
        fontweight="bold",
    )


def _draw_ratios(axes: Axes, results: Results) -> None:
    """How many times faster than SDPA the operators are: the best backend of each case."""
    lengths = sorted({row["length"] for row in results["cases"]})
    for case, style in CASE_STYLES.items():
        best = []
        for row in results["cases"]:
            ratios = {n: times for n, times in row.get(f"times_faster_than_{SDPA}", {}).items() if n != FLA}
            if f"{row['op']} {row['phase']}" == case and ratios:
                name = max(ratios, key=lambda name: ratios[name])
                best.append((row["length"], ratios[name], name))
        if not best:
            continue
        names = ", ".join(dict.fromkeys(name for *_, name in best))
        axes.plot(
            [length for length, *_ in best],
            [ratio for _, ratio, _ in best],
            label=f"{case} ({names})",
            linewidth=2,
            markersize=6,
            **style,
        )
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _length_axis(axes, lengths, "tokens in the context")
    axes.set_ylabel("times faster than torch's SDPA", color=INK)
    _title(axes, "Operators against scaled_dot_product_attention", results)


def _draw_memory(axes: Axes, results: Results) -> None:
    """Memory while the longest measured prompt of each model is read."""
    lengths = []
    for who in WHO:
        points = [p for p in results["points"] if p["who"] == who and p.get("curve", {}).get("samples")]
        if not points:
            continue
        longest = max(points, key=lambda point: point["length"])
        samples = longest["curve"]["samples"]
        lengths.append(longest["length"])
        others = longest["start_bytes"] - longest["weights_bytes"]
        axes.plot(
            [tokens for tokens, *_ in samples],
            [(peak - others) / GIB for *_, peak in samples],
            label=f"{longest['model']}, {length_label(longest['length'])} tokens",
            linewidth=2,
            **{k: v for k, v in STYLES[who].items() if k != "marker"},
        )
        axes.axhline(longest["weights_bytes"] / GIB, color=STYLES[who]["color"], linewidth=0.9, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(FixedLocator([max(lengths) * i / 4 for i in range(5)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_label(value)))
    axes.set_xlabel("tokens read", color=INK)
    axes.set_ylabel("weights, cache and work, GiB", color=INK)
    _title(axes, "Peak memory of each chunk while a prompt is read (dotted: weights)", results)


def _title(axes: Axes, title: str, results: Results) -> None:
    """Set the title, and below it what was measured where."""
    settings, hardware = results["settings"], results["environment"]["hardware"]
    shape = results["shape"] if isinstance(results["shape"], str) else results["shape"]["name"]
    # files of before GPUs were measured say no device
    if settings.get("device") == "cuda":
        machine = hardware["gpu"]["name"]
    else:
        machine = f"{hardware['cpu'] or 'unknown processor'}, {settings['threads']} thread" + "s" * (
            settings["threads"] > 1
        )
    axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=18)
    axes.annotate(
        f"{shape}, {settings['dtype']}, {machine}",
        (0, 1),
        xytext=(0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
    )


def _length_axis(axes: Axes, lengths: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_label(value)))
    axes.set_xlabel(label, color=INK)


OPS_FIGURES = {"ratios": _draw_ratios}
LATENCY_FIGURES = {"first-token": _draw_first_token, "end-to-end": _draw_end_to_end, "memory": _draw_memory}
# what a figure cannot do without, by its name
NEEDS: Mapping[str, Callable[[Results], bool]] = {
    "memory": lambda results: any(point.get("curve", {}).get("samples") for point in results["points"]),
    "ratios": lambda results: any(row.get(f"times_faster_than_{SDPA}") for row in results["cases"]),
}
FIGURES: Mapping[str, Mapping[str, Callable[..., None]]] = {
    "ops": OPS_FIGURES,
    "latency": LATENCY_FIGURES,
    "train": {},
    "batch": {},
}

# the table


def markdown(measured: Mapping[str, Results]) -> str:
    """Return one table of all files: what was measured, at which length, and the ratios."""
    lines = [
        "| file | what | length | measured | against | times faster |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for stem, results in measured.items():
        lines += [f"| {stem} | {' | '.join(row)} |" for row in ROWS[results["kind"]](results)]
    return "\n".join(lines)


def _ops_rows(results: Results) -> Iterator[tuple[str, ...]]:
    for row in results["cases"]:
        for name, facts in row["competitors"].items():
            for other in AGAINST:
                ratios = row.get(f"times_faster_than_{other}", {})
                if name in ratios:
                    yield (
                        f"{row['op']} {row['phase']}, {name}",
                        length_label(row["length"]),
                        _seconds(facts["median_s"]),
                        f"{other} {_seconds(row['competitors'][other]['median_s'])}",
                        f"{ratios[name]:.2f}",
                    )


def _latency_rows(results: Results) -> Iterator[tuple[str, ...]]:
    points = {(point["who"], point["length"]): point for point in results["points"]}
    for length in sorted({length for _, length in points}):
        for figure, value in (
            ("first token", first_token),
            (f"prompt and {ANSWER_TOKENS:,} tokens", end_to_end),
            ("a token decoded", lambda point: point["decode_s"]),
        ):
            hybrid, baseline = (points.get((who, length)) for who in WHO)
            if hybrid is None or hybrid["status"] != "measured":
                continue
            against, times = "", ""
            if baseline is not None:
                against = f"{baseline['model']} {_outcome(baseline, value)}"
                times = f"{value(baseline) / value(hybrid):.2f}" if baseline["status"] == "measured" else ""
            yield f"{hybrid['model']}, {figure}", length_label(length), _seconds(value(hybrid)), against, times


def _train_rows(results: Results) -> Iterator[tuple[str, ...]]:
    more = overheads(results["points"])
    for point in results["points"]:
        if point["status"] != "measured":
            continue
        distilled = point["loss"] == DISTILL and point["length"] in more
        share = f", {point['mfu']:.1%} of the peak" if point["mfu"] is not None else ""
        yield (
            f"{results['shape']}, a step of {point['loss']}, {point['tokens_s']:,.0f} tokens/s{share}",
            length_label(point["length"]),
            _seconds(point["step_s"]),
            f"{NEXT_TOKEN} {_seconds(point['step_s'] / more[point['length']])}" if distilled else "",
            f"{1 / more[point['length']]:.2f}" if distilled else "",
        )


def _batch_rows(results: Results) -> Iterator[tuple[str, ...]]:
    if "ragged" in results:
        ragged = results["ragged"]
        alone = sum(row["alone_s"] for row in ragged["rows"])
        lengths = [row["length"] for row in ragged["rows"]]
        yield (
            f"{results['shape']}, a step of {len(lengths)} rows",
            f"{length_label(min(lengths))} to {length_label(max(lengths))}",
            _seconds(ragged["step_s"]),
            f"one by one {_seconds(alone)}",
            f"{ragged['times_faster_than_one_by_one']:.2f}",
        )


ROWS: Mapping[str, Callable[[Results], Iterator[tuple[str, ...]]]] = {
    "ops": _ops_rows,
    "latency": _latency_rows,
    "train": _train_rows,
    "batch": _batch_rows,
}


def _outcome(point: Mapping[str, Any], value: Callable[[Mapping[str, Any]], float]) -> str:
    if point["status"] == "measured":
        return _seconds(value(point))
    if point["status"] == "skipped":
        return f"not run (first token in about {_seconds(point['expected_s'])})"
    return str(point["status"])


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
