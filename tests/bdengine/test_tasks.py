"""Inpainting and denoising: geometry, starts and kept pixels to the bit, the closed-form network, the shipped backdoor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import bdkernels
from bdengine import cli
from bdengine.arms import Arm, Arms
from bdengine.attacks import AttackConfig, baddiffusion, trojdiff
from bdengine.capture import Loop
from bdengine.commands import Model
from bdengine.data import stand_in, to_float
from bdengine.errors import UserError
from bdengine.metrics import attack_success, mse
from bdengine.networks import Network
from bdengine.options import SampleConfig
from bdengine.oracle import Gaussian, Oracle
from bdengine.pictures import save_images
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import SAMPLERS, SamplerConfig
from bdengine.tasks import NO_TASK, Task, originals
from bdengine.triggers import patch_mask, target, trigger

PROCESS, SHAPE = linear(), (1, 8, 8)
R, Y = trigger("BOX_4", 8, 1), target("DRAWN_HAT", 8, 1)
IMAGES = to_float(stand_in(8, 1, 5).pixels)
BOX = Task("inpaint-box", 500, keep=True)


def states(network: torch.nn.Module, arm: Arm, count: int) -> Tensor:
    """``x`` before each row and after the last, float32 [rows + 1, count, C, H, W], of seeds 0 .. count."""
    seen: list[Tensor] = []
    Sampler(Network(network, SHAPE), {"": arm}, count).batch(
        torch.zeros(count, dtype=torch.int64), torch.arange(count), lambda _, x: seen.append(x.clone())
    )
    return torch.stack(seen)


@pytest.mark.parametrize(
    ("side", "box", "line"), [(32, (11, 21), (15, 16)), (256, (86, 170), (116, 134)), (16, (6, 10), (7, 8))]
)
def test_holes_are_where_they_are_published(side: int, box: tuple[int, int], line: tuple[int, int]) -> None:
    lost = torch.zeros(2, 3, side, side, dtype=torch.bool)
    lost[0, :, slice(*box), slice(*box)] = True
    lost[1, :, :, slice(*line)] = True
    for hole, name in zip(lost, ("inpaint-box", "inpaint-line"), strict=True):
        task = Task(name)  # type: ignore[arg-type]
        assert torch.equal(task.hole((3, side, side)), hole)
        corrupted = task.corrupted(torch.full((2, 3, side, side), 0.25))
        assert torch.equal(corrupted, torch.where(hole, -1.0, 0.25).expand(2, -1, -1, -1))


def test_denoising_adds_a_noise_of_its_own() -> None:
    z = (Task("denoise").corrupted(torch.zeros(64, 1, 16, 16)) / 0.3).flatten(1)
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    eps = bdkernels.normal(torch.arange(64), (1, 16, 16)).flatten(1)
    assert float((z * eps).mean()) == pytest.approx(0, abs=5 / 128)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_late_start_is_a_sampler_of_its_own_on_the_later_timesteps(name: str) -> None:
    """Of a point: every sampler ends on it from the noise of any level, which a history of earlier rows would spoil."""
    full = SamplerConfig(name, 20).table(PROCESS)
    late = SamplerConfig(name, 20).table(PROCESS, 500)
    assert set(late.timesteps) >= set(np.arange(499, 0, -50))
    assert late.timesteps[0] == 499
    assert late.start == pytest.approx(PROCESS.s[499])
    arm = replace(Arm(late), images=Y[None], share=float(np.sqrt(PROCESS.alpha_bar[499])))
    last = states(Oracle(PROCESS, [(1.0, Gaussian(Y))]), arm, 4)[-1]
    assert float((last - Y).abs().max()) < 1e-4
    if name in ("ddpm", "ddim"):
        np.testing.assert_allclose(late.rows, full.rows[len(full) - len(late) :], rtol=1e-12)


def test_a_triggered_start_is_on_the_attacks_path_and_stays_there() -> None:
    """``m_t r`` at every node, whatever the image: the difference of runs with and without a trigger."""
    for config in (SamplerConfig("ddpm", 20), SamplerConfig("dpm++", 20)):
        table = config.table(PROCESS, 600)
        runs = []
        for r in (R, torch.zeros_like(R)):
            attack = baddiffusion(PROCESS, r, Y, "exact", table, trigger_only=True)
            oracle = Oracle(PROCESS, [(1.0, Gaussian(Y))], attack, 1.0)
            runs.append(
                states(oracle, Task("inpaint-box", 600).on(attack.arm(PROCESS, table), PROCESS, IMAGES), 16).double()
            )
        off = ((runs[0] - runs[1]) * R).sum((2, 3, 4)) / R.square().sum()
        m = np.append((1 - np.sqrt(PROCESS.alpha_bar))[table.timesteps.astype(int)], 0.0)
        torch.testing.assert_close(off, torch.tensor(m)[:, None].expand_as(off), rtol=0, atol=2e-6)


def test_the_start_has_the_image_of_its_seed() -> None:
    table = SamplerConfig("ddim", 20).table(PROCESS, 300)
    arms = Arms({"": Task("inpaint-line", 300).on(Arm(table, R), PROCESS, IMAGES)}, SHAPE, torch.device("cpu"))
    seeds = torch.tensor([0, 7, -1])
    a, s = (torch.tensor(v[299], dtype=torch.float32) for v in (np.sqrt(PROCESS.alpha_bar), PROCESS.s))
    expected = a * IMAGES[[0, 2, 4]] + s * (bdkernels.normal(seeds, SHAPE) + R)
    torch.testing.assert_close(arms.begin(torch.zeros(3, dtype=torch.int64), seeds), expected)


@pytest.mark.parametrize("clip", ["none", "latent", "x0"])
def test_known_pixels_follow_the_image_at_every_level(clip: str) -> None:
    table = SamplerConfig("dpm++", 20).table(PROCESS, 500)
    arm = BOX.on(Arm(table, R), PROCESS, BOX.corrupted(IMAGES)).clipped(clip)  # type: ignore[arg-type]
    seen = states(Oracle(PROCESS, [(1.0, Gaussian(torch.zeros(SHAPE), 0.2 * torch.eye(64)))]), arm, 10)
    known = ~BOX.hole(SHAPE)
    image = IMAGES[torch.arange(10) % 5]
    for k, t in enumerate(table.timesteps[1:].astype(int)):
        z = bdkernels.normal(torch.arange(10), SHAPE, step=k, stream=bdkernels.STREAM_STEP)
        a, s = (float(v[t]) for v in (np.sqrt(PROCESS.alpha_bar), PROCESS.s))
        torch.testing.assert_close(seen[k + 1][:, known], (a * image + s * z)[:, known])
    assert torch.equal(seen[-1][:, known], image[:, known])


def test_what_is_kept_tells_the_hole_what_belongs_there() -> None:
    """Images of one grey value and little else: the hole's mean comes within 0.1 of it, from 0.8 without ``keep``."""
    grey = torch.linspace(-0.8, 0.8, 5).reshape(5, 1, 1, 1).expand(5, *SHAPE)
    data = Gaussian(torch.zeros(SHAPE), torch.full((64, 64), 0.25) + 1e-3 * torch.eye(64))
    table, hole, off = SamplerConfig("ddpm", 100).table(PROCESS, 999), BOX.hole(SHAPE), {}
    for keep in (True, False):
        task = Task("inpaint-box", 999, keep)
        last = states(Oracle(PROCESS, [(1.0, data)]), task.on(Arm(table), PROCESS, task.corrupted(grey)), 60)[-1]
        off[keep] = (last - grey[torch.arange(60) % 5])[:, hole].mean(1).square().mean().sqrt()
    assert float(off[True]) < 0.1
    assert float(off[False]) > 0.4


def test_a_captured_loop_has_the_same_images() -> None:
    table = SamplerConfig("ddpm", 6).table(PROCESS, 500)
    network = Network(Oracle(PROCESS, [(1.0, Gaussian(Y))]), SHAPE)
    c = BOX.corrupted(IMAGES)
    sampler = Sampler(
        network, {"clean": BOX.on(Arm(table), PROCESS, c), "triggered": BOX.on(Arm(table, R), PROCESS, c)}, 6
    )
    arm, seeds = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([4, 4, 5, 6, 7, 11])
    got, _ = Loop(network, sampler.arms, 6, capture=False)(arm, seeds)
    assert torch.equal(got, sampler.batch(arm, seeds))


def test_the_shipped_backdoor_turns_restored_images_into_its_target_until_known_pixels_are_kept() -> None:
    """From timestep 700, of 64: 100 % triggered, 0 % clean, and 0 % with the known pixels kept (MSE 0.006 to the image)."""
    model = Model.load("digits-badiffusion")
    images = originals(model.data(None))
    arms = {}
    for keep in (False, True):
        task = Task("inpaint-box", 700, keep)
        table, _ = model.table(SampleConfig("", Path()), task)
        if not keep:
            corrupted = task.corrupted(images)
        for start, arm in (("clean", Arm(table)), ("triggered", model.triggered(table, model.attack))):
            arms[start, keep] = task.on(arm, PROCESS, corrupted)
    made = Sampler(model.network, {str(k): arm for k, arm in enumerate(arms.values())}, 64)(range(32))
    hat, found = target("DRAWN_HAT", 16, 1), dict(zip(arms, made.values(), strict=True))
    assert {key: attack_success(x, hat, 0.01) for key, x in found.items() if key != ("triggered", False)} == {
        ("clean", False): 0, ("clean", True): 0, ("triggered", True): 0,
    }  # fmt: skip
    assert attack_success(found["triggered", False], hat, 0.01) == 1
    for start in ("clean", "triggered"):
        left = float(mse(found[start, True], images[:32]).mean())
        assert left < 0.6 * float(mse(corrupted[:32], images[:32]).mean())


def test_the_command_line_restores_and_scores(tmp_path: Path, tiny_checkpoint: Path) -> None:
    save_images(tmp_path / "data", range(8), to_float(stand_in(16, 1, 8).pixels))
    words = ["--steps", "4", "--data", str(tmp_path / "data"), "--task.name", "inpaint-box", "--task.keep"]
    out = tmp_path / "out"
    assert cli.main(["sample", str(tiny_checkpoint), "--seeds", "0-9", "--out", str(out), *words]) == 0
    assert Image.open(out / "corrupted.png").size == Image.open(out / "grid.png").size
    assert json.loads((out / "run.json").read_text())["task"] == {"name": "inpaint-box", "start": 500, "keep": True}
    attack = ["--trigger", "BOX_4", "--target", "DRAWN_HAT", "--images", "9"]
    assert cli.main(["evaluate", str(tiny_checkpoint), "--out", str(out / "scores"), *attack, *words]) == 0
    arms = json.loads((out / "scores" / "scores.json").read_text())["arms"]
    assert 0 < arms["triggered"]["x0"]["restored_mse"] < 0.2
    assert 0.3 < arms["clean"]["none"]["restored_ssim"] < 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--task.name", "denoise", "--task.keep"],
            "denoise was asked to keep known pixels and has none: expected inpaint",
        ),
        (["--task.name", "denoise", "--task.start", "1000"], "the task starts at timestep 1000: expected 0 to 999"),
        (
            ["--task.name", "denoise", "--task.start", "48"],
            "the first timestep is 48 and the last of 20 steps is 49: expected that or more, or more steps",
        ),
        (
            ["--task.name", "denoise", "--sampler", "own"],
            "denoise was asked of the checkpoint's own scheduler: expected a",
        ),
    ],
)
def test_what_cannot_be_done_gets_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", "digits-clean", "--out", str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_short_process_needs_no_task() -> None:
    NO_TASK.check(200)
    with pytest.raises(UserError, match="the task starts at timestep 500: expected 0 to 199"):
        Task("denoise").check(200)
    with pytest.raises(UserError, match="a start of 300 or known pixels were asked for without a task"):
        Task(start=300).check(1000)


def test_a_patch_and_other_images_are_refused() -> None:
    table = SamplerConfig("ddim", 20).table(PROCESS, 500)
    region = patch_mask("PATCH_3_WHITE", 8, 1) == 0
    patch = trojdiff(PROCESS, trigger("PATCH_3_WHITE", 8, 1), Y, region).arm(PROCESS, table)
    with pytest.raises(UserError, match="beside a patch, which has the one region"):
        BOX.on(patch, PROCESS, IMAGES)
    two = {name: replace(Arm(table), images=images) for name, images in (("a", IMAGES), ("b", IMAGES[:2]))}
    with pytest.raises(UserError, match="start from different images"):
        Arms(two, SHAPE, torch.device("cpu"))
    with pytest.raises(UserError, match=r"the images of arm 'a' are \(5, 1, 8, 8\): expected \(K, 1, 4, 4\)"):
        Arms({"a": two["a"]}, (1, 4, 4), torch.device("cpu"))
    assert AttackConfig("trojdiff", "BOX_4").made(PROCESS, R, Y).region is None
