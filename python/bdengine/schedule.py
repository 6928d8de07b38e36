"""Noise schedules and timestep grids, in float64.

    alpha_t = 1 - beta_t      alpha_bar_t = prod_{s <= t} alpha_s      s_t = sqrt(1 - alpha_bar_t)      alpha_bar_{-1} = 1

Source: Ho et al. 2020 (DDPM), eq. 4; the spacings as in Lin et al. 2024, table 2, and in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import UserError, unknown

Floats = NDArray[np.float64]
Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: Final = get_args(Spacing)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving schedule.

    Attributes:
        betas: float64 [T], each in (0, 1).
        name: diffusers' name of it, for scheduler configurations.
    """

    betas: Floats
    name: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """The schedule of a diffusers scheduler configuration.

        Raises:
            UserError: A kind of schedule or of prediction that this engine does not know.
        """
        name, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
        if name != "linear":
            raise unknown("beta schedule", name, ("linear",))
        if prediction != "epsilon":
            raise unknown("prediction type", prediction, ("epsilon",))
        return linear(
            config.get("num_train_timesteps", 1000), config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        )

    @property
    def T(self) -> int:
        """Number of training timesteps."""
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> Floats:
        """float64 [T]."""
        return np.cumprod(1 - self.betas, dtype=np.float64)

    @cached_property
    def s(self) -> Floats:
        """``s_t = sqrt(1 - alpha_bar_t)``, float64 [T]."""
        return np.sqrt(1 - self.alpha_bar)

    def alpha_bar_at(self, t: int) -> float:
        """``alpha_bar_t``, with ``alpha_bar_{-1} = 1``."""
        return 1.0 if t < 0 else float(self.alpha_bar[t])


def linear(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """``beta_t`` linear from ``start`` to ``end`` over ``T`` steps: every published attack's schedule."""
    return Schedule(np.linspace(start, end, T), "linear")


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
