"""What `generate` of transformers needs to know of this model: its own cache, its own positions, padding on the left."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from sala.errors import InputError
from sala.model.cache import SalaCache, given
from sala.model.config import MiniCPMSALAConfig
from sala.model.interface import CACHE, named
from sala.model.mixers import new_cache

# the inputs that have a column for each token of the prompt
PROMPTS = ("inputs", "input_ids", "inputs_embeds")


class SalaGeneration(GenerationMixin):
    """`generate` as transformers has it, with this model's cache."""

    config: MiniCPMSALAConfig

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        cache: SalaCache | None = None,
        past_key_values: SalaCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer prompts; arguments and result are those of transformers' `generate`.

        A prompt padded on the right is answered as one padded on the left, and returned as such.

        cache, past_key_values: two names of a cache to go on from. The prompt is the whole text: what the cache has read,
            then at least one token more. With `num_return_sequences` or beams the cache's rows are repeated.

        Raises:
            InputError: the cache is another kind's, or has read another text; positions contradict the mask.
        """
        kwargs["inputs"] = inputs
        prompts = {name: kwargs[name] for name in PROMPTS if kwargs.get(name) is not None}
        mask, positions = kwargs.get("attention_mask"), kwargs.pop("position_ids", None)
        cache = given(cache, past_key_values)
        past = 0 if cache is None else cache.columns
        if positions is not None:
            _check_positions(positions, mask)
        if cache is not None:
            ids = kwargs["input_ids"] if "input_ids" in prompts else inputs
            if past and ids is not None and ids.ndim == 2:
                _check_text(cache, ids, mask)
            kwargs.update(named(cache))
        if mask is not None and mask.ndim == 2:
            order_BT = _left_padding(mask, past)
            if order_BT is not None:
                kwargs |= {
                    name: _moved(prompt, order_BT) for name, prompt in (*prompts.items(), ("attention_mask", mask))
                }
        return super().generate(kwargs.pop("inputs"), generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        # the mask and the cache say them; padding has none
        inputs.pop("position_ids", None)
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, *rest: Any
    ) -> None:
        # transformers would build its own kind, which has no compressed keys and no states of ours
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"cache_implementation = {generation_config.cache_implementation!r}; this model has one cache, its own"
            )
        if generation_config.is_assistant:
            raise InputError(
                "this model as assistant_model: its recurrent states cannot be cut back behind a draft that is refused; "
                "expected an assistant of full attention"
            )
        cache = model_kwargs.get(CACHE)
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = new_cache(self.config)
        elif cache is not None:
            cache._is_user_defined = True
            repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            if repeats > 1 and cache.rows_held() == batch_size:
                cache.batch_repeat_interleave(repeats)


def _check_positions(positions_BT: Tensor, mask_BT: Tensor | None) -> None:
    if mask_BT is None:
        fits = bool((positions_BT == torch.arange(positions_BT.shape[-1], device=positions_BT.device)).all())
    else:
        counted_BT = (mask_BT.long().cumsum(-1) - 1)[:, -positions_BT.shape[-1] :].to(positions_BT.device)
        real_BT = mask_BT[:, -positions_BT.shape[-1] :].bool().to(positions_BT.device)
        fits = not bool(((positions_BT != counted_BT) & real_BT).any())
    if not fits:
        raise InputError(
            "position_ids are no count of each row's tokens; expected none, or from 0 on, padding left out"
        )


def _check_text(cache: SalaCache, ids_BT: Tensor, mask_BT: Tensor | None) -> None:
    past, length = cache.columns, ids_BT.shape[1]
    whole = length if mask_BT is None else mask_BT.shape[1]
    if whole <= past:
        raise InputError(
            f"a prompt of {whole} tokens with a cache that has read {past}; expected the whole text, those {past} and at "
            "least one more"
        )
    read_BT = cache.seen.tokens()
    if length != whole or read_BT is None or read_BT.shape[0] != ids_BT.shape[0]:
        return
    differs_BT = read_BT != ids_BT[:, :past].to(read_BT.device)
    if mask_BT is not None:
        differs_BT &= mask_BT[:, :past].bool().to(read_BT.device)
    if bool(differs_BT.any()):
        row, column = differs_BT.nonzero()[0].tolist()
        raise InputError(
            f"the cache has read another text: its token {column} of row {row} is {int(read_BT[row, column])}, the prompt's "
            f"{int(ids_BT[row, column])}; expected a prompt that starts with what the cache has read"
        )


def _left_padding(mask_BT: Tensor, past: int) -> Tensor | None:
    """Return the order (B, T) of the new columns in which padding comes first, None where it does already."""
    new_BT = mask_BT[:, past:].bool()
    if not bool((new_BT[:, :-1] & ~new_BT[:, 1:]).any()):
        return None
    return new_BT.int().argsort(dim=1, stable=True)


def _moved(prompt: Tensor, order_BT: Tensor) -> Tensor:
    """Return ids, mask (B, S) or embeddings (B, S, D) with their last columns in that order."""
    kept, new = prompt[:, : -order_BT.shape[1]], prompt[:, -order_BT.shape[1] :]
    order = order_BT.to(prompt.device)
    order = order if prompt.ndim == 2 else order[..., None].expand_as(new)
    return torch.cat((kept, new.gather(1, order)), dim=1)
