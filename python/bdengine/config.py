"""Frozen dataclasses to JSON and back: how a run's configuration is saved beside its results, and told from another's."""

from __future__ import annotations

import dataclasses
import shlex
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError
from .files import read_json, write_json

Config = TypeVar("Config")
_JSON: typing.Final[dict[Any, tuple[type, ...]]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    typing.Literal: (str,),
    Path: (str,),
    tuple: (list, tuple),
    dict: (dict,),
}
"""What a field of a type is in JSON."""


def to_json(value: Any) -> Any:
    """``value`` (dataclasses, paths, tuples and plain values, nested) as JSON types."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value


def from_json(kind: type[Config], value: dict[str, Any]) -> Config:
    """The inverse of `to_json` for a dataclass ``kind``.

    Raises:
        UserError: No object, a field that ``kind`` does not have, or a value of another type than the field's.
    """
    if not isinstance(value, dict):
        raise UserError(f"{kind.__name__} is {value!r}: expected an object of JSON")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise UserError(f"unknown field {unknown[0]!r} of {kind.__name__}: expected {', '.join(hints)}")
    return kind(**{name: _restore(f"{name} of {kind.__name__}", hints[name], v) for name, v in value.items()})


def claim(file: Path, run: dict[str, Any], free: Collection[str] = ()) -> bool:
    """Write what ``run`` is to ``file``, unless another run's results lie beside it.

    Args:
        file: A JSON file in the run's folder.
        run: Its description, of JSON types.
        free: Fields that may differ: they do not change the results.

    Returns:
        Whether this run has been here before.

    Raises:
        UserError: Another run has, naming the first field that differs; or the file cannot be read or written.
    """
    found = file.exists()
    if found:
        before, now = (flat({k: v for k, v in one.items() if k not in free}) for one in (read_json(file), run))
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{file.parent} holds another run, whose {name} is {before.get(name)!r} and not {now.get(name)!r}:"
                    " expected the same, or an empty folder"
                )
    write_json(file, run)
    return found


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested objects by their dotted names."""
    told: dict[str, Any] = {}
    for name, v in value.items():
        told |= flat(v, f"{prefix}{name}.") if isinstance(v, dict) else {prefix + name: v}
    return told


def command(name: str, config: Any) -> str:
    """The command line that makes ``config``, a dataclass of `bdengine.options`, of all that is not its default."""
    words, options = ["bdengine", name], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        told = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
        if field.name in ("checkpoint", "checkpoints"):
            words += told
        elif value != field.default:
            options += [f"--{field.name.replace('_', '-')}", *told]
    return shlex.join([*words, *options])


def _restore(name: str, hint: Any, value: Any) -> Any:
    options = list(typing.get_args(hint)) if _is_union(hint) else [hint]
    if value is None and type(None) in options:
        return None
    if dataclasses.is_dataclass(options[0]):
        return from_json(typing.cast(type, options[0]), value)
    kind = typing.get_origin(options[0]) or options[0]
    wanted = _JSON.get(kind)
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool)):
        raise UserError(f"{name} is {value!r}: expected {kind.__name__}")
    return kind(value) if kind in (Path, tuple) else value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
