"""Files that are whole or absent: written beside their place, flushed to the disk, moved there in one step."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bdengine.errors import UserError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file so that at every instant, also after a kill, ``path`` holds all of the old or all of the new bytes.

    Args:
        path: Where to; missing parent folders are made, a symbolic link is followed.
        data: What to write, text as UTF-8.

    Raises:
        UserError: The system refused (no space, no permission); the old file is untouched, nothing is left beside it.
    """
    path = Path(path).resolve()
    new = _beside(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(new, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
        _flush(path.parent)


def write_json(path: Path, obj: object) -> None:
    """Writes ``obj`` as indented JSON through `write_atomic`.

    Raises:
        TypeError: ``obj`` holds something JSON has no form for; nothing is written.
        UserError: As `write_atomic`.
    """
    write_atomic(path, json_text(obj))


def json_text(obj: object) -> str:
    """The indented JSON of ``obj``, with a final newline.

    Raises:
        TypeError: ``obj`` holds something JSON has no form for.
    """
    return json.dumps(obj, indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose outermost value is an object.

    Raises:
        UserError: The file is missing, unreadable, broken, or holds another kind of value.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as reason:
        raise UserError(f"cannot read {path}: {reason.strerror}; expected a JSON file") from reason
    except (ValueError, RecursionError) as reason:
        raise UserError(f"{path} is not JSON ({reason}); expected one JSON object") from reason
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object, as in {{}}")
    return value


def remove_leftovers(folder: Path) -> None:
    """Removes what killed calls of `write_atomic` left in ``folder``; no other may be writing there.

    Raises:
        UserError: The system refused.
    """
    with _explained(folder):
        for file in folder.glob(".*.tmp"):
            file.unlink()


@contextmanager
def replace_folder(path: Path, *, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    Where the system can swap two names in one step (Linux, most file systems) ``path`` is at every instant the whole
    old folder or the whole new one. Elsewhere it is two renames: a kill between them leaves the old folder, whole,
    under a hidden name beside it.

    Args:
        path: The folder to make or replace; missing parents are made, a symbolic link is followed.
        replaceable: The names that an existing folder may hold. Anything else in it would be lost with the
            replacement and is refused, so by default only an absent or empty folder is accepted.

    Raises:
        UserError: ``path`` is a file or holds other names (before the block runs), or the system refused a write
            (any ``OSError`` of the block counts as one).
    """
    path = Path(path).resolve()
    with _explained(path):
        _refuse_strangers(path, replaceable)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(path)
        try:
            new.mkdir()
            yield new
            for part in (*new.rglob("*"), new):
                _flush(part)
            _put(new, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _refuse_strangers(path: Path, replaceable: Collection[str]) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a folder or a name that is still free")
    strangers = sorted({part.name for part in path.iterdir()} - set(replaceable)) if path.is_dir() else []
    if strangers:
        kept = ", ".join(sorted(replaceable)) or "nothing"
        raise UserError(
            f"{path} holds {', '.join(strangers[:3])}, which replacing it would delete; "
            f"expected {kept} there, or a name that is still free"
        )


def _beside(path: Path) -> Path:
    # not `tempfile`: its files are readable by their owner alone, and would stay so under their final name
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):
        old = _beside(path)
        os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step with Linux's renameat2(2); False, and nothing done, where that is not to be had."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        raise UserError(
            f"cannot write {path}: {reason.strerror or reason}; expected a writable folder with room for it"
        ) from reason
