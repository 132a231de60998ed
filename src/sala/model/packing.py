"""Layers whose weights have 4 or 8 bits a number, in the format of GPTQ: read, run as they are, written again.

The format is AutoGPTQ's and GPTQModel's (`checkpoint_format` "gptq", and "gptq_v2" whose zero points are stored as they are).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sala.errors import CheckpointError, ConfigError, InputError
from sala.model.linear import Linear
from sala.ops.quantized import (
    QuantizedWeight,
    dequantize,
    pack_codes,
    pack_words,
    quantized_linear,
    unpack_words,
    words_of,
)
from sala.ops.quantized.weight import check_group

# zero points of the first format are stored with one taken away
ZERO_SHIFTS = {"gptq": 1, "gptq_v2": 0}
# values of fields that would mean another layout
LAYOUT = {"quant_method": ("gptq",), "pack_dtype": ("int32", None), "is_marlin_format": (False, None)}
LAYOUT |= {"modules_in_block_to_quantize": (None,), "checkpoint_format": (*ZERO_SHIFTS, None)}


@dataclass(frozen=True, slots=True)
class Packing:
    """What a `quantization_config` says: bits and group size (-1: a row) of the layers' linear maps, and of the head."""

    bits: int
    group_size: int
    zero_shift: int = 1
    head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Packing":
        """Raises ConfigError where fields say something that is not read here."""
        if not isinstance(fields, Mapping):
            raise ConfigError(f"quantization_config is {fields!r}; expected an object")
        for name, values in LAYOUT.items():
            if fields.get(name, values[-1]) not in values:
                raise ConfigError(f"quantization_config: {name} = {fields.get(name)!r}; expected {values[0]!r}")
        packing = cls(
            fields.get("bits", 0),
            fields.get("group_size", -1),
            ZERO_SHIFTS[fields.get("checkpoint_format") or "gptq"],
            bool(fields.get("lm_head")),
            fields.get("dynamic") or {},
        )
        for row in (vars_of(packing), *packing.dynamic.values()):
            bits, group = row.get("bits", packing.bits), row.get("group_size", packing.group_size)
            try:
                check_group(bits, group, 2**62 if group > 0 else -2)
            except (InputError, TypeError) as error:
                raise ConfigError(f"quantization_config: bits = {bits!r}, group_size = {group!r}; {error}") from error
        return packing

    def of(self, name: str) -> tuple[int, int] | None:
        """Return (bits, group size) of the linear map `name`; None where it is not packed."""
        if not (name.startswith("model.layers.") or (self.head and name == "lm_head")):
            return None
        bits, group = self.bits, self.group_size
        for pattern, changes in self.dynamic.items():
            sign, colon, rest = pattern.partition(":")
            expression = rest if colon and sign in "+-" else pattern
            if re.match(expression, name):
                if colon and sign == "-":
                    return None
                bits, group = changes.get("bits", bits), changes.get("group_size", group)
        return bits, group


def vars_of(packing: Packing) -> dict[str, Any]:
    return {"bits": packing.bits, "group_size": packing.group_size}


class PackedLinear(nn.Module):
    """A linear map that holds its weight in 4 or 8 bits, and multiplies it so.

    What is loaded and saved are GPTQ's four tensors: qweight int32 (K bits / 32, N), qzeros int32 (G, N bits / 32), scales
    float16 (G, N), g_idx int32 (K,). Once they are loaded `pack` lays `qweight` out anew in its place.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: nn.Parameter | None

    def __init__(self, K: int, N: int, bias: bool, bits: int, group_size: int, zero_shift: int = 1):
        super().__init__()
        self.in_features, self.out_features = K, N
        self.bits, self.group, self.zero_shift = bits, group_size if group_size > 0 else K, zero_shift
        check_group(bits, self.group, K)
        groups, int32 = -(-K // self.group), torch.int32
        self.register_buffer("qweight", torch.zeros(-(-K * bits // 32), N, dtype=int32))
        self.register_buffer("qzeros", torch.zeros(groups, -(-N * bits // 32), dtype=int32))
        self.register_buffer("scales", torch.ones(groups, N, dtype=torch.float16))
        self.register_buffer("g_idx", torch.arange(K, dtype=int32) // self.group)
        self.register_parameter("bias", nn.Parameter(torch.zeros(N)) if bias else None)
        self.packed: QuantizedWeight | None = None

    @classmethod
    def of(cls, weight: QuantizedWeight, bias: nn.Parameter | None) -> "PackedLinear":
        """Return one that runs a weight of another format; it cannot be saved."""
        with torch.device("meta"):
            module = cls(weight.K, weight.N, False, weight.bits, weight.group)
        module.packed, module.bias = weight, bias
        module._buffers.clear()
        return module

    def forward(self, x: Tensor) -> Tensor:
        assert self.packed is not None, "pack() comes first"
        return quantized_linear(x, self.packed, None if self.bias is None else self.bias.to(x.dtype))

    def pack(self) -> None:
        """Take the loaded tensors into use.

        Raises:
            CheckpointError: they cannot be right: scales that are not finite, groups of other sizes.
        """
        if self.packed is not None or self.qweight.is_meta:
            return
        if not self.scales.isfinite().all():
            raise CheckpointError("scales has numbers that are not finite; expected the scales of a quantized weight")
        order = self._order()
        zeros_GN = self.zero_points()
        offsets_GN = None
        if (zeros_GN != 2 ** (self.bits - 1)).any():
            offsets_GN = (2 ** (self.bits - 1) - zeros_GN) * self.scales.float()
        K, N = self.in_features, self.out_features
        if order is None:
            self.packed = pack_words(self.qweight, N, K, self.scales, offsets_GN, self.bits, self.group)
        else:
            codes_NK = codes_of(self.qweight, self.bits, K)[:, order]
            self.packed = pack_codes(codes_NK, self.scales, offsets_GN, self.bits, self.group, order)
        self._buffers["qweight"] = None

    def zero_points(self) -> Tensor:
        """Return the code that stands for zero, int32 (G, N)."""
        codes = codes_of(self.qzeros.T, self.bits, self.out_features) + self.zero_shift
        return codes & (2**self.bits - 1) if self.zero_shift else codes

    def weight_NK(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the codes stand for."""
        assert self.packed is not None
        return dequantize(self.packed, dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}"

    def _order(self) -> Tensor | None:
        in_turn = torch.arange(self.in_features, dtype=torch.int32, device=self.g_idx.device) // self.group
        if torch.equal(self.g_idx, in_turn):
            return None
        order = torch.argsort(self.g_idx, stable=True)
        if not torch.equal(self.g_idx[order], in_turn):
            raise CheckpointError(f"g_idx does not name groups of {self.group} columns; expected that group_size")
        return order

    def _qweight(self) -> Tensor:
        assert self.packed is not None
        if self.packed.order is None:
            return unpack_words(self.packed)
        codes_NK = codes_of(unpack_words(self.packed), self.bits, self.in_features)
        return words_of(torch.empty_like(codes_NK).index_copy_(1, self.packed.order.long(), codes_NK), self.bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # a model's dtype is not that of scales, whose bits must stay
        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else fn(part.view(torch.int16)).view(part.dtype)

        parameters = dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)
        self._buffers.update({name: moved(part) for name, part in parameters.items()})
        if self.packed is not None:
            p = self.packed
            parts = {name: moved(getattr(p, name)) for name in ("words", "scales", "offsets", "order")}
            self.packed = QuantizedWeight(**parts, bits=p.bits, group=p.group, N=p.N, K=p.K)  # type: ignore[arg-type]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if "scales" not in self._buffers:
            raise InputError(
                "weights of a GGUF file are in use as they are; expected ones in GPTQ's format, or dequantised"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}qweight"] = self._qweight()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if self.packed is not None:
            self._buffers["qweight"], self.packed = self._qweight(), None
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def codes_of(qweight_WN: Tensor, bits: int, K: int) -> Tensor:
    """Return the codes (N, K), int32, that stand in words (K bits / 32, N)."""
    shifts = bits * torch.arange(32 // bits, dtype=torch.int32, device=qweight_WN.device)
    return ((qweight_WN[:, None] >> shifts[:, None]) & (2**bits - 1)).flatten(0, 1)[:K].T


def install(module: nn.Module, packing: Mapping[str, Any] | None, prefix: str = "") -> None:
    """Exchange the linear maps of a network by packed ones, where its configuration says so; `prefix` goes before names."""
    if packing is None:
        return
    fields = Packing.read(packing)
    for name, linear in list(module.named_modules()):
        if isinstance(linear, Linear) and (kind := fields.of(prefix + name)):
            packed = PackedLinear(
                linear.in_features, linear.out_features, linear.bias is not None, *kind, fields.zero_shift
            )
            module.set_submodule(name, packed)


def exchange(module: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Put packed weights, by their parameters' names, in the place of a network's linear maps."""
    for name, weight in weights.items():
        place = name.removesuffix(".weight")
        module.set_submodule(place, PackedLinear.of(weight, module.get_submodule(place).bias))  # type: ignore[arg-type]


def packed_modules(module: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Yield the packed linear maps of a network, by name."""
    for name, part in module.named_modules():
        if isinstance(part, PackedLinear):
            yield name, part


def pack_all(module: nn.Module, where: object) -> None:
    """Take what was loaded into every packed linear map into use.

    Raises:
        CheckpointError: a tensor cannot be right; the message names it and `where` it is from.
    """
    for name, part in packed_modules(module):
        try:
            part.pack()
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {where}: {error}") from error
