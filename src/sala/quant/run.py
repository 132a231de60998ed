"""Quantising a checkpoint: layer by layer in order, each on what the quantized layers before it pass on."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from sala.data import load_tokenizer
from sala.errors import CheckpointError, InputError, writing
from sala.model import MiniCPMSALAForCausalLM
from sala.model.checkpoint import HEAD, find_checkpoint
from sala.model.families import load_config, load_model
from sala.model.linear import Linear
from sala.model.packing import PackedLinear, Packing, packed_modules, words_of
from sala.quant.solver import BLOCK, Solved, gptq, rtn

Method = Literal["gptq", "rtn"]
PROGRESS, REPORT = "progress.json", "quantization.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """How to quantize. group: columns that share a scale, -1 for a row; head: bits of the head, None leaves it alone."""

    bits: int = 4
    group: int = 128
    method: Method = "gptq"
    sym: bool = True
    act_order: bool = False
    damping: float = 0.01
    head: int | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"method {self.method!r} is unknown; expected gptq or rtn")
        if self.group != -1 and (self.group < 8 or BLOCK % self.group):
            raise InputError(f"group = {self.group}; expected 8, 16, 32, 64 or 128, or -1 for a row")
        if not 0 < self.damping <= 1:
            raise InputError(f"damping = {self.damping}; expected above 0, at most 1")
        if self.act_order and self.method == "rtn":
            raise InputError("act_order with method rtn: rounding has no order; expected gptq")
        for bits in (self.bits, self.head):
            if bits not in (4, 8, None):
                raise InputError(f"bits = {bits}; expected 4 or 8")

    def fields(self) -> dict[str, Any]:
        """Return the `quantization_config` of a checkpoint made so."""
        fields = {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group, "sym": self.sym,
            "desc_act": self.act_order, "damp_percent": self.damping, "static_groups": False, "true_sequential": False,
            "lm_head": self.head is not None, "checkpoint_format": "gptq", "pack_dtype": "int32",
        }  # fmt: skip
        if self.head not in (None, self.bits):
            fields["dynamic"] = {"+:^lm_head$": {"bits": self.head, "group_size": -1 if self.head == 8 else self.group}}
        return fields


@dataclass(frozen=True, slots=True)
class Result:
    """What a quantized checkpoint lost on text that it was not calibrated with.

    loss, loss_before: nats a token; kl: of the original's distribution from the new one, nats a token. errors: by linear map,
    the share of its outputs' squares that rounding changed on the calibration text.
    """

    loss_before: float
    loss: float
    kl: float
    tokens: int
    errors: dict[str, float]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_before": math.exp(self.loss_before), "perplexity": math.exp(self.loss)}


@torch.inference_mode()
def quantize(
    name: str | Path,
    out: str | Path,
    settings: Settings,
    calibration_BT: Tensor,
    unseen_BT: Tensor,
    on_layer: Callable[[int, int, float], None] = lambda layer, layers, error: None,
) -> Result:
    """Write the folder `out`: checkpoint `name` with the layers' linear maps in 4 or 8 bits, in GPTQ's format.

    Of the layers one is in memory as numbers at a time; what is not, is mapped from its file. A call that was interrupted
    goes on after the last layer it finished (`.OUT.partial` beside `out`).

    calibration_BT, unseen_BT: int64 token ids, what layers are fitted to, and what the result is measured on.
    on_layer: called after each layer with its number, how many there are, and its largest error.

    Raises:
        CheckpointError: the model cannot be read, is packed already, or computes no numbers on the text.
        InputError: `out` exists, or an unfinished `out` was begun with other settings.
        DiskError: a file cannot be written.
    """
    target = Path(os.path.expanduser(out))
    if target.exists():
        raise InputError(f"output {str(target)!r} exists already; expected a new folder")
    source = find_checkpoint(name)
    if load_config(source).packing is not None:
        raise CheckpointError(f"{name} is quantized already; expected weights in floating point")
    model = load_model(source, dtype="stored")
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    with writing(target):
        work = _Work(target, {**asdict(settings), "source": str(name), "text": _hash(calibration_BT, unseen_BT)})
        run = _Run(model, settings, work, calibration_BT, unseen_BT)
        errors = run.layers(on_layer)
        errors |= run.head()
        loss_before, loss, kl = run.compare()
        after = _finish(model, source, settings, work)
        result = Result(loss_before, loss, kl, unseen_BT[:, 1:].numel(), errors, before, after)
        (work.folder / REPORT).write_text(
            json.dumps({"settings": asdict(settings), **result.to_dict()}, indent=1) + "\n", encoding="utf-8"
        )
        work.folder.rename(target)
    return result


class _Work:
    """The folder of an unfinished result: a file a layer, and what it was begun with."""

    def __init__(self, target: Path, begun: dict[str, Any]):
        self.folder = target.parent / f".{target.name}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / PROGRESS
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != begun:
            raise InputError(
                f"{str(self.folder)!r} was begun with other settings or text; expected the same, or remove the folder"
            )
        path.write_text(json.dumps(begun), encoding="utf-8")

    def load(self, stem: str) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        path = self.folder / f"{stem}.json"
        if not path.is_file():
            return None
        return load_file(path.with_suffix(".safetensors")), json.loads(path.read_text(encoding="utf-8"))

    def save(self, stem: str, tensors: dict[str, Tensor], errors: dict[str, float]) -> None:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, self.folder / f"{stem}.safetensors", metadata={"format": "pt"})
        # last: who finds it finds the tensors whole
        (self.folder / f"{stem}.json").write_text(json.dumps(errors), encoding="utf-8")


class _Run:
    """The text on its way through the model: as the original passes it on, and as the quantized layers do."""

    def __init__(
        self, model: MiniCPMSALAForCausalLM, settings: Settings, work: _Work, calibration_BT: Tensor, unseen_BT: Tensor
    ):
        self.model, self.settings, self.work, self.unseen_BT = model, settings, work, unseen_BT
        self.packing = Packing.read(settings.fields())
        self.calibration, self.original = self._embedded(calibration_BT), self._embedded(unseen_BT)
        self.quantized = list(self.original)

    def layers(self, on_layer: Callable[[int, int, float], None]) -> dict[str, float]:
        errors: dict[str, float] = {}
        count = len(self.model.model.layers)
        for index in range(count):
            stem, prefix = f"layer-{index:05d}", f"model.layers.{index}."
            layer = copy.deepcopy(self.model.model.layers[index]).float()
            self.original = [self._through(layer, hidden) for hidden in self.original]
            found = self.work.load(stem)
            if found is None:
                hessians = self._hessians(layer)
                new = self._exchange(layer, prefix, hessians)
                kept = self.model.model.layers[index].state_dict(prefix=prefix)
                state = {name: kept.get(name, part) for name, part in layer.state_dict(prefix=prefix).items()}
                self.work.save(stem, state, new)
            else:
                state, new = found
                self._install(layer, prefix, state)
            self.calibration = [self._through(layer, hidden) for hidden in self.calibration]
            self.quantized = [self._through(layer, hidden) for hidden in self.quantized]
            errors |= new
            on_layer(index + 1, count, max(new.values()))
        return errors

    def head(self) -> dict[str, float]:
        """Quantize the head where that is asked for, and save what is not a layer's."""
        model = self.model
        rest = {name: part for name, part in model.state_dict().items() if ".layers." not in name}
        if model.config.tie_word_embeddings or self.settings.head:
            rest.pop(HEAD)
        errors: dict[str, float] = {}
        self.norm, self.projection = copy.deepcopy(model.model.norm).float(), model.lm_head
        if self.settings.head:
            outer = nn.Module()
            outer.lm_head = copy.deepcopy(model.lm_head).float()
            inputs = [self.norm(hidden).flatten(0, 1) / model.logits_divisor for hidden in self.calibration]
            hessian = torch.stack([x.T @ x for x in inputs]).sum(0)
            errors = self._exchange(outer, "", {"lm_head": hessian})
            rest |= outer.state_dict()
            self.projection = outer.lm_head
        self.work.save("rest", rest, errors)
        return errors

    def compare(self) -> tuple[float, float, float]:
        """Return the original's loss, the quantized model's, and how far the second's predictions are from the first's."""
        sums = torch.zeros(3, dtype=torch.float64)
        original, new = copy.deepcopy(self.model.lm_head).float(), self.projection.float()
        for ids_T, old_1TD, new_1TD in zip(self.unseen_BT, self.original, self.quantized, strict=True):
            before, after = (
                head(self.norm(hidden)[0, :-1] / self.model.logits_divisor).log_softmax(-1)
                for head, hidden in ((original, old_1TD), (new, new_1TD))
            )
            parts = cross_entropy(before, ids_T[1:]), cross_entropy(after, ids_T[1:])
            divergence = kl_div(after, before, reduction="batchmean", log_target=True)
            sums += torch.stack([*parts, divergence]).double()
        loss_before, loss, kl = (sums / len(self.unseen_BT)).tolist()
        return loss_before, loss, kl

    def _embedded(self, ids_BT: Tensor) -> list[Tensor]:
        return [self.model.model.embedded(row_T[None]).float() for row_T in ids_BT]

    def _through(self, layer: nn.Module, hidden_1TD: Tensor) -> Tensor:
        out: Tensor = layer(hidden_1TD, self.model.model.place(hidden_1TD))
        return out

    def _hessians(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the sum of x x^T over the calibration text for each linear map; maps of the same x share one."""
        seen: list[tuple[Tensor, Tensor]] = []
        leader: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
                (x,) = inputs
                shared = next((hessian for other, hessian in seen if other is x), None)
                if shared is None:
                    rows = x.flatten(0, -2)
                    shared = leader.setdefault(name, torch.zeros(x.shape[-1], x.shape[-1]))
                    shared += rows.T @ rows
                    seen.append((x, shared))
                leader[name] = shared

            return hook

        hooks = [part.register_forward_pre_hook(watch(name)) for name, part in _linear_maps(layer)]
        try:
            for hidden in self.calibration:
                self._through(layer, hidden)
                seen.clear()
        finally:
            for hook in hooks:
                hook.remove()
        return leader

    def _exchange(self, module: nn.Module, prefix: str, hessians: dict[str, Tensor]) -> dict[str, float]:
        """Put quantized maps in the place of a module's, and return their errors."""
        errors = {}
        for name, linear in list(_linear_maps(module)):
            kind = self.packing.of(prefix + name)
            assert kind is not None
            bits, group = kind[0], kind[1] if kind[1] > 0 else linear.in_features
            s, weight, hessian = self.settings, linear.weight, hessians[name]
            if s.method == "rtn":
                solved = rtn(weight, hessian, bits, group, s.sym)
            else:
                solved = gptq(weight, hessian, bits, group, s.sym, s.act_order, s.damping)
            if not math.isfinite(solved.error):
                raise CheckpointError(f"{prefix}{name} has weights or inputs that are not finite; expected numbers")
            module.set_submodule(name, _packed(linear, solved, bits, kind[1]))
            errors[prefix + name] = solved.error
        return errors

    def _install(self, layer: nn.Module, prefix: str, state: dict[str, Tensor]) -> None:
        for name, linear in list(_linear_maps(layer)):
            kind = self.packing.of(prefix + name)
            assert kind is not None
            layer.set_submodule(
                name, PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, *kind)
            )
        layer.load_state_dict({name.removeprefix(prefix): part for name, part in state.items()})
        for _, part in packed_modules(layer):
            part.pack()


def _linear_maps(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Linear))


def _packed(linear: Linear, solved: Solved, bits: int, group_size: int) -> PackedLinear:
    packed = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, bits, group_size)
    packed.qweight = words_of(solved.codes_NK, bits)
    packed.qzeros = words_of((solved.zeros_GN - packed.zero_shift) & (2**bits - 1), bits).T.contiguous()
    packed.scales, packed.g_idx = solved.scales_GN.contiguous(), solved.g_idx_K.int()
    packed.bias = linear.bias
    packed.pack()
    return packed


def _finish(model: MiniCPMSALAForCausalLM, source: Path, settings: Settings, work: _Work) -> int:
    """Make a checkpoint folder of the files of an unfinished result, and return the bytes of its tensors."""
    config = copy.deepcopy(model.config)
    config.packing = settings.fields()
    if settings.head:
        config.tie_word_embeddings = False
    config.save_pretrained(work.folder)
    (work.folder / "quantize_config.json").write_text(json.dumps(settings.fields(), indent=1) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(work.folder)
    load_tokenizer(source).save_pretrained(work.folder)
    stems = ["rest", *(f"layer-{index:05d}" for index in range(len(model.model.layers)))]
    weight_map, size = {}, 0
    for number, stem in enumerate(stems, start=1):
        path = work.folder / f"{stem}.safetensors"
        for name, part in load_file(path).items():
            weight_map[name] = f"model-{number:05d}-of-{len(stems):05d}.safetensors"
            size += part.numel() * part.element_size()
        # first: what has no record is made again
        (work.folder / f"{stem}.json").unlink()
        path.rename(work.folder / f"model-{number:05d}-of-{len(stems):05d}.safetensors")
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (work.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (work.folder / PROGRESS).unlink()
    return size


def _hash(*texts: Tensor) -> str:
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
    return digest.hexdigest()
