"""The checkpoints that ship with the package: 16x16 digits, each with how it was made beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .checkpoint import HUB_ID
from .errors import UserError

ASSETS: Final = Path(__file__).parent / "assets"
SHIPPED: Final = ("digits-clean", "digits-badiffusion")


def find(name: str) -> str:
    """Where a checkpoint is: a folder here, or that of a training run here, a shipped one, or a name on the hub.

    Raises:
        UserError: None of these.
    """
    path = Path(name)
    if path.exists():
        return str(path / "checkpoint" if (path / "checkpoint").is_dir() else path)
    if name in SHIPPED:
        return str(ASSETS / name)
    if not HUB_ID.fullmatch(name):
        raise UserError(
            f"there is no checkpoint {name}: expected a folder, a hub name such as google/ddpm-cifar10-32, or one of"
            f" {', '.join(SHIPPED)}"
        )
    return name
