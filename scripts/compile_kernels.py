"""Compile every kernel that the operators would launch, for a GPU that need not be there, and print what each one takes.

    python scripts/compile_kernels.py [sm_90] [name]

The operators run as they are on tensors of the CPU, but a launch compiles instead. Of each kernel and tuning: registers a
thread, bytes spilled a thread inside and outside loops together and the instructions that move them, shared memory a program,
tensor core instructions (HGMMA: Hopper's; HMMA: those before it), and waits for Hopper's: as many as those mean that each
waits for the one before. Ends with an error where a launch has no tuning that fits.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# of one program, by compute capability; those not named have as much as an A100 or more
SHARED_BYTES = {90: 227 * 1024, 89: 99 * 1024, 86: 99 * 1024, 80: 163 * 1024, 100: 227 * 1024, 120: 99 * 1024}


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


def lightning() -> Iterator[tuple[str, Callable[[], object]]]:
    from sala.ops.lightning import triton as backend

    heads = 32

    def call(dtype: torch.dtype, T: int, width: int, masked: bool, packed: bool, gradients: bool) -> None:
        q, k, v = (torch.zeros(1, T, heads, width, dtype=dtype, requires_grad=gradients) for _ in range(3))
        initial = torch.zeros(2 if packed else 1, heads, width, width)
        out, final = backend.attend(
            *(q, k, v, torch.zeros(heads)),
            scale=0.1,
            initial_state_BHKV=initial,
            mask_BT=torch.ones(1, T, dtype=torch.bool) if masked else None,
            cu_seqlens=torch.tensor([0, 1, T]) if packed else None,
        )
        if gradients:
            torch.autograd.backward((out, final), (out.detach(), final.detach()))

    yield "bf16 128, and backward", lambda: call(torch.bfloat16, 2048, 128, False, False, True)
    yield "bf16 128, masked, packed", lambda: call(torch.bfloat16, 2048, 128, True, True, False)
    for dtype, width in product((torch.bfloat16, torch.float16, torch.float32), (64, 128, 256)):
        label = f"{str(dtype).removeprefix('torch.')} {width}, one segment"
        yield label, lambda dtype=dtype, width=width: call(dtype, 512, width, False, False, False)
    yield "bf16 128, masked step", lambda: call(torch.bfloat16, 1, 128, True, False, False)


def infllm() -> Iterator[tuple[str, Callable[[], object]]]:
    from sala.ops.infllm import SparseGeometry, num_windows
    from sala.ops.infllm import triton as backend

    geometry = SparseGeometry()

    def call(dtype: torch.dtype, T: int, width: int, group: int, gradients: bool, past: int = 8192) -> None:
        S = past + T
        q = torch.zeros(1, T, 2 * group, width, dtype=dtype, requires_grad=gradients)
        k, v = (torch.zeros(1, S, 2, width, dtype=dtype, requires_grad=gradients) for _ in range(2))
        tiers = (geometry.kernel_size, geometry.kernel_stride), (geometry.coarse_size, geometry.coarse_stride)
        k1, k2 = (torch.zeros(1, num_windows(S, *tier), 2, width, dtype=dtype) for tier in tiers)
        backend.compress(k.detach(), *tiers[0])
        backend.select(q.detach(), k1, k2, torch.arange(S - T, S)[None], geometry, 0.1)
        out = backend.attend(q, k, v, k1, k2, None, geometry, 0.1, S - T)
        if gradients:
            out.backward(out.detach())

    for dtype, width, group in (
        (torch.bfloat16, 128, 16),
        (torch.bfloat16, 64, 16),
        (torch.bfloat16, 128, 1),
        (torch.bfloat16, 128, 5),
        (torch.bfloat16, 256, 16),
        (torch.float32, 128, 16),
    ):
        label = f"{str(dtype).removeprefix('torch.')} {width}, {group} heads, back"
        yield label, lambda dtype=dtype, width=width, group=group: call(dtype, 512, width, group, True)
    yield "bf16 128, 16 heads, step", lambda: call(torch.bfloat16, 1, 128, 16, False)
    yield "bf16 128, 16 heads, step 1M", lambda: call(torch.bfloat16, 1, 128, 16, False, 2**20 - 1)


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
    ):
        label = f"{str(dtype).removeprefix('torch.')} {heads} x {width}, {hidden}"
        yield label, lambda shape=(dtype, heads, width, hidden): call(*shape)


CALLS = {"lightning": lightning, "infllm": infllm, "pointwise": pointwise}


def main(arch: str = "sm_90", *names: str) -> None:
    capability = int(arch.removeprefix("sm_"))
    triton.runtime.driver.set_active(Card(capability))
    most = SHARED_BYTES.get(capability, SHARED_BYTES[80])
    compiled: dict[str, Any] = {}
    misfits: list[str] = []

    def compile_only(self: JITFunction, *arguments: Any, grid: object, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.hash, kernel)
        return kernel

    def compile_tunings(self: Autotuner, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        kernels = self.warmup(*arguments, grid=grid, **options)
        if min(kernel.metadata.shared for kernel in kernels) > most:
            misfits.append(f"no tuning of {kernels[0].name} takes at most {most} bytes of shared memory: {options}")

    run = JITFunction.run
    JITFunction.run, Autotuner.run = compile_only, compile_tunings  # type: ignore[method-assign]
    for op in names or CALLS:
        for label, call in CALLS[op]():
            known = set(compiled)
            call()
            for key in [key for key in compiled if key not in known]:
                report(label, compiled[key])
    sys.exit("\n".join(misfits) or None)


def report(label: str, kernel: Any) -> None:
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
    options = kernel.metadata
    print(
        f"{label:28} {kernel.name:18} warps {options.num_warps} stages {options.num_stages}  registers {registers:3}  "
        f"spilled {spilled:4} ({moves:3})  shared {options.shared:6}  HGMMA {hopper:3}  waits {waits:3}  HMMA {older:3}",
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
