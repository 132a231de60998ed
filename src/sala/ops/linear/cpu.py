"""The linear map of few rows in C++: see `sala/ops/native/linear.cpp`."""

import torch
from torch import Tensor

from sala.ops.native import Function, operator
from sala.ops.pointwise.layout import close, count, rows

_linear = Function("sala_linear", "iiii pi pi p p i")


def _fake(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_NK.shape[0]))


@operator("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake)
def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """See `sala.ops.linear`."""
    out = _fake(x, weight_NK, bias_N)
    (x, row), weight_NK = rows(x), close(weight_NK)
    bias = None if bias_N is None else bias_N.contiguous()
    N, K = weight_NK.shape
    _linear(
        int(x.dtype == torch.bfloat16), count(x), N, K, x.data_ptr(), row, weight_NK.data_ptr(), weight_NK.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
