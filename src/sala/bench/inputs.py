"""The numbers that operators are checked and timed on: random, and where it matters alike from token to token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sala.bench.device import CPU
from sala.bench.shapes import AttentionShape
from sala.ops.infllm import compress
from sala.ops.lightning import log_decay

# share of a token that is its predecessor's: neighbours choose much the same blocks, as in text
CORRELATION = 0.9


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where a case's random numbers come from: drawn on the device, whose generators give each its own."""

    shape: AttentionShape
    dtype: torch.dtype
    correlated: bool = True
    device: torch.device = CPU

    def draw(self, T: int, heads: int, width: int, which: int) -> Tensor:
        """Return (1, T, heads, width), standard normal; along T a random walk with memory where `correlated`.

        which: queries, keys and values of one length differ in it.
        """
        generator = torch.Generator(self.device).manual_seed(which)
        drawn = torch.empty(1, T, heads, width, dtype=self.dtype, device=self.device)
        for head in range(heads):
            noise_TK = torch.randn(T, width, generator=generator, device=self.device)
            if self.correlated:
                # x_t = a x_(t-1) + noise, by doubling: the terms older than 128 tokens, below 2e-6, are left out
                for shift in (1, 2, 4, 8, 16, 32, 64):
                    noise_TK[shift:] += CORRELATION**shift * noise_TK[:-shift].clone() if shift < T else 0
                noise_TK *= (1 - CORRELATION**2) ** 0.5
            drawn[0, :, head] = noise_TK
        return drawn

    def attention(self, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (1, T, H, K), k and v (1, S, G, K)."""
        shape = self.shape
        return (
            self.draw(T, shape.heads, shape.width, 1),
            self.draw(S, shape.groups, shape.width, 2),
            self.draw(S, shape.groups, shape.width, 3),
        )

    def lightning(self, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v (1, T, H, K)."""
        heads, width = self.shape.lightning_heads, self.shape.lightning_width
        q, k, v = (self.draw(T, heads, width, which) for which in (1, 2, 3))
        return q, k, v

    def state(self) -> Tensor:
        """Return a state of lightning attention, (1, H, K, K) float32."""
        heads, width = self.shape.lightning_heads, self.shape.lightning_width
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(1, heads, width, width, generator=generator, device=self.device)

    def log_decay(self) -> Tensor:
        """Return (H,) float32."""
        return log_decay(self.shape.lightning_heads).to(self.device)

    def positions(self, start: int, end: int) -> Tensor:
        """Return (1, end - start) int64."""
        return torch.arange(start, end, device=self.device)[None]

    def tiers(self, k_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys' compressed ones, fine and coarse, (B, N, G, K) each."""
        geometry = self.shape.geometry
        return (
            compress(k_BSGK, geometry.kernel_size, geometry.kernel_stride),
            compress(k_BSGK, geometry.coarse_size, geometry.coarse_stride),
        )

    @property
    def scale(self) -> float:
        """Factor on the scores of the softmax operators."""
        return self.shape.width**-0.5
