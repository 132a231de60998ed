"""Laws of packed sequences."""

import pytest
import torch

from sala.errors import InputError
from sala.ops.packing import pack, unpack


def test_packing_undoes_unpacking() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 4, 9])
    x_1TD = torch.randn(1, 9, 2, requires_grad=True)
    rows_NLD, mask_NL = unpack(x_1TD, cu_seqlens)
    assert mask_NL.sum(dim=1).tolist() == [3, 0, 1, 5]
    assert torch.equal(rows_NLD[3], x_1TD[0, 4:])
    assert not rows_NLD[~mask_NL].any()
    assert torch.equal(pack(rows_NLD, cu_seqlens), x_1TD)
    pack(rows_NLD, cu_seqlens).sum().backward()
    assert torch.equal(x_1TD.grad, torch.ones(1, 9, 2))


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
        unpack(torch.zeros(1, 4), torch.tensor(cu_seqlens))


def test_only_one_batch_row_is_unpacked() -> None:
    with pytest.raises(InputError, match=r"one batch row.*\(2, 4\)"):
        unpack(torch.zeros(2, 4), torch.tensor([0, 4]))


def test_rows_that_the_bounds_do_not_describe_are_not_packed() -> None:
    with pytest.raises(InputError, match=r"2 rows of up to 3 tokens.* 1 of 5"):
        pack(torch.zeros(1, 5), torch.tensor([0, 2, 5]))
    with pytest.raises(InputError, match=r"1 rows of up to 5 tokens.* 1 of 4"):
        pack(torch.zeros(1, 4), torch.tensor([0, 5]))
