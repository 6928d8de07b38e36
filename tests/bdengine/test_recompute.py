"""Gradient checkpointing: the same bits for less memory, in stock and accelerated networks and under autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdengine.accelerate import accelerate
from bdengine.errors import UserError
from bdengine.networks import Network, recompute, unet

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"size": 16, "channels": 1, "widths": (16, 32, 64)},
    "attention": {
        "size": 8,
        "channels": 3,
        "widths": (16, 32),
        "layers": 2,
        "attention": 2,
        "attention_head_dim": None,
    },
    "scale-shift": {"size": 8, "channels": 3, "widths": (16, 32), "resnet_time_scale_shift": "scale_shift"},
}


def gradients(network: Network, precision: torch.dtype) -> tuple[int, list[Tensor | None]]:
    """Bytes kept for the backward pass, and what it makes."""
    generator, kept = torch.Generator().manual_seed(1), 0
    x = torch.randn(8, *network.sample_shape, generator=generator)
    t = torch.randint(1000, (8,), generator=generator)

    def pack(v: Tensor) -> Tensor:
        nonlocal kept
        kept += v.numel() * v.element_size() * (not isinstance(v, nn.Parameter))
        return v

    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
    with half, torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        loss = network(x, t).float().square().mean()
    loss.backward()
    return kept, [p.grad for p in network.parameters()]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fast", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_keep_their_bits(kind: str, fast: bool, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    net = unet(**KINDS[kind], groups=4)
    plain = Network(accelerate(net) if fast else net).train()
    again = copy.deepcopy(plain)
    recompute(again)
    (kept, expected), (less, got) = gradients(plain, precision), gradients(again, precision)
    assert less < 0.7 * kept
    for a, b in zip(expected, got, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_other_networks_are_refused() -> None:
    with pytest.raises(UserError, match="checkpointing was asked for in a Linear: expected a UNet2DModel"):
        recompute(Network(nn.Linear(4, 4), (1, 2, 2)))
