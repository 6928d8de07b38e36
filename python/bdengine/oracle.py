"""Networks known in closed form: the minimiser of the training loss, for Gaussian-mixture data, clean and poisoned.

One training item of one component, with ``d`` and ``R`` independent Gaussians and ``eps ~ N(0, I)``:

    x_t = A d + m R + s gamma eps        target = eps + c R        clean: d = x0, R = 0, gamma = 1
                                                                   poisoned: d = y, R = M x0 + r

so ``(x_t, target)`` is jointly Gaussian, and over components ``k`` of weight ``w_k``

    mu_k    = A E[d] + m E[R]            S_k = A^2 Cov[d] + m^2 Cov[R] + s^2 gamma^2
    p_k(x)  = softmax_k( log w_k + log N(x; mu_k, S_k) )
    oracle  = E[target | x_t = x] = sum_k p_k(x) ( c E[R] + (s gamma + c m Cov[R]) S_k^-1 (x - mu_k) )

with ``gamma`` diagonal; outside a patch attack's region ``R`` is 0 and ``gamma`` 1. On clean data it is
``-s grad log p_t``. Other predictions replace the target by another linear map of ``(d, R, eps)``, see `Oracle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from .attacks import Attack
from .errors import UserError, unknown
from .schedule import PREDICTIONS, Exploding, Prediction, Schedule

OUTPUTS: Final = (*PREDICTIONS, "score")


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A normal law of images, or one image.

    Attributes:
        mean: float [C, H, W].
        covariance: float [D, D] with D = C H W, in logical C, H, W order; None for a point.

    Raises:
        UserError: A covariance of the wrong shape, not finite, not symmetric or not positive semi-definite.
    """

    mean: Tensor
    covariance: Tensor | None = None

    def __post_init__(self) -> None:
        size, given = self.mean.numel(), self.covariance
        if self.mean.dim() != 3:
            raise UserError(f"the mean has shape {tuple(self.mean.shape)}: expected (C, H, W)")
        if given is None:
            return
        if given.shape != (size, size):
            raise UserError(f"the covariance has shape {tuple(given.shape)}: expected {(size, size)}")
        if not given.isfinite().all():
            raise UserError("the covariance has entries that are not finite: expected numbers")
        rounding = size * torch.finfo(given.dtype).eps * float(given.abs().max())
        if (skew := float((given - given.T).abs().max())) > rounding:
            raise UserError(f"the covariance differs from its transpose by {skew:g}: expected a symmetric one")
        if (least := float(torch.linalg.eigvalsh(given.double())[0])) < -rounding:
            raise UserError(f"the covariance has the eigenvalue {least:g}: expected none below 0")

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance, float64 [D] and [D, D]."""
        mean = self.mean.double().reshape(-1)
        zero = mean.new_zeros(len(mean), len(mean))
        return mean, zero if self.covariance is None else self.covariance.to(mean)


Mixture = Sequence[tuple[float, Gaussian]]
"""(weight, law) pairs; the weights sum to 1."""
Levels = tuple[float, float, float, float]


class Oracle(nn.Module):
    """The optimal network: called, sampled and differentiated like any other, with nothing to train.

    Times are training timesteps in 0..T-1, whole or not: between two of them ``log(alpha_bar / (1 - alpha_bar))``,
    ``m_t`` and ``c_t`` are linear. With `Exploding` they are sigmas above 0, ``m`` and ``c`` linear in sigma and
    constant off the grid.

    The other predictions are what that noise target ``e = eps + c R`` means to a sampler:

        sample        x0 = (x_t - s e) / A = d + ((m - s c) R + s (gamma - 1) eps) / A
        v_prediction  v  = A e - s x0
        score         -e / s

    Every call reads its times back to the host and factors one covariance a component and distinct time, at O(D^3):
    made for D up to a few hundred.

    Args:
        process: The schedule.
        data: Clean images, as (weight, law) pairs whose weights sum to 1; those of weight 0 are left out.
        attack: The backdoor; its ``gamma`` is above 0. The mask's image is independent of a random target.
        poison_rate: Share of poisoned training items, 0 to 1: 1/11 where one is appended to every ten clean ones.
        prediction: What the network returns; where None what the schedule says, and "epsilon" with `Exploding`.
        target_data: Law of the target, in the form of ``data``; each image of ``attack.target`` alike where None.
        region: bool [C, H, W], where poisoned items have ``R`` and ``gamma``; elsewhere 0 and 1, but the target all the
            same. The attack's where None, and everywhere where it has none.

    Attributes:
        sample_shape: (C, H, W).
        poisoned: bool [components], which components of `posterior` are poisoned items: the last ones.

    Raises:
        UserError: Weights below 0 or not summing to 1, shapes that differ, a rate or gamma out of range, a rate above 0
            without an attack, schedules of another length, or an unknown prediction.
    """

    log_weight: Tensor
    poisoned: Tensor
    mean: Tensor
    covariance: Tensor
    shift_mean: Tensor
    shift_covariance: Tensor
    gamma: Tensor

    def __init__(
        self,
        process: Schedule | Exploding,
        data: Mixture,
        attack: Attack | None = None,
        poison_rate: float = 0.0,
        prediction: Prediction | Literal["score"] | None = None,
        *,
        target_data: Mixture | None = None,
        region: Tensor | None = None,
    ) -> None:
        super().__init__()
        prediction = prediction or (process.prediction if isinstance(process, Schedule) else "epsilon")
        if prediction not in OUTPUTS:
            raise unknown("prediction", prediction, OUTPUTS)
        if not 0 <= poison_rate <= 1:
            raise UserError(f"the poison rate is {poison_rate}: expected 0 to 1")
        if poison_rate > 0 and attack is None:
            raise UserError(f"the poison rate is {poison_rate} without an attack: expected one, or the rate 0")
        shape = _check_mixture("data", data, None)
        self.process, self.prediction, self.memory_format = process, prediction, torch.preserve_format
        self.sample_shape = cast(tuple[int, int, int], tuple(shape))
        self.nodes = process.sigmas if isinstance(process, Exploding) else np.arange(process.T, dtype=np.float64)
        self.shift = self.coefficient = np.zeros(len(self.nodes))

        nothing = Gaussian(torch.zeros(shape))
        parts = [(w * (1 - poison_rate), False, law, nothing) for w, law in data]
        gamma = torch.ones(math.prod(shape), dtype=torch.float64)
        if attack is not None:
            region = attack.region if region is None else region
            region = torch.ones(shape, dtype=torch.bool) if region is None else region
            _check_attack(attack, region, shape, len(self.nodes))
            gamma[region.reshape(-1)] = attack.gamma
            self.shift, self.coefficient = attack.shift, attack.coefficient
            images = attack.target.reshape(-1, *shape)
            targets = [(1 / len(images), Gaussian(y)) for y in images] if target_data is None else target_data
            _check_mixture("target data", targets, shape)
            behind = data if attack.mask.any() else [(1.0, nothing)]
            shifts = [(v, _stamped(attack, region, law)) for v, law in behind]
            parts += [(w * v * poison_rate, True, y, R) for w, y in targets for v, R in shifts]
        parts = [part for part in parts if part[0] > 0]
        weights, poisoned, laws, shifted = zip(*parts, strict=True)
        self.register_buffer("log_weight", torch.tensor(weights, dtype=torch.float64).log())
        self.register_buffer("poisoned", torch.tensor(poisoned))
        for name, some in (("", laws), ("shift_", shifted)):
            means, covariances = zip(*(law.moments() for law in some), strict=True)
            self.register_buffer(f"{name}mean", torch.stack(means))
            self.register_buffer(f"{name}covariance", torch.stack(covariances))
        self.register_buffer("gamma", torch.where(self.poisoned[:, None], gamma, 1.0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction, differentiable in ``x``.

        Args:
            x: float [N, C, H, W]; computed in float64 whatever its dtype.
            t: [N] or 0-d, integer or float, on the device of ``x``.

        Returns:
            [N, C, H, W] in ``x``'s dtype.

        Raises:
            UserError: A wrong shape, or a time out of range.
        """
        return self._each_time(self._predict, x, t, self.mean.shape[1]).reshape(x.shape).to(x.dtype)

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """Probability of each component given ``x_t``, float64 [N, components]; the arguments of `forward`."""
        return self._each_time(lambda flat, levels: self._joint(flat, levels)[0].softmax(1), x, t, len(self.poisoned))

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """``log p_t(x)`` of noisy training items, float64 [N], differentiable in ``x``; arguments of `forward`."""
        return self._each_time(lambda flat, levels: self._joint(flat, levels)[0].logsumexp(1, True), x, t, 1)[:, 0]

    def _each_time(self, function: Callable[[Tensor, Levels], Tensor], x: Tensor, t: Tensor, width: int) -> Tensor:
        """``function`` of the rows of each distinct time, [N, width]."""
        if x.shape[1:] != self.sample_shape:
            raise UserError(f"x has shape {tuple(x.shape)}: expected (N, {str(self.sample_shape)[1:]}")
        flat, t = x.reshape(len(x), math.prod(self.sample_shape)).to(self.mean.dtype), t.expand(len(x))
        times = t.unique().tolist()
        if len(times) == 1:
            return function(flat, self._levels(times[0]))
        out = flat.new_zeros(len(x), width)
        for time in times:
            out[t == time] = function(flat[t == time], self._levels(time))
        return out

    def _levels(self, t: float) -> Levels:
        """``A, s, m, c`` at one time."""
        m, c = (float(np.interp(t, self.nodes, table)) for table in (self.shift, self.coefficient))
        if isinstance(self.process, Exploding):
            if not t > 0:
                raise UserError(f"sigma is {t:g}: expected a number above 0")
            return 1.0, float(t), m, c
        if not 0 <= t <= self.nodes[-1]:
            raise UserError(f"t is {t:g}: expected 0 to {self.nodes[-1]:g}")
        alpha_bar = float(self.process.alpha_bar_at(np.array(t)))
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), m, c

    def _joint(self, x: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
        """``log w_k N(x)`` [N, K], whitened ``L^-1 (x - mu_k)`` [K, N, D], and ``L^-1`` [K, D, D], for ``x`` [N, D]."""
        A, s, m, _ = levels
        mean = A * self.mean + m * self.shift_mean
        covariance = A**2 * self.covariance + m**2 * self.shift_covariance
        factor = torch.linalg.cholesky(covariance + torch.diag_embed((s * self.gamma) ** 2))
        whiten = torch.linalg.solve_triangular(factor, torch.eye(len(factor[0])).to(factor), upper=False)
        z = (x - mean[:, None]) @ whiten.mT
        log_volume = factor.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * x.shape[1] * math.log(2 * math.pi)
        return (self.log_weight - log_volume) - 0.5 * z.square().sum(2).T, z, whiten

    def _target(self, levels: Levels) -> tuple[float, float | Tensor, Tensor]:
        """The target as a map of ``d, R, eps``: their coefficients, that of ``eps`` [K, D]."""
        A, s, m, c = levels
        ones = torch.ones_like(self.gamma)
        if self.prediction == "epsilon":
            return 0.0, c, ones
        if self.prediction == "score":
            return 0.0, -c / s, -ones / s
        excess = (self.gamma.new_tensor(m - s * c), s * (self.gamma - 1))
        of_R, of_eps = (torch.where(e == 0, e, e / A) for e in excess)  # clean items have none, also where A is 0
        if self.prediction == "sample":
            return 1.0, of_R, of_eps
        return -s, A * c - s * of_R, A - s * of_eps

    def _predict(self, x: Tensor, levels: Levels) -> Tensor:
        A, s, m, _ = levels
        of_d, of_R, of_eps = self._target(levels)
        log_joint, z, whiten = self._joint(x, levels)
        p = log_joint.softmax(1)
        cross = of_d * A * self.covariance + of_R * m * self.shift_covariance
        gain = (cross + torch.diag_embed(of_eps * s * self.gamma)) @ whiten.mT
        return p @ (of_d * self.mean + of_R * self.shift_mean) + ((p.T[:, :, None] * z) @ gain.mT).sum(0)


def _stamped(attack: Attack, region: Tensor, law: Gaussian) -> Gaussian:
    """The law of ``R = M x0 + r`` inside the region, of 0 outside."""
    mask, (mean, covariance) = (region * attack.mask.double()).reshape(-1), law.moments()
    return Gaussian(region * attack.stamp + (mask * mean).reshape(region.shape), mask[:, None] * covariance * mask)


def _check_mixture(name: str, mixture: Mixture, shape: torch.Size | None) -> torch.Size:
    """The shape of its images."""
    if not mixture:
        raise UserError(f"the {name} has no components: expected at least 1")
    shape = mixture[0][1].mean.shape if shape is None else shape
    for weight, law in mixture:
        if not weight >= 0:
            raise UserError(f"the {name} has a component of weight {weight}: expected none below 0")
        if law.mean.shape != shape:
            raise UserError(f"the {name} has a mean of shape {tuple(law.mean.shape)}: expected {tuple(shape)}")
    if abs((total := math.fsum(weight for weight, _ in mixture)) - 1) > 1e-9:
        raise UserError(f"the weights of the {name} sum to {total:.10g}: expected 1")
    return shape


def _check_attack(attack: Attack, region: Tensor, shape: torch.Size, T: int) -> None:
    shapes = {"stamp": attack.stamp.shape, "mask": attack.mask.shape, "region": region.shape}
    for name, given in (shapes | {"target": attack.target.shape[-3:]}).items():
        if given != shape:
            raise UserError(f"the {name} has shape {tuple(given)}: expected the data's {tuple(shape)}")
    for name, table in (("shift", attack.shift), ("coefficient", attack.coefficient)):
        if len(table) != T:
            raise UserError(f"the attack's {name} has {len(table)} entries: expected one for each of {T} timesteps")
    if not attack.gamma > 0:
        raise UserError(f"gamma is {attack.gamma}: expected above 0, as poisoned items without noise have no density")
