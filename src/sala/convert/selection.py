"""The record of a selection: its table and its plot."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from sala.convert.bootstrap import Bootstrap
from sala.convert.select import LayerScores, fixed_layers, shares

TABLE, PLOT = "selection.json", "selection.png"

# colours that people with any colour vision tell apart (Okabe and Ito)
KEPT, LINEAR = "#0072B2", "#c3c9d0"
INK, GRID, FAINT = "#333a45", "#e3e6ea", "#6b7480"
DOTS_PER_INCH = 180
# with more layers than this a name under every second one is all that fits
MOST_NAMES = 48
# a bar that is this many times the next highest would flatten all others: it is cut, and its value written
CUT = 3.0
BARS = {"halo": "importance", "recall_drop": "recall lost"}
MEANINGS = {
    "halo": "(max R − R) / (max C − C + ε)",
    "recall_drop": "max R − R",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which layers stay attention, and why.

    method: one of `METHODS`, or "layers" where they were named.
    scores, importance: None and empty where the choice needed none. bootstrap: None where only the means are known.
    """

    num_layers: int
    method: str
    epsilon: float
    first_last: bool
    kept: tuple[int, ...]
    scores: LayerScores | None = None
    importance: tuple[float, ...] = ()
    bootstrap: Bootstrap | None = None

    @property
    def equals(self) -> tuple[int, ...]:
        """The layers of one importance of which some are kept and some are not; empty when the scores decide all."""
        if not self.importance:
            return ()
        share = shares(np.asarray(self.importance), len(self.kept), fixed_layers(self.num_layers, self.first_last))
        return tuple(np.flatnonzero((share > 0) & (share < 1)).tolist())

    @property
    def arbitrary(self) -> str | None:
        """Say so when the scores leave open which layers are kept."""
        if not self.equals:
            return None
        assert self.scores is not None
        kept = len(set(self.equals) & set(self.kept))
        choice = f"{kept} of {len(self.equals)} equal layers are kept, an arbitrary choice"
        if len(set(self.scores.recall)) > 1:
            return choice
        return f"{choice}: recall is {self.scores.recall[0]:g} whichever layer is linear"

    @property
    def warning(self) -> str | None:
        """Say so when the choice is arbitrary, or epsilon below the noise that it should cover."""
        if self.arbitrary is not None:
            return f"{self.arbitrary} (the higher layers); expected a longer alignment, or questions that tell layers apart"
        if self.method != "halo" or self.bootstrap is None or self.epsilon >= self.bootstrap.language_noise:
            return None
        noise = f"{self.bootstrap.language_noise:.2g}"
        return (
            f"epsilon {self.epsilon:g} is below the noise of the language scores, {noise}: chance has a say among the layers "
            f"with the best of them; an epsilon above {noise} is steadier"
        )

    def write(self, folder: Path) -> None:
        """Write the table `selection.json` into `folder` and, where layers were scored, the plot `selection.png`."""
        (folder / TABLE).write_text(_table(self), encoding="utf-8")
        if self.scores is not None:
            plot_selection(folder / PLOT, self)

    def rows(self) -> list[dict[str, Any]]:
        """Return what is known of each layer, the first one first."""
        rows = []
        for layer in range(self.num_layers):
            row: dict[str, Any] = {"layer": layer, "kept": layer in self.kept}
            if self.scores is not None:
                row |= {
                    "recall": self.scores.recall[layer],
                    "language": self.scores.language[layer],
                    "importance": self.importance[layer],
                }
            if self.bootstrap is not None:
                row |= {
                    "recall_error": self.bootstrap.recall_errors[layer],
                    "language_error": self.bootstrap.language_errors[layer],
                    "frequency": self.bootstrap.frequency[layer],
                }
            rows.append(row)
        return rows


def _table(selection: Selection) -> str:
    """Return JSON with a line for each layer."""
    table: dict[str, Any] = {
        "method": selection.method,
        "epsilon": selection.epsilon,
        "first_last": selection.first_last,
        "kept": selection.kept,
    }
    if selection.warning is not None:
        table["warning"] = selection.warning
    if selection.bootstrap is not None:
        names = ("resamples", "questions", "pieces", "language_noise")
        table |= {name: getattr(selection.bootstrap, name) for name in names}
    fields = "".join(f' "{name}": {json.dumps(value)},\n' for name, value in table.items())
    rows = ",\n".join(f"  {json.dumps(row)}" for row in selection.rows())
    return f'{{\n{fields} "layers": [\n{rows}\n ]\n}}\n'


def plot_selection(path: Path, selection: Selection, title: str = "Which layers stay attention") -> None:
    """Draw the importance of every layer as PNG and, where it is known, how often a layer is kept."""
    assert selection.scores is not None, "what was not scored has no importance"
    sure = selection.bootstrap is not None
    figure = Figure(
        figsize=(max(5.6, 1.6 + 0.2 * selection.num_layers), 4.6 if sure else 3.4),
        dpi=DOTS_PER_INCH,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if sure else 1, sharex=True, squeeze=False, height_ratios=[5, 3] if sure else [1])[:, 0]
    for axes in panels:
        _style(axes)
    _draw_importance(panels[0], selection, title)
    if selection.bootstrap is not None:
        _draw_frequency(panels[1], selection, selection.bootstrap)
    step = 1 if selection.num_layers <= MOST_NAMES else 2
    panels[-1].xaxis.set_major_locator(FixedLocator(range(0, selection.num_layers, step)))
    panels[-1].xaxis.set_minor_locator(NullLocator())
    panels[-1].set_xlabel("layer", color=INK)
    panels[-1].set_xlim(-0.7, selection.num_layers - 0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False, labelcolor=INK)
    # the program's version in the file would make equal results differ
    figure.savefig(path, format="png", metadata={"Software": None})


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)


def _draw_importance(axes: Axes, selection: Selection, title: str) -> None:
    for label, color, kept in (("stays attention", KEPT, True), ("becomes linear", LINEAR, False)):
        layers = [layer for layer in range(selection.num_layers) if (layer in selection.kept) == kept]
        axes.bar(layers, [selection.importance[layer] for layer in layers], color=color, width=0.75, label=label)
    axes.set_ylabel(BARS[selection.method], color=INK)
    lines = _legend(selection)
    axes.set_title(title, fontsize=11, color=INK, loc="left", pad=7 + 13 * len(lines))
    axes.annotate(
        "\n".join(lines),
        (0, 1),
        xytext=(0, 6),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
        va="bottom",
        linespacing=1.4,
    )
    *_, second, highest = sorted((0.0, *selection.importance))
    if highest > CUT * second > 0:
        axes.set_ylim(0, 1.3 * second)
        layer = selection.importance.index(highest)
        axes.annotate(
            f"{highest:.3g} ↑",
            (layer, 1.3 * second),
            xytext=(0, -2),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="top",
            fontsize=7.5,
            color="white" if layer in selection.kept else INK,
        )


def _legend(selection: Selection) -> list[str]:
    """Return what the bars are and, for HALO's score, the two numbers to compare."""
    lines = [f"{MEANINGS[selection.method]} of the model with this layer alone linear"]
    if selection.method == "halo":
        noise = selection.bootstrap and f", noise of max C − C = {selection.bootstrap.language_noise:.2g}"
        lines.append(f"ε = {selection.epsilon:g}{noise or ''}")
    if selection.arbitrary is not None:
        lines.append(selection.arbitrary)
    return lines


def _draw_frequency(axes: Axes, selection: Selection, bootstrap: Bootstrap) -> None:
    colors = [KEPT if layer in selection.kept else LINEAR for layer in range(selection.num_layers)]
    axes.bar(range(selection.num_layers), bootstrap.frequency, color=colors, width=0.75)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axes.set_ylabel("kept in", color=INK)
    drawn = f"{bootstrap.resamples:,} resamples of {bootstrap.questions:,} questions and {bootstrap.pieces:,} pieces of text"
    axes.set_title(drawn, fontsize=8, color=FAINT, loc="left")
