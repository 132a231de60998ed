"""RULER (arXiv 2404.06654): its 13 tasks, generated from their definitions at any length."""

from functools import partial

from sala.eval.ruler.counting import make_coded, make_common
from sala.eval.ruler.niah import ROWS, make_needles
from sala.eval.ruler.questions import make_question
from sala.eval.ruler.scoring import match_all, match_any
from sala.eval.ruler.tracking import make_tracking
from sala.eval.task import Task

GROUP = "ruler"

TASKS = (
    *(Task(name, partial(make_needles, name, row), match_all, GROUP) for name, row in ROWS.items()),
    Task("vt", make_tracking, match_all, GROUP),
    Task("cwe", make_common, match_all, GROUP),
    Task("fwe", make_coded, match_all, GROUP),
    Task("qa_1", partial(make_question, "squad"), match_any, GROUP, needs="squad"),
    Task("qa_2", partial(make_question, "hotpotqa"), match_any, GROUP, needs="hotpotqa"),
)

__all__ = ["TASKS"]
