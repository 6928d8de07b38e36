"""Schedulers for stock diffusers pipelines: the configuration and timesteps are stock's, a step is one `bdkernels` call.

    pipeline.scheduler = FusedDDPMScheduler.from_config(pipeline.scheduler.config)

Each class is its stock class with another ``step``: a row of the sampler's table, from betas in float64, on the timesteps
that ``set_timesteps`` made or that were assigned since. What a table cannot do is refused by the constructor or by
``set_timesteps``.

Noise has stock's law but not its numbers: it is a function of a 64-bit seed a sample (`bdkernels.noise`). A run begins at
``set_timesteps``, and where DDPM or DDIM steps from a row that is not after the last; its first step that adds noise draws
``seed = torch.randint(-2**63, 2**63 - 1, (1,))`` for each sample, from torch's default CPU generator (None), from the one
given, or, of a list, from the sample's own. So image ``k`` of a list is the same whatever its batch, and no noise is used
twice. A sampler without noise draws nothing.

``step`` reads nothing back to the host. A timestep that is a view of ``scheduler.timesteps``, as any loop over it or a part
of it gives, has its row by its place in memory; a number or a CPU tensor by its value; any other tensor is the one
after the last.

A saved pipeline names this module and loads where it can be imported; stock reads the scheduler's folder as its own.
``DDIMPipeline`` makes any scheduler a stock one when it is built, also when it is loaded: set its scheduler afterwards.
"""

from __future__ import annotations

from typing import ClassVar, Final

from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

# A pipeline loads a class of another module only where that module names this base class too.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..errors import UserError
from ..solvers import Table, ddim, ddpm, dpm_multistep, unipc
from ..solvers.dpm import Variant
from ._fused import Fused, FusedOutput, Generators, Multistep, Single, Timestep, refuse_noise, then

_VARIANTS: Final[dict[str, Variant]] = {"dpmsolver": "dpm", "dpmsolver++": "dpm++", "sde-dpmsolver++": "sde-dpm++"}
_FIXED: Final = ("fixed_small", "fixed_small_log", "fixed_large")
_MULTISTEP: Final = {
    "thresholding": (False,),
    "solver_order": (1, 2, 3),
    "lower_order_final": (True,),
    "use_flow_sigmas": (False,),
}


class FusedDDPMScheduler(Single, DDPMScheduler):
    """`diffusers.DDPMScheduler`, fused. The last step, which ends in the data, adds no noise.

    Args:
        Those of the stock class.

    Raises:
        UserError: Thresholding, a learned variance or ``fixed_large_log`` (of which stock makes NaN), or a beta schedule
            or prediction type that `bdengine.schedule` does not know.
    """

    _allowed: ClassVar = {"thresholding": (False,), "variance_type": _FIXED}
    __init__ = then(DDPMScheduler.__init__, Fused.reset)
    set_timesteps = then(DDPMScheduler.set_timesteps, Fused.begin)

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


class FusedDDIMScheduler(Single, DDIMScheduler):
    """`diffusers.DDIMScheduler`, fused. A step leads to the next timestep of the grid.

    Stock's leads to ``t - T // n``: the same with leading spacing or where ``n`` divides ``T``, off the grid elsewhere.

    Args:
        Those of the stock class.

    Raises:
        UserError: Thresholding, or a beta schedule or prediction type that `bdengine.schedule` does not know.
    """

    _allowed: ClassVar = {"thresholding": (False,)}
    _options = (0.0,)
    __init__ = then(DDIMScheduler.__init__, Fused.reset)
    set_timesteps = then(DDIMScheduler.set_timesteps, Fused.begin)

    def _build(self, eta: float) -> Table:
        self._check_begun()
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
        refuse_noise(variance_noise)
        return self._step(model_output, timestep, sample, generator, return_dict, float(eta))


class FusedDPMSolverMultistepScheduler(Multistep, DPMSolverMultistepScheduler):
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
    __init__ = then(DPMSolverMultistepScheduler.__init__, Fused.reset)
    set_timesteps = then(DPMSolverMultistepScheduler.set_timesteps, Fused.begin)

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
        refuse_noise(variance_noise)
        return self._step(model_output, timestep, sample, generator, return_dict)


class FusedUniPCMultistepScheduler(Multistep, UniPCMultistepScheduler):
    """`diffusers.UniPCMultistepScheduler`, fused: bh1 and bh2, over ``x0`` or the noise, order 1 to 3.

    Args:
        Those of the stock class.

    Raises:
        UserError: Thresholding, a disabled corrector, another predictor, flow sigmas, ``lower_order_final=False``, or a
            beta schedule or prediction type that `bdengine.schedule` does not know.
    """

    _allowed: ClassVar = {**_MULTISTEP, "disable_corrector": ([],), "solver_p": (None,)}
    __init__ = then(UniPCMultistepScheduler.__init__, Fused.reset)
    set_timesteps = then(UniPCMultistepScheduler.set_timesteps, Fused.begin)

    def _build(self, first: int) -> Table:
        config = self.config
        return unipc(self._levels(first), config.solver_order, config.solver_type, noise=not config.predict_x0)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """As `FusedDPMSolverMultistepScheduler.step`; UniPC draws no noise."""
        return self._step(model_output, timestep, sample, None, return_dict)
