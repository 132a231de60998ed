"""The cache folder: where it is on every kind of machine, and what makes it unfit for files that we run or believe."""

import logging
import os
import pwd
import stat
import tempfile
from pathlib import Path

import pytest

from sala import cache
from sala.cache import cache_folder, distrust
from sala.errors import DiskError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    """A home of its own, and no variable that names another place."""
    for name in ("SALA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    cache._without_home.cache_clear()
    yield
    cache._without_home.cache_clear()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_variable_that_is_set_names_the_place(monkeypatch, tmp_path):
    assert cache_folder("x") == tmp_path / "home/.cache/sala/x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "standard"))
    assert cache_folder("x") == tmp_path / "standard/sala/x"
    monkeypatch.setenv("SALA_CACHE", str(tmp_path / "ours"))
    assert cache_folder("x") == tmp_path / "ours/sala/x"


def test_a_variable_that_is_empty_is_not_set(monkeypatch, tmp_path):
    monkeypatch.setenv("SALA_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("x") == tmp_path / "home/.cache/sala/x"


def test_a_relative_standard_place_is_ignored_as_its_specification_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder("x") == tmp_path / "home/.cache/sala/x"


def test_nobody_else_may_write_what_is_made_whatever_the_umask():
    before = os.umask(0)
    try:
        made = cache_folder("x")
    finally:
        os.umask(before)
    assert mode(made) == mode(made.parent) == 0o755


def test_without_a_home_a_temporary_folder_is_used_and_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("HOME")

    def nobody(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with caplog.at_level(logging.WARNING, logger="sala"):
        made = cache_folder("x")
        assert cache_folder("x") == made
    assert made == tmp_path / f"temporary/sala-{os.geteuid()}/x"
    assert mode(made.parent) == 0o755
    (record,) = caplog.records
    assert "SALA_CACHE" in record.message and str(made.parent) in record.message


def test_a_home_that_takes_no_files_is_none(monkeypatch, tmp_path, caplog):
    (tmp_path / "home").write_text("")
    assert cache_folder("x").is_relative_to(tmp_path / "temporary")
    assert len(caplog.records) == 1


def test_a_place_asked_for_is_never_exchanged_for_another(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALA_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError, match="cannot be made: Not a directory; set SALA_CACHE"):
        cache_folder("x")


@pytest.mark.parametrize("name", ["sala", "sala/x"])
def test_a_folder_that_others_can_write_to_is_refused(name):
    cache_folder("x").parent.parent.joinpath(name).chmod(0o770)
    with pytest.raises(DiskError, match=r"can be written by other users \(mode 770\); expected"):
        cache_folder("x")


@pytest.mark.parametrize("name", ["sala", "sala/x"])
def test_a_link_in_place_of_a_folder_is_refused(name, tmp_path):
    folder = cache_folder("x").parent.parent / name
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match="is a symbolic link; expected"):
        cache_folder("x")


@needs_root
def test_another_users_folder_is_refused():
    os.chown(cache_folder("x"), 12345, -1)
    with pytest.raises(DiskError, match=r"belongs to another user \(uid 12345\); expected"):
        cache_folder("x")


@pytest.mark.parametrize(("owner", "trusted"), [(0, True), (1000, True), (1001, False)])
def test_files_of_root_and_of_this_user_are_trusted(monkeypatch, owner, trusted):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, owner, 0, 0, 0, 0, 0))
    assert (distrust(found) is None) == trusted
