"""Reading recipes: the search by name, YAML that refuses doubled keys, and `a.b=c` overrides."""

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sala.errors import RecipeError, nearest
from sala.recipe.recipe import ConversionRecipe, TrainingRecipe


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
