"""Training: the one loop that runs a recipe's stages, and the folder of a run."""

from sala.train.batches import Corpus, Data, ShardData, read_corpus, read_data
from sala.train.export import export
from sala.train.folder import Finished, Interrupted, RunOptions
from sala.train.loop import NonFiniteError, Observer, Progress, run_stage
from sala.train.parallel import World, start_world
from sala.train.run import Scorers, train
from sala.train.start import Origin

__all__ = [
    "Corpus",
    "Data",
    "Finished",
    "Interrupted",
    "NonFiniteError",
    "Observer",
    "Origin",
    "Progress",
    "RunOptions",
    "Scorers",
    "ShardData",
    "World",
    "export",
    "read_corpus",
    "read_data",
    "run_stage",
    "start_world",
    "train",
]
