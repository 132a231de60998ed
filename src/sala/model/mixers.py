"""The table of mixers: a kind of layer is a row, its module and what it remembers, of a batch and of requests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sala.errors import ConfigError
from sala.model.attention import FullAttention
from sala.model.cache import AttentionCache, LightningCache, MixerCache, SalaCache, SparseCache
from sala.model.config import MiniCPMSALAConfig
from sala.model.infllm import SparseAttention
from sala.model.kinds import FULL_ROWS, LIGHTNING, SPARSE_ROWS
from sala.model.latent import LatentAttention, SparseLatentAttention
from sala.model.lightning import LightningAttention
from sala.model.paged import PAGE_TOKENS, AttentionPool, PagedCache, Sizes, SparsePool, StatePool


@dataclass(frozen=True, slots=True)
class Mixer:
    module: Callable[[MiniCPMSALAConfig], nn.Module]
    cache: type[AttentionCache | LightningCache]
    pool: Callable[[MiniCPMSALAConfig, Sizes], MixerCache]


MIXERS = {
    "attention": Mixer(FullAttention, AttentionCache, AttentionPool),
    "minicpm4": Mixer(SparseAttention, SparseCache, SparsePool),
    LIGHTNING: Mixer(LightningAttention, LightningCache, StatePool),
    "latent-attention": Mixer(LatentAttention, AttentionCache, AttentionPool),
    "latent-minicpm4": Mixer(SparseLatentAttention, SparseCache, SparsePool),
}


def new_cache(config: MiniCPMSALAConfig, reserve: int = 0) -> SalaCache:
    """Return an empty cache; `reserve` is a number of tokens to take memory for at once, where the length is known ahead."""
    return SalaCache([MIXERS[name].cache(config, reserve) for name in config.mixer_types])


def new_paged_cache(config: MiniCPMSALAConfig, pages: int, slots: int, page_tokens: int = PAGE_TOKENS) -> PagedCache:
    """Return empty pools for requests: so many pages, and slots for states.

    Raises:
        InputError: pages that do not hold whole blocks.
    """
    sizes = Sizes(pages, slots, page_tokens)
    return PagedCache([MIXERS[name].pool(config, sizes) for name in config.mixer_types], sizes)


def reconfigured(model: Any, **changes: Any) -> Any:
    """Return a model on the same parameter tensors with other values of fields that own no parameters.

    Raises:
        ConfigError: the changes need other parameters.
    """
    config = MiniCPMSALAConfig(**(config_fields(model.config) | changes))
    with torch.device("meta"):
        view = type(model)(config)
    parameters, wanted = model.state_dict(keep_vars=True), view.state_dict()
    if {k: v.shape for k, v in parameters.items()} != {k: v.shape for k, v in wanted.items()}:
        raise ConfigError(
            f"{changes} need other parameters than the model has; mixers can be exchanged only between "
            f"{' or '.join(f'{a!r} and {b!r}' for a, b in SPARSE_ROWS.items())}"
        )
    view.load_state_dict(parameters, assign=True)
    view.tie_weights()
    return view.train(model.training)


def with_mixers(model: Any, mixer_types: Sequence[str]) -> Any:
    """Return a model on the same parameter tensors whose layers are of other kinds.

    Full and block-sparse attention have the same parameters, so switching selection on or off is another tuple.

    Raises:
        ConfigError: a layer's new kind has other parameters than its old one.
    """
    return reconfigured(model, mixer_types=list(mixer_types))


def sparse_mixers(mixer_types: Sequence[str], sparse: bool) -> tuple[str, ...]:
    """Return the tuple with block selection on or off in the softmax layers."""
    partner = SPARSE_ROWS if sparse else FULL_ROWS
    return tuple(partner.get(name, name) for name in mixer_types)


def config_fields(config: MiniCPMSALAConfig) -> dict:
    """Return the configuration as keyword arguments of its class."""
    fields = {name: getattr(config, name) for name in MiniCPMSALAConfig.__annotations__}
    return {**fields, "dtype": config.dtype, "architectures": config.architectures}
