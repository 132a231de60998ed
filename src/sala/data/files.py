"""Records from files and data sets, one at a time: text, JSON lines, Parquet, and streams of the Hugging Face hub."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sala.errors import InputError, nearest

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not a JSON object"

# rows of a Parquet file that are held at once
PARQUET_ROWS = 64


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source and where it stood, `"a.jsonl:17"`; `problem` says why there is no row."""

    origin: str
    row: Mapping[str, Any] | None
    problem: str | None = None


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """Return the files of files and folders; those of a folder sorted by path, hidden ones left out.

    Raises:
        InputError: a source is missing, a folder holds nothing, or a format that could be read in two ways.
    """
    files = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            below = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            found = sorted(p for p in below if p.is_file())
            if not found:
                raise InputError(f"folder {str(source)!r} holds no files; right would be text, .jsonl or .parquet")
            files += found
        elif not path.is_file():
            raise InputError(f"no file or folder {str(source)!r}")
        elif path.suffix.lower() == ".json":
            raise InputError(
                f"{str(source)!r} may be one document or many records; name it .txt, or write a record a line as .jsonl"
            )
        else:
            files.append(path)
    return files


def read_files(
    paths: Sequence[Path], field: str = "text", on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[Record]:
    """Yield the records of files, in order.

    `.jsonl` and `.ndjson` hold a record a line, `.parquet` a record a row; any other file is one document, the row
    `{field: text}`. `.gz` after the name is unpacked. Memory: one record, or 64 rows of Parquet.

    field: the column that a Parquet file must have.
    on_bytes: called with how many more bytes of the files were read.

    Raises:
        InputError: a file cannot be read, unpacked, or is no Parquet; Parquet without `pyarrow`.
    """
    for path in paths:
        kind = (Path(path.stem).suffix if _is_packed(path) else path.suffix).lower()
        try:
            if path.suffix.lower() == ".parquet":
                yield from _parquet(path, field, on_bytes)
            elif kind in (".jsonl", ".ndjson"):
                yield from _json_lines(path, on_bytes)
            else:
                yield _text(path, field, on_bytes)
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


def _text(path: Path, field: str, on_bytes: Callable[[int], None]) -> Record:
    content = gzip.decompress(path.read_bytes()) if _is_packed(path) else path.read_bytes()
    on_bytes(path.stat().st_size)
    try:
        return Record(str(path), {field: content.decode("utf-8-sig")})
    except UnicodeDecodeError:
        return Record(str(path), None, NOT_UTF8)


def _json_lines(path: Path, on_bytes: Callable[[int], None]) -> Iterator[Record]:
    with path.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if _is_packed(path) else raw
        read = 0
        for number, line in enumerate(lines, start=1):
            # of a packed file the place in the packed bytes
            on_bytes(raw.tell() - read)
            read = raw.tell()
            if line.strip():
                yield _json_line(f"{path}:{number}", line)


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
                raise InputError(f"{path} has several columns {twice[0]!r}; right would be one of that name")
            size, total, number = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    on_bytes(size * (number + 1) // total - size * number // total)
                    yield _parquet_row(f"{path}:{number}", columns, values)
                    number += 1
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a whole Parquet file: {error}") from error


def _parquet_row(origin: str, columns: Sequence[str], values: Sequence[Any]) -> Record:
    try:
        return Record(origin, {name: value.as_py() for name, value in zip(columns, values, strict=True)})
    except UnicodeDecodeError:
        return Record(origin, None, NOT_UTF8)
