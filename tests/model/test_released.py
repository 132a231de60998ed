"""The released checkpoint's names and shapes (spec: 395 tensors, 9,477,203,968 parameters)."""

import torch

from model.shapes import RELEASED_SPARSE_LAYERS, released_config
from sala.model import MiniCPMSALAForCausalLM


def expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "model.embed_tokens.weight": (73448, 4096),
        "model.norm.weight": (4096,),
        "lm_head.weight": (73448, 4096),
    }
    for i in range(32):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (4096,), layer + "post_attention_layernorm.weight": (4096,)}
        shapes |= {layer + f"mlp.{name}_proj.weight": (16384, 4096) for name in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (4096, 16384)
        sparse = i in RELEASED_SPARSE_LAYERS
        mixer = layer + "self_attn."
        shapes |= {mixer + f"{name}_proj.weight": (256 if sparse else 4096, 4096) for name in ("k", "v")}
        shapes |= {mixer + f"{name}_proj.weight": (4096, 4096) for name in ("q", "o")}
        if sparse:
            shapes[mixer + "o_gate.weight"] = (4096, 4096)
        else:
            shapes[mixer + "z_proj.weight"] = (4096, 4096)
            shapes |= {mixer + f"{name}_norm.weight": (128,) for name in ("q", "k")}
            shapes[mixer + "o_norm.weight"] = (4096,)
    return shapes


def test_every_tensor_has_the_released_name_and_shape():
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(released_config())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == expected_shapes()
    assert len(shapes) == 395
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_477_203_968
