"""Which parameters a stage trains."""

from collections.abc import Sequence

from torch import nn

from sala.errors import SalaError
from sala.model.kinds import LIGHTNING

# modules of a mixer that make queries and keys
QUERIES_AND_KEYS = ("q_proj", "k_proj", "q_norm", "k_norm")


def trainable_parameters(model: nn.Module, what: str, *, freeze_qk: bool = False) -> dict[str, nn.Parameter]:
    """Return by name the parameters that a stage trains: "linear_attention", "mixers" or "all".

    A stage of alignment trains the module of linear twins, all of it.

    Args:
        freeze_qk: leave out what makes queries and keys.

    Raises:
        SalaError: this chooses nothing, or the model makes keys and values in one projection.
    """
    named = dict(model.named_parameters())
    if freeze_qk:
        if any("kv_b_proj" in name for name in named):
            raise SalaError("freeze_qk: latent attention makes keys and values in one projection; expected false")
        named = {name: tensor for name, tensor in named.items() if not set(name.split(".")) & {*QUERIES_AND_KEYS}}
    if what == "all":
        return named
    kinds: Sequence[str] = model.config.mixer_types  # type: ignore[union-attr, assignment]
    chosen = [i for i, kind in enumerate(kinds) if what == "mixers" or kind == LIGHTNING]
    if not chosen:
        raise SalaError(f"trainable: {what} chooses nothing in a model with mixers {', '.join(sorted(set(kinds)))}")
    prefixes = tuple(f"model.layers.{i}.self_attn." for i in chosen)
    return {name: parameter for name, parameter in named.items() if name.startswith(prefixes)}
