"""What a prompt needs against what the machine has."""

import dataclasses

import pytest
import torch

from model.shapes import tiny_config, tiny_model, tokens
from sala.engine import available_bytes, check_memory, human_bytes
from sala.engine.memory import estimate, tokens_that_fit
from sala.errors import MemoryLimitError
from sala.model import new_cache
from sala.model.report import num_parameters

CPU = torch.device("cpu")
GIB = 2**30


def test_weights_and_cache_are_counted_exactly():
    model, cache = tiny_model(), new_cache(tiny_config())
    with torch.no_grad():
        model(tokens(1, 333), past_key_values=cache)
    need = estimate(model.config, torch.float32, 333, 64, num_parameters(model.config))
    assert need.weights == sum(parameter.numel() * 4 for parameter in model.parameters())
    assert need.cache == cache.size_bytes
    assert need.total == sum(dataclasses.astuple(need))


def test_the_number_that_fits_is_the_last_one_that_does():
    config, dtype, available = tiny_config(), torch.float32, 3 * GIB
    fits = tokens_that_fit(config, dtype, 512, num_parameters(config), available)
    check_memory(config, dtype, CPU, fits, 512, available)
    with pytest.raises(MemoryLimitError, match=f"3.0 GiB are available, {fits:,} tokens fit"):
        check_memory(config, dtype, CPU, fits + 1, 512, available)


def test_weights_alone_may_be_too_much():
    with pytest.raises(MemoryLimitError, match="not even the weights fit"):
        check_memory(tiny_config(), torch.float32, CPU, 10, 512, available=1024)


def machine(root, available_kib, limits=None, version=2):
    """A root folder as Linux has it: what is available, and per control group (limit, used, reclaimable)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable:  {available_kib} kB\n")
    line = "0::/outer/inner\n" if version == 2 else "4:cpu:/x\n5:cpuset,memory:/outer/inner\n"
    (root / "proc/self/cgroup").write_text(line)
    base = root / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for group, (limit, used, reclaimable) in (limits or {}).items():
        (base / group).mkdir(parents=True, exist_ok=True)
        (base / group / names[0]).write_text(f"{limit}\n")
        (base / group / names[1]).write_text(f"{used}\n")
        (base / group / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8 * GIB),
        ({"": ("max", 0, 0), "outer/inner": (2 * GIB, GIB, 0)}, GIB),
        ({"outer": (2 * GIB, GIB, GIB // 2)}, 3 * GIB // 2),
        ({"outer": (100 * GIB, 0, 0)}, 8 * GIB),
        ({"outer": (GIB, 2 * GIB, 0)}, 0),
    ],
)
def test_the_tightest_limit_counts(version, limits, expected, tmp_path):
    assert available_bytes(CPU, machine(tmp_path, 8 * 2**20, limits, version)) == expected


def test_a_machine_without_proc_has_its_whole_memory(tmp_path):
    assert available_bytes(CPU, tmp_path) > 2**20


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 bytes"), (2048, "2 KiB"), (5 * 2**20, "5 MiB"), (9.5 * GIB, "9.5 GiB")]
)
def test_sizes_read_well(size, text):
    assert human_bytes(size) == text
