"""HALO: a pretrained Transformer becomes a hybrid of linear and sparse attention."""

from sala.convert.bootstrap import Bootstrap, Outcomes, bootstrap
from sala.convert.halo import Remember, Report, halo, planned_configs
from sala.convert.select import LayerScores, importance, read_scores, select
from sala.convert.selection import Selection, plot_selection

__all__ = [
    "Bootstrap",
    "LayerScores",
    "Outcomes",
    "Remember",
    "Report",
    "Selection",
    "bootstrap",
    "halo",
    "importance",
    "planned_configs",
    "plot_selection",
    "read_scores",
    "select",
]
