"""Every sampler against its own exact law: for Gaussian data the optimal network is linear, and so is the whole loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from bdengine.attacks.exact import State
from bdengine.networks import Network
from bdengine.oracle import Gaussian, Oracle
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import Floats, linear
from bdengine.solvers import SAMPLERS, SamplerConfig, Table
from bdkernels import Step

PROCESS = linear()
MEAN = np.array([0.3, -0.5, 0.1, 0.0])
ROOT = np.array([[0.5, 0, 0, 0], [0.3, 0.2, 0, 0], [-0.2, 0.1, 0.6, 0], [0.1, 0.1, 0.1, 0.05]])
COVARIANCE = ROOT @ ROOT.T
COUNT = 20_000
LEVEL = 1e-4 / len(SAMPLERS)
"""Bonferroni's: the whole file errs once in 10,000 changes of its seeds."""


def law(table: Table) -> tuple[Floats, Floats]:
    """Mean and covariance of what ``table`` makes with the optimal network, in closed form.

    Along each eigenvector of the data's covariance the state is a number, linear in (1, x_T, z_0, z_1, ...).
    """
    values, vectors = np.linalg.eigh(COVARIANCE)
    alpha = np.sqrt(PROCESS.alpha_bar_at(table.timesteps))
    s = np.sqrt(1 - alpha**2)
    mean, variance = np.zeros(4), np.zeros(4)
    for i, (value, centre) in enumerate(zip(values, vectors.T @ MEAN, strict=True)):
        one = np.eye(len(table) + 2)
        state = State(one[1])
        for k, row in enumerate(table.rows):
            gain = s[k] / (alpha[k] ** 2 * value + s[k] ** 2)
            state.advance(row, gain * (state.x - alpha[k] * centre * one[0]))
            state.x = state.x + row[Step.Z] * one[k + 2]
        mean[i], variance[i] = state.x[0], np.square(state.x[1:]).sum()
    return vectors @ mean, vectors @ np.diag(variance) @ vectors.T


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_law_of_their_table(name: str) -> None:
    """One Wald statistic of mean and covariance, 4 + 10 degrees of freedom."""
    table = SamplerConfig(name, 20).table(PROCESS)
    mean, covariance = law(table)
    data = Gaussian(torch.tensor(MEAN).reshape(1, 2, 2), torch.tensor(COVARIANCE))
    network = Network(Oracle(PROCESS, [(1.0, data)]), (1, 2, 2))
    x = Sampler(network, {"": Arm(table)}, micro_batch=COUNT)(range(COUNT))[""].double().flatten(1).numpy()
    white = (x - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    off = white.mean(0)
    spread = white.T @ white / COUNT - np.eye(4)
    wald = COUNT * (off @ off + np.square(spread).sum() / 2)
    assert wald < chi2.isf(LEVEL, 14), wald
    assert wald > chi2.isf(1 - LEVEL, 14)


@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "dpm++", "sde-dpm++", "unipc", "deis", "heun", "lms", "euler-ancestral"]
)
def test_more_steps_lead_to_the_data(name: str) -> None:
    errors = []
    for steps in (10, 100, 1000):
        mean, covariance = law(SamplerConfig(name, steps).table(PROCESS))
        errors.append(max(np.abs(mean - MEAN).max(), np.abs(covariance - COVARIANCE).max()))
    assert errors[2] < 0.01
    assert errors[2] < errors[0]
