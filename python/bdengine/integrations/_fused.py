"""What the schedulers of `bdengine.integrations.diffusers` share: their output, their tables, and one run's seeds and rows.

Two kinds: steps that need no earlier ones (DDPM, DDIM), and steps that keep what later ones need (DPM-Solver, UniPC).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

import bdkernels
from bdkernels import Step

from ..errors import UserError
from ..schedule import Schedule
from ..solvers import Nodes, Table, stack
from ..solvers.table import blank

Generators = torch.Generator | Sequence[torch.Generator] | None
Timestep = float | Tensor

_STOCK_LEVELS: Final = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


class FusedOutput:
    """What ``step`` of DDPM and DDIM returns, by attribute, name or index as stock's output.

    Attributes:
        prev_sample: The next sample, of the sample's shape, dtype and layout.
    """

    def __init__(self, prev_sample: Tensor, predict: Callable[[], Tensor]) -> None:
        self.prev_sample = prev_sample
        self._predict = predict

    @functools.cached_property
    def pred_original_sample(self) -> Tensor:
        """The clamped ``x0``, like ``prev_sample``; made when first read, from the tensors that the step was given."""
        return self._predict()

    def to_tuple(self) -> tuple[Tensor, Tensor]:
        """``prev_sample`` and ``pred_original_sample``."""
        return self.prev_sample, self.pred_original_sample

    def __getitem__(self, key: str | int) -> Tensor:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class _Run:
    """A table on a batch's device; arm 0 steps, arm 1 predicts ``x0``."""

    table: Tensor
    rows: Tensor
    arms: Tensor
    noisy: bool
    history: Tensor | None


def then(method: Callable[..., None], after: Callable[[Any], None]) -> Any:
    """``method``, its signature too (pipelines and ``from_config`` read it), and then ``after``."""

    @functools.wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        after(self)

    return both


def refuse_noise(variance_noise: Any) -> None:
    """Refuse noise that the caller made.

    Raises:
        UserError: As said.
    """
    if variance_noise is not None:
        raise UserError("variance_noise was given: expected none, since noise is made from seeds")


def _dense(images: Tensor) -> Tensor:
    """As the kernels take it: some networks' outputs are a slice of their channels."""
    dense = images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last)
    return images if dense else images.contiguous()


def _draw_seeds(count: int, generator: Generators) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device=device)
    if len(generator) == 1:  # stock too takes a list of one for the whole batch
        return _draw_seeds(count, generator[0])
    if len(generator) != count:
        raise UserError(f"{len(generator)} generators were given for {count} samples: expected one a sample")
    return torch.cat([_draw_seeds(1, g) for g in generator])


class Fused(ABC):
    """Tables by their options, and the seeds and rows of one run."""

    config: Any
    num_inference_steps: int | None
    timesteps: Tensor
    _allowed: ClassVar[Mapping[str, Sequence[Any]]]
    _options: tuple[Any, ...] = ()
    _begin_index: int | None = None
    _step_index: int | None

    @abstractmethod
    def _build(self, *options: Any) -> Table:
        """The sampler's table on the present timesteps."""

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """Stock looks for names in diffusers alone."""
        return [*super()._get_compatibles(), cls]  # type: ignore[misc]

    def reset(self) -> None:
        """Begin anew at the present timesteps and configuration.

        Raises:
            UserError: A configuration that no table can have.
        """
        for name, values in self._allowed.items():
            if name in self.config and self.config[name] not in values:
                choices = " or ".join(map(repr, values))
                raise UserError(f"{name} is {self.config[name]!r} with {type(self).__name__}: expected {choices}")
        self._schedule = Schedule.from_config(self.config)
        self._grid = self.timesteps
        self._times: list[float] = self.timesteps.tolist()  # here, so that `step` reads nothing back
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._runs: dict[tuple[Any, ...], _Run] = {}
        self._seeds: Tensor | None = None
        self._step_index = None

    def begin(self) -> None:
        """Begin anew, and build the usual table.

        Raises:
            UserError: Also timesteps on which the sampler has no finite table.
        """
        self.reset()
        self._table(*self._options)

    def _check_begun(self) -> None:
        if self.num_inference_steps is None:
            raise UserError("step was called on a new scheduler: expected set_timesteps first")

    def _nodes(self, end: float, floor: float = 0.0) -> Nodes:
        """At the timesteps and then at ``alpha_bar = end``; ``floor`` stands for an ``alpha_bar`` of 0."""
        for time in (min(self._times), max(self._times)):
            if not 0 <= time < self._schedule.T:
                raise UserError(
                    f"timestep {time:g} is not of training: expected 0 to {self._schedule.T - 1}, which stock leaves at some"
                    " numbers of steps; try another"
                )
        alpha_bar = self._schedule.alpha_bar[np.array(self._times, np.int64)]
        alpha_bar = np.append(np.where(alpha_bar == 0, floor, alpha_bar), end)
        return Nodes.preserving(alpha_bar, np.array(self._times), self._schedule.prediction)

    def _table(self, *options: Any) -> Table:
        if options not in self._tables:
            with np.errstate(all="ignore"):
                table = self._build(*options)
            if not np.isfinite(np.delete(table.rows, [Step.LOW0, Step.HIGH0, Step.LOW, Step.HIGH], axis=1)).all():
                raise UserError(
                    f"{table.name} has coefficients that are not finite on these noise levels: expected levels that"
                    " differ, and at zero terminal SNR a prediction type other than epsilon"
                )
            self._tables[options] = table
        return self._tables[options]

    def _run(self, sample: Tensor, *options: Any) -> _Run:
        exact = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (*options, len(sample), sample.device, exact)
        if key not in self._runs:
            with torch.inference_mode(False):  # a later step of the run may need a gradient
                self._runs[key] = self._make_run(self._table(*options), sample, exact)
        return self._runs[key]

    def _make_run(self, table: Table, sample: Tensor, exact: torch.dtype) -> _Run:
        rows, kept = blank(range(len(table))), [Step.A, Step.B, Step.LOW0, Step.HIGH0]
        rows[:, kept], rows[:, Step.Q] = table.rows[:, kept], 1
        both = stack([table, Table(rows, "x0")], exact).to(sample.device, non_blocking=True)
        index = torch.arange(max(2, len(table)), device=sample.device)
        arms = index[:2, None].expand(2, len(sample)).contiguous()
        noisy, slots = bool(table.rows[:, Step.Z].any()), table.slots
        history = sample.new_zeros((slots, *sample.shape), dtype=exact) if slots else None
        return _Run(both, index, arms, noisy, history)

    def _seeds_of(self, sample: Tensor, run: _Run, generator: Generators) -> Tensor:
        if not run.noisy:
            return run.arms[0]
        if self._seeds is None or len(self._seeds) != len(sample) or self._seeds.device != sample.device:
            with torch.inference_mode(False):
                self._seeds = _draw_seeds(len(sample), generator).to(sample.device, non_blocking=True)
        return self._seeds

    def _row_of(self, timestep: Timestep) -> int:
        """See `bdengine.integrations.diffusers`."""
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise UserError(f"timestep has {timestep.numel()} elements: expected one for the whole batch")
            if timestep.untyped_storage().data_ptr() == self._grid.untyped_storage().data_ptr():
                past = int(timestep.storage_offset() - self._grid.storage_offset())
                row, between = divmod(past, self._grid.stride(0))
                if between == 0 and 0 <= row < len(self._times):
                    return row
            if timestep.device.type != "cpu":
                return self._within(self._step_index or 0)
            timestep = timestep.item()
        if timestep not in self._times:
            raise UserError(f"timestep {timestep} is not of this run: expected one of scheduler.timesteps")
        return self._times.index(timestep)

    def _within(self, row: int) -> int:
        if not 0 <= row < len(self._times):
            raise UserError(f"step {row + 1} of a run of {len(self._times)}: expected set_timesteps before another run")
        return row


class Single(Fused):
    """Steps that need no earlier ones: they can be taken in any order."""

    def _step(
        self, m: Tensor, timestep: Timestep, x: Tensor, generator: Generators, return_dict: bool, *options: Any
    ) -> FusedOutput | tuple[Tensor, Tensor]:
        if self.timesteps is not self._grid:
            self.reset()
        row, m, x = self._row_of(timestep), _dense(m), _dense(x)
        if row < (self._step_index or 0):
            self._seeds = None  # this row's noise may have been used
        run = self._run(x, *options)
        seeds = self._seeds_of(x, run, generator)
        after = bdkernels.fused_step(x, m, run.table, run.arms[0], run.rows[row], seeds)
        predict = functools.partial(bdkernels.fused_step, x, m, run.table, run.arms[1], run.rows[row], seeds)
        self._step_index = row + 1
        output = FusedOutput(after, predict)
        return output if return_dict else output.to_tuple()

    def _clipped(self, table: Table) -> Table:
        if self.config.clip_sample:
            table.rows[:, Step.LOW0], table.rows[:, Step.HIGH0] = np.array([-1, 1]) * self.config.clip_sample_range
        return table


class Multistep(Fused):
    """Steps in order, that keep what later ones need; a run that begins in the middle has a table of its own."""

    _options = (0,)
    sigmas: Tensor

    def _levels(self, first: int) -> Nodes:
        """The noise levels from row ``first`` on; those that stock spreads its own way are stock's, in float32."""
        self._check_begun()
        end = 1.0 if self.config.final_sigmas_type == "zero" else float(self._schedule.alpha_bar[0])
        nodes = self._nodes(end, floor=2.0**-24)  # stock's, so that lambda is finite
        alpha, sigma = nodes.alpha, nodes.sigma
        if any(self.config.get(name) for name in _STOCK_LEVELS):
            if len(self.sigmas) != len(sigma):
                raise UserError(
                    f"{len(self._times)} timesteps were assigned to {len(self.sigmas) - 1} noise levels of stock's:"
                    " expected them of set_timesteps"
                )
            kappa = self.sigmas.double().numpy()
            alpha = 1 / np.sqrt(1 + kappa**2)
            sigma = kappa * alpha
        return Nodes(alpha[first:], sigma[first:], nodes.time[first:], nodes.prediction)

    def _step(
        self, m: Tensor, timestep: Timestep, x: Tensor, generator: Generators, return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor]:
        if torch.is_grad_enabled() and (m.requires_grad or x.requires_grad):
            raise UserError(f"{type(self).__name__} keeps no graph over its history: expected torch.no_grad()")
        if self.timesteps is not self._grid:
            self.reset()
        m, x = _dense(m), _dense(x.clone())
        if self._step_index is None:
            self._first = self._within(self._row_of(timestep) if self._begin_index is None else self._begin_index)
            self._current = self._run(x, self._first)
            self._step_index = self._first
        row, run = self._within(self._step_index) - self._first, self._current
        seeds = self._seeds_of(x, run, generator)
        bdkernels.fused_step_(x, m, run.table, run.arms[0], run.rows[row], seeds, history=run.history)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
