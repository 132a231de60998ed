"""Where numbers were measured: versions, hardware, commit and command."""

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "sala",
    "torch",
    "triton",
    "transformers",
    "flash-linear-attention",
    "fla-core",
    "tokenizers",
    "safetensors",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Return plain values; what this machine does not tell is None."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES}
        # with what it was built for
        | {"torch": torch.__version__},
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_bytes": _memory_bytes(),
            "gpu": _gpu(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def commit() -> str | None:
    """Return the commit of the source tree, with `+changes` where it differs from it.

    Outside a repository, of a copy of its files say, it is what SALA_COMMIT says, or None.
    """
    return _commit_of_repository() or os.environ.get("SALA_COMMIT") or None


def _commit_of_repository() -> str | None:
    git, folder = shutil.which("git"), Path(__file__).parent
    if git is None:
        return None

    def answer(*arguments: str) -> str | None:
        result = subprocess.run([git, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    # an installed package may lie in a virtual environment inside somebody's repository
    if answer("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = answer("rev-parse", "HEAD")
    return f"{head}+changes" if head and answer("status", "--porcelain", "--untracked-files=no") else head


def _program() -> str:
    """Return the program by its name, not by the folder it lies in on this machine."""
    name = Path(sys.argv[0]).name
    return "sala" if name == "__main__.py" else name


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _gpu() -> dict[str, Any] | None:
    """Return the GPU that torch would use, its driver and the CUDA that torch was built for."""
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": card.name,
        "memory_bytes": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "l2_bytes": getattr(card, "L2_cache_size", None),
        "count": torch.cuda.device_count(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return answer[0] if answer else None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
