"""Compile every kernel that the operators would launch, for GPUs that need not be there, and print what each one takes.

    python scripts/compile_kernels.py [sm_80 sm_89 ...] [lightning infllm pointwise] [--shared] [--only="float32 256, back"]

Without names all cards and all operators. The operators run as they are on tensors of the CPU, but a launch compiles
instead. Of each kernel and tuning: registers a thread, bytes spilled a thread inside and outside loops together and the
instructions that move them, shared memory a program, tensor core instructions (HGMMA: Hopper's; HMMA: those before it), and
waits for Hopper's: as many as those mean that each waits for the one before. Then the most that each kernel takes. Ends with
an error where a launch, or every tuning of it, takes more shared memory or tensor memory than the card has.

--only: the calls whose label begins so.
--shared: shared memory alone, which is known before registers are: a few times as fast.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of one program, by compute capability
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CARDS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# columns of a program, where there is such memory
TENSOR_COLUMNS = 512


class Card:
    """What Triton asks its driver for while it compiles."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lightning() -> Iterator[tuple[str, Callable[[], object]]]:
    from sala.ops.lightning import triton as backend

    heads = 32

    def call(
        dtype: torch.dtype, T: int, K: int, V: int, masked: bool = False, packed: bool = False, gradients: bool = False
    ) -> None:
        q, k = (torch.zeros(1, T, heads, K, dtype=dtype, requires_grad=gradients) for _ in range(2))
        v = torch.zeros(1, T, heads, V, dtype=dtype, requires_grad=gradients)
        initial = torch.zeros(2 if packed else 1, heads, K, V)
        out, final = backend.attend(
            *(q, k, v, torch.zeros(heads)),
            scale=0.1,
            initial_state_BHKV=initial,
            mask_BT=torch.ones(1, T, dtype=torch.bool) if masked else None,
            cu_seqlens=torch.tensor([0, 1, T]) if packed else None,
        )
        if gradients:
            torch.autograd.backward((out, final), (out.detach(), final.detach()))

    for dtype, width in product(DTYPES, (64, 128, 256)):
        label = f"{named(dtype)} {width}"
        yield f"{label}, back", partial(call, dtype, 2048, width, width, gradients=True)
        yield f"{label}, one segment", partial(call, dtype, 512, width, width)
        yield f"{label}, masked, packed", partial(call, dtype, 2048, width, width, True, True)
        yield f"{label}, masked step", partial(call, dtype, 1, width, width, True)
    for K, V in ((256, 64), (64, 256)):
        yield f"bfloat16 {K} by {V}, back", partial(call, torch.bfloat16, 2048, K, V, gradients=True)


def infllm() -> Iterator[tuple[str, Callable[[], object]]]:
    from sala.ops.infllm import SparseGeometry, num_windows
    from sala.ops.infllm import triton as backend

    def call(dtype: torch.dtype, K: int, V: int, group: int, block: int = 64, T: int = 512, past: int = 8192) -> None:
        geometry, S, gradients = SparseGeometry(block_size=block), past + T, T > 1
        q = torch.zeros(1, T, 2 * group, K, dtype=dtype, requires_grad=gradients)
        k, v = (torch.zeros(1, S, 2, width, dtype=dtype, requires_grad=gradients) for width in (K, V))
        tiers = (geometry.kernel_size, geometry.kernel_stride), (geometry.coarse_size, geometry.coarse_stride)
        k1, k2 = (torch.zeros(1, num_windows(S, *tier), 2, K, dtype=dtype) for tier in tiers)
        backend.compress(k.detach(), *tiers[0])
        backend.select(q.detach(), k1, k2, torch.arange(S - T, S)[None], geometry, 0.1)
        out = backend.attend(q, k, v, k1, k2, None, geometry, 0.1, S - T)
        if gradients:
            out.backward(out.detach())

    # those of models, then the widest, and the largest groups and blocks, of each dtype
    for dtype, K, V, group, block in (
        (torch.bfloat16, 128, 128, 16, 64),
        (torch.bfloat16, 64, 64, 16, 64),
        (torch.bfloat16, 128, 128, 1, 64),
        (torch.bfloat16, 128, 128, 5, 64),
        (torch.bfloat16, 192, 128, 16, 64),
        (torch.float16, 128, 128, 64, 128),
        (torch.bfloat16, 256, 256, 32, 64),
        (torch.float32, 64, 64, 32, 128),
        (torch.float32, 128, 128, 32, 64),
        (torch.float32, 256, 256, 16, 128),
    ):
        width = f"{K}" if K == V else f"{K}/{V}"
        label = f"{named(dtype)} {width}, {group} heads, {block}, back"
        yield label, partial(call, dtype, K, V, group, block)
    yield "bfloat16 128, 16 heads, step", partial(call, torch.bfloat16, 128, 128, 16, T=1)
    yield "bfloat16 128, 16 heads, step 1M", partial(call, torch.bfloat16, 128, 128, 16, T=1, past=2**20 - 1)
    yield "float32 256, 16 heads, step", partial(call, torch.float32, 256, 256, 16, T=1)


def pointwise() -> Iterator[tuple[str, Callable[[], object]]]:
    from sala.ops.pointwise import triton as backend

    def call(dtype: torch.dtype, heads: int, width: int, hidden: int) -> None:
        x, branch = torch.zeros(2, 1, 2, hidden, dtype=dtype)
        table = torch.zeros(1, 2, width // 2)
        backend.rms_norm(x, x[0, 0], 1e-6)
        backend.add_rms_norm(x, branch, 0.2, x[0, 0], 1e-6)
        backend.add_scaled(x, branch, 0.2)
        backend.silu_mul(x, branch)
        q = torch.zeros(1, 2, heads, width, dtype=dtype)
        backend.norm_rotate(q, q[0, 0, 0], 1e-6, table, table, None)
        backend.norm_gate(q, q[0, 0].flatten(), 1e-6, q.flatten(2))
        backend.norm_gate(q, None, 0.0, q.flatten(2))

    for dtype, heads, width, hidden in (
        (torch.bfloat16, 32, 128, 4096),
        (torch.bfloat16, 24, 96, 2304),
        (torch.bfloat16, 128, 128, 16384),
        (torch.float32, 32, 128, 4096),
        (torch.float32, 256, 128, 32768),
    ):
        yield f"{named(dtype)} {heads} x {width}, {hidden}", partial(call, dtype, heads, width, hidden)


def quantized() -> Iterator[tuple[str, Callable[[], object]]]:
    from sala.ops.quantized import pack_codes
    from sala.ops.quantized import triton as backend

    def call(dtype: torch.dtype, bits: int, group: int, rows: int) -> None:
        N, K = 64, 256
        codes, scales = torch.zeros(N, K, dtype=torch.uint8), torch.ones(-(-K // group), N)
        for offsets, order in ((None, None), (scales, torch.arange(K))):
            weight = pack_codes(codes, scales, offsets, bits, group, order)
            backend.quantized_linear(torch.zeros(rows, K, dtype=dtype), weight, torch.zeros(N, dtype=dtype))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for bits, group in ((4, 128), (4, 32), (8, 256)):
            yield f"{named(dtype)} {bits} bits in {group}", partial(call, dtype, bits, group, 16)


CALLS = {"lightning": lightning, "infllm": infllm, "pointwise": pointwise, "quantized": quantized}


def main(*arguments: str) -> None:
    cards = [name for name in arguments if name.startswith("sm_")] or CARDS
    ops = [name for name in arguments if name in CALLS] or list(CALLS)
    rest = [name for name in arguments if name not in cards]
    only = "".join(name.removeprefix("--only=") for name in rest if name.startswith("--only="))
    for name in arguments:
        if name.removeprefix("sm_") not in map(str, SHARED_BYTES) and name not in (
            *CALLS,
            "--shared",
            f"--only={only}",
        ):
            sys.exit(f"{name!r}: expected cards ({', '.join(CARDS)}), {', '.join(CALLS)}, --shared, --only=LABEL")
    if len(cards) == 1:
        sys.exit("\n".join(compile_for(cards[0], ops, "--shared" in arguments, only)) or None)
    # Triton keeps what it compiled for one card
    failed = [card for card in cards if subprocess.run([sys.executable, __file__, card, *rest], check=False).returncode]
    sys.exit(f"does not fit: {', '.join(failed)}" if failed else None)


def compile_for(card: str, ops: list[str], shared_only: bool, only: str) -> list[str]:
    """Compile, print, and return what does not fit."""
    capability = int(card.removeprefix("sm_"))
    most = SHARED_BYTES[capability]
    triton.runtime.driver.set_active(Card(capability))
    if shared_only:
        knobs.runtime.add_stages_inspection_hook = without_registers
    compiled: dict[str, Any] = {}
    misfits: list[str] = []
    of_tunings = False

    def fits(kernel: Any) -> bool:
        return kernel.metadata.shared <= most and kernel.metadata.tmem_size <= TENSOR_COLUMNS

    def compile_only(self: JITFunction, *arguments: Any, grid: object, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.hash, kernel)
        if not of_tunings and not fits(kernel):
            misfits.append(
                f"{card}, {label}: {kernel.name} takes {kernel.metadata.shared} bytes of shared memory of {most}"
            )
        return kernel

    def compile_tunings(self: Autotuner, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        nonlocal of_tunings
        of_tunings = True
        kernels = self.warmup(*arguments, grid=grid, **options)
        of_tunings = False
        if not any(map(fits, kernels)):
            least = min(kernel.metadata.shared for kernel in kernels)
            misfits.append(
                f"{card}, {label}: {kernels[0].name} takes {least} bytes of shared memory and more, of {most}"
            )

    run = JITFunction.run
    JITFunction.run, Autotuner.run = compile_only, compile_tunings  # type: ignore[method-assign]
    worst: dict[str, list[int]] = {}
    print(f"{card}, {most} bytes of shared memory", flush=True)
    for op in ops:
        for label, call in CALLS[op]():
            if not label.startswith(only):
                continue
            known = set(compiled)
            call()
            for kernel in [compiled[key] for key in compiled if key not in known]:
                numbers = report(label, kernel, shared_only)
                if fits(kernel):
                    worst[kernel.name] = [*map(max, numbers, worst.get(kernel.name, numbers))]
    for name, (shared, registers, spilled) in worst.items():
        print(f"{card} at most  {name:18} shared {shared:6}  registers {registers:3}  spilled {spilled:4}", flush=True)
    return misfits


def without_registers(*arguments: Any) -> tuple[str, str] | None:
    """Leave out what comes after shared memory is known; without arguments, the name of that in Triton's cache."""
    if not arguments:
        return "shared", "shared"
    stages = arguments[1]

    def name_only(source: Any, metadata: dict[str, Any]) -> str:
        metadata["name"] = source.rpartition("define ptx_kernel void @")[2].partition("(")[0].strip('"')
        return ""

    stages["ptx"], stages["cubin"] = name_only, lambda source, metadata: b""
    return None


def report(label: str, kernel: Any, shared_only: bool) -> list[int]:
    """Print what a kernel takes; return its shared memory, registers and bytes spilled."""
    options = kernel.metadata
    line = (
        f"{label:32} {kernel.name:18} warps {options.num_warps} stages {options.num_stages}  shared {options.shared:6}"
    )
    if shared_only:
        print(line, flush=True)
        return [options.shared, 0, 0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    names = ("HGMMA", "WARPGROUP.DEPBAR", "HMMA", "(?:LDL|STL)")
    hopper, waits, older, moves = (len(re.findall(rf"\b{name}\b", sass)) for name in names)
    print(
        f"{line}  registers {registers:3}  spilled {spilled:4} ({moves:3})  "
        f"HGMMA {hopper:3}  waits {waits:3}  HMMA {older:3}",
        flush=True,
    )
    return [options.shared, registers, spilled]


if __name__ == "__main__":
    main(*sys.argv[1:])
