"""Networks that need no training."""

from typing import Any

import torch
from torch import Tensor, nn

from bdengine.networks import Network, unet


class Elementwise(nn.Module):
    """Each output pixel depends on its own input pixel and the time alone."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x + t.reshape(-1, 1, 1, 1) / 300) * 0.8


def elementwise(size: int = 8) -> Network:
    return Network(Elementwise(), (1, size, size))


def tiny_unet(size: int = 8, **options: Any) -> Network:
    torch.manual_seed(0)
    return Network(unet(size, 1, (8, 16), groups=4, **options)).eval().requires_grad_(False)
