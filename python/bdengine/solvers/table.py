"""A sampler is a table: one row of host-known coefficients a network evaluation (`bdkernels.columns` has the formula)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

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
        end: What the last row makes: the data, or a sample at the least noise of training.
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

    def clipped(self, clip: Clip) -> Table:
        """The same sampler with ``clip``: see `bdengine.defenses.clipping`."""
        if clip not in CLIPS:
            raise unknown("clip", clip, CLIPS)
        rows = self.rows.copy()
        if clip == "latent":
            rows[:, Step.LOW], rows[:, Step.HIGH] = -1, 1
        elif clip == "x0":
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
