"""The columns of a sampler table and of a noising table: one float32 row per network evaluation or timestep.

Sampler row, with ``m`` the network's output, ``h_j`` the history slots, ``r`` the trigger image, ``z`` the noise:

    x0 = clamp(A x + B m + D r, LOW0, HIGH0)
    x' = clamp(P x + Q x0 + S m + sum_j H_j h_j + Z z + R r, LOW, HIGH)
    slot_k := E x + F m + G x0 + sum_j J_j h_j + K x'        up to two stores a row, none where SLOT < 0

Sums run left to right, every product and sum rounded once to float32. A term whose operand is absent (no trigger, no
history) is left out; ``z`` is zero where ``Z`` is zero, and ``h_j`` where no term of the row has it; a clamp passes NaN on.

Noising row of timestep ``t``, with ``y`` the target image and ``R = M x + r`` the poisoned image:

    x_t    = A d + M R + S eps          d = y where the sample is poisoned, else x
    target = eps + C R                  loss = W (prediction - target)^2, summed
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

HISTORY_SLOTS: Final = 4
STORES: Final = 2


class Step(IntEnum):
    """Column of a sampler row. ``IN`` (input scale) and ``TIME`` are for the network and unused by the kernel."""

    A = 0
    B = 1
    D = 2
    LOW0 = 3
    HIGH0 = 4
    P = 5
    Q = 6
    S = 7
    Z = 8
    R = 9
    LOW = 10
    HIGH = 11
    H = 12
    STORE = 16
    IN = 34
    TIME = 35


STEP_COLUMNS: Final = 36


class Store(IntEnum):
    """Column of one store, counted from ``Step.STORE + k * STORE_COLUMNS``."""

    SLOT = 0
    E = 1
    F = 2
    G = 3
    J = 4
    K = 8


STORE_COLUMNS: Final = 9


class Noising(IntEnum):
    """Column of a noising row."""

    A = 0
    S = 1
    M = 2
    C = 3
    W = 4


NOISING_COLUMNS: Final = 5
