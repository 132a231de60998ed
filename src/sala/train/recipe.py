"""Recipes: runs as data. Strict YAML models, the search by name, and `a.b=c` overrides."""

import math
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from sala.errors import ConfigError, RecipeError, nearest
from sala.ops.infllm import SparseGeometry
from sala.train.schedule import learning_rate

Positive = Annotated[int, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    """A strict, immutable piece of a recipe: an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # keys that a recipe may have although no field is called so: other ways to write one
    spellings: ClassVar[tuple[str, ...]] = ()

    def changed(self, *names: str) -> str:
        """Return those of `names` whose value is not the default, in words; "" when there are none."""
        fields = type(self).model_fields
        return ", ".join(name for name in names if getattr(self, name) != fields[name].default)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            known = (*cls.model_fields, *cls.spellings)
            for key in values:
                if key not in known:
                    raise ValueError(f"unknown key {key!r}{nearest(str(key), known)} (known: {', '.join(known)})")
        return cls._respelled(values)

    @classmethod
    def _respelled(cls, values: Any) -> Any:
        """Return the values with every key of `spellings` turned into the field that it is another way to write."""
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads a bare yes and on as true, and pydantic takes that for 1
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are no value of this field")
        return value


class LearningRate(Part):
    """A stage's curve; `final` is `peak` when left out."""

    peak: Annotated[float, Field(gt=0)]
    final: Annotated[float, Field(gt=0)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    curve: Literal["constant", "cosine", "exponential", "wsd"] = "constant"

    @model_validator(mode="after")
    def _agrees(self) -> "LearningRate":
        if self.curve == "constant" and self.final not in (None, self.peak):
            raise ValueError(
                f"final is {self.final} but curve 'constant' stays at peak {self.peak}; name another curve"
            )
        if self.curve != "constant" and self.final is None:
            raise ValueError(f"curve {self.curve!r} needs 'final', the learning rate of the last step")
        return self

    def at(self, step: int, steps: int) -> float:
        """Return the learning rate of `step` (from 0) in a stage of `steps`."""
        return learning_rate(
            step, steps, peak=self.peak, final=self.final or self.peak, warmup_steps=self.warmup_steps, curve=self.curve
        )


class Optimizer(Part):
    """`muon` orthogonalises the updates of the layers' matrices, the rest is AdamW's; `adamw` takes everything."""

    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Decay = 0.95
    # AdamW's learning rate as a part of Muon's; without meaning for kind "adamw"
    adamw_ratio: Annotated[float, Field(gt=0)] = 1.0
    # the learning rate of query and key biases as a part of the stage's; as AdamW's others when left out
    bias_ratio: Annotated[float, Field(gt=0)] | None = None
    clip: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _agrees(self) -> "Optimizer":
        if self.kind == "adamw" and (given := self.changed("momentum", "adamw_ratio")):
            raise ValueError(f"{given} has no effect with kind 'adamw'; remove it or use kind 'muon'")
        return self


class Mesh(Part):
    """Ranks of a run: copies of the model, shards of each copy, and ranks that share a window's tokens.

    Parameters are sharded over `dp_shard` x `cp`; a batch's windows are split over `dp_replicate` x `dp_shard`.
    """

    dp_replicate: Positive = 1
    dp_shard: Positive = 1
    cp: Positive = 1

    @property
    def data_parallel(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def ranks(self) -> int:
        return self.data_parallel * self.cp


def _whole(spelling: str, tokens: Any, field: str, sizes: list[Any]) -> int:
    """Return how many units of the product of `sizes` tokens are, or raise ValueError with the nearest numbers that fit."""
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"{spelling} must be a whole number above 0, got {tokens!r}")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return 1  # their own errors say what is wrong
    unit = math.prod(sizes)
    if tokens % unit:
        fits = (f"{n * unit:,} ({field} {n:,})" for n in (tokens // unit, tokens // unit + 1) if n)
        raise ValueError(
            f"{spelling} {tokens:,} is not a multiple of {' x '.join(f'{size:,}' for size in sizes)} tokens; "
            f"expected {' or '.join(fits)}"
        )
    return tokens // unit


def _divisors(number: int) -> str:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return ", ".join(map(str, sorted({*small, *(number // n for n in small)})))


class Stage(Part):
    """One row of a run: `steps` steps of `batch` windows of `length` tokens.

    A row may be written in tokens, as papers do: `batch_tokens` for `batch`, `tokens` for `steps`.
    """

    spellings = ("batch_tokens", "tokens")

    name: str
    loss: Literal["align", "distill", "next_token"]
    trainable: Literal["linear_attention", "mixers", "all"] = "all"
    # leave queries and keys (projections and norms) of every layer as they are: instruction tuning spoils long recall
    # through them
    freeze_qk: bool = False
    length: Annotated[int, Field(gt=1)]
    batch: Positive
    # windows of one forward and backward pass of a rank; gradients add up over the batch. All at once when left out
    micro_batch: Positive | None = None
    steps: Positive
    learning_rate: LearningRate
    optimizer: Optimizer | None = None
    mesh: Mesh | None = None
    # keep only what enters a layer and compute the rest again in the backward pass
    activation_checkpointing: bool = False
    # train the kept layers with block-sparse attention, and with the conversion's logit scale
    sparse: bool = False
    logits_scaling: bool = False
    # distillation counts a token by the data's weight for it, none below a tenth; HALO counts all alike
    weighted: bool = False
    # HALO aligns with one loss over all layers; clipping each layer by itself keeps a layer with a large gradient
    # from slowing the others
    clip_per_layer: bool = False
    # the share of each task: a number, or a list of those at equally spaced moments of the stage, straight in between
    data: Annotated[dict[str, float | tuple[float, ...]], Field(min_length=1)]

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weight of each task at `step` (from 0)."""
        progress = step / max(1, self.steps - 1)
        return {
            name: float(np.interp(progress, np.linspace(0, 1, len(weight)), weight))
            if isinstance(weight, tuple)
            else weight
            for name, weight in self.data.items()
        }

    @classmethod
    def _respelled(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        row = dict(values)
        for field, spelling, sizes in (("batch", "batch_tokens", ["length"]), ("steps", "tokens", ["batch", "length"])):
            tokens = row.pop(spelling, None)
            if (tokens is None) == (row.get(field) is None):
                given = "none" if tokens is None else f"{field}, {spelling}"
                raise ValueError(f"give one of {field}, {spelling}; given: {given}")
            if tokens is not None:
                row[field] = _whole(spelling, tokens, field, [row.get(size) for size in sizes])
        return row

    @field_validator("data", mode="before")
    @classmethod
    def _weights(cls, data: Any) -> Any:
        for name, weight in data.items() if isinstance(data, Mapping) else ():
            points = weight if isinstance(weight, list | tuple) else (weight, weight)
            numbers = [p for p in points if isinstance(p, int | float) and not isinstance(p, bool) and p >= 0]
            if len(points) < 2 or len(numbers) < len(points):
                raise ValueError(
                    f"{name}: a weight is a number, or a list of two or more, none below 0; got {weight!r}"
                )
            if not any(numbers):
                raise ValueError(f"{name} has weight 0 throughout; leave it out")
        return data

    @model_validator(mode="after")
    def _agrees(self) -> "Stage":
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; "
                f"expected one of {_divisors(self.batch)}"
            )
        if self.learning_rate.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.learning_rate.warmup_steps} leaves nothing of {self.steps} steps")
        moments = {i / (len(w) - 1) for w in self.data.values() if isinstance(w, tuple) for i in range(len(w))}
        for moment in moments:
            if not sum(self.weights_at(round(moment * (self.steps - 1))).values()) > 0:
                raise ValueError(f"data: all weights are 0 at {moment:.0%} of the stage")
        if self.loss == "align" and (
            given := self.changed("trainable", "freeze_qk", "activation_checkpointing", "sparse", "logits_scaling")
        ):
            raise ValueError(f"{given} has no effect with loss 'align', which trains the linear twins")
        if self.loss != "distill" and self.weighted:
            raise ValueError(f"weighted is for loss 'distill'; {self.loss!r} has it fixed")
        if self.loss != "align" and self.clip_per_layer:
            raise ValueError("clip_per_layer is for loss 'align', where the layers are independent problems")
        return self


class Keep(Part):
    """Which layers stay attention: a fraction of them (rounded down, at least one), a count, or their numbers."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    count: Positive | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    method: Literal["halo", "recall_drop", "uniform", "none"] = "halo"
    first_last: bool = False
    epsilon: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _agrees(self) -> "Keep":
        if self.method == "none" and (given := self.changed("fraction", "count", "layers", "first_last")):
            raise ValueError(f"{given} has no effect with method 'none'")
        if self.layers is not None and (given := self.changed("fraction", "count", "method", "first_last", "epsilon")):
            raise ValueError(f"{given} has no effect with layers")
        if self.method != "halo" and self.changed("epsilon"):
            raise ValueError(f"epsilon has no effect with method {self.method!r}; expected 'halo', or no epsilon")
        amounts = [name for name in ("fraction", "count", "layers") if getattr(self, name) is not None]
        if self.method != "none" and len(amounts) != 1:
            raise ValueError(f"give one of fraction, count, layers; given: {', '.join(amounts) or 'none'}")
        return self


class Sparse(Part):
    """Block-sparse attention of the kept layers; InfLLM-V2's numbers are the defaults."""

    kernel_size: Positive = 32
    kernel_stride: Positive = 16
    init_blocks: Annotated[int, Field(ge=0)] = 1
    block_size: Positive = 64
    window_size: Positive = 2048
    topk: Positive = 64
    dense_len: Annotated[int, Field(ge=0)] = 8192
    normalizer: Literal["coarse", "exact"] = "coarse"
    dense_rule: Literal["position", "sequence"] = "position"

    @model_validator(mode="after")
    def _fits_together(self) -> "Sparse":
        try:
            SparseGeometry(**self.model_dump())
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class Conversion(Part):
    """What becomes of a teacher."""

    keep: Keep
    # true keeps rotary positions on the attention layers: the ablation that collapses beyond the training length
    attention_rope: bool = False
    # false takes them from the linear layers: the ablation that hurts everywhere in HALO's Table 3
    lightning_rope: bool = True
    # random: torch's default for a Linear, as HALO; open: zero weights, with the gate's 1/2 taken into o_proj
    gate_init: Literal["random", "open"] = "random"
    # ones: as HALO; measured: each head's output starts at the size of the teacher's
    output_norm_init: Literal["ones", "measured"] = "ones"
    # base a of log_a(t + a) on the kept layers' logits, in the finished model and in stages with logits_scaling: true
    logits_scaling: Annotated[float, Field(gt=1)] | None = None
    sparse: Sparse = Sparse()


def require_mesh_fits(stage: Stage, mesh: Mesh, place: str) -> None:
    """Raise ValueError, with what would be right, when a stage's windows cannot be split over the mesh."""
    if stage.batch % mesh.data_parallel:
        raise ValueError(
            f"{place}{stage.batch} windows a batch do not divide over {mesh.data_parallel} data-parallel ranks; "
            f"expected one of {_divisors(stage.batch)}"
        )
    share = stage.batch // mesh.data_parallel
    if stage.micro_batch is not None and share % stage.micro_batch:
        raise ValueError(
            f"{place}{share} windows of each rank are not a multiple of micro_batch {stage.micro_batch}; "
            f"expected one of {_divisors(share)}"
        )
    if stage.length % mesh.cp:
        raise ValueError(
            f"{place}{stage.length} tokens do not divide over {mesh.cp} context-parallel ranks; expected "
            f"{stage.length // mesh.cp * mesh.cp:,} or {(stage.length // mesh.cp + 1) * mesh.cp:,}"
        )


class SourceRow(Part):
    """A folder of shards (`sala data` makes them), and how often an epoch reads documents of at least a length."""

    shards: Path
    length_weights: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]] = {0: 1.0}


class Recipe(Part):
    """What every run has."""

    name: str
    # torch's generators take 64 bits
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    # what the stages' data names; without any, the package's own text and generated tasks
    sources: dict[str, SourceRow] = {}
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    # of a step's products; parameters, their updates and the sums over ranks are float32
    precision: Literal["float32", "bfloat16"] = "float32"
    # auto: compile when a C compiler is there, else run eagerly and say so in one log line
    compile: Literal["auto", "on", "off"] = "auto"
    # of the parameters in the finished folder, which were trained in float32. None: the dtype of the checkpoint that the run
    # started from; a folder that is given another is still loaded in float32
    stored_as: Literal["float32", "bfloat16"] | None = None
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @field_validator("compile", mode="before")
    @classmethod
    def _on_is_a_word(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare on and off as booleans
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @property
    def resolved(self) -> dict[str, Any]:
        """Every field with its value, defaults included, as plain YAML types."""
        return self.model_dump(mode="json")

    def optimizer_of(self, stage: Stage) -> Optimizer:
        return stage.optimizer or self.optimizer

    def mesh_of(self, stage: Stage) -> Mesh:
        return stage.mesh or self.mesh

    @model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"stages.{index}: a stage before it is called {name!r} too; expected another name")
        return self

    @model_validator(mode="after")
    def _meshes_fit(self) -> "Recipe":
        for index, stage in enumerate(self.stages):
            require_mesh_fits(stage, self.mesh_of(stage), f"stages.{index} ({stage.name!r}): ")
        return self

    @model_validator(mode="after")
    def _sources_are_there(self) -> "Recipe":
        for index, stage in enumerate(self.stages):
            for name in stage.data if self.sources else ():
                if name not in self.sources:
                    raise ValueError(
                        f"stages.{index} ({stage.name!r}): data names {name!r}, which is not one of the sources: "
                        f"{', '.join(self.sources)}{nearest(name, self.sources)}"
                    )
        return self

    @property
    def text(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.resolved, sort_keys=False)

    def save(self, path: Path) -> None:
        path.write_text(self.text, encoding="utf-8")


class Init(Part):
    """Random weights of a new model."""

    # config: normal with the configuration's initializer_range, as transformers; fan_in: normal with standard deviation
    # 1 / sqrt(inputs), and zero where a branch ends (o_proj, down_proj), so that every layer starts as the identity
    matrices: Literal["config", "fan_in"] = "config"
    # query and key biases turn with position, and from zero they see no gradient that breaks the tie
    qk_bias_std: Annotated[float, Field(ge=0)] = 0.0
    # head h of the first layer starts as one that looks this many tokens back: a seeded circuit, not an emerged one
    lags: tuple[Positive, ...] = ()


class TrainingRecipe(Recipe):
    """A model from random weights, whose configuration is `model`; without it, a checkpoint that is trained further."""

    model: dict[str, Any] | None = None
    init: Init = Init()

    @model_validator(mode="after")
    def _agrees(self) -> "TrainingRecipe":
        if self.model is None and self.init != Init():
            raise ValueError("init has no effect without model: a checkpoint has its weights")
        for index, stage in enumerate(self.stages):
            if stage.loss != "next_token":
                raise ValueError(
                    f"stages.{index} ({stage.name!r}): loss {stage.loss!r} needs a teacher; use 'next_token'"
                )
            if stage.logits_scaling:
                raise ValueError(f"stages.{index} ({stage.name!r}): logits_scaling belongs to conversions")
        return self


class ConversionRecipe(Recipe):
    """A teacher becomes a hybrid."""

    # the configuration of the teacher that the numbers are for, as in its config.json; any teacher when left out
    teacher: dict[str, Any] | None = None
    conversion: Conversion

    @model_validator(mode="after")
    def _agrees(self) -> "ConversionRecipe":
        losses = [stage.loss for stage in self.stages]
        if "align" in losses[1:]:
            raise ValueError("only the first stage can have loss 'align': it comes before the layers are selected")
        for index, stage in enumerate(self.stages):
            if stage.logits_scaling and self.conversion.logits_scaling is None:
                raise ValueError(
                    f"stages.{index} ({stage.name!r}): logits_scaling needs conversion.logits_scaling, its base"
                )
        return self


def _place(error: Any, values: Any) -> str:
    """Return the dotted path of a validation error, a stage with its name beside its number."""
    path, here = [], values
    for key in error["loc"]:
        try:
            here = here[key]
        except (KeyError, IndexError, TypeError):
            here = None
        name = here.get("name") if isinstance(key, int) and isinstance(here, Mapping) else None
        path.append(f"{key} ({name!r})" if name else str(key))
    return ".".join(path)


def _key(group: Any, key: str, path: str) -> str | int:
    """Return the key of `group` that a part of an override's path means; a list's entry goes by number or name."""
    if isinstance(group, dict):
        return key
    if not isinstance(group, list):
        raise RecipeError(f"--set {path}: {key!r} is below a plain value, not a group of settings")
    names = [str(row.get("name", "")) if isinstance(row, Mapping) else "" for row in group]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(group):
        return int(key)
    known = ", ".join(f"{index} ({name!r})" if name else str(index) for index, name in enumerate(names))
    raise RecipeError(f"--set {path}: no entry {key!r}; there are: {known}{nearest(key, names)}")


# two ways to write a number of a stage, of which it has one
OTHER_SPELLING = {"batch": "batch_tokens", "batch_tokens": "batch", "steps": "tokens", "tokens": "steps"}


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    group: Any = values
    for part in parents:
        key = _key(group, part, path)
        if isinstance(group, dict) and group.get(part) is None:
            group[part] = {}
        group = group[key]
    group[_key(group, last, path)] = value
    if parents[:1] == ["stages"] and len(parents) == 2 and last in OTHER_SPELLING and value is not None:
        group.pop(OTHER_SPELLING[last], None)


def override(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Apply settings written `a.b=c`, the value being YAML. Raises RecipeError for one without `=`."""
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator or not path:
            raise RecipeError(f"--set {setting!r} has no '='; write it as stages.0.steps=100")
        _set(values, path, _read(text, f"--set {setting!r}: the value"))
    return values


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes in the package."""
    folder = resources.files("sala").joinpath("recipes")
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def _text(name_or_path: str | Path) -> str:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or "/" in str(name_or_path):
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such recipe file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read as a recipe: {error}") from None
    names = recipe_names()
    if str(name_or_path) not in names:
        raise RecipeError(
            f"no recipe {str(name_or_path)!r}; there are: {', '.join(names)}{nearest(str(name_or_path), names)}"
            " (a file needs its path or the ending .yaml)"
        )
    return resources.files("sala").joinpath("recipes", f"{name_or_path}.yaml").read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """YAML as it is, but of two equal keys the second is an error and not the winner."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # before `<<` brings in keys that may stand again
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return node


def _read(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    # also of a date that is none, a number with thousands of digits, and lists in lists without end
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what} is not YAML: {' '.join(str(error).split())}") from None


def parse_recipe(values: Any, origin: str = "recipe") -> TrainingRecipe | ConversionRecipe:
    """Check plain YAML values as a recipe: with `conversion` one for a teacher, else one for a new model or a checkpoint.

    Raises:
        RecipeError: names the field's path, what was wrong, and for a typo the nearest key.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{origin} holds {type(values).__name__}, not a mapping of settings")
    kind = ConversionRecipe if "conversion" in values else TrainingRecipe
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = _place(first, values)
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], Mapping | list | tuple) else f", got {first['input']!r}"
        raise RecipeError(f"{origin}: {place + ': ' if place else ''}{message}{given}") from None


def load_recipe(name_or_path: str | Path, settings: Iterable[str] = ()) -> TrainingRecipe | ConversionRecipe:
    """Read a recipe by name (those in the package) or path, with `settings` like `stages.align.steps=10` applied.

    Raises:
        RecipeError: no such recipe, not YAML, or a field that is unknown or cannot be so.
    """
    values = _read(_text(name_or_path), str(name_or_path))
    if isinstance(values, dict):
        values = override(values, settings)
    return parse_recipe(values, str(name_or_path))
