"""Losses are the whole loss: chunked equals whole, and gradient reaches every token."""

import pytest
import torch
from torch.nn import functional as F

from sala.train import losses

B, T, D, X = 2, 9, 6, 11


def heads() -> tuple[torch.nn.Linear, torch.nn.Linear]:
    torch.manual_seed(0)
    return torch.nn.Linear(D, X, bias=False), torch.nn.Linear(D, X, bias=False)


@pytest.mark.parametrize("chunk", [1, 4, 5, 17, 18, 100])
def test_chunked_distillation_is_the_whole_divergence(chunk: int) -> None:
    student_head, teacher_head = heads()
    teacher_BTD = torch.randn(B, T, D)
    student_BTD = torch.randn(B, T, D, requires_grad=True)
    weights_BT = torch.rand(B, T)
    loss = losses.distill(student_BTD, student_head, teacher_BTD, teacher_head, weights_BT, chunk=chunk)
    gradients = torch.autograd.grad(loss, [student_BTD, student_head.weight])

    target = teacher_head(teacher_BTD).detach().double().softmax(-1)
    own = student_head(student_BTD).double().log_softmax(-1)
    divergence_BT = (target * (target.log() - own)).sum(-1)
    whole = (divergence_BT * weights_BT).sum() / weights_BT.sum()
    torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(whole, [student_BTD, student_head.weight]), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 16, 100])
def test_chunked_next_token_is_the_whole_cross_entropy(chunk: int) -> None:
    head, _ = heads()
    hidden_BTD = torch.randn(B, T, D, requires_grad=True)
    ids_BT = torch.randint(X, (B, T))
    weights_BT = torch.rand(B, T)
    loss = losses.next_token(hidden_BTD, head, ids_BT, weights_BT, chunk=chunk)
    each = F.cross_entropy(head(hidden_BTD)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    whole = (each * weights_BT[:, 1:].flatten()).sum() / weights_BT[:, 1:].sum()
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden_BTD)[0] for value in (loss, whole)))


@pytest.mark.parametrize("chunk", [2, 5, 100])
def test_gradient_reaches_every_token(chunk: int) -> None:
    student_head, teacher_head = heads()
    student_BTD = torch.randn(B, T, D, requires_grad=True)
    loss = losses.distill(student_BTD, student_head, torch.randn(B, T, D), teacher_head, chunk=chunk)
    (gradient,) = torch.autograd.grad(loss, student_BTD)
    assert (gradient.abs().amax(-1) > 0).all()

    loss = losses.next_token(student_BTD, student_head, torch.randint(X, (B, T)), chunk=chunk)
    (gradient,) = torch.autograd.grad(loss, student_BTD)
    assert (gradient.abs().amax(-1)[:, :-1] > 0).all()


def test_equal_models_have_no_divergence() -> None:
    head, _ = heads()
    hidden_BTD = torch.randn(B, T, D)
    assert losses.distill(hidden_BTD, head, hidden_BTD, head, chunk=100).item() == pytest.approx(0, abs=1e-6)


def test_a_weight_of_zero_takes_a_token_out() -> None:
    head, _ = heads()
    hidden_BTD = torch.randn(B, T, D, requires_grad=True)
    weights_BT = torch.ones(B, T)
    weights_BT[:, 4] = 0
    (gradient,) = torch.autograd.grad(
        losses.next_token(hidden_BTD, head, torch.randint(X, (B, T)), weights_BT, chunk=100), hidden_BTD
    )
    # the weight belongs to the target, which the token before it predicts
    assert gradient[:, 3].abs().max() == 0
    assert gradient[:, 4].abs().max() > 0


def test_alignment_is_the_mean_over_layers_and_reports_each() -> None:
    teacher = [torch.randn(B, T, D) * scale for scale in (1.0, 10.0)]
    pairs = [(torch.zeros(B, T, D), teacher[0]), (teacher[1] * 0.5, teacher[1])]
    loss, errors = losses.align(pairs)
    expected = (teacher[0].square().mean() + (teacher[1] * 0.5).square().mean()) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(errors, torch.tensor([1.0, 0.25]))


def test_alignment_never_moves_the_teacher() -> None:
    student, teacher = (torch.randn(B, T, D, requires_grad=True) for _ in range(2))
    losses.align([(student, teacher)])[0].backward()
    assert teacher.grad is None
    assert student.grad is not None
