"""The package as others get it: its files, and the versions that it asks for."""

import tarfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_a_source_distribution_has_every_file_of_the_package(tmp_path: Path) -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist")
    archive = next(sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path)))
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "src").rglob("*") if file.is_file()}
    assert {name for name in files if "__pycache__" not in name and ".egg-info" not in name} <= packed


def locked() -> dict[str, set[Version]]:
    """Return the versions of constraints.txt by package; one that differs by Python or platform has several."""
    versions: dict[str, set[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition(";")[0].strip().partition("==")
            versions.setdefault(canonicalize_name(name), set()).add(Version(version))
    return versions


def requirements() -> dict[str, list[Requirement]]:
    """Return the requirements of pyproject.toml: of the package, and of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"package": project["dependencies"], **project["optional-dependencies"]}
    return {group: [Requirement(line) for line in lines] for group, lines in groups.items()}


def test_the_lock_has_an_exact_version_of_everything_that_is_asked_for() -> None:
    versions = locked()
    for required in [required for group in requirements().values() for required in group]:
        assert canonicalize_name(required.name) in versions, f"{required} is not locked; expected `make lock` to be run"
        assert all(version in required.specifier for version in versions[canonicalize_name(required.name)]), required


def test_a_range_ends_at_the_newest_minor_version_that_was_tested() -> None:
    groups = requirements()
    del groups["dev"]
    for required in [required for group in groups.values() for required in group]:
        newest = max(locked()[canonicalize_name(required.name)])
        following = Version(f"{newest.major}.{newest.minor + 1}")
        assert following not in required.specifier, f"{required}: {following} is allowed, tested was {newest}"
