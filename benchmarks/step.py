"""`bdkernels.fused_step_` on one DDPM row of 1,000, with the predicted ``x0`` clipped, in the middle of a loop.

    x' = P x + Q clamp(A x + B m, -1, 1) + Z z

All providers start from the same warm buffers. Ours works in place, as its loop does; the peers return a new tensor,
as theirs do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

import bdkernels
from bdengine.schedule import linear
from bdengine.solvers import Nodes, ddpm, stack
from bdkernels import Step, reference, testing
from bdkernels.noise import STREAM_STEP, normal

from .bench import (
    CEILING,
    HOST,
    REFERENCE,
    Provider,
    Shape,
    assert_close,
    assert_standard_normal,
    compiled,
    moved,
    ours,
    seeds_of,
)

ROWS, ROW = 1000, 500
COLUMNS = [Step.A, Step.B, Step.P, Step.Q, Step.Z]


def by_hand(x: Tensor, m: Tensor, z: Tensor, row: Sequence[float] | Sequence[Tensor]) -> Tensor:
    """The formula, with ``row`` its five coefficients."""
    a, b, p, q, sigma = row
    return p * x + q * (a * x + b * m).clamp(-1, 1) + sigma * z


def indexed(x: Tensor, m: Tensor, table: Tensor, step: Tensor) -> Tensor:
    """`by_hand` with its own noise and its coefficients looked up by a 0-d step: one graph serves a whole loop."""
    return by_hand(x, m, torch.randn_like(x), table.index_select(0, step)[0].unbind())


def fused_step_bytes(shape: Shape) -> int:
    """Of ``x`` and ``m``, read, and ``x'``, written."""
    return 3 * 4 * math.prod(shape)


def fused_step(shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of `bdkernels.fused_step_` at ``shape``."""
    drawn = torch.Generator().manual_seed(0)
    sampler = ddpm(Nodes.of(linear(), ROWS)).clipped("x0")
    coefficients = sampler.rows[:, COLUMNS]
    row = coefficients[ROW].tolist()
    on_host: dict[str, Any] = {
        "x": torch.randn(shape, generator=drawn),
        "model_output": torch.randn(shape, generator=drawn),
        "table": stack([sampler]),
        "arm": torch.zeros(shape[0], dtype=torch.int64),
        "step": torch.tensor(ROW),
        "seeds": seeds_of(shape[0]),
    }
    case = moved(on_host, device)
    x, m, step = case["x"], case["model_output"], case["step"]
    table, generator = torch.tensor(coefficients, dtype=torch.float32, device=device), torch.Generator(device)
    absent: dict[str, Any] = dict.fromkeys(("trigger", "region", "arm_inside", "history"))
    scheduler: Any = DDPMScheduler(clip_sample=True)
    scheduler.set_timesteps(ROWS)
    timestep = scheduler.timesteps[ROW]
    compiled_step = compiled(indexed)

    def stock() -> Tensor:
        return scheduler.step(m, timestep, x, generator=generator).prev_sample

    def hand() -> Tensor:
        return by_hand(x, m, torch.randn_like(x), row)

    def truth(z: Tensor) -> Tensor:
        return by_hand(x.double(), m.double(), z.double(), row)

    def check_stock() -> None:
        generator.manual_seed(1)
        got = stock()
        assert_close("x'", got, truth(torch.randn(shape, generator=generator.manual_seed(1), device=device)))

    def check_hand() -> None:
        torch.manual_seed(1)
        got = hand()
        torch.manual_seed(1)
        z = torch.randn_like(x)
        assert_standard_normal("its noise", z)
        assert_close("x'", got, truth(z))

    def check_compiled() -> None:
        """Its noise cannot be had from outside: the row without noise, then what the noise adds to it."""
        silent = table.clone()
        silent[:, -1] = 0
        mean = truth(torch.zeros_like(x))
        assert_close("x'", compiled_step(x, m, silent, step), mean)
        assert_standard_normal("its noise", (compiled_step(x, m, table, step) - mean) / row[-1])

    def check_reference() -> None:
        z = torch.from_numpy(normal(on_host["seeds"].numpy(), shape[1:], ROW, STREAM_STEP)).to(device)
        assert_close("x'", reference.fused_step(**case, **absent), truth(z))

    in_place, in_place_reference = case | {"x": x.clone()}, case | absent | {"x": x.clone(), "bad_row": None}
    out = torch.empty_like(x)
    return {
        "diffusers": Provider(stock, check_stock),
        "torch": Provider(hand, check_hand),
        "compile": Provider(lambda: compiled_step(x, m, table, step), check_compiled),
        **dict.fromkeys(
            ours(device),
            Provider(
                lambda: bdkernels.fused_step_(**in_place),
                lambda: testing.assert_matches_reference("fused_step_", on_host | absent, device.type),
            ),
        ),
        REFERENCE: Provider(lambda: reference.fused_step_(**in_place_reference), check_reference),
        CEILING: Provider(lambda: torch.add(x, m, out=out)),
    }
