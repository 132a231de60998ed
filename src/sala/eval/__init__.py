"""Evaluation: a table of tasks, readers that answer them (a local model or a URL), and runs that resume sample by sample."""

from sala.eval.blocks import BlockCount, count_blocks
from sala.eval.interval import wilson_interval
from sala.eval.language import copy_accuracy, text_loss
from sala.eval.needle import NeedleResult, NeedlesResult, find_needle, find_needles, needle_document
from sala.eval.reader import Answer, LocalReader, Reader, Request
from sala.eval.retrieval import DepthBin, RetrievalPoint, retrieval
from sala.eval.run import Plan, read_samples, run
from sala.eval.scores import layer_scorers
from sala.eval.summary import Difference, Row, compare
from sala.eval.table import GROUPS, TASKS, tasks_named
from sala.eval.task import STYLES, Predictions, Prompt, Setting, Style, Task, Window

__all__ = [
    "GROUPS",
    "STYLES",
    "TASKS",
    "Answer",
    "BlockCount",
    "DepthBin",
    "Difference",
    "LocalReader",
    "NeedleResult",
    "NeedlesResult",
    "Plan",
    "Predictions",
    "Prompt",
    "Reader",
    "Request",
    "RetrievalPoint",
    "Row",
    "Setting",
    "Style",
    "Task",
    "Window",
    "compare",
    "copy_accuracy",
    "count_blocks",
    "find_needle",
    "find_needles",
    "layer_scorers",
    "needle_document",
    "read_samples",
    "retrieval",
    "run",
    "tasks_named",
    "text_loss",
    "wilson_interval",
]
