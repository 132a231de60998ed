"""Converting a pretrained Transformer: its weights as a hybrid's, linear twins, and the choice of layers."""

from sala.convert.bootstrap import Bootstrap, Outcomes, bootstrap
from sala.convert.choose import Scorers
from sala.convert.plan import planned_configs
from sala.convert.select import LayerScores, importance, read_scores, select
from sala.convert.selection import Selection, plot_selection

__all__ = [
    "Bootstrap",
    "LayerScores",
    "Outcomes",
    "Scorers",
    "Selection",
    "bootstrap",
    "importance",
    "planned_configs",
    "plot_selection",
    "read_scores",
    "select",
]
