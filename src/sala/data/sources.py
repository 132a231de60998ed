"""Documents that are on every machine with Python: its standard library's source, licence and documentation strings."""

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sala.errors import InputError

Split = Literal["train", "valid", "test"]

# Tests and generated tables are not language; site-packages differ between machines.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pgen2", "__pycache__"}
)
SHORTEST_DOCUMENT = 256  # characters; shorter files are stubs


@dataclass(frozen=True, slots=True)
class Document:
    """A named text."""

    name: str
    text: str


def split_of(name: str) -> Split:
    """Return the split of a document by a hash of its name, so that it is the same on every machine."""
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "train" if percent < 70 else "valid" if percent < 75 else "test"


def library_documents(split: Split) -> list[Document]:
    """Return the split's documents in the order of their names; 70 % train, 5 % valid, 25 % test.

    The texts are those of the running Python: the split of a name never changes, its text does with the version.
    """
    if split not in get_args(Split):
        raise InputError(f"split {split!r} is unknown; one of {', '.join(get_args(Split))}")
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        document
        for path in _library_files(root)
        if split_of(name := path.relative_to(root).as_posix()) == split
        and len((document := Document(name, _read(path))).text) >= SHORTEST_DOCUMENT
    ]
    documents += [d for d in _builtin_documentation() if split_of(d.name) == split]
    if not documents:
        raise InputError(f"no Python source found under {root}; install Python with its standard library")
    return sorted(documents, key=lambda document: document.name)


def concatenate(documents: Iterable[Document]) -> str:
    """Return the documents as one text, each under a comment line with its name."""
    return "\n\n".join(f"# {document.name}\n{document.text}" for document in documents)


def _library_files(root: Path) -> list[Path]:
    def wanted(path: Path) -> bool:
        return EXCLUDED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])

    return sorted(path for path in [*root.rglob("*.py"), *root.glob("LICENSE*")] if wanted(path))


def _read(path: Path) -> str:
    # a few library files declare another encoding; their odd bytes are no reason to lose the file
    return path.read_text(encoding="utf-8", errors="replace")


def _builtin_documentation() -> list[Document]:
    """Documentation strings of the modules written in C, which have no source file."""
    documents = []
    for name in ("builtins", "itertools", "math", "time", "sys", "_io", "_collections", "_functools"):
        module = sys.modules.get(name) or __import__(name)
        texts = [inspect.getdoc(module) or ""]
        for _, member in sorted(vars(module).items()):
            texts.append(inspect.getdoc(member) or "")
            if inspect.isclass(member):
                texts += [inspect.getdoc(m) or "" for _, m in sorted(vars(member).items()) if callable(m)]
        # members inherit their documentation from `object`: keep the first of equal strings
        documents.append(Document(f"documentation/{name}", "\n\n".join(t for t in dict.fromkeys(texts) if t)))
    return documents
