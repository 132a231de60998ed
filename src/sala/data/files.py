"""Records from files and data sets, one at a time: text, JSON lines, Parquet, and streams of the Hugging Face hub."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sala.data.folder import files_below, kind_of, shown, source_path
from sala.errors import InputError, nearest

NOT_UTF8 = "not UTF-8"
BINARY = "binary (with a zero byte)"
NOT_JSON = "not a JSON object"

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
FORMATS = ("text", "jsonl", "parquet")

# rows of a Parquet file that are held at once
PARQUET_ROWS = 64


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source and where it stood, `"a.jsonl:17"`; `problem` says why there is no row."""

    origin: str
    row: Mapping[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Files:
    """Files to read, and how many links of folders were not followed."""

    paths: tuple[Path, ...]
    links: int = 0


def find_files(sources: Sequence[str | Path], format: str | None = None) -> Files:
    """Return the files of files, pipes and folders; those of a folder sorted by path, hidden ones left out.

    A link inside a folder that leads out of it, or to a folder, is not followed, and counted; one that is named is.

    format: as for `read_files`.

    Raises:
        InputError: a source is missing or cannot be read, a folder holds nothing, or a name fits two formats.
    """
    _require_format(format)
    files: list[Path] = []
    links = 0
    for source in sources:
        path = source_path(source)
        kind = kind_of(path)
        if kind is None:
            raise InputError(f"no file or folder {str(source)!r}")
        if kind == "folder":
            below = files_below(path)
            if not below.files:
                raise InputError(
                    f"folder {str(source)!r} holds no files ({below.hidden:,} hidden files and {below.links:,} links passed "
                    "over); expected text, .jsonl or .parquet"
                )
            files += below.files
            links += below.links
        elif format is None and path.suffix.lower() == ".json":
            raise InputError(
                f"{str(source)!r} may be one document or many records; expected its format (text or jsonl), or a record a "
                "line in a .jsonl"
            )
        else:
            files.append(path)
    return Files(tuple(files), links)


def read_files(
    paths: Sequence[Path],
    field: str = "text",
    on_bytes: Callable[[int], None] = lambda count: None,
    format: str | None = None,
) -> Iterator[Record]:
    """Yield the records of files and pipes, in order.

    `.jsonl` and `.ndjson` hold a record a line, `.parquet` a record a row; any other file is one document, the row
    `{field: text}`. `.gz` after the name is unpacked. Memory: one record, or 64 rows of Parquet.

    field: the column that a Parquet file must have.
    on_bytes: called with how many more bytes of the files were read.
    format: "text", "jsonl" or "parquet", whatever the names say; a pipe often has none.

    Raises:
        InputError: a file cannot be read, unpacked, or is no Parquet; Parquet without `pyarrow`; an unknown format, or a pipe
            of JSON lines without one.
    """
    _require_format(format)
    for path in paths:
        kind = format or _format(path)
        try:
            if kind == "parquet":
                yield from _parquet(path, field, on_bytes)
            elif kind == "jsonl":
                yield from _json_lines(path, on_bytes)
            else:
                yield _text(path, field, on_bytes, guessed=format is None and kind_of(path) == "pipe")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} is not a whole gzip file: {error}") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def read_dataset(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    """Yield the rows of a Hugging Face data set, streaming or not, or of anything else that iterates over mappings."""
    for number, row in enumerate(rows):
        yield Record(f"{name}:{number}", row)


def open_dataset(name: str, config: str | None = None, split: str = "train") -> Iterable[Mapping[str, Any]]:
    """Return a data set of the hub, or of a local folder, as a stream that downloads while it is read.

    Raises:
        InputError: `datasets` is not installed, or the data set, configuration or split cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("streaming a data set needs `datasets`: pip install 'sala[datasets]'") from error
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data set {name!r}, split {split!r} cannot be opened: {error}") from error


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _format(path: Path) -> str:
    suffix = (Path(path.stem).suffix if _is_packed(path) else path.suffix).lower()
    return SUFFIXES.get(suffix, "text")


def _require_format(name: str | None) -> None:
    if name not in (None, *FORMATS):
        raise InputError(
            f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}{nearest(str(name), FORMATS)}"
        )


class _Counted:
    """A file whose bytes are counted as they are read; a pipe does not know its place."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], None]):
        self._file, self._on_bytes = file, on_bytes

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._on_bytes(len(content))
        return content

    def __iter__(self) -> Iterator[bytes]:
        for line in self._file:
            self._on_bytes(len(line))
            yield line


def _text(path: Path, field: str, on_bytes: Callable[[int], None], guessed: bool) -> Record:
    content = path.read_bytes()
    on_bytes(len(content))
    if guessed and _json_line("", content.split(b"\n", 1)[0]).row is not None:
        raise InputError(
            f"{shown(path)} is a pipe whose first line is a JSON object; expected its format, jsonl (or text, for one document)"
        )
    if _is_packed(path):
        content = gzip.decompress(content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Record(shown(path), None, NOT_UTF8)
    return Record(shown(path), None, BINARY) if "\0" in text else Record(shown(path), {field: text})


def _json_lines(path: Path, on_bytes: Callable[[int], None]) -> Iterator[Record]:
    with path.open("rb") as raw:
        # of a packed file the packed bytes count
        counted: Any = _Counted(raw, on_bytes)
        for number, line in enumerate(gzip.GzipFile(fileobj=counted) if _is_packed(path) else counted, start=1):
            if line.strip():
                yield _json_line(f"{shown(path)}:{number}", line)


def _json_line(origin: str, line: bytes) -> Record:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(origin, None, NOT_UTF8)
    except (ValueError, RecursionError):  # also of a number with thousands of digits
        return Record(origin, None, NOT_JSON)
    return Record(origin, row) if isinstance(row, dict) else Record(origin, None, NOT_JSON)


def _parquet(path: Path, field: str, on_bytes: Callable[[int], None]) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} needs `pyarrow`: pip install 'sala[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise InputError(f"{path} has no column {field!r}, only {', '.join(names)}{nearest(field, names)}")
            columns = [name for name in (field, "tools") if name in names]
            if twice := [name for name in columns if names.count(name) > 1]:
                raise InputError(f"{path} has several columns {twice[0]!r}; expected one of that name")
            size, total, number = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    on_bytes(size * (number + 1) // total - size * number // total)
                    yield _parquet_row(f"{shown(path)}:{number}", columns, values)
                    number += 1
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a whole Parquet file: {error}") from error


def _parquet_row(origin: str, columns: Sequence[str], values: Sequence[Any]) -> Record:
    try:
        return Record(origin, {name: value.as_py() for name, value in zip(columns, values, strict=True)})
    except UnicodeDecodeError:
        return Record(origin, None, NOT_UTF8)
