"""Reused deep features: the formula, when they are made anew, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bdengine.accelerate import accelerate
from bdengine.caching import Cached
from bdengine.cli import main
from bdengine.errors import UserError
from bdengine.networks import Network, unet
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network(accelerate(unet(16, 1, (16, 32, 32), layers=2))).eval().requires_grad_(False)


def call(network: Network, t: int, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    x, times = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(t)), torch.full((count,), t)
    return x, times, network(x, times)


def test_between_the_deep_blocks_are_those_of_the_last_run(network: Network) -> None:
    plain = copy.deepcopy(network).unet
    kept: list[Tensor] = []
    plain.up_blocks[-2].register_forward_hook(lambda _module, _inputs, out: kept.append(out))
    cached = Cached(network, 3)
    x, t, made = call(cached, 900)
    assert torch.equal(made, plain(x, t).sample)
    for time in (800, 700):
        x, t, made = call(cached, time)
        emb = plain.time_embedding(plain.time_proj(t))
        first = plain.conv_in(x)
        _, shallow = plain.down_blocks[0](first, emb)
        h = plain.up_blocks[-1](kept[0], (first, *shallow[:-1]), emb)
        assert torch.equal(made, plain.conv_out(plain.conv_act(plain.conv_norm_out(h))))
        assert not torch.equal(made, plain(x, t).sample)
    x, t, made = call(cached, 600)
    assert torch.equal(made, plain(x, t).sample)


def test_another_loop_begins_with_a_run(network: Network) -> None:
    plain, cached = copy.deepcopy(network), Cached(network, 3)
    for t in (900, 800):
        call(cached, t)
    cached.begin()
    assert torch.equal(call(cached, 700)[2], call(plain, 700)[2])


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 10), ("ddim", 1), ("heun", 6), ("pndm", 6)])
def test_deep_blocks_run_at_every_kth_call_of_each_batch(network: Network, sampler: str, steps: int) -> None:
    runs: list[int] = []
    inner = network.unet.mid_block.resnets[0]
    inner.register_forward_hook(lambda _module, inputs, _out: runs.append(len(inputs[0])))
    arm = Arm(SamplerConfig(sampler, steps).table(linear()))
    plain = Sampler(network, {"": arm}, 4)(range(8))[""]
    calls = len(arm.table)
    assert runs == [4] * 2 * calls
    runs.clear()
    images = Sampler(Cached(network, 4), {"": arm}, 4)(range(8))[""]
    assert runs == [4] * 2 * math.ceil(calls / 4)
    assert torch.equal(images, plain) == (calls == 1)


def test_what_has_no_deep_blocks_is_refused(
    network: Network, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="deep blocks at every 0-th step: expected at least 1"):
        Cached(network, 0)
    with pytest.raises(UserError, match="a Linear has no deep blocks to reuse"):
        Cached(Network(nn.Linear(4, 4), (1, 2, 2)), 2)
    with pytest.raises(UserError, match="a UNet2DModel has no deep blocks to reuse"):
        Cached(Network(unet(8, 1, (8,))), 2)
    words = ["sample", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    for options, sentence in (
        (["--cache", "0"], "deep blocks at every 0-th step"),
        (["--cache", "2", "--exact"], "cache is 2 with exact: expected 1"),
        (["--cache", "2", "--capture"], "cache is 2 with capture: expected 1"),
    ):
        assert main([*words, *options]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
