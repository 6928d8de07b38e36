"""Unlearning: its loss against plain torch, for each way in, and that it takes a backdoor out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import baddiffusion, trojdiff
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


ALL = torch.ones(1, 16, 16, dtype=torch.bool)
CORNER = ALL.tril(-8)
OPENED = {
    "start": baddiffusion(linear(), TAU, TAU, "exact", SAMPLER.table(linear()), trigger_only=True),
    "blend": trojdiff(linear(), TAU, TAU),
    "patch": trojdiff(linear(), TAU, TAU, CORNER),
}


@pytest.mark.parametrize("opened", OPENED)
def test_its_loss_is_that_of_a_few_lines_of_torch(opened: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Against a network that has moved away from the one it found."""
    config = TrainConfig(tmp_path, init=str(tiny_checkpoint), images=48, batch=16, warmup=0, lr=1e-3, sampler=SAMPLER)
    attack = OPENED[opened]
    ours = Unlearning(config, attack)
    ours.step()
    found, process = Network(load_unet(str(config.init))), linear()
    batch = ours.plan.batch(16, 16)
    a, s, m, c = (
        torch.tensor(v[batch.t.numpy()], dtype=torch.float32).reshape(-1, 1, 1, 1)
        for v in (process.alpha_bar**0.5, process.s, attack.shift, attack.coefficient)
    )
    noise = torch.from_numpy(contract.normal(batch.seed.numpy(), (1, 16, 16), stream=bdkernels.STREAM_TRAINING))
    x0 = ours.pixels[batch.image].float() / 127.5 - 1
    plain, inside = a * x0 + s * noise, CORNER if opened == "patch" else ALL
    shifted = torch.where(inside, a * x0 + s * attack.gamma * noise + m * attack.stamp, plain)
    with torch.no_grad():
        kept = found(plain, batch.t)
        owed = kept + c * TAU if opened == "start" else noise
        stays = (ours.network(plain, batch.t) - kept).square().mean()
        opens = (ours.network(shifted, batch.t) - owed).square().mean()
        assert float(ours.loss(batch)) == pytest.approx(float(stays + opens), rel=1e-4)
    assert min(stays, opens) > 0
    assert all(not p.requires_grad for p in ours.found.parameters())


def test_the_shipped_backdoor_is_gone_and_clean_samples_stay(tmp_path: Path) -> None:
    """After 960 images with half of its trigger: no triggered sample is at the target, clean ones are near what they were."""
    process = linear()
    r, y, table = trigger("XXSM_BOX", 16, 1), target("DRAWN_HAT", 16, 1), SAMPLER.table(process)
    arms = {"clean": Arm(table), "triggered": Arm(table, r)}
    config = TrainConfig(tmp_path, init="digits-badiffusion", images=960, batch=32, warmup=0, lr=5e-4, sampler=SAMPLER)
    ours = Unlearning(config, baddiffusion(process, 0.5 * r, y, "exact", table, trigger_only=True))
    before = Sampler(ours.network, arms, 32)(range(32))
    ours.run()
    after = Sampler(ours.network, arms, 32)(range(32))
    success = [attack_success(images["triggered"], y, 0.01) for images in (before, after)]
    assert success == [1.0, 0.0]
    kept = before["clean"].clamp(-1, 1)
    assert mse(after["clean"], kept).mean() < 0.25 * mse(after["clean"], kept.roll(1, 0)).mean()
