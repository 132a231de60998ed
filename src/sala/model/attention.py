"""Full softmax attention: the teacher's layers, and the kept layers of a hybrid while selection is off."""

import math

import torch
from torch import Tensor, nn

from sala.model.cache import AttentionCache
from sala.model.config import MiniCPMSALAConfig
from sala.model.norm import RMSNorm, norm_of
from sala.model.rows import Rows
from sala.ops.dense import dense_attention
from sala.ops.packing import pack, unpack
from sala.ops.pointwise import norm_gate, norm_rotate


class FullAttention(nn.Module):
    """Grouped-query attention with the switches of the source families.

    The released layer has no rotation and no q/k norm, and gates its output: y = Wo(o * sigmoid(Wg x))
    (MiniCPM-SALA report section 2; HALO paper eq. 17 without its norm, as in the checkpoint).
    """

    def __init__(self, config: MiniCPMSALAConfig):
        super().__init__()
        assert config.head_dim is not None
        self.num_heads, self.width, self.value_width = config.num_attention_heads, config.head_dim, config.head_dim
        self.rotary_width = config.qk_rope_head_dim or self.width
        self.use_rope = config.attn_use_rope
        self.logits_base = config.attn_logits_scaling
        self.add_projections(config)
        self.o_proj = nn.Linear(self.num_heads * self.value_width, config.hidden_size, bias=config.attention_bias)
        self.o_gate = None
        if config.attn_use_output_gate:
            self.o_gate = nn.Linear(config.hidden_size, self.num_heads * self.value_width, bias=False)

    def add_projections(self, config: MiniCPMSALAConfig) -> None:
        """Make the modules of `project`, and set `num_groups` and, where it is not the head width, `value_width`."""
        assert config.num_key_value_heads is not None
        self.num_groups = config.num_key_value_heads
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_groups * self.width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_groups * self.width, bias=bias)
        self.q_norm = self.k_norm = None
        if config.attention_qk_norm:
            self.q_norm = RMSNorm(self.width, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.width, config.rms_norm_eps)

    @property
    def needs_rope(self) -> bool:
        return self.use_rope

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H, K), keys (B, T, G, K) and values (B, T, G, V), not yet normed and rotated."""
        batch, length, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(batch, length, self.num_heads, self.width)
        k = self.k_proj(x_BTD).view(batch, length, self.num_groups, self.width)
        v = self.v_proj(x_BTD).view(batch, length, self.num_groups, self.width)
        return q, k, v

    def forward(self, x_BTD: Tensor, rows: Rows, cache: AttentionCache | None = None) -> Tensor:
        q, k, v = self.project(x_BTD)
        rotation = rows.rotation if self.use_rope else None
        assert (rotation is not None) == self.use_rope
        scale_BT = None if self.logits_base is None else logits_scale(rows.positions_BT, self.logits_base)
        q = norm_rotate(q, norm=norm_of(self.q_norm), rotation=rotation, scale_BT=scale_BT)
        k = norm_rotate(k, norm=norm_of(self.k_norm), rotation=rotation)
        if rows.cu_seqlens is None:
            o_BTHV = self.attend(q, k, v, rows, cache)
        else:
            (q, mask), (k, _), (v, _) = (unpack(tensor, rows.cu_seqlens) for tensor in (q, k, v))
            positions = torch.arange(q.shape[1], device=q.device)[None].expand(mask.shape).masked_fill(~mask, -1)
            o_BTHV = pack(self.attend(q, k, v, Rows(positions, mask_BT=mask), None), rows.cu_seqlens)
        # values may have come padded to the width of keys
        gate_BTD = None if self.o_gate is None else self.o_gate(x_BTD)
        return self.o_proj(norm_gate(o_BTHV[..., : self.value_width], gate_BTD=gate_BTD))

    def attend(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, rows: Rows, cache: AttentionCache | None
    ) -> Tensor:
        """Return (B, T, H, V) over everything cached and new, causal by position."""
        k, v = (k_BTGK, v_BTGV) if cache is None else cache.append(k_BTGK, v_BTGV, rows)
        return dense_attention(q_BTHK, k, v, rows.positions_BT, scale=self.width**-0.5, start=rows.start)


def logits_scale(positions_BT: Tensor, base: float) -> Tensor:
    """Return log_a(t + a) of each query's position t, (B, T) float32 (HALO paper section 4.3)."""
    return (positions_BT.clamp(min=0) + base).log() / math.log(base)
