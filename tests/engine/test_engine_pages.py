"""Prefixes are found by their tokens alone, go when they were used longest ago, and every byte is counted."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from sala.engine.pages import Budget, PagePool, PrefixTree, digests

PAGE = 4
STATE_BYTES = 100


@dataclass
class Blob:
    size_bytes: int


def tree_of(pages=100):
    return PrefixTree(PAGE, PagePool(pages))


def add(tree, tokens, length):
    """Keep the first `length` of `tokens`, as a request that read them would."""
    pages = digests(tokens[:length], PAGE)
    parent = tree.deepest(pages)
    start = 0 if parent is None else parent.length
    own = tree.pool.take((length - start) // PAGE)
    node = tree.add(tuple(tokens[start:length]), pages, own, Blob(STATE_BYTES))
    tree.pool.stop(own)
    return node


def match(tree, tokens):
    return tree.match(len(tokens), digests(tokens, PAGE))


def why(tree, tokens):
    return tree.why_no_more(tokens, digests(tokens, PAGE), match(tree, tokens))


def test_a_digest_stands_for_all_pages_before_it():
    assert digests([9, 2, 3, 4, 5, 6, 7, 8], PAGE)[1] != digests([1, 2, 3, 4, 5, 6, 7, 8], PAGE)[1]
    assert digests(list(range(11)), PAGE) == digests(list(range(8)), PAGE)


def test_digests_go_on_from_earlier_pages():
    tokens = list(range(24))
    assert digests(tokens[8:], PAGE, digests(tokens[:8], PAGE)) == digests(tokens, PAGE)


def test_the_longest_kept_prefix_is_found_and_one_token_is_left_to_read():
    tree, tokens = tree_of(), list(range(20))
    add(tree, tokens, 4)
    add(tree, tokens, 12)
    assert match(tree, tokens).length == 12
    assert match(tree, tokens[:13]).length == 12
    assert match(tree, tokens[:12]).length == 4


def test_other_text_is_not_found_and_its_first_token_is_named():
    tree, tokens = tree_of(), list(range(20))
    add(tree, tokens, 8)
    for at in range(8):
        other = [*tokens[:at], 99, *tokens[at + 1 :]]
        assert match(tree, other).length == 0
        assert f"token {at:,}" in why(tree, other)
    assert why(tree, tokens[:9]) == ""


def test_what_is_missing_between_two_snapshots_is_said():
    tree, tokens = tree_of(), list(range(40))
    add(tree, tokens, 4)
    add(tree, tokens, 32)
    other = [*tokens[:18], 99, 99, 99, 99]
    found = match(tree, other)
    assert (found.length, found.known) == (4, 16)
    assert why(tree, other) == "other text from token 18, and states before it only at token 4"


def test_the_least_recently_used_goes_first_and_an_evicted_prefix_is_remembered():
    tree, left, right = tree_of(), list(range(8)), list(range(50, 58))
    first = add(tree, left, 4)
    add(tree, right, 4)
    tree.touch(first)
    assert tree.evict()
    assert match(tree, left).length == 4
    assert match(tree, right).length == 0
    assert why(tree, right) == "evicted"


def test_pages_stay_as_long_as_a_longer_prefix_needs_them():
    tree, tokens = tree_of(), list(range(20))
    short = add(tree, tokens, 8)
    long = add(tree, tokens, 16)
    assert (tree.pool.num_used, tree.state_bytes) == (4, 2 * STATE_BYTES)
    tree.evict()
    assert short.states is None
    assert [node.length for node in match(tree, tokens).node.path()] == [8, 16]
    assert len(set(match(tree, tokens).node.all_places())) == 4
    assert (tree.pool.num_used, tree.state_bytes) == (4, STATE_BYTES)
    tree.renew(short, Blob(STATE_BYTES))
    tree.touch(long)
    assert match(tree, tokens[:9]).length == 8
    while tree.evict():
        pass
    assert (tree.pool.num_used, tree.state_bytes) == (0, 0)
    assert not tree.find(long.digest)


def test_a_page_is_free_when_neither_a_request_nor_a_prefix_has_it():
    pool = PagePool(4)
    pages = pool.take(3)
    pool.run(pages[:1])
    pool.keep(pages[:2])
    pool.stop(pages)
    assert (pool.num_free, pool.num_running) == (2, 1)
    pool.stop(pages[:1])
    assert (pool.num_free, pool.num_running) == (2, 0)
    pool.drop(pages[:2])
    assert pool.num_free == 4


def test_room_is_made_from_kept_prefixes_and_never_from_running_requests():
    tree = tree_of()
    budget = Budget(1000, page_bytes=PAGE, state_bytes=STATE_BYTES, tree=tree)
    first = budget.start([], 120)
    assert len(set(first)) == 120 if tree.pool.num_pages >= 120 else first is None
    first = budget.start([], 60)
    add(tree, list(range(100)), 80)
    assert budget.start([], 41) is None
    assert len(tree) == 1
    second = budget.start([], 40)
    assert len(tree) == 0 and not set(first) & set(second)
    budget.end(first)
    budget.end(second)
    assert budget.used_bytes == 0
    assert budget.pages(budget.longest) * PAGE + STATE_BYTES <= 1000


def test_pages_that_a_request_shares_are_not_evicted_under_it():
    tree = tree_of(20)
    budget = Budget(10_000, page_bytes=PAGE, state_bytes=STATE_BYTES, tree=tree)
    node = add(tree, list(range(40)), 40)
    running = budget.start(node.all_places(), 2)
    assert running[:10] == node.all_places()
    other = budget.start([], 8)
    assert len(tree) == 1 and not set(other) & set(running)
    assert budget.grow(1) is None
    budget.end(other)
    assert budget.grow(8) is not None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2)), max_size=30))
def test_bytes_are_those_of_the_nodes_whatever_happens(moves):
    tree = tree_of()
    texts = [[text // 2, *range(1, 3), text, *range(40)] for text in range(4)]
    for text, pages, evictions in moves:
        length = pages * PAGE
        node = tree.find(digests(texts[text][:length], PAGE)[-1])
        if node is None:
            add(tree, texts[text], length)
        else:
            tree.renew(node, Blob(STATE_BYTES))
        assert match(tree, texts[text][: length + 1]).length == length
        for _ in range(evictions):
            tree.evict()
        kept = {node for text in texts for n in range(1, 6) if (node := tree.find(digests(text[: n * PAGE], PAGE)[-1]))}
        assert tree.pool.num_used == sum(len(node.places) for node in kept)
        assert tree.state_bytes == sum(STATE_BYTES for node in kept if node.states)
        assert all(len(node.all_places()) * PAGE == node.length for node in kept)
    while tree.evict():
        pass
    assert tree.pool.num_used == tree.state_bytes == 0
