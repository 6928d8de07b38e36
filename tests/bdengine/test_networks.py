"""UNets as published, one way to call a network, and the batch sizes whose rows do not touch each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bdengine.errors import UserError
from bdengine.networks import CIFAR10, DIGITS16, Network, batch_noise, micro_batch_is_exact, unet


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On images of 64 pixels, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> Network:
    torch.manual_seed(0)
    return Network(unet(8, 1, (8, 16), groups=4).eval())


class Leaky(nn.Module):
    """A network whose rows depend on the rest of the batch (``mean``) or on their place in it (``place``)."""

    def __init__(self, leak: str) -> None:
        super().__init__()
        self.leak = leak

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.leak == "mean":
            return x + x.mean(0)
        return x + torch.arange(len(x)).view(-1, 1, 1, 1) * 1e-3 + t.view(-1, 1, 1, 1)


def test_presets_are_the_published_architectures() -> None:
    with torch.device("meta"):
        cifar, digits = unet(**CIFAR10), unet(**DIGITS16)
    assert sum(p.numel() for p in cifar.parameters()) == 35_746_307
    assert cifar.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    assert cifar.config.up_block_types == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert (cifar.config.freq_shift, cifar.config.flip_sin_to_cos, cifar.config.downsample_padding) == (1, False, 0)
    assert digits.config.block_out_channels == (16, 32, 64)
    assert not [name for name in digits.state_dict() if "attentions" in name]


def test_unet_is_channels_last() -> None:
    net = unet(8, 3, (8, 16), groups=4)
    assert net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((30, 1, (16, 32, 64)), "size 30 with 3 widths; expected a multiple of 4, and the nearest is 32"),
        ((1, 1, (16, 32)), "size 1 with 2 widths; expected a multiple of 2, and the nearest is 2"),
        ((16, 1, (16, 30)), "width 30; expected a multiple of 8 groups, and the nearest is 32"),
        ((16, 1, ()), "a network of 0 widths; expected at least 1"),
    ],
)
def test_unet_refuses_what_cannot_be_built(arguments: tuple[int, int, tuple[int, ...]], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        unet(*arguments)


def test_unet_refuses_a_level_it_does_not_have() -> None:
    with pytest.raises(UserError, match="attention at level 3 of 2; expected 0 for none, or 1 to 2"):
        unet(8, 1, (8, 16), groups=4, attention=3)


def test_network_calls_a_unet(tiny: Network) -> None:
    x = torch.randn(3, 1, 8, 8)
    t = torch.tensor([5, 5, 5])
    with torch.no_grad():
        expected = tiny.unet(x, t).sample
        assert torch.equal(tiny(x, t), expected)
        assert torch.equal(tiny(x, t[0]), expected)
    assert tiny.sample_shape == (1, 8, 8)


def test_network_calls_a_plain_module() -> None:
    network = Network(Leaky("place"), sample_shape=(3, 4, 4))
    x = torch.zeros(2, 3, 4, 4)
    assert torch.equal(network(x, torch.tensor(7)), network(x, torch.tensor([7, 7])))
    with pytest.raises(UserError, match="Leaky does not say its image size"):
        Network(Leaky("place"))


def test_network_copies_only_what_is_not_channels_last(tiny: Network) -> None:
    seen: list[Tensor] = []
    with tiny.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        net = Network(tiny.unet)
        net(x := torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last), torch.tensor(1))
    assert seen[0].data_ptr() == x.data_ptr()


def test_network_has_the_names_of_what_it_wraps(tiny: Network) -> None:
    inner = tiny.unet
    assert list(tiny.state_dict()) == list(inner.state_dict())
    assert [name for name, _ in tiny.named_parameters()] == [name for name, _ in inner.named_parameters()]
    assert [id(p) for p in tiny.parameters()] == [id(p) for p in inner.parameters()]
    other = Network(unet(8, 1, (8, 16), groups=4))
    other.load_state_dict(inner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), tiny.parameters(), strict=True))
    assert not tiny.train().eval().unet.training


def test_micro_batch_check_passes_only_rows_that_stand_alone(tiny: Network) -> None:
    assert micro_batch_is_exact(tiny, 16)
    assert micro_batch_is_exact(tiny, 1)
    for leak in ("mean", "place"):
        assert not micro_batch_is_exact(Network(Leaky(leak), sample_shape=(1, 4, 4)), 8)
    with pytest.raises(UserError, match="batch 0; expected at least 1"):
        micro_batch_is_exact(tiny, 0)


def test_batch_noise_is_the_largest_move(tiny: Network) -> None:
    assert 0 <= batch_noise(tiny) < 1e-5
    place = Network(Leaky("place"), sample_shape=(1, 4, 4))
    assert batch_noise(place, 16, sizes=(1,)) == pytest.approx(15e-3, rel=0.02)
    assert batch_noise(place, 16, sizes=(16,)) == 0.0
