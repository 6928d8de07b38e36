"""The sampler that a checkpoint's own scheduler is, also one that this engine has no table for: read off, or by its formula.

ScoreSdeVeScheduler     sigma_k = sigma_min (sigma_max / sigma_min)^u_k, u even from 1 to sampling_eps; `solvers.score_sde`
                        with its corrector, whose step is not linear
                        as "edm": `solvers.edm` without churn, on Karras's levels between the same two
any other               `Table.from_diffusers`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from .errors import UserError, unknown
from .schedule import Exploding, Schedule
from .solvers import Nodes, SamplerConfig, Table, edm, score_sde
from .solvers.nodes import karras

OWN: Final = "own"
"""The name of this sampler on the command line."""
EDM: Final = "edm"
"""That of EDM's, of score networks: without noise, what VillanDiffusion's coefficient for the solver "ode" is made for."""
_VE: Final = "ScoreSdeVeScheduler"


def is_preserving(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is one of betas, for which the engine's own samplers are."""
    return "beta_schedule" in config or config.get("trained_betas") is not None


def in_unit_range(config: Mapping[str, Any]) -> bool:
    """Whether the images lie in [0, 1] instead of [-1, 1], as in score-SDE's pipeline."""
    return config.get("_class_name") == _VE


def sampler_of(process: Schedule | Exploding, sampler: SamplerConfig) -> Table:
    """The table of the sampler that a model of ``process`` is made for.

    Raises:
        UserError: As `SamplerConfig.table` and `own_table`, or a sampler with betas of a variance-exploding process.
    """
    if isinstance(process, Schedule):
        return sampler.table(process)
    if sampler.name not in (OWN, EDM):
        raise UserError(
            f"the sampler {sampler.name} needs betas and the process is variance exploding: expected {OWN} or {EDM}"
        )
    return own_table(process.to_config(), sampler.steps, sampler.name)


def own_table(config: Mapping[str, Any], steps: int, name: str = OWN) -> Table:
    """The table of the diffusers scheduler that ``config`` describes, or of EDM's sampler on its noise levels.

    Args:
        config: As in ``scheduler_config.json``.
        steps: Of its ``set_timesteps``.
        name: `OWN` or `EDM`.

    Raises:
        UserError: No such scheduler, one that cannot take so many steps, one that no table can say, or none of a score network
            for EDM's.
    """
    import diffusers

    kind = str(config.get("_class_name", "DDPMScheduler")).removeprefix("Fused")
    known = [one for one in dir(diffusers) if one.endswith("Scheduler") and not one.startswith("Flax")]
    if kind not in known:
        raise unknown("diffusers scheduler", kind, known)
    if name == EDM and kind != _VE:
        raise UserError(f"the sampler {EDM} was asked of {kind}: expected a score network's {_VE}, or another sampler")
    if steps < 1:
        raise UserError(f"steps is {steps}: expected at least 1")
    try:
        scheduler = getattr(diffusers, kind).from_config(dict(config))
    except Exception as reason:  # a stranger's values in diffusers' code
        raise UserError(
            f"{kind} cannot be made from the checkpoint's configuration ({reason!r}): expected the arguments that it has"
        ) from reason
    if kind == _VE:
        at = scheduler.config
        if name == EDM:
            return edm(Nodes.exploding(karras(at.sigma_max, at.sigma_min, steps)))
        u = np.linspace(1, at.sampling_eps, steps)
        sigmas = at.sigma_min * (at.sigma_max / at.sigma_min) ** u
        return score_sde(Nodes.exploding(sigmas), corrector_steps=at.correct_steps, snr=at.snr)
    try:
        scheduler.set_timesteps(steps)
    except Exception as reason:  # as above
        raise UserError(
            f"{kind} cannot make {steps} timesteps ({reason!r}): expected another number of steps, or a scheduler for images"
        ) from reason
    return Table.from_diffusers(scheduler)
