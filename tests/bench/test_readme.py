"""README's figures are those of the measurements that it names."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def test_decoding_steps_are_rounded_as_measured() -> None:
    for row in results("ops-step.json")["cases"]:
        ours, sdpa = (row["competitors"][name]["median_s"] for name in ("cpu", "sdpa"))
        assert f"| {1e3 * ours:.3g} ms | {1e3 * sdpa:.3g} ms | **{sdpa / ours:.1f}x** |" in README


def test_memory_is_told_in_all_with_the_cache_as_a_part_of_it() -> None:
    for point in results("latency-100m-long.json")["points"][1:]:
        whole = point["weights_bytes"] + point["added_bytes"]
        assert f"{whole / 2**20:.0f} / {point['cache_bytes'] / 2**20:.0f} MiB" in README
    million = results("latency-100m-million.json")["points"][-1]
    whole = million["weights_bytes"] + million["added_bytes"]
    assert (
        f"{whole / 2**30:.1f} GiB of memory, of which the cache is {million['cache_bytes'] / 2**30:.1f} GiB" in README
    )
    assert "memory in all / of it the cache" in README
