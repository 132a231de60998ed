"""The configurations of a conversion's networks, told from the teacher's; and the linear twins that it begins with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sala.convert.align import LinearTwins
from sala.convert.choose import blank_scores, select_layers
from sala.convert.select import RULES, select
from sala.convert.transfer import hybrid_config, linear_twin, require_teacher
from sala.model import MiniCPMSALAConfig
from sala.model.kinds import LIGHTNING
from sala.recipe import Conversion


def config_of_hybrid(teacher: MiniCPMSALAConfig, settings: Conversion, kept: Sequence[int]) -> MiniCPMSALAConfig:
    kinds = [kind if layer in kept else LIGHTNING for layer, kind in enumerate(teacher.mixer_types)]
    return hybrid_config(
        teacher,
        kinds,
        rope=settings.attention_rope,
        gates=True,
        lightning_use_rope=settings.lightning_rope,
        sparse_config=settings.sparse.model_dump(),
    )


def config_of_twins(teacher: MiniCPMSALAConfig, settings: Conversion) -> MiniCPMSALAConfig:
    kinds = [LIGHTNING] * teacher.num_hidden_layers
    return hybrid_config(teacher, kinds, rope=True, gates=False, lightning_use_rope=settings.lightning_rope)


def planned_configs(teacher: MiniCPMSALAConfig, settings: Conversion) -> tuple[MiniCPMSALAConfig, MiniCPMSALAConfig]:
    """Return the configurations of the hybrid that a conversion will make, and of a model of the linear twins.

    Which layers stay attention is a guess where it is up to scores: as many, spread evenly.

    Raises:
        ConfigError: the teacher has layers other than attention, or output gates.
        RecipeError: the settings ask for layers that the teacher does not have.
    """
    require_teacher(teacher)
    layers, keep = teacher.num_hidden_layers, settings.keep
    kept = select_layers(settings, layers, blank_scores(layers))
    if keep.layers is None and keep.method in RULES:
        kept = select(layers, len(kept), method="uniform", first_last=keep.first_last)
    return config_of_hybrid(teacher, settings, kept), config_of_twins(teacher, settings)


def make_twins(
    teacher: Any, settings: Conversion, generator: torch.Generator, unshare: Callable[[Any], Any]
) -> LinearTwins:
    config = config_of_twins(teacher.config, settings)
    # each unshared before the next one is made: with several ranks there is no more than one in this one's memory
    twins = [
        unshare(linear_twin(layer.self_attn, config, settings.gate_init, generator)) for layer in teacher.model.layers
    ]
    return LinearTwins(teacher, twins, config)
