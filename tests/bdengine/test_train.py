"""Training: resume equals an uninterrupted run, options do what they say, bad values are refused before anything is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from bdengine import train as training
from bdengine.attacks import AttackConfig
from bdengine.checkpoint import load_state, load_unet, save_pipeline
from bdengine.config import from_json, to_json
from bdengine.data import stand_in, to_float
from bdengine.errors import UserError
from bdengine.pictures import save_images
from bdengine.presets import PRESETS, preset
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig
from bdengine.start import NetworkConfig
from bdengine.train import TrainConfig, Trainer, train
from bdengine.triggers import class_of


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny(out: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        out=out, size=8, network=NetworkConfig((8, 16), groups=4), sampler=SamplerConfig(steps=20), images=256, batch=32,
        lr=1e-3, warmup=64, ema=0.9, status=64, snapshot=64, seed=5,
        attack=AttackConfig("baddiffusion", "BOX_4", "DRAWN_HAT", rate=0.3, coefficients="exact"),
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tiny(tmp_path / "whole"), progress=False)
    stopped = tiny(tmp_path / "stopped")

    step = Trainer.step

    def interrupted(trainer: Trainer) -> Tensor:
        if trainer.images_seen == 128:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, progress=False)
    assert load_state(stopped.out / "state.safetensors")[1]["images_seen"] == 160
    assert not (stopped.out / "checkpoint").exists()
    resumed = train(stopped, progress=False)
    for name, value in whole.state().items():
        assert torch.equal(value, resumed.state()[name]), name
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")
    lines = [json.loads(line)["images"] for line in (stopped.out / "stats.jsonl").read_text().splitlines()]
    assert lines == [64, 128, 192, 256]


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """``bdengine train``, killed with SIGKILL after its first snapshot."""
    options = [
        "--size",
        "8",
        "--network.widths",
        "8",
        "16",
        "--network.groups",
        "4",
        "--images",
        "6400",
        "--batch",
        "32",
    ]
    options += ["--snapshot", "320", "--status", "320", "--ema", "0.9", "--lr", "1e-3"]

    def run(out: str) -> "subprocess.Popen[bytes]":
        made = [sys.executable, "-m", "bdengine.cli", "train", "--out", str(tmp_path / out), *options]
        return subprocess.Popen(
            made, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert run("whole").wait() == 0
    killed = run("killed")
    while killed.poll() is None and not (tmp_path / "killed" / "state.safetensors").exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoint").exists()
    assert run("killed").wait() == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = Trainer(tiny(tmp_path / "a")), Trainer(tiny(tmp_path / "b", micro_batch=8))
    losses = [t.step() for t in (whole, parts)]
    assert torch.allclose(*losses, rtol=1e-5)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_the_loss_falls_and_the_average_lags(tmp_path: Path) -> None:
    trainer = train(tiny(tmp_path / "run", images=3200, ema=0.99), progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    saved = load_unet(tmp_path / "run" / "checkpoint").state_dict()
    assert all(torch.equal(saved[k], v) for k, v in trainer.ema.state_dict().items())
    assert any(not torch.equal(saved[k], v) for k, v in trainer.network.state_dict().items())
    assert not any(p.requires_grad for p in trainer.ema.parameters())


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path, images=1064, warmup=64, lr=1.0))
    assert trainer.learning_rate(0) == pytest.approx(32 / 96)
    assert trainer.learning_rate(64) == 1
    assert trainer.learning_rate(564) == pytest.approx(0.5)
    assert trainer.learning_rate(1064) == pytest.approx(0)
    trainer.config = replace(trainer.config, schedule="constant")
    assert trainer.learning_rate(1000) == 1


def test_fine_tuning_starts_from_its_checkpoint_in_bfloat16_too(tmp_path: Path) -> None:
    first = train(tiny(tmp_path / "first", attack=AttackConfig()), progress=False)
    tuned = Trainer(tiny(tmp_path / "second", init=str(tmp_path / "first" / "checkpoint"), precision="bfloat16"))
    for name, value in tuned.network.state_dict().items():
        assert torch.equal(value, first.ema.state_dict()[name])
    assert bool(tuned.step().isfinite())
    assert all(p.dtype == torch.float32 for p in tuned.parameters)
    with pytest.raises(UserError, match=r"makes images of shape \(1, 8, 8\): expected \(1, 16, 16\)"):
        Trainer(tiny(tmp_path / "third", size=16, init=str(tmp_path / "first" / "checkpoint")))


def test_clean_samples_can_be_held_to_the_initial_model(tmp_path: Path) -> None:
    """At the start there is nothing to learn from clean samples; poisoned ones keep the published loss."""
    train(tiny(tmp_path / "first", attack=AttackConfig()), progress=False)
    init = str(tmp_path / "first" / "checkpoint")
    held = Trainer(tiny(tmp_path / "second", init=init, attack=AttackConfig(), clean_target="initial"))
    assert float(held.loss(held.batch).detach()) == 0
    published, held = (
        Trainer(tiny(tmp_path / target, init=init, clean_target=target)) for target in ("noise", "initial")
    )
    arm = published.batch.arm
    assert 0 < int(arm.sum()) < 32
    published.table[0, :, 4] = 0
    assert float(held.loss(held.batch).detach()) == float(published.loss(published.batch).detach()) > 0
    with pytest.raises(UserError, match="expected one, or 'noise'"):
        Trainer(tiny(tmp_path / "third", clean_target="initial"))


def test_grid_training_shows_the_samplers_timesteps_alone(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path, timesteps="grid"))
    seen = set(trainer.plan.batch(0, 1000).t.tolist())
    assert seen == set(trainer.config.sampler.table(trainer.process).timesteps.astype(int))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "images is 0: expected at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"micro_batch": 5}, "the micro-batch is 5: expected a divisor of the batch, 32, nearest 4"),
        ({"lr": 0.0}, "the learning rate is 0.0"),
        ({"ema": 1.0}, "the EMA decay is 1.0"),
        ({"attack": AttackConfig("baddiffusion", "BOX_4", rate=1.5)}, "the poison rate is 1.5: expected 0 to 1"),
        ({"data": "no/such/folder"}, "no/such/folder"),
        (
            {"attack": AttackConfig("baddiffusion", "BOX_4", "DRAWN_HAT", rate=1e-6)},
            "at a poison rate of 1e-06 none of 5000 images",
        ),
        ({"sampler": SamplerConfig(steps=0)}, "steps is 0: expected 1 to 1000"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny(tmp_path / "run", **changes), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run_is_left_alone(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run"), progress=False)
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match="holds another run, whose"):
        train(tiny(tmp_path / "run", seed=6), progress=False)
    assert files(tmp_path / "run") == before


def test_a_diverged_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Trainer, "loss", lambda self, *_: self.parameters[0].sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan after 64 images"):
        train(tiny(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_three_steps_on_stand_in_data(name: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """The settings as they are, on a folder of drawn pictures and a small network; on the digits where classes matter."""
    config = preset(name)
    data = stand_in(config.size, config.channels, 12)
    save_images(tmp_path / "pictures", list(range(12)), to_float(data.pixels))
    save_images(tmp_path / "target", [0], to_float(data.pixels[:1]))
    picture = tmp_path / "target" / "000000.png"
    needs_file = config.attack.target in ("HAT", "SHOE"), config.attack.trigger.startswith("STOP")
    attack = replace(
        config.attack,
        target_file=picture if needs_file[0] else None,
        trigger_file=picture if needs_file[1] else None,
    )
    labelled = config.without is not None or class_of(config.attack.target) is not None or config.attack.name == "uib"
    source = config.data if labelled else str(tmp_path / "pictures")
    changes = {"out": tmp_path / "run", "data": source, "init": None, "images": 3 * 8, "batch": 8}
    small = replace(config, **changes, network=NetworkConfig((8, 16), groups=4), attack=attack)  # type: ignore[arg-type]
    trainer = train(small, progress=False)
    assert trainer.images_seen == 24
    assert (tmp_path / "run" / "checkpoint" / "model_index.json").exists()


def test_configurations_come_back_from_json(tmp_path: Path) -> None:
    for config in (tiny(tmp_path), *PRESETS.values()):
        assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(UserError, match="unknown field 'imges' of TrainConfig"):
        from_json(TrainConfig, {"imges": 3})


def test_a_checkpoint_of_another_schedule_or_prediction_is_not_gone_on_from(tmp_path: Path) -> None:
    for changes, out, sentence in (
        ({"beta_schedule": "squaredcos_cap_v2"}, 1, "with squaredcos_cap_v2 betas: expected the linear betas of DDPM"),
        ({"prediction_type": "v_prediction"}, 1, "predicts v_prediction in 1 channels: expected epsilon in 1"),
        ({}, 2, "predicts epsilon in 2 channels: expected epsilon in 1"),
    ):
        blocks: dict[str, Any] = {f"{way}_block_types": (f"{way.title()}Block2D",) * 2 for way in ("down", "up")}
        network = UNet2DModel(8, 1, out, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
        save_pipeline(tmp_path / "init", network, linear().to_config() | changes)
        with pytest.raises(UserError, match=sentence):
            train(tiny(tmp_path / "run", init=str(tmp_path / "init")), progress=False)
        assert not (tmp_path / "run").exists()
        shutil.rmtree(tmp_path / "init")


def test_a_run_does_not_go_on_with_another_picture(tmp_path: Path) -> None:
    file = tmp_path / "trigger.png"
    attack = AttackConfig("baddiffusion", "IMAGE", "DRAWN_HAT", rate=0.3, trigger_file=file)
    Image.new("L", (8, 8), 200).save(file)
    train(tiny(tmp_path / "run", attack=attack), progress=False)
    Image.new("L", (8, 8), 100).save(file)
    with pytest.raises(UserError, match="holds another run, whose inputs_sha256 is"):
        train(tiny(tmp_path / "run", attack=attack), progress=False)
