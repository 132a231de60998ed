"""A packed row that ranks hold in parts is the row in one process, and is its documents one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.packed_rows import KINDS, row_of, wide_model
from model.shapes import tiny_model, tokens
from sala.errors import InputError
from simulated_ranks import ThreadContext, on_ranks
from tolerances import assert_close


def assert_parts_are_the_row(kind: str, ranks: int, bounds: list[int]) -> None:
    """Compare hidden states and all parameters' gradients with documents run one by one, without packing."""
    model, (ids, weights) = wide_model(kind).model, row_of(bounds[-1])
    cu_seqlens = torch.tensor(bounds)
    parts = ids.chunk(ranks, dim=1)
    hidden = on_ranks(
        ranks,
        lambda context: model(parts[context.rank], cu_seqlens=cu_seqlens, context=context).last_hidden_state,
    )
    actual = torch.cat(hidden, dim=1)
    documents = [model(document).last_hidden_state for document in ids.split(cu_seqlens.diff().tolist(), dim=1)]
    expected = torch.cat(documents, dim=1)
    assert_close(actual, expected)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((actual * weights).sum(), parameters)
    rights = torch.autograd.grad((expected * weights).sum(), parameters)
    for gradient, right in zip(gradients, rights, strict=True):
        assert_close(gradient, right)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_every_kind_of_model_are_the_row(kind: str) -> None:
    # ends inside a part and at its border, documents of one token, and one that the next rank's tokens make long
    assert_parts_are_the_row(kind, 3, [0, 1, 20, 21, 140, 160, 161, 240])
    # of similar length, on both sides of where a context becomes long
    assert_parts_are_the_row(kind, 1, [0, 1, 71, 156, 240])


@settings(max_examples=12)
@given(data=st.data())
def test_parts_of_any_packing_are_the_row(data: st.DataObject) -> None:
    ranks, part = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 60), "tokens a rank")
    length = ranks * part
    cuts = data.draw(
        st.sets(st.sampled_from(range(1, length + 1)) | st.sampled_from(range(part, length + 1, part)), max_size=5)
    )
    assert_parts_are_the_row("hybrid", ranks, [0, *sorted(cuts - {length}), length])


def test_selection_leaves_blocks_out() -> None:
    model, (ids, _) = wide_model("hybrid").model, row_of(160)
    with torch.no_grad():
        model.eval()
        full = wide_model("hybrid").model.eval()
        for layer in full.layers:
            if hasattr(layer.self_attn, "geometry"):
                layer.self_attn.geometry = type(layer.self_attn.geometry)(dense_len=10**6)
        difference = (model(ids).last_hidden_state - full(ids).last_hidden_state).abs().amax(-1)[0]
    assert difference[:40].max() < 1e-12
    assert difference[60:].max() > 1e-3


@pytest.mark.parametrize("layer", [0, 2])
def test_documents_are_padded_to_similar_ones_only(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, work = wide_model("hybrid").model.layers[layer].self_attn, []
    lengths = [300, *range(1, 40), 90]

    def attend(q, k, v, document_length):
        work.append(q.shape[0] * q.shape[1] ** 2)
        return q

    monkeypatch.setattr(mixer, "attend_rows", attend)
    model = wide_model("hybrid").model
    x = torch.randn(1, sum(lengths), 32, dtype=torch.float64)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    mixer(x, model.place(x, cu_seqlens=ends))
    assert sum(work) < 2 * sum(length**2 for length in lengths)
    assert len(work) < 16


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_other_documents_are_not_compiled_again(layer: int) -> None:
    model = wide_model("hybrid").model
    x = torch.randn(1, 60, 32, dtype=torch.float64)
    first, second = (model.place(x, cu_seqlens=torch.tensor(ends)) for ends in ([0, 60], [0, 7, 8, 50, 60]))
    torch._dynamo.reset()
    compiled = torch.compile(model.layers[layer], dynamic=False, backend="eager")
    compiled(x, first)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(compiled(x, second), model.layers[layer](x, second))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m(tokens(1, 9), context=c), "expected cu_seqlens from 0 to 18"),
        (
            lambda m, c: m(tokens(1, 9), cu_seqlens=torch.tensor([0, 9]), context=c),
            "to 18, 9 tokens on each of 2 ranks",
        ),
        (
            lambda m, c: m(tokens(1, 9), cu_seqlens=torch.tensor([0, 18]), context=c, labels=tokens(1, 9)),
            "labels with a context",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call(tiny_model(), ThreadContext(0, [None] * 2, None))


def test_logits_of_a_part_are_those_of_the_row() -> None:
    model, ids, ends = tiny_model(), tokens(1, 60), torch.tensor([0, 20, 60])
    with torch.no_grad():
        whole = model(ids, cu_seqlens=ends).logits

    def logits(context):
        with torch.no_grad():
            return model(ids.chunk(2, dim=1)[context.rank], cu_seqlens=ends, context=context).logits

    assert_close(torch.cat(on_ranks(2, logits), dim=1), whole)
