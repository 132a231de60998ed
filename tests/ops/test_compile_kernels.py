"""Kernels for GPUs that are not here: what is launched fits into their shared memory, as far as it was too large once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sala.ops import gpu

SCRIPTS = Path(__file__).parents[2] / "scripts"

if (why_not := gpu.unavailable()) is not None or sys.platform != "linux":
    pytest.skip(why_not or "compiled on Linux", allow_module_level=True)


def compile_kernels(*arguments: str, before: str = "pass") -> subprocess.CompletedProcess:
    """Run the script in a process that compiles and does not interpret."""
    program = f"import sys; import compile_kernels as script; {before}; script.main(*sys.argv[1:])"
    path = os.pathsep.join([str(SCRIPTS), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("op", "label"),
    [
        ("lightning", "float32 128, masked, packed"),
        ("lightning", "float32 256, one segment"),
        ("infllm", "bfloat16 192/128, 16 heads, 64, back"),
        ("infllm", "float32 256, 16 heads, 128, back"),
    ],
)
def test_the_largest_launches_fit_a_card_of_99_kib(op: str, label: str) -> None:
    result = compile_kernels("sm_120", op, "--shared", f"--only={label}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"{label} " in result.stdout


def test_a_launch_that_does_not_fit_is_an_error_that_names_it() -> None:
    arguments = "sm_120", "infllm", "--shared", "--only=bfloat16 128, 16 heads, step 1M"
    result = compile_kernels(*arguments, before="script.SHARED_BYTES[120] = 1024")
    assert result.returncode == 1
    assert "sm_120, bfloat16 128, 16 heads, step 1M: normalizers takes" in result.stderr


@pytest.mark.parametrize("name", ["sm_70", "lightening", "--share"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    result = compile_kernels(name)
    assert result.returncode == 1 and f"{name!r}: expected cards (sm_80, " in result.stderr
