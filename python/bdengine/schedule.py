"""Noise schedules and timestep grids, in float64.

    alpha_t = 1 - beta_t      alpha_bar_t = prod_{s <= t} alpha_s      s_t = sqrt(1 - alpha_bar_t)

    linear               beta_t evenly spaced (Ho et al. 2020)
    scaled_linear        sqrt(beta_t) evenly spaced (Rombach et al. 2022)
    squaredcos_cap_v2    alpha_bar_t = cos^2 of ((t + 1) / T + 0.008) / 1.008 pi / 2, beta_t <= 0.999 (Nichol and Dhariwal 2021)
    sigmoid              beta_t on a sigmoid from -6 to 6 (Xu et al. 2022)

`Exploding` is x_t = x0 + sigma_t eps of images in [0, 1], log sigma_t evenly spaced: alpha_bar_t = 1 and s_t = sigma_t.

Sources: Ho et al. 2020 (DDPM), eq. 4; Song et al. 2021 (score SDE), app. C; the spacings as in Lin et al. 2024, table 2, and in
diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import UserError, unknown

Floats = NDArray[np.float64]
Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: Final = get_args(Spacing)
Prediction = Literal["epsilon", "v_prediction", "sample"]
PREDICTIONS: Final = get_args(Prediction)
BETAS: Final = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving schedule.

    Attributes:
        betas: float64 [T], each in (0, 1); the last may be 1 (zero terminal SNR).
        name: diffusers' name of it, for scheduler configurations.
        prediction: What a network trained on it returns: ``eps``, ``v = alpha eps - s x0``, or ``x0`` ("sample").
    """

    betas: Floats
    name: str
    prediction: Prediction = "epsilon"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """The schedule of a diffusers scheduler configuration.

        Raises:
            UserError: A kind of schedule or of prediction that this engine does not know.
        """
        name, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise unknown("prediction type", prediction, PREDICTIONS)
        told = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02} | dict(config)
        T, *ends = (told[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
        trained = config.get("trained_betas")
        if not isinstance(T, int) or not all(isinstance(end, int | float) for end in ends):
            raise UserError(
                f"a scheduler has {T!r} timesteps and betas from {ends[0]!r} to {ends[1]!r}: expected numbers"
            )
        if trained is None:
            values = betas(name, T, *ends)
        elif isinstance(trained, list) and all(isinstance(beta, int | float) for beta in trained):
            values = np.array(trained, np.float64)
        else:
            raise UserError(f"the scheduler's trained betas are {str(trained)[:60]}: expected a list of numbers")
        return cls(zero_terminal_snr(values) if config.get("rescale_betas_zero_snr") else values, name, prediction)

    def to_config(self) -> dict[str, Any]:
        """diffusers' description of a process with named betas whose network predicts the noise, as DDPMScheduler reads it."""
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.T,
            "beta_start": float(self.betas[0]),
            "beta_end": float(self.betas[-1]),
            "beta_schedule": self.name,
            "prediction_type": "epsilon",
            "variance_type": "fixed_small",
            "clip_sample": False,
        }

    @property
    def T(self) -> int:
        """Number of training timesteps."""
        return len(self.betas)

    @property
    def times(self) -> Tensor:
        """What the network is told at each timestep, int64 [T]."""
        return torch.arange(self.T)

    def data(self, pixels: Tensor) -> Tensor:
        """The images of uint8 ``pixels`` in the process's range, or as they are where that is the kernels' own, [-1, 1]."""
        return pixels

    def noise(self, m: Tensor, time: Tensor) -> Tensor:
        """What a network's output ``m`` says the noise is."""
        return m

    @cached_property
    def alpha_bar(self) -> Floats:
        """float64 [T]."""
        return np.cumprod(1 - self.betas, dtype=np.float64)

    @cached_property
    def s(self) -> Floats:
        """``s_t = sqrt(1 - alpha_bar_t)``, float64 [T]."""
        return np.sqrt(1 - self.alpha_bar)

    @cached_property
    def _log_kappa(self) -> Floats:
        with np.errstate(divide="ignore"):
            return np.log(self.s) - np.log(self.alpha_bar) / 2

    def alpha_bar_at(self, t: Floats) -> Floats:
        """``alpha_bar`` at timesteps in 0..T-1, whole or not: ``log(s / sqrt(alpha_bar))`` is linear between two."""
        whole = np.floor(t).astype(np.int64)
        between = 1 / (1 + self.kappa_at(t) ** 2)
        return np.where(whole == t, self.alpha_bar[whole], between)

    def kappa_at(self, t: Floats) -> Floats:
        """``kappa = s / sqrt(alpha_bar)`` at timesteps in 0..T-1, whole or not."""
        return np.exp(np.interp(t, np.arange(self.T), self._log_kappa))

    def time_at(self, kappa: Floats) -> Floats:
        """The timesteps of these ``kappa``, the inverse of `kappa_at`."""
        return np.interp(np.log(kappa), self._log_kappa, np.arange(self.T))


SNR: Final = 0.15
"""Signal-to-noise ratio of a corrector, ScoreSdeVeScheduler's. With the published backdoors' 0.075, made for 2,000 levels, 100
levels left noise: 0.060 in the black border of digits, 0.005 with this."""


@dataclass(frozen=True, eq=False)
class Exploding:
    """A variance-exploding process, ``x_t = x0 + sigma_t eps`` of images in [0, 1], whose network returns the score.

    Attributes:
        sigmas: float64 [T], positive and ascending.
        snr: The corrector's signal-to-noise ratio.
    """

    sigmas: Floats
    snr: float = SNR

    def to_config(self) -> dict[str, Any]:
        """As ScoreSdeVeScheduler reads it."""
        return {
            "_class_name": "ScoreSdeVeScheduler",
            "num_train_timesteps": self.T,
            "sigma_min": float(self.sigmas[0]),
            "sigma_max": float(self.sigmas[-1]),
            "snr": self.snr,
            "correct_steps": 1,
        }

    @property
    def T(self) -> int:
        """Number of noise levels in training."""
        return len(self.sigmas)

    @property
    def alpha_bar(self) -> Floats:
        """float64 [T], ones."""
        return np.ones(self.T)

    @property
    def s(self) -> Floats:
        """``sigma_t``, float64 [T]."""
        return self.sigmas

    @property
    def times(self) -> Tensor:
        """What the network is told at each level, sigma itself, float32 [T]."""
        return torch.tensor(self.sigmas, dtype=torch.float32)

    def data(self, pixels: Tensor) -> Tensor:
        """The images of uint8 ``pixels``, float32 in [0, 1]."""
        return pixels.float() / 255

    def noise(self, m: Tensor, time: Tensor) -> Tensor:
        """What the score ``m`` [N, C, H, W] at ``time`` [N] says the noise is, ``-sigma m``."""
        return -time.reshape(-1, 1, 1, 1) * m


def exploding(largest: float, snr: float = SNR, T: int = 2000, least: float = 0.01) -> Exploding:
    """``sigma_t`` evenly spaced in its logarithm; the published backdoors' is from 0.01 to 380, with a ratio of 0.075.

    Raises:
        UserError: The largest is not above the least, or a ratio that is not above 0.
    """
    if not least < largest < np.inf:
        raise UserError(f"the largest sigma is {largest:g}: expected a finite number above the least, {least:g}")
    if not 0 < snr < np.inf:
        raise UserError(f"the corrector's signal-to-noise ratio is {snr:g}: expected a finite number above 0")
    return Exploding(np.geomspace(least, largest, T), snr)


def linear(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """``beta_t`` linear from ``start`` to ``end`` over ``T`` steps: every published attack's schedule."""
    return Schedule(betas("linear", T, start, end), "linear")


def betas(name: str, T: int, start: float, end: float) -> Floats:
    """``beta_t`` by name, float64 [T]; see the module. The cosine takes no ends.

    Raises:
        UserError: An unknown name.
    """
    if name == "linear":
        return np.linspace(start, end, T)
    if name == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, T) ** 2
    if name == "squaredcos_cap_v2":
        alpha_bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    if name == "sigmoid":
        return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T)))
    raise unknown("beta schedule", name, BETAS)


def zero_terminal_snr(values: Floats) -> Floats:
    """``beta_t`` with ``sqrt(alpha_bar)`` shifted and scaled so that it ends in 0 (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - values))
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def grid(T: int, steps: int, spacing: Spacing = "trailing") -> NDArray[np.int64]:
    """The timesteps of a sampler, descending, int64 [steps].

        leading    t_i = i * (T // steps)
        trailing   t_i = round(T - i T / steps) - 1, from T - 1
        linspace   steps points from T - 1 to 0

    Raises:
        UserError: ``steps`` outside 1..T, or an unknown spacing.
    """
    if not 1 <= steps <= T:
        raise UserError(f"steps is {steps}: expected 1 to {T}")
    if spacing == "leading":
        return np.arange(steps)[::-1] * (T // steps)
    if spacing == "trailing":
        return np.round(T - np.arange(steps) * (T / steps)).astype(np.int64) - 1
    if spacing == "linspace":
        return np.round(np.linspace(0, T - 1, steps))[::-1].astype(np.int64)
    raise unknown("spacing", spacing, SPACINGS)
