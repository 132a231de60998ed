"""The report's plots, drawn from its results alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from sala.demo.measure import HYBRID_FULL, HYBRID_SPARSE, TEACHER
from sala.runs.record import smooth

# colours that people with any colour vision tell apart (Okabe and Ito), and a marker each for print
STYLES: dict[str, dict[str, Any]] = {
    TEACHER: {"color": "#D55E00", "marker": "o", "zorder": 2},
    HYBRID_FULL: {"color": "#0072B2", "marker": "s", "zorder": 3},
    HYBRID_SPARSE: {"color": "#009E73", "marker": "^", "zorder": 4},
}
STAGE_COLORS = ("#56B4E9", "#0072B2", "#CC79A7", "#E69F00", "#999999")
SIZE_INCHES, DOTS_PER_INCH = (5.6, 3.7), 180
INK, GRID = "#333a45", "#e3e6ea"
MIB = 2**20
# of a stage, whose mean loss is the unit of its curve
FIRST_STEPS = 10

Results = dict[str, Any]


def write_plots(results: Results, folder: Path) -> None:
    """Draw every plot of `PLOTS` into `folder` as PNG."""
    for name, draw in PLOTS.items():
        save_plot(folder / name, draw, results)


def save_plot(path: Path, draw: Callable[[Axes, Results], None], results: Results) -> None:
    """Draw one plot of `results` in the report's style into the PNG `path`."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    draw(axes, results)
    # below the plot, where no curve can pass through it
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    # the program's version in the file would make equal results differ
    figure.savefig(path, metadata={"Software": None})


def length_label(length: float) -> str:
    """Return 512, 1K, 64K, 1M: binary thousands, as lengths are."""
    whole = int(length)
    if whole < 1024:
        return f"{whole}"
    return f"{whole / 1024:g}K" if whole < MIB else f"{whole / MIB:g}M"


def _draw_accuracy(axes: Axes, results: Results, haystack: str, title: str) -> None:
    points = [point for point in results["retrieval"] if point["haystack"] == haystack]
    _mark_trained(axes, results)
    for name, style in STYLES.items():
        row = [point for point in points if point["model"] == name]
        if not row:
            continue
        lengths = [point["length"] for point in row]
        color = style["color"]
        axes.fill_between(
            lengths, [p["low"] for p in row], [p["high"] for p in row], color=color, alpha=0.15, linewidth=0
        )
        axes.plot(lengths, [p["accuracy"] for p in row], label=name, linewidth=2, markersize=5, **style)
    _length_axis(axes, sorted({point["length"] for point in points}))
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("values found, both tokens right", color=INK)
    axes.set_title(title, fontsize=11, color=INK, loc="left")


def _mark_trained(axes: Axes, results: Results) -> None:
    """Mark the longest windows that teacher and hybrid were trained on."""
    lengths = results["trained_length"]
    for who, shift in (("teacher", 0.02), ("hybrid", 0.02)):
        axes.axvline(lengths[who], color="#9aa3ae", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{who} trained to {length_label(lengths[who])}",
            (lengths[who], shift),
            xytext=(3, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=7.5,
            color="#6b7480",
            va="bottom",
        )


def _draw_first_token(axes: Axes, results: Results) -> None:
    _draw_cost(axes, results, lambda point: point["first_token_s"])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("time to first token, s", color=INK)
    axes.set_title("Time to first token", fontsize=11, color=INK, loc="left")


def _draw_memory(axes: Axes, results: Results) -> None:
    _draw_cost(axes, results, lambda point: point["cache_bytes"] / MIB)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("cache after the prompt, MiB", color=INK)
    axes.set_title("Memory that a document takes", fontsize=11, color=INK, loc="left")


def _draw_cost(axes: Axes, results: Results, value: Callable[[dict[str, Any]], float]) -> None:
    for name, style in STYLES.items():
        row = [point for point in results["latency"] if point["model"] == name]
        if row:
            lengths = [point["length"] for point in row]
            axes.plot(lengths, [value(p) for p in row], label=name, linewidth=2, markersize=5, **style)
    _length_axis(axes, sorted({point["length"] for point in results["latency"]}))


def _draw_training(axes: Axes, results: Results) -> None:
    """The loss of every stage relative to its first steps' mean: the stages have losses of different kinds."""
    steps = results["conversion"]["steps"]
    offset = 0
    for stage, color in zip(dict.fromkeys(row["stage"] for row in steps), STAGE_COLORS, strict=False):
        losses = [row["loss"] for row in steps if row["stage"] == stage]
        columns = range(offset + 1, offset + len(losses) + 1)
        # one step alone is noise
        unit = fmean(losses[:FIRST_STEPS])
        axes.plot(columns, [loss / unit for loss in losses], color=color, linewidth=0.8, alpha=0.35)
        axes.plot(columns, [loss / unit for loss in smooth(losses)], color=color, linewidth=2, label=stage)
        offset += len(losses)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(f"loss / mean of the stage's first {FIRST_STEPS} steps", color=INK)
    axes.set_title("Training of the conversion", fontsize=11, color=INK, loc="left")


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_label(value)))
    axes.set_xlabel("document length, tokens", color=INK)


PLOTS: dict[str, Callable[[Axes, Results], None]] = {
    "retrieval-text.png": lambda axes, results: _draw_accuracy(axes, results, "text", "Values hidden in source code"),
    "retrieval-noise.png": lambda axes, results: _draw_accuracy(
        axes, results, "noise", "Values hidden in noise of the keys' own words"
    ),
    "first-token.png": _draw_first_token,
    "memory.png": _draw_memory,
    "training.png": _draw_training,
}
