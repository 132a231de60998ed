"""RULER's scorers, and where the public variants differ."""

import re

from sala.eval.task import Prompt, Style

_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(answer: str, style: Style) -> str:
    return answer if style == "opencompass" else _CONTROL.sub("\n", answer.strip()).strip()


def match_all(sample: Prompt, answer: str, style: Style) -> float:
    """Return the share of references that are in the answer, whatever the case of their letters."""
    said = cleaned(answer, style).lower()
    return sum(reference.lower() in said for reference in sample.references) / len(sample.references)


def match_any(sample: Prompt, answer: str, style: Style) -> float:
    """Return 1 if any of the references, which are spellings of one answer, is in the answer.

    lm-evaluation-harness counts the share of spellings instead.
    """
    if style == "lm-eval":
        return match_all(sample, answer, style)
    said = cleaned(answer, style).lower()
    return float(any(reference.lower() in said for reference in sample.references))
