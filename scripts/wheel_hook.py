"""Packs the compiled kernels of the folder that $SALA_WHEEL_KERNELS names into the wheel, and names the system they need."""

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Does nothing without that variable: the wheel is then for any system, and kernels are compiled on first use."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = os.environ.get("SALA_WHEEL_KERNELS")
        if not folder:
            return
        for path in sorted(Path(folder).glob("*-*")):
            build_data["force_include"][str(path)] = f"sala/ops/native/built/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{Path(folder, 'PLATFORM').read_text(encoding='utf-8').strip()}"
