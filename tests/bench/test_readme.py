"""README's figures are those of the measurements that it names."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def row(start: str) -> list[str]:
    """Return the cells of the one row of a table that begins so, after the first two."""
    [line] = [line for line in README.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(start.split(" | ")) :]


def ratio(file: str, op: str, phase: str, length: int, other: str) -> float:
    """Return how many times the time of our kernel another one took."""
    [cases] = [cases for cases in results(file).values() if isinstance(cases, list)]
    [found] = [case for case in cases if (case["op"], case["phase"], case["length"]) == (op, phase, length)]
    return found["competitors"][other]["median_s"] / found["competitors"]["cpu"]["median_s"]


LINES = [
    ("Lightning prefill | its plain-torch form", "lightning", "prefill", "eager"),
    ("Lightning prefill | SDPA: linear against quadratic work", "lightning", "prefill", "sdpa"),
    ("block-sparse prefill | SDPA", "infllm", "prefill", "sdpa"),
    ("block-sparse step | SDPA", "infllm", "step", "sdpa"),
    ("dense prefill | SDPA", "dense", "prefill", "sdpa"),
]
FILES = {
    ("lightning", "prefill", 16): "ops-lightning-16k.json",
    ("lightning", "prefill", 64): "ops-lightning.json",
    ("infllm", "prefill", 16): "ops-prefill.json",
    ("infllm", "prefill", 64): "ops-prefill.json",
    ("infllm", "prefill", 128): "ops-prefill-128k.json",
    ("dense", "prefill", 16): "ops-dense.json",
    ("dense", "prefill", 64): "ops-prefill-busy.json",
    ("infllm", "step", 64): "ops-step.json",
    ("infllm", "step", 128): "ops-step.json",
    ("infllm", "step", 1024): "ops-step.json",
}
SMALL = [f"ops-small-{width}x{group}.json" for width in (32, 64) for group in (2, 4, 8)]


@pytest.mark.parametrize(("start", "op", "phase", "other"), LINES, ids=[line[0] for line in LINES])
def test_the_table_of_operators_has_the_ratios_that_were_measured(start: str, op: str, phase: str, other: str) -> None:
    small, *cells = row(start)
    ratios = [ratio(file, op, phase, 4096, other) for file in SMALL]
    least, most = (float(number) for number in small.split(" to "))
    assert (least, most) == (pytest.approx(min(ratios), rel=0.03), pytest.approx(max(ratios), rel=0.03))
    for length, cell in zip((16, 64, 128, 1024), cells, strict=True):
        assert bool(cell) == ((op, phase, length) in FILES), f"{start} at {length}K"
        if cell:
            measured = ratio(FILES[op, phase, length], op, phase, 1024 * length, other)
            assert float(cell) == pytest.approx(measured, rel=0.03), f"{start} at {length}K"


def test_weights_working_memory_and_cache_are_three_numbers_that_do_not_contain_one_another() -> None:
    *_, at_64k, at_128k, at_256k, at_a_million = row("memory: weights / working memory / cache, MiB")
    points = results("latency-100m-long.json")["points"][1:] + results("latency-100m-million.json")["points"][-1:]
    for cell, point in zip((at_64k, at_128k, at_256k, at_a_million), points, strict=True):
        work = point["added_bytes"] - point["cache_bytes"]
        parts = [f"{bytes_ / 2**20:,.0f}" for bytes_ in (point["weights_bytes"], work, point["cache_bytes"])]
        assert cell == " / ".join(parts)


def test_speed_of_a_model_is_what_was_measured() -> None:
    decoding = row("decoding, 2 threads, tokens/s")
    first_token = row("first token, 2 threads, hybrid")
    points = results("latency-100m-long.json")["points"][1:] + results("latency-100m-million.json")["points"][-1:]
    assert decoding[1:] == [f"{point['decode_tokens_s']:.1f}" for point in points]
    assert first_token[1:] == [f"{point['first_token_s']:,.0f} s" for point in points]


@pytest.mark.parametrize(
    ("start", "run"),
    [
        ("teacher, after the hybrid's long stage, in text / noise", "long-0"),
        ("the same with rotations stretched by YaRN, in text / noise", "long-yarn-0"),
    ],
)
def test_the_controls_are_those_that_were_measured(start: str, run: str) -> None:
    points = results("controls.json")["runs"][run]["retrieval"]
    for length, cell in zip((512, 1024, 4096, 16384), row(start), strict=True):
        pair = [p["accuracy"] for h in ("text", "noise") for p in points if (p["haystack"], p["length"]) == (h, length)]
        assert cell == " / ".join(f"{accuracy:.3f}" for accuracy in pair)
