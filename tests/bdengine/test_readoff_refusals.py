"""What is not a table, or not one that can be clipped, is refused when it is read off, in a sentence that says why."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from bdengine.errors import UserError
from bdengine.solvers import Table
from bdkernels import Step

from .readoff_for_tests import Case, named

MIN = {"final_sigmas_type": "sigma_min"}


class OfNorms(diffusers.DDIMScheduler):
    """Langevin steps of a length set by norms, as the corrector of `ScoreSdeVeScheduler` takes them."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        corrector = named("ScoreSdeVeScheduler")()
        corrector.set_timesteps(10)
        corrector.timesteps = torch.ones(10)
        return corrector.step_correct(model_output, sample)


class OfManyOutputs(diffusers.DDIMScheduler):
    """The sum of the last six network outputs."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        self.seen = [*getattr(self, "seen", []), model_output][-6:]
        return types.SimpleNamespace(prev_sample=sample + sum((i + 1.0) ** 2 * m for i, m in enumerate(self.seen)))


class OfTwoNoises(diffusers.DDIMScheduler):
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        return types.SimpleNamespace(prev_sample=sample + torch.randn_like(sample) + torch.randn(sample.shape))


class OfHiddenNoise(diffusers.DDIMScheduler):
    """Noise that is added one step after it is drawn."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        drawn, self.drawn = getattr(self, "drawn", 0 * sample), torch.randn_like(sample)
        return types.SimpleNamespace(prev_sample=sample + model_output + drawn)


def made(kind: Any) -> Any:
    scheduler = kind()
    scheduler.set_timesteps(10)
    return scheduler


def stepped() -> Any:
    scheduler = Case("HeunDiscreteScheduler").make(10)
    x = torch.zeros(1, 1, 2, 2)
    scheduler.step(x, scheduler.timesteps[0], scheduler.scale_model_input(x, scheduler.timesteps[0]))
    return scheduler


def unset(name: str) -> Any:
    return named(name)()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(OfNorms), "OfNorms is not linear in its samples, outputs and noise"),
        (lambda: made(OfManyOutputs), "OfManyOutputs, at row ., reads 5 earlier tensors, 1 of them new"),
        (lambda: made(OfTwoNoises), "OfTwoNoises draws noise twice in a step"),
        (lambda: made(OfHiddenNoise), "OfHiddenNoise, at row 0, hides noise that a later row reads"),
        (lambda: Case("DDPMScheduler", {"thresholding": True}).make(10), "DDPMScheduler thresholds x0 by a quantile"),
        (lambda: Case("DPMSolverMultistepScheduler", {"thresholding": True}).make(10), "thresholds x0 by a quantile"),
        (
            lambda: Case("HeunDiscreteScheduler", {"clip_sample": True}).make(10),
            "clips as a row cannot: switch its clip",
        ),
        (lambda: Case("DiscreteDDIMScheduler").make(10), "DiscreteDDIMScheduler is not linear"),
        (lambda: Case("DDPMWuerstchenScheduler").make(10), "DDPMWuerstchenScheduler cannot be stepped at row 0"),
        (
            lambda: unset("RePaintScheduler"),
            "RePaintScheduler.step needs .*original_image, mask: expected model_output",
        ),
        (lambda: unset("ScoreSdeVeScheduler"), "ScoreSdeVeScheduler has no step"),
        (lambda: unset("DDIMScheduler"), "DDIMScheduler has no timesteps: call its set_timesteps first"),
        (stepped, "HeunDiscreteScheduler has been stepped: call its set_timesteps again first"),
        # Stock faults: the last step of bh1 divides by a step of infinite length; there is no third order of these.
        (lambda: Case("UniPCMultistepScheduler", {"solver_type": "bh1"}).make(10), "is not finite at row 9 of 10"),
        (
            lambda: Case(
                "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", "solver_order": 3, **MIN}
            ).make(10),
            "cannot be stepped at row 2: cannot access local variable",
        ),
        (
            lambda: Case(
                "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
            ).make(10),
            "cannot be stepped at row 2: cannot access local variable",
        ),
    ],
)
def test_what_a_row_cannot_do_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Table.from_diffusers(make())


def test_the_corrector_of_score_sde_is_refused() -> None:
    with pytest.raises(
        UserError, match="step_correct needs model_output, sample: expected model_output, timestep, sample"
    ):
        Table.from_diffusers(Case("ScoreSdeVeScheduler").make(10), method="step_correct")


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DEISMultistepScheduler", "PNDMScheduler"])
def test_x0_of_a_table_that_has_none_is_not_clipped(name: str) -> None:
    table = Table.from_diffusers(Case(name).make(10))
    with pytest.raises(UserError, match=f"{name}-.* has no x0 in its rows: expected one of bdengine's own samplers"):
        table.clipped("x0")
    seen = np.append(table.rows[1:, Step.IN], 1.0)  # by the network, of what a row makes
    np.testing.assert_allclose(table.clipped("latent").rows[:, Step.HIGH] * seen, 1, rtol=1e-15)
    assert (table.clipped("none").rows == table.rows).all()
    with_x0 = Table.from_diffusers(Case("DDIMScheduler", {"clip_sample": False}).make(10))
    assert (with_x0.clipped("x0").rows[:, Step.HIGH0] == 1).all()
