"""Scores that papers report, to be shown beside measured ones. In percent, by length in tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

K = 1024


@dataclass(frozen=True, slots=True)
class Reference:
    """A model's published scores of one group or task. source: where they stand."""

    model: str
    task: str
    scores: Mapping[int, float]
    source: str


_SALA = "MiniCPM-SALA paper (arXiv 2602.11761), tables 3 and 4, by OpenCompass; 4K and 8K: MiniCPM issue 340"

REFERENCES = tuple(
    Reference(model, task, MappingProxyType(scores), source)
    for model, task, scores, source in (
        (
            "MiniCPM-SALA 9B",
            "ruler",
            {4 * K: 96.26, 8 * K: 93.84, 64 * K: 92.65, 128 * K: 89.37, 512 * K: 87.1, 1000 * K: 86.3, 2048 * K: 81.6},
            _SALA,
        ),
        ("Qwen3-8B", "ruler", {64 * K: 80.53, 128 * K: 71.74}, _SALA),
        ("MiniCPM-SALA 9B", "mrcr_2n", {64 * K: 29.77, 128 * K: 28.62}, _SALA),
        ("MiniCPM-SALA 9B", "mrcr_4n", {64 * K: 20.57, 128 * K: 19.62}, _SALA),
        ("MiniCPM-SALA 9B", "mrcr_8n", {64 * K: 16.56, 128 * K: 10.12}, _SALA),
        ("MiniCPM-SALA 9B", "nolima", {32 * K: 54.54, 64 * K: 42.95, 128 * K: 23.86}, _SALA),
    )
)

# of MiniCPM-SALA 9B on general suites, by OpenCompass, answers drawn at temperature 0.9 after thinking
GENERAL: Mapping[str, float] = MappingProxyType(
    {
        "CMMLU": 81.55,
        "MMLU-Pro": 67.04,
        "HumanEval": 95.12,
        "LiveCodeBench v5": 60.48,
        "LiveCodeBench v6": 52.00,
        "MBPP": 89.11,
        "AIME 24": 83.75,
        "AIME 25": 78.33,
        "BBH": 81.55,
        "IFEval": 76.34,
    }
)


def references(task: str) -> list[Reference]:
    """Return the published scores of a task; those of RULER belong to the average of its tasks."""
    name = "ruler" if task.startswith("ruler average") else task
    return [reference for reference in REFERENCES if reference.task == name]
