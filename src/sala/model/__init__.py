"""The network: configuration, layers, decoder, cache, and how a source family's checkpoint becomes one of it."""

from sala.model.cache import SalaCache
from sala.model.config import MiniCPMSALAConfig
from sala.model.decoder import MiniCPMSALAForCausalLM, MiniCPMSALAModel
from sala.model.mixers import MIXERS, new_cache, new_paged_cache, with_mixers
from sala.model.paged import PagedCache, PagedRow
from sala.model.rows import Rows

__all__ = [
    "MIXERS",
    "MiniCPMSALAConfig",
    "MiniCPMSALAForCausalLM",
    "MiniCPMSALAModel",
    "PagedCache",
    "PagedRow",
    "Rows",
    "SalaCache",
    "new_cache",
    "new_paged_cache",
    "with_mixers",
]
