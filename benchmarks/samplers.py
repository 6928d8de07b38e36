"""Every sampler's step, the solver's arithmetic without the network: the stock scheduler against `bdkernels.bind_step`.

One call is one row of a 20-step loop with a fixed model output, and a measurement is a whole loop, which begins anew
inside of its first call: stock's state is put back, ours copies the initial noise. Ours has what `Sampler.batch` hands the
kernel; stock's ``scale_model_input``, which the schedulers in sigma space need too, is left out.

The ceiling is the 3-stream add of the step benchmark. A row with history reads and writes up to four more streams, so its
own ceiling is lower by as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from itertools import islice
from typing import Any, Final
from unittest import mock

import diffusers.schedulers as stock
import numpy as np
import torch
from torch import Tensor

import bdkernels
from bdengine.schedule import Floats, linear
from bdengine.solvers import SAMPLERS, Nodes, SamplerConfig, Table, stack
from bdengine.solvers.pndm import RUNGE_KUTTA_STEPS
from bdengine.solvers.table import End
from bdkernels import HISTORY_SLOTS, NO_BAD_ROW, STORE_COLUMNS, STORES, Step, Store
from bdkernels.noise import STREAM_STEP

from .bench import CEILING, HOST, REFERENCE, Provider, Shape, assert_close, ours, seeds_of

STEPS: Final = 20
TOLERANCE: Final = 1e-5
"""Largest root mean square error of a whole loop in float32 against stock's in float64, relative to that of the values.

Single values are held to `bench.PEER_TOLERANCE`: of three million, the worst of sde-dpm++ is 1.1e-5 off in stock's own float32
and 1.3e-5 in ours.
"""

Model = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Stock:
    """The diffusers scheduler that does what one of our samplers does, with its options.

    ``end``: where its last step leads; some of stock's end in NaN, or refuse, when that is the data.
    """

    scheduler: Any
    options: dict[str, Any] = field(default_factory=dict)
    end: End = "zero"

    def make(self) -> Any:
        """A new one, before its first step."""
        scheduler = self.scheduler(beta_start=1e-4, beta_end=0.02, **self.options)
        scheduler.set_timesteps(STEPS)
        scheduler.is_scale_input_called = True
        return scheduler

    def nodes(self) -> Nodes:
        """Its grid."""
        scheduler, process = self.make(), linear()
        times = step_times(scheduler, 0 if scheduler.config.get("skip_prk_steps", True) else RUNGE_KUTTA_STEPS)
        alpha_bar = np.append(process.alpha_bar_at(times), 1.0 if self.end == "zero" else process.alpha_bar[0])
        return Nodes.preserving(alpha_bar, times)


def step_times(scheduler: Any, halved: int = 0) -> Floats:
    """The timesteps of a scheduler's steps, without those of second evaluations, and the middles of the ``halved`` first."""
    times: Floats = np.array(scheduler.timesteps, np.float64)
    if isinstance(scheduler, stock.HeunDiscreteScheduler):
        times = np.append(times[:1], times[1::2])
    if isinstance(scheduler, stock.PNDMScheduler):
        times = np.array(scheduler._timesteps[::-1], np.float64)
    middles = np.floor((times[:halved] + times[1 : halved + 1]) / 2)
    return np.insert(times, np.arange(1, halved + 1), middles)


_TRAILING: Final = {"timestep_spacing": "trailing"}
_LEADING: Final = {"timestep_spacing": "leading"}
_MULTI, _SINGLE = stock.DPMSolverMultistepScheduler, stock.DPMSolverSinglestepScheduler


def _dpm(algorithm: str, order: int, end: End = "zero") -> dict[str, Any]:
    last = "sigma_min" if end == "min" else "zero"
    return {"algorithm_type": algorithm, "solver_order": order, "final_sigmas_type": last}


STOCK: Final = {
    "ddpm": Stock(stock.DDPMScheduler, {**_TRAILING, "clip_sample": False}),
    "ddim": Stock(stock.DDIMScheduler, {**_TRAILING, "clip_sample": False}),
    "dpm": Stock(_MULTI, {**_TRAILING, **_dpm("dpmsolver", 2, "min")}, "min"),
    "dpm-single": Stock(_SINGLE, _dpm("dpmsolver", 3, "min"), "min"),
    "dpm++": Stock(_MULTI, {**_TRAILING, **_dpm("dpmsolver++", 2)}),
    "dpm++-single": Stock(_SINGLE, _dpm("dpmsolver++", 2)),
    "sde-dpm++": Stock(_MULTI, {**_TRAILING, **_dpm("sde-dpmsolver++", 2)}),
    "unipc": Stock(stock.UniPCMultistepScheduler, {**_TRAILING, "solver_type": "bh2"}),
    "unipc-bh1": Stock(
        stock.UniPCMultistepScheduler, {**_TRAILING, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, "min"
    ),
    "plms": Stock(stock.PNDMScheduler, {**_LEADING, "skip_prk_steps": True}, "min"),
    "pndm": Stock(stock.PNDMScheduler, _LEADING, "min"),
    "deis": Stock(stock.DEISMultistepScheduler, _TRAILING, "min"),
    "heun": Stock(stock.HeunDiscreteScheduler, _TRAILING),
    "lms": Stock(stock.LMSDiscreteScheduler, _TRAILING),
    "euler": Stock(stock.EulerDiscreteScheduler, _TRAILING),
    "euler-ancestral": Stock(stock.EulerAncestralDiscreteScheduler, _TRAILING),
}
"""By the name of our sampler, each of its usual order."""


def stock_steps(scheduler: Any, start: Tensor, model: Model) -> Iterator[Tensor]:
    """``x`` after each step of its loop, from ``start`` again and again."""
    timesteps, fresh = list(scheduler.timesteps), dict(vars(scheduler))
    while True:
        # Histories are lists that step() changes in place; everything else it replaces.
        vars(scheduler).update({k: list(v) if isinstance(v, list) else v for k, v in fresh.items()})
        x = start
        for t in timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
            yield x


def our_steps(table: Table, start: Tensor, seeds: Tensor, model: Model) -> Iterator[Tensor]:
    """The same for one of our tables, in place as in `bdengine.sampler.Sampler.batch`."""
    rows, arm = stack([table], start.dtype).to(start.device), torch.zeros_like(seeds)
    x, steps = torch.empty_like(start), torch.arange(len(table), device=start.device)
    history = x.new_zeros((table.slots, *x.shape)) if table.slots else None
    bad_row = torch.full_like(seeds[0], NO_BAD_ROW)
    step = bdkernels.bind_step(x, rows, arm, steps, seeds, history=history, bad_row=bad_row)
    while True:
        x.copy_(start)
        for row, t in enumerate(table.timesteps):
            step(model(x, t), row)
            yield x


def network(x: Tensor, t: float) -> Tensor:
    """Something smooth that needs no weights, for the gate."""
    return torch.sin(x + t / 100) * 0.7


@dataclass(frozen=True)
class Case:
    """One sampler on a batch of ``shape``."""

    name: str
    shape: Shape
    device: torch.device = HOST

    @cached_property
    def table(self) -> Table:
        """Ours, on the scheduler's own grid."""
        kind = SAMPLERS[self.name]
        return kind.build(STOCK[self.name].nodes(), SamplerConfig(self.name), kind.order)

    @cached_property
    def seeds(self) -> Tensor:
        """A seed a sample."""
        return seeds_of(self.shape[0]).to(self.device)

    @cached_property
    def start(self) -> Tensor:
        """The initial noise, float64."""
        return bdkernels.normal(self.seeds, self.shape[1:], dtype=torch.float64)

    def stock_start(self, scheduler: Any) -> Tensor:
        """The initial noise in the scheduler's coordinates: ``x / alpha`` where those are sigma."""
        in_sigma = float(scheduler.init_noise_sigma) != 1
        return self.start / np.sqrt(linear().alpha_bar[int(scheduler.timesteps[0])]) if in_sigma else self.start

    def stock_loop(self, dtype: torch.dtype) -> Tensor:
        """The end of stock's loop, with our noise in place of its own."""
        scheduler = STOCK[self.name].make()
        module = import_module(type(scheduler).__module__)

        def model(x: Tensor, t: Tensor) -> Tensor:
            return network(scheduler.scale_model_input(x, t), float(t))

        x = self.stock_start(scheduler).to(dtype)
        steps = stock_steps(scheduler, x, model)
        for row in range(len(scheduler.timesteps)):

            def noise(*_: Any, row: int = row, **__: Any) -> Tensor:
                z = bdkernels.normal(self.seeds, self.shape[1:], step=row, stream=STREAM_STEP, dtype=torch.float64)
                return z.to(dtype)

            with mock.patch.object(module, "randn_tensor", noise, create=True):
                x = next(steps)
        return x

    @cached_property
    def truth(self) -> Tensor:
        """Stock's loop in float64."""
        return self.stock_loop(torch.float64)

    def check(self, x: Tensor) -> None:
        """The end of a loop against `truth`.

        Raises:
            AssertionError: It is further off than `TOLERANCE` and `bench.PEER_TOLERANCE` allow.
        """
        scale = self.truth.square().mean().sqrt()
        off = (x - self.truth) / scale
        zero = torch.zeros_like(scale)
        assert_close("the end of the loop, root mean square,", off.square().mean().sqrt(), zero, TOLERANCE)
        assert_close("the end of the loop", off, zero)

    def check_ours(self) -> None:
        """The loop of our table, which must also have as many rows as stock has steps."""
        rows, steps = len(self.table), len(STOCK[self.name].make().timesteps)
        if rows != steps:
            raise AssertionError(f"the table has {rows} rows: expected {steps}, as stock has")
        loop = our_steps(self.table, self.start.float(), self.seeds, network)
        self.check(next(islice(loop, rows - 1, None)))


def history_streams(table: Table) -> float:
    """How many history slots a row reads and stores into, over all rows.

    A slot is read once, by whichever terms have it.
    """
    stores = table.rows[:, Step.STORE : Step.STORE + STORES * STORE_COLUMNS].reshape(-1, STORES, STORE_COLUMNS)
    in_step = table.rows[:, Step.H : Step.H + HISTORY_SLOTS] != 0
    in_stores = (stores[:, :, Store.J : Store.J + HISTORY_SLOTS] != 0).any(1)
    return float(((in_step | in_stores).sum() + (stores[:, :, Store.SLOT] >= 0).sum()) / len(table))


def sampler_step_bytes(name: str, shape: Shape) -> float:
    """Of ``x`` and ``m``, read, ``x'``, written, and the history; the mean over the rows."""
    return 4 * math.prod(shape) * (3 + history_streams(Case(name, shape).table))


def sampler_step(name: str, shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of one sampler's step at ``shape``; without a compiled backend ours is the reference."""
    case, scheduler = Case(name, shape, device), STOCK[name].make()
    generator = torch.Generator().manual_seed(0)
    m, out = torch.randn(shape, generator=generator).to(device), torch.empty(shape, device=device)
    start = case.start.float()
    theirs = stock_steps(scheduler, case.stock_start(scheduler).float(), lambda *_: m)
    rows = len(case.table)
    return {
        "diffusers": Provider(partial(next, theirs), lambda: case.check(case.stock_loop(torch.float32)), rows),
        **{
            fused: Provider(
                partial(next, our_steps(case.table, start, case.seeds, lambda *_: m)), case.check_ours, rows
            )
            for fused in ours(device) or (REFERENCE,)
        },
        CEILING: Provider(lambda: torch.add(start, m, out=out), cycle=rows),
    }
