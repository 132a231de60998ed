"""The memory that a plan predicts is the memory that a process then takes."""

import json
import subprocess
import sys
from mmap import mmap
from pathlib import Path

import pytest
import torch

from model.shapes import released_config, tiny_config
from sala.engine.memory import process_bytes
from sala.engine.plan import PRECISIONS, int4_bytes, parse_bytes, plan_memory, weight_bytes
from sala.errors import InputError
from sala.model.report import num_parameters, parameters_by_kind

GIB = 2**30

# forks a process for each case once torch is loaded, plans in it, and then does what was planned
MEASURE = """
import json, os, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from sala.bench import shapes
from sala.bench.memory import MemoryCurve
from sala.engine.generate import prefill
from sala.engine.memory import process_bytes
from sala.engine.plan import PRECISIONS, plan_memory
from sala.model import new_cache

torch.set_num_threads(1)
shapes.HYBRIDS = {"small": shapes.ModelShape(hidden_size=512, layers=6, heads=8, groups=1, vocab_size=8192)}
config = shapes.hybrid_config("small")
for precision, length in json.loads(sys.argv[1]):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    plan = plan_memory(config, precision, length, 2048, process=process_bytes(), available=1)
    model = AutoModelForCausalLM.from_config(config, dtype=PRECISIONS[precision].dtype).eval()
    memory = MemoryCurve()
    cache = new_cache(config, reserve=length)
    prefill(model, torch.randint(8192, (1, length)), cache, 2048, memory.sample)
    assert plan.cache == cache.size_bytes
    print(json.dumps([plan.total, memory.peak_bytes]), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process's peak")
def test_the_measured_peak_is_within_a_tenth_of_the_plan() -> None:
    cases = [(precision, length) for precision in ("fp32", "bf16") for length in (1024, 3072)]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(cases)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for case, line in zip(cases, result.stdout.splitlines(), strict=True):
        planned, measured = json.loads(line)
        assert planned == pytest.approx(measured, rel=0.1), (
            f"{case}: {planned / 2**20:.0f} of {measured / 2**20:.0f} MiB"
        )


def test_weights_of_the_released_model_are_counted_to_the_byte() -> None:
    config = released_config()
    parameters = num_parameters(config)
    assert weight_bytes(config, PRECISIONS["bf16"]) == 2 * parameters == 18_954_407_936
    outside = parameters_by_kind(config)["embeddings"]
    # norms are vectors: two of 4096 a layer and the last; a linear layer has three more
    vectors = (2 * 32 + 1) * 4096 + 24 * (2 * 128 + 4096)
    linear = parameters - outside - vectors
    assert weight_bytes(config, PRECISIONS["int4"]) == 2 * (outside + vectors) + linear * (4 + 32 / 128) / 8


def test_a_row_that_is_no_whole_number_of_groups_has_a_scale_for_the_rest() -> None:
    assert int4_bytes(1, 128) == 64 + 4
    assert int4_bytes(3, 130) == 3 * (65 + 8)
    assert int4_bytes(1, 5) == 3 + 4


def test_the_longest_length_is_the_last_that_fits() -> None:
    config = tiny_config()
    options = {"process": 300 * 2**20, "available": GIB}
    longest = plan_memory(config, "bf16", 100, 512, **options).longest
    assert plan_memory(config, "bf16", longest, 512, **options).fits
    assert not plan_memory(config, "bf16", longest + 1, 512, **options).fits
    assert plan_memory(config, "bf16", 100, 512, process=GIB, available=GIB).longest == 0


def test_int4_changes_the_weights_alone() -> None:
    config = released_config()
    bf16, int4 = (plan_memory(config, p, 2**20, 2048, process=0, available=0) for p in ("bf16", "int4"))
    assert (bf16.cache, bf16.working) == (int4.cache, int4.working)
    assert 3.2 < bf16.weights / int4.weights < 3.5
    # keys and values 8,192 B a token, compressed keys 320, states 48 MiB (the released model's numbers)
    assert bf16.cache == pytest.approx(2**20 * (8192 + 320) + 48 * 2**20, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "size"),
    [("32GiB", 32 * GIB), ("24 GB", 24 * 10**9), ("512mib", 2**29), ("1.5GiB", 3 * GIB // 2), ("1000", 1000)],
)
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "32G", "-1GiB", "0", "many", "1e999GiB", "nan", "1e300", "9" * 5000])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="32GiB"):
        parse_bytes(text)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'int4'"):
        plan_memory(tiny_config(), "int-4", 1, 1, process=0, available=0)
    with pytest.raises(InputError, match="at least one"):
        plan_memory(tiny_config(), "bf16", 1, 0, process=0, available=0)


def test_a_process_holds_what_it_has_loaded() -> None:
    before = process_bytes()
    # straight from the system: an allocator may have freed memory left, which it gives again without a new page
    block = mmap(-1, 64 * 2**20)
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    assert process_bytes() - before > 60 * 2**20
