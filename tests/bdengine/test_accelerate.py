"""The accelerated network is the stock one: values and gradients at most twice as wrong, weights and names untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from bdengine.accelerate import accelerate
from bdengine.networks import Network, unet
from bdkernels.testing import at_most_twice_as_wrong

SMALL: dict[str, Any] = {"size": 16, "channels": 3, "widths": (8, 16, 24), "groups": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention": 2, "layers": 2},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "other activation": {"act_fn": "gelu"},
    "resnet downsampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "scaled": {"mid_block_scale_factor": 2**0.5},
    "sixteens": {"widths": (16, 32, 48), "groups": 8},
    "sixteens, all": {"widths": (16, 32, 48), "groups": 8, "attention": 2, "mid_block_scale_factor": 2**0.5},
}


def networks(options: dict[str, Any]) -> tuple[Network, Network]:
    torch.manual_seed(0)
    stock = unet(**{**SMALL, **options})
    return Network(copy.deepcopy(stock)), Network(accelerate(stock))


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 16, 16, generator=g), torch.tensor([3.0, 500.0, 999.0, 3.0, 20.0])


@pytest.mark.parametrize("name", list(VARIANTS))
def test_values_and_gradients(name: str) -> None:
    stock, ours = networks(VARIANTS[name])
    truth = Network(copy.deepcopy(stock.unet).double())
    x, t = batch()
    found = []
    for network, dtype in ((truth, torch.float64), (stock, torch.float32), (ours, torch.float32)):
        given = x.to(dtype).requires_grad_()
        out = network(given, t)
        out.square().sum().backward()
        found.append([out.detach(), given.grad, torch.cat([p.grad.flatten() for p in network.parameters()])])
    for what, exact, peer, got in zip(("output", "input", "weights"), *found, strict=True):
        assert at_most_twice_as_wrong(got, peer, exact), what


def test_weights_and_names_stay() -> None:
    stock, ours = networks({})
    assert list(stock.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), ours.state_dict().values(), strict=True))
    ours.load_state_dict(stock.state_dict())
    assert list(dict(ours.named_parameters())) == list(dict(stock.named_parameters()))


def test_a_large_batch_stays_channels_last() -> None:
    """Stock turns batches of 64 and more into the other layout and back at each upsampling."""
    stock, ours = networks({})
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        a, b = stock(x, torch.tensor(7.0)), ours(x, torch.tensor(7.0))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert b.is_contiguous(memory_format=torch.channels_last)


def test_autocast() -> None:
    stock, ours = networks(VARIANTS["sixteens, all"])
    stock.autocast = ours.autocast = torch.bfloat16
    x, t = batch()
    expected, got = stock(x, t), ours(x, t)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_copies_run_on_their_own_weights() -> None:
    """As training's moving average does."""
    _, ours = networks(VARIANTS["sixteens"])
    x, t = batch()
    expected, other = ours(x, t), copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(other(x, t), expected)
    assert not ours(x, t).any()


def test_one_time_for_all() -> None:
    """A number, a tensor without dimensions, of one element, or one that is expanded: as stock takes them."""
    stock, ours = networks(VARIANTS["sixteens, all"])
    x, _ = batch()
    truth = Network(copy.deepcopy(stock.unet).double())(x.double(), torch.tensor(30.0))
    expected = stock(x, torch.tensor(30))
    for t in (30, torch.tensor(30), torch.tensor([30]), torch.tensor(30.0).expand(5), torch.full((5,), 30)):
        out = ours.unet(x, t).sample
        assert torch.equal(out, ours.unet(x, t, return_dict=False)[0])
        assert at_most_twice_as_wrong(out, expected, truth)
