"""Named shapes keep the released model's ratios."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.shapes import released_config
from sala.bench.shapes import HYBRIDS, SMALL_SHAPES, attention_shape, baseline_config, hybrid_config, sparse_layers
from sala.errors import InputError
from sala.model.report import num_parameters

MILLIONS = {"minicpm-sala-9b": 9477, "sala-1b": 1000, "sala-100m": 100, "sala-10m": 10}


def test_the_released_shape_is_the_released_configuration() -> None:
    ours, released = hybrid_config("minicpm-sala-9b"), released_config()
    names = ("hidden_size", "intermediate_size", "mixer_types", "num_key_value_heads", "head_dim", "lightning_nkv")
    for name in (*names, "vocab_size", "scale_emb", "scale_depth", "dim_model_base", "sparse_geometry"):
        assert getattr(ours, name) == getattr(released, name), name
    assert num_parameters(ours) == 9_477_203_968


def test_a_quarter_of_the_layers_is_sparse_the_first_and_the_last_among_them() -> None:
    assert sparse_layers(32) == (0, 9, 16, 17, 22, 29, 30, 31)
    for layers in (8, 12, 16, 20, 24, 28):
        found = sparse_layers(layers)
        assert len(set(found)) == layers // 4 and found[0] == 0 and found[-1] == layers - 1


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_is_as_large_as_its_name_and_its_baseline_as_large_as_it(name: str) -> None:
    hybrid = num_parameters(hybrid_config(name))
    assert hybrid / 1e6 == pytest.approx(MILLIONS[name], rel=0.15)
    with torch.device("meta"):
        baseline = AutoModelForCausalLM.from_config(baseline_config(name)).num_parameters()
    # Qwen3-8B is the paper's own baseline
    assert baseline == pytest.approx(hybrid, rel=0.15 if name == "minicpm-sala-9b" else 0.01)


def test_small_shapes_are_named_by_head_width_and_group() -> None:
    for name, shape in SMALL_SHAPES.items():
        assert name == f"small-{shape.width}x{shape.heads // shape.groups}"
        assert shape.geometry.first_sparse_position(2**20) < 2048


def test_a_shape_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'sala-100m'"):
        attention_shape("sala-100")
