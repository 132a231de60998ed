"""The confidence interval of a share of right answers."""

import math

Z_95 = 1.959964


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of `correct / total`; unlike the normal one it holds near 0 and 1.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    assert 0 <= correct <= total and total > 0
    share, spread = correct / total, Z_95**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
