"""A run as a picture: the loss of each stage, and learning rate, gradient norm and tokens/s over all of them."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sala.errors import InputError
from sala.runs.record import Row, in_stages, read_metrics, short, smooth, write_whole

# colours that people with any colour vision tell apart (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7a7a7a")
INK, GRID = "#333a45", "#e3e6ea"
WIDTH_INCHES, ROW_INCHES, DOTS_PER_INCH = 10.0, 2.6, 150
LOSSES_IN_A_ROW = 4
# values that differ by a larger factor are drawn on a logarithmic axis
LINEAR_UP_TO = 8.0


def plot_run(folder: Path, out: Path) -> None:
    """Draw the run in `folder`, as far as it is, into `out` as PNG.

    Raises:
        InputError: `folder` is no run, or `out` no PNG.
        DiskError: `out` cannot be written.
    """
    if out.suffix != ".png":
        raise InputError(f"--out {str(out)!r}: the picture is a PNG; expected {str(out.with_suffix('.png'))!r}")
    figure = draw(in_stages(read_metrics(folder)), folder.resolve().name)
    picture = io.BytesIO()
    # the program's version in the file would make equal runs differ
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_whole(out, picture.getvalue())


def draw(stages: Sequence[Sequence[Row]], name: str) -> Figure:
    """Return the picture of a run of this name: the metrics of its stages, each a list of steps."""
    num_rows = math.ceil(len(stages) / LOSSES_IN_A_ROW)
    columns = math.ceil(len(stages) / num_rows)
    figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * (num_rows + 1) + 0.4), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(stages, name), fontsize=11, color=INK, x=0.01, ha="left")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[num_rows, 1])[:, 0]
    panels = above.subplots(num_rows, columns, squeeze=False).flatten()
    for panel in panels[len(stages) :]:
        panel.remove()
    for index, (panel, rows) in enumerate(zip(panels, stages, strict=False)):
        _loss(panel, rows, COLORS[index % len(COLORS)])
    rate, norm, speed = below.subplots(1, 3)
    rates = _over_all(rate, stages, "learning_rate", "learning rate", smoothed=False)
    # by the peaks: a warm-up starts near zero
    _axes(rate, "tokens", [max(curve) for curve in rates])
    norms = _over_all(norm, stages, "gradient_norm", "gradient norm")
    _axes(norm, "tokens", [value for curve in norms for value in curve])
    _over_all(speed, stages, "tokens_per_s", "tokens/s")
    _axes(speed, "tokens", [])
    speed.set_ylim(bottom=0)
    return figure


def _title(stages: Sequence[Sequence[Row]], name: str) -> str:
    last = stages[-1][-1]
    tokens = sum(rows[-1]["tokens"] for rows in stages)
    return f"{name}: {short(tokens)} tokens; {last['stage']}, step {last['step']:,} of {last['steps']:,}"


def _loss(axes: Axes, rows: Sequence[Row], color: str) -> None:
    """Draw a stage's loss; the stages have losses of different kinds, so each has axes of its own."""
    losses = [row["loss"] for row in rows]
    smoothed = _curve(axes, [row["tokens"] for row in rows], losses, color)
    looks = [(row["tokens"], row["validation_loss"]) for row in rows if row["validation_loss"] is not None]
    title = f"loss {smoothed[-1]:.4g}"
    if looks:
        axes.plot(*zip(*looks, strict=True), color=INK, linewidth=1.2, marker="o", markersize=2.5, label="validation")
        axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)
        title += f", validation {looks[-1][1]:.4g}"
    _axes(axes, "tokens of the stage", [*smoothed, *(loss for _, loss in looks)])
    axes.set_title(rows[0]["stage"], fontsize=10, color=color, loc="left", fontweight="bold")
    axes.set_title(title, fontsize=9, color=INK, loc="right")


def _over_all(
    axes: Axes, stages: Sequence[Sequence[Row]], field: str, title: str, *, smoothed: bool = True
) -> list[list[float]]:
    """Draw a field of every stage, one after the other, and mark where they meet; return what is drawn of each."""
    start, curves = 0, []
    for index, rows in enumerate(stages):
        color, tokens = COLORS[index % len(COLORS)], [start + row["tokens"] for row in rows]
        values = [row[field] for row in rows]
        if smoothed:
            values = _curve(axes, tokens, values, color)
        else:
            _line(axes, tokens, values, color)
        curves.append(values)
        if index:
            axes.axvline(start, color="#9aa3ae", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        start = tokens[-1]
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    return curves


def _curve(axes: Axes, tokens: Sequence[int], values: Sequence[float], color: str) -> list[float]:
    """Draw every step faintly and their smoothed course over it; return the latter."""
    smoothed = smooth(values)
    axes.plot(tokens, values, color=color, linewidth=0.8, alpha=0.3)
    _line(axes, tokens, smoothed, color)
    return smoothed


def _line(axes: Axes, tokens: Sequence[int], values: Sequence[float], color: str) -> None:
    # a line through one point is not seen
    axes.plot(tokens, values, color=color, linewidth=1.8, marker="o" if len(tokens) == 1 else "")


def _axes(axes: Axes, label: str, values: Sequence[float]) -> None:
    """Set the axes; logarithmic where `values` differ much."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_xlabel(label, color=INK, fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if values and max(values) > LINEAR_UP_TO * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
