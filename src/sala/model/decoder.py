"""The decoder: embedding, layers of (mixer, MLP), head. It has no `if` on the kind of layer."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput, logging

from sala.errors import InputError
from sala.model.cache import MixerCache, SalaCache, given
from sala.model.checkpoint import check_whole
from sala.model.config import MiniCPMSALAConfig
from sala.model.documents import ends_of_call, labels_within, shifted_labels_within
from sala.model.generation import SalaGeneration
from sala.model.interface import CACHE, named
from sala.model.linear import Linear
from sala.model.mixers import MIXERS, new_cache
from sala.model.norm import RMSNorm, added_and_normed
from sala.model.packing import install, pack_all
from sala.model.rope import inverse_frequencies, rotation_tables
from sala.model.rows import Context, Rows, check_positions, place_rows
from sala.ops.pointwise import add_scaled, silu_mul

log = logging.get_logger(__name__)
Output = TypeVar("Output", bound=ModelOutput)


def _forget(hidden: Tensor) -> None:
    """What becomes of hidden states that nobody asked for."""


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: MiniCPMSALAConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


class DecoderLayer(GradientCheckpointingLayer):
    """h + r * mixer(norm h), then h + r * mlp(norm h), with r = scale_depth / sqrt(layers) (muP)."""

    def __init__(self, config: MiniCPMSALAConfig, mixer_type: str):
        super().__init__()
        self.self_attn = MIXERS[mixer_type].module(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_scale = config.residual_scale

    def forward(self, hidden_BTD: Tensor, rows: Rows, cache: MixerCache | None = None) -> Tensor:
        if cache is not None and rows.recorded is None and not cache.open:
            raise InputError(
                "a layer with a cache is computed again, as under activation checkpointing; expected use_cache=False"
            )
        branch_BTD = self.self_attn(self.input_layernorm(hidden_BTD), rows, cache)
        hidden_BTD, x_BTD = added_and_normed(self.post_attention_layernorm, hidden_BTD, branch_BTD, self.residual_scale)
        return add_scaled(hidden_BTD, self.mlp(x_BTD), self.residual_scale)


class MiniCPMSALAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, save and generate."""

    config: MiniCPMSALAConfig
    config_class = MiniCPMSALAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - transformers' own convention
    _is_stateful = True
    _supports_sdpa = True
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    # what old files have and nothing reads, and the head where only the layers are loaded
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"^lm_head\.weight$"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as transformers does, all of it or nothing: transformers draws the tensors that are missing.

        A folder that holds the layers alone (of `MiniCPMSALAModel`) gets a new head.
        output_loading_info: returns (model, names of what is missing and of what else there is), for the caller to judge.

        Raises:
            CheckpointError: it lacks tensors of the network, or has others.
        """
        name, judges = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        pack_all(model, name)
        if judges:
            return model, info
        new = {"lm_head.weight"} if MiniCPMSALAModel.__name__ in (model.config.architectures or ()) else set()
        check_whole(name, set(info["missing_keys"]) - new, info["unexpected_keys"], model.state_dict())
        return model

    def _refuse(self, output_attentions: bool | None, is_causal: bool | None) -> None:
        if is_causal is False:
            raise InputError("is_causal = False: every layer here is causal; expected True")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise InputError("output_attentions = True: no layer here ever forms attention weights; expected False")

    def _returned(self, output: Output, return_dict: bool | None) -> Output | tuple:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class MiniCPMSALAModel(MiniCPMSALAPreTrainedModel):
    """Token ids to the last hidden state."""

    def __init__(self, config: MiniCPMSALAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, mixer_type) for mixer_type in config.mixer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        install(self, config.packing, "model.")
        # tables are made for one width: layers that rotate have the same one (checked here, once)
        mixers: list[Any] = [layer.self_attn for layer in self.layers]
        widths = {mixer.rotary_width for mixer in mixers if mixer.needs_rope}
        if len(widths) > 1:
            raise InputError(f"layers that rotate turn widths {sorted(widths)}; expected one width")
        self.rope = inverse_frequencies(config, widths.pop()) if widths else None
        self.gradient_checkpointing = False
        self.post_init()

    def place(
        self,
        inputs: Tensor,
        past: int = 0,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: Context | None = None,
    ) -> Rows:
        """Return where new tokens (B, T) or embeddings (B, T, D) stand, with rotation tables; see `place_rows`."""
        batch, length = inputs.shape[:2]
        return self.rotated(place_rows(batch, length, past, inputs.device, attention_mask, cu_seqlens, context))

    def rotated(self, rows: Rows) -> Rows:
        """Return the same places with the rotation tables that layers need."""
        if self.rope is None:
            return rows
        # rows that stand alike share one table
        positions = rows.positions_BT[:1] if rows.start is not None else rows.positions_BT
        return dataclasses.replace(rows, rotation=rotation_tables(positions, *self.rope))

    def embedded(self, inputs: Tensor) -> Tensor:
        """Return what goes into the first layer: of tokens (B, T), or of their embeddings (B, T, D)."""
        embeddings_BTD = self.embed_tokens(inputs) if inputs.ndim == 2 else inputs
        return embeddings_BTD * self.config.scale_emb if self.config.scale_emb != 1 else embeddings_BTD

    def run(
        self,
        inputs: Tensor,
        rows: Rows,
        caches: Sequence[MixerCache | None],
        on_layer: Callable[[Tensor], None] = _forget,
    ) -> Tensor:
        """Return the last hidden state (B, T, D) of tokens (B, T) or embeddings (B, T, D): the one pass that every caller takes.

        caches: a cache a layer, or none. on_layer: called with what goes into each layer.
        """
        # nobody outside holds it: one is alive at once
        hidden = self.embedded(inputs)
        for layer, cache in zip(self.layers, caches, strict=True):
            on_layer(hidden)
            hidden = layer(hidden, rows, cache)
        return self.norm(hidden)

    def cache_of_call(
        self, cache: SalaCache | None, use_cache: bool | None, batch: int, packed: bool
    ) -> SalaCache | None:
        """Return the cache that a call reads and writes: the one given, a new one, or None."""
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is not None and cache.rows_held() not in (0, batch):
            raise InputError(f"a batch of {batch} with a cache of {cache.rows_held()} rows; expected as many rows")
        if cache is not None and packed:
            raise InputError("documents packed into one row with a cache; expected a call without a cache")
        if (wanted or cache is not None) and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # a layer that is computed again would read what it has written itself
            if cache is not None and cache.columns:
                raise InputError(
                    f"a cache of {cache.columns} tokens under gradient checkpointing; expected a call without a cache"
                )
            log.warning_once("gradient checkpointing: no cache is kept, use_cache=False is taken")
            return None
        return new_cache(self.config) if cache is None and wanted and not packed else cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SalaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        context: Context | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: SalaCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the layers.

        input_ids: (B, T) int64, or inputs_embeds (B, T, D), which are scaled as embeddings are.
        attention_mask: (B, past + T), 0 on padding. position_ids may be given, and must be what the mask and the cache say.
        past_key_values: another name of `cache`, the one before transformers 5.24.
        cu_seqlens: (N + 1,) ends of packed sequences in one row; without a cache. Other marks of them are `cu_seq_lens_q`,
            `seq_idx` and position_ids that start anew (`sala.model.documents`).
        context: the ranks that hold the packed row together: `input_ids` are this rank's part of it, and `cu_seqlens` those
            of the whole row, on every rank. A parameter's gradient is then this rank's part of it: the sum over the ranks
            is the whole.
        output_hidden_states, return_dict: None: as the configuration says.
        output_attentions: there for callers that pass it to every model; True is refused.
        kwargs: what callers pass to every model of transformers; what is not said here changes nothing.

        Raises:
            InputError: shapes, masks, positions and cache do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds")
        self._refuse(output_attentions, kwargs.get("is_causal"))
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        assert inputs is not None
        cache = given(cache, past_key_values)
        ends = ends_of_call(inputs.shape[1], cache, attention_mask, position_ids, cu_seqlens, context, kwargs)
        cache = self.cache_of_call(cache, use_cache, inputs.shape[0], ends is not None)
        rows = self.place(inputs, 0 if cache is None else cache.columns, attention_mask, ends, context)
        check_positions(position_ids, rows.positions_BT)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[Tensor] = []
        caches = [None] * len(self.layers) if cache is None else cache.of_layers
        with nullcontext() if cache is None else cache.all_or_nothing(rows):
            hidden = self.run(inputs, rows, caches, seen.append if wanted else _forget)
            if cache is not None:
                cache.read(input_ids, hidden.shape[1])
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden, hidden_states=(*seen, hidden) if wanted else None, **named(cache)
        )
        return self._returned(output, return_dict)


# transformers looks for GenerationMixin among the bases themselves
class MiniCPMSALAForCausalLM(MiniCPMSALAPreTrainedModel, SalaGeneration, GenerationMixin):
    """The language model: teacher and hybrid alike, by `config.mixer_types`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own convention

    def __init__(self, config: MiniCPMSALAConfig):
        super().__init__(config)
        self.model = MiniCPMSALAModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        install(self, config.packing)
        assert config.dim_model_base is not None
        self.logits_divisor = config.hidden_size / config.dim_model_base
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SalaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        context: Context | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: SalaCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits (B, T or logits_to_keep, X) float32 and, with labels (B, T; -100 is skipped), the next-token loss.

        logits_to_keep: number of last positions to compute logits for, or their indices; 0 means all.
        cu_seqlens, context: as in `MiniCPMSALAModel.forward`; no label is predicted from another document. A context is
            without labels, whose shift would need the next rank's tokens.
        kwargs: as in `MiniCPMSALAModel.forward`, and `num_items_in_batch`, by which the sum of losses is divided, and
            `shift_labels` (B, T) in place of labels: each stands at the token that predicts it.
        """
        if context is not None and labels is not None:
            raise InputError(
                "labels with a context: the last token here is followed by one of another rank; leave them out"
            )
        cache = given(cache, past_key_values)
        # no parameter of its own: Trainer would look for it beside labels
        shift_labels = kwargs.pop("shift_labels", None)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if labels is not None or shift_labels is not None:
            length = 0 if inputs is None else inputs.shape[1]
            ends = ends_of_call(length, cache, attention_mask, position_ids, cu_seqlens, context, kwargs)
            if ends is not None:
                cu_seqlens = ends
                labels = None if labels is None else labels_within(labels, ends)
                shift_labels = None if shift_labels is None else shifted_labels_within(shift_labels, ends)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            context=context,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(
            hidden[:, kept] if not (isinstance(logits_to_keep, int) and logits_to_keep == 0) else hidden
        )
        loss = None
        if labels is not None or shift_labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocab_size, shift_labels=shift_labels, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **named(output.get(CACHE))
        )
        return self._returned(result, return_dict)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return float32 logits of last hidden states: lm_head(h / (hidden_size / dim_model_base))."""
        return self.lm_head(hidden_BTD / self.logits_divisor).float()
