"""UFID: its graph against numpy, queries told apart in networks of closed form, and the model's statistic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bdkernels
from bdengine.arms import Arm
from bdengine.defenses import ufid
from bdengine.defenses.ufid import VARIANTS, UfidConfig
from bdengine.errors import UserError
from bdengine.extractors import DigitFeatures
from bdengine.metrics import attack_success

from .subjects_for_tests import SHAPE, TARGET, subject
from .test_starts import ATTACK, WHITE, along


def test_the_density_is_the_mean_of_all_edges() -> None:
    images = bdkernels.normal(torch.arange(5), (1, 16, 16)) / 2
    extractor = DigitFeatures()
    inside = images.clamp(-1, 1)
    for f, given in (((inside + 1) / 2, None), (extractor(inside), extractor)):
        rows = f.flatten(1).double().numpy()
        edges = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
        assert ufid.density(images, given) == pytest.approx(np.mean(edges), rel=1e-5)
    assert ufid.density(images[:1].expand(4, -1, -1, -1)) == pytest.approx(1)


def test_triggered_queries_have_the_denser_graphs() -> None:
    """All of 8 against all of 8, of a backdoored network; of a clean one both have the data's own density."""
    noise = bdkernels.normal(torch.arange(100, 116), SHAPE)
    queries = torch.cat([noise[:8], noise[8:] + ATTACK.trigger])
    clean, triggered = ufid.densities(subject(0.1, ATTACK), queries, 4).split(8)
    assert triggered.min() > 0.9999 > 0.9 > clean.max()
    of_clean = ufid.densities(subject(0.0), queries, 4)
    torch.testing.assert_close(of_clean, clean.mean().expand(16), rtol=0, atol=1e-2)


def test_a_perturbed_query_is_part_old_and_part_new_noise() -> None:
    """The images are those of the same model from ``sqrt(1 - w) q + sqrt(w) eps``, by hand: step noise has the same seeds."""
    ours, w = subject(0.1, ATTACK), 0.3
    q = bdkernels.normal(torch.tensor([7]), SHAPE)[0]
    eps = bdkernels.normal(torch.arange(3), SHAPE)
    from_hand = [ours.images(Arm(ours.table, (1 - w) ** 0.5 * q + (w**0.5 - 1) * eps[k]), k + 1)[k] for k in range(3)]
    expected = ufid.density(torch.stack(from_hand))
    assert float(ufid.densities(ours, q[None], 3, w)) == pytest.approx(expected, abs=1e-5)


def test_a_backdoored_models_statistic_is_1_and_a_clean_ones_below() -> None:
    backdoored, clean = (ufid.examine(subject(rate, ATTACK), VARIANTS["model"]) for rate in (0.1, 0.0))
    assert backdoored.statistic == pytest.approx(1, abs=1e-4)
    assert backdoored.images is not None
    assert backdoored.trigger is not None
    assert attack_success(backdoored.images, TARGET, 0.01) == 1
    assert along(backdoored.trigger) > 0.5
    assert clean.statistic < 0.9
    assert backdoored.evaluations == 20 * (83 * 8 + -83 * 8 % 64)
    assert backdoored.details["queries"] == 83


def test_bad_numbers_get_a_sentence() -> None:
    with pytest.raises(UserError, match="perturbed 1 times: expected at least 2"):
        ufid.examine(subject(0.0), UfidConfig(1))
    with pytest.raises(UserError, match=r"share of new noise is 0\.9: expected above 0 and below 0\.75"):
        ufid.densities(subject(0.0), WHITE[None], w=0.9)
