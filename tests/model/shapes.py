"""Tiny configurations the model's tests share."""

import torch

from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM

RELEASED_SPARSE = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}
TINY_SPARSE = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "init_blocks": 1,
    "block_size": 16,
    "window_size": 32,
    "topk": 2,
    "dense_len": 64,
}
RELEASED_SPARSE_LAYERS = (0, 9, 16, 17, 22, 29, 30, 31)


def released_config() -> MiniCPMSALAConfig:
    """The released `config.json`, field by field."""
    kinds = ["minicpm4" if i in RELEASED_SPARSE_LAYERS else "lightning-attn" for i in range(32)]
    return MiniCPMSALAConfig(
        architectures=["MiniCPMSALAForCausalLM"],
        auto_map={"AutoConfig": "configuration_minicpm_sala.MiniCPMSALAConfig"},
        vocab_size=73448,
        hidden_size=4096,
        intermediate_size=16384,
        hidden_act="silu",
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=False,
        attention_dropout=0.0,
        attn_use_rope=False,
        attn_use_output_gate=True,
        lightning_nh=32,
        lightning_nkv=32,
        lightning_head_dim=128,
        lightning_scale="1/sqrt(d)",
        lightning_use_rope=True,
        qk_norm=True,
        use_output_gate=True,
        use_output_norm=True,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=524288,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=256,
        mup_denominator=32,
        tie_word_embeddings=False,
        initializer_range=0.1,
        pretraining_tp=1,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=[2, 73440],
        pad_token_id=2,
        torch_dtype="bfloat16",
        shift_labels=True,
        sparse_config=RELEASED_SPARSE,
        mixer_types=kinds,
    )


def tiny_config(**changes) -> MiniCPMSALAConfig:
    """Four layers of every kind, two key/value heads, small enough to run in milliseconds."""
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "lightning_nkv": 4,
        "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn", "attention"],
        "sparse_config": TINY_SPARSE,
        "scale_emb": 3,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return MiniCPMSALAConfig(**{**fields, **changes})


def tiny_model(**changes) -> MiniCPMSALAForCausalLM:
    torch.manual_seed(0)
    return MiniCPMSALAForCausalLM(tiny_config(**changes)).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (batch, length), generator=generator)
