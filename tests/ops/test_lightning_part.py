"""Laws of lightning attention whose row several ranks hold: the parts together are the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sala.errors import InputError
from sala.ops.lightning import eager, lightning_attention, log_decay
from simulated_ranks import ThreadContext, on_ranks
from tolerances import assert_close

H, K, V = 3, 4, 5
SCALE = K**-0.5


def qkv(T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(1, T, H, width, dtype=dtype).requires_grad_() for width in (K, K, V)]


def in_parts(ranks: int, inputs: list[Tensor], log_decay_H: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs of all ranks, end to end, and each rank's states."""
    parts = [x.chunk(ranks, dim=1) for x in inputs]
    results = on_ranks(
        ranks,
        lambda context: lightning_attention(
            *(part[context.rank] for part in parts), log_decay_H, scale=SCALE, context=context, **options
        ),
    )
    return torch.cat([out for out, _ in results], dim=1), [states for _, states in results]


@settings(max_examples=40)
@given(data=st.data())
def test_parts_of_a_row_are_the_row(data: st.DataObject) -> None:
    ranks, part = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 12), "tokens a rank")
    T = ranks * part
    # ends at a part's border are drawn often, and so are equal ones: documents without tokens
    cuts = data.draw(st.lists(st.sampled_from(range(T + 1)) | st.sampled_from(range(0, T + 1, part)), max_size=6))
    cu_seqlens = torch.tensor([0, *sorted(cuts), T])
    inputs = qkv(T)
    # one head forgets at once, one nothing
    log_decay_H = torch.tensor([-300.0, -0.3, 0.0], dtype=torch.float64)

    expected, expected_states = lightning_attention(*inputs, log_decay_H, scale=SCALE, cu_seqlens=cu_seqlens)
    actual, states = in_parts(ranks, inputs, log_decay_H, cu_seqlens=cu_seqlens)
    assert_close(actual, expected)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((actual * weights).sum(), inputs)
    for gradient, right in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        assert_close(gradient, right)
    assert_close(states[-1][-1], expected_states[int((cu_seqlens < T).sum()) - 1])


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_agree_in_every_precision(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("takes float32 and bfloat16")
    cu_seqlens = torch.tensor([0, 5, 190, 201])
    inputs = [x.detach() for x in qkv(201, dtype)]
    expected, _ = lightning_attention(*inputs, log_decay(H), scale=SCALE, cu_seqlens=cu_seqlens, backend="reference")
    actual, _ = in_parts(3, inputs, log_decay(H), cu_seqlens=cu_seqlens, backend=backend)
    assert_close(actual, expected)


def test_states_are_those_behind_each_documents_last_token_here() -> None:
    inputs = [x.detach() for x in qkv(12)]
    _, states = in_parts(3, inputs, log_decay(H), cu_seqlens=torch.tensor([0, 2, 11, 12]))
    for rank, ends in enumerate([[(0, 2), (2, 4)], [(2, 8)], [(2, 11), (11, 12)]]):
        for state_HKV, (start, end) in zip(states[rank], ends, strict=True):
            _, expected = lightning_attention(*(x[:, start:end] for x in inputs), log_decay(H), scale=SCALE)
            assert_close(state_HKV[None], expected)


def test_rows_are_padded_to_similar_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    monkeypatch.setattr(
        eager, "_rows", lambda q, *rest, inner=eager._rows: (tokens.append(q[..., 0, 0].numel()), inner(q, *rest))[1]
    )
    lengths = torch.tensor([1500, *range(1, 30), 700])
    inputs = qkv(int(lengths.sum()), torch.float32)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    lightning_attention(*inputs, log_decay(H), scale=SCALE, cu_seqlens=cu_seqlens)
    assert sum(tokens) < 1.42 * int(lengths.sum())
    assert len(tokens) < 14


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "with a context give cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 8]), "mask_BT": torch.ones(1, 4, dtype=torch.bool)}, "neither a mask"),
        ({"cu_seqlens": torch.tensor([0, 8]), "initial_state_BHKV": torch.zeros(1, H, K, V)}, "nor a state"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "end at the number of packed tokens, 8, not at 4"),
    ],
)
def test_a_context_needs_the_whole_rows_documents(options: dict, complaint: str) -> None:
    inputs = [x.detach().float() for x in qkv(4)]
    with pytest.raises(InputError, match=complaint):
        lightning_attention(*inputs, log_decay(H), scale=SCALE, context=ThreadContext(0, [None] * 2, None), **options)
