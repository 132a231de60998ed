"""Pictures of a run: scores by length beside the papers', where needles were found, which blocks a model read."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sala.eval.blocks import BlockCount
from sala.eval.papers import references
from sala.eval.summary import AVERAGE, Row

SCORES, NEEDLES = "scores.png", "needles-{group}.png"
# colours that people with any colour vision tell apart (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MARKERS = "os^vDPX"
INK, GRID = "#333a45", "#e3e6ea"
DEPTH_BINS = 10
# blocks of a picture: more are drawn together
MOST_COLUMNS = 256


def write_plots(rows: Sequence[Row], records: Sequence[Mapping[str, Any]], folder: Path, name: str) -> None:
    """Draw scores by length, and for every group whose samples have depths the heat map of its needles, into a folder."""
    plot_scores(folder / SCORES, {name: rows})
    groups = {row.task: row.group for row in rows}
    for group in dict.fromkeys(groups.values()):
        own = [record for record in records if groups[record["task"]] == group]
        if any(map(_needles, own)):
            plot_needles(folder / NEEDLES.format(group=group), own)


def plot_scores(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Draw a panel for every group's average or only task, a line a run, and the papers' scores dashed."""
    rows = [row for own in runs.values() for row in own]
    averages = {row.group: row.task for row in rows if f" {AVERAGE} of " in row.task}
    shown = list(dict.fromkeys(averages.get(row.group, row.task) for row in rows))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, task in zip(axes, shown, strict=False):
            _draw_task(panel, task, runs)
        for panel in axes[len(shown) :]:
            panel.set_visible(False)
        handles = {
            label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)

    _save(path, (3.6 * columns + 0.6, 2.8 * lines + 0.7), draw)


def _draw_task(axes: Axes, task: str, runs: Mapping[str, Sequence[Row]]) -> None:
    lengths: set[int] = set()
    measure = ""
    for i, (name, rows) in enumerate(runs.items()):
        own = [row for row in rows if row.task == task and row.score is not None]
        if not own:
            continue
        measure = own[0].measure
        scale = _scale(measure)
        scores = np.array([[row.length, row.score, row.low, row.high] for row in own], np.float64)
        lengths |= {row.length for row in own}
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(scores[:, 0], scale * scores[:, 1], label=name, markersize=4, **style)
        axes.fill_between(
            scores[:, 0], scale * scores[:, 2], scale * scores[:, 3], color=style["color"], alpha=0.15, lw=0
        )
    for i, reference in enumerate(references(task)):
        lengths |= set(reference.scores)
        color = COLORS[-1 - i]
        axes.plot(
            *zip(*reference.scores.items(), strict=True),
            "--x",
            color=color,
            lw=1,
            label=f"{reference.model}, published",
        )
    axes.set_title(task, fontsize=9, color=INK)
    axes.set_ylabel(f"{measure}, %" if _scale(measure) == 100 else measure, fontsize=8, color=INK)
    if _scale(measure) == 100:
        axes.set_ylim(-3, 103)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_few(sorted(lengths))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: length_label(length)))
    axes.xaxis.set_minor_locator(NullLocator())


def plot_needles(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw the share of needles found by depth and length, over all samples that say where theirs lay."""
    found = [(record["length"], depth, right) for record in records for depth, right in _needles(record)]
    lengths = sorted({length for length, _, _ in found})
    share_DL = np.full((DEPTH_BINS, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for row in range(DEPTH_BINS):
            inside = [right for at, depth, right in found if at == length and _bin(depth) == row]
            share_DL[row, column] = np.mean(inside) if inside else np.nan

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(100 * share_DL, vmin=0, vmax=100, aspect="auto", cmap="viridis")
        for (row, column), share in np.ndenumerate(share_DL):
            if not np.isnan(share):
                color = "white" if share < 0.6 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
        axes.set_yticks(range(DEPTH_BINS), [f"{100 * row // DEPTH_BINS} %" for row in range(DEPTH_BINS)])
        axes.set_xlabel("tokens", fontsize=9, color=INK)
        axes.set_ylabel("depth of the needle", fontsize=9, color=INK)
        axes.grid(False)
        figure.colorbar(image, label="found, %")

    _save(path, (1.2 + 0.7 * max(4, len(lengths)), 4.2), draw)


def plot_blocks(path: Path, count: BlockCount, places: Sequence[int]) -> int:
    """Draw which blocks each group of heads chose for the newest query, and the blocks of the answer's evidence.

    Returns how many groups of heads chose all blocks in which evidence begins.
    """
    size, last = count.block_size, int(count.positions[-1][-1])
    blocks = last // size + 1
    step = -(-blocks // MOST_COLUMNS)
    lines = [(layer, group, row) for layer, groups in count.chosen.items() for group, row in enumerate(groups)]
    chosen_LN = np.zeros((len(lines), -(-blocks // step)))
    for line, (_, _, row) in enumerate(lines):
        chosen_LN[line, np.unique(row[row >= 0].numpy() // step)] = 1
    wanted: set[int] = {place // size for place in places}
    found = sum(wanted <= set(row.tolist()) for _, _, row in lines)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.imshow(chosen_LN, aspect="auto", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        axes.plot([block // step for block in wanted], [-0.62] * len(wanted), "v", color=COLORS[1], clip_on=False)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_yticks(
            range(len(lines)), [f"sparse layer {layer + 1}, group {group + 1}" for layer, group, _ in lines]
        )
        axes.set_xlabel(
            f"blocks of {size * step} tokens, chosen ones blue; {found} of {len(lines)} groups chose the evidence (▼)",
            fontsize=9,
            color=INK,
        )
        axes.grid(False)

    _save(path, (8, 1.2 + 0.35 * max(2, len(lines))), draw)
    return found


def _needles(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return (depth, found) of a sample's needles: each one's own where the record tells, else the sample's score."""
    depths = record.get("depths") or []
    if "error" in record or not depths:
        return []
    return list(zip(depths, record.get("right", [record["score"]] * len(depths)), strict=True))


def _bin(depth: float) -> int:
    return min(int(depth * DEPTH_BINS), DEPTH_BINS - 1)


def _scale(measure: str) -> int:
    return 100 if measure.startswith("share") else 1


def _few(lengths: Sequence[int]) -> list[int]:
    """Return at most six of the lengths, those that are furthest apart on a logarithmic axis."""
    if len(lengths) <= 6:
        return list(lengths)
    return sorted(
        {min(lengths, key=lambda at: abs(np.log(at / aim))) for aim in np.geomspace(lengths[0], lengths[-1], 6)}
    )


def length_label(length: float) -> str:
    """Return 512, 8K, 1M: binary thousands."""
    whole = int(length)
    return f"{whole}" if whole < 1024 else f"{whole / 1024:.4g}K" if whole < 2**20 else f"{whole / 2**20:.4g}M"


def _save(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    for axes in figure.axes:
        axes.tick_params(colors=INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    # the program's version in the file would make equal results differ
    figure.savefig(path, metadata={"Software": None})
