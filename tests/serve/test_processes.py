"""Whole processes: killed while they write, interrupted while they answer."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.load

KILLED = """
import sys, torch
from pathlib import Path
from sala.engine.runner import Keys, States
from sala.engine.saved import Reader, SavedDocument, save_document
document = SavedDocument("t", (1,), Keys(0, 1, ((torch.zeros(1, 20_000_000),),)), States(1, (None,)))
print("go", flush=True)
while True:
    save_document(Path(sys.argv[1]), document, Reader("a", "b", "{}"))
"""


def test_a_kill_while_it_saves_leaves_no_half_document(tmp_path):
    path = tmp_path / "book.sala"
    path.write_bytes(b"what was there before")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"go\n"
        deadline = time.monotonic() + 30
        # until it is in the middle of writing
        while not any(file.name.startswith(".book") for file in tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert path.read_bytes() == b"what was there before" or len(load_file(path)) == 3


def test_ctrl_c_stops_the_answer_and_not_the_program():
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sala.cli", "chat", "-n", "100000"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.write(ours, b"def area(radius):\n")
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        os.write(ours, b"/quit\n")
        process.stdout.read()
        assert process.wait(30) == 0
    os.close(ours)
    os.close(theirs)
