"""Operations of a stage, by formula."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.kinds import FULL_ROWS, LIGHTNING
from sala.model.mixers import sparse_mixers
from sala.recipe import Stage
from sala.train.trainable import trainable_parameters


@dataclass(frozen=True, slots=True)
class Networks:
    """What the stages of a recipe run on.

    twins, teacher: of a conversion; the linear twin of every layer, and the model that is converted.
    """

    student: MiniCPMSALAConfig
    teacher: MiniCPMSALAConfig | None = None
    twins: MiniCPMSALAConfig | None = None


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations; a multiplication and an addition are two."""

    forward: int = 0
    backward: int = 0
    recompute: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute + self.teacher

    def times(self, number: int) -> "Flops":
        return Flops(**{name: value * number for name, value in dataclasses.asdict(self).items()})


# where a module stands in its layer; all else of a mixer makes queries, keys, values and gates of what comes in
CORE = 2
PLACES = {
    "input_layernorm": 0,
    "o_norm": 3,
    "o_proj": 4,
    "post_attention_layernorm": 5,
    "gate_proj": 6,
    "up_proj": 6,
    "down_proj": 7,
}
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

Place = tuple[int, int]


def place_of(name: str, num_layers: int) -> Place:
    """Return (layer, place in it) of a parameter, in the order of the forward pass."""
    if name == EMBEDDING:
        return -1, 0
    if not name.startswith("model.layers."):
        return num_layers, int(name == HEAD)
    _, _, layer, *_, module, _ = name.split(".")
    return int(layer), PLACES.get(module, 1)


@dataclass(frozen=True, slots=True)
class Network:
    """A configuration, its parameters without storage, and which of them a stage trains."""

    config: MiniCPMSALAConfig
    parameters: dict[str, nn.Parameter]
    trained: dict[str, nn.Parameter]

    @property
    def matrices(self) -> dict[str, int]:
        """The weight of every product by name, with its count of numbers; a tied head is one too."""
        found = {n: p.numel() for n, p in self.parameters.items() if p.ndim == 2 and n != EMBEDDING}
        if HEAD not in self.parameters and EMBEDDING in self.parameters:
            found[HEAD] = self.parameters[EMBEDDING].numel()
        return found

    def trains(self, name: str) -> bool:
        tied = name == HEAD and HEAD not in self.parameters
        return (EMBEDDING if tied else name) in self.trained

    def first_trained(self) -> Place:
        return min((place_of(name, self.config.num_hidden_layers) for name in self.trained), default=(2**31, 0))


def network_of(config: MiniCPMSALAConfig, stage: Stage | None = None) -> Network:
    """Return a network with what `stage` trains; None trains nothing, "align" has only the mixers and trains them."""
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config)
    parameters = dict(model.named_parameters())
    if stage is None:
        return Network(config, parameters, {})
    if stage.loss == "align":
        mixers = {name: tensor for name, tensor in parameters.items() if ".self_attn." in name}
        return Network(config, mixers, mixers)
    return Network(config, parameters, trainable_parameters(model, stage.trainable, freeze_qk=stage.freeze_qk))


@dataclass(frozen=True, slots=True)
class _Mixer:
    """Heads and widths of a layer, in the letters of `sala.ops`."""

    H: int
    G: int
    K: int
    V: int
    turned: bool  # queries and keys are normed or rotated between projection and attention
    gated: bool


def mixer_shape(config: MiniCPMSALAConfig, kind: str) -> _Mixer:
    if kind == LIGHTNING:
        assert config.lightning_nh and config.lightning_nkv and config.lightning_head_dim
        return _Mixer(
            config.lightning_nh,
            config.lightning_nkv,
            config.lightning_head_dim,
            config.v_head_dim or config.lightning_head_dim,
            config.qk_norm or config.lightning_use_rope,
            config.use_output_gate or config.use_output_norm,
        )
    assert config.num_key_value_heads and config.head_dim
    return _Mixer(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.v_head_dim or config.head_dim,
        config.attention_qk_norm or config.attn_use_rope,
        config.attn_use_output_gate,
    )


def attention_flops(config: MiniCPMSALAConfig, kind: str, T: int) -> tuple[int, int]:
    """Return (attend, select): operations of a layer's attention in a forward pass over one window of T tokens.

    - full: 2 (K + V) H for each of T (T + 1) / 2 pairs of a query and a key
    - block-sparse: 2 (K + V) H for each key read, and to select 2 K H for each window of keys that is scored
    - lightning: 4 K V H a token, the update of the state and its product with the query

    A backend may do more (a chunk computes what its mask hides).
    """
    m = mixer_shape(config, kind)
    if kind == LIGHTNING:
        return 4 * m.K * m.V * m.H * T, 0
    pair = 2 * (m.K + m.V) * m.H
    if kind in FULL_ROWS:
        geometry = config.sparse_geometry
        return pair * geometry.keys_read(T), 2 * m.K * m.H * geometry.windows_scored(T)
    return pair * T * (T + 1) // 2, 0


def _pass_flops(network: Network, kinds: Iterable[str], T: int, *, checkpointing: bool, apart: bool) -> Flops:
    """Return the operations of one window; `apart` makes every layer a problem of its own."""
    first = network.first_trained()
    forward = backward = recompute = 0

    def flows(place: Place) -> bool:
        """Whether something trains before this place, so that a gradient goes through it."""
        return place[1] > first[1] if apart else place > first

    for name, numel in network.matrices.items():
        place = place_of(name, network.config.num_hidden_layers)
        own = 2 * numel * T
        forward += own
        backward += own * (flows(place) + network.trains(name))
        if (
            checkpointing
            and first[0] <= place[0] < network.config.num_hidden_layers
            and place[1] != PLACES["down_proj"]
        ):
            recompute += own
    for layer, kind in enumerate(kinds):
        attend, select = attention_flops(network.config, kind, T)
        forward += attend + select
        backward += 2 * attend * flows((layer, CORE))
        recompute += (attend + select) * (checkpointing and layer >= first[0])
    return Flops(forward, backward, recompute)


def stage_flops(stage: Stage, networks: Networks) -> Flops:
    """Return the operations of a stage.

    Of a window of T tokens, with n numbers in a matrix:

    - forward: 2 n T for each matrix (the head is one, the embedding none), and attention by kind (`attention_flops`)
    - backward: 2 n T for each matrix that trains, 2 n T again for each that a gradient goes through to something that
      trains before it, and twice the forward pass of attention that a gradient goes through (nothing for its selection)
    - recompute, with activation checkpointing: the forward pass of layers that a gradient goes through once more, but for
      their last product, whose result nothing needs
    - teacher: its forward pass, without the head in alignment, where no logits are asked for

    The loss makes its gradients beside its logits and recomputes none. Norms, softmax and other elementwise work, the
    optimizer, and the scoring of layers between alignment and distillation are not counted.
    """
    network, kinds = student_of(stage, networks)
    apart = stage.loss == "align"
    flops = _pass_flops(network, kinds, stage.length, checkpointing=stage.activation_checkpointing, apart=apart)
    if stage.loss != "next_token":
        assert networks.teacher is not None
        work = forward_flops(networks.teacher, stage.length)
        if apart:
            work -= 2 * network_of(networks.teacher).matrices[HEAD] * stage.length
        flops = dataclasses.replace(flops, teacher=work)
    return flops.times(stage.steps * stage.batch)


def forward_flops(config: MiniCPMSALAConfig, T: int) -> int:
    """Return the operations of a forward pass over one window of T tokens, with the logits of all of them."""
    return _pass_flops(network_of(config), config.mixer_types, T, checkpointing=False, apart=False).forward


def model_flops(stage: Stage, networks: Networks) -> int:
    """Return the operations of one step, over all ranks, that model FLOPs utilisation counts: `stage_flops` without
    what activation checkpointing computes again. A teacher's forward pass is work of the loss, and counts.

    Source: PaLM (Chowdhery et al. 2022, appendix B); utilisation is this / (seconds of a step x ranks x `peak_flops`).
    """
    flops = stage_flops(stage, networks)
    return (flops.total - flops.recompute) // stage.steps


def student_of(stage: Stage, networks: Networks) -> tuple[Network, tuple[str, ...]]:
    config = networks.twins if stage.loss == "align" else networks.student
    assert config is not None
    return network_of(config, stage), sparse_mixers(config.mixer_types, stage.sparse)
