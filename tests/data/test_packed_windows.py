"""A packed window in the model is its documents one by one."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from model.shapes import tiny_model
from sala.data import Record, Shards, Source, Stream, write_shards
from tolerances import assert_close


@pytest.fixture
def source(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Source:
    texts = [f"def f{i}(x):\n" + f"    return x + {i}\n" * (1 + 3 * i % 17) for i in range(12)]
    write_shards([Record(str(i), {"text": text}) for i, text in enumerate(texts)], tokenizer, tmp_path / "out")
    return Source(Shards(tmp_path / "out", tokenizer))


def test_the_loss_of_packed_windows_is_that_of_their_documents_alone(
    tokenizer: PreTrainedTokenizerFast, source: Source
) -> None:
    batch = next(Stream({"code": source}, {"code": 1}, length=100, batch=3, steps=1, seed=0))
    # a document in pieces and padding are there
    assert any(piece.start for pieces in batch.pieces for piece in pieces)
    assert batch.num_tokens < batch.input_ids.size
    model = tiny_model(vocab_size=len(tokenizer)).eval()

    ids, labels = (torch.from_numpy(values).reshape(1, -1) for values in (batch.input_ids, batch.labels))
    packed = model(ids, cu_seqlens=torch.from_numpy(batch.cu_seqlens)).logits
    # the token after it is what a position predicts
    loss = torch.nn.functional.cross_entropy(packed[0, :-1], labels[0, 1:], reduction="sum")

    alone = torch.zeros(())
    for piece in (piece for pieces in batch.pieces for piece in pieces):
        row = torch.from_numpy(source.shards.read(*piece)[0].astype("int64"))
        alone += torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum")
    assert_close(loss, alone)
