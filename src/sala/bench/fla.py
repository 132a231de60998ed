"""flash-linear-attention's operator for one fixed decay a head, in our terms: a competitor where the package is installed."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from torch import Tensor

from sala.ops.lightning import lightning_attention

FLA = "fla"


def unavailable() -> str | None:
    """Return why it cannot run here, None when it can."""
    if find_spec("fla") is None:
        return "the package flash-linear-attention is not installed"
    try:
        import fla.ops.simple_gla  # noqa: F401
    except ImportError as error:
        return f"flash-linear-attention cannot be imported: {error}"
    return None


def attend(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_H: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `lightning_attention` does, by `chunk_simple_gla` (version 0.6.0; Yang et al., arXiv 2312.06635).

    Its `g_gamma` is a log-decay a head that depends on nothing; with a decay a token (`g`) it would do more.
    """
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        g_gamma=log_decay_H,
        scale=scale,
        initial_state=initial_state_BHKV,
        output_final_state=True,
    )


def lightning_by(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return lightning attention by a backend of this package, or by the other one."""
    return attend if name == FLA else partial(lightning_attention, backend=name)
