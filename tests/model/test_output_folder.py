"""What a checkpoint folder is written through."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sala.model.checkpoint import output_folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_may_be_read_by_whoever_reads_the_users_others(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with output_folder(tmp_path / "out") as folder:
            (folder / "part").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "part" / "model.safetensors")
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    written = (tmp_path / "out" / "part" / "model.safetensors", tmp_path / "out" / "config.json")
    assert [file.stat().st_mode & 0o777 for file in written] == [mode, mode]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
