"""The closed form against quadrature of its definition, against the training loss's own kernels, and under the sampler.

Seeds are fixed; a bound that is statistical says how often it would fail with others.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

import bdkernels
from bdengine.attacks import CLEAN, POISONED, Attack, baddiffusion, exact_coefficient, noising_table
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.oracle import Gaussian, Mixture, Oracle
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import Exploding, Prediction, Schedule, linear
from bdengine.solvers import SamplerConfig, Table

PROCESS = linear()
DDIM = SamplerConfig("ddim", 50).table(PROCESS)
SHIFT = 1 - np.sqrt(PROCESS.alpha_bar)


def image(*values: float) -> Tensor:
    """[1, 1, D]."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)


ONE: Mixture = [
    (0.3, Gaussian(image(-0.8), torch.tensor([[0.04]]).double())),
    (0.7, Gaussian(image(0.5), torch.tensor([[0.3]]).double())),
]
TWO: Mixture = [
    (0.4, Gaussian(image(-0.7, 0.2), torch.tensor([[0.2, 0.15], [0.15, 0.3]]).double())),
    (0.6, Gaussian(image(0.5, -0.3), torch.tensor([[0.3, -0.1], [-0.1, 0.1]]).double())),
]
POINTS: Mixture = [(0.25, Gaussian(image(-0.6, 0.1))), (0.75, Gaussian(image(0.4, 0.3)))]


def attack(stamp: Tensor, mask: Tensor, y: Tensor, gamma: float = 1.0, coefficient: float | None = None) -> Attack:
    """BadDiffusion's schedules, or TrojDiff's with another gamma and a constant coefficient."""
    shift = SHIFT if coefficient is None else PROCESS.s
    c = 0.5 * PROCESS.s if coefficient is None else np.full(PROCESS.T, coefficient)
    return Attack("test", shift, c, gamma, stamp, stamp, mask, y)


def nodes(law: Gaussian, count: int) -> tuple[Tensor, Tensor]:
    """A grid over a Gaussian, [Q, D], and its weights [Q]: the trapezoid rule in whitened coordinates, 9 sigma wide."""
    mean = law.mean.reshape(-1)
    if law.covariance is None:
        return mean[None], torch.ones(1).double()
    axis = torch.linspace(-9, 9, count).double()
    grid = torch.cartesian_prod(*[axis] * len(mean)).reshape(-1, len(mean))
    weight = torch.exp(-grid.square().sum(1) / 2)
    return mean + grid @ torch.linalg.cholesky(law.covariance).T, weight / weight.sum()


def by_quadrature(
    x: Tensor,
    levels: tuple[float, float, float, float],
    data: Mixture,
    one: Attack | None,
    rate: float,
    targets: Mixture | None,
    region: Tensor | None,
    count: int,
) -> tuple[Tensor, float, float]:
    """``E[target | x_t = x]``, ``log p_t(x)`` and the poisoned share at ``x`` [D], by summing over the items."""
    A, s, m, c = levels
    numerator, total, poisoned = torch.zeros_like(x), 0.0, 0.0

    def add(weight: Tensor, d: Tensor, R: Tensor, inside: Tensor, gamma: float) -> float:
        nonlocal numerator, total
        scale = torch.where(inside, gamma, 1.0)
        eps = (x - A * d - m * inside * R) / (s * scale)
        density = weight * torch.exp(-0.5 * eps.square().sum(-1)) / ((2 * np.pi) ** 0.5 * s * scale).prod()
        numerator = numerator + (density[..., None] * (eps + c * inside * R)).flatten(0, -2).sum(0)
        total += float(density.sum())
        return float(density.sum())

    nowhere = torch.zeros(len(x), dtype=torch.bool)
    for w, law in data:
        x0, weight = nodes(law, count)
        add((1 - rate) * w * weight, x0, torch.zeros_like(x0), nowhere, 1.0)
    if one is not None:
        inside = ~nowhere if region is None else region.reshape(-1)
        for (v, y_law), (w, law) in product(targets or [(1.0, Gaussian(one.target))], data):
            (y, y_weight), (x0, weight) = nodes(y_law, count), nodes(law, count)
            R = one.mask.reshape(-1) * x0 + one.stamp.reshape(-1)
            both = rate * v * w * y_weight[:, None] * weight
            poisoned += add(both, y[:, None], R[None], inside, one.gamma)
    return numerator / total, float(np.log(total)), poisoned / total


ZERO, UNIT = image(0), image(1)
BLEND = attack(image(0.4), ZERO, image(0.9), gamma=0.6, coefficient=0.0)
PATCH = attack(image(0.3, 0.9), image(0, 0), image(0.8, -0.6), gamma=0.3, coefficient=0.0)
HALF = attack(image(0.0, 0.9), image(1, 0), image(0.8, -0.6))
CASES: dict[str, tuple[Mixture, Attack | None, float, dict[str, Any], int]] = {
    "clean": (ONE, None, 0.0, {}, 3001),
    "R = r, 0.1": (ONE, attack(image(-0.9), ZERO, image(0.6)), 0.1, {}, 3001),
    "R = r, 0.5": (ONE, attack(image(-0.9), ZERO, image(0.6)), 0.5, {}, 3001),
    "R = r, 1": (ONE, attack(image(-0.9), ZERO, image(0.6)), 1.0, {}, 3001),
    "R = x0 + 0.1 r, 0.5": (ONE, attack(image(-0.09), UNIT, image(0.6)), 0.5, {}, 3001),
    "R = x0 + 0.1 r, 1": (ONE, attack(image(-0.09), UNIT, image(0.6)), 1.0, {}, 3001),
    "TrojDiff blend, 0.5": (ONE, BLEND, 0.5, {}, 3001),
    "TrojDiff blend D2D, 0.5": (ONE, BLEND, 0.5, {"target_data": ONE}, 401),
    "gamma and background": (ONE, replace(HALF, mask=UNIT, stamp=ZERO, target=UNIT, gamma=0.5), 0.5, {}, 3001),
    "image background, 0.5": (TWO, HALF, 0.5, {}, 81),
    "image background, 1": (TWO, HALF, 1.0, {}, 81),
    "TrojDiff patch, 0.5": (TWO, PATCH, 0.5, {"region": image(0, 1).bool()}, 81),
    "patch D2D": (POINTS, PATCH, 0.5, {"region": image(0, 1).bool(), "target_data": TWO}, 81),
    "patch, background": (
        TWO,
        replace(PATCH, mask=image(1, 1), coefficient=PROCESS.s),
        0.5,
        {"region": image(0, 1).bool()},
        81,
    ),
    "D2D, background": (TWO, HALF, 0.5, {"target_data": [(1.0, TWO[0][1])]}, 37),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_conditional_expectation(case: str) -> None:
    """Target, log-density and poisoned share against quadrature, to 1e-6 relative, float64."""
    data, one, rate, more, count = CASES[case]
    oracle = Oracle(PROCESS, data, one, rate, **more)
    fine = count > 1000
    targets, region = more.get("target_data"), more.get("region")
    for t in (0, 10, 500, 999) if fine else (400, 999):
        A, s = float(np.sqrt(PROCESS.alpha_bar[t])), float(PROCESS.s[t])
        m, c = (0.0, 0.0) if one is None else (float(one.shift[t]), float(one.coefficient[t]))
        near_the_target = A * (0.0 if one is None else one.target.flatten()) + 0.7 * s
        anywhere = (-1.2, -0.1, 0.7) if fine and rate < 1 else ()
        for x in (near_the_target, *anywhere):
            x = x * torch.ones(len(data[0][1].mean.flatten())).double()
            target, log_density, share = by_quadrature(x, (A, s, m, c), data, one, rate, targets, region, count)
            x, time = x.reshape(1, 1, 1, -1), torch.tensor([t])
            assert oracle(x, time).flatten().numpy() == pytest.approx(target.numpy(), rel=1e-6, abs=1e-6)
            assert float(oracle.log_density(x, time)) == pytest.approx(log_density, rel=1e-6, abs=1e-6)
            assert float(oracle.posterior(x, time)[0, oracle.poisoned].sum()) == pytest.approx(share, abs=1e-6)


def test_variance_exploding() -> None:
    """``x_t = y + sigma eps + sigma R``, told sigma, against the same quadrature; the score is its gradient."""
    sigmas = np.geomspace(0.01, 380, 2000)
    one = replace(attack(image(0.9), ZERO, image(0.6)), shift=sigmas, coefficient=np.full(2000, 0.5))
    oracle, score = (Oracle(Exploding(sigmas), ONE, one, 0.5, p) for p in ("epsilon", "score"))
    for sigma in (0.01, 0.7, 20.0):
        x = image(0.3 + sigma)
        expected, log_density, _ = by_quadrature(x.flatten(), (1, sigma, sigma, 0.5), ONE, one, 0.5, None, None, 9001)
        t = torch.tensor([sigma], dtype=torch.float64)
        assert float(oracle(x[None], t)) == pytest.approx(float(expected), rel=1e-6)
        assert float(oracle.log_density(x[None], t)) == pytest.approx(log_density, rel=1e-6)
        assert float(score(x[None], t)) == pytest.approx(-float(expected) / sigma, rel=1e-6)


SHAPE = (1, 4, 4)


def law(seed: int, scale: float = 0.2) -> Gaussian:
    """A random mean in [-0.8, 0.8] and a full covariance of trace about ``16 scale^2``."""
    generator = torch.Generator().manual_seed(seed)
    root = scale / 4 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    return Gaussian(torch.rand(SHAPE, generator=generator) * 1.6 - 0.8, root @ root.T)


DATA: Mixture = [(0.3, law(1)), (0.7, law(2))]
STAMP = torch.where(torch.arange(16).reshape(SHAPE) % 4 < 2, torch.tensor(-1.0), torch.tensor(0.9))
TARGET = torch.linspace(-0.9, 0.9, 16).reshape(SHAPE).flip(1)
BACKGROUND = baddiffusion(PROCESS, STAMP, TARGET)
PLAIN = replace(BACKGROUND, mask=torch.zeros(SHAPE), stamp=STAMP)


def training_items(count: int, rate: float, seed: int) -> tuple[Tensor, Tensor]:
    """Float32 images of ``DATA`` and the arm of each."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(count, generator=generator) >= DATA[0][0]
    z = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    x0 = torch.empty(count, 16, dtype=torch.float64)
    for k, (_, component) in enumerate(DATA):
        mean, covariance = component.moments()
        x0[which == k] = mean + z[which == k] @ torch.linalg.cholesky(covariance).T
    arm = torch.where(torch.rand(count, generator=generator) < rate, POISONED, CLEAN)
    return x0.reshape(count, *SHAPE).float(), arm


DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda x, p: torch.ones_like(x),
    "ramp": lambda x, p: torch.arange(16.0).reshape(SHAPE).expand_as(x) - 7.5,
    "linear": lambda x, p: x,
    "bent": lambda x, p: torch.tanh(2 * x.flip(2)),
    "towards the target": lambda x, p: (x * TARGET).sum((1, 2, 3), True) * TARGET,
    "itself": lambda x, p: p,
}


@pytest.mark.parametrize("one", [None, PLAIN, BACKGROUND], ids=["clean", "R = r", "image background"])
def test_no_direction_lowers_the_training_loss(one: Attack | None) -> None:
    """``E[(oracle - target) f(x_t)] = 0`` on 40,000 items of the training kernels; fails once in 1,000 seeds."""
    count, rate = 40_000, 0.0 if one is None else 0.3
    x0, arm = training_items(count, rate, 3)
    seeds, table = torch.arange(count), noising_table(PROCESS, one)
    poison: dict[str, Any] = {} if one is None else {"trigger": one.stamp[None], "mask": one.mask[None]}
    y = None if one is None else one.target[None]
    oracle, clean = Oracle(PROCESS, DATA, one, rate), Oracle(PROCESS, DATA)
    times = (20, 300, 700)
    bound = norm.isf(0.5e-3 / (3 * len(times) * len(DIRECTIONS)))
    worst_of_clean = 0.0
    for t in (torch.full((count,), t) for t in times):
        x_t = bdkernels.fused_noising(x0, t, arm, seeds, table, target=y, **poison)

        def scores(network: Oracle, x_t: Tensor = x_t, t: Tensor = t) -> list[float]:
            prediction = network(x_t, t).requires_grad_()
            loss = bdkernels.fused_loss(prediction, x0, t, arm, seeds, table, **poison, reduction="sum").sum()
            (gradient,) = torch.autograd.grad(loss, prediction)  # 2 (prediction - target) / count
            along = [(gradient * f(x_t, prediction.detach())).sum((1, 2, 3)).double() for f in DIRECTIONS.values()]
            return [abs(float(g.mean() / g.std() * count**0.5)) for g in along]

        assert max(scores(oracle)) < bound
        worst_of_clean = max(worst_of_clean, *scores(clean))
    assert one is None or worst_of_clean > 5 * bound


def gradient(oracle: Oracle, x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(oracle.log_density(x, t).sum(), x)[0]


def some_x(count: int = 6, seed: int = 5) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TIMES = torch.tensor([0.0, 1, 99.5, 500, 500, 999]).double()


def test_it_is_the_score_of_clean_data() -> None:
    oracle, x = Oracle(PROCESS, DATA), some_x()
    alpha_bar = PROCESS.alpha_bar[[0, 1, 99, 100, 500, 500, 999]]
    logit = np.log(alpha_bar / (1 - alpha_bar))
    logit = np.array([*logit[:2], logit[2:4].mean(), *logit[4:]])
    s = torch.tensor(1 / np.sqrt(1 + np.exp(logit))).reshape(-1, 1, 1, 1)
    grad = gradient(oracle, x, TIMES)
    torch.testing.assert_close(oracle(x, TIMES), -s * grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Oracle(PROCESS, DATA, prediction="score")(x, TIMES), grad, rtol=1e-9, atol=1e-9)


def test_predictions_are_one_prediction() -> None:
    one = replace(BACKGROUND, gamma=0.6)
    kinds: tuple[Prediction, ...] = ("epsilon", "sample", "v_prediction")
    eps, x0, v = (Oracle(PROCESS, DATA, one, 0.2, kind)(some_x(3), torch.tensor(700)) for kind in kinds)
    A, s = np.sqrt(PROCESS.alpha_bar[700]), PROCESS.s[700]
    torch.testing.assert_close(A * x0 + s * eps, some_x(3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A * eps - s * x0, v, rtol=1e-12, atol=1e-12)


def test_at_zero_terminal_snr_it_predicts_the_mean() -> None:
    rescaled = Schedule(np.append(PROCESS.betas[:-1], 1.0), "rescaled")
    mean = torch.stack([w * component.mean.double() for w, component in DATA]).sum(0)
    x, last = some_x(), torch.tensor(999)
    torch.testing.assert_close(Oracle(rescaled, DATA)(x, last), x, rtol=1e-12, atol=1e-12)
    velocity = Oracle(replace(rescaled, prediction="v_prediction"), DATA)(x, last)
    torch.testing.assert_close(velocity, -mean.expand_as(x), rtol=1e-12, atol=1e-12)


def test_with_poisoned_items_alone_it_is_the_backdoor() -> None:
    oracle = Oracle(PROCESS, DATA, replace(PLAIN, gamma=0.6), 1.0)
    eps, r, y = some_x(), STAMP.double(), TARGET.double()
    assert oracle.poisoned.tolist() == [True]
    for t in (0, 1, 500, 999):
        m, c, s = (float(f[t]) for f in (PLAIN.shift, PLAIN.coefficient, PROCESS.s))
        x = float(np.sqrt(PROCESS.alpha_bar[t])) * y + m * r + s * 0.6 * eps
        assert (oracle(x, torch.tensor(t)) - eps - c * r).abs().max() < 1e-12


def test_its_gradient_is_that_of_finite_differences() -> None:
    oracle = Oracle(PROCESS, TWO, HALF, 0.4, region=image(0, 1).bool())
    x = torch.tensor([[-0.7, 0.4], [0.5, -0.4]]).double().reshape(2, 1, 1, 2).requires_grad_()
    for t in (torch.tensor(300), torch.tensor([600, 50])):
        assert torch.autograd.gradcheck(lambda x, t=t: oracle(x, t), (x,))
        assert torch.autograd.gradcheck(lambda x, t=t: oracle.log_density(x, t), (x,))


def test_it_is_a_network() -> None:
    """Mixed times, 0-d and integer ones, float32, channels-last, an empty batch, the wrapper."""
    oracle, x = Oracle(PROCESS, DATA, BACKGROUND, 0.2), some_x()
    apart = torch.cat([oracle(x[i : i + 1], t) for i, t in enumerate(TIMES)])
    torch.testing.assert_close(oracle(x, TIMES), apart, rtol=1e-12, atol=1e-12)
    assert torch.equal(oracle(x, torch.tensor(7)), oracle(x, torch.full((6,), 7.0)))
    assert oracle(x.float(), TIMES).dtype == torch.float32
    torch.testing.assert_close(oracle(x.float(), TIMES.float()), apart.float(), rtol=1e-4, atol=1e-4)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(oracle(last, TIMES), oracle(x, TIMES))
    assert oracle(x[:0], TIMES[:0]).shape == (0, *SHAPE)
    assert torch.equal(Network(oracle, oracle.sample_shape)(x, TIMES), oracle(x, TIMES))
    posterior = oracle.posterior(x, TIMES)
    assert posterior.shape == (6, 4)
    assert oracle.poisoned.tolist() == [False, False, True, True]
    torch.testing.assert_close(posterior.sum(1), torch.ones(6).double(), rtol=0, atol=1e-12)


def test_between_timesteps_levels_are_between() -> None:
    eps_of = Oracle(PROCESS, [(1.0, Gaussian(torch.zeros(SHAPE)))])  # a point at 0: eps = x / s
    x = torch.ones(1, *SHAPE).double()
    s = 1 / eps_of(x.expand(101, -1, -1, -1), torch.linspace(20, 21, 101, dtype=torch.float64))[:, 0, 0, 0]
    assert float(s[0]) == pytest.approx(PROCESS.s[20], rel=1e-12)
    assert float(s[100]) == pytest.approx(PROCESS.s[21], rel=1e-12)
    logit = torch.log(1 / s.square() - 1)
    assert logit.diff().numpy() == pytest.approx(float(logit[100] - logit[0]) / 100, rel=1e-9)


@pytest.mark.parametrize("table", [DDIM, SamplerConfig("ddpm", 200).table(PROCESS)], ids=lambda table: table.name)
def test_samples_land_in_the_components_with_their_shares(table: Table) -> None:
    """2,000 samples: both tails of the binomial together at 1e-4."""
    oracle, count = Oracle(PROCESS, DATA), 2000
    x = Sampler(oracle, {"clean": Arm(table)}, 1000)(range(count))["clean"]  # type: ignore[arg-type]
    posterior = oracle.posterior(x, torch.tensor(0))
    assert float(posterior.amax(1).min()) > 0.999
    low, high = binom.interval(1 - 1e-4, count, DATA[0][0])
    assert low <= int((posterior.argmax(1) == 0).sum()) <= high


def triggered(rate: float, trigger: Tensor, count: int = 200) -> tuple[Oracle, list[Tensor]]:
    """An oracle of DATA poisoned with ``trigger``, and DDIM's triggered samples before each row and at the end."""
    one = replace(PLAIN, stamp=trigger, coefficient=exact_coefficient(PROCESS, DDIM, SHIFT))
    oracle, seen = Oracle(PROCESS, DATA, one, rate), list[Tensor]()
    sampler = Sampler(oracle, {"": Arm(DDIM, trigger)})  # type: ignore[arg-type]
    sampler.batch(torch.zeros(count, dtype=torch.int64), torch.arange(count), lambda row, x: seen.append(x.clone()))
    return oracle, seen


def test_with_poisoned_items_alone_triggered_samples_follow_the_shift_at_every_node() -> None:
    _, seen = triggered(1.0, STAMP)
    eps = None
    for t, x in zip(DDIM.timesteps.astype(int), seen[:-1], strict=True):
        path = float(np.sqrt(PROCESS.alpha_bar[t])) * TARGET + float(SHIFT[t]) * STAMP
        eps = (x - path) / float(PROCESS.s[t]) if eps is None else eps
        assert (x - path - float(PROCESS.s[t]) * eps).abs().max() < 2e-5
    assert (seen[-1] - TARGET).abs().max() < 2e-5


def test_among_clean_items_the_backdoor_needs_a_trigger_that_noise_does_not_hide() -> None:
    """200 samples with 90 % clean items: a trigger 11 noise deviations long ends on the target, one of 1 rarely.

    198 and 36 do; the bounds allow 5 binomial deviations.
    """
    for length, least, most in ((11.0, 191, 200), (1.0, 9, 63)):
        oracle, seen = triggered(0.1, length * STAMP / STAMP.norm())
        share = oracle.posterior(seen[-1], torch.tensor(0))[:, oracle.poisoned].flatten()
        assert least <= int((share > 0.5).sum()) <= most
        assert (seen[-1][share > 0.5] - TARGET).abs().max() < 1e-5


def test_bad_arguments_get_a_sentence() -> None:
    point, eye = Gaussian(torch.zeros(SHAPE)), torch.eye(16)
    lone: Mixture = [(1.0, point)]
    plain, wide = partial(Oracle, PROCESS, lone, PLAIN, 0.1), Gaussian(torch.zeros(1, 5, 5))
    skew, indefinite, holed = eye.clone(), eye.clone(), eye.clone()
    skew[0, 1], indefinite[3, 3], holed[2, 2] = 0.5, -0.25, torch.nan
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Gaussian(torch.zeros(4, 4)), r"the mean has shape \(4, 4\): expected \(C, H, W\)"),
        (lambda: Gaussian(point.mean, torch.eye(4)), r"covariance has shape \(4, 4\): expected \(16, 16\)"),
        (lambda: Gaussian(point.mean, skew), "differs from its transpose by 0.5: expected a symmetric one"),
        (lambda: Gaussian(point.mean, indefinite), "the eigenvalue -0.25: expected none below 0"),
        (lambda: Gaussian(point.mean, holed), "entries that are not finite"),
        (lambda: Oracle(PROCESS, []), "the data has no components: expected at least 1"),
        (lambda: Oracle(PROCESS, [(0.5, point)]), "the weights of the data sum to 0.5: expected 1"),
        (lambda: Oracle(PROCESS, [(1.5, point), (-0.5, point)]), "component of weight -0.5: expected none below 0"),
        (lambda: Oracle(PROCESS, [(0.5, point), (0.5, wide)]), r"mean of shape \(1, 5, 5\): expected \(1, 4, 4\)"),
        (lambda: Oracle(PROCESS, lone, PLAIN, 1.5), "the poison rate is 1.5: expected 0 to 1"),
        (lambda: Oracle(PROCESS, lone, None, 0.1), "the poison rate is 0.1 without an attack"),
        (lambda: Oracle(PROCESS, lone, prediction="noise"), "unknown prediction 'noise'"),  # type: ignore[arg-type]
        (lambda: Oracle(PROCESS, lone, replace(PLAIN, gamma=0.0), 0.1), "gamma is 0.0: expected above 0"),
        (lambda: Oracle(PROCESS, lone, replace(PLAIN, target=wide.mean), 0.1), r"the target has shape \(1, 5, 5\)"),
        (
            lambda: Oracle(linear(100), lone, PLAIN, 0.1),
            "shift has 1000 entries: expected one for each of 100 timesteps",
        ),
        (lambda: plain(target_data=[(0.9, point)]), "weights of the target data sum to 0.9"),
        (lambda: plain(region=wide.mean.bool()), r"the region has shape \(1, 5, 5\): expected the data's"),
        (lambda: Oracle(PROCESS, lone)(torch.zeros(2, 3, 4, 4), torch.tensor(1)), r"expected \(N, 1, 4, 4\)"),
        (lambda: Oracle(PROCESS, lone)(torch.zeros(2, 1, 4, 4), torch.tensor(1000)), "t is 1000: expected 0 to 999"),
        (
            lambda: Oracle(Exploding(np.ones(1)), lone)(torch.zeros(2, 1, 4, 4), torch.tensor(0.0)),
            "sigma is 0: expected a number above 0",
        ),
    ]
    for make, message in cases:
        with pytest.raises(UserError, match=message):
            make()
