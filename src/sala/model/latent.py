"""Multi-head latent attention: softmax attention whose queries, keys and values come from latents of low rank."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sala.model.attention import FullAttention
from sala.model.config import MiniCPMSALAConfig
from sala.model.infllm import SparseAttention
from sala.model.linear import Linear
from sala.model.norm import RMSNorm

# the source family's code builds the norms of latents without its configuration's rms_norm_eps
LATENT_EPS = 1e-6


class LatentAttention(FullAttention):
    """`FullAttention` with two-step projections and a norm between the steps (DeepSeek-V2 paper section 2.1; MiniCPM3).

    A head of queries or keys is [a part of its own | a part that rotates], and all heads' keys have the second part in
    common. Heads are expanded before they are cached, so that every operator on keys and values works as it is: a token
    takes 2 H K numbers, not the latents' kv_lora_rank + qk_rope_head_dim.
    """

    def add_projections(self, config: MiniCPMSALAConfig) -> None:
        assert config.q_lora_rank is not None and config.kv_lora_rank is not None and config.v_head_dim is not None
        self.num_groups = self.num_heads
        self.value_width = config.v_head_dim
        self.latent_width = config.kv_lora_rank
        self.own_width = self.width - self.rotary_width
        self.q_norm = self.k_norm = None
        queries, bias = config.q_lora_rank, config.attention_bias
        self.q_a_proj = Linear(config.hidden_size, queries, bias=bias)
        self.q_a_layernorm = RMSNorm(queries, LATENT_EPS)
        self.q_b_proj = Linear(queries, self.num_heads * self.width, bias=False)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.latent_width + self.rotary_width, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_width, LATENT_EPS)
        self.kv_b_proj = Linear(self.latent_width, self.num_heads * (self.own_width + self.value_width), bias=False)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, T, H, K): values end in zeros where they are narrower than keys."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))).unflatten(-1, (self.num_heads, self.width))
        latent_BTR, shared_BTK = self.kv_a_proj_with_mqa(x_BTD).split((self.latent_width, self.rotary_width), dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent_BTR)).unflatten(-1, (self.num_heads, -1))
        own, v = expanded.split((self.own_width, self.value_width), dim=-1)
        k = torch.cat((own, shared_BTK[:, :, None].expand(-1, -1, self.num_heads, -1)), dim=-1)
        # torch's attention on a CPU holds all T x S scores unless values are as wide as keys
        return q, k, pad(v, (0, self.width - self.value_width))


class SparseLatentAttention(LatentAttention, SparseAttention):
    """The same parameters as `LatentAttention`; each query reads the blocks it selects, as in `SparseAttention`."""
