"""Built libraries in the cache: used without a compiler, and never where others could have written them or half is missing."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sala.ops import native
from sala.ops.native import library, store

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")

FOREIGN = """
#include <cstdio>
__attribute__((constructor)) static void run() { std::fputs("foreign code ran\\n", stderr); }
extern "C" int sala_prepare(void*) { return 0; }
"""


@pytest.fixture
def portable(small, monkeypatch):
    """A process that uses one level, of a small source; returns the folder of libraries."""
    monkeypatch.setenv("SALA_CPU_LEVEL", "portable")
    return small / "sala/native"


@pytest.fixture
def built(portable):
    """The same after a library was built, in a process that has not looked for it yet; returns the library."""
    assert native.unavailable() is None
    forget()
    (path,) = portable.glob("*.so")
    return path


def forget() -> None:
    library._library = None
    library._loaded.clear()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    def take_away() -> None:
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.delenv("CXX", raising=False)
    return take_away


def foreign(path: Path) -> None:
    """Put another library in place of one, with a record that fits: new files, for what is loaded must not change."""
    path.unlink()
    subprocess.run(["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=FOREIGN, text=True, check=True)
    record = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "compiler": "theirs"}
    path.with_suffix(".json").write_text(json.dumps(record))


# used as it is


def test_a_library_that_is_there_needs_no_compiler(built, no_compiler, caplog):
    no_compiler()
    assert native.unavailable() is None and not lines(caplog)
    assert "built with" in native.describe() and not native.describe().endswith("built with ")


def test_without_a_compiler_the_best_level_that_was_built_is_used(built, no_compiler, monkeypatch, caplog):
    no_compiler()
    monkeypatch.setenv("SALA_CPU_LEVEL", "")
    assert native.unavailable() is None and not lines(caplog)
    assert native.describe().startswith("C++ for portable")


def test_another_compilers_library_serves_where_nothing_can_be_written(built, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("CXX", "c++ -DOTHER")
    monkeypatch.setattr(store.Store, "lock", refuse)
    assert native.unavailable() is None and not lines(caplog)


def test_another_compiler_builds_its_own(built, monkeypatch):
    monkeypatch.setenv("CXX", "c++ -DOTHER")
    assert native.unavailable() is None
    assert len(list(built.parent.glob("*.so"))) == 2


# variables


@pytest.mark.parametrize("name", ["CXX", "SALA_CPU_LEVEL", "SALA_CXXFLAGS", "SALA_CACHE", "XDG_CACHE_HOME"])
def test_an_empty_variable_is_an_unset_one(small, monkeypatch, tmp_path, name):
    if name in ("SALA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv("SALA_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(name, "")
    assert native.unavailable() is None


@pytest.mark.parametrize("command", ["c++ -m64", "env c++", "  c++  -DNAME='of two words' "])
def test_a_compiler_may_have_arguments(portable, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    assert native.unavailable() is None
    assert "env" not in native.describe()


def test_a_command_that_cannot_be_read_is_named(portable, monkeypatch):
    monkeypatch.setenv("CXX", "g++ '-m64")
    assert """CXX="g++ '-m64" is no command""" in native.unavailable()


def test_a_compiler_that_does_not_run_is_named_once(small, monkeypatch, tmp_path, caplog):
    (tmp_path / "compiler").write_text("neither a program nor a script")
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    assert "compiler cannot be run: Exec format error" in native.unavailable()
    assert len(lines(caplog)) == 1


# places


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(small, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALA_CACHE", str(tmp_path / "file"))
    assert "SALA_CACHE" in native.unavailable()
    assert len(lines(caplog)) == 1


def test_no_place_to_compile_in_says_which_variable_to_set(portable, monkeypatch, caplog):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert "set TMPDIR" in native.unavailable()


def test_what_is_kept_is_for_all_to_read_and_for_its_owner_to_write(portable):
    before = os.umask(0)
    try:
        assert native.unavailable() is None
    finally:
        os.umask(before)
    (path,) = portable.glob("*.so")
    modes = [file.stat().st_mode & 0o777 for file in (path, path.with_suffix(".json"))]
    assert modes == [0o644, 0o644]
    forget()
    assert native.unavailable() is None


# what is not loaded


@pytest.mark.parametrize("size", [0, 4000])
def test_a_torn_library_is_built_again(built, caplog, size):
    whole = built.read_bytes()
    built.unlink()
    built.write_bytes(whole[:size])
    assert native.unavailable() is None
    assert built.read_bytes() == whole
    assert "is damaged" in lines(caplog)[0] and "building" in lines(caplog)[1]


def test_a_torn_library_without_a_compiler_is_refused(built, no_compiler, caplog):
    built.unlink()
    built.write_bytes(b"torn")
    no_compiler()
    assert "no C++ compiler" in native.unavailable()
    assert "is damaged" in lines(caplog)[0]


@pytest.mark.parametrize("record", [None, b"", b"[]", b'"text"', b'{"sha256": 1}', b"\xff"])
def test_a_library_without_its_record_is_built_again(built, record):
    path = built.with_suffix(".json")
    whole = path.read_bytes()
    path.unlink()
    if record is not None:
        path.write_bytes(record)
    assert native.unavailable() is None
    assert path.read_bytes() == whole


@pytest.mark.parametrize("mode", [0o664, 0o646])
@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_a_file_that_others_can_write_is_built_again(built, capfd, caplog, mode, suffix):
    foreign(built)
    built.with_suffix(suffix).chmod(mode)
    assert native.unavailable() is None
    assert "theirs" not in native.describe()
    assert "foreign" not in capfd.readouterr().err
    assert f"can be written by other users (mode {mode:o})" in lines(caplog)[0]


@needs_root
def test_another_users_library_is_built_again(built, capfd, caplog):
    foreign(built)
    os.chown(built, 12345, -1)
    assert native.unavailable() is None
    assert built.stat().st_uid == os.geteuid()
    assert "foreign" not in capfd.readouterr().err
    assert "belongs to another user (uid 12345)" in lines(caplog)[0]


@needs_root
def test_another_users_folder_is_refused_in_one_line(built, monkeypatch, capfd, caplog):
    foreign(built)
    os.chown(built.parent, 12345, -1)
    monkeypatch.setenv("SALA_CPU_LEVEL", "")
    assert "belongs to another user (uid 12345); expected" in native.unavailable()
    assert "foreign" not in capfd.readouterr().err
    assert len(lines(caplog)) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are reached by their paths here")
def test_a_folder_that_is_exchanged_after_it_was_looked_at_is_not_read(built, tmp_path):
    opened, whole = store.Store(), built.read_bytes()
    built.parent.rename(tmp_path / "aside")
    shutil.copytree(tmp_path / "aside", built.parent)
    foreign(built)
    found = opened.find(built.stem)
    assert found.compiler != "theirs"
    assert Path(found.path).read_bytes() == whole


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_a_link_in_place_of_a_file_is_not_followed(built, tmp_path, suffix, caplog):
    link, target = built.with_suffix(suffix), tmp_path / "target"
    link.rename(target)
    before = target.read_bytes()
    link.symlink_to(target)
    assert native.unavailable() is None
    assert not link.is_symlink() and target.read_bytes() == before
    assert "expected a file, and no link" in lines(caplog)[0]


def test_a_lock_that_is_a_link_is_not_followed(portable, built, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = built.with_suffix(".lock")
    lock.unlink()
    lock.symlink_to(victim)
    built.unlink()
    assert "set SALA_CACHE" in native.unavailable()
    assert victim.read_text() == "precious"


def test_a_lock_keeps_what_is_in_it(built):
    lock = built.with_suffix(".lock")
    lock.write_text("precious")
    built.unlink()
    assert native.unavailable() is None
    assert lock.read_text() == "precious"


def test_a_pipe_is_not_waited_for(built, caplog):
    built.unlink()
    os.mkfifo(built)
    assert native.unavailable() is None
    assert "is no file" in lines(caplog)[0]


# several at once


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files have no names by number here")
def test_a_library_and_its_record_are_on_the_disk_before_they_have_their_names(portable, monkeypatch):
    done = []
    sync, replace = os.fsync, Path.replace

    def watched_sync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def watched_replace(path: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    assert native.unavailable() is None
    (path,) = portable.glob("*.so")
    names = [f"{path.stem}.json", path.name]
    assert done == [step for name in names for step in (name, f"rename {name}", "native")]


def test_several_processes_build_one_library(portable):
    program = f"""
from pathlib import Path
from sala.ops.native import library
library.SOURCES = Path({str(library.SOURCES)!r})
print(library.unavailable())
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate() for process in processes]
    assert [out.strip() for out, _ in outputs] == ["None"] * 3, outputs
    assert sum("building" in err for _, err in outputs) == 1
    assert len(list(portable.glob("*.so"))) == 1


def test_a_write_that_fails_leaves_what_was_there(built, monkeypatch):
    opened, before = store.Store(), sorted(built.parent.iterdir())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        opened.add("new", b"library", "compiler")
    assert sorted(built.parent.iterdir()) == before
