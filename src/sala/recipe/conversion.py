"""What becomes of a teacher: which layers stay attention, and how the other ones begin."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sala.errors import ConfigError
from sala.ops.infllm import SparseGeometry
from sala.recipe.section import Positive, Section


class Keep(Section):
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


class Scoring(Section):
    """What candidates are asked when layers are chosen by score: documents of `length` tokens, held out of all training."""

    length: Annotated[int, Field(ge=64)] = 512
    questions: Annotated[int, Field(ge=2)] = 128
    # questions of one document; without it 16 of the generated documents, and 1 of text with sentences hidden in it
    needles: Positive | None = None
    # pieces of text whose tokens are predicted
    windows: Annotated[int, Field(ge=2)] = 16


class Sparse(Section):
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


class Conversion(Section):
    """What becomes of a teacher."""

    keep: Keep
    scoring: Scoring = Scoring()
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
