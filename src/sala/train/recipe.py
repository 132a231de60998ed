"""Recipes: runs as data. Strict YAML models, the search by name, and `a.b=c` overrides."""

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sala.errors import ConfigError, RecipeError, nearest
from sala.ops.infllm import SparseGeometry
from sala.train.schedule import learning_rate

Positive = Annotated[int, Field(gt=0)]


class Part(BaseModel):
    """A strict, immutable piece of a recipe: an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def changed(self, *names: str) -> str:
        """Return those of `names` whose value is not the default, in words; "" when there are none."""
        fields = type(self).model_fields
        return ", ".join(name for name in names if getattr(self, name) != fields[name].default)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    raise ValueError(f"unknown key {key!r}{nearest(str(key), cls.model_fields)} (known: {known})")
        return values


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
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
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


class Stage(Part):
    """One row of a run: `steps` steps of `batch` windows of `length` tokens."""

    name: str
    loss: Literal["align", "distill", "next_token"]
    trainable: Literal["linear_attention", "mixers", "all"] = "all"
    length: Annotated[int, Field(gt=1)]
    batch: Positive
    # windows of one forward and backward pass; gradients add up over the batch. All at once when left out
    micro_batch: Positive | None = None
    steps: Positive
    learning_rate: LearningRate
    optimizer: Optimizer | None = None
    # train the kept layers with block-sparse attention, and with the conversion's logit scale
    sparse: bool = False
    logits_scaling: bool = False
    # distillation counts a token by the data's weight for it, none below a tenth; HALO counts all alike
    weighted: bool = False
    # HALO aligns with one loss over all layers; clipping each layer by itself keeps a layer with a large gradient
    # from slowing the others
    clip_per_layer: bool = False
    data: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    @model_validator(mode="after")
    def _agrees(self) -> "Stage":
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.learning_rate.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.learning_rate.warmup_steps} leaves nothing of {self.steps} steps")
        if self.loss == "align" and (given := self.changed("trainable", "sparse", "logits_scaling")):
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
        if self.layers is not None and (given := self.changed("fraction", "count", "method", "first_last")):
            raise ValueError(f"{given} has no effect with layers")
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
    # random: torch's default for a Linear, as HALO; open: zero weights, with the gate's 1/2 taken into o_proj
    gate_init: Literal["random", "open"] = "random"
    # ones: as HALO; measured: each head's output starts at the size of the teacher's
    output_norm_init: Literal["ones", "measured"] = "ones"
    # base a of log_a(t + a) on the kept layers' logits, in the finished model and in stages with logits_scaling: true
    logits_scaling: Annotated[float, Field(gt=1)] | None = None
    sparse: Sparse = Sparse()


class Recipe(Part):
    """What every run has."""

    name: str
    seed: int = 0
    optimizer: Optimizer = Optimizer()
    # auto: compile when a C compiler is there, else run eagerly and say so in one log line
    compile: Literal["auto", "on", "off"] = "auto"
    # of the parameters in the finished folder; they are trained, and loaded again, in float32
    stored_as: Literal["float32", "bfloat16"] = "float32"
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

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.resolved, sort_keys=False), encoding="utf-8")


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
    """A model from random weights: `model` is its configuration."""

    model: dict[str, Any]
    init: Init = Init()

    @model_validator(mode="after")
    def _agrees(self) -> "TrainingRecipe":
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


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    group: Any = values
    for part in parents:
        key = _key(group, part, path)
        if isinstance(group, dict) and group.get(part) is None:
            group[part] = {}
        group = group[key]
    group[_key(group, last, path)] = value


def override(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Apply settings written `a.b=c`, the value being YAML. Raises RecipeError for one without `=`."""
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator or not path:
            raise RecipeError(f"--set {setting!r} has no '='; write it as stages.0.steps=100")
        _set(values, path, yaml.safe_load(text))
    return values


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes in the package."""
    folder = resources.files("sala").joinpath("recipes")
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def _text(name_or_path: str | Path) -> str:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_recipe(values: Any, origin: str = "recipe") -> TrainingRecipe | ConversionRecipe:
    """Check plain YAML values as a recipe: with `conversion` one for a teacher, with `model` one from scratch.

    Raises:
        RecipeError: names the field's path, what was wrong, and for a typo the nearest key.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{origin} holds {type(values).__name__}, not a mapping of settings")
    kind = TrainingRecipe if "model" in values and "conversion" not in values else ConversionRecipe
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
    try:
        values = yaml.load(_text(name_or_path), _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name_or_path} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(values, dict):
        values = override(values, settings)
    return parse_recipe(values, str(name_or_path))
