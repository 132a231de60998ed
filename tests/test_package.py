"""What is given away has every file of the package."""

import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_source_distribution_has_every_file_of_the_package(tmp_path: Path) -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist")
    archive = next(sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path)))
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "src").rglob("*") if file.is_file()}
    assert {name for name in files if "__pycache__" not in name and ".egg-info" not in name} <= packed
