"""Laws of packed rows."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sala.errors import InputError
from sala.ops.packing import Span, pad_rows, row_bounds, similar_lengths, spans_of
from simulated_ranks import ThreadContext


@pytest.mark.parametrize(
    ("cu_seqlens", "complaint"),
    [
        ([1, 4], "start at 0, not at 1"),
        ([0, 3], "end at the number of packed tokens, 4, not at 3"),
        ([0, 3, 2, 4], "must not fall: 3 is followed by 2"),
        ([0.0, 4.0], "int32 or int64"),
        ([[0, 4]], r"shape \(1, 2\)"),
        ([0], r"at least two"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(cu_seqlens: list, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        row_bounds(torch.tensor(cu_seqlens), 4)


def test_spans_are_the_documents_of_a_part() -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 9, 12])
    parts = [spans_of(cu_seqlens, 4, ThreadContext(rank, [None] * 3, None)) for rank in range(3)]
    assert parts == [
        [Span(0, 0, 2, 2), Span(2, 2, 4, 9)],
        [Span(2, 4, 8, 9)],
        [Span(2, 8, 9, 9), Span(9, 9, 12, 12)],
    ]
    assert parts[1][0].document_length == 7
    assert spans_of(cu_seqlens, 12) == [Span(0, 0, 2, 2), Span(2, 2, 9, 9), Span(9, 9, 12, 12)]
    with pytest.raises(InputError, match="packed tokens, 15, not at 12"):
        spans_of(cu_seqlens, 5, ThreadContext(0, [None] * 3, None))


@given(lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_padding_less_than_doubles_work_that_grows_with_the_square_of_a_length(lengths: list[int]) -> None:
    groups = similar_lengths(lengths)
    assert sorted(row for group in groups for row in group) == [row for row, length in enumerate(lengths) if length]
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert len(group) == 1 or longest <= 1024
        assert all(longest**2 < 2 * lengths[row] ** 2 for row in group)
    # a group for every factor of the square root of two, not more
    assert sum(len(group) > 1 or lengths[group[0]] <= 1024 for group in groups) <= 21


def test_rows_are_padded_behind_and_differentiable() -> None:
    x_TD = torch.randn(9, 2, requires_grad=True)
    rows_NLD = pad_rows(x_TD.split([3, 1, 5]))
    for row, (start, end) in enumerate(pairwise([0, 3, 4, 9])):
        assert torch.equal(rows_NLD[row, : end - start], x_TD[start:end])
        assert not rows_NLD[row, end - start :].any()
    assert torch.equal(pad_rows([x_TD]), x_TD[None])
    rows_NLD.sum().backward()
    assert torch.equal(x_TD.grad, torch.ones(9, 2))
