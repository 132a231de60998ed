"""The linear-attention layer: fixed decay per head, rotation, q/k norm, output norm and gate."""

import torch
from torch import Tensor, nn

from sala.model.autocast import as_written
from sala.model.cache import States
from sala.model.config import MiniCPMSALAConfig
from sala.model.linear import Linear
from sala.model.norm import RMSNorm, normed_or_fused
from sala.model.rows import Packing, Rows
from sala.ops.constants import constant
from sala.ops.lightning import lightning_attention, log_decays
from sala.ops.pointwise import norm_gate, norm_rotate


class LightningAttention(nn.Module):
    """y = Wo(RMSNorm(o) * sigmoid(Wz x)), the norm over all heads at once (HALO paper eq. 14-16, released checkpoint)."""

    def __init__(self, config: MiniCPMSALAConfig):
        super().__init__()
        assert (
            config.lightning_nh is not None
            and config.lightning_nkv is not None
            and config.lightning_head_dim is not None
        )
        self.num_heads, self.num_groups = config.lightning_nh, config.lightning_nkv
        self.width = config.lightning_head_dim
        self.value_width = config.v_head_dim or self.width
        self.rotary_width = config.qk_rope_head_dim or self.width
        self.scale = config.lightning_scale_value
        # neither a parameter nor a buffer: those are laid out on the meta device, moved and cast
        self.log_decays = log_decays(self.num_heads)
        self.use_rope = config.lightning_use_rope
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.width, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.num_groups * self.width, bias=bias)
        self.v_proj = Linear(config.hidden_size, self.num_groups * self.value_width, bias=bias)
        self.o_proj = Linear(self.num_heads * self.value_width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = self.k_norm = self.o_norm = self.z_proj = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.width, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.width, config.rms_norm_eps)
        if config.use_output_norm:
            self.o_norm = RMSNorm(self.num_heads * self.value_width, config.rms_norm_eps)
        if config.use_output_gate:
            self.z_proj = Linear(config.hidden_size, self.num_heads * self.value_width, bias=False)

    @property
    def needs_rope(self) -> bool:
        return self.use_rope

    def attend(self, x_BTD: Tensor, rows: Rows, cache: States | None = None) -> Tensor:
        """Return what the heads read, (B, T, H, V), before norm and gate."""
        batch, length, _ = x_BTD.shape
        rotation = rows.rotation if self.use_rope else None
        assert (rotation is not None) == self.use_rope
        q = self.q_proj(x_BTD).view(batch, length, self.num_heads, self.width)
        k = self.k_proj(x_BTD).view(batch, length, self.num_groups, self.width)
        v = self.v_proj(x_BTD).view(batch, length, self.num_groups, self.value_width)
        q, q_norm = normed_or_fused(self.q_norm, q)
        k, k_norm = normed_or_fused(self.k_norm, k)
        # autocast: a norm kept in float32 makes float32
        q = norm_rotate(q, norm=q_norm, rotation=rotation).to(v.dtype)
        k = norm_rotate(k, norm=k_norm, rotation=rotation).to(v.dtype)
        if self.num_groups != self.num_heads:
            repeats = self.num_heads // self.num_groups
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        log_decay_H = constant(self.log_decays, q.device)
        if rows.packing is not None:
            with as_written(q):
                return _attend_packed(q, k, v, log_decay_H, self.scale, rows.packing)
        with as_written(q):
            o_BTHV, state_BHKV = lightning_attention(
                q,
                k,
                v,
                log_decay_H,
                scale=self.scale,
                initial_state_BHKV=None if cache is None else cache.initial(rows, v),
                mask_BT=rows.mask_BT,
                slots_2B=None if rows.pages is None else rows.pages.slots_2B,
            )
        if cache is not None:
            cache.keep(state_BHKV, rows)
        return o_BTHV

    def forward(self, x_BTD: Tensor, rows: Rows, cache: States | None = None) -> Tensor:
        o_BTHV = self.attend(x_BTD, rows, cache)
        gate_BTD = None if self.z_proj is None else self.z_proj(x_BTD)
        o_BTHV, o_norm = normed_or_fused(self.o_norm, o_BTHV, dimensions=2)
        return self.o_proj(norm_gate(o_BTHV, norm=o_norm, gate_BTD=gate_BTD))


# the documents' lengths would be numbers of the graph, and every batch would compile it again
@torch.compiler.disable
def _attend_packed(
    q_1THK: Tensor, k_1THK: Tensor, v_1THV: Tensor, log_decay_H: Tensor, scale: float, packing: Packing
) -> Tensor:
    return lightning_attention(
        q_1THK,
        k_1THK,
        v_1THV,
        log_decay_H,
        scale=scale,
        cu_seqlens=packing.cu_seqlens,
        cu_seqlens_cpu=packing.cu_seqlens_cpu,
        context=packing.context,
    )[0]
