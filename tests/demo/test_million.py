"""Needles in a very long document, at a length that takes no time."""

import json
from pathlib import Path
from typing import Any

from sala.demo.million import find_in_million


def test_time_memory_and_answer_are_written(demo: Any, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "results" / "needles.json"
    written = find_in_million(str(demo[0] / "hybrid"), out, length=300, needles=3, say=said.append)
    assert json.loads(out.read_text()) == json.loads(json.dumps(written))
    assert written["length"] == 300
    assert written["read_s"] > 0
    assert written["cache_bytes"] > 0
    assert written["found"] == sum(answer["answer"] == answer["wanted"] for answer in written["answers"])
    assert len(written["answers"]) == 3
    assert f"{written['found']} of 3 needles found in 300 tokens" in said[-1]
