"""Tables read off stock schedulers, against the schedulers' own loops with the same injected noise."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import bdkernels
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig, Table, stack
from bdkernels import HISTORY_SLOTS, STORE_COLUMNS, STORES, Step

from .readoff_for_tests import Case, named

SHAPE = (1, 4, 4)
SEEDS = torch.tensor([5, 6])
STEPS = (10, 20, 50)
MIN = {"final_sigmas_type": "sigma_min"}
# They cast the sample to float32 within a step, so that they can be read to 1e-7 a step and agree with themselves no better.
CASTING = (
    "DPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)

UNREAD = {
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "CogVideoXDDIMScheduler": "video",
    "CogVideoXDPMScheduler": "video; its step takes an earlier prediction",
    "ConsistencyDecoderScheduler": "two steps, decodes latents",
    "DDPMWuerstchenScheduler": "its time is one number a sample",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "FlowMapEulerDiscreteScheduler": "its network takes two times",
    "HeliosDMDScheduler": "video",
    "HeliosScheduler": "video",
    "KarrasVeScheduler": "noise before the evaluation, in another method; its step takes two sigmas",
    "LTXEulerAncestralRFScheduler": "video",
    "MiniMaxH3Scheduler": "video",
    "PiflowScheduler": "the network's output is a policy, not an image",
    "RFD4ProteinaScheduler": "proteins",
    "RePaintScheduler": "inpainting: its step takes an image and a mask",
    "SCMScheduler": "latents of text to image, two steps",
    "ScoreSdeVpScheduler": "its step_pred takes (score, x, t)",
    "VQDiffusionScheduler": "discrete tokens",
}


def dpm(name: str, *algorithms: str) -> list[Case]:
    return [
        Case(name, {"algorithm_type": a, "solver_order": order, **({} if a.endswith("++") else MIN)})
        for a in algorithms
        for order in (1, 2, 3)
        if not (a.startswith("sde") and order == 3 and "Multistep" in name and (a == "sde-dpmsolver" or "EDM" in name))
    ]


READ = [
    *(
        Case(f"DDIM{p}Scheduler", {"clip_sample": c}, {"eta": e})
        for p in ("", "Parallel")
        for c in (True, False)
        for e in (0.0, 0.5, 1.0)
    ),
    Case("DDIMScheduler", {"timestep_spacing": "trailing"}, {"eta": 0.5, "use_clipped_model_output": True}),
    Case(
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ),
    Case("DDIMScheduler", {"prediction_type": "sample", "clip_sample_range": 2.0}),
    *(
        Case(f"DDPM{p}Scheduler", {"clip_sample": c, "variance_type": v})
        for p in ("", "Parallel")
        for c in (True, False)
        for v in ("fixed_small", "fixed_large")
    ),
    *(Case("DEISMultistepScheduler", {"solver_order": order}) for order in (1, 2, 3)),
    *dpm("DPMSolverMultistepScheduler", "dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    *(
        Case("DPMSolverMultistepScheduler", {"algorithm_type": a, "solver_type": "heun", **MIN})
        for a in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
    ),
    *dpm("DPMSolverSinglestepScheduler", "dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
    *dpm("EDMDPMSolverMultistepScheduler", "dpmsolver++", "sde-dpmsolver++"),
    *(Case(f"{e}Scheduler", {}, {"s_churn": churn}) for e in ("EDMEuler", "EulerDiscrete") for churn in (0.0, 5.0)),
    Case("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}),
    Case("EulerAncestralDiscreteScheduler"),
    *(Case("HeunDiscreteScheduler", {"use_karras_sigmas": k}) for k in (False, True)),
    Case("KDPM2DiscreteScheduler"),
    Case("KDPM2AncestralDiscreteScheduler"),
    *(Case("LMSDiscreteScheduler", {}, {"order": order}) for order in (1, 2, 3, 4)),
    Case("IPNDMScheduler"),
    *(Case("PNDMScheduler", {"skip_prk_steps": skip}) for skip in (False, True)),
    *(
        Case("UniPCMultistepScheduler", {"solver_type": b, "solver_order": order, "predict_x0": x0, **MIN})
        for b in ("bh1", "bh2")
        for order in (1, 2, 3)
        for x0 in (True, False)
    ),
    Case("UniPCMultistepScheduler", {"solver_order": 3}),
    *(
        Case("SASolverScheduler", {"predictor_order": p, "corrector_order": c, "algorithm_type": a})
        for p, c in ((1, 1), (2, 2), (2, 3), (3, 2), (3, 3))
        for a in ("data_prediction", "noise_prediction")
    ),
    Case("TCDScheduler", {}, {"eta": 0.3}),
    *(Case("LCMScheduler", {"clip_sample": c}) for c in (False, True)),
    *(Case("UnCLIPScheduler", {"clip_sample": c}) for c in (False, True)),
    *(Case("CMStochasticIterativeScheduler", {"num_train_timesteps": 60, "clip_denoised": c}) for c in (False, True)),
    *(Case("DDIMInverseScheduler", {"clip_sample": c}) for c in (False, True)),
    # What it leaves is 200 times smaller than what it starts from.
    Case("DPMSolverMultistepInverseScheduler", single=1e-4),
    *(Case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": s}) for s in (False, True)),
    Case("FlowMatchHeunDiscreteScheduler"),
    Case("FlowMatchLCMScheduler"),
    Case("ScoreSdeVeScheduler", method="step_pred", wide=1348.0),
    Case("DPMSolverSDEScheduler", {"use_karras_sigmas": True}),
    *(Case("CosineDPMSolverMultistepScheduler", {"solver_order": order}) for order in (1, 2)),
]


class Brownian:
    """A Brownian path over decreasing sigma, of increments that ``noise`` hands over."""

    def __init__(self, noise: Callable[[], Tensor]) -> None:
        self.noise = noise
        self.sigmas: list[float] = []
        self.values: list[Tensor] = []

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        for sigma in (float(start), float(end)):
            if not self.sigmas:
                self.sigmas, self.values = [sigma], [torch.zeros(1, dtype=torch.float64)]
            elif sigma not in self.sigmas:
                step = self.noise() * (self.sigmas[-1] - sigma) ** 0.5
                self.sigmas, self.values = [*self.sigmas, sigma], [*self.values, self.values[-1] + step]
        first, last = (self.values[self.sigmas.index(float(s))] for s in (start, end))
        return (last - first) / (float(start) - float(end)) ** 0.5


@functools.cache
def noise_of(row: int) -> Tensor:
    return bdkernels.normal(SEEDS, SHAPE, step=row, stream=bdkernels.STREAM_STEP, dtype=torch.float64)


def stock(case: Case, scheduler: Any, x: Tensor) -> tuple[Tensor, int]:
    """The last sample of the scheduler's own loop, and how often it evaluated the network."""
    scheduler, row, evaluations = copy.deepcopy(scheduler), 0, 0
    module = sys.modules[type(scheduler).__module__]

    def noise(*_: object, **__: object) -> Tensor:
        return noise_of(row)

    with ExitStack() as patches:
        for name, stand_in in (("randn_tensor", noise), ("BrownianTreeNoiseSampler", lambda *_, **__: Brownian(noise))):
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, stand_in))
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            m = case.network(seen, float(t))
            x = getattr(scheduler, case.method)(m, t, x, **case.options).prev_sample
            row, evaluations = row + 1, evaluations + 1
    return x.double(), evaluations


def ours(case: Case, table: Table, x: Tensor) -> Tensor:
    rows, arm = stack([table], x.dtype), torch.zeros(2, dtype=torch.int64)
    x, history = x.clone(), x.new_zeros((HISTORY_SLOTS, *x.shape))
    for row, t in enumerate(table.timesteps):
        m = case.network(x * rows[0, row, Step.IN], float(t))
        bdkernels.fused_step_(x, m, rows, arm, torch.tensor(row), SEEDS, history=history)
    return x.double()


def start(table: Table) -> Tensor:
    return table.start * bdkernels.normal(SEEDS, SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("case", READ, ids=str)
def test_the_table_is_the_scheduler(case: Case) -> None:
    for steps in STEPS:
        scheduler = case.make(steps)
        table = Table.from_diffusers(scheduler, method=case.method, **case.options)
        x = start(table)
        expected, evaluations = stock(case, scheduler, x)
        assert len(table) == evaluations == len(scheduler.timesteps)
        assert np.array_equal(table.timesteps, [float(t) for t in scheduler.timesteps])
        double = (ours(case, table, x) - expected).norm() / expected.norm()
        single = (ours(case, table, x.float()) - expected).norm() / expected.norm()
        assert double <= (2e-6 if case.name in CASTING else 1e-10), (steps, double)
        assert single <= case.single, (steps, single)
        assert table.slots <= HISTORY_SLOTS
        kept = table.rows[:, [*range(Step.H, Step.STORE), *range(Step.STORE, Step.STORE + STORES * STORE_COLUMNS)]]
        assert np.abs(kept).max() <= 200, "a kept tensor is ill-conditioned"


def test_every_scheduler_is_read_or_has_a_reason() -> None:
    if not diffusers.__version__.startswith("0.42."):
        pytest.skip("the lists are of diffusers 0.42")
    names = {n for n in dir(diffusers.schedulers) if n.endswith("Scheduler") and not n.startswith("Flax")}
    assert names - {case.name for case in READ} == UNREAD.keys() & names


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_with_float64_betas_it_is_the_table_written_by_hand(name: str) -> None:
    """Stock schedulers keep their betas in float32; the reading is as exact as they are, and then as ours."""
    process = linear()
    scheduler = named(name)(clip_sample=False, timestep_spacing="trailing")
    scheduler.betas, scheduler.alphas = torch.tensor(process.betas), torch.tensor(1 - process.betas)
    scheduler.alphas_cumprod = torch.tensor(process.alpha_bar)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(20)
    read = Table.from_diffusers(scheduler)
    wanted = SamplerConfig(name.removesuffix("Scheduler").lower(), steps=20).table(process)
    case = Case(name)
    torch.testing.assert_close(ours(case, read, start(read)), ours(case, wanted, start(read)), rtol=1e-9, atol=1e-9)
    if name == "DDIMScheduler":
        wanted_clipped, read_clipped = (ours(case, t.clipped("x0"), start(read)) for t in (wanted, read))
        torch.testing.assert_close(read_clipped, wanted_clipped, rtol=1e-9, atol=1e-9)


def test_the_clip_of_a_scheduler_comes_along() -> None:
    for on, bounds in ((True, {(-2.0, 2.0)}), (False, {(-np.inf, np.inf)})):
        scheduler = named("DDPMScheduler")(clip_sample=on, clip_sample_range=2.0)
        scheduler.set_timesteps(10)
        rows = Table.from_diffusers(scheduler).rows
        assert set(zip(rows[:, Step.LOW0], rows[:, Step.HIGH0], strict=True)) == bounds
        assert (rows[:, Step.Q] > 0).all()


def test_a_thousand_steps() -> None:
    case = Case("DDPMScheduler")
    scheduler = case.make(1000)
    table = Table.from_diffusers(scheduler)
    expected, _ = stock(case, scheduler, start(table))
    assert len(table) == 1000
    torch.testing.assert_close(ours(case, table, start(table)), expected, rtol=1e-10, atol=1e-10)


def test_start_and_name_are_the_schedulers() -> None:
    euler = Case("EulerDiscreteScheduler").make(10)
    table = Table.from_diffusers(euler)
    assert table.start == pytest.approx(float(euler.init_noise_sigma))
    assert table.name == "EulerDiscreteScheduler-10"


V, X0, TRAILING = ({"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {"timestep_spacing": "trailing"})
TO_MIN = {"set_alpha_to_one": False}


@pytest.mark.parametrize(
    ("case", "steps", "end"),
    [
        (Case("EulerDiscreteScheduler"), 10, "zero"),
        (Case("DEISMultistepScheduler"), 10, "min"),
        (Case("PNDMScheduler"), 10, "min"),
        (Case("PNDMScheduler", {"set_alpha_to_one": True}), 10, "zero"),
        (Case("IPNDMScheduler"), 10, "zero"),
        (Case("DDPMScheduler", {"variance_type": "fixed_large"}), 10, "zero"),
        (Case("DPMSolverMultistepInverseScheduler"), 10, "min"),
        (Case("DDIMInverseScheduler"), 10, "min"),
        *((Case("DDIMScheduler", {**kind, **TRAILING}), 10, "zero") for kind in ({}, V, X0)),
        *((Case("DDIMScheduler", {**kind, **TO_MIN}), 10, "min") for kind in ({}, V, X0)),
        # With 7 steps stock's last one leads from 142 to 142 - 1000 // 7 = 0.
        *((Case("DDIMScheduler", {**kind, **TRAILING}), 7, "min") for kind in ({}, V, X0)),
        (Case("DDIMScheduler", TRAILING, {"eta": 1.0}), 7, "min"),
        # These go to timestep 0, and to the data, whatever they are told.
        *((Case("TCDScheduler", {"set_alpha_to_one": one}, {"eta": 0.3}), 10, "min") for one in (True, False)),
        *((Case("LCMScheduler", {"set_alpha_to_one": one}), 10, "zero") for one in (True, False)),
    ],
    ids=str,
)
def test_the_end_is_what_the_last_step_makes(case: Case, steps: int, end: str) -> None:
    assert Table.from_diffusers(case.make(steps), **case.options).end == end


def test_score_sde_and_consistency_models_end_at_their_least_sigma() -> None:
    """Score SDE's last step goes to the data and adds ``sigma_min`` of noise; a consistency function ends at ``sigma_min``,
    so that what is there already is left as it is."""
    score = Table.from_diffusers(Case("ScoreSdeVeScheduler", {"sigma_min": 0.02}).make(10), method="step_pred")
    assert score.rows[-1, Step.Z] == pytest.approx(0.02)
    consistency = Table.from_diffusers(Case("CMStochasticIterativeScheduler", {"num_train_timesteps": 10}).make(10))
    assert consistency.rows[-1, [Step.A, Step.B, Step.P, Step.S, Step.Z]] == pytest.approx([1, 0, 0, 0, 0], abs=1e-5)
    assert (score.end, consistency.end) == ("min", "min")


def test_the_scheduler_and_torch_are_left_as_they_were() -> None:
    scheduler, draw = Case("DDPMScheduler").make(10), torch.randn
    table = Table.from_diffusers(scheduler)
    assert torch.randn is draw
    assert scheduler.config.clip_sample
    assert np.array_equal(Table.from_diffusers(scheduler).rows, table.rows)
