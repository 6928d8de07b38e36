"""Where a sampler stands: the noise levels it visits, and what the network is told and returns there.

    x_i = alpha_i x0 + sigma_i eps          kappa_i = sigma_i / alpha_i          lambda_i = -log kappa_i

Variance-preserving nodes have ``alpha = sqrt(alpha_bar)`` and ``sigma = sqrt(1 - alpha_bar)``, variance-exploding ones
``alpha = 1``. Every solver works in these coordinates, also those published in ``kappa`` and ``x / alpha``.

    native        the timesteps of a spacing (`bdengine.schedule.grid`)
    karras        kappa^(1/7) evenly spaced from the most to the least noise of training (Karras et al. 2022, eq. 5)
    exponential   lambda evenly spaced between the same ends, as DPM-Solver's log-SNR grid (Lu et al. 2022)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from ..errors import UserError, unknown
from ..schedule import Floats, Prediction, Schedule, Spacing, grid
from .table import End
from .tape import Sum, Tape

Levels = Literal["native", "karras", "exponential"]
LEVELS: Final = get_args(Levels)
ENDS: Final = get_args(End)
RHO: Final = 7.0
"""Karras et al. 2022, table 1."""
FEW: Final = 15
"""Steps below which DPM-Solver's and DEIS's released code lowers the order at the end of a multistep run."""
SIGMA_DATA: Final = 0.5
"""Standard deviation of the data in EDM's preconditioning (Karras et al. 2022, table 1)."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """The noise levels of one sampling run, from the noisiest to the end.

    Attributes:
        alpha: float64 [n + 1].
        sigma: float64 [n + 1]; 0 at the end where it is the data.
        time: What the network is told at the first n, float64 [n].
        prediction: What the network returns.
    """

    alpha: Floats
    sigma: Floats
    time: Floats
    prediction: Prediction | Literal["score", "edm"] = "epsilon"

    @classmethod
    def preserving(cls, alpha_bar: Floats, time: Floats, prediction: Prediction = "epsilon") -> Nodes:
        """Variance-preserving nodes.

        Args:
            alpha_bar: float64 [n + 1].
            time: float64 [n].
        """
        return cls(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), time, prediction)

    @classmethod
    def exploding(cls, sigma: Floats, prediction: Literal["epsilon", "score", "edm"] = "score") -> Nodes:
        """Variance-exploding nodes at ``sigma``, descending, and then the data.

        What the network is told is sigma, or ``log(sigma) / 4`` where it is preconditioned as in EDM.

        Args:
            sigma: float64 [n].
        """
        time = np.log(sigma) / 4 if prediction == "edm" else sigma
        return cls(np.ones(len(sigma) + 1), np.append(sigma, 0.0), time, prediction)

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        steps: int,
        spacing: Spacing = "trailing",
        levels: Levels = "native",
        end: End = "zero",
        halved: int = 0,
        first: int | None = None,
    ) -> Nodes:
        """The nodes of ``steps`` steps.

        Args:
            end: Where the last step leads: to the data, or to the least noise of training (timestep 0).
            halved: So many of the first steps have a node in their middle.
            first: Leave out the nodes above this timestep.

        Raises:
            UserError: ``steps`` outside 1..T or all of them halved or left out, an unknown spacing, kind of levels or end, or
                levels other than native on a schedule that ends in pure noise.
        """
        for kind, value, known in (("kind of levels", levels, LEVELS), ("end", end, ENDS)):
            if value not in known:
                raise unknown(kind, value, known)
        times = grid(schedule.T, steps, spacing).astype(np.float64)
        if levels != "native":
            if schedule.alpha_bar[-1] == 0:
                raise UserError(
                    f"{levels} levels start at infinity on a schedule of zero terminal SNR: expected native ones"
                )
            most, least = schedule.kappa_at(np.array([schedule.T - 1.0, 0.0]))
            times = schedule.time_at({"karras": karras, "exponential": even}[levels](most, least, steps))
        if first is not None:
            if times[-1] > first:
                raise UserError(
                    f"the first timestep is {first:g} and the last of {steps} steps is {times[-1]:g}: expected that or more,"
                    " or more steps"
                )
            times = times[int((times > first).sum()) :]
            steps = len(times)
        if steps <= halved:
            left = "" if first is None else f" from timestep {first:g} on"
            raise UserError(
                f"steps{left} is {steps}: expected at least {halved + 1}, since the first {halved} are halved"
            )
        middles = (times[:halved] + times[1 : halved + 1]) / 2
        times = np.insert(times, np.arange(1, len(middles) + 1), middles)
        alpha_bar = np.append(schedule.alpha_bar_at(times), 1.0 if end == "zero" else schedule.alpha_bar[0])
        return cls.preserving(alpha_bar, times, schedule.prediction)

    def __len__(self) -> int:
        return len(self.time)

    @property
    def kappa(self) -> Floats:
        """``sigma / alpha``, float64 [n + 1]; infinite at zero terminal SNR."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @property
    def lam(self) -> Floats:
        """``lambda = log(alpha / sigma)``, float64 [n + 1]; infinite at the data."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def end(self) -> End:
        """Where the run leads."""
        return "zero" if self.sigma[-1] == 0 else "min"

    def tape(self, name: str, steps: int | None = None) -> Tape:
        """An empty tape for a sampler on these nodes."""
        return Tape(f"{name}-{len(self) if steps is None else steps}", self.end)

    def multistep_order(self, i: int, order: int) -> int:
        """What the step from node ``i`` has of ``order``: what was seen so far, and less at the end, as released.

        A step into the data is of order 1; a run of fewer than `FEW` steps ends on the orders 2 and 1.
        """
        left = len(self) - i
        few = len(self) < FEW
        most = 1 if left == 1 and (few or self.end == "zero") else 2 if left == 2 and few else order
        return min(order, i + 1, most)

    def evaluate(self, tape: Tape, i: int) -> tuple[Sum, Sum]:
        """A network evaluation at node ``i``: ``x`` and the predicted ``x0``."""
        scale = (self.sigma[i] ** 2 + SIGMA_DATA**2) ** -0.5 if self.prediction == "edm" else 1.0
        x, _, x0 = tape.evaluate(self.time[i], *self.x0_of(i), scale=scale)
        return x, x0

    def x0_of(self, i: int) -> tuple[float, float]:
        """``a, b`` of ``x0 = a x + b m`` at node ``i``, for the network's kind of prediction."""
        alpha, sigma = self.alpha[i], self.sigma[i]
        if self.prediction == "sample":
            return 0.0, 1.0
        if self.prediction == "v_prediction":
            return alpha, -sigma
        if self.prediction == "score":
            return 1 / alpha, sigma**2 / alpha
        if self.prediction == "edm":
            total = sigma**2 + SIGMA_DATA**2
            return SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total**0.5
        return 1 / alpha, -sigma / alpha

    def eps_of(self, i: int, x: Sum, x0: Sum) -> Sum:
        """``eps = (x - alpha x0) / sigma`` at node ``i``: the network's own where ``x0`` is not clamped."""
        return (x - self.alpha[i] * x0) / self.sigma[i]


def check_order(order: int, most: int) -> None:
    """Refuse an order outside 1..most.

    Raises:
        UserError: As said.
    """
    if order not in range(1, most + 1):
        raise UserError(f"the order is {order}: expected 1 to {most}")


def karras(first: float, last: float, count: int) -> Floats:
    """Levels whose ``1 / RHO``-th powers are evenly spaced, float64 [count]."""
    return np.linspace(first ** (1 / RHO), last ** (1 / RHO), count) ** RHO


def even(first: float, last: float, count: int) -> Floats:
    """Levels whose logarithms are evenly spaced, float64 [count]."""
    return np.exp(np.linspace(np.log(first), np.log(last), count))
