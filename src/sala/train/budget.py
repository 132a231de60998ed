"""What a recipe costs, told before it runs: operations, memory of a GPU and GPU-hours of each stage, by formula."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sala.errors import InputError, RecipeError, nearest
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.config import FULL_ROWS
from sala.model.mixers import sparse_mixers
from sala.recipe import Mesh, Recipe, Stage, require_mesh_fits
from sala.train import losses
from sala.train.loop import trainable_parameters
from sala.train.optimizer import STATE_NUMBERS, grouped
from sala.train.parallel import PRECISIONS

FLOAT32_BYTES = 4
LIGHTNING = "lightning-attn"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Dense peaks in TFLOP/s (bfloat16 on tensor cores, float32 without them) and memory in GiB."""

    bfloat16: float
    float32: float
    memory: float


# makers' data sheets, without sparsity
GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(312, 19.5, 80),
    "a800": Gpu(312, 19.5, 80),
    "h100": Gpu(989.4, 66.9, 80),
    "h200": Gpu(989.4, 66.9, 141),
    "b200": Gpu(2250, 75, 180),
    "l40s": Gpu(362, 91.6, 48),
    "rtx-4090": Gpu(165.2, 82.6, 24),
    "rtx-5090": Gpu(209.5, 104.8, 32),
}
# what torch calls these cards. PCIe and NVL cards of the same generation are slower where they are not named
DEVICE_NAMES: Mapping[str, str] = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA A800 80GB PCIe": "a800",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """`gpus` None: as many as a stage's mesh has. mfu: operations done a second as a part of the peak."""

    gpu: str
    peak_flops_s: float
    memory_bytes: float
    mfu: float
    gpus: int | None = None


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


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU; see `stage_memory`."""

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, slots=True)
class StageBudget:
    """A stage's row: its plan, and what it costs on the mesh."""

    stage: Stage
    mesh: Mesh
    # windows of a forward pass of a rank, and how many of those make a step
    micro_batch: int
    accumulation: int
    trained_parameters: int
    flops: Flops
    memory: Memory
    gpu_hours: float
    hours: float
    fits: bool


def cluster(
    gpu: str, *, precision: str, gpus: int | None = None, memory_gib: float | None = None, mfu: float
) -> Cluster:
    """Return a cluster of cards of a name in `GPUS`, or of a number of TFLOP/s with their memory.

    Raises:
        InputError: the name is not known, or a number comes without memory.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu}: a part of the peak; expected above 0 and at most 1, such as 0.4")
    if gpu in GPUS:
        card = GPUS[gpu]
        tflops, memory_gib = getattr(card, precision), card.memory if memory_gib is None else memory_gib
    else:
        try:
            tflops = float(gpu)
        except ValueError:
            raise InputError(
                f"--gpu {gpu!r} is not known; there are {', '.join(GPUS)}, or a number of TFLOP/s{nearest(gpu, GPUS)}"
            ) from None
        if memory_gib is None:
            raise InputError(f"--gpu {gpu} says TFLOP/s only; give --memory, the GiB of a card")
    if not (0 < tflops < math.inf and 0 < memory_gib < math.inf):
        raise InputError(f"--gpu {gpu} with --memory {memory_gib}: expected numbers above 0")
    return Cluster(gpu, tflops * 1e12, memory_gib * 2**30, mfu, gpus)


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


def _place(name: str, num_layers: int) -> Place:
    """Return (layer, place in it) of a parameter, in the order of the forward pass."""
    if name == EMBEDDING:
        return -1, 0
    if not name.startswith("model.layers."):
        return num_layers, int(name == HEAD)
    _, _, layer, *_, module, _ = name.split(".")
    return int(layer), PLACES.get(module, 1)


@dataclass(frozen=True, slots=True)
class _Network:
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
        return min((_place(name, self.config.num_hidden_layers) for name in self.trained), default=(2**31, 0))


def _network(config: MiniCPMSALAConfig, stage: Stage | None = None) -> _Network:
    """Return a network with what `stage` trains; None trains nothing, "align" has only the mixers and trains them."""
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config)
    parameters = dict(model.named_parameters())
    if stage is None:
        return _Network(config, parameters, {})
    if stage.loss == "align":
        mixers = {name: tensor for name, tensor in parameters.items() if ".self_attn." in name}
        return _Network(config, mixers, mixers)
    return _Network(config, parameters, trainable_parameters(model, stage.trainable, freeze_qk=stage.freeze_qk))


@dataclass(frozen=True, slots=True)
class _Mixer:
    """Heads and widths of a layer, in the letters of `sala.ops`."""

    H: int
    G: int
    K: int
    V: int
    turned: bool  # queries and keys are normed or rotated between projection and attention
    gated: bool


def _mixer(config: MiniCPMSALAConfig, kind: str) -> _Mixer:
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
    m = _mixer(config, kind)
    if kind == LIGHTNING:
        return 4 * m.K * m.V * m.H * T, 0
    pair = 2 * (m.K + m.V) * m.H
    if kind in FULL_ROWS:
        geometry = config.sparse_geometry
        return pair * geometry.keys_read(T), 2 * m.K * m.H * geometry.windows_scored(T)
    return pair * T * (T + 1) // 2, 0


def _pass_flops(network: _Network, kinds: Iterable[str], T: int, *, checkpointing: bool, apart: bool) -> Flops:
    """Return the operations of one window; `apart` makes every layer a problem of its own."""
    first = network.first_trained()
    forward = backward = recompute = 0

    def flows(place: Place) -> bool:
        """Whether something trains before this place, so that a gradient goes through it."""
        return place[1] > first[1] if apart else place > first

    for name, numel in network.matrices.items():
        place = _place(name, network.config.num_hidden_layers)
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
    network, kinds = _student(stage, networks)
    apart = stage.loss == "align"
    flops = _pass_flops(network, kinds, stage.length, checkpointing=stage.activation_checkpointing, apart=apart)
    if stage.loss != "next_token":
        assert networks.teacher is not None
        teacher = _network(networks.teacher)
        work = _pass_flops(
            teacher, networks.teacher.mixer_types, stage.length, checkpointing=False, apart=False
        ).forward
        if apart:
            work -= 2 * teacher.matrices[HEAD] * stage.length
        flops = dataclasses.replace(flops, teacher=work)
    return flops.times(stage.steps * stage.batch)


def model_flops(stage: Stage, networks: Networks) -> int:
    """Return the operations of one step, over all ranks, that model FLOPs utilisation counts: `stage_flops` without
    what activation checkpointing computes again. A teacher's forward pass is work of the loss, and counts.

    Source: PaLM (Chowdhery et al. 2022, appendix B); utilisation is this / (seconds of a step x ranks x `peak_flops`).
    """
    flops = stage_flops(stage, networks)
    return (flops.total - flops.recompute) // stage.steps


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the dense FLOP/s of a GPU in a recipe's precision as in `GPUS`; None for another device."""
    if device.type != "cuda":
        return None
    name = DEVICE_NAMES.get(torch.cuda.get_device_name(device))
    return None if name is None else getattr(GPUS[name], precision) * 1e12


def _student(stage: Stage, networks: Networks) -> tuple[_Network, tuple[str, ...]]:
    config = networks.twins if stage.loss == "align" else networks.student
    assert config is not None
    return _network(config, stage), sparse_mixers(config.mixer_types, stage.sparse)


def activation_numbers(config: MiniCPMSALAConfig, kind: str, *, mlp: bool = True) -> int:
    """Return how many numbers a token of a layer keeps for the backward pass, with fused elementwise work.

    The mixer: its normed input D; queries, keys, values (H K, G K, G V), the first two once more where a norm or a rotation
    stands behind the projection; attention's output H V, and where a gate or norm follows, the gate and the result, 2 H V.
    The layer: its input, the sum in the middle and its norm, 3 D; gate, up and their product, 3 F.
    """
    m, D = _mixer(config, kind), config.hidden_size
    mixer = D + (m.H + m.G) * m.K * (1 + m.turned) + m.G * m.V + m.H * m.V * (1 + 2 * m.gated)
    return mixer + (3 * D + 3 * config.intermediate_size if mlp else 0)


def stage_memory(stage: Stage, networks: Networks, mesh: Mesh, recipe: Recipe) -> Memory:
    """Return the bytes of one GPU, with b bytes of a number in a product (4, or 2 in bfloat16) and s = dp_shard x cp.

    - weights, gradients: 4 of a parameter (that trains) / s; optimizer: 8 of one that AdamW moves, 4 of Muon's, / s
    - teacher: b of its parameters / s
    - gathered, when s > 1 or b = 2: the embedding and head and two layers in b (one works, the next one arrives), and the
      larger one's gradients before they are reduced, 4
    - activations: `activation_numbers` of every layer that a gradient goes through, in b, for the tokens of a micro-batch
      on this rank; with checkpointing what enters each layer, and all of one layer. Alignment keeps the answers of every
      mixer of the teacher and of its twin. With cp > 1 keys and values of a whole window in one layer, and their gradients
    - loss: a chunk of float32 logits and its gradient (twice for two models); gradients to all final states and the head

    Layers that are frozen in part keep less. Not counted: what a backend needs inside an operator, buffers of
    communication, fragmentation, the CUDA context.
    """
    network, kinds = _student(stage, networks)
    config, b = network.config, PRECISIONS[recipe.precision].itemsize
    shards = mesh.dp_shard * mesh.cp
    optimizer = recipe.optimizer_of(stage)
    state = sum(
        STATE_NUMBERS[optimizer.kind if group == "matrices" else "adamw"] * sum(p.numel() for p in members.values())
        for group, members in grouped(network.trained).items()
    )
    layers: dict[int, int] = {}
    trained_in: dict[int, int] = {}
    for name, parameter in network.parameters.items():
        layer = _place(name, config.num_hidden_layers)[0]
        # the embedding, the last norm and the head are one unit
        unit = layer if 0 <= layer < config.num_hidden_layers else -1
        layers[unit] = layers.get(unit, 0) + parameter.numel()
        trained_in[unit] = trained_in.get(unit, 0) + (parameter.numel() if name in network.trained else 0)
    root = layers.pop(-1, 0)
    gathered = 0
    if shards > 1 or b < FLOAT32_BYTES:
        gathered = b * (root + 2 * max(layers.values())) + FLOAT32_BYTES * max(trained_in.values())

    tokens = (stage.micro_batch or stage.batch // mesh.data_parallel) * stage.length // mesh.cp
    D = config.hidden_size
    align = stage.loss == "align"
    first = 0 if align else max(0, network.first_trained()[0])
    kept = [activation_numbers(config, kind, mlp=not align) for kind in kinds[first:]]
    if stage.activation_checkpointing:
        numbers = D * len(kept) + max(kept)
    else:
        # the answers of each of the teacher's mixers and of its twin
        numbers = sum(kept) + (2 * D * len(kept) if align else 0)
    activations = b * numbers * tokens
    softmax = [_mixer(config, kind) for kind in kinds if kind != LIGHTNING]
    if mesh.cp > 1 and softmax:
        activations += 2 * b * max(m.G * (m.K + m.V) for m in softmax) * tokens * mesh.cp
    loss = 0
    if not align:
        chunk = min(losses.CHUNK_LOGITS, tokens * config.vocab_size)
        loss = FLOAT32_BYTES * 2 * chunk * (2 if stage.loss == "distill" else 1) + b * D * tokens
        loss += FLOAT32_BYTES * D * config.vocab_size if network.trains(HEAD) else 0

    def count(parameters: Mapping[str, nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters.values())

    teacher = 0
    if stage.loss != "next_token":
        assert networks.teacher is not None
        teacher = b * count(_network(networks.teacher).parameters)
    return Memory(
        weights=FLOAT32_BYTES * count(network.parameters) // shards,
        teacher=teacher // shards,
        gradients=FLOAT32_BYTES * count(network.trained) // shards,
        optimizer=FLOAT32_BYTES * state // shards,
        gathered=gathered,
        activations=activations,
        loss=loss,
    )


def _on(recipe: Recipe, index: int, gpus: int | None) -> Mesh:
    """Return the mesh of a stage with as many replicas as `gpus` have room for, or raise RecipeError.

    Where its windows do not divide over them, more ranks share a window instead.
    """
    stage = recipe.stages[index]
    mesh = planned = recipe.mesh_of(stage)
    place = f"stages.{index} ({stage.name!r}): "
    if gpus is not None:
        copy = mesh.dp_shard * mesh.cp
        if gpus % copy:
            near = " or ".join(str(n * copy) for n in (gpus // copy, gpus // copy + 1) if n)
            field = "mesh" if stage.mesh is None else f"stages.{stage.name}.mesh"
            all_in_one = f"{field}.dp_shard={gpus // mesh.cp}"
            if gpus % mesh.cp:
                all_in_one = f"{field}.dp_shard={gpus} --set {field}.cp=1"
            raise RecipeError(
                f"{place}{gpus} GPUs do not divide into copies of {copy} (dp_shard {mesh.dp_shard} x cp {mesh.cp}); "
                f"expected {near}, or one copy over all of them: --set {all_in_one}"
            )
        mesh = mesh.model_copy(update={"dp_replicate": gpus // copy})
        if stage.batch % mesh.data_parallel and gpus % planned.ranks == 0:
            longer = planned.model_copy(update={"cp": planned.cp * gpus // planned.ranks})
            mesh = mesh if stage.length % longer.cp else longer
    try:
        require_mesh_fits(stage, mesh, place)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return mesh


def stage_budgets(recipe: Recipe, networks: Networks, cluster: Cluster) -> tuple[StageBudget, ...]:
    """Return what each stage of a recipe costs. GPU-hours are operations / (peak x mfu).

    Raises:
        RecipeError: a stage cannot be split over the cluster's GPUs.
        SalaError: a stage trains nothing, or needs what the network does not have.
    """
    rows = []
    for index, stage in enumerate(recipe.stages):
        mesh = _on(recipe, index, cluster.gpus)
        share = stage.batch // mesh.data_parallel
        flops = stage_flops(stage, networks)
        memory = stage_memory(stage, networks, mesh, recipe)
        gpu_hours = flops.total / (cluster.peak_flops_s * cluster.mfu) / 3600
        rows.append(
            StageBudget(
                stage=stage,
                mesh=mesh,
                micro_batch=stage.micro_batch or share,
                accumulation=share // (stage.micro_batch or share),
                trained_parameters=sum(p.numel() for p in _student(stage, networks)[0].trained.values()),
                flops=flops,
                memory=memory,
                gpu_hours=gpu_hours,
                hours=gpu_hours / mesh.ranks,
                fits=memory.total <= cluster.memory_bytes,
            )
        )
    return tuple(rows)
