"""Schedulers for stock diffusers pipelines: the configuration and timesteps are stock's, a step is one `bdkernels` call.

    pipeline.scheduler = FusedDDPMScheduler.from_config(pipeline.scheduler.config)

Each class is its stock class with another ``step``: a row of the sampler's table, from betas in float64, on the timesteps
that ``set_timesteps`` made. What a table cannot do is refused by the constructor or by ``set_timesteps``.

Noise has stock's law but not its numbers: it is a function of a 64-bit seed a sample (`bdkernels.noise`). A run begins at
``set_timesteps``; its first step that adds noise draws ``seed = torch.randint(-2**63, 2**63 - 1, (1,))`` for each sample,
from torch's default CPU generator (None), from the one given, or, of a list, from the sample's own. So image ``k`` of a
list is the same whatever its batch. A sampler without noise draws nothing.

``step`` reads nothing back to the host. A timestep that is a view of ``scheduler.timesteps``, as any loop over it or a part
of it gives, has its row by its place in memory; a number or a CPU tensor by its value; any other tensor is the one
after the last.

A saved pipeline names this module and loads where it can be imported; stock reads the scheduler's folder as its own.
``DDIMPipeline`` makes any scheduler a stock one when it is built, also when it is loaded: set its scheduler afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

# A pipeline loads a class of another module only where that module names this base class too.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

import bdkernels
from bdkernels import Step

from ..errors import UserError
from ..schedule import Schedule
from ..solvers import Nodes, Table, ddim, ddpm, dpm_multistep, stack, unipc
from ..solvers.dpm import Variant
from ..solvers.table import blank

Generators = torch.Generator | Sequence[torch.Generator] | None
Timestep = float | Tensor

_VARIANTS: Final[dict[str, Variant]] = {"dpmsolver": "dpm", "dpmsolver++": "dpm++", "sde-dpmsolver++": "sde-dpm++"}
_FIXED: Final = ("fixed_small", "fixed_small_log", "fixed_large")
_STOCK_LEVELS: Final = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_MULTISTEP: Final = {
    "thresholding": (False,),
    "solver_order": (1, 2, 3),
    "lower_order_final": (True,),
    "use_flow_sigmas": (False,),
}


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


def _then(method: Callable[..., None], after: Callable[[Any], None]) -> Any:
    """``method``, its signature too (pipelines and ``from_config`` read it), and then ``after``."""

    @functools.wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        after(self)

    return both


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


def _refuse_noise(variance_noise: Any) -> None:
    if variance_noise is not None:
        raise UserError("variance_noise was given: expected none, since noise is made from seeds")


class _Fused:
    """Tables by their options, and the seeds and rows of one run."""

    config: Any
    timesteps: Tensor
    _allowed: ClassVar[Mapping[str, Sequence[Any]]]
    _options: tuple[Any, ...] = ()
    _begin_index: int | None = None
    _step_index: int | None

    def _build(self, *options: Any) -> Table:
        raise NotImplementedError

    def _reset(self) -> None:
        for name, values in self._allowed.items():
            if name in self.config and self.config[name] not in values:
                choices = " or ".join(map(repr, values))
                raise UserError(f"{name} is {self.config[name]!r} with {type(self).__name__}: expected {choices}")
        self._schedule = Schedule.from_config(self.config)
        self._times: list[float] = self.timesteps.tolist()  # here, so that `step` reads nothing back
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._runs: dict[tuple[Any, ...], _Run] = {}
        self._seeds: Tensor | None = None
        self._step_index = None

    def _begin(self) -> None:
        self._reset()
        self._table(*self._options)

    def _nodes(self, end: float, floor: float = 0.0) -> Nodes:
        """At the timesteps and then at ``alpha_bar = end``; ``floor`` stands for an ``alpha_bar`` of 0."""
        for time in (min(self._times), max(self._times)):
            if not 0 <= time < self._schedule.T:
                raise UserError(f"timestep {time:g} is not of training: expected 0 to {self._schedule.T - 1}")
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
            table = self._table(*options)
            rows, kept = blank(range(len(table))), [Step.A, Step.B, Step.LOW0, Step.HIGH0]
            rows[:, kept], rows[:, Step.Q] = table.rows[:, kept], 1
            both = stack([table, Table(rows, "x0")], exact).to(sample.device, non_blocking=True)
            index = torch.arange(max(2, len(table)), device=sample.device)
            arms = index[:2, None].expand(2, len(sample)).contiguous()
            noisy, slots = bool(table.rows[:, Step.Z].any()), table.slots
            history = sample.new_zeros((slots, *sample.shape), dtype=exact) if slots else None
            self._runs[key] = _Run(both, index, arms, noisy, history)
        return self._runs[key]

    def _seeds_of(self, sample: Tensor, run: _Run, generator: Generators) -> Tensor:
        if not run.noisy:
            return run.arms[0]
        if self._seeds is None or len(self._seeds) != len(sample) or self._seeds.device != sample.device:
            self._seeds = _draw_seeds(len(sample), generator).to(sample.device, non_blocking=True)
        return self._seeds

    def _row_of(self, timestep: Timestep) -> int:
        """See the module."""
        if isinstance(timestep, Tensor):
            memory = self.timesteps.untyped_storage().data_ptr()
            if timestep.numel() == 1 and timestep.untyped_storage().data_ptr() == memory:
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
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


class _Single(_Fused):
    """Steps that need no earlier ones: they can be taken in any order."""

    def _step(
        self, m: Tensor, timestep: Timestep, x: Tensor, generator: Generators, return_dict: bool, *options: Any
    ) -> FusedOutput | tuple[Tensor, Tensor]:
        row, m, x = self._row_of(timestep), _dense(m), _dense(x)
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


class _Multistep(_Fused):
    """Steps in order, that keep what later ones need; a run that begins in the middle has a table of its own."""

    _options = (0,)
    num_inference_steps: int | None
    sigmas: Tensor

    def _levels(self, first: int) -> Nodes:
        """The noise levels from row ``first`` on; those that stock spreads its own way are stock's, in float32."""
        if self.num_inference_steps is None:
            raise UserError("step was called on a new scheduler: expected set_timesteps first")
        end = 1.0 if self.config.final_sigmas_type == "zero" else float(self._schedule.alpha_bar[0])
        nodes = self._nodes(end, floor=2.0**-24)  # stock's, so that lambda is finite
        alpha, sigma = nodes.alpha, nodes.sigma
        if any(self.config.get(name) for name in _STOCK_LEVELS):
            kappa = self.sigmas.double().numpy()
            alpha = 1 / np.sqrt(1 + kappa**2)
            sigma = kappa * alpha
        return Nodes(alpha[first:], sigma[first:], nodes.time[first:], nodes.prediction)

    def _step(
        self, m: Tensor, timestep: Timestep, x: Tensor, generator: Generators, return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor]:
        if torch.is_grad_enabled() and (m.requires_grad or x.requires_grad):
            raise UserError(f"{type(self).__name__} keeps no graph over its history: expected torch.no_grad()")
        m, x = _dense(m), _dense(x).clone()
        if self._step_index is None:
            self._first = self._within(self._row_of(timestep) if self._begin_index is None else self._begin_index)
            self._current = self._run(x, self._first)
            self._step_index = self._first
        row, run = self._within(self._step_index) - self._first, self._current
        seeds = self._seeds_of(x, run, generator)
        bdkernels.fused_step_(x, m, run.table, run.arms[0], run.rows[row], seeds, history=run.history)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


class FusedDDPMScheduler(_Single, DDPMScheduler):
    """`diffusers.DDPMScheduler`, fused. The last step, which ends in the data, adds no noise.

    Args:
        Those of the stock class.

    Raises:
        UserError: Thresholding, a learned variance or ``fixed_large_log`` (of which stock makes NaN), or a beta schedule
            or prediction type that `bdengine.schedule` does not know.
    """

    _allowed: ClassVar = {"thresholding": (False,), "variance_type": _FIXED}
    __init__ = _then(DDPMScheduler.__init__, _Fused._reset)
    set_timesteps = _then(DDPMScheduler.set_timesteps, _Fused._begin)

    def _build(self) -> Table:
        large = self.config.variance_type == "fixed_large"
        return self._clipped(ddpm(self._nodes(end=1.0), "large" if large else "small"))

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> FusedOutput | tuple[Tensor, Tensor]:
        """One step, not in place.

        Args:
            model_output: What the network returned, in the shape of ``sample``, float32, bfloat16 or float16.
            timestep: The present one; see the module.
            sample: float32, bfloat16, float16 or float64 [N, C, H, W].
            generator: Where the run's seeds come from; see the module.
            return_dict: Return a `FusedOutput`, else its two tensors.

        Raises:
            UserError: A timestep that is not of this run, or a list of generators of another length.
            TypeError, ValueError: Tensors that `bdkernels.fused_step` refuses.
        """
        return self._step(model_output, timestep, sample, generator, return_dict)


class FusedDDIMScheduler(_Single, DDIMScheduler):
    """`diffusers.DDIMScheduler`, fused. A step leads to the next timestep of the grid.

    Stock's leads to ``t - T // n``: the same with leading spacing or where ``n`` divides ``T``, off the grid elsewhere.

    Args:
        Those of the stock class.

    Raises:
        UserError: Thresholding, or a beta schedule or prediction type that `bdengine.schedule` does not know.
    """

    _allowed: ClassVar = {"thresholding": (False,)}
    _options = (0.0,)
    __init__ = _then(DDIMScheduler.__init__, _Fused._reset)
    set_timesteps = _then(DDIMScheduler.set_timesteps, _Fused._begin)

    def _build(self, eta: float) -> Table:
        end = 1.0 if self.config.set_alpha_to_one else float(self._schedule.alpha_bar[0])
        return self._clipped(ddim(self._nodes(end), eta))

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: None = None,
        return_dict: bool = True,
    ) -> FusedOutput | tuple[Tensor, Tensor]:
        """As `FusedDDPMScheduler.step`.

        Args:
            eta: Share of noise, 0 to 1.
            use_clipped_model_output: Refused where true.
            variance_noise: Refused where given.

        Raises:
            UserError: Also one of these, or ``eta`` outside 0..1.
        """
        if use_clipped_model_output:
            raise UserError("use_clipped_model_output is True: expected False, the network's own noise")
        _refuse_noise(variance_noise)
        return self._step(model_output, timestep, sample, generator, return_dict, float(eta))


class FusedDPMSolverMultistepScheduler(_Multistep, DPMSolverMultistepScheduler):
    """`diffusers.DPMSolverMultistepScheduler`, fused: dpmsolver++, sde-dpmsolver++ and dpmsolver, order 1 to 3.

    Stock's sde-dpmsolver++ of order 3 has a wrong sign; here it is mended. A run that begins in the middle counts its own
    steps, not all timesteps, where fewer than 15 lower the last orders.

    Args:
        Those of the stock class.

    Raises:
        UserError: Thresholding, a learned variance, sde-dpmsolver, flow sigmas, ``lower_order_final=False``,
            ``euler_at_final``, or a beta schedule or prediction type that `bdengine.schedule` does not know.
    """

    _allowed: ClassVar = {
        **_MULTISTEP,
        "variance_type": (None, *_FIXED, "fixed_large_log"),
        "algorithm_type": tuple(_VARIANTS),
        "euler_at_final": (False,),
    }
    __init__ = _then(DPMSolverMultistepScheduler.__init__, _Fused._reset)
    set_timesteps = _then(DPMSolverMultistepScheduler.set_timesteps, _Fused._begin)

    def _build(self, first: int) -> Table:
        variant = _VARIANTS[self.config.algorithm_type]
        return dpm_multistep(self._levels(first), self.config.solver_order, variant, self.config.solver_type)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """As `FusedDDPMScheduler.step`, in order; the first begins at ``set_begin_index``'s row or the timestep's.

        Args:
            variance_noise: Refused where given.

        Raises:
            UserError: Also that, a network output that needs a gradient, or a step past the last.
        """
        _refuse_noise(variance_noise)
        return self._step(model_output, timestep, sample, generator, return_dict)


class FusedUniPCMultistepScheduler(_Multistep, UniPCMultistepScheduler):
    """`diffusers.UniPCMultistepScheduler`, fused: bh1 and bh2, over ``x0`` or the noise, order 1 to 3.

    Args:
        Those of the stock class.

    Raises:
        UserError: Thresholding, a disabled corrector, another predictor, flow sigmas, ``lower_order_final=False``, or a
            beta schedule or prediction type that `bdengine.schedule` does not know.
    """

    _allowed: ClassVar = {**_MULTISTEP, "disable_corrector": ([],), "solver_p": (None,)}
    __init__ = _then(UniPCMultistepScheduler.__init__, _Fused._reset)
    set_timesteps = _then(UniPCMultistepScheduler.set_timesteps, _Fused._begin)

    def _build(self, first: int) -> Table:
        config = self.config
        return unipc(self._levels(first), config.solver_order, config.solver_type, noise=not config.predict_x0)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """As `FusedDPMSolverMultistepScheduler.step`; UniPC draws no noise."""
        return self._step(model_output, timestep, sample, None, return_dict)
