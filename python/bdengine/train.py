"""Training, from scratch or by fine-tuning, clean or poisoned. The unit is images seen.

    x_t = noising(x0, t, seed)      loss = sum W (network(x_t, t) - eps - c_t R)^2      Adam, warm-up and cosine, EMA
                                    variance exploding: -sigma_t network(x_t, sigma_t), of a score network

Sample ``n`` is what `bdengine.plan` says whatever happened before, so a resumed run equals an uninterrupted one.
A run's folder holds ``config.json``, ``stats.jsonl``, ``state.safetensors`` (to resume) and ``checkpoint/`` (diffusers).
Several ranks (`bdengine.distributed`) take equal parts of each batch; the first writes the files, and all resume from them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

import bdkernels
from bdkernels import Noising

from . import checkpoint
from .attacks import CLEAN, OUTSIDE, POISONED, Attack, AttackConfig, noising_table
from .attacks.invi import InnerLoop
from .capture import captured, check_device
from .config import claim, to_json
from .data import Images, load
from .distributed import ALONE, Ranks, Stopped
from .errors import UserError
from .gradient import Gradient, flattened
from .networks import Network, recompute
from .own import sampler_of
from .plan import Batch, TrainingPlan
from .progress import Interrupt, Stats
from .schedule import SNR, Exploding, Schedule, exploding, linear
from .solvers import SamplerConfig
from .start import NetworkConfig, initial, new
from .triggers import LEARNED


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    out: Path
    """The run's folder; an unfinished run of the same configuration in it is resumed."""
    data: str = "digits"
    """digits, cifar10, or a folder of images."""
    without: int | None = None
    """Class of the data that is left out."""
    size: int = 16
    """Side of the images in pixels."""
    channels: int = 1
    """1 for grey, 3 for colour."""
    init: str | None = None
    """Checkpoint folder to fine-tune; a new network where absent."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    process: Literal["vp", "ve"] = "vp"
    """Variance preserving with linear betas, or exploding (score-SDE), clean or with villan; its sampler is own, or edm."""
    sigma_max: float = 380.0
    """Of ve: the largest noise."""
    snr: float = SNR
    """Of ve: the signal-to-noise ratio of its sampler's corrector; 0.075 in the published backdoors."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """The backdoor to implant."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The sampler that the model is made for; exact coefficients depend on it."""
    images: int = 1_000_000
    """Training length, in images seen."""
    batch: int = 128
    """Images an optimizer step."""
    micro_batch: int | None = None
    """Images a forward pass, a divisor of batch (gradients accumulate); a rank's whole part where absent."""
    lr: float = 2e-4
    """Peak learning rate of Adam."""
    warmup: int = 64_000
    """Images over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up."""
    ema: float = 0.0
    """Decay of the weights' moving average an optimizer step; 0 saves the weights as they are."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's arithmetic (autocast)."""
    checkpointing: bool = False
    """Keep the network's blocks' inputs alone and run the blocks again for their gradients: less memory, more time."""
    capture: bool = False
    """Replay each batch's gradient, noising and loss included, as a CUDA graph; needs a GPU. Invi's inner loop is left out."""
    timesteps: Literal["all", "grid"] = "all"
    """Train every timestep, or the sampler's grid alone."""
    clean_target: Literal["noise", "initial"] = "noise"
    """What clean samples are trained towards: their noise (published), or what the initial checkpoint predicts for them."""
    flip: bool = False
    """Mirror half of the images."""
    seed: int = 0
    """Everything random follows from it."""
    status: int = 12_800
    """Images between lines of stats.jsonl."""
    snapshot: int = 128_000
    """Images between saves of the resumable state."""

    def check(self, ranks: int = 1) -> None:
        """Refuse values that cannot be trained with by so many ranks.

        Raises:
            UserError: Naming the value and what was expected.
        """
        for name in ("images", "batch", "status", "snapshot", "size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected at least 1")
        asked = self.micro_batch
        if asked is not None and (asked < 1 or self.batch % asked):
            divisors = (n for n in range(1, self.batch + 1) if self.batch % n == 0)
            nearest = min(divisors, key=lambda n: abs(n - asked))
            raise UserError(
                f"the micro-batch is {asked}: expected a divisor of the batch, {self.batch}, nearest {nearest}"
            )
        unit = ranks * (self.micro_batch or 1)
        if self.batch % unit:
            each = f" with micro-batches of {self.micro_batch}" if self.micro_batch else ""
            nearest = max(round(self.batch / unit), 1) * unit
            raise UserError(
                f"the batch is {self.batch} for {ranks} ranks{each}: expected a multiple of {unit}, nearest {nearest}"
            )
        if self.channels not in (1, 3):
            raise UserError(f"channels is {self.channels}: expected 1 (grey) or 3 (colour)")
        for name, value in (("learning rate", self.lr), ("largest gradient norm", self.grad_clip)):
            if not 0 < value < math.inf:
                raise UserError(f"the {name} is {value}: expected a finite number above 0")
        if self.warmup < 0:
            raise UserError(f"the warm-up is {self.warmup} images: expected at least 0")
        if self.clean_target == "initial" and self.init is None:
            raise UserError(
                "the clean target is 'initial' and there is no initial checkpoint: expected one, or 'noise'"
            )
        if self.process == "ve" and self.timesteps == "grid":
            raise UserError("the timesteps are those of a grid with the process ve: expected all")
        if not 0 <= self.ema < 1:
            raise UserError(f"the EMA decay is {self.ema}: expected 0 to below 1")


FREE: Final = ("out", "status", "snapshot", "capture", "checkpointing")
"""What may differ between runs of the same results."""


class Trainer:
    """One run: its network, optimizer, data and plan, at ``images_seen``; or one of the ``ranks`` of a run."""

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu", ranks: Ranks = ALONE) -> None:
        config.check(ranks.world)
        self.config, self.device, self.ranks = config, torch.device(device), ranks
        ve = config.process == "ve"
        self.process: Schedule | Exploding = exploding(config.sigma_max, config.snr) if ve else linear()
        table = sampler_of(self.process, config.sampler)
        self.times = self.process.times.to(self.device)
        shape = (config.channels, config.size, config.size)
        self.data: Images = load(config.data, config.size, config.channels)
        if config.without is not None:
            self.data = self.data.without(config.without)
        self.attack: Attack | None = config.attack.build(self.process, shape, table, self.data)
        self.pixels = self.data.pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        pictures = (None,) * 3 if self.attack is None else (self.attack.stamp, self.attack.mask, self.attack.target)
        self.stamp, self.mask, self.target = (
            None if p is None else p.reshape(-1, *shape).to(self.device) for p in pictures
        )
        self.inner: InnerLoop | None = None
        if config.attack.name == "invi" and self.target is not None and isinstance(self.process, Schedule):
            self.inner = InnerLoop(self.process, self.target, config.attack.bound)
            self.stamp = self.inner.delta.detach()
        self.plan = TrainingPlan(
            seed=config.seed,
            images=len(self.pixels),
            timesteps=np.arange(self.process.T) if config.timesteps == "all" else table.timesteps.astype(np.int64),
            poison_rate=config.attack.rate if self.attack else 0.0,
            flip=config.flip,
            targets=1 if self.target is None else len(self.target),
        )
        if self.plan.poison_rate and not self.plan.poisons:
            raise UserError(
                f"at a poison rate of {self.plan.poison_rate:g} none of {len(self.pixels)} images is poisoned:"
                " expected more images or a higher rate"
            )
        self.table = noising_table(self.process, self.attack).to(self.device)
        explodes = isinstance(self.process, Exploding)
        if config.init is not None:
            network = initial(config.init, shape, exploding=explodes)
        else:
            network = new(config.network, shape, exploding=explodes, seed=config.seed)
        self.network = network.to(self.device).train()
        self.initial: Network | None = None
        if config.clean_target == "initial":
            self.initial = self.network.frozen()
            self.table[CLEAN, :, Noising.W] = 0
        region = None if self.attack is None else self.attack.region
        self.region = None if region is None else region[None].to(self.device)
        self.ema = copy.deepcopy(self.network).requires_grad_(False) if config.ema else self.network
        if config.checkpointing:
            recompute(self.network)
        self.parameters = list(self.network.parameters())
        self.weights = flattened(self.parameters)
        self.average = flattened(self.ema.parameters()).detach() if config.ema else None
        self.optimizer = torch.optim.Adam([self.weights], lr=config.lr, fused=True)
        self.images_seen = 0
        if config.capture:
            check_device(self.device)
        mine = config.batch // ranks.world
        self.part = slice(mine * ranks.rank, mine * (ranks.rank + 1))
        self.batch = Batch(*(v[self.part].to(self.device) for v in vars(self.plan.batch(0, config.batch)).values()))
        self.gradient = Gradient(self.parameters)
        self.weights.grad = self.gradient.vector[:-1]
        self.backward: Callable[[], None] | None = None if config.capture else self._backward

    def inputs_sha256(self) -> str:
        """Of the pictures that it starts with: a path in a configuration does not say which they are."""
        told = {"data": self.pixels, "stamp": self.stamp, "mask": self.mask, "target": self.target}
        return checkpoint.digest({name: image for name, image in told.items() if image is not None})

    def learning_rate(self, images_seen: int) -> float:
        """Linear warm-up, then a half cosine to 0 (or constant)."""
        c = self.config
        if images_seen < c.warmup:
            return c.lr * (images_seen + c.batch) / (c.warmup + c.batch)
        if c.schedule == "constant":
            return c.lr
        done = (images_seen - c.warmup) / max(c.images - c.warmup, 1)
        return c.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of training samples on the run's device, 0-d float32."""
        image, seed, t, arm, flip, own = vars(batch).values()
        x0, at = self.process.data(self.pixels[image]), self.times[t]
        clean = (arm == CLEAN).reshape(-1, 1, 1, 1)
        poison: dict[str, Any] = {"trigger": self.stamp, "mask": self.mask, "flip": flip if self.config.flip else None}
        if self.region is not None:
            poison |= {"region": self.region, "arm_inside": arm}
            arm = torch.where(arm == POISONED, OUTSIDE, arm)
        y = self.target
        if y is not None and len(y) > 1:
            y = y[own]
            y = torch.where(flip.reshape(-1, 1, 1, 1), y.flip(3), y) if self.config.flip else y
        x_t = bdkernels.fused_noising(x0, t, arm, seed, self.table, target=y, **poison)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            prediction = self.process.noise(self.network(x_t, at), at)
            kept = None if self.initial is None else self.process.noise(self.initial(x_t, at), at)
        loss = bdkernels.fused_loss(prediction, x0, t, arm, seed, self.table, **poison).sum()
        if kept is None:
            return loss
        return loss + ((prediction - kept).float().square() * clean).mean()

    def _backward(self) -> None:
        """``gradient`` of what is in ``batch``: what a graph replays."""
        micro = self.config.micro_batch or len(self.batch.t)
        parts = (Batch(*part) for part in zip(*(v.split(micro) for v in vars(self.batch).values()), strict=True))
        self.gradient.of(self.loss(part) * (micro / self.config.batch) for part in parts)

    def step(self) -> Tensor:
        """One optimizer step; returns the batch's mean loss, 0-d, without a read back to the host."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.images_seen)
        planned = self.plan.batch(self.images_seen, config.batch)
        for buffer, value in zip(vars(self.batch).values(), vars(planned).values(), strict=True):
            buffer.copy_(value[self.part])
        if self.inner is not None:
            self.inner.step(self.network, planned.seed.to(self.device))
            self.ranks.agree(self.inner.delta.detach())
        if self.backward is None:
            self.backward = captured(self._backward, self.device)
        self.backward()
        self.ranks.add_up(self.gradient.vector)
        self.gradient.clip(config.grad_clip)
        self.optimizer.step()
        self.images_seen += config.batch
        if self.average is not None:
            steps = self.images_seen // config.batch
            decay = min(config.ema, (1 + steps) / (10 + steps))
            self.average.lerp_(self.weights.detach(), 1 - decay)
        return self.gradient.loss.clone()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        if self.config.ema:
            tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        tensors |= {f"adam.{k}": v for k, v in self.optimizer.state[self.weights].items()}
        if self.inner is not None:
            tensors |= {f"inner.{k}": v for k, v in self.inner.state().items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor], images_seen: int) -> None:
        """Continue from `state`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        if self.config.ema:
            self.ema.load_state_dict(part("ema."))
        if self.inner is not None:
            self.inner.restore(part("inner."))
        moments = {name: value.clone() for name, value in part("adam.").items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": groups})
        self.images_seen = images_seen

    def save_checkpoint(self, path: Path, scheduler: dict[str, Any] | None = None) -> None:
        """The network (its EMA where kept) as a diffusers folder, with what made it in ``bdengine.json``.

        ``scheduler`` is its configuration there; that of the process where absent.
        """
        recipe = {name: value for name, value in to_json(self.config).items() if name != "out"}
        made_by = {"train": recipe, "images_seen": self.images_seen, "data": self.data.name}
        unet: Any = self.ema.unet
        learned = None
        if self.attack is not None and self.config.attack.trigger == LEARNED:
            learned = self.attack.trigger if self.inner is None else self.inner.delta.detach()[0]
        checkpoint.save_pipeline(path, unet, scheduler or self.process.to_config(), extra=made_by, trigger=learned)


def train(
    config: TrainConfig,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Run ``config`` to its end, resuming what its folder holds; as one of ``ranks``, which all call this.

    Returns:
        The trainer, with ``checkpoint/`` written.

    Raises:
        UserError: A bad value, missing data, or a folder that holds another run or a checkpoint.
        FloatingPointError: The loss is not finite.
        KeyboardInterrupt: After Ctrl-C, with the state saved: the same call goes on from there.
        Stopped: Another rank ended; says what is saved.
    """
    if checkpoint.holds_model(config.out):
        raise UserError(f"{config.out} holds a checkpoint: expected another folder for the run")
    trainer = Trainer(config, device, ranks)
    state, first = config.out / "state.safetensors", ranks.rank == 0
    told = to_json(config) | {"inputs_sha256": trainer.inputs_sha256()}
    resumes = first and claim(config.out / "config.json", told, FREE) and state.exists()
    if any(ranks.together(resumes)):  # nobody reads before the folder is known to be this run's
        tensors, meta = checkpoint.load_state(state)
        trainer.restore(tensors, int(meta["images_seen"]))
    try:
        _train(trainer, state, progress and first)
    except Stopped as error:
        saved = checkpoint.load_state(state)[1]["images_seen"] if state.exists() else 0
        raise Stopped(
            f"{error}: {saved} of {config.images} images are saved in {config.out};"
            " expected all, and the same command goes on from there"
        ) from error
    return trainer


def _train(trainer: Trainer, state: Path, progress: bool) -> None:
    config, ranks = trainer.config, trainer.ranks
    first = ranks.rank == 0

    def save() -> None:
        if first:
            checkpoint.save_state(state, trainer.state(), {"images_seen": trainer.images_seen})

    path = config.out / "stats.jsonl" if first else None
    lines = (path, config.images, trainer.images_seen, config.batch, config.status, progress)
    with Interrupt() as interrupt, Stats(*lines) as told:
        while trainer.images_seen < config.images:
            before = trainer.images_seen
            told.add(trainer.step(), trainer.images_seen, trainer.learning_rate(before))
            (asked,) = ranks.together(interrupt.asked)  # all stop after the same step
            if asked or trainer.images_seen // config.snapshot > before // config.snapshot:
                save()
            if asked:
                raise KeyboardInterrupt
    save()
    if first:
        trainer.save_checkpoint(config.out / "checkpoint")
    ranks.together(0)  # nobody returns before it is there
