"""The checkpoints that ship with the package: 16x16 digits, each with how it was made beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .checkpoint import HUB_ID, holds_model
from .errors import absent

ASSETS: Final = Path(__file__).parent / "assets"
SHIPPED: Final = ("digits-clean", "digits-badiffusion")


def find(name: str) -> str:
    """Where a checkpoint is: a folder here, or that of a training run here, a shipped one, or a name on the hub.

    A folder that holds a model is that model, as diffusers takes it, whatever lies in a ``checkpoint`` in it.

    Raises:
        UserError: None of these.
    """
    path = Path(name)
    if path.exists():
        return str(path / "checkpoint" if (path / "checkpoint").is_dir() and not holds_model(path) else path)
    if name in SHIPPED:
        return str(ASSETS / name)
    if not HUB_ID.fullmatch(name):
        wanted = f"a folder, a hub name such as google/ddpm-cifar10-32, or one of {', '.join(SHIPPED)}"
        raise absent(f"checkpoint {name}", name, wanted, SHIPPED)
    return name
