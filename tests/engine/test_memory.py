"""What a prompt needs against what the machine has."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.shapes import released_config, tiny_config, tiny_model, tokens
from sala.engine import available_bytes, check_memory, human_bytes
from sala.engine.generate import prefill
from sala.engine.memory import CUDA_FIXED_BYTES, PANEL_BYTES, PANEL_TOKENS, estimate, tokens_that_fit
from sala.errors import MemoryLimitError
from sala.model import MiniCPMSALAForCausalLM, new_cache
from sala.model.report import num_parameters
from sala.ops import dispatch, gpu

CPU = torch.device("cpu")
GIB = 2**30


def test_weights_and_cache_are_counted_exactly():
    model, cache = tiny_model(), new_cache(tiny_config())
    with torch.no_grad():
        model(tokens(1, 333), cache=cache)
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


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that exist: what is asked for inside, and given back."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.outside: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in self.storages(args, kwargs):
            if storage._cdata not in self.sizes:
                self.outside.add(storage._cdata)
        for storage in self.storages(result):
            key = storage._cdata
            if key not in self.sizes and key not in self.outside:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.give_back, key)
        return result

    def storages(self, *trees):
        return [
            x.untyped_storage()
            for x in tree_leaves(trees)
            if isinstance(x, torch.Tensor) and x.device.type == self.device
        ]

    def give_back(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


CUDA_CASES = {
    "the 9B at a million": ({}, 2**20, 2048),
    "its beginning": ({}, 4096, 2048),
    "long chunks": ({}, 2**18, 8192),
    "many groups": ({"num_key_value_heads": 16}, 2**19, 1024),
    "a narrow MLP": ({"intermediate_size": 512}, 2**17, 4096),
    "linear layers alone": ({"mixer_types": ["lightning-attn"] * 2, "intermediate_size": 512}, 2**17, 4096),
    "full attention": (
        {"mixer_types": ["attention"] * 2, "attn_use_rope": True, "num_key_value_heads": 8},
        2**13,
        2048,
    ),
}


@pytest.mark.parametrize("case", CUDA_CASES)
def test_work_on_a_gpu_is_what_the_code_asks_for(case: str, on_meta: list[str]) -> None:
    changes, length, chunk = CUDA_CASES[case]
    fields = {"num_hidden_layers": 2, "mixer_types": ["minicpm4", "lightning-attn"], "vocab_size": 4096, **changes}
    config = released_config()
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config).to(torch.bfloat16).eval()
    cache, ids = new_cache(config, length), torch.zeros(1, length, dtype=torch.long, device="meta")
    prefill(model, ids[:, :chunk], cache, chunk)
    cache.count(length - chunk)
    with LiveBytes() as live:
        prefill(model, ids[:, length - chunk :], cache, chunk)
    asked = live.peak + ids.nbytes
    planned = estimate(config, torch.bfloat16, length, chunk, 0, "cuda").working - CUDA_FIXED_BYTES
    # those of the cache take the place of others, which were not counted when they came and went
    states = config.mixer_types.count("lightning-attn") * 32 * 128 * 128 * 4
    assert asked - states <= planned <= 1.1 * asked


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a GPU without Triton, and let what would be chosen there be chosen on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_unavailable", lambda interpreted: "Triton is not installed")
    rows = {
        op: {name: dataclasses.replace(row, devices=()) if name == "cpu" else row for name, row in rows.items()}
        for op, rows in dispatch.BACKENDS.items()
    }
    monkeypatch.setattr(dispatch, "BACKENDS", rows)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("kind", ["minicpm4", "lightning-attn", "attention"])
def test_work_of_plain_torch_on_a_gpu_is_at_most_what_is_planned(kind: str) -> None:
    fields = {"hidden_size": 256, "head_dim": 64, "lightning_nh": 4, "lightning_head_dim": 64, "intermediate_size": 64}
    rotation = {"attn_use_rope": True} if kind == "attention" else {}
    model = tiny_model(**fields, **rotation, num_hidden_layers=1, mixer_types=[kind]).bfloat16()
    length, chunk = 1024, 512
    cache, ids = new_cache(model.config, length), tokens(1, length)
    prefill(model, ids[:, :chunk], cache, chunk)
    with LiveBytes("cpu") as live:
        prefill(model, ids[:, chunk:], cache, chunk)
    planned = estimate(model.config, torch.bfloat16, length, chunk, 0, "cuda").working - CUDA_FIXED_BYTES
    assert live.peak <= planned


def test_the_plan_knows_what_the_kernels_take_for_scores() -> None:
    select = pytest.importorskip("sala.ops.infllm.triton.select")
    assert (PANEL_BYTES, PANEL_TOKENS) == (select.PANEL_BYTES, select.SCORE_ROWS)


def test_what_would_not_fit_a_gpu_is_refused_with_the_plan_s_numbers() -> None:
    config, cuda = released_config(), torch.device("cuda")
    check_memory(config, torch.bfloat16, cuda, 2**20, 2048, 80 * GIB)
    message = "need 27.3 GiB of GPU memory: 17.7 GiB weights, 8.4 GiB cache, 1.3 GiB to work in; 24.0 GiB are available"
    with pytest.raises(MemoryLimitError, match=message):
        check_memory(config, torch.bfloat16, cuda, 2**20, 2048, 24 * GIB)


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
