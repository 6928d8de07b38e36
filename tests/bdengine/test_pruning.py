"""Pruning and repair: importances by hand, what a cut channel is, and what is left of the shipped backdoor."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bdkernels
from bdengine.arms import Arm
from bdengine.defenses import pruning
from bdengine.defenses.pruning import VARIANTS, Cleanse, blocks, cut, importance, recipe
from bdengine.defenses.subject import run_seeds
from bdengine.errors import UserError
from bdengine.metrics import attack_success
from bdengine.sampler import Sampler
from bdengine.solvers import SamplerConfig
from bdengine.train import TrainConfig
from bdengine.triggers import target, trigger

from .networks_for_tests import elementwise, tiny_unet
from .subjects_for_tests import PROCESS

IMAGES = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8).sin()
R = torch.full((1, 8, 8), -1.0)


def test_importances_are_sums_of_gradients_by_hand() -> None:
    network = tiny_unet()
    found = importance(network, PROCESS, IMAGES, R)
    plain = copy.deepcopy(network).requires_grad_(True)
    for k, t in enumerate(range(900, 1000, 10)):
        eps = bdkernels.normal(run_seeds(0, 4, R.device, 4 * k), (1, 8, 8))
        x = PROCESS.alpha_bar[t] ** 0.5 * IMAGES + PROCESS.s[t] * (eps + R)
        (plain(x, torch.tensor(t)) - eps).square().mean().backward()
    expected = []
    for block in blocks(plain).values():
        for j in range(block.conv1.out_channels):
            own = [(p[j], p.grad[j]) for m in (block.conv1, block.time_emb_proj, block.norm2) for p in m.parameters()]
            own.append((block.conv2.weight[:, j], block.conv2.weight.grad[:, j]))
            expected.append(sum(float((p * g).detach().abs().sum()) for p, g in own))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in network.parameters())


def test_a_cut_channel_carries_nothing() -> None:
    network = tiny_unet()
    chosen = torch.zeros(sum(b.conv1.out_channels for b in blocks(network).values()), dtype=torch.bool)
    chosen[[1, 9, len(chosen) - 1]] = True
    cut(network, chosen)
    heard: dict[int, torch.Tensor] = {}
    for block in blocks(network).values():
        block.conv2.register_forward_hook(lambda m, inputs, out: heard.__setitem__(id(m), inputs[0]))
    network(IMAGES, torch.tensor(500))
    silent = torch.cat([heard[id(b.conv2)].abs().amax((0, 2, 3)) == 0 for b in blocks(network).values()])
    assert torch.equal(silent, chosen)


def test_repair_leaves_a_backdoor_out_with_a_tenth_of_the_channels_and_brings_it_back_with_a_fiftieth(
    tmp_path: Path,
) -> None:
    r, y, table = trigger("XXSM_BOX", 16, 1), target("DRAWN_HAT", 16, 1), SamplerConfig(steps=20).table(PROCESS)
    config = TrainConfig(
        out=tmp_path, init="digits-badiffusion", images=640, batch=32, warmup=0, lr=5e-4, schedule="constant"
    )
    for ratio, cuts in ((0.02, 9), (0.1, 46)):
        ours = Cleanse(config, r, ratio)

        def success(ours: Cleanse = ours) -> float:
            return attack_success(Sampler(ours.network, {"": Arm(table, r)}, 32)(range(32))[""], y, 0.01)

        assert int(ours.chosen.sum()) == cuts
        assert success() == 0
        ours.run()
        assert (success() > 0.2) == (ratio == 0.02)
        for block in blocks(ours.network).values():
            assert torch.equal(block.conv2.weight.abs().amax((0, 2, 3)) == 0, block.conv1.bias == 0)
    assert sum(int((b.conv1.bias == 0).sum()) for b in blocks(ours.network).values()) == 46


def test_the_published_recipe_and_bad_arguments(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = TrainConfig(out=tmp_path / "run", init=str(tiny_checkpoint), batch=16)
    published = recipe(config, VARIANTS["baddiffusion"])
    assert (published.images, published.lr, published.schedule, published.warmup) == (160_000, 1e-4, "constant", 0)
    r = torch.zeros(1, 16, 16)
    with pytest.raises(UserError, match="the ratio of pruned channels is 1: expected above 0 and below 1"):
        Cleanse(config, r, 1.0)
    with pytest.raises(UserError, match=r"the trigger has shape \(1, 8, 16\)"):
        Cleanse(config, r[:, :8])
    with pytest.raises(UserError, match="no checkpoint to start from"):
        Cleanse(replace(config, init=None), r)
    with pytest.raises(UserError, match="no residual blocks"):
        pruning.blocks(elementwise())


def test_blocks_that_scale_by_the_time_are_refused() -> None:
    """Their projection has two rows a channel."""
    with pytest.raises(
        UserError, match="has 16 values of the time for 8 channels: expected one each, added and not scaled"
    ):
        blocks(tiny_unet(resnet_time_scale_shift="scale_shift"))
