"""Samplers by name; each is a function from `Nodes` to a `Table`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from ..errors import UserError, unknown
from ..schedule import Schedule, Spacing
from .ddim import ddim
from .ddpm import Variance, ddpm
from .deis import deis
from .dpm import Form, dpm_multistep, dpm_singlestep
from .euler import euler, euler_ancestral, heun, lms
from .exploding import Churn, edm, score_sde
from .nodes import Levels, Nodes
from .pndm import RUNGE_KUTTA_STEPS, plms, pndm
from .table import CLIPS, Clip, End, Table, stack
from .unipc import unipc

__all__ = [
    "CLIPS",
    "SAMPLERS",
    "Churn",
    "Clip",
    "Nodes",
    "SamplerConfig",
    "Table",
    "ddim",
    "ddpm",
    "deis",
    "dpm_multistep",
    "dpm_singlestep",
    "edm",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "plms",
    "pndm",
    "score_sde",
    "stack",
    "unipc",
]


@dataclass(frozen=True)
class Kind:
    """What a sampler is.

    Attributes:
        build: Its table on nodes, by a configuration.
        orders: Those it has; empty where it has no choice of one.
        order: The usual one.
        evaluations: Network evaluations of ``n`` steps, as text.
        noise: Whether it draws noise.
        reference: Where it is from.
        halved: Of its first steps, how many need a node in their middle.
    """

    build: Callable[[Nodes, SamplerConfig, int], Table]
    order: int
    orders: tuple[int, ...]
    evaluations: str
    noise: bool
    reference: str
    halved: int = 0


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler, on which grid."""

    name: str = "ddpm"
    """One of those that bdengine samplers lists."""
    steps: int = 1000
    """Steps, 1 to the number of training timesteps; most samplers evaluate the network once a step."""
    spacing: Spacing = "trailing"
    """How the timesteps are spread."""
    eta: float = 0.0
    """Noise of ddim: 0 is deterministic, 1 is ddpm."""
    variance: Variance = "small"
    """Variance of ddpm: the posterior's (small), beta (large), or between them where the network says (learned_range)."""
    order: int | None = None
    """Order of a solver that has several; its usual one where absent."""
    levels: Levels = "native"
    """Noise levels: the schedule's own on the grid, or as many spread by Karras's rule or evenly in log-SNR."""
    end: End = "zero"
    """Where the last step leads: to the data, or to the least noise of training."""
    form: Form = "midpoint"
    """Form of DPM-Solver's orders 2 and 3."""

    def table(self, schedule: Schedule, first: int | None = None) -> Table:
        """Its table; from the first of its timesteps that is not above ``first`` on.

        Raises:
            UserError: An unknown name, or a value out of range.
        """
        if self.name not in SAMPLERS:
            raise unknown("sampler", self.name, SAMPLERS)
        kind = SAMPLERS[self.name]
        if self.name != "ddim" and self.eta != 0:
            raise UserError(f"eta is {self.eta:g} with {self.name}: expected ddim, the sampler whose noise eta scales")
        order = kind.order if self.order is None else self.order
        if self.order is not None and order not in kind.orders:
            choice = f"one of {', '.join(map(str, kind.orders))}" if kind.orders else "none, since it has one only"
            raise UserError(f"the order is {order} with {self.name}: expected {choice}")
        nodes = Nodes.of(schedule, self.steps, self.spacing, self.levels, self.end, kind.halved, first)
        table = kind.build(nodes, self, order)
        return table if first is None else replace(table, start=float(nodes.sigma[0]))


_DPM, _DPMPP = "Lu et al. 2022, DPM-Solver", "Lu et al. 2022, DPM-Solver++"
_KARRAS = "Karras et al. 2022"
SAMPLERS: Final[dict[str, Kind]] = {
    "ddpm": Kind(lambda n, c, _: ddpm(n, c.variance), 1, (), "n", True, "Ho et al. 2020"),
    "ddim": Kind(lambda n, c, _: ddim(n, c.eta), 1, (), "n", False, "Song et al. 2021"),
    "dpm": Kind(lambda n, c, o: dpm_multistep(n, o, "dpm", c.form), 2, (1, 2, 3), "n", False, _DPM),
    "dpm-single": Kind(lambda n, c, o: dpm_singlestep(n, o, "dpm", c.form), 3, (1, 2, 3), "n", False, _DPM),
    "dpm++": Kind(lambda n, c, o: dpm_multistep(n, o, "dpm++", c.form), 2, (1, 2, 3), "n", False, _DPMPP),
    "dpm++-single": Kind(lambda n, c, o: dpm_singlestep(n, o, "dpm++", c.form), 2, (1, 2, 3), "n", False, _DPMPP),
    "sde-dpm++": Kind(lambda n, c, o: dpm_multistep(n, o, "sde-dpm++", c.form), 2, (1, 2, 3), "n", True, _DPMPP),
    "unipc": Kind(lambda n, _, o: unipc(n, o, "bh2"), 2, (1, 2, 3), "n", False, "Zhao et al. 2023"),
    "unipc-bh1": Kind(lambda n, _, o: unipc(n, o, "bh1"), 2, (1, 2, 3), "n", False, "Zhao et al. 2023"),
    "plms": Kind(lambda n, *_: plms(n), 4, (), "n + 1", False, "Liu et al. 2022"),
    "pndm": Kind(lambda n, *_: pndm(n), 4, (), "n + 9", False, "Liu et al. 2022", RUNGE_KUTTA_STEPS),
    "deis": Kind(lambda n, _, o: deis(n, o), 2, (1, 2, 3), "n", False, "Zhang and Chen 2023"),
    "heun": Kind(lambda n, *_: heun(n), 2, (), "2n - 1", False, _KARRAS),
    "lms": Kind(lambda n, _, o: lms(n, o), 4, (1, 2, 3, 4), "n", False, "k-diffusion"),
    "euler": Kind(lambda n, *_: euler(n), 1, (), "n", False, _KARRAS),
    "euler-ancestral": Kind(lambda n, *_: euler_ancestral(n), 1, (), "n", True, "k-diffusion"),
}
"""Every sampler by its name on the command line."""
