"""Reads a network's ``config.json`` in diffusers' layout: every one that diffusers' classes accept and can
run.

The type and size of each value are checked before anything is built.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from wuerstchen.errors import CheckpointError, UserError, UserNotice
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.prior import ADDED_FIELDS, PriorConfig
from wuerstchen.models.vqgan import VQGANConfig

C = TypeVar("C", DecoderConfig, PriorConfig, VQGANConfig)

OWN_FIELDS = frozenset({"prediction", *ADDED_FIELDS})
"""Fields that diffusers' classes do not have."""

# diffusers' defaults for missing fields, where they differ from the published values.
_DEFAULTS: dict[type, dict[str, Any]] = {PriorConfig: {"c": 1280, "c_cond": 1024, "depth": 16, "nhead": 16}}
# Fields with numbers of repetitions. Large values would take forever, or overflow.
_COUNTS = {"depth", "blocks", "levels", "bottleneck_blocks", "patch_size", "kernel_size"}
_COUNTS |= {"up_down_scale_factor"}
# Those that count blocks. Negative values mean 0.
_REPEATS = {"depth", "blocks", "bottleneck_blocks"}
MAX_COUNT, MAX_NUMBER = 512, 2**24


def shared_fields(config: Any) -> dict[str, Any]:
    """The fields of ``config`` that diffusers' class has too, as its arguments: all but ``OWN_FIELDS``."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(config)
        if field.name not in OWN_FIELDS
        for value in [getattr(config, field.name)]
    }


def read_config(path: Path, raw: Mapping[str, Any], config_class: type[C]) -> C:
    """The configuration in ``raw``, the object of a ``config.json`` at ``path``.

    Values that diffusers does not read are ignored too: entries beyond the last level, the heads of a level
    without attention, and the channels of semantic latents that no level uses. Unknown fields are ignored
    with a ``UserNotice``. Raises ``CheckpointError`` for other invalid values, also for those that diffusers'
    class accepts but cannot run.
    """
    known = {field.name: field.default for field in dataclasses.fields(config_class)}
    values = dict(_DEFAULTS.get(config_class, {}))
    fields = {name: value for name, value in raw.items() if not name.startswith("_")}
    unknown = sorted(name[:80] for name in fields if name not in known)
    own = sorted(OWN_FIELDS & fields.keys())
    if unknown or own:
        network = config_class.__name__.removesuffix("Config")
        if own:  # from our own layout: without it, the images would be wrong
            raise CheckpointError(
                f"{path}: a {network} has no field {own[0]!r}. Use the folder of a Würstchen v2 model."
            )
        warnings.warn(
            f"{path} has fields that a {network} of diffusers does not have. They are ignored: "
            f"{', '.join(map(repr, unknown[:5]))}{', and others' if len(unknown) > 5 else ''}",
            UserNotice,
            stacklevel=5,
        )
        fields = {name: value for name, value in fields.items() if name in known}
    if config_class is DecoderConfig:
        fields = _as_read(path, {name: known[name] for name in _OF_LEVELS} | fields)
    for name, value in fields.items():
        if config_class is DecoderConfig and name == "dropout" and isinstance(value, list):
            values[name] = tuple(
                _checked_entry(path, name, entry, known[name], MAX_NUMBER) for entry in value
            )
        else:
            values[name] = _checked(path, name, value, known[name])
    try:
        return config_class(**values)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error


_OF_LEVELS = ("c_hidden", "nhead", "blocks", "level_config", "inject_effnet", "effnet_embd")


def _as_read(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a decoder, without what diffusers' class does not read."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    for name in _OF_LEVELS[:-1]:
        if not isinstance(fields[name], list):
            raise _wrong_type(path, name, fields[name], "a list with one entry per level")
    levels = len(fields["c_hidden"])
    for name in ("nhead", "blocks", "level_config", "dropout"):
        if isinstance(fields.get(name), list):
            fields[name] = fields[name][:levels]
    fields["level_config"] = [_joined_letters(kinds) for kinds in fields["level_config"]]
    for level, (count, kinds) in enumerate(zip(fields["blocks"], fields["level_config"], strict=False)):
        attends = "A" in str(kinds) and isinstance(count, int) and count > 0
        if not attends and level < len(fields["nhead"]):
            fields["nhead"][level] = -1
    fields["inject_effnet"] = [bool(v) if v in (0, 1) else v for v in fields["inject_effnet"]]
    if not any(v is True for v in fields["inject_effnet"]) and type(fields["effnet_embd"]) is not int:
        fields["effnet_embd"] = DecoderConfig.effnet_embd  # of mappers that do not exist
    return fields


def _joined_letters(kinds: object) -> object:
    """The blocks of a level as a string. They may also be a list of letters."""
    if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds):
        return "".join(kinds)
    return kinds


def _checked(path: Path, name: str, value: object, default: object) -> object:
    """A field's value, checked to have the type of its default."""
    limit = MAX_COUNT if name in _COUNTS else MAX_NUMBER
    if not isinstance(default, tuple):
        return _checked_entry(path, name, value, default, limit)
    if not isinstance(value, list):
        raise _wrong_type(path, name, value, f"like {default!r}")
    return tuple(_checked_entry(path, name, entry, default[0], limit) for entry in value)


def _checked_entry(path: Path, name: str, value: object, like: object, limit: int) -> object:
    if isinstance(like, float):
        return as_float(path, name, value, limit)
    if isinstance(like, bool | str):
        fits = type(value) is type(like)
    else:
        fits = type(value) is int and abs(value) <= limit
    if not fits:
        raise _wrong_type(path, name, value, f"like {like!r}, with numbers up to {limit}")
    return max(value, 0) if name in _REPEATS and isinstance(value, int) else value


def as_float(path: Path, name: str, value: object, limit: int) -> float:
    """A number as a float. Raises ``CheckpointError`` if it is NaN or above the limit."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= limit:
        raise _wrong_type(path, name, value, f"a number up to {limit}")
    return float(value)


def _wrong_type(path: Path, name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} must be {wanted}, got {str(value)[:40]!r}. Download the model again."
    )
