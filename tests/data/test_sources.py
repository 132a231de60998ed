"""Laws of the documents."""

import pytest

from sala.data import Document, concatenate, library_documents
from sala.data.sources import split_of
from sala.errors import InputError

SPLITS = {"ast.py": "train", "json/decoder.py": "train", "typing.py": "train", "abc.py": "test"}


def test_splits_share_no_document_and_each_has_some() -> None:
    names = {split: {d.name for d in library_documents(split)} for split in ("train", "valid", "test")}
    assert all(names.values())
    assert not names["train"] & names["test"]
    assert not names["train"] & names["valid"]
    assert not names["valid"] & names["test"]


def test_the_split_of_a_name_is_the_same_on_every_machine() -> None:
    assert {name: split_of(name) for name in ("ast.py", "json/decoder.py", "typing.py", "abc.py")} == SPLITS


def test_documents_come_in_the_order_of_their_names_whole() -> None:
    documents = library_documents("valid")
    assert [d.name for d in documents] == sorted(d.name for d in documents)
    assert min(len(d.text) for d in documents) >= 256


def test_tests_tables_and_installed_packages_are_left_out() -> None:
    for document in library_documents("test"):
        assert not {"site-packages", "test", "tests", "encodings"} & set(document.name.split("/")[:-1])


def test_a_concatenation_names_every_document() -> None:
    assert concatenate([Document("a.py", "x = 1"), Document("b.py", "y = 2")]) == "# a.py\nx = 1\n\n# b.py\ny = 2"


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="'dev' is unknown; one of train, valid, test"):
        library_documents("dev")  # type: ignore[arg-type]
