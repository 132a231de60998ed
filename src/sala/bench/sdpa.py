"""Torch's scaled_dot_product_attention as the baseline: its fastest layout, on a GPU its fastest kernel, on some of the heads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sala.bench.device import Timer
from sala.errors import BackendError

# operations that SDPA may take a call: beyond them fewer heads are timed, and the time scaled; five seconds of a CPU's
# core, about one of a GPU
OPERATIONS = {"cpu": 5e11, "cuda": 4e14}
# keys and values of SDPA's decoding step: what fits beside the rest
STEP_BYTES = 3 * 2**30
# torch's own choice among them is by a fixed order and not by speed
KERNELS: Mapping[str, SDPBackend] = MappingProxyType(
    {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
)

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Sdpa:
    """SDPA on all heads, or on the first of them: its time is proportional to them.

    kernels: on a GPU the seconds of each of torch's kernels, or why it does not take these tensors; `kernel` is the fastest.
    """

    run: Run
    heads: int
    heads_measured: int
    kernel: str | None = None
    kernels: Mapping[str, float | str] = field(default_factory=dict)


Make = Callable[[Timer], Sdpa]


def prefill(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, timer: Timer) -> Sdpa:
    return _causal(q_BTHK, k_BTGK, v_BTGV, timer, trains=False)


def training(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, timer: Timer) -> Sdpa:
    """Forward and backward."""
    return _causal(q_BTHK, k_BTGK, v_BTGV, timer, trains=True)


def _causal(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, timer: Timer, *, trains: bool) -> Sdpa:
    T, H, K = q_BTHK.shape[1:]
    a_group = H // k_BTGK.shape[2]
    operations_a_head = 2 * T * T * K * (3.5 if trains else 1)
    heads = max(1, min(H, int(OPERATIONS[q_BTHK.device.type] / operations_a_head)))
    # whole groups, or a part of one
    heads = heads // a_group * a_group or heads
    groups = -(-heads // a_group)
    # each head's numbers side by side: the layout it is fastest on
    q, k, v = (
        x[:, :, :count].detach().transpose(1, 2).contiguous().requires_grad_(trains)
        for x, count in ((q_BTHK, heads), (k_BTGK, groups), (v_BTGV, groups))
    )

    def attend() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)

    if not trains:
        return _fastest(attend, None, H, heads, timer)
    grad = torch.randn_like(q, requires_grad=False)
    return _fastest(attend, lambda out: torch.autograd.grad(out, (q, k, v), grad), H, heads, timer)


def step(draw: Callable[[int, int, int], Tensor], q_B1HK: Tensor, G: int, S: int, timer: Timer) -> Sdpa:
    """Return SDPA in its fast form: a group's heads as the rows of one product, [B, G, H / G, K].

    draw: returns keys (which = 2) or values (which = 3), (1, S, groups, K), for (S, groups, which).
    """
    H, K = q_B1HK.shape[2:]
    groups = max(1, min(G, STEP_BYTES // (2 * S * K * q_B1HK.element_size())))
    heads = groups * (H // G)
    k, v = (draw(S, groups, which).transpose(1, 2).contiguous() for which in (2, 3))
    q = q_B1HK[:, :, :heads].reshape(1, groups, H // G, K)
    return _fastest(lambda: scaled_dot_product_attention(q, k, v), None, H, heads, timer)


def _fastest(
    attend: Callable[[], Tensor], then: Callable[[Tensor], object] | None, H: int, heads: int, timer: Timer
) -> Sdpa:
    """Choose among torch's kernels by a call each, the second one. On a CPU there is one.

    then: what follows on the output, in the same time.

    Raises:
        BackendError: no kernel takes the tensors.
    """

    def whole() -> object:
        out = attend()
        return out if then is None else then(out)

    if timer.device.type != "cuda":
        return Sdpa(whole, H, heads)
    found: dict[str, float | str] = {}
    for name, backend in KERNELS.items():
        run = _with(backend, whole)
        try:
            run()
            found[name] = timer.seconds(run)
        except RuntimeError as error:  # torch's for a kernel that does not take the tensors, or has no memory for them
            found[name] = str(error).splitlines()[0]
    seconds = {name: value for name, value in found.items() if isinstance(value, float)}
    if not seconds:
        raise BackendError(f"none of torch's kernels takes these tensors: {found}")
    kernel = min(seconds, key=lambda name: seconds[name])
    return Sdpa(_with(KERNELS[kernel], whole), H, heads, kernel, found)


def _with(backend: SDPBackend, run: Run) -> Run:
    def chosen() -> object:
        with sdpa_kernel(backend):
            return run()

    return chosen
