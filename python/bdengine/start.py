"""The network that a training run starts with: a new one, or that of a checkpoint that training can go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import checkpoint
from .accelerate import accelerate
from .errors import UserError
from .networks import Network, unet
from .own import in_unit_range, is_preserving
from .schedule import Schedule, linear
from .shipped import find


@dataclass(frozen=True)
class NetworkConfig:
    """A new UNet's shape."""

    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each resolution."""
    layers: int = 1
    """Residual blocks a resolution."""
    groups: int = 8
    """Groups of the group norms."""
    attention: int = 0
    """Resolutions, counted from the coarsest, that have attention."""


def new(config: NetworkConfig, shape: tuple[int, int, int], *, exploding: bool, seed: int) -> Network:
    """A network with random weights of ``seed`` for images of ``shape`` (C, S, S); of log sigma where ``exploding``.

    Raises:
        UserError: As `unet`.
    """
    torch.manual_seed(seed)
    told: dict[str, Any] = {"time_embedding_type": "fourier"} if exploding else {}
    return Network(accelerate(unet(shape[1], shape[0], **vars(config), **told)))


def initial(path: str, shape: tuple[int, int, int], *, exploding: bool) -> Network:
    """The network of a checkpoint, by its folder or the name of a shipped one.

    Raises:
        UserError: It makes images of another shape than (C, S, S), is of another process, or predicts what is not trained.
    """
    folder = find(path)
    network = Network(accelerate(checkpoint.load_unet(folder)))
    if network.sample_shape != shape:
        raise UserError(f"{path} makes images of shape {tuple(network.sample_shape)}: expected {shape}")
    scheduler = checkpoint.load_scheduler_config(folder)
    if in_unit_range(scheduler) != exploding:
        raise UserError(f"{path} is of another process: expected one of {'ve' if exploding else 'vp'}")
    if not exploding:
        inner: Any = network.unet
        check_noise_of_linear(path, scheduler, shape[0], inner.config["out_channels"])
    return network


def check_noise_of_linear(path: str, scheduler: Mapping[str, Any], channels: int, out: int) -> None:
    """Refuse a checkpoint that training cannot go on from: it knows the linear betas of DDPM, and networks of the noise alone.

    Args:
        path: Of the checkpoint.
        scheduler: Its scheduler's configuration.
        channels, out: Of its images, and of what its network returns.

    Raises:
        UserError: As said.
    """
    process = Schedule.from_config(scheduler) if is_preserving(scheduler) else None
    if process is None or not np.array_equal(process.alpha_bar, linear().alpha_bar):
        kind = scheduler.get("_class_name", "no known class")
        betas = "" if process is None else f" with {process.name} betas"
        raise UserError(f"{path} has a scheduler of {kind}{betas}: expected the linear betas of DDPM to train it")
    if (process.prediction, out) != ("epsilon", channels):
        raise UserError(
            f"{path} predicts {process.prediction} in {out} channels: expected epsilon in {channels} to train it"
        )
