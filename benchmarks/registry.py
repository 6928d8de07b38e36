"""Every op that is measured: its name, what makes its providers at a shape on a device, the bytes it must move, the shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from . import inversion, loop, pipeline, train_step
from .bench import Provider, Shape
from .capture import SHAPE, STEPS, sampling_loop
from .loop import whole_loop
from .network import NETWORKS, network, network_training
from .normal import normal, normal_bytes
from .pipeline import measurement
from .samplers import STOCK, sampler_step, sampler_step_bytes
from .step import fused_step, fused_step_bytes
from .train_step import training_step
from .training import fused_loss, fused_loss_bytes, fused_noising, fused_noising_bytes

Build = Callable[[Shape, torch.device], dict[str, Provider]]

SAMPLER_OPS: Final = {f"step/{name}": partial(sampler_step, name) for name in STOCK}
"""Each sampler's step, which ``samplers`` is short for."""

LOOP_OPS: Final = {f"capture/{steps}": partial(sampling_loop, steps) for steps in STEPS}
"""Whole loops with their network, which ``capture`` is short for."""

NETWORK_OPS: Final[dict[str, Build]] = {"network/forward": network, "network/training": network_training}
"""Whole networks, which ``network`` is short for."""

WHOLE_OPS: Final[dict[str, Build]] = {
    "loop": whole_loop,
    "train": training_step,
    "inversion": inversion.iteration,
    "pipeline": measurement,
}
"""What a user waits for, which ``whole`` is short for."""

WHOLE_SHAPES: Final[dict[str, tuple[Shape, ...]]] = {
    "loop": loop.SHAPES,
    "train": train_step.SHAPES,
    "inversion": inversion.SHAPES,
    "pipeline": pipeline.SHAPES,
}
"""At which it is measured."""

IN_IMAGES: Final[dict[str, Build]] = {**LOOP_OPS, **WHOLE_OPS}
"""Told in images a second."""

OPS: Final[dict[str, Build]] = {
    "fused_step": fused_step,
    "fused_noising": fused_noising,
    "fused_loss": fused_loss,
    "normal": normal,
    **SAMPLER_OPS,
}
"""Measured where no op is named."""

EVERY_OP: Final[dict[str, Build]] = {**OPS, **NETWORK_OPS, **IN_IMAGES}
"""With those that are measured where they are asked for."""

SHORT: Final = {
    "samplers": list(SAMPLER_OPS),
    "network": list(NETWORK_OPS),
    "capture": list(LOOP_OPS),
    "whole": list(WHOLE_OPS),
}
"""What a word for several ops stands for."""

BYTES: Final[dict[str, Callable[[Shape], float]]] = {
    "fused_step": fused_step_bytes,
    "fused_noising": fused_noising_bytes,
    "fused_loss": fused_loss_bytes,
    "normal": normal_bytes,
    **{f"step/{name}": partial(sampler_step_bytes, name) for name in STOCK},
}
"""Bytes of images that one call cannot but move; a table's row and a few numbers a sample are left out."""


def shapes(op: str) -> tuple[Shape, ...]:
    """Those at which an op is measured unless others are asked for.

    A sampler's go down to one image, where its step is all host cost; a loop's is its network's, and a network's says which.
    """
    if op in NETWORK_OPS:
        return NETWORKS
    if op in LOOP_OPS:
        return (SHAPE,)
    if op in WHOLE_OPS:
        return WHOLE_SHAPES[op]
    return tuple((n, 3, 32, 32) for n in ((1, 16, 256, 1024) if op in SAMPLER_OPS else (256, 1024)))
