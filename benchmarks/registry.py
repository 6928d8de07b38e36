"""Every op that is measured: its name, and what makes its providers at a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .bench import Provider, Shape
from .normal import normal
from .step import fused_step
from .training import fused_loss, fused_noising

OPS: Final[dict[str, Callable[[Shape], dict[str, Provider]]]] = {
    "fused_step": fused_step,
    "fused_noising": fused_noising,
    "fused_loss": fused_loss,
    "normal": normal,
}
