"""Runs: a recipe carried out in a folder, a conversion or a training, resumed where it was left."""

from sala.convert.choose import Scorers
from sala.runs.export import export
from sala.runs.folder import RunOptions
from sala.runs.identity import Finished
from sala.runs.run import make_model, run_recipe
from sala.runs.signals import Interrupted
from sala.runs.start import Origin

__all__ = ["Finished", "Interrupted", "Origin", "RunOptions", "Scorers", "export", "make_model", "run_recipe"]
