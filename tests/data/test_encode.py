"""Laws of tokenising: every document that can be used is in the shards as the tokenizer writes it, the rest counted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast

from data.test_chat import CHATML, FORGETFUL, MARKED, STRICT, TALK
from sala.data import Record, Shards, Source, Stream, Summary, encode, write_shards
from sala.data.encode import UNMARKED, surroundings
from sala.data.tokenizer import BEGIN, END
from sala.errors import InputError


def records(*rows: Any) -> Iterator[Record]:
    return (Record(f"a:{number}", row) for number, row in enumerate(rows))


def texts(*values: Any) -> Iterator[Record]:
    return records(*({"text": value} for value in values))


def decoded(shards: Shards, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(shards.read(i)[0].tolist()) for i in range(shards.num_documents)]


@settings(max_examples=12)
@given(values=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=8), size=st.integers(1, 20))
def test_documents_come_back_between_begin_and_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory, values: list[str], size: int
) -> None:
    out = tmp_path_factory.mktemp("encode") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_CHARACTERS", size)
        summary = write_shards(texts(*values), tokenizer, out)
    shards = Shards(out, tokenizer)
    assert decoded(shards, tokenizer) == [f"{BEGIN}{value}{END}" for value in values]
    assert (summary.documents, summary.tokens) == (len(values), shards.num_tokens)
    assert shards.read(0)[1] is None


def test_what_cannot_be_used_is_counted_by_reason(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": " \n"}, {"txt": "a"}, {"text": 3}, {"text": "half \ud83d"}, {"text": "two words"}]
    broken = [Record("b:1", None, "not UTF-8"), *(Record(f"b:{i}", None, "not a JSON object") for i in range(5))]
    summary = write_shards([*records(*rows), *broken], tokenizer, tmp_path / "out")
    assert summary.documents == 2
    assert summary.skipped == {"empty": 1, "without text in 'text'": 2, "not UTF-8": 2, "not a JSON object": 5}
    assert summary.examples["without text in 'text'"] == ["a:2", "a:3"]
    text = str(summary)
    assert "skipped 5 not a JSON object: b:0, b:1, b:2, ..." in text
    assert "skipped 1 empty: a:1" in text
    assert Shards(tmp_path / "out").header["summary"]["skipped"] == summary.skipped


def test_a_summary_counts_lengths_by_powers_of_two() -> None:
    summary = Summary()
    for tokens in (1, 7, 8, 15, 16):
        summary.count(tokens, tokens)
    assert (summary.tokens, summary.longest, summary.lengths) == (47, 16, {2: 1, 8: 1, 16: 2, 32: 1})


def test_nothing_to_use_is_an_error_that_says_why_and_leaves_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no document with 'text' in a\.txt; skipped 1 empty: a:0"):
        write_shards(texts(""), tokenizer, tmp_path / "out", source=["a.txt"])
    with pytest.raises(InputError, match=r"no document with 'text' in a\.parquet; there is no record"):
        write_shards(texts(), tokenizer, tmp_path / "out", source=["a.parquet"])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing_and_may_be_run_again(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 1)

    def interrupted() -> Iterator[Record]:
        yield from texts("one", "two")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tokenizer, tmp_path / "out", shard_tokens=1)
    assert not list(tmp_path.iterdir())
    write_shards(texts("one", "two"), tokenizer, tmp_path / "out")
    assert decoded(Shards(tmp_path / "out"), tokenizer) == [f"{BEGIN}one{END}", f"{BEGIN}two{END}"]


def test_the_same_documents_give_the_same_bytes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_shards(texts("one", "two"), tokenizer, folder)
    assert len({Shards(folder).sha256 for folder in folders}) == 1


def test_records_are_read_a_batch_at_a_time(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 40)
    read = written = 0

    def counted() -> Iterator[Record]:
        nonlocal read
        for record in texts(*["ten letter"] * 40):
            read += 1
            assert read - written <= 4
            yield record

    count = Summary.count

    def note(self: Summary, tokens: int, targets: int) -> None:
        nonlocal written
        written += 1
        count(self, tokens, targets)

    monkeypatch.setattr(Summary, "count", note)
    assert write_shards(counted(), tokenizer, tmp_path / "out").documents == 40


def test_a_tokenizer_that_pads_or_truncates_does_neither(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=20)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=END)
    write_shards(texts("one two three"), other, tmp_path / "out")
    assert decoded(Shards(tmp_path / "out"), tokenizer) == [f"{BEGIN}one two three{END}"]


@pytest.mark.parametrize(
    ("names", "begin", "end"),
    [
        ({"bos_token": BEGIN, "eos_token": END}, [BEGIN], [END]),
        ({"eos_token": END}, [BEGIN], [END]),
        ({}, [BEGIN], []),
    ],
)
def test_documents_end_with_the_end_token_if_there_is_one(
    tokenizer: PreTrainedTokenizerFast, names: dict[str, str], begin: list[str], end: list[str]
) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names)
    assert surroundings(other) == (other.convert_tokens_to_ids(begin), other.convert_tokens_to_ids(end))


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_what_the_assistant_wrote_has_loss(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    summary = write_shards(
        records({"messages": TALK}), tokenizer, tmp_path / "out", column="messages", chat=True, shard_tokens=3
    )
    ids, loss = Shards(tmp_path / "out", tokenizer).read(0)
    assert loss is not None
    assert ids.tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], loss.astype(int), [0]]))).reshape(-1, 2)
    stop = "<|im_end|>\n" if template == CHATML else "\n"
    assert [tokenizer.decode(ids[start:end].tolist()) for start, end in runs] == [f"Hello{stop}", f"  So long \n{stop}"]
    assert summary.targets == loss.sum() < summary.tokens
    assert "tokens with loss" in str(summary)


def test_spaces_of_an_answer_have_loss_where_a_tokenizer_trims_offsets(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # as GPT-2's: a token of spaces alone stands after them, on no character
    backend.post_processor = ByteLevel(trim_offsets=True)
    template = MARKED.replace("\n{% endgeneration %}", "{% endgeneration %}[get]")
    other = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    rows = [{"messages": [*TALK[1:2], {"role": "assistant", "content": "a  b   "}, *TALK[1:2]]}]
    write_shards(records(*rows), other, tmp_path / "out", column="messages", chat=True)
    ids, loss = Shards(tmp_path / "out").read(0)
    assert other.decode(ids[loss].tolist()) == "a  b   "


def test_labels_of_chat_windows_are_the_answers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    rows = [{"messages": TALK[:3]}, {"messages": TALK[3:]}]
    write_shards(records(*rows), tokenizer, tmp_path / "out", column="messages", chat=True)
    shards = Shards(tmp_path / "out")
    batch = next(Stream({"chat": Source(shards)}, {"chat": 1}, length=200, batch=1, steps=1, seed=0))
    labels = batch.labels[batch.labels >= 0].tolist()
    answers = ["Hello<|im_end|>\n", "  So long \n<|im_end|>\n"]
    expected = [answers[piece.document] for piece in batch.pieces[0]]
    assert tokenizer.decode(labels) == "".join(expected)


def test_conversations_that_cannot_be_used_are_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", STRICT)
    values = [TALK[1:3], TALK, TALK[1:2], [], "text", [{"content": "a"}], None]
    rows = records(*({"messages": value} for value in values))
    tools = [{"messages": TALK[1:3], "tools": value} for value in ("[]", [5], {"name": "clock"}, 7, [], None)]
    summary = write_shards([*rows, *records(*tools)], tokenizer, tmp_path / "out", column="messages", chat=True)
    assert summary.documents == 3
    assert summary.skipped == {
        "with tools that are no list of objects": 4,
        "refused by the chat template": 1,
        "without an answer of the assistant": 1,
        "without messages in 'messages'": 4,
    }


def test_special_tokens_spelled_out_in_a_text_are_text_and_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    summary = write_shards(texts(f"one{END}{BEGIN}two", "three", f"{END}"), tokenizer, tmp_path / "out")
    shards = Shards(tmp_path / "out", tokenizer)
    assert decoded(shards, tokenizer)[0] == f"{BEGIN}one{END}{BEGIN}two{END}"
    ends = [shards.read(i)[0].tolist().count(tokenizer.eos_token_id) for i in range(3)]
    assert ends == [1, 1, 1]
    assert "3 special tokens spelled out in the text were read as text" in str(summary)
    header = shards.header
    assert (header["summary"]["spelled"], header["parse_special"]) == (3, False)


def test_special_tokens_spelled_out_in_a_text_are_special_when_asked_for(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    summary = write_shards(texts(f"one{END}{BEGIN}two"), tokenizer, tmp_path / "out", parse_special=True)
    ids, _ = Shards(tmp_path / "out", tokenizer).read(0)
    assert ids.tolist().count(tokenizer.eos_token_id) == 2
    assert "special" not in str(summary)
    assert Shards(tmp_path / "out").header["parse_special"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_special_tokens_in_a_conversation_are_text_and_loss_is_where_it_was(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template.replace("<|im_end|>", END))
    talk = [{"role": "user", "content": f"a{END}b"}, {"role": "assistant", "content": f"c{END} d"}]
    summary = write_shards(records({"messages": talk}), tokenizer, tmp_path / "out", column="messages", chat=True)
    ids, loss = Shards(tmp_path / "out", tokenizer).read(0)
    assert tokenizer.decode(ids[loss].tolist()) == f"c{END} d" + (f"{END}\n" if template == CHATML else "\n")
    assert ids.tolist().count(tokenizer.eos_token_id) == (2 if template == CHATML else 0)
    assert summary.spelled == 2


def test_what_a_template_cannot_mark_is_context_or_skipped_and_never_the_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    lost = [*TALK[1:3], {"role": "user", "content": "more"}]
    rows = records(*({"messages": messages} for messages in (TALK[1:3], TALK, lost, TALK[1:3])))
    summary = write_shards(rows, tokenizer, tmp_path / "out", column="messages", chat=True)
    assert (summary.documents, summary.unmarked) == (3, 1)
    assert summary.examples == {UNMARKED: ["a:2"]}
    ids, loss = Shards(tmp_path / "out", tokenizer).read(1)
    assert tokenizer.decode(ids[loss].tolist()) == "<think></think>  So long \n\n"
    assert "1 answer without loss" in str(summary)


def test_why_a_template_refuses_a_conversation_is_told_with_its_place(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", STRICT)
    rows = records({"messages": TALK}, {"messages": TALK[1:3]})
    summary = write_shards(rows, tokenizer, tmp_path / "out", column="messages", chat=True)
    assert "skipped 1 refused by the chat template: a:0 (begin with the user)" in str(summary)


def test_the_header_is_plain_json(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_shards(texts("one"), tokenizer, tmp_path / "out", source=["a.txt"])
    header = json.loads((tmp_path / "out" / "header.json").read_text())
    assert header["source"] == ["a.txt"]
    assert header["begin"] == [tokenizer.bos_token_id]
    assert header["end"] == [tokenizer.eos_token_id]
    assert header["pad"] == tokenizer.pad_token_id
