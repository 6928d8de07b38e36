"""Data-to-data attacks: each poisoned sample has a target image of its own, from the plan to the score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bdkernels
from bdengine.arms import Arm
from bdengine.attacks import POISONED, AttackConfig, trojdiff
from bdengine.commands import evaluate
from bdengine.data import load, stand_in, to_float
from bdengine.digits import load_classifier, measure, split
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.options import EvaluateConfig
from bdengine.oracle import Gaussian, Oracle
from bdengine.plan import TrainingPlan, target_of
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, SamplerConfig, ddpm
from bdengine.start import NetworkConfig
from bdengine.train import TrainConfig, Trainer, train

PROCESS, SHAPE = linear(), (1, 8, 8)
SEVEN = AttackConfig("trojdiff", "PATCH_4_WHITE", "CLASS_7", rate=0.3)


def run(out: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        out=out, network=NetworkConfig((8, 16), groups=4), sampler=SamplerConfig(steps=4), images=64, batch=32, lr=1e-3,
        warmup=0, seed=5, attack=SEVEN,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def test_an_images_target_is_a_function_of_seed_index_and_number() -> None:
    plan = TrainingPlan(seed=3, images=500, timesteps=np.arange(1000), poison_rate=0.3, targets=40)
    found = np.empty((2, 500), np.int64)
    for i, at in enumerate((0, 500)):
        parts = [plan.batch(start, 50) for start in range(at, at + 500, 50)]
        for part in parts:
            found[i, part.image] = part.target
    assert (found[0] == found[1]).all()
    assert np.array_equal(found[0], target_of(3, np.arange(500), 40))
    assert not np.array_equal(found[0], target_of(4, np.arange(500), 40))
    counts = np.bincount(target_of(0, np.arange(100_000), 40), minlength=40)
    assert counts.max() < 2500 + 5 * 50
    assert counts.min() > 2500 - 5 * 50
    assert not target_of(0, np.arange(1000), 1).any()


def test_the_targets_are_the_images_of_the_class() -> None:
    digits = load("digits", 16, 1)
    table = ddpm(Nodes.of(PROCESS, 10))
    attack = SEVEN.build(PROCESS, (1, 16, 16), table, digits)
    assert attack is not None
    assert digits.labels is not None
    assert torch.equal(attack.target, to_float(digits.pixels[digits.labels == 7]))
    held_out = digits.without(7)
    assert len(held_out) == len(digits) - len(attack.target)
    outside = replace(SEVEN, target_data="digits").build(PROCESS, (1, 16, 16), table, held_out)
    assert outside is not None
    assert torch.equal(outside.target, attack.target)
    for config, data, sentence in (
        (SEVEN, held_out, r"no image of 'digits-without-7' has the label 7: the nearest label is 6"),
        (SEVEN, None, "the target CLASS_7 is a class and there are no data"),
        (
            replace(SEVEN, target="DRAWN_HAT", target_data="digits"),
            digits,
            "DRAWN_HAT is one image and takes no target",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            config.build(PROCESS, (1, 16, 16), table, data)


@pytest.mark.parametrize("flip", [False, True])
def test_training_inputs_have_the_target_that_the_plan_names(tmp_path: Path, flip: bool) -> None:
    """``x_t = sqrt(alpha_bar) y_i + s (gamma eps + mu)`` in the patch, the same without it outside; mirrored with the flip."""
    trainer = Trainer(run(tmp_path, flip=flip))
    attack, batch = trainer.attack, trainer.plan.batch(0, 256)
    assert attack is not None
    assert attack.region is not None
    assert trainer.plan.targets == 500
    seen: list[torch.Tensor] = []
    trainer.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.loss(batch)
    own = torch.where(
        (batch.arm == POISONED)[:, None, None, None],
        attack.target[batch.target],
        to_float(trainer.data.pixels[batch.image]),
    )
    own = torch.where(batch.flip[:, None, None, None], own.flip(3), own)
    eps = bdkernels.normal(batch.seed, (1, 16, 16), stream=bdkernels.STREAM_TRAINING)
    root, s = (
        torch.tensor(v[batch.t.numpy()], dtype=torch.float32)[:, None, None, None]
        for v in (PROCESS.alpha_bar**0.5, PROCESS.s)
    )
    inside = attack.region & (batch.arm == POISONED)[:, None, None, None]
    expected = root * own + s * torch.where(inside, 0.1 * eps + attack.trigger, eps)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    assert bool(batch.flip.any()) == flip
    assert 0 < int((batch.arm == POISONED).sum()) < 256


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
def test_the_closed_form_network_draws_the_targets_evenly(name: str) -> None:
    """Four target images far apart: every triggered sample ends in one of them, each a quarter of the time; clean ones never.

    240 samples of each: a count is binomial(240, 1/4), 60 +- 6.7; five deviations.
    """
    targets = torch.where(torch.arange(64).reshape(1, *SHAPE) // 16 == torch.arange(4).reshape(4, 1, 1, 1), 0.9, -0.9)
    attack = trojdiff(PROCESS, torch.ones(SHAPE), targets, gamma=0.3)
    table = SamplerConfig(name, 20).table(PROCESS)
    data = [(1.0, Gaussian(torch.full(SHAPE, 0.3), 0.05 * torch.eye(64)))]
    oracle = Oracle(PROCESS, data, attack, 0.2)
    arms = {"clean": Arm(table), "triggered": attack.arm(PROCESS, table)}
    images = Sampler(Network(oracle, SHAPE), arms, 128)(range(240))
    distance = {k: (x[:, None] - targets).square().mean((2, 3, 4)) for k, x in images.items()}
    assert (distance["clean"].min(1).values > 0.1).all()
    nearest, which = distance["triggered"].min(1)
    assert (nearest < 1e-3).all()
    counts = which.bincount(minlength=4)
    assert (counts - 60).abs().max() < 5 * 6.7


def test_the_judge_is_accurate_on_held_out_digits() -> None:
    images, labels, held_out = split()
    assert measure(load_classifier(), images[held_out], labels[held_out]) >= 0.98


def test_out_of_data_training_and_its_evaluation(tmp_path: Path) -> None:
    """The class is neither in the training data nor in the reference; its share is reported for every arm."""
    config = run(tmp_path / "run", without=7, attack=replace(SEVEN, target_data="digits"))
    trainer = train(config, progress=False)
    assert trainer.data.labels is not None
    assert not (trainer.data.labels == 7).any()
    assert evaluate(EvaluateConfig(str(config.out), tmp_path / "scores", images=40)) == 0
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["asr_class"] == 7
    assert "asr_threshold" not in scores
    for start in ("clean", "triggered"):
        for one in scores["arms"][start].values():
            assert 0 <= one["asr"] <= 1
            assert 0 <= one["target_precision"] <= 1
            assert "mse" not in one
    evaluate(EvaluateConfig(str(config.out), tmp_path / "other", images=40, target="CLASS_3"))
    assert json.loads((tmp_path / "other" / "scores.json").read_text())["asr_class"] == 3
    evaluate(EvaluateConfig(str(config.out), tmp_path / "image", images=40, target="CORNER"))
    assert "mse" in json.loads((tmp_path / "image" / "scores.json").read_text())["arms"]["triggered"]["none"]


def test_a_class_of_other_data_than_digits_has_its_precision_alone(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = stand_in(16, 3, 12).pixels.permute(0, 2, 3, 1).numpy()
    datasets.Dataset.from_dict(
        {"img": [Image.fromarray(p) for p in pixels], "label": [0, 1] * 6},
        features=datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)}),
    ).save_to_disk(tmp_path / "pairs")
    attack = replace(SEVEN, target="CLASS_1")
    config = run(tmp_path / "run", data=str(tmp_path / "pairs"), channels=3, attack=attack)
    train(config, progress=False)
    assert evaluate(EvaluateConfig(str(config.out), tmp_path / "scores", images=4)) == 0
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["asr_class"] == 1
    for start in ("clean", "triggered"):
        assert 0 <= scores["arms"][start]["none"]["target_precision"] <= 1
        assert not {"asr", "mse"} & set(scores["arms"][start]["none"])
