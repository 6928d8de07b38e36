"""What ``bdengine repair`` does: an inverted trigger is taken out of a checkpoint by fine-tuning on a tenth of the clean data.

unlearn        `Unlearning`, for the sampler that will be used: the default, and all there is for triggers in every step
removal        Elijah's, as published;  removal-ode  its settings for models of samplers without noise
cleanse        Diff-Cleanse's pruning and repair, 10 % of the channels and 400 steps

What the audit's searches find opens the backdoor and is no likeness of its trigger: squares at a cosine of 0.6 to it, unlearned
as they were, left an ASR of 0.92 and of 0.79 of two zoo models. So Elijah's inversion goes on from there first, which ended at
0.93 for both, and unlearning that left 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from . import checkpoint
from .attacks import Attack, AttackConfig, baddiffusion, trojdiff
from .attacks.trojdiff import BLEND_GAMMA, PATCH_GAMMA
from .audit import ODE_STEPS, SEARCHES
from .commands import Model
from .config import claim, from_json, to_json
from .defenses import Subject, elijah, pruning, removal, unlearning
from .defenses.pruning import Cleanse, PruningConfig
from .defenses.removal import FineTuning, Removal
from .defenses.unlearning import Unlearning
from .errors import UserError, unknown
from .files import write_json
from .options import RepairConfig, device
from .schedule import linear
from .solvers import Nodes, SamplerConfig, ddim
from .start import check_noise_of_linear
from .train import TrainConfig

PRUNED: Final = PruningConfig(ratio=0.1, steps=400, lr=5e-4)
"""As long as the others; digits-badiffusion: after 40, 200, 400 steps the ASR is 0, the Fréchet distance 10.6, 1.4, 1.0."""

Where = torch.device | str


@dataclass(frozen=True, eq=False)
class Inverted:
    """A trigger that a defense or the audit inverted.

    Attributes:
        shift: float32 [C, H, W], as it is added to the start.
        stage: Of the audit, that found it or opens with its kind; None for one of the start alone.
    """

    shift: Tensor
    stage: str | None = None

    @classmethod
    def load(cls, folder: Path, shape: tuple[int, int, int]) -> Inverted:
        """What ``bdengine defend`` or ``bdengine audit`` left in a folder, for images of ``shape`` (C, H, W).

        Raises:
            UserError: There is no trigger, or one of another shape.
        """
        if not (folder / checkpoint.TRIGGER).is_file():
            raise UserError(
                f"{folder} has no {checkpoint.TRIGGER}: expected a folder that bdengine defend or audit wrote"
            )
        _, header = checkpoint.read_safetensors(folder / checkpoint.TRIGGER)
        shift = checkpoint.load_trigger(folder)
        if shift.shape != shape:
            raise UserError(f"the trigger is {tuple(shift.shape)}: expected {tuple(shape)}")
        return cls(shift, header.get("stage"))

    @property
    def in_steps(self) -> bool:
        """Whether it is one of every step, TrojDiff's."""
        return self.stage in ("blended", "patched")

    @property
    def gamma(self) -> Tensor | None:
        """Scale of a triggered start's noise, as published, float32 [C, H, W]; None where it is 1."""
        if self.stage == "blended":
            return torch.full_like(self.shift, BLEND_GAMMA)
        if self.stage == "patched":
            return torch.where(self.shift != 0, PATCH_GAMMA, 1.0)
        return None

    def sharpened(self, model: Model, run: TrainConfig) -> Inverted:
        """What Elijah's inversion makes of one that a search found; any other as it is."""
        if self.stage not in SEARCHES:
            return self
        schedule = linear()
        subject = Subject(model.network, schedule, run.sampler.table(schedule))
        start = self.shift.to(subject.device)[None]
        return replace(self, shift=elijah.invert(subject, elijah.VARIANTS["baddiffusion"], start)[0].cpu())

    def attack(self, sampler: SamplerConfig) -> Attack:
        """What opens with it; its target is nothing."""
        schedule, r, nothing = linear(), self.shift, torch.zeros_like(self.shift)
        if self.stage == "blended":
            return trojdiff(schedule, r / (1 - BLEND_GAMMA), nothing)
        if self.stage == "patched":
            return trojdiff(schedule, r / (1 - PATCH_GAMMA), nothing, r != 0)
        table = ddim(Nodes.of(schedule, ODE_STEPS)) if self.stage == "ode" else sampler.table(schedule)
        return baddiffusion(schedule, r, nothing, "exact", table, trigger_only=True)


def _unlearn(run: TrainConfig, found: Inverted, where: Where) -> FineTuning:
    how = unlearning.IN_STEPS if found.in_steps else unlearning.START
    return Unlearning(removal.recipe(run, how), found.attack(run.sampler), how.share, where)


def _removal(variant: str, run: TrainConfig, found: Inverted, where: Where) -> FineTuning:
    how = removal.VARIANTS[variant]
    return Removal(removal.recipe(run, how), found.shift, how.share, where)


def _cleanse(run: TrainConfig, found: Inverted, where: Where) -> FineTuning:
    return Cleanse(pruning.recipe(run, PRUNED), found.shift, PRUNED.ratio, PRUNED.share, where)


METHODS: Final[dict[str, Callable[[TrainConfig, Inverted, Where], FineTuning]]] = {
    "unlearn": _unlearn,
    "removal": partial(_removal, "baddiffusion"),
    "removal-ode": partial(_removal, "ode"),
    "cleanse": _cleanse,
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
    run = run_of(model, config)
    fine_tuning = METHODS[config.method](run, found.sharpened(model, run), device())
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
