"""Build a wheel into dist/ that has the C++ kernels compiled for every level of this kind of processor.

python scripts/build_wheel.py [LEVEL ...]      all that are chosen automatically when none is named
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from sala.ops.native.compiler import find_compiler
from sala.ops.native.library import LEVELS, content_name, sources_and_flags

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "kernels"


def oldest_glibc(libraries: list[Path]) -> tuple[int, ...]:
    """Return the lowest version of glibc that has all symbols the libraries ask for."""
    table = subprocess.run(["objdump", "-T", *map(str, libraries)], capture_output=True, text=True, check=True).stdout
    return max(tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", table))


def main(levels: list[str]) -> None:
    if platform.system() != "Linux":
        sys.exit(f"a wheel with kernels is built on Linux; this is {platform.system()}; expected Linux")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    compiler, libraries = find_compiler(), []
    for level in levels:
        sources, flags = sources_and_flags(level)
        path = FOLDER / f"{content_name(level)}wheel.so"
        print(f"compiling {level} with {compiler.version}", flush=True)
        path.write_bytes(compiler.build(sources, flags))
        path.with_suffix(".txt").write_text(compiler.version + "\n", encoding="utf-8")
        libraries.append(path)
    major, minor = oldest_glibc(libraries)[:2]
    (FOLDER / "PLATFORM").write_text(f"manylinux_{major}_{minor}_{platform.machine()}\n", encoding="utf-8")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(ROOT / "dist")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"SALA_WHEEL_KERNELS": str(FOLDER)}, check=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name, level in LEVELS.items() if level.automatic])
