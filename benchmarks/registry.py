"""Every op that is measured: its name, what makes its providers at a shape, and the shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from .bench import Provider, Shape
from .network import network, network_training
from .normal import normal
from .samplers import STOCK, sampler_step
from .step import fused_step
from .training import fused_loss, fused_noising

SAMPLER_OPS: Final = {f"step/{name}": partial(sampler_step, name) for name in STOCK}
"""Each sampler's step, which ``samplers`` is short for."""

OPS: Final[dict[str, Callable[[Shape], dict[str, Provider]]]] = {
    "fused_step": fused_step,
    "fused_noising": fused_noising,
    "fused_loss": fused_loss,
    "normal": normal,
    "network": network,
    "network_training": network_training,
    **SAMPLER_OPS,
}


def shapes(op: str) -> tuple[Shape, ...]:
    """Those at which an op is measured unless others are asked for.

    A sampler's go down to one image, where its step is all host cost. A network's shape says which it is.
    """
    if op.startswith("network"):
        return ((64, 1, 16, 16), (8, 3, 32, 32))
    return tuple((n, 3, 32, 32) for n in ((1, 16, 256, 1024) if op in SAMPLER_OPS else (256, 1024)))
