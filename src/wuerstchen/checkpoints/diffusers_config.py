"""The ``config.json`` of a network in diffusers' layout: every one that diffusers' classes accept and run.

Values are checked one by one, each for its kind and a bearable size, before anything is built.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from wuerstchen.errors import CheckpointError, UserError, UserNotice
from wuerstchen.models.decoder import DecoderConfig
from wuerstchen.models.prior import PriorConfig
from wuerstchen.models.vqgan import VQGANConfig

C = TypeVar("C", DecoderConfig, PriorConfig, VQGANConfig)

# What diffusers takes for a field that a configuration leaves out, where it is not the published value.
_DEFAULTS: dict[type, dict[str, Any]] = {PriorConfig: {"c": 1280, "c_cond": 1024, "depth": 16, "nhead": 16}}
# Fields that say how often something is repeated: large ones would take for ever, or overflow.
_COUNTS = {"depth", "blocks", "levels", "bottleneck_blocks", "patch_size", "kernel_size"}
_COUNTS |= {"up_down_scale_factor"}
# Those of them that are repetitions of blocks: fewer than none are none.
_REPEATS = {"depth", "blocks", "bottleneck_blocks"}
MAX_COUNT, MAX_NUMBER = 512, 2**24


def read_config(path: Path, raw: Mapping[str, Any], config_class: type[C]) -> C:
    """The configuration in ``raw``, the object of a ``config.json`` at ``path``.

    What diffusers does not read is passed over as it does: entries beyond the last level, the heads of a
    level without attention, the channels of a semantic map that no level sees. A field that it does not know
    is named in a ``UserNotice`` and ignored. Raises ``CheckpointError`` for anything else, and for what
    diffusers' class accepts but cannot run.
    """
    known = {field.name: field.default for field in dataclasses.fields(config_class)}
    values = dict(_DEFAULTS.get(config_class, {}))
    fields = {name: value for name, value in raw.items() if not name.startswith("_")}
    unknown = sorted(name[:80] for name in fields if name not in known)
    if unknown or "prediction" in fields:
        network = config_class.__name__.removesuffix("Config")
        if "prediction" in fields:  # a field of our own layout, without which the network draws nonsense
            raise CheckpointError(
                f"{path} is wrong because a {network} has no field 'prediction'; give the folder of a "
                "Würstchen v2 model"
            )
        warnings.warn(
            f"{path} has fields that a {network} of diffusers does not have, and that are ignored: "
            f"{', '.join(map(repr, unknown[:5]))}{', and others' if len(unknown) > 5 else ''}",
            UserNotice,
            stacklevel=5,
        )
        fields = {name: value for name, value in fields.items() if name in known}
    if config_class is DecoderConfig:
        fields = _as_read(path, {name: known[name] for name in _OF_LEVELS} | fields)
    for name, value in fields.items():
        if config_class is DecoderConfig and name == "dropout" and isinstance(value, list):
            values[name] = tuple(_checked_one(path, name, one, known[name], MAX_NUMBER) for one in value)
        else:
            values[name] = _checked(path, name, value, known[name])
    try:
        return config_class(**values)
    except UserError as error:
        raise CheckpointError(f"{path} is wrong: {error}") from error


_OF_LEVELS = ("c_hidden", "nhead", "blocks", "level_config", "inject_effnet", "effnet_embd")


def _as_read(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a decoder without what diffusers' class never looks at."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    for name in _OF_LEVELS[:-1]:
        if not isinstance(fields[name], list):
            raise _wrong_kind(path, name, fields[name], "a list with one entry for each level")
    levels = len(fields["c_hidden"])
    for name in ("nhead", "blocks", "level_config", "dropout"):
        if isinstance(fields.get(name), list):
            fields[name] = fields[name][:levels]
    fields["level_config"] = [_joined_letters(kinds) for kinds in fields["level_config"]]
    for level, (count, kinds) in enumerate(zip(fields["blocks"], fields["level_config"], strict=False)):
        attends = "A" in str(kinds) and isinstance(count, int) and count > 0
        if not attends and level < len(fields["nhead"]):
            fields["nhead"][level] = -1
    fields["inject_effnet"] = [bool(one) if one in (0, 1) else one for one in fields["inject_effnet"]]
    if not any(one is True for one in fields["inject_effnet"]) and type(fields["effnet_embd"]) is not int:
        fields["effnet_embd"] = DecoderConfig.effnet_embd  # of mappers that are not there
    return fields


def _joined_letters(kinds: object) -> object:
    """The blocks of a level, which may be a list of letters, as one text."""
    if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds):
        return "".join(kinds)
    return kinds


def _checked(path: Path, name: str, value: object, default: object) -> object:
    """A field's value as the configuration takes it, if it is like its default."""
    limit = MAX_COUNT if name in _COUNTS else MAX_NUMBER
    if not isinstance(default, tuple):
        return _checked_one(path, name, value, default, limit)
    if not isinstance(value, list):
        raise _wrong_kind(path, name, value, f"something like {default!r}")
    return tuple(_checked_one(path, name, one, default[0], limit) for one in value)


def _checked_one(path: Path, name: str, value: object, like: object, limit: int) -> object:
    if isinstance(like, float):
        return as_float(path, name, value, limit)
    if isinstance(like, bool | str):
        fits = type(value) is type(like)
    else:
        fits = type(value) is int and abs(value) <= limit
    if not fits:
        raise _wrong_kind(path, name, value, f"something like {like!r}, numbers at most {limit}")
    return max(value, 0) if name in _REPEATS and isinstance(value, int) else value


def as_float(path: Path, name: str, value: object, limit: int) -> float:
    """A number as a float. Raises ``CheckpointError`` unless it is of a bearable size, which NaN is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= limit:
        raise _wrong_kind(path, name, value, f"a number like 0.5 of at most {limit}")
    return float(value)


def _wrong_kind(path: Path, name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is wrong because {name} is {str(value)[:40]!r}, where {wanted} belongs; get the model again"
    )
