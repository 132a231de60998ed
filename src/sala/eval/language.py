"""Short abilities that a conversion must not cost: predicting text, and copying."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sala.data import Mix, Vocabulary

SEED = 91_000


@dataclass(frozen=True, slots=True)
class TextScore:
    """loss: nats a token; accuracy: share of tokens whose most likely prediction was right."""

    tokens: int
    loss: float
    accuracy: float


@torch.no_grad()
def text_loss(
    model: Any, text: NDArray[np.int64], begin: int | None, *, length: int = 512, windows: int = 16
) -> TextScore:
    """Score `model` on `windows` windows of `length` tokens, evenly spread over `text` (tokens,), `begin` before each."""
    loss, hits, total = 0.0, 0, 0
    for tokens_T in text_windows(text, begin, length=length, windows=windows):
        logits_NX = model(input_ids=tokens_T[None], use_cache=False).logits[0, :-1]
        targets_N = tokens_T[1:]
        loss += torch.nn.functional.cross_entropy(logits_NX, targets_N, reduction="sum").item()
        hits += int((logits_NX.argmax(-1) == targets_N).sum())
        total += len(targets_N)
    return TextScore(total, loss / total, hits / total)


def text_windows(text: NDArray[np.int64], begin: int | None, *, length: int, windows: int) -> list[Tensor]:
    """Cut `windows` pieces of `length` tokens, evenly spread over `text` (tokens,), `begin` counted and before each."""
    prefix = [] if begin is None else [begin]
    size = min(length - len(prefix), len(text))
    starts = np.linspace(0, len(text) - size, windows).astype(int)
    return [torch.from_numpy(np.concatenate([prefix, text[start : start + size]]).astype(np.int64)) for start in starts]


@torch.no_grad()
def copy_accuracy(model: Any, vocabulary: Vocabulary, *, length: int = 512, windows: int = 16) -> float:
    """Return the share of repeated symbols that `model` predicts, once a repetition can be told from what came before."""
    mix = Mix({"copy": 1.0}, length, windows, SEED, vocabulary, np.zeros(1, np.int64))
    batch = mix.batch(0)
    tokens_BT = torch.from_numpy(batch.input_ids)
    predicted_BT = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1].argmax(-1)
    asked_BT = torch.from_numpy(batch.loss_weights[:, 1:] >= 1)
    return float((predicted_BT == tokens_BT[:, 1:])[asked_BT].float().mean())
