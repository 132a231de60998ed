"""Running a program that a model wrote: without network, with nothing to write but one folder, limited in time and memory.

A guard against accidents, not against an attacker: the program can read what the user can read.
"""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sala.errors import InputError
from sala.eval import confined

TIMEOUT_S, MEMORY_BYTES, MOST_OUTPUT = 10.0, 2 * 2**30, 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """passed: the program ended by itself with 0. output: the start of its standard output. error: what went wrong."""

    passed: bool
    output: str = ""
    error: str = ""


def run_program(program: str, stdin: str = "", timeout_s: float = TIMEOUT_S) -> Outcome:
    """Run Python source in a new interpreter (see `confined.py`) in an empty folder, which is deleted afterwards.

    Raises:
        InputError: this system cannot confine a process.
    """
    if sys.platform != "linux":
        raise InputError(f"programs are confined on Linux alone, not on {sys.platform}; expected Linux")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / confined.PROGRAM).write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", confined.__file__, folder, str(int(timeout_s) + 1), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(stdin.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome(False, error=f"it ran for more than {timeout_s:g} s")
    last = (complaint.decode(errors="replace").strip().splitlines() or [f"exit {process.returncode}"])[-1]
    if process.returncode == confined.REFUSED:
        raise InputError(
            f"this system cannot confine a program ({last}); expected user namespaces and Linux 5.12 or newer"
        )
    passed = process.returncode == 0
    return Outcome(passed, said[:MOST_OUTPUT].decode(errors="replace"), "" if passed else last)
