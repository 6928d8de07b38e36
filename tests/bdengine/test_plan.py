"""The training plan: pure functions of the seed, whatever loads the data."""

import numpy as np
import pytest
from scipy import stats

from bdengine.errors import UserError
from bdengine.plan import TrainingPlan, order, poisoned


def plan(**changes: object) -> TrainingPlan:
    return TrainingPlan(**{"seed": 3, "images": 500, "timesteps": np.arange(1000), "poison_rate": 0.3} | changes)  # type: ignore[arg-type]


def test_a_batch_is_the_same_however_it_is_cut() -> None:
    whole = plan(flip=True).batch(0, 1200)
    for size in (1, 7, 64, 500):
        parts = [plan(flip=True).batch(at, min(size, 1200 - at)) for at in range(0, 1200, size)]
        for name, value in vars(whole).items():
            assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), value), name


def test_each_pass_shows_every_image_once_in_a_new_order() -> None:
    first, second = (plan().batch(at, 500).image.numpy() for at in (0, 500))
    assert sorted(first) == sorted(second) == list(range(500))
    assert (first != second).any()
    assert (order(4, 500, 0) != order(3, 500, 0)).any()


def test_an_image_is_poisoned_in_every_pass_or_in_none() -> None:
    """What a loader that decides by the first image of a batch gets wrong."""
    batches = [plan().batch(at, 500) for at in (0, 500, 1000)]
    arms = np.empty((3, 500), np.int64)
    for i, batch in enumerate(batches):
        arms[i, batch.image] = batch.arm
    assert (arms == arms[0]).all()
    assert np.array_equal(arms[0].astype(bool), poisoned(3, np.arange(500), 0.3))
    mixed = [0 < chunk.sum() < len(chunk) for chunk in np.split(batches[0].arm.numpy(), 10)]
    assert all(mixed)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
def test_the_rate_is_kept_and_a_higher_one_only_adds(rate: float) -> None:
    images = np.arange(100_000)
    chosen = poisoned(0, images, rate)
    low, high = stats.binom.ppf([5e-7, 1 - 5e-7], len(images), rate)
    assert low <= chosen.sum() <= high
    assert (poisoned(0, images, min(rate + 0.2, 1.0)) >= chosen).all()


def test_timesteps_and_flips_are_uniform() -> None:
    batch = plan(flip=True).batch(0, 100_000)
    assert stats.chisquare(np.bincount(batch.t, minlength=1000)).pvalue > 1e-6
    assert stats.binomtest(int(batch.flip.sum()), 100_000).pvalue > 1e-6
    assert not plan().batch(0, 100).flip.any()
    assert set(plan(timesteps=np.array([999, 499])).batch(0, 100).t.tolist()) == {499, 999}


@pytest.mark.parametrize("rate", [1.5, -0.1, float("nan")])
def test_a_bad_rate_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match="expected 0 to 1"):
        poisoned(0, np.arange(3), rate)
