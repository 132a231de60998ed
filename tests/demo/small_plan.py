"""The numbers of a demo that takes seconds."""

from sala.demo import Amount, Plan

PLAN = Plan(
    recipe="smoke",
    questions={96: Amount(2, 4), 160: Amount(2, 4)},
    repeats={64: 1, 160: 2},
    needle_length=200,
    needles=2,
)
