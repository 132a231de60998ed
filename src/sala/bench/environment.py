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

PACKAGES = ("sala", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Return plain values; what this machine does not tell is None."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        # the program by its name, not by the folder it lies in on this machine
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_bytes": _memory_bytes(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def commit() -> str | None:
    """Return the commit of the source tree, with `+changes` where it differs from it; None outside a repository."""
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


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
