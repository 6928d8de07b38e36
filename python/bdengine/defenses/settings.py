"""What a statistic depends on beside the weights: findings that differ in any of it are not held against each other."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from .. import checkpoint
from ..config import to_json
from . import features, starts
from .subject import Subject


def settings(subject: Subject, variant: Any, **constants: Any) -> dict[str, Any]:
    """Those of a detector, as JSON types.

    Args:
        variant: Its settings, a frozen dataclass or a dictionary.
        constants: What else in its file the statistic depends on.
    """
    return to_json(
        to_json(variant)
        | {
            "family": family_of(subject),
            "sampler": subject.table.name,
            "coefficients": _coefficients(subject),
            "features": "pixels" if subject.extractor is None else subject.extractor.name,
            "compared": features.IMAGES,
            "search": {"squares": starts.GRID, "images": starts.IMAGES},
        }
        | constants
    )


def family_of(subject: Subject) -> str:
    """What models of one calibration share: their network's kind, and a digest of all of its configuration.

    Their data and their training cannot be read off a checkpoint: that they are alike is left to who calibrates.
    """
    unet = getattr(subject.network, "unet", subject.network)
    config = {k: v for k, v in dict(getattr(unet, "config", {})).items() if not k.startswith("_")}
    widths = "x".join(map(str, config.get("block_out_channels", ())))
    shape = "x".join(map(str, subject.network.sample_shape))
    told = f"{type(unet).__name__} {shape} of {widths or 'unknown'} channels"
    if not config:
        return told
    digest = hashlib.sha256(json.dumps(to_json(config), sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{told} ({digest})"


def _coefficients(subject: Subject) -> str:
    """Of the sampler and the process: a name tells neither eta nor the betas."""
    told = {name: value for name, value in vars(subject.table).items() if name not in ("name", "end")}
    process = None if subject.process is None else subject.process.alpha_bar
    tensors = {
        name: torch.tensor(value, dtype=torch.float32)
        for name, value in (told | {"alpha_bar": process}).items()
        if value is not None
    }
    return checkpoint.digest(tensors)
