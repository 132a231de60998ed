"""Many clients for minutes: mixed lengths, some leave; each answer is the one it gets alone, and nothing is left behind.

Also what a prefix saves and how long others wait. Figures go to the file that SALA_RESULTS names.
"""

import asyncio
import json
import os
import random
import time
from pathlib import Path
from statistics import median

import httpx
import pytest

from sala.bench.environment import environment
from sala.serve.server import EngineLimits
from serve.conftest import BOOK, LONG, QUESTION

pytestmark = pytest.mark.load
TEXT = "/v1/completions"
SECONDS = float(os.environ.get("SALA_SECONDS", "300"))
CLIENTS = 64


@pytest.fixture(scope="module")
def figures():
    """What was measured; written at the end."""
    found: dict[str, object] = {}
    yield found
    if path := os.environ.get("SALA_RESULTS"):
        result = {"kind": "serve", "environment": environment(), **found}
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def percentiles(values):
    ordered = sorted(values)
    return {
        name: round(ordered[int(share * (len(ordered) - 1))], 4)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


def prompts():
    """Return prompts of a page to some dozens, several of which begin alike."""
    source = random.Random(0)
    texts = [BOOK[: source.randrange(50, len(BOOK))] + QUESTION for _ in range(10)]
    texts += [LONG[: source.randrange(500, len(LONG))] + f"\n{n}\n" for n in range(10)]
    return texts + [f"def f{n}(x):\n    return" for n in range(20)]


def test_sixty_four_clients_get_what_each_gets_alone(serving, figures):
    texts = prompts()
    with serving(template=None, limits=EngineLimits(chunk=512), cache_bytes=2**27) as live:
        asked = [{"prompt": text, "max_tokens": 8 + index % 40, "ignore_eos": True} for index, text in enumerate(texts)]
        alone = [live.http.post(TEXT, json=body).json()["choices"][0]["text"] for body in asked]
        latencies, first_tokens, resident = [], [], []
        counts = {"answers": 0, "left": 0, "wrong": 0, "tokens": 0}
        deadline = time.monotonic() + SECONDS

        async def client(http, number):
            source = random.Random(number)
            while time.monotonic() < deadline:
                index = source.randrange(len(asked))
                started, text = time.monotonic(), ""
                leaves = source.random() < 0.1
                async with http.stream("POST", TEXT, json={**asked[index], "stream": True}) as response:
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        if not text:
                            first = time.monotonic() - started
                        text += json.loads(line[6:])["choices"][0]["text"]
                        if leaves and len(text) > 5:
                            break
                if leaves:
                    counts["left"] += 1
                    continue
                latencies.append(time.monotonic() - started)
                first_tokens.append(first)
                counts["answers"] += 1
                counts["tokens"] += asked[index]["max_tokens"]
                counts["wrong"] += text != alone[index]

        async def watch():
            while time.monotonic() < deadline:
                resident.append(resident_bytes())
                await asyncio.sleep(SECONDS / 100)

        async def run():
            limits = httpx.Limits(max_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=live.url, timeout=120, limits=limits, trust_env=False) as http:
                await asyncio.gather(watch(), *(client(http, number) for number in range(CLIENTS)))

        asyncio.run(run())
        live.settled()
        status = live.service.engine.status()
        while live.service.engine.tree.evict():
            pass
        assert live.service.engine.tree.pool.num_used == 0
        late = resident[2 * len(resident) // 5 :]
        figures["load"] = {
            "clients": CLIENTS,
            "seconds": SECONDS,
            **counts,
            "tokens_per_s": round(counts["tokens"] / SECONDS, 1),
            "latency_s": percentiles(latencies),
            "first_token_s": percentiles(first_tokens),
            "preemptions": status.preemptions,
            "cached_share": round(status.cached_tokens / status.prompt_tokens, 3),
            "resident_bytes": [resident[0], late[0], late[-1]],
        }
    assert counts["wrong"] == 0
    assert max(late[-10:]) < 1.05 * max(late[:10])


def test_sixteen_clients_together_get_four_times_what_one_gets(serving, figures):
    def tokens_per_s(live, clients, requests=32, new=64):
        async def run():
            queue = list(range(requests))
            async with httpx.AsyncClient(base_url=live.url, timeout=120, trust_env=False) as http:

                async def client():
                    while queue:
                        body = {"prompt": f"{queue.pop()}: {BOOK[:200]}", "max_tokens": new, "ignore_eos": True}
                        (await http.post(TEXT, json=body)).raise_for_status()

                await asyncio.gather(*(client() for _ in range(clients)))

        started = time.monotonic()
        asyncio.run(run())
        return requests * new / (time.monotonic() - started)

    with serving(template=None) as live:
        tokens_per_s(live, 16)
        speeds = {clients: round(max(tokens_per_s(live, clients) for _ in range(2)), 1) for clients in (1, 4, 16)}
    figures["tokens_per_s_by_clients"] = speeds
    assert speeds[16] > 4 * speeds[1]


def test_ten_questions_about_one_text_cost_one_reading(serving, figures):
    book = (LONG * 40)[:180_000]
    with serving(template=None, max_length=100_000, limits=EngineLimits(chunk=512)) as live:
        times = []
        for number in range(10):
            started = time.monotonic()
            body = {"prompt": f"{book}\n[get] @amber @x{number}", "max_tokens": 1}
            reply = live.http.post(TEXT, json=body, timeout=600).json()
            times.append(round(time.monotonic() - started, 4))
    figures["ten_questions"] = {"tokens": reply["usage"]["prompt_tokens"], "seconds": times}
    assert max(times[1:]) < 0.05 * times[0]


def test_a_short_chat_does_not_wait_for_a_long_text(serving, figures):
    book = LONG * 94
    with serving(template=None, max_length=300_000, cache_bytes=2**30, limits=EngineLimits(chunk=512)) as live:

        def first_token():
            # a prompt of some hundred tokens that nobody asked before
            body = {"prompt": f"{time.monotonic_ns()}\n{BOOK[:1500]}", "max_tokens": 1}
            started = time.monotonic()
            live.http.post(TEXT, json=body).raise_for_status()
            return time.monotonic() - started

        first_token()
        idle = [first_token() for _ in range(9)]
        name = live.http.put("/documents/book", content=book).json()["name"]
        with live.http.stream("POST", f"/documents/{name}/read") as reading:
            lines = reading.iter_lines()
            while '"read": ' not in next(lines):
                pass
            busy = [first_token() for _ in range(9)]
            seen = next(line for line in lines if '"read": ' in line)
        live.settled()
        read = json.loads(seen[6:])
        assert read["read"] < read["total"]
        # whoever left is forgotten at once, and what was read is there for the next try
        started = time.monotonic()
        first_token()
        after = time.monotonic() - started
        with live.http.stream("POST", f"/documents/{name}/read") as reading:
            again = json.loads(next(line for line in reading.iter_lines() if '"read": ' in line)[6:])
    figures["short_chat"] = {
        "long_text_tokens": read["total"],
        "idle_s": [round(value, 4) for value in sorted(idle)],
        "while_reading_s": [round(value, 4) for value in sorted(busy)],
        "after_the_reader_left_s": round(after, 4),
        "read_before": read["read"],
        "first_progress_again": again["read"],
    }
    assert median(busy) < 3 * median(idle)
    assert after < 2 and again["read"] > read["read"]


def test_a_saved_document_opens_at_the_speed_of_reading_it(serving, figures, tmp_path):
    book = (LONG * 40)[:180_000]
    with serving(template=None, max_length=100_000, documents=tmp_path) as live:
        live.http.put("/documents/book", content=book)
        live.http.post("/documents/book/read", timeout=600)
        model, reader = live.service.engine.runner.model, live.service.documents.reader
    path = tmp_path / "book.sala"
    from sala.engine.saved import load_document

    def timed(work):
        started = time.monotonic()
        work()
        return time.monotonic() - started

    opening = min(timed(lambda: load_document(path, model, reader)) for _ in range(5))
    reading = min(timed(path.read_bytes) for _ in range(5))
    figures["saved_document"] = {
        "bytes": path.stat().st_size,
        "open_s": round(opening, 4),
        "read_bytes_s": round(reading, 4),
    }
