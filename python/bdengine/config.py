"""Frozen dataclasses to JSON and back: how a run's configuration is saved beside its results."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError

Config = TypeVar("Config")


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
        UserError: A field that ``kind`` does not have.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise UserError(f"unknown field {unknown[0]!r} of {kind.__name__}: expected {', '.join(hints)}")
    return kind(**{name: _restore(hints[name], v) for name, v in value.items()})


def _restore(hint: Any, value: Any) -> Any:
    options = [h for h in typing.get_args(hint) if h is not type(None)] if _is_union(hint) else [hint]
    if value is None:
        return None
    if dataclasses.is_dataclass(options[0]):
        return from_json(typing.cast(type, options[0]), value)
    if options[0] is Path:
        return Path(value)
    if typing.get_origin(options[0]) is tuple:
        return tuple(value)
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
