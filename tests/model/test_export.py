"""torch.export takes the model, with a mask and without."""

import pytest
import torch

from model.shapes import tiny_model, tokens
from sala.errors import InputError

KINDS = {
    "hybrid": {},
    "attention": {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attention_qk_norm": True},
    "scaled-logits": {"attn_logits_scaling": 20},
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_reads_any_mask_of_its_shape(kind: str, gradients: bool) -> None:
    model, ids = tiny_model(**KINDS[kind]), tokens(3, 60)
    mask = torch.ones_like(ids)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (ids,), {"attention_mask": mask, "use_cache": False}).module()
        mask[1, :20], mask[2, 40:] = 0, 0
        for given in (mask, torch.ones_like(mask)):
            exported = program(ids, attention_mask=given, use_cache=False).logits
            expected = model(ids, attention_mask=given, use_cache=False).logits
            torch.testing.assert_close(exported[given.bool()], expected[given.bool()], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_program_without_a_mask_chooses_blocks() -> None:
    model, ids = tiny_model(), tokens(1, 150)
    program = torch.export.export(model, (ids,), {"use_cache": False}).module()
    other = tokens(1, 150, seed=1)
    torch.testing.assert_close(program(other, use_cache=False).logits, model(other, use_cache=False).logits)


@torch.no_grad()
def test_a_mask_on_which_the_choice_of_blocks_depends_is_refused() -> None:
    model, ids = tiny_model(), tokens(1, 150)
    with pytest.raises(InputError, match="expected no mask, or fewer than 65 tokens"):
        torch.export.export(model, (ids,), {"attention_mask": torch.ones_like(ids), "use_cache": False})
