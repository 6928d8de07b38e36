"""An iteration of PureDiffusion's inversion: the gradient in ``tau`` of ten sampler steps, ours and by hand.

    x_T = eps_b + tau      ten times:  m = unet(x, t),  x = p x + s m + z noise
    loss = mean over t of mean | mean_b m - lambda_t tau |  +  mean var_b x_0

``diffusers`` is that loop in plain torch on the UNet as `from_pretrained` leaves it, so that each iteration makes gradients of
all weights as well; ``torch`` is the same loop on frozen weights in channels-last. Ours is `purediffusion.Objective` on the
accelerated UNet, its weights frozen. The gate is the gradient against the plain loop's in float64, with our noise. The share is
that of the loop with a network that returns its input times a number in place of the UNet: steps, noise, loss and their
gradients. The ceiling is the accelerated UNet alone, ten times forward and back to its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

import bdkernels
from bdengine.accelerate import accelerate
from bdengine.defenses import Subject
from bdengine.defenses.purediffusion import Objective, PureDiffusionConfig
from bdengine.defenses.subject import run_seeds
from bdengine.memory import keep_freed
from bdengine.networks import Network
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig
from bdkernels import STREAM_STEP, Step

from .bench import CEILING, HOST, REFERENCE, Provider, Shape, in_full, ours
from .network import LARGEST_ERROR, Form, Networks

SHAPES: Final = ((16, 1, 16, 16),)
"""The noises of an iteration."""
CONFIG: Final = PureDiffusionConfig("exact")
SAMPLER: Final = SamplerConfig("ddpm", 20)
Draw = Callable[[int], Tensor]


class Scaled(nn.Module):
    """In place of a UNet: its input times a number."""

    factor: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.9, device=device))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As `Network.forward`."""
        return self.factor * x


def by_hand(objective: Objective, net: Form, tau: Tensor, draw: Draw) -> Tensor:
    """The loss in plain torch; ``draw`` makes the noise of the start, -1, and of each step."""
    rows, x, means = objective.chain.rows[0].to(tau.dtype), draw(-1) + tau, []
    for row, t, step in zip(rows, objective.chain.times, range(len(rows)), strict=True):
        m = net(x, t)
        means.append(m.mean(0))
        x = row[Step.P] * x + row[Step.S] * m + row[Step.Z] * draw(step)
    shift = (torch.stack(means) - objective.scale[:, None, None, None] * tau).abs().mean()
    return shift + CONFIG.weight * x.var(0).mean()


def our_draw(shape: Shape, like: Tensor) -> Draw:
    """The noise that ours has in its first iteration."""
    seeds = run_seeds(CONFIG.seed, shape[0], like.device)

    def draw(step: int) -> Tensor:
        told: dict[str, Any] = {} if step < 0 else {"step": step, "stream": STREAM_STEP}
        return bdkernels.normal(seeds, shape[1:], **told).to(like.dtype)

    return draw


def iteration(shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of an iteration with ``shape[0]`` noises."""
    keep_freed()
    of, process = Networks(shape, False, device), linear()
    config = PureDiffusionConfig("exact", batch=shape[0])
    tau = torch.full((1, *shape[1:]), -0.5, device=device).requires_grad_()

    def objective_of(net: nn.Module) -> Objective:
        network = Network(net, shape[1:]).eval().requires_grad_(False)
        return Objective(Subject(network, process, SAMPLER.table(process)), config)

    fast = objective_of(accelerate(of.unet()))
    frozen, usual = of.unet().requires_grad_(False), of.unet(torch.contiguous_format)
    wide = of.unet(dtype=torch.float64).requires_grad_(False)

    def gradient(loss: Callable[[Tensor], Tensor], at: Tensor = tau) -> Tensor:
        (found,) = torch.autograd.grad(loss(at), at)
        return found

    def hand(net: Any, draw: Draw) -> Callable[[Tensor], Tensor]:
        return lambda at: by_hand(fast, lambda x, t: net(x, t, return_dict=False)[0], at, draw)

    wide_tau = tau.detach().double().requires_grad_()
    truth = gradient(hand(wide, our_draw(shape, wide_tau)), wide_tau)

    def check(loss: Callable[[Tensor], Tensor]) -> None:
        error = float((in_full(lambda: gradient(loss)) - truth).abs().max() / truth.abs().max())
        if not error <= LARGEST_ERROR:
            raise AssertionError(
                f"the gradient is {error:.1e} from float64 truth: expected at most {LARGEST_ERROR:.0e}"
            )

    scaled = Scaled(device)

    def drawn(_: int) -> Tensor:
        return torch.randn(shape, device=device)

    def theirs(net: Any) -> Provider:
        checked, timed = hand(net, our_draw(shape, tau)), hand(net, drawn)

        def run() -> None:
            net.zero_grad(set_to_none=True)
            tau.grad = None
            timed(tau).backward()

        def share() -> Tensor:
            return gradient(lambda at: by_hand(fast, scaled, at, drawn))

        return Provider(run, lambda: check(checked), share=("step_share", share))

    def loss(objective: Objective, at: Tensor) -> Tensor:
        shift, consistency = objective(at, 0)
        return shift + config.weight * consistency

    def alone(t: Tensor, at: Tensor) -> Tensor:
        return fast.subject.eps(at.expand(shape), t).square().mean()

    def ceiling() -> list[Tensor]:
        return [gradient(partial(alone, t)) for t in fast.chain.times]

    whole, free = partial(loss, fast), partial(loss, objective_of(scaled))
    fused = Provider(lambda: gradient(whole), lambda: check(whole), share=("step_share", lambda: gradient(free)))
    return {
        "diffusers": theirs(usual),
        "torch": theirs(frozen),
        **dict.fromkeys(ours(device) or (REFERENCE,), fused),
        CEILING: Provider(ceiling),
    }
