"""The order of a sum over micro-batches and ranks, and the gradient as one vector."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bdengine.gradient import Gradient, flattened, in_pairs


def parts(count: int) -> list[Tensor]:
    return list(torch.randn(count, 1000, generator=torch.Generator().manual_seed(count)))


def test_pairs_of_pairs() -> None:
    a, b, c, d, e, f, g = parts(7)
    assert in_pairs([a]) is a
    assert torch.equal(in_pairs([a, b, c]), (a + b) + c)
    assert torch.equal(in_pairs([a, b, c, d, e, f, g]), ((a + b) + (c + d)) + ((e + f) + g))
    assert not torch.equal(in_pairs([a, b, c, d]), ((a + b) + c) + d)


@pytest.mark.parametrize(("ranks", "each"), [(r, e) for r in (1, 2, 3, 5, 6, 8) for e in (1, 2, 4)])
def test_ranks_with_a_power_of_two_each_leave_the_bits_of_one(ranks: int, each: int) -> None:
    whole = parts(ranks * each)
    shares = (in_pairs(whole[r * each : (r + 1) * each]) for r in range(ranks))
    assert torch.equal(in_pairs(shares), in_pairs(whole))


def test_three_each_have_an_order_of_their_own() -> None:
    whole = parts(6)
    assert not torch.equal(in_pairs([in_pairs(whole[:3]), in_pairs(whole[3:])]), in_pairs(whole))


def test_the_vector_is_each_weights_gradient_in_its_own_layout() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8)
    losses = [net(one[None]).square().mean() for one in x]
    expected = torch.autograd.grad(in_pairs([net(one[None]).square().mean() for one in x]), [*net.parameters()])
    gradient = Gradient([*net.parameters()])
    gradient.of(iter(losses))
    assert torch.equal(gradient.loss, in_pairs([loss.detach() for loss in losses]))
    for p, g in zip(net.parameters(), expected, strict=True):
        assert p.grad is not None
        assert p.grad.stride() == p.stride()
        assert p.grad.untyped_storage().data_ptr() == gradient.vector.untyped_storage().data_ptr()
        assert torch.allclose(p.grad, g, rtol=1e-5, atol=1e-7)
    assert sum(p.numel() for p in net.parameters()) + 1 == len(gradient.vector)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_that_were_taken_away_are_found_again(count: int) -> None:
    weight = nn.Parameter(torch.ones(3))
    gradient = Gradient([weight])
    for _ in range(2):
        gradient.of((weight**2).sum() for _ in range(count))
        assert gradient.vector.tolist() == [2.0 * count] * 3 + [3.0 * count]
        weight.grad = None


def test_flattened_weights_are_places_of_one_tensor_that_keep_value_and_layout() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    before, strides = [p.detach().clone() for p in net.parameters()], [p.stride() for p in net.parameters()]
    vector = flattened(net.parameters())
    assert vector.shape == (3 * 8 * 9 + 8,)
    assert [p.stride() for p in net.parameters()] == strides
    assert all(map(torch.equal, net.parameters(), before))
    with torch.no_grad():
        vector.mul_(2)
    assert all(torch.equal(p, 2 * b) for p, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_is_torchs(limit: float) -> None:
    weights = [nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in (7, 30)]
    gradient = Gradient(weights)
    gradient.of([sum((w**3).sum() for w in weights)])
    loss, before = gradient.loss.clone(), [w.grad.clone() for w in weights]
    gradient.clip(limit)
    assert torch.equal(gradient.loss, loss)
    clipped = [nn.Parameter(w.detach().clone()) for w in weights]
    for w, g in zip(clipped, before, strict=True):
        w.grad = g
    nn.utils.clip_grad_norm_(clipped, limit)
    for a, b in zip(weights, clipped, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-6)
