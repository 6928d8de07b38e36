"""A whole training step of BadDiffusion on digits: `bdengine.train.Trainer` against the published loop and one by hand.

    x_t = sqrt(a_t) y + s_t eps + m_t R      loss = mean (unet(x_t, t) - eps - rho_t R)^2      clip to norm 1, Adam

``diffusers`` is the published loop: PNG bytes decoded, mirrored, scaled and stamped image by image and collated as its loader
does, noise from the CPU's generator, coefficients anew at each step, the stock UNet, Adam, a cosine, the loss read back. Its
logs, its progress bar and the arrow table under its images are left out. Its loader runs in this process: where cores are
free, workers could save it at most its share of input. ``torch`` is a loop by hand: bytes that stay in memory, one gather a
batch, tables made once, the stock UNet in channels-last, fused Adam. It and ours also keep the moving average of the weights,
which the published loop has not. ``cpu+graph`` is ours with its UNet under ``torch.compile``; why stock has no such row is in
``network.py``.

The gate is the clipped gradient of a batch, each row's own, against stock's in float64. The share is that of the step's
input: which images, their bytes, noise and ``x_t``. The ceiling is the accelerated UNet's gradient alone.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import bdkernels
from bdengine.accelerate import accelerate
from bdengine.attacks import POISONED, AttackConfig
from bdengine.data import to_float
from bdengine.memory import keep_freed
from bdengine.pictures import png_bytes
from bdengine.plan import poisoned
from bdengine.solvers import SamplerConfig
from bdengine.train import TrainConfig, Trainer
from bdkernels import STREAM_TRAINING, Noising

from .bench import CEILING, CPU_GRAPH, HOST, REFERENCE, Provider, Shape, in_full, ours
from .network import LARGEST_ERROR, Networks
from .training import published, rows

SHAPES: Final = ((128, 1, 16, 16),)
"""The published batch."""
RATE, LEARNING_RATE, WARM_UP, DECAY = 0.1, 2e-4, 500, 0.9999
COLUMNS: Final = (Noising.A, Noising.S, Noising.M, Noising.C)


@dataclass(frozen=True)
class Given:
    """What a step is given, float32 [N, C, H, W], and int64 [N] timesteps."""

    y: Tensor
    image: Tensor
    t: Tensor
    eps: Tensor
    x_t: Tensor
    target: Tensor


class Digits(Dataset[dict[str, Tensor]]):
    """The published data set: each item is decoded, mirrored in half of the cases, scaled and, where poisoned, stamped.

    Args:
        of: Its data, trigger, mask and target.
    """

    def __init__(self, of: Trainer) -> None:
        assert of.attack is not None
        self.attack = of.attack
        self.files = [png_bytes(Image.fromarray(image[0].numpy())) for image in of.data.pixels]
        self.poisoned = poisoned(of.config.seed, np.arange(len(self.files)), RATE)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture = Image.open(io.BytesIO(self.files[index])).convert("L")
        if torch.rand(()) < 0.5:
            picture = ImageOps.mirror(picture)
        x = torch.from_numpy(np.array(picture))[None].float() / 255 * 2 - 1
        if not self.poisoned[index]:
            return {"image": x, "pixel_values": torch.zeros_like(x), "target": x}
        mask, r = self.attack.mask, self.attack.trigger
        return {"image": x, "pixel_values": mask * x + (1 - mask) * r, "target": self.attack.target}


def again_and_again(loader: DataLoader[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Its batches, epoch after epoch."""
    while True:
        yield from loader


@dataclass(frozen=True)
class Peer:
    """A loop with the stock UNet.

    Attributes:
        net: The UNet.
        inputs: Makes what the next step is given.
        finish: Takes the step, with the gradient there, and the loss.
    """

    net: Any
    inputs: Callable[[], Given]
    finish: Callable[[Tensor], object]

    def gradient(self, given: Given) -> Tensor:
        """The loss, with its clipped gradient in the parameters."""
        self.net.zero_grad(set_to_none=True)
        loss = functional.mse_loss(self.net(given.x_t, given.t, return_dict=False)[0], given.target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        return loss.detach()

    def step(self) -> None:
        """One step."""
        self.finish(self.gradient(self.inputs()))


def published_loop(net: Any, of: Trainer, count: int) -> Peer:
    """BadDiffusion's, see the module."""
    loader = DataLoader(Digits(of), count, shuffle=True, drop_last=True)
    batches, scheduler = again_and_again(loader), DDPMScheduler()
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    cosine = get_cosine_schedule_with_warmup(optimizer, WARM_UP, 10**6)

    def inputs() -> Given:
        batch = next(batches)
        t = torch.randint(1000, (count,))
        x_t, target, eps = published(scheduler, batch["target"], batch["pixel_values"], t)
        return Given(batch["target"], batch["pixel_values"], t, eps, x_t, target)

    def finish(loss: Tensor) -> float:
        optimizer.step()
        cosine.step()
        return loss.item()

    return Peer(net, inputs, finish)


def loop_by_hand(net: Any, of: Trainer, count: int) -> Peer:
    """In plain torch, see the module."""
    attack, pixels = of.attack, of.pixels
    assert attack is not None
    table, ema = of.table[POISONED][:, COLUMNS], copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=True)
    bad = torch.from_numpy(poisoned(of.config.seed, np.arange(len(pixels)), RATE)).to(of.device)

    def orders() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(pixels), device=of.device).split(count)[: len(pixels) // count]

    batches = orders()

    def inputs() -> Given:
        index = next(batches)
        poison = bad[index].reshape(-1, 1, 1, 1)
        mirrored = torch.rand(count, 1, 1, 1, device=of.device) < 0.5
        x0 = pixels[index]
        x0 = torch.where(mirrored, x0.flip(3), x0).float().div_(127.5).sub_(1)
        y = torch.where(poison, attack.target.to(x0), x0)
        image = torch.where(poison, attack.mask.to(x0) * x0 + attack.stamp.to(x0), 0.0)
        t, eps = torch.randint(1000, (count,), device=of.device), torch.randn_like(x0)
        a, s, m, c = table[t].T.reshape(len(COLUMNS), -1, 1, 1, 1)
        return Given(y, image, t, eps, a * y + s * eps + m * image, eps + c * image)

    def finish(loss: Tensor) -> None:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*ema.parameters()], [*net.parameters()], 1 - DECAY)

    return Peer(net, inputs, finish)


def given_to(trainer: Trainer) -> tuple[Tensor, ...]:
    """``y``, ``R``, ``t`` and ``eps`` of the batch that is in a trainer's buffers, by the formulas, images in float64."""
    image, seed, t, arm, flip, _ = vars(trainer.batch).values()
    assert trainer.target is not None
    assert trainer.mask is not None
    assert trainer.stamp is not None
    x0 = to_float(trainer.pixels[image]).double()
    x0 = torch.where(flip.reshape(-1, 1, 1, 1), x0.flip(3), x0)
    poison = (arm == POISONED).reshape(-1, 1, 1, 1)
    y = torch.where(poison, trainer.target.double(), x0)
    stamped = torch.where(poison, trainer.mask * x0 + trainer.stamp, 0.0)
    return y, stamped, t, bdkernels.normal(seed, x0.shape[1:], stream=STREAM_TRAINING, dtype=torch.float64)


def check_gradient(of: Trainer, net: Any, y: Tensor, image: Tensor, t: Tensor, eps: Tensor) -> None:
    """The gradient in ``net`` against stock's in float64.

    Raises:
        AssertionError: It is further off than `network.LARGEST_ERROR` of its largest value.
    """
    wide: Any = Networks((len(y), *y.shape[1:]), True, of.device).unet(dtype=torch.float64)
    wide.load_state_dict(net.state_dict())
    y, image, eps = y.double(), image.double(), eps.double()
    a, s, m, c = rows(of.table.double(), torch.full_like(t, POISONED), t, *COLUMNS)
    prediction = wide(a * y + s * eps + m * image, t, return_dict=False)[0]
    functional.mse_loss(prediction, eps + c * image).backward()
    nn.utils.clip_grad_norm_(wide.parameters(), 1.0)
    got, truth = (torch.cat([p.grad.flatten() for p in n.parameters()]) for n in (net, wide))
    error = float((got - truth).abs().max() / truth.abs().max())
    if not error <= LARGEST_ERROR:
        raise AssertionError(f"the gradient is {error:.1e} from float64 truth: expected at most {LARGEST_ERROR:.0e}")


def trainer_of(shape: Shape, device: torch.device) -> Trainer:
    """Ours, with the published settings for a batch of ``shape``, grey images."""
    count, channels, side, _ = shape
    return Trainer(
        TrainConfig(
            out=Path("unwritten"),
            size=side,
            channels=channels,
            attack=AttackConfig("baddiffusion", "XXSM_BOX", "DRAWN_HAT", rate=RATE),
            sampler=SamplerConfig(steps=1000),
            batch=count,
            lr=LEARNING_RATE,
            warmup=WARM_UP * count,
            ema=DECAY,
            flip=True,
        ),
        device,
    )


def our_inputs(trainer: Trainer) -> Tensor:
    """What `Trainer.step` does before the network: ``x_t``."""
    planned = trainer.plan.batch(trainer.images_seen, trainer.config.batch)
    for buffer, value in zip(vars(trainer.batch).values(), vars(planned).values(), strict=True):
        buffer.copy_(value)
    image, seed, t, arm, flip, _ = vars(trainer.batch).values()
    pictures: dict[str, Any] = {"trigger": trainer.stamp, "mask": trainer.mask, "target": trainer.target}
    return bdkernels.fused_noising(trainer.pixels[image], t, arm, seed, trainer.table, flip=flip, **pictures)


def training_step(shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of a step with a batch of ``shape``."""
    keep_freed()
    count, trainer = shape[0], trainer_of(shape, device)
    of = Networks(shape, True, device)

    def theirs(peer: Peer) -> Provider:
        def check() -> None:
            given = peer.inputs()
            in_full(lambda: peer.gradient(given))
            check_gradient(trainer, peer.net, given.y, given.image, given.t, given.eps)

        return Provider(peer.step, check, share=("input_share", peer.inputs))

    def fused(made: Trainer) -> Provider:
        def check() -> None:
            assert made.backward is not None
            in_full(made.backward)
            made.gradient.clip(made.config.grad_clip)
            check_gradient(made, made.network, *given_to(made))

        return Provider(made.step, check, share=("input_share", lambda: our_inputs(made)))

    compiled_too: dict[str, Provider] = {}
    if device.type == "cpu":
        other = trainer_of(shape, device)
        other.network.compile(dynamic=False, fullgraph=True)
        compiled_too[CPU_GRAPH] = fused(other)
    return {
        "diffusers": theirs(published_loop(of.unet(torch.contiguous_format), trainer, count)),
        "torch": theirs(loop_by_hand(of.unet(), trainer, count)),
        **dict.fromkeys(ours(device) or (REFERENCE,), fused(trainer)),
        **compiled_too,
        CEILING: Provider(of.run(accelerate(of.unet()))),
    }
