"""The measurement of weights of 4 and 8 bits: what it counts, on a tiny shape."""

import pytest

from sala.bench import WeightsPlan, run_weights
from sala.bench.weights import random_model, read_bytes
from sala.errors import InputError


def test_every_precision_and_length_is_a_row() -> None:
    kept: list[int] = []
    plan = WeightsPlan("sala-10m", ("bfloat16", "int4"), (32, 64), new_tokens=4, repeats=1)
    results = run_weights(plan, lambda line: None, lambda so_far: kept.append(len(so_far["rows"])))
    assert [(row["precision"], row["length"]) for row in results["rows"]] == [
        (precision, length) for precision in ("bfloat16", "int4") for length in (32, 64)
    ]
    assert kept == [1, 2, 3, 4]
    for row in results["rows"]:
        assert all(row[f"{name}_tokens_per_s"] > 0 for name in ("prefill", "decode", "decode_unrecorded"))


def test_a_step_reads_the_layers_and_the_head_and_not_the_embedding() -> None:
    model = random_model("sala-10m", "bfloat16")
    every = sum(p.numel() for p in model.parameters())
    assert read_bytes(model) == 2 * (every - model.model.embed_tokens.weight.numel())
    assert read_bytes(random_model("sala-10m", "int4")) < 0.4 * read_bytes(model)


def test_what_is_not_measured_is_refused() -> None:
    with pytest.raises(InputError, match="precision 'int3' is unknown; expected one of bfloat16, int8, int4"):
        WeightsPlan(precisions=("int3",))
    with pytest.raises(InputError, match="clock 'sun' is unknown"):
        WeightsPlan(clock="sun")
