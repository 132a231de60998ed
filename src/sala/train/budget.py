"""What a recipe costs, told before it runs: operations, memory of a GPU and GPU-hours of each stage."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sala.errors import RecipeError
from sala.model import MiniCPMSALAConfig
from sala.recipe import Mesh, Recipe, Stage, require_mesh_fits
from sala.train import losses
from sala.train.cards import Cluster
from sala.train.flops import (
    HEAD,
    LIGHTNING,
    Flops,
    Networks,
    mixer_shape,
    network_of,
    place_of,
    stage_flops,
    student_of,
)
from sala.train.optimizer import STATE_NUMBERS, grouped
from sala.train.parallel import PRECISIONS

FLOAT32_BYTES = 4


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


def activation_numbers(config: MiniCPMSALAConfig, kind: str, *, mlp: bool = True) -> int:
    """Return how many numbers a token of a layer keeps for the backward pass, with fused elementwise work.

    The mixer: its normed input D; queries, keys, values (H K, G K, G V), the first two once more where a norm or a rotation
    stands behind the projection; attention's output H V, and where a gate or norm follows, the gate and the result, 2 H V.
    The layer: its input, the sum in the middle and its norm, 3 D; gate, up and their product, 3 F.
    """
    m, D = mixer_shape(config, kind), config.hidden_size
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
    network, kinds = student_of(stage, networks)
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
        layer = place_of(name, config.num_hidden_layers)[0]
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
    softmax = [mixer_shape(config, kind) for kind in kinds if kind != LIGHTNING]
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
        teacher = b * count(network_of(networks.teacher).parameters)
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
                trained_parameters=sum(p.numel() for p in student_of(stage, networks)[0].trained.values()),
                flops=flops,
                memory=memory,
                gpu_hours=gpu_hours,
                hours=gpu_hours / mesh.ranks,
                fits=memory.total <= cluster.memory_bytes,
            )
        )
    return tuple(rows)
