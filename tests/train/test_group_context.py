"""Processes that hold a packed row together compute what one process does: gloo, float64."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.packed_rows import gradients_of, row_of, wide_model
from sala.train.context import GroupContext
from sala.train.parallel import World
from tolerances import assert_close
from train.ranks import spawn

# ends inside a rank's part, at its border, a document over all ranks, documents of one token
PACKINGS = {
    2: ([0, 1, 30, 60, 61, 62, 119, 120], [0, 120], [0, 60, 120], [0, 7, 120]),
    3: ([0, 1, 40, 41, 80, 120], [0, 10, 115, 120]),
}


@pytest.mark.parametrize("ranks", PACKINGS)
def test_ranks_compute_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, every_check, tmp_path)


def every_check(world: World) -> None:
    torch.use_deterministic_algorithms(True)
    context = GroupContext(dist.group.WORLD)
    check_gather(context)
    for bounds in PACKINGS[world.ranks]:
        check_model("hybrid", context, bounds)
    check_model("latent", context, PACKINGS[world.ranks][0])


def check_gather(context: GroupContext) -> None:
    """The gradient of what was gathered is the sum over ranks, in the dtype of the input."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.full((2, 3), float(context.rank), dtype=dtype, requires_grad=True)
        gathered = context.gather(x.T)
        assert gathered.shape == (context.ranks, 3, 2)
        assert gathered[:, 0, 0].tolist() == list(range(context.ranks))
        weights = torch.arange(context.ranks, dtype=dtype)[:, None, None] + 1
        (gathered * weights * 2**context.rank).sum().backward()
        assert x.grad.dtype == dtype
        assert x.grad.unique().tolist() == [(context.rank + 1) * (2**context.ranks - 1)]


def check_model(kind: str, context: GroupContext, bounds: list[int]) -> None:
    ids, weights = row_of(bounds[-1])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    whole = wide_model(kind)
    expected = whole.model(ids, cu_seqlens=cu_seqlens).last_hidden_state
    (expected * weights).sum().backward()
    part, part_weights, expected_part = (x.chunk(context.ranks, dim=1)[context.rank] for x in (ids, weights, expected))
    for checkpointing in (False, True):
        model = wide_model(kind)
        if checkpointing:
            model.gradient_checkpointing_enable()
        actual = model.model(part, cu_seqlens=cu_seqlens, context=context).last_hidden_state
        assert_close(actual, expected_part)
        (actual * part_weights).sum().backward()
        for (name, gradient), right in zip(gradients_of(model).items(), gradients_of(whole).values(), strict=True):
            dist.all_reduce(gradient)
            try:
                assert_close(gradient, right)
            except AssertionError as error:
                raise AssertionError(f"{name}, documents {bounds}, checkpointing {checkpointing}: {error}") from None
