"""A sampler is a table: one row of host-known coefficients a network evaluation (`bdkernels.columns` has the formula)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from bdkernels import HISTORY_SLOTS, STEP_COLUMNS, STORE_COLUMNS, STORES, Step, Store

from ..errors import UserError, unknown

Clip = Literal["none", "latent", "x0", "dynamic"]
CLIPS: Final = get_args(Clip)
End = Literal["zero", "min"]
SLOTS: Final = [Step.STORE + k * STORE_COLUMNS + Store.SLOT for k in range(STORES)]
"""Columns of a row that say where it stores."""


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one sampler on one grid.

    Attributes:
        rows: float64 [rows, STEP_COLUMNS].
        name: What made it ("ddpm-50").
        start: Scale of the initial state, ``x_T = start (gamma eps + r)``.
        gamma: Scale of the noise, 1 but for shifted processes.
        log_variance: Ends of the log variance that a network chooses between, float64 [rows, 2]; its noise is in slot 0.
        dynamic: Whether ``x0`` is thresholded by a quantile.
        end: What the last row makes: the data, or a sample that still has noise, as a rule the least of training.
        corrector: Signal-to-noise ratio of each row that is a Langevin corrector's, 0 for ordinary ones, float64 [rows].
    """

    rows: NDArray[np.float64]
    name: str
    start: float = 1.0
    end: End = "zero"
    corrector: NDArray[np.float64] | None = None
    gamma: float = 1.0
    log_variance: NDArray[np.float64] | None = None
    dynamic: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def timesteps(self) -> NDArray[np.float64]:
        """What the network is told at each row, float64 [rows]."""
        return self.rows[:, Step.TIME]

    @property
    def slots(self) -> int:
        """History slots that the rows read or write."""
        used = [j for j in range(HISTORY_SLOTS) if self.rows[:, Step.H + j].any()]
        written = int(self.rows[:, SLOTS].max(initial=-1))
        return max([written, *used], default=-1) + 1

    @staticmethod
    def from_diffusers(scheduler: Any, *, method: str = "step", **options: Any) -> Table:
        """The table of any linear diffusers ``scheduler``, as exact as its own arithmetic; the scheduler is left as it was.

        One row is one entry of ``scheduler.timesteps``, and its noise is drawn once. The table starts from
        ``init_noise_sigma``. A scheduler with ``clip_sample`` whose rows are ``P x + Q clamp(A x + B m) + S m + Z z`` is read
        in that form, clamped if it clamps; of all others ``A``, ``B`` and ``Q`` are zero. While it reads, drawing normal noise
        is patched for the process.

        Args:
            scheduler: After ``set_timesteps`` and before its first step.
            method: What steps it, with the arguments of ``step`` ("step_pred").
            options: Further arguments of the method (``eta=0.5``).

        Raises:
            UserError: It is not linear, clips as no row can, needs more history than a row can keep, or other arguments.
        """
        from .readoff import read_off  # which makes tables

        return read_off(scheduler, method, options)

    def clipped(self, clip: Clip) -> Table:
        """The same sampler with ``clip``: see `bdengine.defenses.clipping`, and `bdengine.sampler.thresholded` for "dynamic".

        Raises:
            UserError: An unknown clip, or one of ``x0`` for a table that was read off without one.
        """
        if clip not in CLIPS:
            raise unknown("clip", clip, CLIPS)
        rows = self.rows.copy()
        if clip == "latent":
            edge = 1 / np.append(rows[1:, Step.IN], 1.0)  # of the state that the next row asks the network with
            rows[:, Step.LOW], rows[:, Step.HIGH] = -edge, edge
        elif clip != "none":
            if not rows[:, [Step.Q, *(Step.STORE + k * STORE_COLUMNS + Store.G for k in range(STORES))]].any():
                raise UserError(
                    f"{self.name} has no x0 in its rows: expected one of bdengine's own samplers or a scheduler that can"
                    " clip_sample; a latent clip works on any"
                )
            if clip == "x0":
                rows[:, Step.LOW0], rows[:, Step.HIGH0] = -1, 1
        return replace(
            self,
            rows=rows,
            dynamic=self.dynamic or clip == "dynamic",
            name=self.name if clip == "none" else f"{self.name}+{clip}-clip",
        )

    def shifted(self, path: NDArray[np.float64], gamma: float = 1.0) -> Table:
        """The sampler of ``x = v + m_t r`` where ``v`` is this sampler's own state: the trigger ``r`` in every step.

        The network predicts ``eps`` of ``x_t = sqrt(alpha_bar_t) y + s_t gamma eps + m_t r``. TrojDiff's reverse processes are
        DDPM and DDIM with ``m_t = s_t`` (Chen et al. 2023, eq. 9 and algorithm 2); this is that of any sampler.

        Rows of a corrector and networks that predict anything but ``eps`` have no shifted form here. Shifts add up. The start
        stays ``start (gamma eps + r)``, also where the first ``m_t`` is not ``start``.

        Args:
            path: ``m_t`` before each row and after the last, float64 [rows + 1].
            gamma: Scale of the noise, above 0.

        Raises:
            UserError: A path of another length, a scale that is not above 0, or rows of a corrector.
        """
        if path.shape != (len(self) + 1,):
            raise UserError(
                f"the path has shape {path.shape}: expected ({len(self) + 1},), a value more than {self.name} has rows"
            )
        if not gamma > 0:
            raise UserError(f"gamma is {gamma}: expected a scale above 0")
        if self.corrector is not None:
            raise UserError(f"{self.name} has rows of a corrector: expected a sampler without one")
        rows, of_slot = self.rows.copy(), np.zeros(HISTORY_SLOTS)
        rows[:, [Step.B, Step.S, Step.Z]] *= gamma
        for row, now, after in zip(rows, path[:-1], path[1:], strict=True):
            row[Step.D] -= row[Step.A] * now
            row[Step.R] += after - row[Step.P] * now - row[Step.H : Step.H + HISTORY_SLOTS] @ of_slot
            stored = of_slot.copy()
            for k in range(STORES):
                store = row[Step.STORE + k * STORE_COLUMNS :][:STORE_COLUMNS]
                store[Store.F] *= gamma
                if (slot := int(store[Store.SLOT])) >= 0:
                    kept = store[Store.J : Store.J + HISTORY_SLOTS] @ of_slot
                    stored[slot] = store[Store.E] * now + kept + store[Store.K] * after
            of_slot = stored
        learned = None if self.log_variance is None else self.log_variance + 2 * np.log(gamma)
        return replace(self, rows=rows, name=f"{self.name}+shift", gamma=self.gamma * gamma, log_variance=learned)


def blank(timesteps: Sequence[float]) -> NDArray[np.float64]:
    """Rows that do nothing: no terms, no clamps, no stores; float64 [len(timesteps), STEP_COLUMNS]."""
    rows = np.zeros((len(timesteps), STEP_COLUMNS))
    rows[:, [Step.LOW0, Step.LOW]], rows[:, [Step.HIGH0, Step.HIGH]] = -np.inf, np.inf
    rows[:, SLOTS] = -1
    rows[:, Step.IN], rows[:, Step.TIME] = 1, timesteps
    return rows


def stack(tables: Sequence[Table], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One table of several arms, ``dtype`` [arms, rows, STEP_COLUMNS]: what the kernels take.

    Raises:
        UserError: The samplers differ in their number of network evaluations.
    """
    if len({len(t) for t in tables}) != 1:
        counts = ", ".join(f"{t.name}: {len(t)}" for t in tables)
        raise UserError(f"arms of one batch need the same number of network evaluations, got {counts}")
    return torch.tensor(np.stack([t.rows for t in tables]), dtype=dtype)
