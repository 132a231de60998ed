"""The verb `quantize`: a folder that `generate` reads, and errors of one line."""

import json
from pathlib import Path


def test_a_quantized_folder_answers(tmp_path: Path, sala) -> None:
    (tmp_path / "text.txt").write_text("A river runs to the sea, and the sea is deep. " * 400, encoding="utf-8")
    out = tmp_path / "int4"
    text = ("--data", str(tmp_path / "text.txt"), "--samples", "4", "--length", "128")
    made = sala("quantize", "embedded-hybrid", "--out", str(out), "--group", "32", "--head", "8", *text)
    assert made.code == 0, made.err
    result = json.loads(made.out)
    assert result["kl"] < 0.2 and result["bytes_after"] < result["bytes_before"] / 2
    assert made.err.count("outputs change by at most") == 4
    answer = sala("generate", "--model", str(out), "--prompt", "A river", "--temperature", "0", "-n", "4")
    assert answer.code == 0, answer.err
    again = sala("quantize", "embedded-hybrid", "--out", str(out), *text)
    assert again.code == 2 and "exists already; expected a new folder" in again.err
    short = sala(
        "quantize",
        "embedded-hybrid",
        "--out",
        str(tmp_path / "b"),
        "--data",
        str(tmp_path / "text.txt"),
        "--length",
        "99999",
    )
    assert short.code == 2 and "expected at least 99,999" in short.err
