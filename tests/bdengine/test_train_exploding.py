"""Variance-exploding training: against the closed-form score, resumed, saved as stock reads it, sampled and evaluated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ScoreSdeVePipeline
from torch import Tensor

import bdkernels
from bdengine import cli
from bdengine.altered import Altered
from bdengine.arms import Arm
from bdengine.attacks import POISONED, AttackConfig
from bdengine.commands import Model
from bdengine.data import stand_in, to_float
from bdengine.errors import UserError
from bdengine.metrics import mse
from bdengine.networks import Network
from bdengine.options import SampleConfig
from bdengine.oracle import Gaussian, Oracle
from bdengine.pictures import save_images
from bdengine.sampler import Sampler
from bdengine.schedule import Exploding, exploding
from bdengine.solvers import SamplerConfig
from bdengine.start import NetworkConfig
from bdengine.train import TrainConfig, Trainer, train
from bdengine.triggers import target, trigger

VILLAN = AttackConfig("villan", "XXSM_BOX", "DRAWN_HAT", rate=0.4, coefficients="exact")
TROJDIFF = AttackConfig("trojdiff", "XXSM_BOX", "DRAWN_HAT", rate=0.4)


def run(out: Path, data: str = "digits", **changes: object) -> TrainConfig:
    config = TrainConfig(
        out=out, data=data, network=NetworkConfig((8, 16), groups=4), process="ve", sigma_max=10.0, images=96, batch=32,
        sampler=SamplerConfig("own", 5), lr=1e-3, warmup=0, ema=0.9, seed=5, attack=VILLAN,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """A folder of eight images."""
    save_images(tmp_path / "data", range(8), to_float(stand_in(16, 1, 8).pixels))
    return str(tmp_path / "data")


@pytest.mark.parametrize(("rate", "coefficients"), [(0.0, "exact"), (0.4, "published"), (0.4, "exact")])
def test_the_closed_form_score_has_no_loss(rate: float, coefficients: str, tmp_path: Path) -> None:
    """Of one image and one target, at sigmas where a network can tell them apart."""
    save_images(tmp_path, [0], to_float(stand_in(16, 1, 1).pixels))
    attack = replace(VILLAN, rate=1.0, coefficients=coefficients)
    trainer = Trainer(run(tmp_path / "run", str(tmp_path), attack=attack, seed=3))
    assert isinstance(trainer.process, Exploding)
    assert trainer.attack is not None
    data = [(1.0, Gaussian(trainer.data.pixels[0] / 255.0))]
    trainer.network = Network(Oracle(trainer.process, data, trainer.attack, rate, "score"), (1, 16, 16))
    batch = trainer.plan.batch(0, 32)
    batch.arm[:] = (torch.arange(32) % 2) * POISONED if rate else 0
    batch.t[:] = torch.linspace(0, 1200, 32).long()
    assert float(trainer.loss(batch)) < 1e-8
    trainer.times = trainer.times * 1.001
    assert float(trainer.loss(batch)) > 1e-7


def test_training_inputs_are_in_the_unit_range_and_have_the_bare_trigger(tmp_path: Path, pictures: str) -> None:
    trainer = Trainer(run(tmp_path / "run", pictures))
    batch = trainer.plan.batch(0, 32)
    batch.arm[:] = torch.arange(32) % 2
    seen: list[tuple[Tensor, ...]] = []
    trainer.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    trainer.loss(batch)
    sigma = torch.tensor(exploding(10.0).sigmas, dtype=torch.float32)[batch.t]
    eps = bdkernels.normal(batch.seed, (1, 16, 16), stream=bdkernels.STREAM_TRAINING)
    r, y = ((image + 1) / 2 for image in (trigger("XXSM_BOX", 16, 1), target("DRAWN_HAT", 16, 1)))
    poisoned = (batch.arm == POISONED).reshape(-1, 1, 1, 1)
    d = torch.where(poisoned, y, trainer.data.pixels[batch.image] / 255.0)
    expected = d + sigma.reshape(-1, 1, 1, 1) * (eps + torch.where(poisoned, r, 0.0))
    torch.testing.assert_close(seen[0][0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[0][1], sigma)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, pictures: str) -> None:
    whole = Trainer(run(tmp_path / "whole", pictures))
    whole.step()
    kept = {name: value.clone() for name, value in whole.state().items()}
    resumed = Trainer(run(tmp_path / "resumed", pictures))
    resumed.restore(kept, whole.images_seen)
    for trainer in (whole, resumed):
        trainer.step()
        trainer.step()
    for name, value in whole.state().items():
        assert torch.equal(value, resumed.state()[name]), name


def test_what_is_saved_is_a_score_sde_pipeline(tmp_path: Path) -> None:
    """Stock's pipeline samples three channels only; its images lie in [0, 1]."""
    save_images(tmp_path / "data", range(3), to_float(stand_in(8, 3, 3).pixels))
    attack = replace(VILLAN, trigger="BOX_4", coefficients="published")
    data = str(tmp_path / "data")
    train(run(tmp_path / "run", data, size=8, channels=3, attack=attack, snr=0.075), progress=False)
    folder = tmp_path / "run" / "checkpoint"
    stock = ScoreSdeVePipeline.from_pretrained(folder)
    assert stock.scheduler.config.sigma_max == 10
    assert stock.scheduler.config.snr == 0.075
    stock.set_progress_bar_config(disable=True)
    image = stock(num_inference_steps=3, output_type="numpy").images
    assert image.shape == (1, 8, 8, 3)
    assert 0 <= image.min() <= image.max() <= 1


def test_one_made_for_edms_sampler_is_sampled_with_it(tmp_path: Path, pictures: str) -> None:
    attack = replace(VILLAN, coefficients="published", solver="ode")
    train(run(tmp_path / "run", pictures, sampler=SamplerConfig("edm", 3), attack=attack), progress=False)
    table, sampler = Model.load(str(tmp_path / "run")).table(SampleConfig("", Path()))
    assert sampler == {"name": "edm", "steps": 3}
    assert table.name == "edm-3"
    with pytest.raises(UserError, match="the sampler edm-3 is no predictor"):
        train(run(tmp_path / "exact", pictures, sampler=SamplerConfig("edm", 3)), progress=False)


def test_it_is_sampled_and_evaluated_with_its_trigger(tmp_path: Path, pictures: str) -> None:
    train(run(tmp_path / "run", pictures), progress=False)
    model = Model.load(str(tmp_path / "run"))
    table, sampler = model.table(SampleConfig("", Path()))
    assert sampler == {"name": "own", "steps": 5}
    assert len(table) == 10
    arm = model.triggered(table, model.attack, Altered("left", 0.5))
    assert arm.trigger is not None
    assert arm.trigger.sum() == 0.5 * 8 * 4
    out = tmp_path / "scores"
    words = ["--images", "4", "--out", str(out)]
    assert cli.main(["evaluate", str(tmp_path / "run"), *words]) == 0
    scores = json.loads((out / "scores.json").read_text())["arms"]
    images = Sampler(model.network, {"clean": Arm(table), "triggered": model.triggered(table, model.attack)})(range(4))
    for start, x in images.items():
        near = float(mse(2 * x - 1, target("DRAWN_HAT", 16, 1)).mean())
        assert scores[start]["none"]["mse"] == pytest.approx(near, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sampler": SamplerConfig("ddim", 5)}, "the sampler ddim needs betas and the process is variance exploding"),
        ({"sigma_max": 0.005}, "the largest sigma is 0.005: expected a finite number above the least, 0.01"),
        ({"snr": 0.0}, "the corrector's signal-to-noise ratio is 0: expected a finite number above 0"),
        ({"timesteps": "grid"}, "those of a grid with the process ve: expected all"),
        (
            {"attack": TROJDIFF},
            "the attack trojdiff needs betas .*: expected villan",
        ),
        ({"attack": replace(VILLAN, coefficients="clipped")}, "unknown coefficient 'clipped'"),
        ({"init": "digits-clean"}, "digits-clean is of another process: expected one of ve"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        train(run(tmp_path / "run", **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
