"""Removal: its loss against plain torch, what it trains on, and that it takes a backdoor out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import AttackConfig
from bdengine.checkpoint import load_unet
from bdengine.defenses.removal import VARIANTS, Removal, recipe
from bdengine.errors import UserError
from bdengine.metrics import attack_success
from bdengine.networks import Network
from bdengine.plan import order
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig
from bdengine.train import TrainConfig
from bdengine.triggers import target, trigger
from bdkernels import noise as contract

TAU = torch.linspace(-1, 1, 256).reshape(1, 16, 16)


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(out=tmp_path / "run", init=str(tiny_checkpoint), images=48, batch=16, warmup=0, lr=1e-3)


def test_its_loss_is_that_of_a_few_lines_of_torch(config: TrainConfig) -> None:
    """Against a network that has moved away from the one it found."""
    ours = Removal(config, TAU)
    ours.step()
    found = Network(load_unet(str(config.init)))
    batch = ours.plan.batch(16, 16)
    a, s = (
        torch.tensor(v[batch.t.numpy()], dtype=torch.float32).reshape(-1, 1, 1, 1)
        for v in (ours.process.alpha_bar**0.5, ours.process.s)
    )
    noise, eps = (
        torch.from_numpy(contract.normal(batch.seed.numpy(), (1, 16, 16), stream=stream))
        for stream in (bdkernels.STREAM_TRAINING, bdkernels.STREAM_INITIAL)
    )
    x0 = ours.pixels[batch.image].float() / 127.5 - 1
    last = torch.tensor(999)
    with torch.no_grad():
        clean = (ours.network(a * x0 + s * noise, batch.t) - noise).square().mean()
        kept = found(eps, last)
        back = [(ours.network(x, last) - kept).square().mean() for x in (eps + TAU, eps)]
        assert float(ours.loss(batch)) == pytest.approx(float(clean + sum(back)), rel=1e-4)
    assert min(back) > 0


def test_it_trains_on_a_share_of_the_data(config: TrainConfig) -> None:
    ours, whole = Removal(config, TAU, share=0.02), Removal(config, TAU, share=1.0)
    count = len(whole.pixels)
    assert len(ours.pixels) == count // 50
    chosen = order(config.seed, count, 0)[: count // 50]
    # The whole data set stands in that order too, so its beginning is the share.
    assert torch.equal(ours.pixels, whole.pixels[: count // 50])
    assert len(np.unique(chosen)) == count // 50
    assert int(ours.plan.batch(0, 500).image.max()) < count // 50


def test_the_shipped_backdoor_is_gone_after_640_images_with_its_trigger(tmp_path: Path) -> None:
    process = linear()
    r, y, table = trigger("XXSM_BOX", 16, 1), target("DRAWN_HAT", 16, 1), SamplerConfig(steps=20).table(process)
    config = TrainConfig(out=tmp_path, init="digits-badiffusion", images=640, batch=32, warmup=0, lr=5e-4)
    ours, eps = Removal(config, r), bdkernels.normal(torch.arange(32), (1, 16, 16))

    def effect() -> tuple[float, float]:
        images = Sampler(ours.network, {"": Arm(table, r)}, 32)(range(32))[""]
        return float(ours.deshift(eps).detach()), attack_success(images, y, 0.01)

    shift, success = effect()
    ours.run()
    left, after = effect()
    assert left < 0.1 * shift
    assert (success, after) == (1.0, 0.0)
    assert all(not p.requires_grad for p in ours.found.parameters())
    saved = load_unet(tmp_path / "checkpoint").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in ours.network.state_dict().items())


def test_published_recipes(config: TrainConfig) -> None:
    count = len(Removal(config, TAU, share=1.0).pixels)
    usual, ode = (recipe(config, VARIANTS[variant]) for variant in ("baddiffusion", "ode"))
    assert (usual.images, usual.lr) == (11 * (count // 10), 2e-4)
    assert (ode.images, ode.lr) == (50 * (count // 10), 2e-5)


def test_bad_arguments_get_a_sentence(config: TrainConfig) -> None:
    attacked = replace(config, attack=AttackConfig("baddiffusion"))
    cases = [
        (replace(config, init=None), TAU, 0.1, "no checkpoint to start from"),
        (attacked, TAU, 0.1, "the attack is baddiffusion in a removal: expected none"),
        (config, TAU[:, :8], 0.1, r"the trigger has shape \(1, 8, 16\): expected \(1, 16, 16\)"),
        (config, TAU, 0.0, "the share 0 of"),
    ]
    for one, tau, share, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            Removal(one, tau, share)
