"""The checkpoints that ship with the package: 16x16 digits, each with how it was made beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ASSETS: Final = Path(__file__).parent / "assets"
SHIPPED: Final = ("digits-clean", "digits-badiffusion")


def find(checkpoint: str) -> str:
    """The path of a shipped checkpoint where ``checkpoint`` is the name of one and nothing local, else itself."""
    return str(ASSETS / checkpoint) if checkpoint in SHIPPED and not Path(checkpoint).exists() else checkpoint
