"""What ``bdengine screen`` does: tells starts of a sampler that carry a trigger from those that do not, before they are used.

    terd    flagged where log N(x; tau, gamma^2) > log N(x; 0, 1), tau an inverted trigger    `defenses.terd.log_ratio`
    ufid    flagged where p <= alpha, p of its density among those of `CLEAN` clean starts    `defenses.ufid.densities`

The first asks no network, but to sharpen a ``tau`` that a search found (`bdengine.inverted`). Where ``gamma`` is 1, which it is
but for TrojDiff's triggers, it flags clean starts at a rate of ``Phi(-|tau| / 2)``, and lets as many triggered ones pass if
``tau`` is the trigger. The second needs no trigger, and sends ``N steps`` images through the network for each start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import bdkernels

from . import checkpoint
from .arms import Arm, Arms
from .commands import Model
from .config import to_json
from .defend import subject_of
from .defenses import Calibration, Subject, terd, ufid
from .defenses.result import check_alpha
from .errors import UserError, unknown
from .files import write_json
from .inverted import Inverted
from .options import ScreenConfig

CLEAN: Final = 100
FIRST_SEED: Final = 1_000_000
"""Of starts that are made here; UFID perturbs with seeds from 0 on."""
METHODS: Final = ("terd", "ufid")


def screen(config: ScreenConfig) -> int:
    """Run ``bdengine screen``."""
    check_alpha(config.alpha)
    method = config.method or ("ufid" if config.trigger is None else "terd")
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    model, subject = subject_of(config.checkpoint, config)
    if (config.starts is None) == (config.known is None):
        raise UserError("expected starts or known: a file of starts, or the name of a trigger to try the method on")
    groups = {"given": read(config.starts, model)} if config.starts else tried(config, model)
    about: dict[str, Any] = {"method": method}
    if method == "terd":
        if config.trigger is None:
            raise UserError(
                "terd was asked for without a trigger: expected a folder that bdengine defend or audit wrote"
            )
        inverted = Inverted.load(config.trigger, model.network.sample_shape).sharpened(subject)
        tau, gamma = inverted.shift, inverted.gamma
        if not tau.any():
            raise UserError("the trigger is 0 everywhere: expected a shift, without which all starts are alike")
        about["predicted_false_alarms"] = terd.predicted_errors(tau, tau)[0] if gamma is None else None
        scores = {name: terd.log_ratio(starts, tau, gamma) for name, starts in groups.items()}
        flagged = {name: ratio > 0 for name, ratio in scores.items()}
    else:
        if config.alpha < 1 / (CLEAN + 1):
            raise UserError(
                f"alpha is {config.alpha:g} and ufid compares with {CLEAN} clean starts: expected at least 0.0100"
            )
        about["alpha"], scores = config.alpha, {name: p_values(subject, starts) for name, starts in groups.items()}
        flagged = {name: p <= config.alpha for name, p in scores.items()}
    about["flagged"] = {name: int(flags.sum()) for name, flags in flagged.items()}
    rows = {name: {"score": s.tolist(), "flagged": flagged[name].tolist()} for name, s in scores.items()}
    run = {name: value for name, value in to_json(config).items() if name != "out"}
    write_json(config.out / "screen.json", about | {"starts": rows, "run": run})
    for name, count in about["flagged"].items():
        print(f"{method}: {count} of {len(groups[name])} {name} starts flagged")
    print(f"wrote {config.out / 'screen.json'}")
    return 0


def p_values(subject: Subject, starts: Tensor) -> Tensor:
    """Of each start, float64 [N]: the share of clean ones, it among them, whose density is as great."""
    clean = noise(CLEAN, subject.network.sample_shape, FIRST_SEED)
    known = {str(k): d for k, d in enumerate(ufid.densities(subject, clean).tolist())}
    calibration = Calibration("ufid", {}, known)
    return torch.tensor([calibration.p_value(d) for d in ufid.densities(subject, starts).tolist()], dtype=torch.float64)


def noise(count: int, shape: tuple[int, int, int], first: int) -> Tensor:
    """Clean starts by seed, float32 [count, C, H, W]."""
    return bdkernels.normal(torch.arange(first, first + count), shape)


def tried(config: ScreenConfig, model: Model) -> dict[str, Tensor]:
    """Starts with the trigger that is known and without, as the model's own attack makes them, from the same noise.

    Raises:
        UserError: Fewer than one, or as `Model.triggered`.
    """
    if config.count < 1:
        raise UserError(f"{config.count} starts were asked for: expected at least 1")
    assert config.known is not None
    table, _ = model.table(config)
    arm = model.triggered(table, replace(model.attack, trigger=config.known))
    pair, first = {"clean": Arm(table), "triggered": arm}, FIRST_SEED + CLEAN
    arms, seeds = Arms(pair, model.network.sample_shape, torch.device("cpu")), torch.arange(first, first + config.count)
    return {name: arms.begin(torch.full_like(seeds, at), seeds) / table.start for at, name in enumerate(pair)}


def read(path: Path, model: Model) -> Tensor:
    """Starts in units of the sampler's first noise, float32 [N, C, H, W], from a .npy or a .safetensors file of one array.

    Raises:
        UserError: No such file, another kind, or an array that the model cannot start from.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: expected starts as .npy or .safetensors")
    if path.suffix == ".npy":
        try:
            starts = torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError, EOFError) as error:
            raise UserError(f"{path} is no array of numbers ({error}): expected float32 [N, C, H, W]") from error
    elif path.suffix == ".safetensors":
        tensors, _ = checkpoint.read_safetensors(path)
        if len(tensors) != 1:
            raise UserError(f"{path} has {len(tensors)} tensors: expected one, the starts")
        (starts,) = tensors.values()
    else:
        raise UserError(f"{path} is a {path.suffix or 'nameless'} file: expected .npy or .safetensors")
    shape = tuple(model.network.sample_shape)
    if starts.shape[1:] != shape or len(starts) == 0 or not starts.is_floating_point():
        raise UserError(f"{path} holds {tuple(starts.shape)} of {starts.dtype}: expected floats (N, {str(shape)[1:]}")
    if not bool(starts.isfinite().all()):
        raise UserError(f"{path} holds values that are not finite: expected numbers")
    return starts.float()
