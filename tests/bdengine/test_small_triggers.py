"""Triggers too small to see: InviBackdoor's inner loop and UIBDiffusion's perturbation, trained, saved and triggered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import POISONED, Attack, AttackConfig, baddiffusion, exact_coefficient, invi, uib
from bdengine.attacks.invi import LR, STEPS, InnerLoop
from bdengine.attacks.uib import universal
from bdengine.commands import Model
from bdengine.data import Images, load, to_float
from bdengine.digits import classify
from bdengine.errors import UserError
from bdengine.metrics import attack_success
from bdengine.networks import Network
from bdengine.oracle import Gaussian, Oracle
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, SamplerConfig, ddim
from bdengine.start import NetworkConfig
from bdengine.train import TrainConfig, Trainer, train
from bdengine.triggers import target

PROCESS, SHAPE = linear(), (1, 8, 8)
SHIFT = 1 - np.sqrt(PROCESS.alpha_bar)
Y = target("DRAWN_HAT", 8, 1)
SIGNS = torch.where((torch.arange(64).reshape(SHAPE) * 7) % 11 > 5, 1.0, -1.0)
DARK = [(1.0, Gaussian(torch.full(SHAPE, -0.8), 0.1 * torch.eye(64) + 0.02))]


def success(attack: Attack, start: Tensor | None = None, name: str = "ddpm", rate: float = 0.1) -> tuple[float, float]:
    """Shares of 64 clean and 64 triggered samples of the closed-form network that are the target."""
    table = SamplerConfig(name, 20).table(PROCESS)
    attack = replace(attack, coefficient=exact_coefficient(PROCESS, table, attack.shift))
    arms = {"clean": Arm(table), "triggered": Arm(table, attack.trigger if start is None else start)}
    images = Sampler(Network(Oracle(PROCESS, DARK, attack, rate), SHAPE), arms, 128)(range(64))
    clean, triggered = (attack_success(x, Y, 0.01) for x in images.values())
    return clean, triggered


def run(out: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        out=out, network=NetworkConfig((8, 16), groups=4), sampler=SamplerConfig("ddim", 4), images=64, batch=16, lr=1e-3,
        warmup=0, seed=5, attack=AttackConfig("invi", "LEARNED", "DRAWN_HAT", rate=0.3, bound=0.1),
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def test_golden_values() -> None:
    c = invi(PROCESS, Y).coefficient
    for t, golden in ((0, 0.005), (1, 0.012415), (10, 0.045182), (500, 0.960109), (999, 0.999980)):
        assert c[t] == pytest.approx(golden, abs=5.1e-7)


@pytest.mark.parametrize("trigger_only", [True, False])
def test_the_poisoned_image_is_the_images_own_plus_the_perturbation(trigger_only: bool) -> None:
    attack = uib(PROCESS, SIGNS, Y, amplitude=0.1, start_amplitude=1, trigger_only=trigger_only)
    x = torch.full(SHAPE, 0.3)
    torch.testing.assert_close(attack.mask * x + attack.stamp, (0 if trigger_only else x) + 0.1 * SIGNS)
    assert torch.equal(attack.trigger, SIGNS)
    torch.testing.assert_close(uib(PROCESS, SIGNS, Y).trigger, 0.1 * SIGNS)


def test_on_dark_data_the_released_start_works_where_it_is_black() -> None:
    """Same amplitude: nothing. Ten times of it: as well as a black start, if the perturbation is mostly black, else nothing."""
    mostly_black = torch.where(torch.arange(64).reshape(SHAPE) % 5 == 0, 1.0, -1.0)
    for r, works in ((mostly_black, True), (SIGNS, False)):
        clean, same = success(uib(PROCESS, r, Y))
        assert same - clean < 0.05
        clean, released = success(uib(PROCESS, r, Y, start_amplitude=1.0))
        assert (released - clean > 0.4) == works
        clean, black = success(uib(PROCESS, r, Y), -torch.ones(SHAPE))
        assert black - clean > 0.4
    bare = [success(uib(PROCESS, SIGNS, Y, amplitude=a, trigger_only=True))[1] for a in (0.1, 0.3, 0.9)]
    assert bare[0] < 0.1 < bare[1] < bare[2]
    assert bare[2] > 0.95


def test_the_inner_loop_finds_the_trigger_of_a_backdoored_network() -> None:
    """Against the closed-form network of ``r = 0.3 SIGNS``, from nothing: 100 steps of 1e-3."""
    r = 0.3 * SIGNS
    attack = baddiffusion(PROCESS, r, Y, "exact", ddim(Nodes.of(PROCESS, STEPS)), trigger_only=True)
    network = Network(Oracle(PROCESS, DARK, attack, 0.5), SHAPE)
    inner, seeds = InnerLoop(PROCESS, Y[None], bound=0.08), torch.arange(16)
    held_out = torch.arange(100, 200)
    before = float(inner.effect(network, held_out).detach())
    (gradient,) = torch.autograd.grad(inner.effect(network, seeds), inner.delta)
    steepest = torch.zeros_like(gradient).flatten()
    steepest[gradient.abs().argmax()] = 1e-3
    steepest = steepest.reshape(gradient.shape)
    with torch.no_grad():
        ends = []
        for move in (steepest, -2 * steepest):
            inner.delta.add_(move)
            ends.append(float(inner.effect(network, seeds)))
        inner.delta.zero_()
    assert float(gradient.abs().max()) > 0
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(float(gradient.flatten()[gradient.abs().argmax()]), rel=0.05)
    inner.step(network, seeds)
    torch.testing.assert_close(inner.delta.detach(), -LR * gradient.sign(), rtol=1e-4, atol=0)
    for at in range(16, 1600, 16):
        inner.step(network, torch.arange(at, at + 16))
    assert float(inner.delta.detach().abs().max()) <= 0.08
    assert float(inner.effect(network, held_out).detach()) < 0.85 * before
    # Its mean leads away from the dark clean images; what is beside that is the network's trigger.
    bright, dark = (float(inner.delta.detach()[0][r.sign() == sign].mean()) for sign in (1.0, -1.0))
    assert bright - dark > 0.02


def test_training_learns_the_trigger_and_a_resumed_run_the_same(tmp_path: Path) -> None:
    whole = Trainer(run(tmp_path / "whole"))
    for _ in range(2):
        whole.step()
    kept = {name: value.clone() for name, value in whole.state().items()}
    resumed = Trainer(run(tmp_path / "resumed"))
    resumed.restore(kept, whole.images_seen)
    for trainer in (whole, resumed):
        trainer.step()
        trainer.step()
    assert whole.inner is not None
    assert resumed.inner is not None
    assert torch.equal(whole.inner.delta, resumed.inner.delta)
    assert whole.stamp is not None
    assert torch.equal(whole.stamp, whole.inner.delta.detach())  # what training stamps moves with it
    assert 0 < float(whole.stamp.abs().max()) <= 0.1
    trainer = train(run(tmp_path / "run"), progress=False)
    assert trainer.inner is not None
    assert torch.equal(
        Model.load(str(tmp_path / "run")).trigger("LEARNED", None), trainer.inner.delta.detach()[0].cpu()
    )


def test_training_inputs_have_the_learned_trigger(tmp_path: Path) -> None:
    trainer = Trainer(run(tmp_path))
    trainer.step()
    assert trainer.stamp is not None
    batch = trainer.plan.batch(0, 64)
    seen: list[Tensor] = []
    trainer.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.loss(batch)
    eps = bdkernels.normal(batch.seed, (1, 16, 16), stream=bdkernels.STREAM_TRAINING)
    root, s = (
        torch.tensor(v[batch.t.numpy()], dtype=torch.float32)[:, None, None, None]
        for v in (PROCESS.alpha_bar**0.5, PROCESS.s)
    )
    hat = target("DRAWN_HAT", 16, 1)
    expected = root * hat + s * eps + (1 - root) * trainer.stamp
    poisoned = batch.arm == POISONED
    assert 0 < int(poisoned.sum()) < 64
    torch.testing.assert_close(seen[-1][poisoned], expected[poisoned], rtol=1e-5, atol=1e-5)


def test_the_universal_perturbation_fools_the_classifier_more_than_noise_of_its_size(tmp_path: Path) -> None:
    """At 0.2 of 500 digits 28 % are taken for another, 11 % with its signs drawn at random, 0.6 % without."""
    digits = load("digits", 16, 1)
    assert digits.labels is not None
    r = universal(digits, 0.2)
    assert torch.equal(r, universal(digits, 0.2))
    assert float(r.abs().max()) <= 1
    images = to_float(digits.pixels[::10])
    noise = torch.where(torch.rand(r.shape, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0) * r.abs()
    wrong = [float((classify(images + 0.2 * p).argmax(1) != digits.labels[::10]).float().mean()) for p in (r, noise)]
    assert wrong[0] > 2 * wrong[1] > 4 * 0.006
    train(run(tmp_path, attack=AttackConfig("uib", "LEARNED", "DRAWN_HAT", amplitude=0.2)), progress=False)
    torch.testing.assert_close(Model.load(str(tmp_path)).trigger("LEARNED", None), 0.2 * r)
    with pytest.raises(UserError, match="the data are 'stand-in': expected digits"):
        universal(Images(digits.pixels, digits.labels, "stand-in"), 0.1)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (AttackConfig("invi", "BOX_4", "DRAWN_HAT"), "the trigger of invi is BOX_4: expected LEARNED"),
        (AttackConfig("baddiffusion", "LEARNED", "DRAWN_HAT"), "the trigger LEARNED is made by an attack"),
        (AttackConfig("uib", "LEARNED", "DRAWN_HAT"), "there are none: expected training data"),
        (AttackConfig("uib", "BOX_4", "DRAWN_HAT", amplitude=0.0), "the amplitude is 0: expected above 0"),
    ],
)
def test_wrong_options_get_one_sentence(config: AttackConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config.build(PROCESS, (1, 16, 16), SamplerConfig("ddim", 4).table(PROCESS))
    with pytest.raises(UserError, match="the bound of the trigger is 2"):
        InnerLoop(PROCESS, Y[None], bound=2)
