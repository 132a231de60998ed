"""The figures of docs/serving.md are those of the committed file."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_says_what_was_measured():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "serve.json").read_text(encoding="utf-8"))
    load, speeds, chat = found["load"], found["tokens_per_s_by_clients"], found["short_chat"]
    latency, first, times = load["latency_s"], load["first_token_s"], found["ten_questions"]["seconds"]
    assert load["wrong"] == 0 and f"{load['answers']:,} answers" in text
    assert f"{latency['p50']:.1f} s, {latency['p99']:.1f} s" in text
    assert f"{first['p50']:.2f} s, {first['p99']:.2f} s" in text
    assert ", ".join(f"{speeds[clients]:.0f}" for clients in ("1", "4", "16")) in text
    idle, busy = (sorted(chat[name])[4] for name in ("idle_s", "while_reading_s"))
    assert f"{idle:.2f} s, {busy:.2f} s" in text and busy < 3 * idle
    assert f"{times[0]:.1f} s for the first, at most {max(times[1:]):.2f} s" in text
    assert f"in {found['saved_document']['open_s']:.2f} s" in text
