"""A report appears whole, and an earlier one stays until then."""

from pathlib import Path

import pytest

from sala.demo.folder import PAGE, RESULTS, report_folder
from sala.errors import InputError


def write_report(path: Path, text: str) -> None:
    with report_folder(path) as working:
        for name in (PAGE, RESULTS):
            (working / name).write_text(text)


def test_a_new_report_replaces_an_old_one_once_complete(tmp_path: Path) -> None:
    path = tmp_path / "report"
    write_report(path, "first")
    (path / "leftover.png").write_text("of the first")
    write_report(path, "second")
    assert sorted(item.name for item in path.iterdir()) == [PAGE, RESULTS]
    assert (path / PAGE).read_text() == "second"
    assert [item.name for item in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_broken_run_leaves_the_old_report(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "report"
    write_report(path, "first")
    with pytest.raises(error), report_folder(path) as working:
        (working / PAGE).write_text("half")
        raise error
    assert (path / PAGE).read_text() == "first"
    assert [item.name for item in tmp_path.iterdir()] == ["report"]


def test_a_broken_first_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError), report_folder(tmp_path / "report") as working:
        (working / PAGE).write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    write_report(tmp_path / "report", "first")
    assert (tmp_path / "report" / PAGE).read_text() == "first"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_anything_else_of_that_name_is_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "report"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / PAGE).write_text("mine, and no results beside it")
    with pytest.raises(InputError, match="not a report"), report_folder(path):
        pass
    assert path.exists()
