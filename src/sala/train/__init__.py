"""Training: the one loop that runs a recipe's stages, on any mesh."""

from sala.train.batches import Corpus, Data, ShardData, read_corpus, read_data
from sala.train.loop import NonFiniteError, Observer, Progress, run_stage
from sala.train.parallel import World, start_world

__all__ = [
    "Corpus",
    "Data",
    "NonFiniteError",
    "Observer",
    "Progress",
    "ShardData",
    "World",
    "read_corpus",
    "read_data",
    "run_stage",
    "start_world",
]
