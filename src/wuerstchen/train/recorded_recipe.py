"""Reads recipes from ``run.json``, and gets, replaces and parses single fields by their paths.

A path looks like ``stage_c.phases.0.optimization.learning_rate``. It consists of the names of dataclass
fields and of positions in tuples.
"""

import copy
import dataclasses
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.train.config import Recipe


def recipe_of(fields: dict[str, Any], source: str) -> Recipe:
    """The recipe from which ``as_dict`` made ``fields``. Fields that older versions lack get their defaults.

    Raises ``RunFolderError`` naming ``source`` if this version cannot read the recipe.
    """
    try:
        recipe = _read(Recipe, fields, "")
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise RunFolderError(
            f"{source} has a recipe that this version cannot read: {error}. Use the version that wrote "
            "it, or another --run-dir."
        ) from error
    assert isinstance(recipe, Recipe)
    return recipe


def _read(hint: Any, value: Any, path: str) -> Any:
    """Converts a JSON ``value`` to the type ``hint``. Raises ``ValueError`` naming ``path`` if it does not
    fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for kind in arguments:
            fits = set(value) <= _hints(kind).keys() if dataclasses.is_dataclass(kind) else _is(kind, value)
            if fits:
                return _read(kind, value, path)
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = _hints(hint)
        unknown = value.keys() - hints.keys()
        if unknown:
            raise ValueError(f"{path}{min(unknown)} is unknown")
        return hint(**{name: _read(hints[name], item, f"{path}{name}.") for name, item in value.items()})
    elif origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        pairs = zip(kinds, value, strict=True)
        return tuple(_read(kind, item, f"{path}{n}.") for n, (kind, item) in enumerate(pairs))
    elif _is(hint, value):
        return float(value) if hint is float else value
    raise ValueError(f"{path.removesuffix('.')}={value!r}")


def _is(kind: Any, value: Any) -> bool:
    """Whether a JSON value is of a plain type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is type(None):
        return value is None
    return isinstance(kind, type) and isinstance(value, kind)


def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]


def get(fields: Any, path: str) -> Any:
    """The value at ``path``. Raises ``KeyError`` if the path does not exist."""
    for name in path.split("."):
        try:
            fields = fields[int(name)] if isinstance(fields, list) else fields[name]
        except (ValueError, IndexError, TypeError, KeyError):
            raise KeyError(path) from None
    return fields


def replaced(fields: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at ``path``, whose parent must exist."""
    result = copy.deepcopy(fields)
    parent, _, name = path.rpartition(".")
    inside = get(result, parent) if parent else result
    if isinstance(inside, list):
        inside[int(name)] = value
    else:
        inside[name] = value
    return result


def parsed(recipe: Recipe, path: str, text: str) -> Any:
    """Parses ``text`` as a JSON value for the field at ``path`` of a recipe.

    Raises ``UserError`` naming the field if the text is not valid for its type.
    """
    hint: Any = Recipe
    inside: Any = recipe
    for name in path.split("."):
        if isinstance(inside, tuple):
            inside, hint = inside[int(name)], type(inside[int(name)])
        else:
            hint = _hints(type(inside))[name]
            inside = getattr(inside, name)
    try:
        return _parsed(hint, text)
    except (ValueError, OverflowError):
        raise UserError(
            f"--change {path}={text} is not valid for {path}, which must be {_kind(hint)}."
        ) from None


def _parsed(hint: Any, text: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in arguments:
            return None
        return _parsed(next(kind for kind in arguments if kind is not type(None)), text)
    if origin is tuple:
        items = json.loads(text) if text.startswith("[") else text.split(",") if text else []
        if arguments[1:] != (...,) and len(items) != len(arguments):
            raise ValueError(text)
        return [_parsed(arguments[0], str(item)) for item in items]
    if origin is Literal:
        if text not in arguments:
            raise ValueError(text)
        return text
    if hint is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else int("")
    if hint is int:
        number = float(text) if "e" in text.lower() else int(text)
        if number != int(number):
            raise ValueError(text)
        return int(number)
    return float(text) if hint is float else text


def _kind(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        count = "a list of" if get_args(hint)[1:] == (...,) else len(get_args(hint))
        return f"{count} values separated by commas"
    return {int: "an integer", float: "a number", bool: "true or false"}.get(hint, "a string")
