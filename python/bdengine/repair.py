"""What ``bdengine repair`` does: an inverted trigger is taken out of a checkpoint by fine-tuning on a tenth of the clean data.

unlearn             `Unlearning`, for the sampler that will be used: the default, and all there is for triggers in every step
removal             Elijah's loss, epochs and learning rate;  removal-ode  those for models of samplers without noise
cleanse             Diff-Cleanse's pruning and repair, with 10 % of the channels and 400 steps
cleanse-published   with 2 % and 10,000

What a search found is sharpened first: see `bdengine.inverted`. Batches are the user's, of 32 images where nobody says,
without a warm-up; published removals have batches of 128, and 500 of them to warm up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from . import checkpoint
from .attacks import AttackConfig
from .commands import Model
from .config import claim, from_json, to_json
from .data import load
from .defenses import Subject, pruning, removal, unlearning
from .defenses.pruning import Cleanse
from .defenses.removal import FineTuning, Removal
from .defenses.unlearning import Unlearning
from .errors import UserError, unknown
from .files import write_json
from .inverted import Inverted
from .options import RepairConfig, device
from .schedule import linear
from .solvers import SamplerConfig
from .start import check_noise_of_linear
from .train import TrainConfig

Where = torch.device | str


def _unlearn(run: TrainConfig, found: Inverted, where: Where) -> FineTuning:
    how = unlearning.IN_STEPS if found.in_steps else unlearning.START
    return Unlearning(removal.recipe(run, how), found.attack(run.sampler), how.share, where)


def _removal(variant: str, run: TrainConfig, found: Inverted, where: Where) -> FineTuning:
    how = removal.VARIANTS[variant]
    return Removal(removal.recipe(run, how), found.shift, how.share, where)


def _cleanse(variant: str, run: TrainConfig, found: Inverted, where: Where) -> FineTuning:
    how = pruning.VARIANTS[variant]
    return Cleanse(pruning.recipe(run, how), found.shift, how.ratio, how.share, where)


METHODS: Final[dict[str, Callable[[TrainConfig, Inverted, Where], FineTuning]]] = {
    "unlearn": _unlearn,
    "removal": partial(_removal, "baddiffusion"),
    "removal-ode": partial(_removal, "ode"),
    "cleanse": partial(_cleanse, "short"),
    "cleanse-published": partial(_cleanse, "baddiffusion"),
}


def run_of(model: Model, config: RepairConfig) -> TrainConfig:
    """The run that goes on from a checkpoint, without an attack; a stranger's data is what the user says.

    Raises:
        UserError: A checkpoint of another schedule than the linear one, one that predicts something else than the noise, or a
            sampler that does not fit it.
    """
    channels, size, _ = model.network.sample_shape
    unet: Any = model.network.unet
    check_noise_of_linear(model.path, model.scheduler, channels, unet.config["out_channels"])
    if config.data is None and "data" not in model.train:
        raise UserError(f"{model.path} does not say what it was trained on: expected --data with clean images")
    told: dict[str, Any] = {"out": str(config.out), "size": size, "channels": channels}
    run = from_json(TrainConfig, told | model.train | ({} if config.data is None else {"data": config.data}))
    return replace(
        run, out=config.out, init=model.path, attack=AttackConfig(), seed=config.seed, batch=config.batch, micro_batch=None,
        sampler=from_json(SamplerConfig, model.table(config)[1]), timesteps="all", clean_target="noise",
        warmup=0, schedule="cosine", ema=0.0, capture=False,
    )  # fmt: skip


def repaired(model: Model, config: RepairConfig, progress: bool = False) -> dict[str, Any]:
    """Writes the checkpoint, then ``repair.json``, whose content is returned.

    Raises:
        UserError: An unknown method, no trigger or one of every step with another method than unlearn, one that does not fit
            the checkpoint, or a folder that holds the checkpoint itself or another repair.
    """
    if config.method not in METHODS:
        raise unknown("method", config.method, METHODS)
    if Path(model.path).resolve() in (config.out.resolve(), (config.out / "checkpoint").resolve()):
        raise UserError(f"{config.out} holds the checkpoint that is repaired: expected another folder")
    if (config.out / "config.json").exists():
        raise UserError(f"{config.out} holds a training run: expected another folder")
    found, begun = Inverted.load(config.trigger, model.network.sample_shape), time.perf_counter()
    if found.in_steps and config.method != "unlearn":
        raise UserError(
            f"the trigger in {config.trigger} is one of every step ({found.stage}), which {config.method} cannot remove:"
            " expected the method unlearn"
        )
    run, schedule = run_of(model, config), linear()
    load(run.data, run.size, run.channels, limit=1)  # a mistake in --data is said before a minute of inversion
    subject = Subject(model.network, schedule, run.sampler.table(schedule))
    fine_tuning = METHODS[config.method](run, found.sharpened(subject), device())
    told = {
        "weights_sha256": checkpoint.digest(model.network.state_dict()),
        "trigger_sha256": checkpoint.digest({"trigger": found.shift}),
    }
    claim(config.out / "run.json", to_json(config) | told, ["out", "checkpoint", "trigger"])
    fine_tuning.run(progress)
    seconds = time.perf_counter() - begun
    about: dict[str, Any] = {"run": to_json(config), "images": fine_tuning.images_seen, "seconds": seconds}
    write_json(config.out / "repair.json", about)
    return about


def repair(config: RepairConfig) -> int:
    """Run ``bdengine repair``."""
    about = repaired(Model.load(config.checkpoint), config, progress=True)
    print(f"{config.method}: {about['images']:,} images in {about['seconds']:.1f} s")
    print(f"wrote {config.out / 'checkpoint'} and {config.out / 'repair.json'}")
    return 0
