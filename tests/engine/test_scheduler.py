"""Short prompts pass long ones, memory decides who runs, nobody loses a token, a cancelled request is gone at once."""

from dataclasses import dataclass

import pytest

from sala.engine.pages import Budget, PagePool, PrefixTree, digests
from sala.engine.request import LONG_PROMPT, Request, snapshot_points
from sala.engine.scheduler import QueueFullError, Scheduler
from sala.errors import MemoryLimitError

PAGE, TOKEN_BYTES, STATE_BYTES = 16, 10, 100


@dataclass
class Blob:
    size_bytes: int


def scheduler(total_tokens=1000, **options):
    tree = PrefixTree(PAGE, PagePool(total_tokens // PAGE))
    budget = Budget(total_tokens * TOKEN_BYTES + 1000, PAGE * TOKEN_BYTES, STATE_BYTES, tree)
    return Scheduler(budget, tree, **{"chunk": 64, **options})


def request(name, length, new=8, first=0):
    return Request(name, tuple(range(first, first + length)), new, PAGE)


def keep(planner, tokens):
    """Keep a text of whole pages."""
    places = planner.tree.pool.take(len(tokens) // PAGE)
    planner.tree.add(tuple(tokens), digests(tokens, PAGE), places, Blob(100))
    planner.tree.pool.stop(places)


def end(planner, request):
    planner.end(request, "length")
    planner.release(request)


def run(step):
    """Do what an engine would: read the rows, and answer with a token where all is read."""
    for row in step.rows:
        row.request.read += len(row.tokens)
        if row.request.read == row.request.length:
            row.request.output.append(7)
    return {row.request.id: len(row.tokens) for row in step.rows}


def finish(planner):
    """Run until all is over, and return how many steps that took."""
    steps = 0
    while not planner.is_idle:
        run(planner.plan())
        for done in [r for r in planner.running if len(r.output) == r.max_new_tokens]:
            end(planner, done)
        steps += 1
        assert steps < 10_000
    return steps


def test_a_long_prompt_is_read_in_chunks_between_decoding_steps():
    planner = scheduler()
    planner.submit(request("chat", 10))
    run(planner.plan())
    planner.submit(request("book", 300, first=5000))
    seen = [run(planner.plan()) for _ in range(4)]
    assert all(step["chat"] == 1 and step["book"] <= 64 for step in seen)


def test_a_short_prompt_does_not_wait_for_a_book():
    planner = scheduler(10_000)
    planner.submit(request("book", 5000))
    run(planner.plan())
    chat = request("chat", 40, first=9000)
    planner.submit(chat)
    run(planner.plan())
    run(planner.plan())
    assert chat.output


def test_a_slow_long_prompt_is_read_in_small_pieces_while_others_come():
    now = [0.0]
    planner = scheduler(10_000, chunk=256, clock=lambda: now[0])
    book = request("book", 5000)
    planner.submit(book)
    assert run(planner.plan()) == {"book": 256}
    book.tokens_per_s = 100.0
    # alone it is read in large ones
    assert run(planner.plan()) == {"book": 256}
    planner.submit(request("chat", 10, new=1, first=9000))
    assert run(planner.plan())["book"] == PAGE
    end(planner, planner.running[1])
    assert run(planner.plan()) == {"book": PAGE}
    now[0] += 11
    assert run(planner.plan()) == {"book": 256}


def test_the_oldest_prompt_goes_on_whatever_shorter_ones_come():
    planner = scheduler(100_000)
    book = request("book", 2000, new=1)
    planner.submit(book)
    for number in range(200):
        planner.submit(request(f"chat {number}", 60, new=1, first=10_000 + 100 * number))
        run(planner.plan())
        for done in [r for r in planner.running if r.output]:
            end(planner, done)
    assert book.finish == "length"


def test_every_token_is_read_once_and_in_order():
    planner = scheduler(100_000)
    requests = [request(f"{n}", 37 * n + 5, new=5, first=1000 * n) for n in range(8)]
    for each in requests:
        planner.submit(each)
    read = {each.id: [] for each in requests}
    while not planner.is_idle:
        step = planner.plan()
        for row in step.rows:
            read[row.request.id] += row.tokens
        run(step)
        for done in [r for r in planner.running if len(r.output) == r.max_new_tokens]:
            end(planner, done)
    for each in requests:
        assert read[each.id] == [*each.prompt, *each.output[:-1]]


def test_what_can_never_fit_is_refused_with_numbers():
    planner = scheduler(100)
    with pytest.raises(MemoryLimitError, match="200 tokens of prompt and 8 of answer.*expected at most 96 tokens"):
        planner.submit(request("book", 200))
    assert planner.is_idle


def test_what_does_not_fit_now_waits_and_a_full_queue_says_so():
    planner = scheduler(200, max_waiting=1)
    planner.submit(request("first", 150))
    run(planner.plan())
    assert planner.submit(request("second", 150, first=2000)) == 0
    run(planner.plan())
    assert [r.id for r in planner.waiting] == ["second"]
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        planner.submit(request("third", 10))
    finish(planner)
    assert planner.budget.used_bytes == 0


def test_preemption_loses_no_token():
    planner = scheduler(96)
    requests = [request("a", 20, new=40), request("b", 20, new=40, first=500)]
    for each in requests:
        planner.submit(each)
    finish(planner)
    assert planner.preemptions > 0
    assert [len(each.output) for each in requests] == [40, 40]
    assert planner.budget.used_bytes == 0


def test_the_youngest_makes_way():
    planner = scheduler(96)
    old, young = request("old", 20, new=40), request("young", 20, new=40, first=500)
    for each in (old, young):
        planner.submit(each)
    finish(planner)
    assert old.preemptions == 0 < young.preemptions


def test_a_cancelled_request_frees_everything_in_the_next_step():
    planner = scheduler(10_000)
    running, waiting = request("running", 5000), request("waiting", 6000, first=8000)
    planner.submit(running)
    planner.submit(waiting)
    run(planner.plan())
    running.cancelled = waiting.cancelled = True
    step = planner.plan()
    assert step.stopped == (running,) and not step.rows
    planner.release(running)
    assert (running.finish, waiting.finish) == ("cancelled", "cancelled")
    assert planner.is_idle and planner.budget.used_bytes == 0


def test_a_text_that_another_request_is_reading_is_not_read_twice():
    planner = scheduler(100_000)
    first, second = request("first", 1000), request("second", 1000)
    planner.submit(first)
    planner.submit(second)
    planner.submit(request("other", 10, first=5000))
    read = run(planner.plan())
    assert "second" not in read and "other" in read
    while first.is_reading:
        assert second in planner.waiting
        run(planner.plan())
        if first.read == first.stops[-1]:
            keep(planner, first.prompt[: first.read])
    run(planner.plan())
    assert second.cached == first.stops[-1]


def test_a_request_that_wants_every_token_of_its_prompt_reuses_none():
    planner = scheduler()
    keep(planner, range(96))
    hit, whole = request("hit", 100), request("whole", 100)
    whole.whole = True
    planner.submit(hit)
    planner.submit(whole)
    planner.plan()
    assert (hit.cached, whole.cached) == (96, 0)


def test_where_texts_part_the_next_one_can_start():
    planner = scheduler(10_000)
    keep(planner, range(960))
    parting = Request("parting", (*range(500), *range(5000, 5100)), 8, PAGE)
    planner.submit(parting)
    planner.plan()
    assert 496 in parting.stops


def test_snapshots_stand_at_page_ends_at_message_ends_and_denser_at_both_ends():
    points = snapshot_points(65_536, 64, ends=(130, 40_000))
    assert all(point % 64 == 0 and 0 < point < 65_536 for point in points)
    assert points[-1] == 65_472
    assert {128, 40_000} <= set(points)
    # a reader who leaves loses little of the way, a question of q tokens at the end about as many
    gaps = [after - before for before, after in zip([0, *points], points, strict=False)]
    assert all(gap <= max(LONG_PROMPT, at // 8 + 64) for gap, at in zip(gaps, points, strict=True))
    for question in (10, 100, 1000):
        assert max(p for p in points if p <= 65_536 - question) >= 65_536 - 2 * question - 128
    assert len(points) < 80


def test_short_prompts_keep_one_snapshot_and_the_shortest_none():
    assert snapshot_points(200, 64) == [192]
    assert snapshot_points(64, 64) == []
    assert snapshot_points(65, 64) == [64]
