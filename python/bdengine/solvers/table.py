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

Clip = Literal["none", "latent", "x0"]
CLIPS: Final = get_args(Clip)
End = Literal["zero", "min"]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one sampler on one grid.

    Attributes:
        rows: float64 [rows, STEP_COLUMNS].
        name: What made it ("ddpm-50").
        start: Scale of the initial state, ``x_T = start (eps + r)``.
        end: What the last row makes: the data, or a sample that still has noise, as a rule the least of training.
        corrector: Signal-to-noise ratio of each row that is a Langevin corrector's, 0 for ordinary ones, float64 [rows].
    """

    rows: NDArray[np.float64]
    name: str
    start: float = 1.0
    end: End = "zero"
    corrector: NDArray[np.float64] | None = None

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
        slot_columns = [Step.STORE + k * STORE_COLUMNS + Store.SLOT for k in range(STORES)]
        written = int(self.rows[:, slot_columns].max(initial=-1))
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
        """The same sampler with ``clip``: see `bdengine.defenses.clipping`.

        Raises:
            UserError: An unknown clip, or ``x0`` of a table that was read off without one.
        """
        if clip not in CLIPS:
            raise unknown("clip", clip, CLIPS)
        rows = self.rows.copy()
        if clip == "latent":
            rows[:, Step.LOW], rows[:, Step.HIGH] = -1, 1
        elif clip == "x0":
            if not rows[:, [Step.Q, *(Step.STORE + k * STORE_COLUMNS + Store.G for k in range(STORES))]].any():
                raise UserError(
                    f"{self.name} has no x0 in its rows: expected one of bdengine's own samplers or a scheduler that can"
                    " clip_sample; a latent clip works on any"
                )
            rows[:, Step.LOW0], rows[:, Step.HIGH0] = -1, 1
        return replace(self, rows=rows, name=self.name if clip == "none" else f"{self.name}+{clip}-clip")


def blank(timesteps: Sequence[float]) -> NDArray[np.float64]:
    """Rows that do nothing: no terms, no clamps, no stores; float64 [len(timesteps), STEP_COLUMNS]."""
    rows = np.zeros((len(timesteps), STEP_COLUMNS))
    rows[:, [Step.LOW0, Step.LOW]], rows[:, [Step.HIGH0, Step.HIGH]] = -np.inf, np.inf
    rows[:, [Step.STORE + k * STORE_COLUMNS + Store.SLOT for k in range(STORES)]] = -1
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
