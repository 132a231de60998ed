"""Full softmax attention: the teacher's layers, and the kept layers of a hybrid while selection is off."""

import math

import torch
from torch import Tensor, nn

from sala.model.autocast import as_written
from sala.model.cache import KeysAndValues
from sala.model.config import MiniCPMSALAConfig
from sala.model.linear import Linear
from sala.model.norm import RMSNorm, normed_or_fused
from sala.model.rows import Packing, Rows
from sala.ops.dense import dense_attention
from sala.ops.packing import LONGEST_TOGETHER, pad_rows, similar_lengths
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
        self.o_proj = Linear(self.num_heads * self.value_width, config.hidden_size, bias=config.attention_bias)
        self.o_gate = None
        if config.attn_use_output_gate:
            self.o_gate = Linear(config.hidden_size, self.num_heads * self.value_width, bias=False)

    def add_projections(self, config: MiniCPMSALAConfig) -> None:
        """Make the modules of `project`, and set `num_groups` and, where it is not the head width, `value_width`."""
        assert config.num_key_value_heads is not None
        self.num_groups = config.num_key_value_heads
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.width, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.num_groups * self.width, bias=bias)
        self.v_proj = Linear(config.hidden_size, self.num_groups * self.width, bias=bias)
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

    def forward(self, x_BTD: Tensor, rows: Rows, cache: KeysAndValues | None = None) -> Tensor:
        q, k, v = self.project(x_BTD)
        rotation = rows.rotation if self.use_rope else None
        assert (rotation is not None) == self.use_rope
        scale_BT = None if self.logits_base is None else logits_scale(rows.positions_BT, self.logits_base)
        q, q_norm = normed_or_fused(self.q_norm, q)
        k, k_norm = normed_or_fused(self.k_norm, k)
        # autocast: a norm kept in float32 makes float32
        q = norm_rotate(q, norm=q_norm, rotation=rotation, scale_BT=scale_BT).to(v.dtype)
        k = norm_rotate(k, norm=k_norm, rotation=rotation).to(v.dtype)
        with as_written(q):
            if rows.packing is None:
                o_BTHV = self.attend(q, k, v, rows, cache)
            else:
                o_BTHV = self.attend_packed(q, k, v, rows.packing)
        # values may have come padded to the width of keys
        gate_BTD = None if self.o_gate is None else self.o_gate(x_BTD)
        return self.o_proj(norm_gate(o_BTHV[..., : self.value_width], gate_BTD=gate_BTD))

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, rows: Rows, cache: KeysAndValues | None) -> Tensor:
        """Return (B, T, H, V) over everything cached and new, causal by position."""
        k, v = cached(k_BTGK, v_BTGV, rows, cache)
        return dense_attention(
            q_BTHK,
            k,
            v,
            rows.positions_BT,
            scale=self.width**-0.5,
            start=rows.start,
            static=rows.static,
            page_table_BP=rows.page_table_BP,
        )

    # the documents' lengths would be numbers of the graph, and every batch would compile it again
    @torch.compiler.disable
    def attend_packed(self, q_1THK: Tensor, k_1TGK: Tensor, v_1TGV: Tensor, packing: Packing) -> Tensor:
        """Return (1, T, H, V): each document's queries over its own keys, with a context those of earlier ranks too."""
        k_SGK, v_SGV, spans = k_1TGK[0], v_1TGV[0], packing.spans
        if packing.context is not None:
            # one exchange for the two, as heads side by side
            both_RTXK = packing.context.gather(torch.cat((k_SGK, v_SGV), dim=1))
            k_SGK, v_SGV = both_RTXK.flatten(0, 1).chunk(2, dim=1)
        # one split of each tensor: the gradient of a slice is a tensor of the whole length
        lengths = [span.end - span.start for span in spans]
        first = spans[0].document_start
        key_lengths = [first, spans[0].end - first, *lengths[1:], len(k_SGK) - spans[-1].end]
        q_rows = q_1THK[0].split(lengths)
        k_rows, v_rows = (x_SGK.split(key_lengths)[1:-1] for x_SGK in (k_SGK, v_SGV))
        out = list(q_rows)
        # the first document may have begun on another rank; the others begin here, as many queries as keys
        for group in [[0], *similar_lengths([0, *lengths[1:]], self.longest_together)]:
            q, k, v = (pad_rows([x_rows[n] for n in group]) for x_rows in (q_rows, k_rows, v_rows))
            # padding stands behind all tokens: none sees it
            for n, out_LHV in zip(group, self.attend_rows(q, k, v, spans[group[0]].document_length), strict=True):
                out[n] = out_LHV[: lengths[n]]
        return torch.cat(out)[None]

    @property
    def longest_together(self) -> int:
        """Tokens of the longest document that may share a call of `attend_rows` with others."""
        return LONGEST_TOGETHER

    def attend_rows(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, document_length: int) -> Tensor:
        """Return (B, T, H, V) for queries of the last T of positions 0 .. S - 1 of documents of `document_length` tokens."""
        start = k_BSGK.shape[1] - q_BTHK.shape[1]
        return dense_attention(q_BTHK, k_BSGK, v_BSGV, None, scale=self.width**-0.5, start=start)


def cached(k_BTGK: Tensor, v_BTGV: Tensor, rows: Rows, cache: KeysAndValues | None) -> tuple[Tensor, Tensor]:
    """Return all keys (B, S, G, K) and values (B, S, G, V) that there are by now, the one of position p at index p; or pages."""
    if cache is None:
        return rows.in_order(k_BTGK), rows.in_order(v_BTGV)
    return cache.append(k_BTGK, v_BTGV, rows)


def logits_scale(positions_BT: Tensor, base: float) -> Tensor:
    """Return log_a(t + a) of each query's position t, (B, T) float32 (HALO paper section 4.3)."""
    return (positions_BT.clamp(min=0) + base).log() / math.log(base)
