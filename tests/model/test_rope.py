"""How far a model's positions reach."""

import pytest

from model.shapes import tiny_config
from sala.model.rope import trained_length

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 100}


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"attn_use_rope": True}, 300),
        ({"attn_use_rope": True, "rope_scaling": LINEAR}, 1200),
        ({"attn_use_rope": True, "rope_scaling": YARN}, 400),
        ({"attn_use_rope": True, "rope_scaling": YARN | {"factor": 2.0}}, 300),
        # such a configuration names the length after the stretch
        ({"attn_use_rope": True, "rope_scaling": LLAMA3}, 300),
        ({"attn_use_rope": False}, None),
        ({"attn_use_rope": True, "mixer_types": ["lightning-attn"] * 4}, None),
    ],
)
def test_softmax_layers_know_the_positions_that_they_rotate(changes, length):
    assert trained_length(tiny_config(max_position_embeddings=300, **changes)) == length
