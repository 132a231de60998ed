"""The demo: the whole story on the embedded teacher, offline, in minutes, with a report."""

from sala.demo.plan import FULL, QUICK, Amount, Plan
from sala.demo.progress import PHASES, Moment, Observer, Say
from sala.demo.story import run_demo

__all__ = ["FULL", "PHASES", "QUICK", "Amount", "Moment", "Observer", "Plan", "Say", "run_demo"]
