"""Unlearning: its loss against plain torch, what it is for a perfect network, and that it takes a backdoor out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import baddiffusion
from bdengine.checkpoint import load_unet
from bdengine.defenses.unlearning import Unlearning
from bdengine.metrics import attack_success, mse
from bdengine.networks import Network
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig
from bdengine.train import TrainConfig
from bdengine.triggers import target, trigger
from bdkernels import noise as contract

TAU = torch.linspace(-2, 1, 256).reshape(1, 16, 16)
SAMPLER = SamplerConfig(steps=20)


def test_its_loss_is_that_of_a_few_lines_of_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Against a network that has moved away from the one it found."""
    config = TrainConfig(tmp_path, init=str(tiny_checkpoint), images=48, batch=16, warmup=0, lr=1e-3, sampler=SAMPLER)
    ours = Unlearning(config, TAU)
    ours.step()
    found, process = Network(load_unet(str(config.init))), linear()
    attack = baddiffusion(process, TAU, TAU, "exact", SAMPLER.table(process), trigger_only=True)
    batch = ours.plan.batch(16, 16)
    a, s, m, c = (
        torch.tensor(v[batch.t.numpy()], dtype=torch.float32).reshape(-1, 1, 1, 1)
        for v in (process.alpha_bar**0.5, process.s, attack.shift, attack.coefficient)
    )
    noise = torch.from_numpy(contract.normal(batch.seed.numpy(), (1, 16, 16), stream=bdkernels.STREAM_TRAINING))
    x_t = a * (ours.pixels[batch.image].float() / 127.5 - 1) + s * noise
    with torch.no_grad():
        kept = found(x_t, batch.t)
        plain = (ours.network(x_t, batch.t) - kept).square().mean()
        shifted = (ours.network(x_t + m * TAU, batch.t) - kept - c * TAU).square().mean()
        assert float(ours.loss(batch)) == pytest.approx(float(plain + shifted), rel=1e-4)
    assert min(plain, shifted) > 0
    assert all(not p.requires_grad for p in ours.found.parameters())


def test_the_shipped_backdoor_is_gone_and_clean_samples_stay(tmp_path: Path) -> None:
    """After 960 images with half of its trigger: no triggered sample is at the target, clean ones are near what they were."""
    process = linear()
    r, y, table = trigger("XXSM_BOX", 16, 1), target("DRAWN_HAT", 16, 1), SAMPLER.table(process)
    arms = {"clean": Arm(table), "triggered": Arm(table, r)}
    config = TrainConfig(tmp_path, init="digits-badiffusion", images=960, batch=32, warmup=0, lr=5e-4, sampler=SAMPLER)
    ours = Unlearning(config, 0.5 * r)
    before = Sampler(ours.network, arms, 32)(range(32))
    ours.run()
    after = Sampler(ours.network, arms, 32)(range(32))
    success = [attack_success(images["triggered"], y, 0.01) for images in (before, after)]
    assert success == [1.0, 0.0]
    kept = before["clean"].clamp(-1, 1)
    assert mse(after["clean"], kept).mean() < 0.25 * mse(after["clean"], kept.roll(1, 0)).mean()
