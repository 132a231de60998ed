"""What a recipe costs: operations as torch counts them, memory that follows the mesh, hours that follow the cluster."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sala.convert.plan import make_twins, planned_configs
from sala.convert.transfer import unshare
from sala.errors import InputError, RecipeError
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.families import config_from
from sala.model.report import num_parameters
from sala.recipe import Conversion, Keep, Stage, load_recipe, parse_recipe
from sala.train import flops as counting
from sala.train.batches import WindowBatch
from sala.train.budget import Memory, activation_numbers, stage_budgets, stage_memory
from sala.train.cards import DEVICE_NAMES, GPUS, cluster, peak_flops
from sala.train.compile import Compiled
from sala.train.flops import Networks, attention_flops, model_flops, stage_flops
from sala.train.loop import _backward, _training_only
from sala.train.parallel import ALONE
from sala.train.passes import Pass
from sala.train.trainable import trainable_parameters

T, B, X = 12, 4, 20
SPARSE = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 4, "topk": 2, "dense_len": 8}


def config(*mixers: str, **changes: Any) -> MiniCPMSALAConfig:
    fields = {
        "vocab_size": X,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "lightning_nkv": 2,
        "head_dim": 8,
        "attn_use_rope": True,
        "sparse_config": SPARSE,
    }
    return MiniCPMSALAConfig(num_hidden_layers=len(mixers), mixer_types=list(mixers), **(fields | changes))


def row(**changes: Any) -> Stage:
    values = {"name": "a", "loss": "next_token", "length": T, "batch": B, "steps": 1, "data": {"text": 1}}
    return Stage.model_validate(values | {"learning_rate": {"peak": 1e-3}} | changes)


WINDOWS = WindowBatch(torch.zeros(B, T, dtype=torch.long), torch.ones(B, T), ("zeros",) * B)


def counted(model: Any, stage: Stage, teacher: Any) -> int:
    """Return torch's count of the operations of all products of two matrices in a step; attention's are batched ones."""
    what = "all" if stage.loss == "align" else stage.trainable
    named = trainable_parameters(model, what, freeze_qk=stage.freeze_qk)
    root = Pass(model, teacher, stage)
    with (
        _training_only(model, named),
        Compiled([], "off", root.checkpointed),
        FlopCounterMode(display=False) as counter,
    ):
        _backward(root, WINDOWS, stage, ALONE)
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    return counts.get("aten.mm", 0) + counts.get("aten.addmm", 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": "mixers"},
        {"trainable": "linear_attention"},
        {"trainable": "linear_attention", "freeze_qk": True},
        {"freeze_qk": True, "activation_checkpointing": True},
        {"trainable": "linear_attention", "activation_checkpointing": True},
        {"loss": "distill"},
        {"loss": "distill", "trainable": "mixers", "activation_checkpointing": True},
    ],
    ids=str,
)
def test_matrix_products_are_those_that_torch_counts(
    changes: dict, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "attention_flops", lambda *_: (0, 0))
    student = config("attention", "lightning-attn", "attention", tie_word_embeddings=tied)
    teacher = config("attention", "attention")
    stage = row(**changes)
    flops = stage_flops(stage, Networks(student, teacher))
    real = counted(MiniCPMSALAForCausalLM(student), stage, MiniCPMSALAForCausalLM(teacher))
    if stage.loss == "next_token":
        # the last token of a window predicts nothing, and the formula counts its logits
        trains_head = stage.trainable == "all"
        real += B * 2 * X * 16 * (2 + trains_head)
    assert flops.total == real
    assert bool(flops.recompute) == stage.activation_checkpointing
    assert bool(flops.teacher) == (stage.loss == "distill")


def test_products_of_alignment_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "attention_flops", lambda *_: (0, 0))
    teacher_config = config("attention", "attention", attn_use_output_gate=False)
    teacher = MiniCPMSALAForCausalLM(teacher_config).eval()
    settings, seen = Conversion(keep=Keep(count=1, method="uniform")), []

    stage = row(loss="align")
    seen.append(counted(make_twins(teacher, settings, torch.Generator(), unshare), stage, None))
    hybrid, twins = planned_configs(teacher_config, settings)
    assert [stage_flops(stage, Networks(hybrid, teacher_config, twins)).total] == seen


def test_attention_is_counted_by_kind_and_length() -> None:
    one = config("attention")
    assert attention_flops(one, "attention", 3) == (2 * (8 + 8) * 2 * (1 + 2 + 3), 0)
    assert attention_flops(one, "lightning-attn", 3) == (4 * 8 * 8 * 2 * 3, 0)
    # as far as everything is read, sparse is full
    assert attention_flops(one, "minicpm4", 7) == attention_flops(one, "attention", 7)
    attend, select = attention_flops(one, "minicpm4", 4096)
    # three blocks of four of each query, the last one up to itself
    assert attend == pytest.approx(2 * (8 + 8) * 2 * 4096 * (2 * 4 + 2.5), rel=0.01)
    # a window every two tokens, a coarse one every eight
    assert select == pytest.approx(2 * 8 * 2 * 4096**2 / 2 * (1 / 2 + 1 / 8), rel=0.01)
    flops = [
        stage_flops(row(sparse=sparse, length=1024), Networks(config("attention", "lightning-attn")))
        for sparse in (True, False)
    ]
    assert flops[0].total < flops[1].total
    # blocks are chosen without a gradient
    assert flops[0].backward < 2 * flops[0].forward
    assert flops[1].backward == 2 * flops[1].forward


@pytest.mark.parametrize("mixer", ["attention", "lightning-attn"])
def test_kept_activations_are_counted_as_fused_work_keeps_them(mixer: str) -> None:
    """Plain torch keeps more, between its elementwise steps: up to two thirds of it, measured here."""
    held, tokens = [], 256
    for layers in (1, 3):
        shape = config(*[mixer] * layers, hidden_size=64, intermediate_size=176, head_dim=32)
        model = MiniCPMSALAForCausalLM(shape).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(
            tensor: torch.Tensor, own: set = own, storages: dict[int, torch.UntypedStorage] = storages
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _output = model.model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        held.append(sum(storage.nbytes() for storage in storages.values()))
    a_layer = (held[1] - held[0]) / 2 / tokens / 4
    assert (
        1
        <= a_layer / activation_numbers(config(mixer, hidden_size=64, intermediate_size=176, head_dim=32), mixer)
        < 1.7
    )


def recipe(**changes: Any) -> Any:
    stage = {"name": "a", "loss": "next_token", "length": 64, "batch": 16, "steps": 2, "data": {"text": 1}}
    values = {"name": "tiny", "model": {}, "stages": [stage | {"micro_batch": 1, "learning_rate": {"peak": 1e-3}}]}
    return parse_recipe(values | changes)


def memory(mesh: dict | None = None, stage: dict | None = None, **changes: Any) -> Memory:
    plan = recipe(mesh=mesh or {}, **changes)
    first = plan.stages[0].model_copy(update=stage or {})
    student = config("attention", "lightning-attn", "lightning-attn", "lightning-attn")
    return stage_memory(first, Networks(student), plan.mesh, plan)


def test_memory_follows_the_mesh() -> None:
    one, sharded, copied, split = (
        memory(mesh) for mesh in ({}, {"dp_shard": 4}, {"dp_replicate": 4, "dp_shard": 2}, {"cp": 4})
    )
    assert one.gathered == 0 and sharded.gathered > 0
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(sharded, part) == getattr(split, part) == getattr(one, part) // 4
        # copies hold the same
        assert getattr(copied, part) == getattr(one, part) // 2
    assert (
        one.weights
        == one.gradients
        == one.optimizer // 2
        == 4 * num_parameters(config("attention", "lightning-attn", "lightning-attn", "lightning-attn"))
    )
    assert sharded.activations == one.activations
    assert one.activations / 4 < split.activations < one.activations / 2


def test_memory_follows_precision_checkpointing_optimizer_and_what_trains() -> None:
    plain = memory()
    assert memory(precision="bfloat16").activations == plain.activations // 2
    assert memory(stage={"activation_checkpointing": True}).activations < plain.activations / 2
    assert plain.optimizer / 2 < memory(optimizer={"kind": "muon"}).optimizer < 0.7 * plain.optimizer
    frozen = memory(stage={"trainable": "linear_attention"})
    assert frozen.gradients < plain.gradients and frozen.weights == plain.weights
    assert frozen.activations < plain.activations and frozen.loss < plain.loss


def test_hours_are_operations_over_what_the_cluster_does() -> None:
    networks = Networks(config("attention", "lightning-attn"))
    machine = cluster("100", precision="float32", memory_gib=1, mfu=0.5, gpus=8)
    (stage,) = stage_budgets(recipe(), networks, machine)
    assert stage.gpu_hours == pytest.approx(stage.flops.total / (100e12 * 0.5) / 3600)
    assert stage.hours == pytest.approx(stage.gpu_hours / 8)
    assert (stage.mesh.dp_replicate, stage.accumulation, stage.micro_batch) == (8, 2, 1)
    assert stage.fits
    assert not stage_budgets(recipe(), networks, cluster("100", precision="float32", memory_gib=1e-6, mfu=1))[0].fits


def test_gpus_beyond_the_windows_share_them() -> None:
    networks = Networks(config("attention", "lightning-attn"))

    def mesh(gpus: int) -> tuple[int, int, int]:
        machine = cluster("h100", precision="float32", mfu=0.4, gpus=gpus)
        (row,) = stage_budgets(recipe(mesh={"dp_shard": 8, "cp": 2}), networks, machine)
        assert row.hours == pytest.approx(row.gpu_hours / gpus)
        return row.mesh.dp_replicate, row.mesh.dp_shard, row.mesh.cp

    assert [mesh(16), mesh(32), mesh(64)] == [(1, 8, 2), (2, 8, 2), (1, 8, 8)]


def test_a_cluster_that_does_not_fit_is_refused_with_what_would() -> None:
    networks = Networks(config("attention", "lightning-attn"))

    def on(gpus: int, **changes: Any) -> None:
        stage_budgets(recipe(**changes), networks, cluster("h100", precision="float32", mfu=0.4, gpus=gpus))

    with pytest.raises(
        RecipeError, match=r"stages.0 \('a'\): 16 windows a batch do not divide over 3 .*1, 2, 4, 8, 16"
    ):
        on(3)
    with pytest.raises(
        RecipeError, match=r"6 GPUs do not divide into copies of 4 .*expected 4 or 8, or one copy .*mesh.dp_shard=3$"
    ):
        on(6, mesh={"dp_shard": 2, "cp": 2})


@pytest.mark.parametrize(
    ("gpu", "changes", "message"),
    [
        ("h10", {}, "'h10' is not known.*or a number of TFLOP/s; did you mean 'h100'"),
        ("300", {}, "give --memory"),
        ("0", {"memory_gib": 1}, "numbers above 0"),
        ("h100", {"mfu": 40}, "a part of the peak"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(gpu: str, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster(gpu, **({"precision": "bfloat16", "mfu": 0.4} | changes))


def networks_of(name: str) -> Networks:
    plan = load_recipe(name)
    teacher = config_from(plan.teacher)
    return Networks(*(lambda pair: (pair[0], teacher, pair[1]))(planned_configs(teacher, plan.conversion)))


def test_the_released_model_is_what_minicpm_sala_plans() -> None:
    networks = networks_of("minicpm-sala")
    # the tensors of the released checkpoint
    assert num_parameters(networks.student) == 9_477_203_968
    kinds = networks.student.mixer_types
    assert (kinds[0], kinds[-1], kinds.count("attention")) == ("attention", "attention", 8)


def test_halo_costs_what_its_paper_says_where_it_counts_the_same() -> None:
    """HALO prints 1.4e19 operations for its long stage: forward and backward, nothing computed again.

    For the others it prints 2.7e18 and 8.3e18, which is 6 x 1.41B parameters (no embedding) x tokens, teacher or not.
    """
    plan, networks = load_recipe("halo-qwen3-1.7b"), networks_of("halo-qwen3-1.7b")
    rows = stage_budgets(plan, networks, cluster("a800", precision="bfloat16", mfu=0.4))
    assert f"{rows[2].flops.forward + rows[2].flops.backward:.1e}" == "1.4e+19"
    assert networks.teacher is not None
    without_embedding = num_parameters(networks.teacher) - 151936 * 2048
    assert [f"{6 * without_embedding * tokens:.1e}" for tokens in (320e6, rows[1].stage.tokens)] == [
        "2.7e+18",
        "8.3e+18",
    ]


def test_the_table_of_cards_has_what_a_plan_needs() -> None:
    for name in GPUS:
        assert (
            cluster(name, precision="bfloat16", mfu=0.4).peak_flops_s
            > cluster(name, precision="float32", mfu=1).peak_flops_s
        )


@pytest.mark.parametrize("loss", ["next_token", "distill"])
def test_model_flops_are_those_of_a_step_without_recomputation(loss: str) -> None:
    networks = Networks(config("attention", "lightning-attn"), teacher=config("attention", "attention"))
    plain, checkpointed = (row(loss=loss, activation_checkpointing=on, steps=3) for on in (False, True))
    assert stage_flops(checkpointed, networks).recompute > 0
    assert model_flops(plain, networks) == model_flops(checkpointed, networks)
    assert 3 * model_flops(plain, networks) == stage_flops(plain, networks).total


def test_the_peak_is_that_of_the_card_by_the_name_that_torch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(cuda, "bfloat16") == pytest.approx(989.4e12)
    assert peak_flops(cuda, "float32") == pytest.approx(66.9e12)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200 NVL")
    assert peak_flops(cuda, "bfloat16") is None
    assert peak_flops(torch.device("cpu"), "float32") is None


def test_every_named_card_has_a_peak() -> None:
    assert set(DEVICE_NAMES.values()) == set(GPUS)
