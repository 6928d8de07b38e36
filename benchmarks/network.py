"""Whole UNets: stock as diffusers has it, stock in channels-last, under `torch.compile`, and accelerated.

    network/forward: out = unet(x, t)      network/training: the gradients of mean out^2 in all weights

The ceiling is torch's wide convolutions of as many operations as the stock network has; Winograd's need fewer, so it can be
passed. The process keeps freed memory (`bdengine.memory`), as the command line does: stock gains from it as well.

Stock's gradients under `torch.compile` have no row on a CPU: there torch 2.13 silently returns 0 for most of the weights (98 of
the digits network's), and would fail the gate. Through our ops it returns them right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bdengine.accelerate import accelerate
from bdengine.memory import keep_freed
from bdengine.networks import CIFAR10, DIGITS16, unet
from bdkernels.testing import at_most_twice_as_wrong

from .bench import CEILING, CPU, CPU_GRAPH, HOST, REFERENCE, Provider, Shape, compiled, in_full

LARGEST_ERROR: Final = 1e-4
"""Of a peer, as a share of the truth's largest value."""
WIDE: Final = 256
ROWS: Final = 256
SIDE: Final = 16
"""Channels, and at most height, and width of the ceiling's image: oneDNN is nearest to the processor's peak there."""
NETWORKS: Final = ((64, 1, 16, 16), (8, 3, 32, 32))
"""The digits' and CIFAR's."""
Form = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Networks:
    """One architecture in every form, with the same weights: CIFAR's for 3 x 32 x 32, the digits' for all else."""

    shape: Shape
    training: bool
    device: torch.device

    def unet(self, layout: torch.memory_format = torch.channels_last, dtype: torch.dtype = torch.float32) -> Any:
        """A new one, diffusers' own."""
        torch.manual_seed(0)
        _, channels, side, _ = self.shape
        options = CIFAR10 if (channels, side) == (3, 32) else DIGITS16 | {"channels": channels, "size": side}
        return unet(**options).to(self.device, dtype=dtype, memory_format=layout)

    def run(self, net: Any, form: Callable[[Form], Form] = lambda f: f) -> Callable[[], Tensor]:
        """What does ``net`` once, in its layout and dtype: its output, or all gradients in one vector."""
        generator, weight = torch.Generator().manual_seed(1), net.conv_in.weight
        layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
        x = torch.randn(self.shape, generator=generator).to(weight.dtype, memory_format=layout)
        t = torch.randint(1000, self.shape[:1] if self.training else (), generator=generator)
        x, t = x.to(self.device), t.to(self.device)
        call = form(lambda x, t: net(x, t, return_dict=False)[0])

        def gradients() -> Tensor:
            net.zero_grad(set_to_none=True)
            call(x, t).square().mean().backward()
            return torch.cat([p.grad.flatten() for p in net.parameters()])

        return gradients if self.training else torch.inference_mode()(lambda: call(x, t))

    @cached_property
    def truth(self) -> Tensor:
        """In float64."""
        return self.run(self.unet(dtype=torch.float64))()

    @cached_property
    def stock(self) -> Tensor:
        """In float32."""
        return in_full(self.run(self.unet()))

    def peer(self, run: Callable[[], Tensor]) -> Provider:
        """Stock in some form, which must be near the truth."""

        def check() -> None:
            error = float((in_full(run) - self.truth).abs().max() / self.truth.abs().max())
            if not error <= LARGEST_ERROR:
                raise AssertionError(f"it is {error:.1e} from float64 truth: expected at most {LARGEST_ERROR:.0e}")

        return Provider(run, check)

    def ours(self, run: Callable[[], Tensor]) -> Provider:
        """Accelerated, which must be at most twice as far from the truth as stock."""

        def check() -> None:
            got = in_full(run)
            if not at_most_twice_as_wrong(got, self.stock, self.truth):
                error, expected = (float((v - self.truth).abs().max()) for v in (got, self.stock))
                raise AssertionError(f"it is {error:.1e} from float64 truth: expected twice stock's {expected:.1e}")

        return Provider(run, check)

    def ceiling(self) -> Provider:
        """As many operations as `stock` has, in convolutions of `WIDE` channels."""
        with FlopCounterMode(display=False) as counter:
            self.run(self.unet())()
        rows = counter.get_total_flops() / (2 * 9 * WIDE**2 * SIDE)
        x = torch.randn(1, WIDE, min(math.ceil(rows), ROWS), SIDE).to(self.device, memory_format=torch.channels_last)
        weight = torch.randn(WIDE, WIDE, 3, 3).to(self.device, memory_format=torch.channels_last)
        times = math.ceil(rows / x.shape[2])
        return Provider(lambda: [functional.conv2d(x, weight, padding=1) for _ in range(times)])


def network(shape: Shape, device: torch.device = HOST, training: bool = False) -> dict[str, Provider]:
    """The providers of a UNet's forward pass at ``shape``, or of its gradients; off the CPU it is not accelerated."""
    keep_freed()
    of = Networks(shape, training, device)
    fast: dict[str, Provider] = {}
    if device.type == "cpu":
        fast = {
            CPU: of.ours(of.run(accelerate(of.unet()))),
            CPU_GRAPH: of.ours(of.run(accelerate(of.unet()), compiled)),
            REFERENCE: of.ours(of.run(accelerate(of.unet()))),
        }
    return {
        "diffusers": of.peer(of.run(of.unet(torch.contiguous_format))),
        "torch": of.peer(of.run(of.unet())),
        **({} if training and device.type == "cpu" else {"compile": of.peer(of.run(of.unet(), compiled))}),
        **fast,
        CEILING: of.ceiling(),
    }


network_training = partial(network, training=True)
"""The providers of the gradients."""
