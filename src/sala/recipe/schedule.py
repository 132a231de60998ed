"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable

# part of the stage that WSD spends decaying (MiniCPM's report: about a tenth)
WSD_DECAY_PART = 0.1

# each curve: progress after the warm-up in [0, 1] -> how far from peak (0) to final (1); exponential is apart
_DISTANCE: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "wsd": lambda progress: max(0.0, (progress - (1 - WSD_DECAY_PART)) / WSD_DECAY_PART),
}
CURVES = (*_DISTANCE, "exponential")


def learning_rate(step: int, steps: int, *, peak: float, final: float, warmup_steps: int, curve: str) -> float:
    """Return the learning rate of `step` (from 0) in a stage of `steps`.

    A linear warm-up reaches `peak` at step `warmup_steps - 1`; step 0 already moves, at `peak / warmup_steps`. Then
    `curve` leads to `final`, which the last step has exactly, whatever the curve; "constant" stays at `peak`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    if curve == "exponential":
        return peak * (final / peak) ** progress
    return peak + (final - peak) * _DISTANCE[curve](progress)
