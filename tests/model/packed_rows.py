"""Models, packings and the comparison that tests of packed rows and of context parallelism share."""

import torch
from torch import Tensor

from model.shapes import TINY_SPARSE, tiny_config
from sala.model import MiniCPMSALAForCausalLM

# blocks of 8, five of them read: selection leaves blocks out from position 40 on
NARROW_SPARSE = {**TINY_SPARSE, "kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 16, "topk": 3}
MIXERS = ["minicpm4", "lightning-attn", "attention", "lightning-attn"]
LATENT_MIXERS = ["latent-minicpm4", "lightning-attn", "latent-attention", "lightning-attn"]
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "lightning_head_dim": 16,
}
KINDS = {
    "hybrid": {},
    "rotated": {"attn_use_rope": True, "attention_qk_norm": True, "lightning_nkv": 2},
    "scaled logits": {"attn_logits_scaling": 20},
    "exact normalizer": {"sparse_config": {**NARROW_SPARSE, "normalizer": "exact"}},
    "decided by the sequence": {"sparse_config": {**NARROW_SPARSE, "dense_rule": "sequence", "dense_len": 80}},
    "latent": {**LATENT, "mixer_types": LATENT_MIXERS},
}


def wide_model(kind: str) -> MiniCPMSALAForCausalLM:
    """The same random model of every call, in float64."""
    torch.manual_seed(0)
    config = tiny_config(**{"mixer_types": MIXERS, "sparse_config": {**NARROW_SPARSE, "dense_len": 1}, **KINDS[kind]})
    return MiniCPMSALAForCausalLM(config).double().train()


def row_of(length: int) -> tuple[Tensor, Tensor]:
    """Return tokens (1, length), and weights of the hidden states (1, length, D) that make one number of them."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 64, (1, length), generator=generator)
    return ids, torch.randn(1, length, 32, generator=generator, dtype=torch.float64)


def gradients_of(model: MiniCPMSALAForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.model.named_parameters()}
