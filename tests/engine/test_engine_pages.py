"""Prefixes are found by their tokens alone, go when they were used longest ago, and every byte is counted."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from sala.engine.pages import Budget, PrefixTree, digests

PAGE = 4
STATE_BYTES = 100


@dataclass
class Blob:
    size_bytes: int


def add(tree, tokens, length):
    """Keep the first `length` of `tokens`, whose keys take a byte each."""
    pages = digests(tokens[:length], PAGE)
    parent = tree.deepest(pages)
    start = 0 if parent is None else parent.length
    return tree.add(tuple(tokens[start:length]), pages, Blob(length - start), Blob(STATE_BYTES))


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
    tree, tokens = PrefixTree(PAGE), list(range(20))
    add(tree, tokens, 4)
    add(tree, tokens, 12)
    assert match(tree, tokens).length == 12
    assert match(tree, tokens[:13]).length == 12
    assert match(tree, tokens[:12]).length == 4


def test_other_text_is_not_found_and_its_first_token_is_named():
    tree, tokens = PrefixTree(PAGE), list(range(20))
    add(tree, tokens, 8)
    for at in range(8):
        other = [*tokens[:at], 99, *tokens[at + 1 :]]
        assert match(tree, other).length == 0
        assert f"token {at:,}" in why(tree, other)
    assert why(tree, tokens[:9]) == ""


def test_what_is_missing_between_two_snapshots_is_said():
    tree, tokens = PrefixTree(PAGE), list(range(40))
    add(tree, tokens, 4)
    add(tree, tokens, 32)
    other = [*tokens[:18], 99, 99, 99, 99]
    found = match(tree, other)
    assert (found.length, found.known) == (4, 16)
    assert why(tree, other) == "other text from token 18, and states before it only at token 4"


def test_the_least_recently_used_goes_first_and_an_evicted_prefix_is_remembered():
    tree, left, right = PrefixTree(PAGE), list(range(8)), list(range(50, 58))
    first = add(tree, left, 4)
    add(tree, right, 4)
    tree.touch(first)
    assert tree.evict()
    assert match(tree, left).length == 4
    assert match(tree, right).length == 0
    assert why(tree, right) == "evicted"


def test_keys_stay_as_long_as_a_longer_prefix_needs_them():
    tree, tokens = PrefixTree(PAGE), list(range(20))
    short = add(tree, tokens, 8)
    long = add(tree, tokens, 16)
    assert tree.size_bytes == 16 + 2 * STATE_BYTES
    tree.evict()
    assert short.states is None
    assert [node.length for node in match(tree, tokens).node.path()] == [8, 16]
    assert tree.size_bytes == 16 + STATE_BYTES
    tree.renew(short, Blob(STATE_BYTES))
    tree.touch(long)
    assert match(tree, tokens[:9]).length == 8
    while tree.evict():
        pass
    assert tree.size_bytes == 0
    assert not tree.find(long.digest)


def test_room_is_made_from_kept_prefixes_and_never_from_running_requests():
    tree = PrefixTree(PAGE)
    budget = Budget(1000, PAGE, token_bytes=1, state_bytes=STATE_BYTES, tree=tree)
    assert budget.take(600)
    add(tree, list(range(300)), 200)
    assert not budget.take(500)
    assert len(tree) == 1
    assert budget.take(400)
    assert len(tree) == 0
    budget.give_back(1000)
    assert budget.free_bytes == 1000
    assert budget.need(1) == PAGE + STATE_BYTES
    assert budget.need(budget.longest) <= 1000 < budget.need(budget.longest + 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2)), max_size=30))
def test_bytes_are_those_of_the_nodes_whatever_happens(moves):
    tree = PrefixTree(PAGE)
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
        assert tree.size_bytes == sum(node.size_bytes for node in kept)
        assert all(sum(len(part.tokens) for part in node.path()) == node.length for node in kept)
    while tree.evict():
        pass
    assert tree.size_bytes == 0
