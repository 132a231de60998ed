"""Other ways to choose the layers than HALO's score, each with how sure it is and what it costs in tokens of forward passes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sala.convert.align import swapped
from sala.convert.bootstrap import RESAMPLES, Outcomes, bootstrap
from sala.convert.select import Floats, best, importance, shares
from sala.convert.shared import LowerStates

# a forward and a backward pass of a trained gate, in forward passes
TRAINING_PASSES = 3


@dataclass(frozen=True, slots=True)
class Choice:
    """The layers that a method keeps.

    tokens: what it reads, in tokens of forward passes through a whole model. frequency: for every layer, the share of repetitions
    in which it is kept: other items of the same kind, or for gates other seeds.
    """

    method: str
    kept: tuple[int, ...]
    tokens: float
    frequency: tuple[float, ...]


def by_scores(method: str, outcomes: Outcomes, keep: int, tokens: int, *, epsilon: float, seed: int = 0) -> Choice:
    """Return what "halo" or "recall_drop" keeps; tokens: of the items of one candidate."""
    values_L = np.asarray(importance(outcomes.scores, epsilon, method))
    sure = bootstrap(outcomes, keep, method=method, epsilon=epsilon, seed=seed)
    layers = len(values_L)
    return Choice(method, _kept(values_L, keep), tokens * _shared_passes(layers), sure.frequency)


def _shared_passes(layers: int) -> float:
    """Return the passes of all candidates that share the layers below the swapped one (`LowerStates`)."""
    return (layers + 1) / 2 + 1


def _kept(values_L: Floats, keep: int) -> tuple[int, ...]:
    return tuple(sorted(best(values_L, keep).tolist()))


@torch.no_grad()
def kl_guided(teacher: Any, mixers: Sequence[nn.Module], windows: Sequence[Tensor], keep: int, seed: int = 0) -> Choice:
    """Keep the layers whose exchange alone takes the model furthest from the teacher: KL(teacher || M_i), on `windows` (T,) each."""
    states, targets = LowerStates(), _log_probs(teacher, windows)
    rows = []
    for layer, mixer in enumerate(mixers):
        with swapped(teacher, {layer: mixer}), states.below(teacher, layer):
            rows.append(_divergences(teacher, windows, targets))
    divergence_LW = np.stack(rows)
    rng = np.random.default_rng(seed)
    times_NW = rng.multinomial(len(windows), np.full(len(windows), 1 / len(windows)), size=RESAMPLES)
    frequency_L = shares(times_NW @ divergence_LW.T, keep).mean(axis=0)
    tokens = sum(map(len, windows)) * (1 + _shared_passes(len(mixers)))
    return Choice("kl", _kept(divergence_LW.mean(axis=1), keep), tokens, tuple(frequency_L.tolist()))


@torch.no_grad()
def greedy(
    teacher: Any, mixers: Sequence[nn.Module], windows: Sequence[Tensor], keep: int, seed: int = 0, resamples: int = 20
) -> Choice:
    """Exchange one layer after the other, each time the one that costs least KL given those exchanged before.

    Source: Distill-then-Replace's greedy replacement with re-scoring. tokens are those of the choice itself: the
    resamples, which ask for few new sets, are not counted.
    """
    targets = _log_probs(teacher, windows)
    known: dict[frozenset[int], Floats] = {}

    def cost(layers: frozenset[int]) -> Floats:
        if layers not in known:
            with swapped(teacher, {layer: mixers[layer] for layer in layers}):
                known[layers] = _divergences(teacher, windows, targets)
        return known[layers]

    def remaining(weights_W: Floats) -> tuple[int, ...]:
        exchanged: frozenset[int] = frozenset()
        while len(mixers) - len(exchanged) > keep:
            left = [layer for layer in range(len(mixers)) if layer not in exchanged]
            exchanged |= {min(left, key=lambda layer: float(cost(exchanged | {layer}) @ weights_W))}
        return tuple(layer for layer in range(len(mixers)) if layer not in exchanged)

    kept = remaining(np.ones(len(windows)))
    tokens = sum(map(len, windows)) * (1 + len(known))
    rng = np.random.default_rng(seed)
    times = np.zeros(len(mixers))
    for weights_W in rng.multinomial(len(windows), np.full(len(windows), 1 / len(windows)), size=resamples):
        times[list(remaining(weights_W.astype(float)))] += 1
    return Choice("greedy", kept, tokens, tuple((times / resamples).tolist()))


class _Gated(nn.Module):
    """Both mixers of a layer, of which a gate in (0, 1) takes the attention's share."""

    def __init__(self, attention: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.attention, self.linear = attention, linear
        self.logit = nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD: Tensor, rows: Any, cache: Any = None) -> Tensor:
        share = self.logit.sigmoid()
        return share * self.attention(x_BTD, rows) + (1 - share) * self.linear(x_BTD, rows)


def joint_gates(
    teacher: Any,
    mixers: Sequence[nn.Module],
    loss: Callable[[Any, int, int], tuple[Tensor, int]],
    keep: int,
    *,
    steps: int = 60,
    rate: float = 0.1,
    penalty: float = 1.0,
    seeds: Sequence[int] = (0, 1, 2),
) -> Choice:
    """Train one gate a layer, both branches frozen, and keep the layers whose gates stay most open; all seeds vote by their mean.

    Args:
        loss: (model, seed, step) -> the loss of a batch on which attention is needed, and the tokens that it read.
        penalty: of the mean gate, which pulls every layer towards its linear branch.

    Source: FlashMorph (arXiv 2606.30562): one gate a layer, trained on synthetic retrieval with a penalty that linearises.
    """
    gates, tokens = [], 0
    for seed in seeds:
        gated = {i: _Gated(layer.self_attn, mixers[i]) for i, layer in enumerate(teacher.model.layers)}
        logits: list[Tensor] = [gated[layer].logit for layer in range(len(mixers))]
        optimizer = torch.optim.AdamW(logits, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        with _frozen(teacher, mixers), swapped(teacher, gated):
            for step in range(steps):
                optimizer.zero_grad()
                missed, read = loss(teacher, seed, step)
                (missed + penalty * torch.stack(logits).sigmoid().mean()).backward()
                optimizer.step()
                tokens += TRAINING_PASSES * read
        gates.append([logit.item() for logit in logits])
    gates_SL = np.asarray(gates)
    frequency_L = shares(gates_SL, keep).mean(axis=0)
    return Choice("gates", _kept(gates_SL.mean(axis=0), keep), tokens, tuple(frequency_L.tolist()))


@contextmanager
def _frozen(teacher: Any, mixers: Sequence[nn.Module]) -> Iterator[None]:
    parameters = [*teacher.parameters(), *(p for mixer in mixers for p in mixer.parameters())]
    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, own in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(own)


def _log_probs(model: Any, windows: Sequence[Tensor]) -> list[Tensor]:
    return [model(ids_T[None], use_cache=False).logits[0].float().log_softmax(dim=-1) for ids_T in windows]


def _divergences(model: Any, windows: Sequence[Tensor], targets: Sequence[Tensor]) -> Floats:
    """Return KL(teacher || model) of every window (W,), in nats a token."""
    said = zip(targets, _log_probs(model, windows), strict=True)
    return np.array([(p.exp() * (p - q)).sum(dim=-1).mean().item() for p, q in said])


def as_rows(choices: Sequence[Choice]) -> list[Mapping[str, Any]]:
    """Return the choices as plain rows of a table."""
    return [
        {"method": c.method, "kept": list(c.kept), "tokens": round(c.tokens), "frequency": list(c.frequency)}
        for c in choices
    ]
