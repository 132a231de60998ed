"""What weights of 4 and 8 bits cost beside bfloat16: prefill and decoding of a named hybrid with random weights, on a CPU."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sala.bench.ceilings import measure_bandwidth
from sala.bench.device import CLOCKS, HostTimer
from sala.bench.environment import environment
from sala.bench.shapes import hybrid_config
from sala.engine.generate import prefill
from sala.engine.graph import GraphDecoder
from sala.engine.sampling import Sampler, Sampling
from sala.errors import InputError, nearest
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, new_cache
from sala.model.mixers import config_fields
from sala.model.packing import pack_all, packed_modules
from sala.quant import Settings

# an INT8 head beside packed layers: of a small model the head is a quarter of the bytes
PRECISIONS: Mapping[str, Settings | None] = MappingProxyType(
    {
        "bfloat16": None,
        "int8": Settings(bits=8, group=-1, head=8),
        "int4": Settings(bits=4, group=128, head=8),
    }
)


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """What is measured: a prompt is read `repeats` times, then `new_tokens` are decoded, recorded and as they are."""

    shape: str = "sala-100m"
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    lengths: tuple[int, ...] = (512, 4096)
    new_tokens: int = 40
    repeats: int = 3
    clock: str = "cpu"

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise InputError(f"clock {self.clock!r} is unknown; expected one of {', '.join(CLOCKS)}")
        for name in self.precisions:
            if name not in PRECISIONS:
                known = ", ".join(PRECISIONS)
                raise InputError(f"precision {name!r} is unknown; expected one of {known}{nearest(name, PRECISIONS)}")


@torch.inference_mode()
def run_weights(
    plan: WeightsPlan, say: Callable[[str], None], keep: Callable[[Mapping[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """Measure and return medians by precision and length; `keep` gets what there is after each."""
    timer = HostTimer(plan.clock)
    read_bytes_s, _ = measure_bandwidth(timer)
    results: dict[str, Any] = {
        "kind": "weights",
        "environment": environment(),
        "settings": asdict(plan) | {"device": "cpu", "threads": torch.get_num_threads()},
        "read_bytes_s": read_bytes_s,
        "rows": [],
        "failures": [],
    }
    for precision in plan.precisions:
        say(f"random weights of {plan.shape}, {precision}")
        model = random_model(plan.shape, precision)
        size = read_bytes(model)
        for length in plan.lengths:
            say(f"{length:,} tokens")
            row = _measure(model, length, plan, timer)
            share = size * row["decode_tokens_per_s"] / read_bytes_s
            results["rows"].append(
                {
                    "precision": precision,
                    "length": length,
                    "weight_bytes": size,
                    **row,
                    "share_of_read_bandwidth": share,
                }
            )
            keep(results)
    return results


@torch.inference_mode()
def random_model(shape: str, precision: str) -> MiniCPMSALAForCausalLM:
    """Return a named hybrid in bfloat16, or packed, whose numbers are random and finite."""
    settings = PRECISIONS[precision]
    fields = config_fields(hybrid_config(shape)) | {"dtype": "bfloat16"}
    fields["packing"] = None if settings is None else settings.fields()
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**fields)).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    for _, part in packed_modules(model):
        part.qweight.random_(-(2**31), 2**31)
        part.qzeros.fill_(0x77777777 if part.bits == 4 else 0x7F7F7F7F)
        part.scales.fill_(0.02 / 2 ** (part.bits - 2))
        part.g_idx.copy_(torch.arange(part.in_features) // part.group)
    pack_all(model, shape)
    return model.eval()


def read_bytes(model: MiniCPMSALAForCausalLM) -> int:
    """Return the bytes of weights that a decoding step reads: all but the embedding, of which it takes a row."""
    packed = sum(part.packed.size_bytes for _, part in packed_modules(model) if part.packed is not None)
    tied = model.config.tie_word_embeddings
    others = [p for name, p in model.named_parameters() if tied or "embed_tokens" not in name]
    return packed + sum(p.numel() * p.element_size() for p in others)


def _measure(model: MiniCPMSALAForCausalLM, length: int, plan: WeightsPlan, timer: HostTimer) -> dict[str, float]:
    ids_1S = torch.randint(3, model.config.vocab_size, (1, length + plan.new_tokens + 2))
    reading, recorded, plain = [], [], []
    for _ in range(plan.repeats):
        cache = new_cache(model.config, reserve=ids_1S.shape[1])
        reading.append(timer.seconds(lambda: prefill(model, ids_1S[:, :length], cache, 2048)))  # noqa: B023
        steps = GraphDecoder(model, cache, ids_1S.clone(), length + 1, Sampler(Sampling(), model.device))
        # the first is recorded
        steps.next()
        recorded += [timer.seconds(steps.next) for _ in range(plan.new_tokens // 2)]
        steps.finish()

        def step(cache: Any = cache, id_11: Tensor = ids_1S[:, :1]) -> Tensor:
            logits: Tensor = model(id_11, cache=cache).logits
            return logits.argmax()

        plain += [timer.seconds(step) for _ in range(plan.new_tokens // 2)]
    return {
        "prefill_tokens_per_s": length / statistics.median(reading),
        "decode_tokens_per_s": 1 / statistics.median(recorded),
        "decode_unrecorded_tokens_per_s": 1 / statistics.median(plain),
    }
