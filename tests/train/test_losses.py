"""Losses are the whole loss: chunked equals whole, gradient reaches every token, and logits never exist at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.train import losses
from sala.train.losses import Head

B, T, D, X = 2, 9, 6, 11
DIVISOR = 2.0
# largest error as a part of the largest number
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
CHUNKS = pytest.mark.parametrize("chunk", [1, 4, 5, 17, 18, 100])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def weights_of(kind: str) -> Tensor | None:
    weights_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(3))
    # 0/1 as padding or the user's side of a chat, else any
    return {"none": None, "mask": (weights_BT > 0.4).float(), "weights": weights_BT}[kind]


def assert_same(ours: list[Tensor], whole: list[Tensor], dtype: torch.dtype) -> None:
    for value, expected in zip(ours, whole, strict=True):
        assert value.dtype == expected.dtype
        assert (value - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


def whole_divergence(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, weights: Tensor) -> Tensor:
    target = (teacher / DIVISOR @ teacher_head.T).detach().softmax(-1)
    own = (student / DIVISOR @ head.T).log_softmax(-1)
    return ((target * (target.log() - own)).sum(-1) * weights).sum() / weights.sum()


def whole_cross_entropy(hidden: Tensor, head: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    logits = (hidden / DIVISOR @ head.T)[:, :-1].flatten(0, 1)
    each = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return (each * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


@DTYPES
@CHUNKS
@pytest.mark.parametrize("kind", ["none", "mask", "weights"])
def test_chunked_distillation_is_the_whole_divergence(dtype: torch.dtype, chunk: int, kind: str) -> None:
    student, head = drawn(B, T, D, dtype=dtype), drawn(X, D, dtype=dtype, seed=1)
    teacher, teacher_head = drawn(B, T, D + 1, dtype=dtype, seed=2), drawn(X, D + 1, dtype=dtype, seed=3)
    weights = weights_of(kind)
    loss = losses.distill(student, Head(head, DIVISOR), teacher, Head(teacher_head, DIVISOR), weights, chunk=chunk)
    everywhere = torch.ones(B, T) if weights is None else weights
    whole = whole_divergence(student, head, teacher, teacher_head, everywhere.to(dtype))
    # of three times the loss: the backward pass must scale
    ours = [loss, *torch.autograd.grad(3 * loss, [student, head])]
    assert_same(ours, [whole, *torch.autograd.grad(3 * whole, [student, head])], dtype)


@DTYPES
@CHUNKS
@pytest.mark.parametrize("kind", ["none", "mask", "weights"])
def test_chunked_next_token_is_the_whole_cross_entropy(dtype: torch.dtype, chunk: int, kind: str) -> None:
    hidden, head = drawn(B, T, D, dtype=dtype), drawn(X, D, dtype=dtype, seed=1)
    ids = torch.randint(X, (B, T), generator=torch.Generator().manual_seed(2))
    weights = weights_of(kind)
    loss = next_token(hidden, Head(head, DIVISOR), ids, weights, chunk=chunk)
    everywhere = torch.ones(B, T) if weights is None else weights
    whole = whole_cross_entropy(hidden, head, ids, everywhere.to(dtype))
    ours = [loss, *torch.autograd.grad(3 * loss, [hidden, head])]
    assert_same(ours, [whole, *torch.autograd.grad(3 * whole, [hidden, head])], dtype)


def next_token(hidden: Tensor, head: Head, ids: Tensor, weights: Tensor | None = None, *, chunk: int) -> Tensor:
    """Return the loss of windows of ids, whose tokens are targets by `weights`."""
    weights = torch.ones(ids.shape) if weights is None else weights
    return losses.next_token(hidden, head, losses.following(ids), losses.following(weights), chunk=chunk)


def both(student: Tensor, weights: Tensor | None = None, chunk: int = 4, head: Tensor | None = None) -> list[Tensor]:
    """Return the distillation and the next-token loss of the same states."""
    head = drawn(X, D, seed=1).detach() if head is None else head
    ids = torch.randint(X, (B, T), generator=torch.Generator().manual_seed(2))
    teacher, teacher_head = drawn(B, T, D, seed=2), drawn(X, D, seed=3)
    return [
        losses.distill(student, Head(head), teacher, Head(teacher_head), weights, chunk=chunk),
        next_token(student, Head(head), ids, weights, chunk=chunk),
    ]


@CHUNKS
def test_gradient_reaches_every_token(chunk: int) -> None:
    # HALO's released loop went over every 512th chunk, so that eleven tokens in twelve had no gradient
    student = drawn(B, T, D)
    of_distillation, of_next_token = (torch.autograd.grad(loss, student)[0] for loss in both(student, chunk=chunk))
    assert (of_distillation.abs().amax(-1) > 0).all()
    assert (of_next_token.abs().amax(-1)[:, :-1] > 0).all()


def test_padding_contributes_nothing_whatever_it_holds() -> None:
    weights = torch.ones(B, T)
    weights[:, 6:] = 0
    clean, padded = drawn(B, T, D), drawn(B, T, D).detach()
    padded[:, 6:] = torch.nan
    padded.requires_grad_()
    for ours, expected in zip(both(padded, weights), both(clean, weights), strict=True):
        assert torch.equal(ours, expected)
        (gradient,) = torch.autograd.grad(ours, padded)
        assert gradient[:, 6:].abs().max() == 0
        assert torch.equal(gradient, torch.autograd.grad(expected, clean)[0])


def test_an_id_that_is_ignored_need_not_be_in_the_vocabulary() -> None:
    ids, weights = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T)
    ids[:, 4], weights[:, 4] = -100, 0
    assert next_token(drawn(B, T, D), Head(drawn(X, D)), ids, weights, chunk=4).isfinite()


def test_a_weight_belongs_to_the_target() -> None:
    weights = torch.ones(B, T)
    weights[:, 4] = 0
    student = drawn(B, T, D)
    (gradient,) = torch.autograd.grad(both(student, weights)[1], student)
    # the token before it predicts it
    assert gradient[:, 3].abs().max() == 0
    assert gradient[:, 4].abs().max() > 0


def test_a_part_without_weight_adds_nothing() -> None:
    student = drawn(B, T, D)
    for loss in both(student, torch.zeros(B, T)):
        assert loss == 0
        assert torch.autograd.grad(loss, student)[0].abs().max() == 0
    real = torch.zeros(B, T, dtype=torch.bool)
    loss, sizes = losses.align([(student, drawn(B, T, D, seed=1))], real)
    assert loss == 0 and sizes.tolist() == [[0], [0]]


def test_alignment_leaves_padding_out() -> None:
    real = torch.ones(B, T, dtype=torch.bool)
    real[:, 5:] = False
    student, teacher = drawn(B, T, D).detach(), drawn(B, T, D, seed=1).detach()
    padded = student.clone()
    padded[:, 5:] = 1e30
    padded.requires_grad_()
    loss, sizes = losses.align([(padded, teacher)], real)
    expected = losses.align([(student[:, :5], teacher[:, :5])])
    torch.testing.assert_close((loss, sizes), expected)
    assert torch.autograd.grad(loss, padded)[0][:, 5:].abs().max() == 0


def test_a_frozen_head_has_no_gradient_and_no_gradient_is_made_without_need() -> None:
    head, student = drawn(X, D), drawn(B, T, D)
    for loss in both(student, head=head.detach()):
        loss.backward()
    assert student.grad is not None
    for loss in both(student.detach(), head=head):
        loss.backward()
    assert head.grad is not None
    with torch.no_grad():
        assert not any(loss.requires_grad for loss in both(student, head=head))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("which", [0, 1])
def test_logits_of_all_tokens_never_exist_at_once(which: int) -> None:
    tokens, chunk, width, vocabulary = 256, 8, 4, 512
    hidden, head = drawn(1, tokens, width), drawn(vocabulary, width, seed=1)
    ids = torch.randint(vocabulary, (1, tokens))
    losses_of: list[Callable[[], Tensor]] = [
        lambda: losses.distill(hidden, Head(head), hidden * 2, Head(head), chunk=chunk),
        lambda: next_token(hidden, Head(head), ids, chunk=chunk),
    ]
    with Largest() as largest:
        losses_of[which]().backward()
    assert largest.numel == chunk * vocabulary


def test_equal_models_have_no_divergence() -> None:
    hidden, head = drawn(B, T, D), drawn(X, D, seed=1)
    assert losses.distill(hidden, Head(head), hidden, Head(head), chunk=4).item() == pytest.approx(0, abs=1e-6)


def test_bfloat16_states_have_float32_losses() -> None:
    hidden, head = drawn(B, T, D).detach().bfloat16().requires_grad_(), drawn(X, D, seed=1).detach().bfloat16()
    head.requires_grad_()
    ids = torch.randint(X, (B, T), generator=torch.Generator().manual_seed(2))
    loss = next_token(hidden, Head(head), ids, chunk=4)
    whole = next_token(hidden.float(), Head(head.float()), ids, chunk=100)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(whole.item(), rel=2e-2)
    assert [g.dtype for g in torch.autograd.grad(loss, [hidden, head])] == [torch.bfloat16] * 2


def test_a_head_is_the_head_of_the_model() -> None:
    torch.manual_seed(0)
    config = MiniCPMSALAConfig(
        vocab_size=X, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, dim_model_base=8
    )
    model = MiniCPMSALAForCausalLM(config)
    hidden = drawn(3, 16)
    assert model.logits_divisor == 2
    assert torch.equal(Head(model.lm_head.weight, model.logits_divisor).logits(hidden), model.logits(hidden))


def test_alignment_is_the_mean_over_layers_and_reports_each() -> None:
    teacher = [torch.randn(B, T, D) * scale for scale in (1.0, 10.0)]
    pairs = [(torch.zeros(B, T, D), teacher[0]), (teacher[1] * 0.5, teacher[1])]
    loss, (errors, sizes) = losses.align(pairs)
    expected = (teacher[0].square().mean() + (teacher[1] * 0.5).square().mean()) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(errors / sizes, torch.tensor([1.0, 0.25]))


def test_alignment_never_moves_the_teacher() -> None:
    student, teacher = (torch.randn(B, T, D, requires_grad=True) for _ in range(2))
    losses.align([(student, teacher)])[0].backward()
    assert teacher.grad is None
    assert student.grad is not None
