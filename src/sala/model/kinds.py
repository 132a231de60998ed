"""The kinds of layers: what the rest of the package needs to know of a mixer without its code, a row each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Operator = Literal["dense", "infllm", "lightning"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of layer; `sala.model.mixers.MIXERS` has its code.

    operator: the one of `sala.ops` that it runs.
    label: what it is called in reports.
    word: the same in one word.
    full: of a block-sparse kind, the one that reads everything with the same parameters.
    latent: whether queries, keys and values come from latents of low rank.
    aliases: other names in released and re-saved configurations.
    """

    operator: Operator
    label: str
    word: str
    full: str | None = None
    latent: bool = False
    aliases: tuple[str, ...] = ()


LIGHTNING = "lightning-attn"

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "attention": Kind("dense", "full attention", "full"),
        "latent-attention": Kind("dense", "full latent attention", "full, latent", latent=True),
        "minicpm4": Kind("infllm", "sparse attention", "sparse", full="attention"),
        "latent-minicpm4": Kind(
            "infllm", "sparse latent attention", "sparse, latent", full="latent-attention", latent=True
        ),
        LIGHTNING: Kind("lightning", "lightning attention", "linear", aliases=("lightning_attn", "lightning")),
    }
)
MIXER_ALIASES = {alias: name for name, kind in KINDS.items() for alias in (name, *kind.aliases)}
# a full kind's block-sparse partner, and the other way round
FULL_ROWS = {name: kind.full for name, kind in KINDS.items() if kind.full is not None}
SPARSE_ROWS = {full: sparse for sparse, full in FULL_ROWS.items()}
LATENT_ROWS = tuple(name for name, kind in KINDS.items() if kind.latent)


def runs(mixer_types: Iterable[str], operator: Operator) -> bool:
    """Return whether some layer runs an operator."""
    return any(KINDS[name].operator == operator for name in mixer_types)
