"""How far a backend may be from the definition: one tolerance per dtype, the same for every test and machine."""

import torch
from torch import Tensor

# relative to the largest number of the expected tensor: outputs are sums whose terms cancel, so a small entry has the
# rounding of the large ones. Roundings of 2^-8 (bfloat16) and 2^-11 (float16) each, a few of them in a row.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare with the tolerance of `dtype`, the precision of the computation (left out: of `actual`)."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    tolerance = TOLERANCES[dtype or actual.dtype]
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(largest, 1e-30))
