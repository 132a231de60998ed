"""Documents end to end in one row, as transformers' padding-free collators give them, are documents alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from model.shapes import tiny_model, tokens
from sala.errors import InputError
from sala.model import new_cache

LENGTHS = (40, 1, 23, 66)
ENDS = torch.tensor([0, 40, 41, 64, 130])
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
NUMBERS = torch.cat([torch.full((length,), number) for number, length in enumerate(LENGTHS)])[None]
MARKS: dict[str, dict[str, Any]] = {
    "cu_seqlens": {"cu_seqlens": ENDS},
    "position_ids": {"position_ids": POSITIONS},
    "seq_idx": {"seq_idx": NUMBERS.int()},
    "flash": {"cu_seq_lens_q": ENDS.int(), "cu_seq_lens_k": ENDS.int(), "max_length_q": 66, "max_length_k": 66},
    "all": {"position_ids": POSITIONS, "seq_idx": NUMBERS, "cu_seq_lens_q": ENDS, "cu_seqlens": ENDS},
}


def documents() -> list[Tensor]:
    return list(tokens(1, 130).split(LENGTHS, dim=1))


def loss_alone(model: Any, parts: list[Tensor]) -> Tensor:
    losses = [model(part, labels=part).loss * (part.shape[1] - 1) for part in parts if part.shape[1] > 1]
    return torch.stack(losses).sum() / sum(part.shape[1] - 1 for part in parts)


@pytest.mark.parametrize("mark", MARKS)
@torch.no_grad()
def test_every_mark_of_documents_separates_them(mark: str) -> None:
    model, ids = tiny_model(), tokens(1, 130)
    alone = torch.cat([model(part).logits for part in documents()], dim=1)
    torch.testing.assert_close(model(ids, **MARKS[mark]).logits, alone, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        model.logits(model.model(ids, **MARKS[mark]).last_hidden_state), alone, atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("mark", MARKS)
@torch.no_grad()
def test_labels_never_cross_documents(mark: str) -> None:
    model, ids = tiny_model(), tokens(1, 130)
    expected = loss_alone(model, documents())
    torch.testing.assert_close(model(ids, labels=ids, **MARKS[mark]).loss, expected)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted, **MARKS[mark]).loss, expected)


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
@torch.no_grad()
def test_a_flattened_batch_is_its_rows(options: dict[str, bool]) -> None:
    model, parts = tiny_model(), documents()
    batch = DataCollatorWithFlattening(**options)([{"input_ids": part[0].tolist()} for part in parts])
    torch.testing.assert_close(model(**batch).loss, loss_alone(model, parts))


@torch.no_grad()
def test_the_loss_is_divided_by_the_items_of_all_micro_batches() -> None:
    model, ids = tiny_model(), tokens(1, 130)
    ours = model(ids, labels=ids, cu_seqlens=ENDS, num_items_in_batch=torch.tensor(500)).loss
    torch.testing.assert_close(ours * 500, loss_alone(model, documents()) * (130 - 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": ENDS, "cu_seq_lens_k": torch.tensor([0, 130])}, "cu_seq_lens_k marks .* those of cu_seqlens"),
        ({"cu_seqlens": ENDS, "seq_idx": NUMBERS * 0}, "seq_idx marks"),
        ({"position_ids": POSITIONS + 1}, "position_ids are 1 at token 0 of row 0; expected 0"),
        ({"position_ids": POSITIONS.clamp(max=30)}, "position_ids"),
        ({"seq_idx": NUMBERS, "attention_mask": torch.ones(1, 130)}, "a mask"),
        ({"seq_idx": NUMBERS[:, :20]}, "seq_idx of shape"),
        ({"cu_seq_lens_q": torch.tensor([0, 40, 131])}, "the ends of documents"),
    ],
)
def test_marks_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_model()(tokens(1, 130), **options)


def test_documents_are_marked_in_one_row_without_a_cache() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=r"position_ids of shape \(2, 130\) marks documents"):
        model(tokens(2, 130), position_ids=POSITIONS.expand(2, -1))
    with pytest.raises(InputError, match="packed into one row with a cache"):
        model(tokens(1, 130), seq_idx=NUMBERS, cache=new_cache(model.config))
