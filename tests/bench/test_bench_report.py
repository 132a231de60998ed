"""What is drawn and tabled is what the files say; what was not measured never looks measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from sala.bench.report import LATENCY_FIGURES, OPS_FIGURES, end_to_end, markdown, write_report
from sala.errors import InputError

ENVIRONMENT = {"hardware": {"cpu": "a processor"}}
SETTINGS = {"dtype": "bfloat16", "threads": 2}


def point(who: str, length: int, first_token_s: float) -> dict[str, Any]:
    return {
        "who": who,
        "model": f"the {who}",
        "length": length,
        "status": "measured",
        "first_token_s": first_token_s,
        "decode_s": 0.5,
        "start_bytes": 300,
        "weights_bytes": 100,
        "curve": {"samples": [[0, 300, 300], [length, 300, 900]]},
    }


def latency_file(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "latency",
        "environment": ENVIRONMENT,
        "shape": "a shape",
        "models": {"hybrid": {"name": "the hybrid"}, "baseline": {"name": "the baseline"}},
        "settings": SETTINGS,
        "points": [
            point("hybrid", 1024, 2.0),
            point("baseline", 1024, 3.0),
            point("hybrid", 2048, 4.0),
            {"who": "baseline", "model": "the baseline", "length": 2048, "status": "skipped", "expected_s": 77.0},
            point("hybrid", 4096, 8.0),
            {"who": "baseline", "model": "the baseline", "length": 4096, "status": "OOM"},
        ],
        **changes,
    }


def ops_file() -> dict[str, Any]:
    seconds = {"cpu": 1.0, "eager": 4.0, "sdpa": 20.0}
    return {
        "kind": "ops",
        "environment": ENVIRONMENT,
        "shape": {"name": "a shape"},
        "settings": SETTINGS,
        "cases": [
            {
                "op": "infllm",
                "phase": "prefill",
                "length": 1024,
                "competitors": {name: {"median_s": s} for name, s in seconds.items()},
                "times_faster_than_sdpa": {"cpu": 20.0, "eager": 5.0},
                "times_faster_than_eager": {"cpu": 4.0},
            },
            {"op": "infllm", "phase": "selection", "length": 1024, "skipped": "too short", "competitors": {}},
        ],
    }


def drawn(name: str, results: dict[str, Any]) -> Any:
    axes = Figure().add_subplot()
    (OPS_FIGURES | LATENCY_FIGURES)[name](axes, results)
    return axes


def test_a_file_of_each_kind_becomes_plots_and_a_table(tmp_path: Path) -> None:
    (tmp_path / "pair.json").write_text(json.dumps(latency_file()))
    (tmp_path / "kernels.json").write_text(json.dumps(ops_file()))
    (tmp_path / "other.json").write_text("[]")
    table, files = write_report(tmp_path, tmp_path / "plots")
    names = ["kernels-ratios", "pair-first-token", "pair-end-to-end", "pair-memory"]
    assert files == [tmp_path / "plots" / f"{name}.png" for name in names]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert "| kernels | infllm prefill, cpu | 1K | 1 s | sdpa 20 s | 20.00 |" in table
    assert "| kernels | infllm prefill, cpu | 1K | 1 s | eager 4 s | 4.00 |" in table
    assert "| pair | the hybrid, first token | 1K | 2 s | the baseline 3 s | 1.50 |" in table


def test_selection_alone_has_no_curve_to_draw(tmp_path: Path) -> None:
    results = ops_file()
    results["cases"][0]["times_faster_than_sdpa"] = {}
    (tmp_path / "kernels.json").write_text(json.dumps(results))
    assert write_report(tmp_path, tmp_path)[1] == []


def test_what_was_not_measured_is_no_point_of_a_curve_and_no_ratio() -> None:
    axes = drawn("first-token", latency_file())
    curves = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert curves == {"the hybrid": [1024, 2048, 4096], "the baseline": [1024]}
    texts = [text.get_text() for text in axes.texts]
    assert "OOM" in texts and "not run\n~77 s" in texts and "1.5x" in texts
    rows = markdown({"pair": latency_file()}).splitlines()
    assert [row for row in rows if "OOM" in row] == [
        f"| pair | the hybrid, {what} | 4K | {value} | the baseline OOM |  |"
        for what, value in (("first token", "8 s"), ("prompt and 1,024 tokens", "520 s"), ("a token decoded", "500 ms"))
    ]
    assert sum("not run (first token in about 77 s) |  |" in row for row in rows) == 3


def test_end_to_end_is_the_prompt_and_what_the_measured_decoding_makes_of_1024_tokens() -> None:
    assert end_to_end(point("hybrid", 1024, 2.0)) == 2.0 + 1023 * 0.5


def test_memory_is_without_what_else_the_process_held() -> None:
    axes = drawn("memory", latency_file())
    (curve, *_) = axes.get_lines()
    assert [y * 2**30 for y in curve.get_ydata()] == pytest.approx([100, 700])  # 200 of 300 were not the model's
    assert max(curve.get_xdata()) == 4096  # the longest that was measured


def test_an_operator_is_drawn_by_its_fastest_backend() -> None:
    curve = drawn("ratios", ops_file()).get_lines()[0]
    assert (curve.get_label(), list(curve.get_ydata())) == ("infllm prefill (cpu)", [20.0])


def test_on_a_gpu_the_card_is_named_and_other_packages_operators_are_no_backend() -> None:
    results = ops_file()
    results["settings"] = {"dtype": "bfloat16", "threads": 2, "device": "cuda"}
    results["environment"] = {"hardware": {"cpu": "a processor", "gpu": {"name": "a card"}}}
    results["cases"][0]["times_faster_than_sdpa"]["fla"] = 30.0
    axes = drawn("ratios", results)
    assert axes.get_lines()[0].get_label() == "infllm prefill (cpu)"
    assert any(text.get_text() == "a shape, bfloat16, a card" for text in axes.texts)


def test_training_steps_are_tabled_with_what_a_teacher_costs() -> None:
    def step(loss: str, step_s: float, mfu: float | None) -> dict[str, Any]:
        point = {"loss": loss, "length": 4096, "status": "measured", "step_s": step_s, "tokens_s": 32768 / step_s}
        return point | {"mfu": mfu}

    points = [
        step("next_token", 2.0, 0.25),
        step("distill", 3.0, None),
        {"loss": "distill", "length": 8192, "status": "OOM"},
    ]
    assert markdown({"train": {"kind": "train", "shape": "a shape", "points": points}}).splitlines()[2:] == [
        "| train | a shape, a step of next_token, 16,384 tokens/s, 25.0% of the peak | 4K | 2 s |  |  |",
        "| train | a shape, a step of distill, 10,923 tokens/s | 4K | 3 s | next_token 2 s | 0.67 |",
    ]


def test_one_model_alone_is_drawn_too() -> None:
    alone = latency_file(models={"hybrid": {"name": "the hybrid"}}, points=[point("hybrid", 1024, 2.0)])
    for name in LATENCY_FIGURES:
        drawn(name, alone)
    assert "| pair | the hybrid, first token | 1K | 2 s |  |  |" in markdown({"pair": alone})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.json", "{", "not valid JSON"), ("a.json", '{"kind": "demo"}', "no file"), ("a.txt", "", "no file")],
)
def test_a_folder_without_measurements_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path, tmp_path)
    with pytest.raises(InputError, match="no folder"):
        write_report(tmp_path / "nowhere", tmp_path)
