"""The full-attention model as transformers runs it, on a GPU with the fastest kernels that torch has for its shape."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from sala.bench import sdpa
from sala.bench.device import timer_of

LOWER_RIGHT = "sdpa_lower_right"
# transformers' own on a CPU. On a GPU its masks would keep torch's fastest kernels from a prompt read in chunks
ATTENTION: Mapping[str, str] = {"cpu": "sdpa", "cuda": LOWER_RIGHT}
# long enough to fill a GPU
PROBE_TOKENS = 16384

Kernels = Callable[[], AbstractContextManager[Any]]


def attend(
    module: Any, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, attention_mask: None, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """Return (B, T, H, K): causal attention of the last T of S positions, as transformers calls it; without padding."""
    assert attention_mask is None
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1:3]
    if T == 1:
        # a group's heads as rows of one product: keys and values are read once a group
        q_BGHK = q_BHTK.reshape(B, G, H // G, K)
        with _without_cudnn():
            return scaled_dot_product_attention(q_BGHK, k_BGSK, v_BGSK, scale=scaling).reshape(B, 1, H, K), None
    out_BHTK = scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=None if T == S else causal_lower_right(T, S),
        is_causal=T == S,
        scale=scaling,
        enable_gqa=G != H,
    )
    return out_BHTK.transpose(1, 2).contiguous(), None


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Keep cuDNN from steps: it builds a plan for every number of keys, and each token has one more than the last."""
    enabled = cudnn_sdp_enabled()
    enable_cudnn_sdp(False)
    try:
        yield
    finally:
        enable_cudnn_sdp(enabled)


# without a mask function of that name transformers makes no mask
AttentionInterface.register(LOWER_RIGHT, attend)


def fastest_kernels(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> tuple[str | None, Kernels]:
    """Return the name of the kernel that is the fastest for a prompt of the model, and what to run the model in.

    On a CPU there is no choice. Where the fastest does not take a call (one query, say) torch takes the next.
    """
    if device.type != "cuda":
        return None, nullcontext
    T, K = PROBE_TOKENS, config.head_dim
    shapes = ((T, config.num_attention_heads), (T, config.num_key_value_heads), (T, config.num_key_value_heads))
    with torch.inference_mode():
        q, k, v = (torch.randn(1, length, heads, K, dtype=dtype, device=device) for length, heads in shapes)
        name = sdpa.prefill(q, k, v, timer_of(device)).kernel
    assert name is not None
    order = [sdpa.KERNELS[name], *sdpa.KERNELS.values(), SDPBackend.MATH]
    return name, partial(sdpa_kernel, list(dict.fromkeys(order)), set_priority=True)
