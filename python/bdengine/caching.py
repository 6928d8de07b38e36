"""Sampling with a UNet whose deep blocks run at every k-th step alone (DeepCache: Ma, Fang and Wang 2023, arXiv 2312.00858).

    k-th call of a loop:   h = up(mid(down(first(x))));  m = last(h, first(x))       h is kept
    calls between:                                       m = last(h, first(x))

``first`` and ``last`` are the blocks at full resolution. Deep features change slowly from step to step where steps are small; a
solver of few steps has none to spare. The images are others, so nothing is reused unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .errors import UserError
from .networks import Network


class Cached(Network):
    """``network``, whose UNet it changes in place. A `Sampler` says where a loop begins, any other caller by `begin`.

    Args:
        network: Of a diffusers UNet with two resolutions or more.
        every: Calls from one run of the deep blocks to the next; at 1 nothing is reused.

    Raises:
        UserError: Another network, or ``every`` below 1.
    """

    def __init__(self, network: Network, every: int) -> None:
        unet: Any = network.unet
        if every < 1:
            raise UserError(f"deep blocks at every {every}-th step: expected at least 1")
        if len(getattr(unet, "down_blocks", ())) < 2:
            raise UserError(f"a {type(unet).__name__} has no deep blocks to reuse: expected a UNet of two resolutions")
        super().__init__(unet, network.sample_shape, network.autocast)
        self.every, self.calls = every, 0
        for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
            block.forward = self._kept(block.forward)

    def _kept(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        out: Any = None

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal out
            if self.calls % self.every == 0:
                out = forward(*args, **kwargs)
            return out

        return run

    def begin(self) -> None:
        """The next call is the first of a loop."""
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As `Network.forward`."""
        out = super().forward(x, t)
        self.calls += 1
        return out
