"""A recipe: a whole run as data, either a new model's training or a teacher's conversion."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from sala.errors import nearest
from sala.recipe.conversion import Conversion
from sala.recipe.section import Positive, Section
from sala.recipe.stage import Mesh, Optimizer, Stage, auto_mesh, require_mesh_fits


class SourceRow(Section):
    """A folder of shards (`sala data` makes them), and how often an epoch reads documents of at least a length."""

    shards: Path
    length_weights: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]] = Field(default={0: 1.0})


class Validation(Section):
    """Held-out windows, the same at every look: their loss is measured every `every` steps and at the end of a stage."""

    # sources that no stage reads, by their share of the windows; the package's own held-out text when a recipe has none
    data: dict[str, Annotated[float, Field(gt=0)]] = Field(default={"text": 1.0}, min_length=1)
    length: Annotated[int, Field(gt=1)] = 512
    windows: Positive = 16
    every: Positive = 100


class Card(Section):
    """What the finished model's card says to the hub beside what is known: licence, data sets and base model by their names there."""

    license: str | None = None
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    language: tuple[str, ...] = ()


class Recipe(Section):
    """What every run has."""

    name: str
    # torch's generators take 64 bits
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    # what the stages' data names; without any, the package's own text and generated tasks
    sources: dict[str, SourceRow] = Field(default={})
    validation: Validation | None = None
    card: Card = Card()
    optimizer: Optimizer = Optimizer()
    # auto: for the processes that run; the windows of a batch are split over as many of them as divide it, and parameters over all
    mesh: Mesh | Literal["auto"] = Mesh()
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
        """Return the mesh of a stage; for "auto" that of one process (see `on_ranks`)."""
        return stage.mesh or (Mesh() if self.mesh == "auto" else self.mesh)

    def on_ranks(self, ranks: int) -> Self:
        """Return the recipe with a mesh of `ranks` processes in every stage that leaves it open ("auto").

        Raises:
            RecipeError: a stage divides over no such mesh.
        """
        if self.mesh != "auto":
            return self
        stages = [
            stage if stage.mesh else stage.model_copy(update={"mesh": auto_mesh(stage, ranks)}) for stage in self.stages
        ]
        return self.model_copy(update={"stages": tuple(stages)})

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

    @model_validator(mode="after")
    def _validation_is_held_out(self) -> "Recipe":
        for name in self.validation.data if self.validation else ():
            if self.sources and name not in self.sources:
                known = f"{', '.join(self.sources)}{nearest(name, self.sources)}"
                raise ValueError(f"validation: data names {name!r}, which is not one of the sources: {known}")
            if self.sources and (readers := [stage.name for stage in self.stages if name in stage.data]):
                raise ValueError(f"validation: stage {readers[0]!r} trains on {name!r}; expected a source of its own")
        return self

    @property
    def text(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.resolved, sort_keys=False)

    def save(self, path: Path) -> None:
        path.write_text(self.text, encoding="utf-8")


class Init(Section):
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
