"""The strict base of every part of a recipe, and the kinds of numbers that fields hold."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from sala.errors import nearest

Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
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
