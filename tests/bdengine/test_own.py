"""Checkpoints with schedulers that are not ours: sampled by what their own folder says, as stock samples them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers.schedulers as stock
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

import bdkernels
from bdengine import cli, pictures
from bdengine.checkpoint import save_pipeline
from bdengine.commands import Model
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.options import SampleConfig
from bdengine.own import own_table
from bdengine.sampler import Arm, Sampler
from bdengine.solvers import Nodes, score_sde
from bdkernels import Step

SEEDS, STEPS = [2, 3], 6


def unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, **options,
    ).eval()  # fmt: skip


def saved(folder: Path, scheduler: Any, **options: Any) -> UNet2DModel:
    network = unet(**options)
    save_pipeline(folder, network, dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    return network


def sampled(folder: Path, out: Path, *more: str) -> Tensor:
    words = ["sample", str(folder), "--out", str(out), "--seeds", "2-3", "--steps", str(STEPS), *more]
    assert cli.main(words) == 0
    return pictures.load_images(out, SEEDS)


@torch.no_grad()
def stock_loop(scheduler: Any, network: UNet2DModel) -> Tensor:
    """Stock's loop, started from our noise: for schedulers that draw none."""
    scheduler.set_timesteps(STEPS)
    x = bdkernels.normal(torch.tensor(SEEDS), (1, 8, 8)) * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scaled(x, t), t).sample, t, x).prev_sample
    return x


DETERMINISTIC = {
    "EDMEuler": stock.EDMEulerScheduler(sigma_min=0.02, sigma_max=8.0),
    "EDMDPMSolverMultistep": stock.EDMDPMSolverMultistepScheduler(sigma_min=0.02, sigma_max=8.0),
    "FlowMatchEulerDiscrete": stock.FlowMatchEulerDiscreteScheduler(),
    "DDIM": stock.DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep", "FlowMatchEulerDiscrete"])
def test_a_scheduler_without_betas_runs_as_the_checkpoints_own(name: str, tmp_path: Path) -> None:
    scheduler = DETERMINISTIC[name]
    network = saved(tmp_path / "model", scheduler)
    got = sampled(tmp_path / "model", tmp_path / "out")
    expected = stock_loop(scheduler, network).clamp(-1, 1)
    assert (got - expected).abs().max() <= 1 / 255 + 1e-5  # half a level of rounding to bytes, and float32


def test_own_is_also_for_schedulers_with_betas(tmp_path: Path) -> None:
    scheduler = DETERMINISTIC["DDIM"]
    network = saved(tmp_path / "model", scheduler)
    got = sampled(tmp_path / "model", tmp_path / "own", "--sampler", "own")
    assert (got - stock_loop(scheduler, network).clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-5
    ours = sampled(tmp_path / "model", tmp_path / "ours", "--sampler", "ddim")  # on the trailing grid
    assert (ours - got).abs().max() > 2 / 255


def test_score_sde_is_sampled_with_its_corrector_and_shown_in_its_range(tmp_path: Path) -> None:
    scheduler = stock.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=5.0, correct_steps=2, snr=0.1)
    saved(tmp_path / "model", scheduler, time_embedding_type="fourier")
    table = own_table(dict(scheduler.config) | {"_class_name": "ScoreSdeVeScheduler"}, STEPS)
    scheduler.set_timesteps(STEPS)
    scheduler.set_sigmas(STEPS)
    times = table.rows[2::3, Step.TIME]
    np.testing.assert_allclose(times, scheduler.sigmas.numpy(), rtol=1e-5)
    assert len(table) == 3 * STEPS
    assert (table.rows == score_sde(Nodes.exploding(times), corrector_steps=2, snr=0.1).rows).all()
    sampled(tmp_path / "model", tmp_path / "out")
    pixels = np.asarray(Image.open(pictures.path_of(tmp_path / "out", 2)))
    image = Sampler(Network(unet(time_embedding_type="fourier")), {"": Arm(table)}, 64)(SEEDS)[""][0, 0]
    np.testing.assert_allclose(pixels, (image.clamp(0, 1) * 255).numpy(), atol=0.51)


def test_a_score_network_is_sampled_without_noise_by_edms(tmp_path: Path) -> None:
    scheduler = stock.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=5.0)
    saved(tmp_path / "model", scheduler, time_embedding_type="fourier")
    model = Model.load(str(tmp_path / "model"))
    table, sampler = model.table(SampleConfig("", Path(), sampler="edm", steps=4))
    assert sampler == {"name": "edm", "steps": 4}
    assert len(table) == 7
    assert not table.rows[:, Step.Z].any()
    np.testing.assert_allclose(
        table.rows[[0, 1, 3, 5], Step.TIME] ** (1 / 7), np.linspace(5 ** (1 / 7), 0.01 ** (1 / 7), 4)
    )
    one, other = (sampled(tmp_path / "model", tmp_path / name, "--sampler", "edm") for name in ("one", "other"))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--sampler", "ddim"],
            "the sampler ddim needs betas and the checkpoint's scheduler is EDMEulerScheduler: expected own",
        ),
        (["--order", "2"], "order is 2 with the checkpoint's own scheduler: expected none"),
        (["--steps", "0"], "steps is 0: expected at least 1"),
        (["--sampler", "edm"], "the sampler edm was asked of EDMEulerScheduler: expected a score network's"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "model", DETERMINISTIC["EDMEuler"])
    assert cli.main(["sample", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_scheduler_is_refused_and_a_fused_one_is_its_stock_class() -> None:
    with pytest.raises(UserError, match="diffusers scheduler"):
        own_table({"_class_name": "MyScheduler"}, 5)
    fused = own_table({"_class_name": "FusedDDIMScheduler", "clip_sample": False}, 5)
    assert fused.name == "DDIMScheduler-5"


@pytest.mark.parametrize(
    ("config", "steps", "sentence"),
    [
        (
            {"_class_name": "VQDiffusionScheduler"},
            5,
            "VQDiffusionScheduler cannot be made from the checkpoint's configuration",
        ),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "even"},
            5,
            "DDPMScheduler cannot be made from .*even is not implemented",
        ),
        ({"_class_name": "UnCLIPScheduler"}, 1, "UnCLIPScheduler cannot make 1 timesteps .ZeroDivisionError"),
    ],
)
def test_what_diffusers_itself_refuses_gets_one_sentence(config: dict[str, Any], steps: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        own_table(config, steps)


def test_a_sampler_that_the_user_names_keeps_the_checkpoints_variance(tmp_path: Path) -> None:
    scheduler = stock.DDPMScheduler(variance_type="fixed_large")
    trained = {"train": {"sampler": {"name": "dpm++", "steps": 20}}}
    save_pipeline(tmp_path / "model", unet(), dict(scheduler.config) | {"_class_name": "DDPMScheduler"}, extra=trained)
    sampled(tmp_path / "model", tmp_path / "out", "--sampler", "ddpm")
    said = json.loads((tmp_path / "out" / "run.json").read_text())["sampler"]
    assert said["variance"] == "large"
    assert said["steps"] == STEPS


def test_an_empty_sampler_is_not_an_absent_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "model", DETERMINISTIC["DDIM"])
    assert cli.main(["sample", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--sampler", ""]) == 2
    assert "unknown sampler ''" in capsys.readouterr().err
