"""Laws of reading records: every format gives the same rows, and what is broken is counted or named."""

import gzip
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sala.data import Files, Record, find_files, open_dataset, read_dataset, read_files
from sala.errors import InputError

ROWS = [{"text": f"document {i} – é😀", "tools": None} for i in range(150)]


def write_lines(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
    return path


WRITERS = {
    **dict.fromkeys(("a.jsonl", "a.ndjson", "a.jsonl.gz", "A.JSONL", "A.JSONL.GZ"), write_lines),
    **dict.fromkeys(("a.parquet", "A.PARQUET"), write_parquet),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_and_counts_its_bytes(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name)
    sizes: list[int] = []
    records = list(read_files([path], on_bytes=sizes.append))
    assert [record.row for record in records] == ROWS
    assert len({record.origin for record in records}) == len(ROWS)
    assert sum(sizes) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.txt", "a.py", "noname", "a.txt.gz", "A.TXT.GZ"])
def test_any_other_file_is_one_document(tmp_path: Path, name: str) -> None:
    content = "first\n\n{second}\n".encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    records = list(read_files([tmp_path / name], field="body"))
    assert records == [Record(str(tmp_path / name), {"body": "first\n\n{second}\n"})]


def test_broken_lines_are_told_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\n\n{"text": \n\xff\xfe\n[1]\n"a"\n' + b"[" * 100_000 + b'\n{"text": "b"}'
        b'\n{"text": "c", "id": ' + b"9" * 5000 + b"}"
    )
    records = list(read_files([path]))
    problems = {int(record.origin.rpartition(":")[2]): record.problem for record in records}
    wrong = "not a JSON object"
    assert problems == {1: None, 3: wrong, 4: "not UTF-8", 5: wrong, 6: wrong, 7: wrong, 8: None, 9: wrong}


def test_a_file_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    assert [record.problem for record in read_files([tmp_path / "a.txt"])] == ["not UTF-8"]


def test_a_file_with_a_zero_byte_is_binary(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"PK\0\0")
    assert [record.problem for record in read_files([tmp_path / "a.bin"])] == ["binary (with a zero byte)"]


def test_a_name_that_is_no_unicode_is_shown_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_text("{\n")
    assert [record.origin for record in read_files(find_files([tmp_path]).paths)] == [f"{tmp_path}/\ufffd.jsonl:1"]


def test_files_of_a_folder_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.json", ".hidden", "a/.git/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_files([tmp_path]).paths == (tmp_path / "a/c.json", tmp_path / "b.txt")


def test_a_source_that_is_missing_empty_or_ambiguous_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file or folder .*nowhere"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="holds no files"):
        find_files([tmp_path])
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match=r"may be one document or many records"):
        find_files([tmp_path / "a.json"])


def test_links_are_not_followed_out_of_a_folder_and_are_counted(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
        (folder / "a.txt").write_text(folder.name)
    (inside / "secret.txt").symlink_to(outside / "a.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "again.txt").symlink_to(inside / "a.txt")
    (inside / "loop").symlink_to(inside)
    (inside / "itself").symlink_to("itself")
    (inside / "broken").symlink_to("nowhere")
    assert find_files([inside]) == Files((inside / "a.txt",), links=3)
    # what is named is read
    assert find_files([inside / "secret.txt"]).paths == (inside / "secret.txt",)
    assert find_files([inside / "folder"]).paths == (inside / "folder" / "a.txt",)


def test_a_folder_of_links_that_lead_out_says_so(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "inside" / "a.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"holds no files \(0 hidden files and 1 links passed over\)"):
        find_files([tmp_path / "inside"])


def test_a_link_inside_a_folder_to_a_hidden_file_of_it_is_read(tmp_path: Path) -> None:
    (tmp_path / ".blobs").mkdir()
    (tmp_path / ".blobs" / "1").write_text("a")
    (tmp_path / "a.txt").symlink_to(".blobs/1")
    assert find_files([tmp_path]) == Files((tmp_path / "a.txt",))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"closed' cannot be read: Permission denied"):
        find_files([tmp_path])


def test_a_name_that_the_system_refuses_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        find_files(["a" * 5000])
    with pytest.raises(InputError, match="no file or folder '~nobody-of-this-name/a'"):
        find_files(["~nobody-of-this-name/a"])


@contextmanager
def pipe(path: Path, content: bytes) -> Iterator[Path]:
    """A FIFO at `path` that somebody writes `content` into."""
    os.mkfifo(path)
    writer = Thread(target=path.write_bytes, args=(content,))
    writer.start()
    yield path
    writer.join()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_pipe_gives_the_rows_of_a_file_and_counts_its_bytes(tmp_path: Path, name: str) -> None:
    content = write_lines(tmp_path / name).read_bytes()
    sizes: list[int] = []
    (tmp_path / "pipe").mkdir()
    with pipe(tmp_path / "pipe" / name, content) as path:
        assert find_files([path]).paths == (path,)
        assert [record.row for record in read_files([path], on_bytes=sizes.append)] == ROWS
    assert sum(sizes) == len(content)


def test_a_pipe_without_a_name_is_a_document_unless_a_format_is_given(tmp_path: Path) -> None:
    with pipe(tmp_path / "62", b"a\n{}\n") as path:
        assert [record.row for record in read_files([path])] == [{"text": "a\n{}\n"}]
    content = write_lines(tmp_path / "a.jsonl").read_bytes()
    with pipe(tmp_path / "63", content) as path:
        assert [record.row for record in read_files([path], format="text")] == [{"text": content.decode()}]
    with pipe(tmp_path / "64", content) as path:
        assert [record.row for record in read_files([path], format="jsonl")] == ROWS


def test_a_pipe_of_records_without_a_format_is_refused(tmp_path: Path) -> None:
    with (
        pipe(tmp_path / "63", write_lines(tmp_path / "a.jsonl").read_bytes()) as path,
        pytest.raises(InputError, match="63 is a pipe whose first line is a JSON object; expected its format, jsonl"),
    ):
        list(read_files([path]))


def test_a_format_that_is_given_is_believed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.json")
    assert find_files([path], format="jsonl").paths == (path,)
    assert [record.row for record in read_files([path], format="jsonl")] == ROWS
    assert len(list(read_files([path], format="text"))) == 1
    for use in (find_files, lambda paths, format: list(read_files(paths, format=format))):
        with pytest.raises(InputError, match=r"format 'json' is unknown; expected one of .*did you mean 'jsonl'"):
            use([path], format="json")


def test_a_device_is_refused() -> None:
    with pytest.raises(InputError, match="/dev/zero' is a device or a socket; expected a file, a folder or a pipe"):
        find_files(["/dev/zero"])


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        list(read_files([path]))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt cannot be read: No such file"):
        list(read_files([tmp_path / "gone.txt"]))


def test_parquet_without_its_column_names_the_nearest(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"has no column 'texts', only text, tools; did you mean 'text'"):
        list(read_files([path], field="texts"))


def test_parquet_with_two_columns_of_a_name_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has several columns 'text'"):
        list(read_files([tmp_path / "a.parquet"]))


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet is not a whole Parquet file"):
        list(read_files([path]))


def test_parquet_strings_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array([b"ab", b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert [record.problem for record in read_files([tmp_path / "a.parquet"])] == [None, "not UTF-8"]


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_an_optional_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"pyarrow": "parquet", "datasets": "datasets"}[package]
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=rf"pip install 'sala\[{extra}\]'"):
        list(read_files([tmp_path / "a.parquet"])) if package == "pyarrow" else open_dataset("somewhere")


def test_a_data_set_in_memory_and_its_stream_give_their_rows() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    for rows in (data, data.to_iterable_dataset()):
        records = list(read_dataset(rows, "mine"))
        assert [record.row for record in records] == ROWS
        assert records[3].origin == "mine:3"


def test_a_data_set_of_a_folder_is_streamed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl")
    rows = open_dataset(str(tmp_path / "set"))
    assert isinstance(rows, datasets.IterableDataset)
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("split", ["train", "tarin"])
def test_a_data_set_that_cannot_be_had_is_refused(tmp_path: Path, split: str) -> None:
    pytest.importorskip("datasets")
    if split != "train":
        write_lines(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match=f"split '{split}' cannot be opened"):
        open_dataset(str(tmp_path), split=split)
