"""Diff-Cleanse's removal (arXiv 2407.21316): the channels that serve the trigger are cut, and the network is repaired.

    I(r)    = sum over a channel's parameters p of | p dL(r)/dp |                                 first order, Taylor
    L(r)    = sum over t in [0.9 T, T) of mean | eps_theta(sqrt(alpha_bar_t) x0 + s_t (eps + r), t) - eps |^2
    cut       the share of channels where  I(r) - I(0)  is greatest;  then train on a tenth of the clean data

``L`` is a probe, of no attack's marginal; of its timesteps every T/100th is taken here. A channel is one between the two
convolutions of a residual block: its row of the first, of the time's projection and of the norm, and its column of the second.
The paper takes whole groups of coupled channels out, which needs another library; here they are set to 0 and held there, so
that the checkpoint keeps its shape. What differs is the norm, in whose groups they count.
Where the data is not at hand, `TrainConfig.data` can be a folder of the model's own samples, as the paper's "-syn".

Of digits-badiffusion with its trigger, no triggered image is at the target once channels are cut, and clean ones are broken.
Repaired at 5e-4 in batches of 32, the published 2 % (9 of 464 channels) let the backdoor come and go: 3, 63, 6 and 63 % of
triggered images are at the target after 320, 640, 1,600 and 3,200 images. With 10 % none is after 320 to 1,280.

baddiffusion    2 % of the channels, then 10,000 steps at a constant learning rate of 1e-4
short           10 % and 400 steps at 5e-4, not published: as long as the other removals here
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

import bdkernels

from ..attacks import AttackConfig
from ..errors import UserError
from ..networks import Network, split_spread
from ..schedule import Schedule
from ..train import TrainConfig
from .removal import FineTuning
from .subject import run_seeds

PARTS: Final = (("conv1", 0), ("time_emb_proj", 0), ("norm2", 0), ("conv2", 1))
"""Modules of a residual block that a channel goes through, and the dimension of their weights that it is."""


@dataclass(frozen=True)
class PruningConfig:
    """How much is cut and how it is repaired; see the module."""

    ratio: float = 0.02
    """Share of the channels."""
    steps: int = 10_000
    """Of the repair."""
    lr: float = 1e-4
    """Of the repair."""
    share: float = 0.1
    """Of the data set's images."""


VARIANTS: Final = {"baddiffusion": PruningConfig(), "short": PruningConfig(ratio=0.1, steps=400, lr=5e-4)}
"""Of digits-badiffusion the short one's ASR is 0 after 40, 200 and 400 steps, its Fréchet distance 10.6, 1.4 and 1.0."""


def recipe(config: TrainConfig, published: PruningConfig) -> TrainConfig:
    """``config`` with a published length and learning rate, and no attack."""
    images, attack = published.steps * config.batch, AttackConfig()
    return replace(config, attack=attack, images=images, lr=published.lr, schedule="constant", warmup=0)


def blocks(network: nn.Module) -> dict[str, Any]:
    """The residual blocks by name.

    Raises:
        UserError: None, or one that scales its channels by the time.
    """
    names = {part for part, _ in PARTS}
    found = {n: m for n, m in network.named_modules() if names <= {child for child, _ in m.named_children()}}
    if not found:
        raise UserError("the network has no residual blocks: expected some, whose channels are pruned")
    for name, block in found.items():
        rows, channels = block.time_emb_proj.out_features, block.conv1.out_channels
        if rows != channels:
            raise UserError(
                f"{name} has {rows} values of the time for {channels} channels: expected one each, added and not scaled"
            )
    return found


def importance(network: Network, process: Schedule, images: Tensor, trigger: Tensor, seed: int = 0) -> Tensor:
    """``I(r)`` of every channel, block after block, float32 [channels]; the trigger is 0 for ``I(0)``.

    Args:
        images: Clean ones, float32 [N, C, H, W]; all of them at each tenth of the timesteps.
        trigger: float32 [C, H, W].
    """
    network.requires_grad_(True).zero_grad()
    device, count = images.device, len(images)
    times = torch.arange(process.T - process.T // 10, process.T, max(process.T // 100, 1), device=device)
    for k, t in enumerate(times):
        a, s = process.alpha_bar[int(t)] ** 0.5, process.s[int(t)]
        eps = bdkernels.normal(run_seeds(seed, count, device, k * count), images.shape[1:])
        out, _ = split_spread(network(a * images + s * (eps + trigger), t), images.shape[1])
        (out - eps).square().mean().backward()
    found = [
        torch.stack([_taylor(getattr(block, part), dim) for part, dim in PARTS]).sum(0)
        for block in blocks(network).values()
    ]
    network.zero_grad()
    return torch.cat(found)


def _taylor(module: nn.Module, dim: int) -> Tensor:
    """``sum |p dL/dp|`` over each channel of ``dim`` of the weight; its bias counts where that is the rows."""
    weight = _product(module.get_parameter("weight"))
    total = weight.movedim(dim, 0).reshape(weight.shape[dim], -1).sum(1)
    return total + _product(module.get_parameter("bias")) if dim == 0 else total


def _product(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else (p.detach() * p.grad).abs()


@torch.no_grad()
def cut(network: nn.Module, chosen: Tensor) -> None:
    """Set the ``chosen`` channels, bool [channels], to 0."""
    at = 0
    for block in blocks(network).values():
        here = chosen[at : (at := at + block.conv1.out_channels)]
        for part, dim in PARTS:
            for p in getattr(block, part).parameters():
                if dim == 0:
                    p[here] = 0
                elif p.dim() > 1:
                    p[:, here] = 0


class Cleanse(FineTuning):
    """Prunes the network of ``config.init`` and repairs it; cut channels stay 0.

    Args:
        trigger: The inverted one, float32 [C, H, W].
        ratio: Share of the channels that is cut, above 0 and below 1.

    Attributes:
        chosen: bool [channels], those cut.

    Raises:
        UserError: As `FineTuning`, a trigger of another shape, a ratio out of range, or a network without residual blocks.
    """

    PROBED: Final = 64
    """Images that the importances are measured on."""

    def __init__(
        self,
        config: TrainConfig,
        trigger: Tensor,
        ratio: float = 0.02,
        share: float = 0.1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(config, trigger, share, device)
        if not 0 < ratio < 1:
            raise UserError(f"the ratio of pruned channels is {ratio:g}: expected above 0 and below 1")
        images = self.pixels[: self.PROBED].float() / 127.5 - 1
        with_trigger, without = (
            importance(self.network, self.schedule, images, one, config.seed)
            for one in (self.trigger, 0 * self.trigger)
        )
        excess = with_trigger - without
        self.chosen = torch.zeros(len(excess), dtype=torch.bool, device=self.device)
        self.chosen[excess.topk(max(round(ratio * len(excess)), 1)).indices] = True
        for network in (self.network, self.ema):
            cut(network, self.chosen)

    def step(self) -> Tensor:
        """One optimizer step, after which the channels are 0 again; the batch's mean loss."""
        loss = super().step()
        for network in (self.network, self.ema):
            cut(network, self.chosen)
        return loss
