"""HALO: a pretrained Transformer becomes a hybrid of linear and sparse attention."""

from sala.convert.halo import Remember, Report, halo, planned_configs
from sala.convert.select import LayerScores, importance, read_scores, select, select_from_table

__all__ = [
    "LayerScores",
    "Remember",
    "Report",
    "halo",
    "importance",
    "planned_configs",
    "read_scores",
    "select",
    "select_from_table",
]
