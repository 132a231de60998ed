"""transformers' Trainer trains, evaluates and predicts with the model as with its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.shapes import tiny_model, tokens

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments

# of unequal length, so that a mean over examples is another number than one over tokens
EXAMPLES = [
    {"input_ids": row[:length], "labels": row[:length]}
    for row, length in zip(tokens(4, 60), (60, 9, 31, 5), strict=True)
]


def padded(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {"input_ids": torch.zeros(len(examples), longest, dtype=torch.long)}
    batch["attention_mask"], batch["labels"] = torch.zeros_like(batch["input_ids"]), batch["input_ids"] - 100
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        batch["input_ids"][row, :length], batch["attention_mask"][row, :length] = example["input_ids"], 1
        batch["labels"][row, :length] = example["labels"]
    return batch


def trainer(folder: Path, **arguments: Any) -> Trainer:
    settings = TrainingArguments(str(folder), use_cpu=True, report_to=[], seed=0, **arguments)
    return Trainer(tiny_model(), settings, train_dataset=EXAMPLES, eval_dataset=EXAMPLES, data_collator=padded)


def token_loss(model: Any) -> Tensor:
    """The mean over all tokens that are predicted, each example by itself."""
    with torch.no_grad():
        losses = [model(e["input_ids"][None], labels=e["labels"][None]).loss * (len(e["labels"]) - 1) for e in EXAMPLES]
    return torch.stack(losses).sum() / sum(len(e["labels"]) - 1 for e in EXAMPLES)


def test_it_evaluates_and_predicts(tmp_path: Path) -> None:
    run = trainer(tmp_path, per_device_eval_batch_size=4)
    expected = float(token_loss(run.model))
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = run.predict(EXAMPLES)
    assert predicted.predictions.shape == (4, 60, 64)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_loss_is_a_mean_over_tokens_however_many_micro_batches_there_are(tmp_path: Path, batch: int) -> None:
    run = trainer(
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
        max_steps=1,
        learning_rate=0.0,
    )
    assert run.model_accepts_loss_kwargs
    assert run.train().training_loss == pytest.approx(float(token_loss(run.model.eval())), rel=1e-5)


def test_it_trains_in_bfloat16_autocast(tmp_path: Path) -> None:
    run = trainer(tmp_path, per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, bf16=True)
    before = float(token_loss(run.model.eval()))
    run.train()
    assert float(token_loss(run.model.eval())) < before
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
