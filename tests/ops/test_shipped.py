"""Laws of kernels that come with the package: taken before any is compiled, and only where they are of the sources here."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from sala.ops import native
from sala.ops.native import library
from sala.ops.native.store import Store

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no C++ here")


@pytest.fixture
def level(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Return the level that runs, of which the package has nothing yet; nothing has been loaded."""
    level = library._active().level
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "SHIPPED", tmp_path)
    return level


def ship(level: str, folder: Path) -> None:
    name = Store().names(library.content_name(level))[0]
    built = Store().folder / f"{name}.so"
    shutil.copy(built, folder / f"{library.content_name(level)}wheel.so")
    (folder / f"{library.content_name(level)}wheel.txt").write_text("a compiler elsewhere\n", encoding="utf-8")


def test_without_a_compiler_what_is_shipped_runs(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(level, tmp_path)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("SALA_CACHE", str(tmp_path / "none"))
    loaded = library._load(level)
    assert loaded.store is None and loaded.compiler == "a compiler elsewhere"
    assert not (tmp_path / "none").exists()


def test_a_library_of_other_sources_is_not_taken(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(level, tmp_path)
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DOTHER"))
    assert library.shipped(level) is None


def test_the_hook_packs_kernels_for_one_system_only_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders = pytest.importorskip("hatchling.builders.wheel")
    root = Path(__file__).parents[2]
    if not (root / "scripts" / "wheel_hook.py").is_file():
        pytest.skip("not in a copy of the repository")
    (tmp_path / "avx2-abc-wheel.so").write_bytes(b"kernels")
    (tmp_path / "PLATFORM").write_text("manylinux_2_29_x86_64\n", encoding="utf-8")
    names = []
    for folder in ("", str(tmp_path)):
        monkeypatch.setenv("SALA_WHEEL_KERNELS", folder)
        (path,) = builders.WheelBuilder(str(root)).build(directory=str(tmp_path / "out"))
        names.append(Path(path).name.partition("-py3")[2])
        held = json.dumps(zipfile.ZipFile(path).namelist())
        assert ("sala/ops/native/built/avx2-abc-wheel.so" in held) == bool(folder)
    assert names == ["-none-any.whl", "-none-manylinux_2_29_x86_64.whl"]
