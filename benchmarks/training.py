"""`bdkernels.fused_noising` and `fused_loss` on a BadDiffusion batch, half of it poisoned.

    R = M x0 + r      x_t = A y + M_t R + S eps      target = eps + C_t R      loss = mean (prediction - target)^2

Ours draws ``eps`` in the kernel, twice, and never stores it; the peers draw it once and keep it, so their noising
returns it. The published one also returns its target, and is given ``y`` and ``R`` ready-made, as its data loader is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional

import bdkernels
from bdengine.attacks.baddiffusion import baddiffusion
from bdengine.attacks.process import POISONED, noising_table
from bdengine.schedule import linear
from bdkernels import STREAM_TRAINING, Noising, reference, testing
from bdkernels.noise import normal

from .bench import (
    CEILING,
    HOST,
    REFERENCE,
    Provider,
    Shape,
    assert_close,
    assert_standard_normal,
    checked,
    compiled,
    moved,
    ours,
    seeds_of,
)


@dataclass(frozen=True)
class Batch:
    """One training batch of ``shape`` with a white square in the corner as its trigger."""

    shape: Shape
    device: torch.device

    @cached_property
    def on_host(self) -> dict[str, Any]:
        """What noising and loss have in common, by name, on the CPU."""
        count, channels, height, width = self.shape
        generator = torch.Generator().manual_seed(0)
        trigger = torch.full((channels, height, width), -1.0)
        trigger[:, -(height // 2 or 1) :, -(width // 2 or 1) :] = 1
        attack = baddiffusion(linear(), trigger, torch.randn(trigger.shape, generator=generator).clamp(-1, 1))
        return {
            "x0": torch.rand(self.shape, generator=generator) * 2 - 1,
            "t": torch.randint(1000, (count,), generator=generator),
            "arm": (torch.rand(count, generator=generator) < 0.5).long() * POISONED,
            "seeds": seeds_of(count),
            "table": noising_table(linear(), attack),
            "target": attack.target[None],
            "trigger": attack.stamp[None],
            "mask": attack.mask[None],
        }

    @cached_property
    def case(self) -> dict[str, Any]:
        """The same on the device."""
        return moved(self.on_host, self.device)

    @cached_property
    def eps(self) -> Tensor:
        """The noise of the contract, float32."""
        eps = normal(self.on_host["seeds"].numpy(), self.shape[1:], 0, STREAM_TRAINING)
        return torch.from_numpy(eps).to(self.device)

    @cached_property
    def wide(self) -> dict[str, Any]:
        """`case` in float64."""
        return {name: v.double() if v.is_floating_point() else v for name, v in self.case.items()}


def rows(table: Tensor, arm: Tensor, t: Tensor, *columns: Noising) -> tuple[Tensor, ...]:
    """Each sample's coefficients, [N, 1, 1, 1] a column."""
    row = table[arm, t]
    return tuple(row[:, column].reshape(-1, 1, 1, 1) for column in columns)


def noised(
    eps: Tensor, x0: Tensor, t: Tensor, arm: Tensor, table: Tensor, target: Tensor, trigger: Tensor, mask: Tensor
) -> Tensor:
    """``x_t`` by the formula."""
    a, shift, s = rows(table, arm, t, Noising.A, Noising.M, Noising.S)
    y = torch.where((arm > 0).reshape(-1, 1, 1, 1), target, x0)
    return a * y + shift * (mask * x0 + trigger) + s * eps


def noised_and_eps(x0: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """`noised` with its own noise, which its loss will need."""
    eps = torch.randn_like(x0)
    return noised(eps, x0, *rest), eps


def regression_target(
    eps: Tensor, x0: Tensor, t: Tensor, arm: Tensor, table: Tensor, trigger: Tensor, mask: Tensor
) -> Tensor:
    """``eps + C_t R`` by the formula."""
    (c,) = rows(table, arm, t, Noising.C)
    return eps + c * (mask * x0 + trigger)


def loss(prediction: Tensor, *rest: Tensor) -> Tensor:
    """Mean squared error against `regression_target`."""
    return functional.mse_loss(prediction, regression_target(*rest))


def published(scheduler: Any, y: Tensor, image: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x_t``, target and ``eps`` as BadDiffusion's released code makes them: coefficients anew at each call."""
    eps = torch.randn_like(y)
    alpha, alpha_bar = (v.to(t.device) for v in (scheduler.alphas, scheduler.alphas_cumprod))
    shift = 1 - alpha_bar[t] ** 0.5
    rho = ((1 - alpha**0.5) * (1 - alpha_bar) ** 0.5 / (1 - alpha))[t]
    x_t = scheduler.add_noise(y, eps, t) + shift.reshape(-1, 1, 1, 1) * image
    return x_t, eps + rho.reshape(-1, 1, 1, 1) * image, eps


def fused_noising_bytes(shape: Shape) -> int:
    """Of ``x0``, read, and ``x_t``, written; of the target, trigger and mask that all samples share."""
    return 2 * 4 * math.prod(shape) + 3 * 4 * math.prod(shape[1:])


def fused_noising(shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of `bdkernels.fused_noising` at ``shape``."""
    batch = Batch(shape, device)
    case, wide = batch.case, batch.wide
    names = ("x0", "t", "arm", "table", "target", "trigger", "mask")
    inputs, truth_inputs = ([source[name] for name in names] for source in (case, wide))
    target_inputs = [wide[name] for name in ("x0", "t", "arm", "table", "trigger", "mask")]
    absent = dict.fromkeys(("flip", "region", "arm_inside"))
    full, full_on_host = (source | absent | {"dtype": torch.float32} for source in (case, batch.on_host))
    poisoned = (case["arm"] > 0).reshape(-1, 1, 1, 1)
    y = torch.where(poisoned, case["target"], case["x0"])
    image = torch.where(poisoned, case["mask"] * case["x0"] + case["trigger"], 0.0)
    scheduler = DDPMScheduler()
    compiled_noising = compiled(noised_and_eps)
    out = torch.empty_like(y)

    def check(x_t: Tensor, eps: Tensor) -> None:
        assert_standard_normal("eps", eps)
        assert_close("x_t", x_t, noised(eps.double(), *truth_inputs))

    def check_published(x_t: Tensor, target: Tensor, eps: Tensor) -> None:
        check(x_t, eps)
        assert_close("target", target, regression_target(eps.double(), *target_inputs))

    return {
        "diffusers": checked(lambda: published(scheduler, y, image, case["t"]), check_published),
        "torch": checked(lambda: noised_and_eps(*inputs), check),
        "compile": checked(lambda: compiled_noising(*inputs), check),
        **dict.fromkeys(
            ours(device),
            Provider(
                lambda: bdkernels.fused_noising(**case),
                lambda: testing.assert_matches_reference("fused_noising", full_on_host, device.type),
            ),
        ),
        REFERENCE: Provider(
            lambda: reference.fused_noising(**full), lambda: check(reference.fused_noising(**full), batch.eps)
        ),
        CEILING: Provider(lambda: out.copy_(case["x0"])),
    }


def fused_loss_bytes(shape: Shape) -> int:
    """Of the prediction and ``x0``, read, and the gradient, written; of the trigger and mask that all samples share."""
    return 3 * 4 * math.prod(shape) + 2 * 4 * math.prod(shape[1:])


def fused_loss(shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of `bdkernels.fused_loss` at ``shape``: the value and the gradient in the prediction."""
    batch = Batch(shape, device)
    case = {name: value for name, value in batch.case.items() if name != "target"}
    names = ("x0", "t", "arm", "table", "trigger", "mask")
    inputs = [batch.eps, *(case[name] for name in names)]
    on_host = {
        "prediction": torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        **{name: value for name, value in batch.on_host.items() if name != "target"},
        **dict.fromkeys(("flip", "region", "arm_inside")),
        "scale": 1 / math.prod(shape),
    }
    full = moved(on_host, device)
    prediction = full["prediction"].clone().requires_grad_()
    compiled_loss = compiled(loss)
    out = torch.empty(shape, device=device)

    def with_gradient(value: Tensor) -> tuple[Tensor, Tensor]:
        return value, torch.autograd.grad(value, prediction)[0]

    def check(value: Tensor, gradient: Tensor) -> None:
        truth = regression_target(batch.eps.double(), *(batch.wide[name] for name in names))
        difference = prediction.detach().double() - truth
        assert_close("loss", value.detach(), difference.square().mean())
        assert_close("gradient", gradient * difference.numel(), 2 * difference)

    def fused() -> tuple[Tensor, Tensor]:
        return with_gradient(bdkernels.fused_loss(prediction, **case).sum())

    def check_ours() -> None:
        testing.assert_matches_reference("fused_loss", on_host, device.type)
        check(*fused())

    def check_reference(value: Tensor, gradient: Tensor) -> None:
        check(value.sum(), gradient)

    return {
        "torch": checked(lambda: with_gradient(loss(prediction, *inputs)), check),
        "compile": checked(lambda: with_gradient(compiled_loss(prediction, *inputs)), check),
        **dict.fromkeys(ours(device), Provider(fused, check_ours)),
        REFERENCE: checked(lambda: reference.fused_loss(**full), check_reference),
        CEILING: Provider(lambda: torch.add(full["prediction"], case["x0"], out=out)),
    }
