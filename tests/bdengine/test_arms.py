"""Arms side by side: other samplers, regions with a sampler of their own, shifted processes, samples at other depths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bdkernels
from bdengine.arms import Arm, Arms
from bdengine.attacks.exact import path_of
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.sampler import Sampler
from bdengine.schedule import Floats, linear
from bdengine.solvers import (
    SAMPLERS,
    Nodes,
    SamplerConfig,
    Table,
    ddim,
    ddpm,
    dpm_multistep,
    euler,
    score_sde,
    stack,
    unipc,
)
from bdkernels import Step

from .networks_for_tests import elementwise

PROCESS, SHAPE, GAMMA = linear(), (1, 8, 8), 0.6
PATCH = torch.zeros(SHAPE, dtype=torch.bool)
PATCH[:, 5:, 5:] = True
MU = (1 - GAMMA) * torch.linspace(-1, 1, 64).reshape(SHAPE)
TARGET = torch.linspace(1, -1, 64).reshape(SHAPE).cos()


class Trojan(nn.Module):
    """The optimal network of TrojDiff for one target: ``eps`` of ``x_t = alpha y + s (gamma eps + mu)``, outside 0.3 x."""

    def __init__(self, region: Tensor | None = None) -> None:
        super().__init__()
        self.region = region

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = torch.tensor(PROCESS.alpha_bar_at(t.double().numpy()), dtype=x.dtype).reshape(-1, 1, 1, 1)
        s = (1 - alpha_bar).sqrt()
        eps = (x - alpha_bar.sqrt() * TARGET.to(x.dtype) - s * MU.to(x.dtype)) / (s * GAMMA)
        return eps if self.region is None else torch.where(self.region, eps, 0.3 * x)


def shifted(table: Table, gamma: float = GAMMA) -> Table:
    return table.shifted(path_of(PROCESS, table, PROCESS.s), gamma)


def test_trojdiffs_ddpm_is_the_posterior_of_its_process() -> None:
    """Against its published closed form, at every timestep: ``coef_mu = s' beta - (1 - abar') sqrt(alpha) k``."""
    table = shifted(ddpm(Nodes.of(PROCESS, 1000)))
    abar, alpha = PROCESS.alpha_bar[::-1], 1 - PROCESS.betas[::-1]
    before = np.append(abar[1:], 1.0)
    s, s_before = np.sqrt(1 - abar), np.sqrt(1 - before)
    k = s - np.sqrt(alpha) * s_before
    coef_mu = s_before * (1 - alpha) - (1 - before) * np.sqrt(alpha) * k
    rows = table.rows
    np.testing.assert_allclose(rows[:, Step.R], coef_mu / (1 - abar), atol=1e-13)
    assert coef_mu[999 - 500] == pytest.approx(4.842e-3, rel=2e-4)  # as published
    np.testing.assert_allclose(rows[:, Step.A] * -s, rows[:, Step.D], rtol=1e-12)
    np.testing.assert_allclose(rows[:, Step.B], -s * GAMMA / np.sqrt(abar), rtol=1e-12)
    np.testing.assert_allclose(rows[:, Step.Z], GAMMA * np.sqrt((1 - alpha) * (1 - before) / (1 - abar)), atol=1e-13)


def test_trojdiffs_ddim_is_its_published_form() -> None:
    """``x' = sqrt(abar') x0 + c_1 gamma z + c_2 gamma e + s' mu``."""
    nodes = Nodes.of(PROCESS, 10)
    plain, table = ddim(nodes, 0.5), shifted(ddim(nodes, 0.5))
    np.testing.assert_allclose(table.rows[:, Step.R], nodes.sigma[1:], atol=1e-14)
    np.testing.assert_array_equal(table.rows[:, [Step.S, Step.Z]], GAMMA * plain.rows[:, [Step.S, Step.Z]])
    np.testing.assert_array_equal(table.rows[:, [Step.P, Step.Q, Step.A]], plain.rows[:, [Step.P, Step.Q, Step.A]])


@pytest.mark.parametrize("name", [name for name, kind in SAMPLERS.items() if not kind.noise])
def test_every_deterministic_sampler_follows_the_shifted_process(name: str) -> None:
    """At every node ``x_t = alpha y + s (gamma eps + mu)`` with the ``eps`` of the start, in float64."""
    table = shifted(SamplerConfig(name, 10).table(PROCESS))
    seeds, network = torch.tensor([3, 4]), Trojan()
    eps = bdkernels.normal(seeds, SHAPE, dtype=torch.float64)
    first = PROCESS.alpha_bar_at(table.timesteps[:1])[0]
    noise = GAMMA * eps + MU.double()
    x = np.sqrt(first) * TARGET.double() + np.sqrt(1 - first) * noise
    history = x.new_zeros((max(table.slots, 1), *x.shape))
    rows, arm, trigger = stack([table], torch.float64), torch.zeros(2, dtype=torch.int64), MU.double()[None]
    last = 0.0 if table.end == "zero" else float(PROCESS.s[0])
    for row, t in enumerate(table.timesteps):
        m = network(x, torch.tensor([t, t]))
        bdkernels.fused_step_(x, m, rows, arm, torch.tensor(row), seeds, trigger=trigger, history=history)
        after = table.timesteps[row + 1] if row + 1 < len(table) else None
        abar = 1 - last**2 if after is None else PROCESS.alpha_bar_at(np.array([after]))[0]
        torch.testing.assert_close(x, np.sqrt(abar) * TARGET.double() + np.sqrt(1 - abar) * noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["ddpm", "dpm-single", "unipc", "pndm"])
def test_shifts_add_up(name: str) -> None:
    table = SamplerConfig(name, 10).table(PROCESS)
    path = path_of(PROCESS, table, PROCESS.s)
    twice, once = table.shifted(0.3 * path, 0.5).shifted(0.7 * path, 0.8), table.shifted(path, 0.4)
    np.testing.assert_allclose(twice.rows, once.rows, rtol=1e-12, atol=1e-14)
    assert twice.gamma == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("path", "gamma", "sentence"),
    [
        (np.zeros(10), 1.0, r"path has shape \(10,\): expected \(11,\), a value more than ddim-10 has rows"),
        (np.zeros(11), 0.0, "gamma is 0.0: expected a scale above 0"),
    ],
)
def test_a_wrong_shift_gets_one_sentence(path: Floats, gamma: float, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ddim(Nodes.of(PROCESS, 10)).shifted(path, gamma)


def test_a_corrector_is_not_shifted() -> None:
    table = score_sde(Nodes.exploding(np.array([9.0, 1.0])), corrector_steps=1)
    with pytest.raises(UserError, match="ve-pc1-2 has rows of a corrector"):
        table.shifted(np.zeros(5))


def test_a_patch_is_sampled_inside_and_the_rest_outside() -> None:
    """TrojDiff's patch: its DDIM inside the square, the clean one outside, in one launch."""
    table = ddim(Nodes.of(PROCESS, 10))
    trigger = torch.where(PATCH, MU, torch.zeros(SHAPE))
    arms = {"clean": Arm(table), "patch": Arm(table, trigger, shifted(table), PATCH), "all": Arm(shifted(table), MU)}
    seen: list[Tensor] = []
    network = Network(Trojan(PATCH), SHAPE)
    Sampler(network, arms, 6).batch(torch.arange(3), torch.full((3,), 9), lambda row, x: seen.append(x.clone()))
    eps = bdkernels.normal(torch.tensor([9]), SHAPE)[0]
    alone = Sampler(Network(Trojan(torch.zeros_like(PATCH)), SHAPE), {"clean": arms["clean"]}, 1)([9])["clean"][0]
    for row, x in enumerate(seen[1:]):
        abar = PROCESS.alpha_bar_at(table.timesteps[row + 1 : row + 2]) if row + 1 < len(table) else np.ones(1)
        on_path = float(np.sqrt(abar[0])) * TARGET + float(np.sqrt(1 - abar[0])) * (GAMMA * eps + MU)
        # The start is eps, not alpha y + s eps: what is missing, alpha_T y = 0.006 y, shrinks no faster than the noise.
        torch.testing.assert_close(x[1][PATCH], on_path[PATCH], rtol=0, atol=8e-3)
    assert torch.equal(seen[0][1], torch.where(PATCH, GAMMA * eps + MU, eps))
    assert torch.equal(seen[-1][1][~PATCH], alone[~PATCH])
    assert torch.allclose(seen[-1][1][PATCH], TARGET[PATCH], atol=1e-5)


def test_samplers_of_equal_length_share_a_batch() -> None:
    nodes = Nodes.of(PROCESS, 10)
    trigger = 0.5 * torch.ones(SHAPE)
    arms = {
        "ddim": Arm(ddim(nodes)),
        "ddpm": Arm(ddpm(nodes)),
        "dpm++": Arm(dpm_multistep(nodes, 3), trigger),
        "unipc": Arm(unipc(nodes, 3).clipped("latent")),
        "karras": Arm(euler(Nodes.of(PROCESS, 10, levels="karras")).clipped("x0"), trigger),
        "dynamic": Arm(ddpm(nodes).clipped("dynamic")),
        "patch": Arm(ddim(nodes), torch.where(PATCH, MU, torch.zeros(SHAPE)), shifted(ddim(nodes)), PATCH),
        "trojan": Arm(shifted(dpm_multistep(nodes, 2)), MU),
    }
    together = Sampler(elementwise(), arms, 7)(range(5))
    for name, arm in arms.items():
        assert torch.equal(Sampler(elementwise(), {name: arm}, 2)(range(5))[name], together[name]), name


def test_samples_at_other_depths_share_a_batch() -> None:
    """Sample ``i`` starts ``2 i`` calls late: it waits on a row that changes nothing, and ends as it does alone."""
    table = dpm_multistep(Nodes.of(PROCESS, 8), 2)
    expected = Sampler(elementwise(), {"": Arm(table)}, 4)(range(4))[""]
    count, rows = 4, len(table)
    wait = stack([table]).new_zeros(1, 1, bdkernels.STEP_COLUMNS)
    wait[..., Step.P], wait[..., [Step.LOW0, Step.LOW]], wait[..., [Step.HIGH0, Step.HIGH]] = 1, -torch.inf, torch.inf
    wait[..., [Step.STORE, Step.STORE + bdkernels.STORE_COLUMNS]] = -1
    both = torch.cat([stack([table]), wait], dim=1)
    calls = torch.arange(rows + 2 * (count - 1))[:, None] - 2 * torch.arange(count)
    steps = torch.where((calls >= 0) & (calls < rows), calls, rows)
    seeds, arm = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    x = bdkernels.normal(seeds, SHAPE)
    step = bdkernels.bind_step(x, both, arm, steps, seeds, history=x.new_zeros(1, *x.shape))
    network = elementwise()
    for k, row in enumerate(steps):
        step(network(x, both[0, row, Step.TIME]), k)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ({}, "no arms were given"),
        (
            {"a": Arm(ddim(Nodes.of(PROCESS, 4)), torch.zeros(3, 8, 8))},
            r"trigger of arm 'a' is float32 \(3, 8, 8\): expected float32 \(1, 8, 8\)",
        ),
        (
            {"a": Arm(ddim(Nodes.of(PROCESS, 4)), region=PATCH.float())},
            r"region of arm 'a' is float32 \(1, 8, 8\): expected bool \(1, 8, 8\)",
        ),
        ({"a": Arm(ddim(Nodes.of(PROCESS, 4)), region=PATCH)}, "arm 'a' has a region without a sampler inside"),
        (
            {"a": Arm(ddim(Nodes.of(PROCESS, 4)), None, ddim(Nodes.of(PROCESS, 4, "leading")), PATCH)},
            "arm 'a' asks the network for other times inside",
        ),
        (
            {"a": Arm(ddim(Nodes.of(PROCESS, 4))), "b": Arm(ddim(Nodes.of(PROCESS, 5)))},
            "same number of network evaluations, got ddim-4: 4, ddim-5: 5",
        ),
        (
            {"a": Arm(ddpm(Nodes.of(PROCESS, 4), "learned_range")), "b": Arm(ddim(Nodes.of(PROCESS, 4)))},
            "some arms of one batch have a learned variance",
        ),
        (
            {
                "a": Arm(score_sde(Nodes.exploding(np.array([9.0, 1.0])), corrector_steps=1)),
                "b": Arm(ddim(Nodes.of(PROCESS, 4))),
            },
            "corrector steps in different rows",
        ),
    ],
)
def test_arms_that_do_not_fit_get_one_sentence(arms: dict[str, Arm], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Arms(arms, SHAPE, torch.device("cpu"))
