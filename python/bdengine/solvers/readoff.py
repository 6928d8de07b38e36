"""The table of any linear ``diffusers`` scheduler, read off by stepping it on basis vectors.

Every sample, network output and noise that the scheduler is handed is a basis vector of its own, so what a step returns is
the list of its coefficients in all that came before, and no system has to be solved:

    x_{k+1} = sum_{j <= k} (p_kj x_j + s_kj m_j + z_kj noise_j)

What the steps after ``k`` read of the steps up to ``k`` spans a space, whose dimension is the number of tensors that any
implementation must remember. Row by row: a slot is held while it lies in that space, and what is missing is stored as
combinations of ``x``, ``m`` and the slots. Noise that is read again is found again from ``x'``; so is one tensor too many.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bdkernels import HISTORY_SLOTS, STORE_COLUMNS, STORES, Step, Store

from ..errors import UserError
from ..schedule import PREDICTIONS, Floats
from .table import End, Table, blank

_DOUBLE, _SINGLE = 1e-11, 1e-6  # relative errors of a scheduler that keeps to float64, and of one that casts to float32
_ARGUMENTS: Final = ["model_output", "timestep", "sample"]
_CLIPS: Final = ("clip_sample", "clip_denoised")
_SOURCES: Final = {
    "randn_tensor": "draw",
    "randn": "draw",
    "randn_like": "draw",
    "BrownianTreeNoiseSampler": "brownian",
}
_X, _M, _Z = HISTORY_SLOTS, HISTORY_SLOTS + 1, HISTORY_SLOTS + 2  # columns after those of the slots


def read_off(scheduler: Any, method: str, options: dict[str, Any]) -> Table:
    """See `Table.from_diffusers`."""
    run = _Run(scheduler, method, options)
    response, scales, precision = run.read()
    rows = blank(range(len(scales)))
    rows[:, Step.IN], rows[:, Step.TIME] = scales, [float(t) for t in scheduler.timesteps]
    _fill(rows, response, precision, run.name)
    run.carry_clip(rows, precision)
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return Table(rows, f"{run.name}-{len(rows)}", start, _end(scheduler, response[-1]))


def _end(scheduler: Any, last: Floats) -> End:
    """What the last step makes.

    Where there are no sigmas to tell, it is the noise that the step leaves of ``alpha x0 + sigma eps`` when the network knows
    ``eps``: ``set_alpha_to_one`` is not obeyed by LCM and TCD, nor by DDIM where the number of steps does not divide ``T``.

    Args:
        last: Its coefficients in all samples, outputs and noise, [3, steps].
    """
    if getattr(scheduler, "sigmas", None) is not None:
        return "min" if scheduler.sigmas[-1] > 0 else "zero"
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or not hasattr(scheduler, "alphas_cumprod"):
        return "zero"
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    at = scheduler.timesteps.long().numpy()
    eps_in_m = {"epsilon": np.ones_like(alpha), "v_prediction": alpha, "sample": np.zeros_like(alpha)}[prediction]
    left = np.hypot(last[0] @ sigma[at] + last[1] @ eps_in_m[at], np.linalg.norm(last[2]))
    return "min" if left > sigma[0] / 2 else "zero"


class _Noise:
    """The noise of one run: each step's own, once, however the scheduler draws it."""

    def __init__(self, name: str) -> None:
        self.name, self.now, self.drawn = name, torch.empty(0), False
        self.path: dict[float, Tensor] = {}

    def draw(self, *_: Any, **__: Any) -> Tensor:
        if self.drawn:
            raise UserError(f"{self.name} draws noise twice in a step: a row has one noise")
        self.drawn = True
        return self.now

    def brownian(self, *_: Any, **__: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """Stands for a ``BrownianTreeNoiseSampler``: a path over sigma, which each draw extends by its increment."""

        def increment(sigma: Tensor, after: Tensor) -> Tensor:
            s, t = float(sigma), float(after)
            self.path = self.path or {s: torch.zeros_like(self.now)}
            if t not in self.path:
                end = min(self.path)
                if t > end or s not in self.path:
                    raise UserError(f"{self.name} draws noise between draws that it made: a row's noise is new")
                self.path[t] = self.path[end] + (end - t) ** 0.5 * self.draw()
            return (self.path[t] - self.path[s]) / (s - t) ** 0.5

        return increment

    @contextmanager
    def patched(self, scheduler: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for module in {sys.modules[c.__module__] for c in type(scheduler).__mro__} | {torch}:
                for source in _SOURCES.keys() & vars(module).keys():
                    stack.enter_context(mock.patch.object(module, source, getattr(self, _SOURCES[source])))
            yield


class _Run:
    """Runs of copies of a scheduler, with everything it is handed chosen in advance."""

    def __init__(self, scheduler: Any, method: str, options: dict[str, Any]) -> None:
        self.scheduler, self.method, self.options = scheduler, method, options
        self.name = name = type(scheduler).__name__
        if not hasattr(scheduler, method):
            raise UserError(f"{name} has no {method}(): expected a method of {', '.join(_ARGUMENTS)}")
        parameters = signature(getattr(scheduler, method)).parameters.items()
        needed = [p for p, v in parameters if v.default is Parameter.empty and p not in options]
        if needed != _ARGUMENTS:
            raise UserError(f"{name}.{method} needs {', '.join(needed)}: expected {', '.join(_ARGUMENTS)}")
        if getattr(scheduler, "_step_index", None) is not None or getattr(scheduler, "counter", None):
            raise UserError(f"{name} has been stepped: call its set_timesteps again first")
        if getattr(scheduler, "timesteps", None) is None or getattr(scheduler, "num_inference_steps", True) is None:
            raise UserError(f"{name} has no timesteps: call its set_timesteps first")
        if scheduler.config.get("thresholding"):
            raise UserError(f"{name} thresholds x0 by a quantile, which is not linear: switch its thresholding off")
        self.count = len(scheduler.timesteps)
        self.clips = [c for c in _CLIPS if c in scheduler.config]

    def __call__(self, given: Floats, *, clip: bool) -> tuple[Floats, Floats]:
        """A run on ``given``, its samples, network outputs and noise: [3, steps, elements].

        Returns:
            What the steps return and the scaled model inputs, [steps, elements] each.
        """
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.register_to_config(**dict.fromkeys(self.clips, clip))
        step, scale = getattr(scheduler, self.method), getattr(scheduler, "scale_model_input", lambda x, _: x)
        out, seen = np.empty(given.shape[1:]), np.empty(given.shape[1:])
        noise = _Noise(self.name)
        with noise.patched(scheduler):
            for k, t in enumerate(scheduler.timesteps):
                sample, m, noise.now = (torch.tensor(v[k]).reshape(1, 1, 1, -1) for v in given)
                noise.drawn = False
                try:
                    seen[k] = scale(sample, t).flatten()
                    out[k] = step(model_output=m, timestep=t, sample=sample, **self.options).prev_sample.flatten()
                except UserError:
                    raise
                except Exception as error:
                    raise UserError(f"{self.name} cannot be stepped at row {k}: {error}") from error
                if not np.isfinite(out[k]).all():
                    raise UserError(f"{self.name} is not finite at row {k} of {self.count}")
        return out, seen

    def _random(self) -> Floats:
        """Numbers wide enough to meet a clamp, [3, steps, 16]."""
        return 3 * np.random.default_rng(0).standard_normal((3, self.count, 16))

    def read(self) -> tuple[Floats, Floats, float]:
        """The coefficients, [steps, 3, steps]; the input scales, [steps]; and the precision of the scheduler's arithmetic.

        Raises:
            UserError: What random numbers give is not the sum of what basis vectors give.
        """
        n = self.count
        out, seen = self(np.eye(3 * n).reshape(3, n, 3 * n), clip=False)
        response, scales, given = out.reshape(n, 3, n), np.diagonal(seen).copy(), self._random()
        size = np.einsum("kij,ije->ke", np.abs(response), np.abs(given)) + np.finfo(float).tiny
        out, seen = self(given, clip=False)
        error = np.abs(out - np.einsum("kij,ije->ke", response, given)) / size
        worst = max(error.max(), np.abs(seen - scales[:, None] * given[0]).max())
        if not worst <= _SINGLE:
            raise UserError(f"{self.name} is not linear in its samples, outputs and noise: it is off by {worst:.1e}")
        return response, scales, _DOUBLE if worst <= _DOUBLE else _SINGLE

    def carry_clip(self, rows: Floats, precision: float) -> None:
        """Split ``x'`` into a part through ``x0`` and the rest, told apart by steps that hold ``x0`` at its bound.

        Raises:
            UserError: The scheduler clips, and not as a row does.
        """
        if not self.clips:
            return
        on = any(self.scheduler.config[c] for c in self.clips)
        bound = self.scheduler.config.get("clip_sample_range", 1.0)
        x, m, z = given = self._random()
        wanted = self(given, clip=True)[0]
        for side in (-1, 1):  # sign of the network output that pushes x0 the way that the sample does
            far, probe = 1000 * bound, np.zeros((3, self.count, 3))
            probe[0], probe[1] = [far, 2 * far, far], [side * far, side * far, 2 * side * far]
            at, more_x, more_m = self(probe, clip=True)[0].T
            p, s = (more_x - at) / far, side * (more_m - at) / far
            q = np.abs(at - far * (p + side * s)) / bound
            share = np.where(q > precision, 1 / np.maximum(q, precision), 0)
            a, b = share * (rows[:, Step.P] - p), share * (rows[:, Step.S] - s)
            through = q[:, None] * np.clip(a[:, None] * x + b[:, None] * m, -bound, bound)
            got = p[:, None] * x + through + s[:, None] * m + rows[:, [Step.Z]] * z
            if (np.abs(got - wanted) <= 100 * precision * (1 + np.abs(wanted))).all():
                rows[:, [Step.A, Step.B, Step.P, Step.Q, Step.S]] = np.stack([a, b, p, q, s], axis=1)
                if on:
                    rows[:, Step.LOW0], rows[:, Step.HIGH0] = -bound, bound
                return
        if on:
            raise UserError(f"{self.name} clips as a row cannot: switch its {' or '.join(self.clips)} off")


def _fill(rows: Floats, response: Floats, precision: float, name: str) -> None:
    """Write the rows of ``response`` [steps, 3, steps]."""
    size = np.abs(response).max(axis=(1, 2), initial=0, where=response != 0)[:, None]
    size[size == 0] = 1
    past = np.zeros((len(rows), HISTORY_SLOTS + 1))  # what steps read, over their size, in terms of the slots and x
    for k, row in enumerate(rows):
        terms = np.concatenate([past[k:], response[k:, 1:, k] / size[k:]], axis=1)
        terms[:, _X] += response[k:, 0, k] / size[k:, 0]
        now, later = terms[0] * size[k], terms[1:]
        row[Step.H : Step.H + HISTORY_SLOTS] = now[:HISTORY_SLOTS]
        row[[Step.P, Step.S, Step.Z]] = now[[_X, _M, _Z]]
        later[np.abs(later) <= precision] = 0
        past[k + 1 :] = _remember(row, now, later, precision, f"{name}, at row {k},")


def _remember(row: Floats, now: Floats, later: Floats, precision: float, name: str) -> Floats:
    """Write the stores of ``row``, which makes ``now``, so that ``later`` can be made of its slots and ``x'``.

    Returns:
        ``later`` in these terms: [len(later), slots + 1].
    """
    if not later.any():
        return np.zeros((len(later), HISTORY_SLOTS + 1))
    for solved_for in (_Z if later[:, _Z].any() else None, int(np.abs(now).argmax())):
        rest, out = later.copy(), np.zeros((len(later), HISTORY_SLOTS + 1))
        if solved_for is not None:
            if now[solved_for] == 0:
                raise UserError(f"{name} hides noise that a later row reads: expected it in x'")
            out[:, _X] = later[:, solved_for] / now[solved_for]
            rest -= np.outer(out[:, _X], now)
            rest[:, solved_for] = 0
        space = _space(rest, precision)
        far = np.linalg.norm(np.eye(_Z + 1) - space.T @ space, axis=0)  # of each slot, x, m and z from the space
        held = [j for j in range(HISTORY_SLOTS) if far[j] <= precision**0.5]
        out[:, held] = rest[:, held]
        rest[:, held] = 0
        new = _reduced(_space(rest, precision))
        if not rest[:, _Z].any() and len(new) <= STORES and len(held) + len(new) <= HISTORY_SLOTS:
            break
    else:
        raise UserError(
            f"{name} reads {len(held) + len(new)} earlier tensors, {len(new)} of them new: expected 4 and 2"
        )
    free = [j for j in range(HISTORY_SLOTS) if j not in held][: len(new)]
    out[:, free] = np.linalg.lstsq(new.T, rest.T, rcond=None)[0].T
    for i, (slot, value) in enumerate(zip(free, new, strict=True)):
        store = row[Step.STORE + i * STORE_COLUMNS :][:STORE_COLUMNS]
        store[[Store.SLOT, Store.E, Store.F]] = slot, value[_X], value[_M]
        store[Store.J : Store.J + HISTORY_SLOTS] = value[:HISTORY_SLOTS]
    return out


def _space(rows: Floats, precision: float) -> Floats:
    """An orthonormal basis of the rows' space."""
    _, size, basis = np.linalg.svd(rows, full_matrices=False)
    return basis[size > 10 * precision]


def _reduced(basis: Floats) -> Floats:
    """The same space in vectors with many zeros: a stored sum of unlike tensors would lose digits of the smaller."""
    basis = basis.copy()
    for i in range(len(basis)):
        best, column = divmod(int(np.abs(basis[i:]).argmax()), basis.shape[1])
        basis[[i, i + best]] = basis[[i + best, i]]
        basis[i] /= basis[i, column]
        others = np.arange(len(basis)) != i
        basis[others] -= np.outer(basis[others, column], basis[i])
    return basis
