"""The C++ library: built once, at the best level that can be, and where it cannot be, everything works without it."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sala.errors import BackendError
from sala.ops import native
from sala.ops.native import library
from sala.ops.native.library import LEVELS

PROGRAM = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from sala.ops.lightning import lightning_attention, log_decay
q = torch.ones(1, 3, 2, 8)
out, _ = lightning_attention(q, q, q, log_decay(2), scale=1.0)
print(out.sum().item() > 0)
"""


def run(**environment: str) -> subprocess.CompletedProcess:
    """Run PROGRAM in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=os.environ | environment, check=False
    )


def test_levels_here_are_best_first_and_end_in_one_that_any_processor_runs():
    here = native.levels_here()
    assert [name for name in LEVELS if name in here] == here
    assert "portable" in here


def test_no_compiler_means_a_warning_that_says_what_to_install_and_plain_torch(fresh):
    result = run(PATH=str(fresh), CXX="")
    assert result.stdout.strip() == "True", result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("WARNING")]
    assert "no C++ compiler" in line and "install g++" in line


def test_switched_off_by_the_environment(fresh, monkeypatch, caplog):
    monkeypatch.setenv("SALA_CPU_LEVEL", "none")
    with caplog.at_level(logging.WARNING, logger="sala"):
        assert "SALA_CPU_LEVEL=none" in native.unavailable()
        assert native.unavailable() == native.unavailable()
    assert len(caplog.records) == 1  # said once, not at every call


def test_a_level_that_the_processor_lacks_is_named_with_those_it_has(fresh, monkeypatch):
    monkeypatch.setenv("SALA_CPU_LEVEL", "vax")
    assert "vax" in native.unavailable() and "portable" in native.unavailable()
    with pytest.raises(BackendError, match="'vax' does not run here"), native.at_level("vax"):
        pass


def test_built_once_then_found(small, caplog):
    with caplog.at_level(logging.WARNING, logger="sala"):
        assert native.unavailable() is None
        (built,) = small.glob("sala/native/*.so")
        library._library = None
        library._loaded.clear()
        assert native.unavailable() is None
    assert list(small.glob("sala/native/*.so")) == [built]
    assert sum("building" in record.message for record in caplog.records) == 1
    assert native.describe().startswith("C++ for ")


def test_other_sources_are_another_library(small):
    assert native.unavailable() is None
    with (library.SOURCES / "parallel.h").open("a") as file:
        file.write("\n// changed\n")
    library._library = None
    library._loaded.clear()
    assert native.unavailable() is None
    assert len(list(small.glob("sala/native/*.so"))) == 2


def test_a_compiler_that_does_not_know_a_level_leaves_the_next(small, monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "old-c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *avx*) echo "error: unrecognized option" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.WARNING, logger="sala"):
        assert native.unavailable() is None
    assert native.describe().startswith("C++ for portable")
    passed_over = [name for name in native.levels_here() if LEVELS[name].automatic][:-1]
    for name in passed_over:
        assert any(f"for {name} are not used" in record.message for record in caplog.records)


def test_a_broken_compiler_leaves_plain_torch_and_no_half_library(small, monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    assert "internal compiler error" in native.unavailable()
    assert not list(small.glob("sala/native/*.so"))


def test_threads_are_those_of_torch():
    """One pool: the library finds the function that torch's own parallel loops go through."""
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("torch runs on another kind of threads here")
    assert library._torch_parallel()


def test_the_package_carries_its_sources():
    assert {path.suffix for path in Path(library.__file__).parent.iterdir()} >= {".cpp", ".h", ".py"}
