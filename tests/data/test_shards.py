"""Laws of tokenised shards: what was written is read, whole or not at all, and damage is named."""

import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.documents import make_shards, tokens_of
from sala.data import Shards, load_tokenizer, tokenizer_hash, train_tokenizer
from sala.data.shards import shard_writer
from sala.data.sources import Document
from sala.errors import InputError
from train.ranks import PROCESSES

LENGTHS = [3, 1, 9, 2, 2, 30, 1]


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), shard_tokens=st.integers(1, 60), loss=st.booleans()
)
def test_documents_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, loss: bool
) -> None:
    shards = make_shards(tmp_path_factory.mktemp("shards") / "out", lengths, shard_tokens, with_loss=loss)
    assert (shards.num_documents, shards.num_tokens) == (len(lengths), sum(lengths))
    assert shards.lengths(np.arange(len(lengths))).tolist() == lengths
    for document, length in enumerate(lengths):
        ids, targets = shards.read(document)
        assert (ids == tokens_of(document, length)).all()
        assert (targets is None) if not loss else (targets == (tokens_of(document, length) % 2 == 0)).all()
    # a shard ends after the document that fills it
    assert all(shard.tokens >= shard_tokens for shard in shards.shards[:-1])
    shards.verify()


def test_a_part_of_a_document_is_read_alone(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "out", LENGTHS, shard_tokens=8)
    assert (shards.read(5, 4, 11)[0] == tokens_of(5, 30)[4:11]).all()


def test_a_document_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="document 7 is not in .* it holds 0 to 6"):
        make_shards(tmp_path / "out", LENGTHS).read(7)


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "loss-00000.bin", "documents.bin"])
def test_a_corrupt_shard_is_named(tmp_path: Path, name: str) -> None:
    shards = make_shards(tmp_path / "out", LENGTHS, shard_tokens=8, with_loss=True)
    damaged(tmp_path / "out" / name)
    with pytest.raises(InputError, match=f"{name} is corrupt"):
        shards.verify()


def test_a_truncated_shard_is_named_when_opened(tmp_path: Path) -> None:
    make_shards(tmp_path / "out", LENGTHS, shard_tokens=8)
    path = tmp_path / "out" / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"tokens-00001\.bin has \d+ bytes; expected"):
        Shards(tmp_path / "out")
    path.unlink()
    with pytest.raises(InputError, match=r"tokens-00001\.bin is missing"):
        Shards(tmp_path / "out")


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ('{"format": "other"}', "not of format")])
def test_a_header_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "header.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Shards(tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder of shards"):
        Shards(tmp_path)


def test_a_tokenizer_is_known_by_what_it_does(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)


def test_a_tokenizer_that_does_not_match_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    other = train_tokenizer([Document("a", "another text " * 9)], vocab_size=300)
    make_shards(tmp_path / "out", LENGTHS, sha256=tokenizer_hash(tokenizer))
    Shards(tmp_path / "out", tokenizer)
    with pytest.raises(InputError, match="was tokenised with another tokenizer"):
        Shards(tmp_path / "out", other)


def test_equal_words_that_split_text_otherwise_are_another_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["merges"] = values["model"]["merges"][::-1]
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(values))
    reversed_merges = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert reversed_merges.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_hash(reversed_merges) != tokenizer_hash(tokenizer)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), shard_writer(tmp_path / "out") as writer:
        writer.add(tokens_of(0, 5))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def write_and_die(out: Path) -> None:
    with shard_writer(out) as writer:
        writer.add(tokens_of(0, 5))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_leaves_no_shards_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = PROCESSES.Process(target=write_and_die, args=(out,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1
    make_shards(out, LENGTHS).verify()
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_leaves_another_one_alone_that_is_at_work(tmp_path: Path) -> None:
    with shard_writer(tmp_path / "out") as writer:
        writer.add(tokens_of(0, 5))
        with pytest.raises(ZeroDivisionError), shard_writer(tmp_path / "out"):
            1 / 0  # noqa: B018
        writer.finish({})
    assert (tmp_path / "out" / "header.json").is_file()


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "out", LENGTHS)
    with pytest.raises(InputError, match="exists already"):
        make_shards(tmp_path / "out", LENGTHS)


def sum_of_tokens(folder: Path) -> int:
    shards = Shards(folder)
    return sum(int(shards.read(document)[0].sum()) for document in range(shards.num_documents))


def test_several_processes_read_at_once(tmp_path: Path) -> None:
    make_shards(tmp_path / "out", LENGTHS, shard_tokens=8)
    with ProcessPoolExecutor(2, PROCESSES) as processes:
        sums = list(processes.map(sum_of_tokens, [tmp_path / "out"] * 4))
    assert sums == [sum(int(tokens_of(d, n).sum()) for d, n in enumerate(LENGTHS))] * 4
