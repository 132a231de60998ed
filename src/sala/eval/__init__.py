"""Evaluation: what a model can do. Retrieval against length, copying, language, one needle in a real document."""

from sala.eval.blocks import BlockCount, count_blocks
from sala.eval.interval import wilson_interval
from sala.eval.language import copy_accuracy, text_loss
from sala.eval.needle import NeedleResult, NeedlesResult, find_needle, find_needles, needle_document
from sala.eval.reading import logits_at
from sala.eval.retrieval import DepthBin, RetrievalPoint, retrieval
from sala.eval.scores import layer_scorers

__all__ = [
    "BlockCount",
    "DepthBin",
    "NeedleResult",
    "NeedlesResult",
    "RetrievalPoint",
    "copy_accuracy",
    "count_blocks",
    "find_needle",
    "find_needles",
    "layer_scorers",
    "logits_at",
    "needle_document",
    "retrieval",
    "text_loss",
    "wilson_interval",
]
