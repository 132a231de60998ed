"""Quantized checkpoints: what they lose, that they run and are read anywhere, and that an interrupted run goes on."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sala import load_model
from sala.data import load_tokenizer
from sala.errors import CheckpointError, ConfigError, InputError
from sala.model.checkpoint import find_checkpoint
from sala.model.packing import codes_of, packed_modules
from sala.quant import Settings, quantize
from sala.quant.text import windows

HYBRID = "embedded-hybrid"


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor]:
    return windows(load_tokenizer(find_checkpoint(HYBRID)), None, 16, 256)


@pytest.fixture(scope="module")
def int4(text: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "model"
    quantize(HYBRID, folder, Settings(group=32), *text)
    return folder


def logits(model: torch.nn.Module, ids_BT: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids_BT).logits


def test_gptq_keeps_the_loss_within_three_percent_and_beats_rounding(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    layers = []
    results = {
        method: quantize(HYBRID, tmp_path / method, Settings(method=method), *text, lambda *row: layers.append(row[:2]))
        for method in ("gptq", "rtn")
    }
    best, rounded = results["gptq"], results["rtn"]
    assert best.loss < 1.03 * best.loss_before
    assert 2 * best.kl < rounded.kl
    assert layers == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2
    report = json.loads((tmp_path / "gptq" / "quantization.json").read_text())
    assert report["perplexity"] == math.exp(best.loss) and len(report["errors"]) == 32


def test_eight_bits_and_a_quantized_head_change_next_to_nothing(text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    result = quantize(HYBRID, tmp_path / "out", Settings(bits=8, group=-1, head=8), *text)
    assert abs(result.loss - result.loss_before) < 0.002 and result.kl < 0.002
    model = load_model(tmp_path / "out")
    assert "lm_head" in dict(packed_modules(model)) and model.config.tie_word_embeddings is False


def test_it_is_read_alike_by_sala_and_transformers_and_written_again(int4: Path, tmp_path: Path) -> None:
    model, ids = load_model(int4, dtype=torch.float32), torch.arange(5, 45)[None]
    expected = logits(model, ids)
    other = AutoModelForCausalLM.from_pretrained(int4, dtype=torch.float32)
    assert torch.equal(logits(other, ids), expected)
    assert all(part.qweight is None for _, part in packed_modules(other))
    other.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again"), ids), expected)
    # another dtype of the model leaves scales alone
    assert torch.equal(
        logits(other.bfloat16().float(), ids), logits(load_model(int4, dtype=torch.bfloat16).float(), ids)
    )


@pytest.mark.parametrize("act_order", [False, True])
def test_the_file_is_gptqs_to_the_bit(text: tuple[Tensor, Tensor], tmp_path: Path, act_order: bool) -> None:
    quantize(HYBRID, tmp_path / "out", Settings(group=32, sym=False, act_order=act_order), *text)
    model = load_model(tmp_path / "out", dtype=torch.float32)
    stored = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    for name, part in packed_modules(model):
        qweight, qzeros, scales, g_idx = (stored[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx"))
        # as AutoGPTQ's QuantLinear unpacks it: 8 numbers of 4 bits a word, the first lowest; zero points less one
        weight = torch.stack([(qweight >> 4 * i) & 15 for i in range(8)], 1).flatten(0, 1)
        zeros = torch.stack([(qzeros >> 4 * i) & 15 for i in range(8)], 2).flatten(1) + 1
        group = g_idx.long()
        expected = scales[group] * (weight - zeros[group]).half()
        assert torch.allclose(part.weight_NK(torch.float32).T, expected.float(), rtol=2e-3, atol=1e-6)
        assert (g_idx.sort().values == g_idx).all() == (not act_order) or part.in_features <= 32
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert fields == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (fields["quant_method"], fields["bits"], fields["group_size"], fields["desc_act"]) == (
        "gptq",
        4,
        32,
        act_order,
    )


def test_an_interrupted_run_goes_on_to_the_same_files(int4: Path, text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(layer: int, layers: int, error: float) -> None:
        if layer == 2:
            raise Stop

    with pytest.raises(Stop):
        quantize(HYBRID, tmp_path / "out", Settings(group=32), *text, stop)
    with pytest.raises(InputError, match="begun with other settings or text; expected the same"):
        quantize(HYBRID, tmp_path / "out", Settings(group=64), *text)
    assert not (tmp_path / "out").exists()
    quantize(HYBRID, tmp_path / "out", Settings(group=32), *text)
    files = {path.name: path.read_bytes() for path in int4.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def damaged(int4: Path, tmp_path: Path, **changes: Tensor) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir(parents=True)
    for path in int4.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        new = {
            name: changes[name.rpartition(".")[2]]
            for name in tensors
            if name.endswith(f"0.mlp.up_proj.{next(iter(changes))}")
        }
        if new:
            save_file(tensors | new, path)
    return folder


def test_a_damaged_file_is_one_error(int4: Path, tmp_path: Path) -> None:
    scales = torch.ones(4, 352, dtype=torch.float16)
    scales[2, 7] = float("nan")
    with pytest.raises(CheckpointError, match="mlp.up_proj in .*not finite; expected"):
        load_model(damaged(int4, tmp_path / "a", scales=scales))
    with pytest.raises(CheckpointError, match="g_idx does not name groups of 32 columns; expected"):
        load_model(damaged(int4, tmp_path / "b", g_idx=torch.arange(128, dtype=torch.int32) // 64))
    with pytest.raises(CheckpointError, match=r"has shape \(2, 352\); expected \(4, 352\)"):
        load_model(damaged(int4, tmp_path / "c", scales=torch.ones(2, 352, dtype=torch.float16)))
    folder = damaged(int4, tmp_path / "d", scales=torch.ones(4, 352, dtype=torch.float16))
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(folder)


def test_a_format_that_is_not_read_is_named(int4: Path, tmp_path: Path) -> None:
    folder = damaged(int4, tmp_path, scales=torch.ones(4, 352, dtype=torch.float16))
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("quant_method", "awq"), ("bits", 3), ("group_size", 20), ("checkpoint_format", "marlin")):
        fields = config | {"quantization_config": config["quantization_config"] | {field: value}}
        (folder / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ConfigError, match=f"{field} = {value!r}.*expected"):
            load_model(folder)


def test_zero_points_of_the_second_format_are_as_stored() -> None:
    words = torch.tensor([[0x87654321 - 2**32]], dtype=torch.int32)
    assert codes_of(words, 4, 8).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


def test_what_cannot_be_is_refused(int4: Path, text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    for wrong in (
        {"bits": 3},
        {"group": 48},
        {"method": "awq"},
        {"damping": 0.0},
        {"method": "rtn", "act_order": True},
    ):
        with pytest.raises(InputError, match="expected"):
            Settings(**wrong)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(int4, tmp_path / "out", Settings(), *text)
    with pytest.raises(InputError, match="exists already"):
        quantize(HYBRID, int4, Settings(), *text)
