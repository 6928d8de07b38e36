"""Errors that a person can act on: one sentence with the value, what was expected, and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input or on the machine that the user can mend; the command line prints it without a traceback."""


def absent(what: str, value: str, wanted: str, names: Iterable[str]) -> UserError:
    """The error for a path where nothing is, with the one of some ``names`` that may have been meant.

    Args:
        what: What is not there, with its path.
        value: What was given.
        wanted: What was expected.
        names: That stand for something without being paths.
    """
    near = difflib.get_close_matches(value, [*names], n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return UserError(f"there is no {what}: expected {wanted}{hint}")


def unknown(kind: str, value: object, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among ``choices``, naming the nearest one.

    Args:
        kind: What the name is for, in the singular ("trigger", "sampler").
        value: What was given.
        choices: Every valid name.
    """
    names = sorted(choices)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return UserError(f"unknown {kind} {value!r}: expected one of {', '.join(names)}{hint}")
