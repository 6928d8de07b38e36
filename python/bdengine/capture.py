"""Work on a GPU as a CUDA graph, replayed: no launch and nothing read back by the host. `captured` makes one of any step.

The sampling loop is one graph a step, replayed for every row:

    once a batch    x := start (gamma eps(seed) + r),  row := 0
    each row        m = network(scale[row] x, time[row]);  x = fused_step(x, m) of row;  row := row + 1

The row is a number in device memory that the step itself advances, so one graph of one step serves all of them. Everything
else that a batch brings (seeds, arms, tables, triggers) is written into the same buffers before the first replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bdkernels
from bdkernels import NO_BAD_ROW

from .arms import Arms
from .errors import UserError
from .networks import Network, split_spread

WARM_UP = 3
"""Steps before the capture: kernels are compiled and libraries choose their algorithms in the first."""


def captured(
    step: Callable[[], None], device: torch.device, before: Callable[[], object] = lambda: None
) -> Callable[[], None]:
    """``step`` as a graph, captured after `WARM_UP` on a stream of their own, as `torch.cuda.graphs` asks for.

    Args:
        step: Reads and writes the same buffers in each call, and reads nothing back.
        device: Where they are; another may be the current one.
        before: Called before each step of the warm-up.
    """
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                before()
                step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            step()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


def check_device(device: torch.device) -> None:
    """Refuse to capture where there is no CUDA.

    Raises:
        UserError: Naming the device.
    """
    if device.type != "cuda":
        raise UserError(f"capture was asked for on the device {device.type}: expected a CUDA device")


class Loop:
    """The loop of batches of one size, in buffers of its own.

    Args:
        network: See `bdengine.networks.Network`.
        arms: Without nonlinear rows.
        count: Samples in a batch.
        capture: Replay a CUDA graph; else run the same steps one after the other.
    """

    @torch.inference_mode()
    def __init__(self, network: Network, arms: Arms, count: int, capture: bool) -> None:
        device, shape = arms.table.device, network.sample_shape
        self.network, self.arms = network, arms
        self.arm, self.seeds = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
        self.x, self.trigger = (torch.zeros(count, *shape, device=device) for _ in range(2))
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.bad_row = torch.full((), NO_BAD_ROW, dtype=torch.int64, device=device)
        self.scale, self.time = (torch.zeros(arms.table.shape[1], count, device=device) for _ in range(2))
        history = self.x.new_zeros((arms.slots, *self.x.shape)) if arms.slots else None
        self.inside = arms.inside(self.arm)
        self.bound = bdkernels.bind_step(
            self.x, arms.table, self.arm, self.row, self.seeds, trigger=self.trigger if arms.with_trigger else None,
            history=history, bad_row=self.bad_row, **self.inside,
        )  # fmt: skip
        self.advance: Callable[[], None] = captured(self._advance, device, self.row.zero_) if capture else self._advance

    def _advance(self) -> None:
        scaled = self.x
        if self.arms.with_scale:
            scaled = self.x * self.scale.index_select(0, self.row).reshape(-1, 1, 1, 1)
        m = self.network(scaled, self.time.index_select(0, self.row)[0])
        self.bound(split_spread(m, self.x.shape[1])[0], 0)
        self.row.add_(1)

    @torch.inference_mode()
    def __call__(self, arm: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """One batch.

        Args:
            arm: int64 [count].
            seeds: int64 [count].

        Returns:
            ``x``, float32 [count, C, H, W], overwritten by the next batch; and the first bad row, int64 0-d.
        """
        arms = self.arms
        self.arm.copy_(arm)
        self.seeds.copy_(seeds)
        self.trigger.copy_(arms.operand(arm, seeds))
        for name, value in arms.inside(arm).items():
            self.inside[name].copy_(value)
        for buffer, value in zip((self.scale, self.time), arms.told(arm), strict=True):
            buffer.copy_(value)
        self.x.copy_(arms.begin(arm, seeds))
        self.row.zero_()
        self.bad_row.fill_(NO_BAD_ROW)
        for _ in range(arms.table.shape[1]):
            self.advance()
        return self.x, self.bad_row
