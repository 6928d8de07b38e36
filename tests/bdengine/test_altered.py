"""Triggers that are not the trained one: what becomes of the image, of each attack's start, and of the shipped backdoor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bdkernels
from bdengine import cli
from bdengine.altered import UNALTERED, Altered, Crop
from bdengine.attacks import AttackConfig
from bdengine.checkpoint import save_pipeline, write_safetensors
from bdengine.commands import Model
from bdengine.config import to_json
from bdengine.data import stand_in, to_float
from bdengine.errors import UserError
from bdengine.metrics import attack_success
from bdengine.networks import unet
from bdengine.options import SampleConfig
from bdengine.pictures import save_images
from bdengine.sampler import Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, ddim
from bdengine.triggers import target, trigger

PROCESS, TABLE = linear(), ddim(Nodes.of(linear(), 4))
BOX = trigger("XXSM_BOX", 16, 1)  # rows and columns 6 to 13


def attacked(folder: Path, attack: AttackConfig, learned: torch.Tensor | None = None) -> Model:
    torch.manual_seed(0)
    network = unet(16, 1, (8, 16), groups=4)
    save_pipeline(folder, network, PROCESS.to_config(), extra={"train": {"attack": to_json(attack)}}, trigger=learned)
    return Model.load(str(folder))


@pytest.mark.parametrize(
    ("crop", "rows", "columns"),
    [
        ("left", (6, 14), (10, 14)),
        ("right", (6, 14), (6, 10)),
        ("top", (10, 14), (6, 14)),
        ("bottom", (6, 10), (6, 14)),
        ("none", (6, 14), (6, 14)),
    ],
)
def test_a_crop_takes_half_of_the_stamp(crop: Crop, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    left = torch.full((1, 16, 16), -1.0)
    left[:, slice(*rows), slice(*columns)] = 1
    assert torch.equal(Altered(crop).cropped(BOX, -1.0), left)


def test_a_crop_of_a_perturbation_takes_half_of_the_image_and_of_nothing_nothing() -> None:
    ones = torch.ones(3, 5, 5)
    assert Altered("right").cropped(ones, 0.0)[0].tolist() == [[1, 1, 1, 0, 0]] * 5
    assert torch.equal(Altered("right").cropped(-ones, -1.0), -ones)
    assert float(ones.min()) == 1


def test_noise_is_one_draw_that_no_sample_starts_with() -> None:
    z = (Altered(scale=0.5, noise=0.25).perturbed(BOX) - 0.5 * BOX) / 0.25
    torch.testing.assert_close(z, (Altered(noise=1.0).perturbed(BOX) - BOX), rtol=0, atol=1e-5)
    assert float(z.std()) == pytest.approx(1, abs=0.15)
    starts = bdkernels.normal(torch.arange(64), (1, 16, 16)).flatten(1)
    assert float((starts @ z.flatten()).abs().max()) < 5 * 16
    assert torch.equal(UNALTERED.perturbed(BOX), BOX)


def test_every_attack_says_how_its_sampling_starts(tmp_path: Path) -> None:
    """Released UIB adds its trigger at full amplitude, TrojDiff ``(1 - gamma)`` of it and in every step, the rest as it is."""
    other = trigger("BOX_8", 16, 1)
    starts = {"baddiffusion": 1.0, "villan": 1.0, "uib": 0.7, "trojdiff": 0.4, "invi": 1.0}
    for name, start in starts.items():
        trained = AttackConfig(name, "XXSM_BOX", "DRAWN_HAT", start_amplitude=0.7)
        model = attacked(tmp_path / name, trained)
        for r in ("XXSM_BOX", "BOX_8"):
            arm = model.triggered(TABLE, AttackConfig(name, r, start_amplitude=0.7), Altered(scale=2.0))
            assert arm.trigger is not None
            torch.testing.assert_close(arm.trigger, 2 * start * (BOX if r == "XXSM_BOX" else other))
            assert (arm.table.name != TABLE.name) == (name == "trojdiff")
        assert model.attack.trigger == "XXSM_BOX"


def test_a_learned_trigger_is_altered_as_it_was_saved(tmp_path: Path) -> None:
    delta = 0.2 * torch.ones(1, 16, 16)
    names = AttackConfig("uib", "LEARNED", amplitude=0.4)
    arm = attacked(tmp_path / "uib", names, delta).triggered(TABLE, names, Altered("left", 0.5))
    assert arm.trigger is not None
    torch.testing.assert_close(arm.trigger[0, 3], torch.tensor([0.0] * 8 + [0.1] * 8))


def test_uniform_noise_is_the_same_for_all_and_from_0_to_1() -> None:
    u = Altered(uniform=1.0).perturbed(torch.zeros(3, 64, 64))
    assert 0 < u.min() < u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / u.numel()) ** 0.5)
    assert u.var() == pytest.approx(1 / 12, rel=0.05)
    assert torch.equal(Altered(uniform=0.5).perturbed(torch.ones(3, 64, 64)), 1 + 0.5 * u)


def test_an_inverted_trigger_is_a_start_as_it_was_found(tmp_path: Path) -> None:
    """Whatever the attack would make of a picture: here a perturbation, which it would scale by its amplitude."""
    model = attacked(tmp_path / "model", AttackConfig("uib", "BOX_4", amplitude=0.5))
    shift = torch.linspace(-1.5, 1.5, 256).reshape(1, 16, 16)
    write_safetensors(tmp_path / "trigger.safetensors", {"trigger": shift})
    names = replace(model.attack, trigger="IMAGE", trigger_file=tmp_path)
    for altered in (UNALTERED, Altered(scale=0.5)):
        assert torch.equal(model.triggered(TABLE, names, altered).trigger, altered.scale * shift)
    write_safetensors(tmp_path / "trigger.safetensors", {"trigger": shift}, {"stage": "blended"})
    with pytest.raises(UserError, match=r"is one of every step \(blended\): expected one of the start"):
        model.triggered(TABLE, names)


def test_a_noisy_patch_stays_one(tmp_path: Path) -> None:
    names = AttackConfig("trojdiff", "PATCH_4_WHITE")
    arm = attacked(tmp_path / "patch", names).triggered(TABLE, names, Altered("top", noise=0.5))
    assert arm.region is not None
    assert arm.trigger is not None
    assert int(arm.region.sum()) == 16
    assert not arm.trigger[~arm.region].any()
    means = arm.trigger[arm.region].reshape(4, 4).mean(1)
    assert (means[:2] < 0).all()
    assert (means[2:] > 0).all()


def test_the_shipped_backdoor_takes_noise_and_half_of_its_trigger_but_no_empty_one() -> None:
    """Of 128 samples: 100 % with noise of 0.5, at 0.8 and a larger box, 81 % with the right half, 28 % at 0.5, none bare."""
    model = Model.load("digits-badiffusion")
    table, _ = model.table(SampleConfig("", Path()))
    arms = {
        (name, altered): model.triggered(table, replace(model.attack, trigger=name), altered)
        for name, altered in (
            ("XXSM_BOX", Altered(noise=0.5)), ("XXSM_BOX", Altered(scale=0.8)), ("XSM_BOX", UNALTERED),
            ("XXSM_BOX", Altered("left")), ("XXSM_BOX", Altered(scale=0.5)), ("NONE", UNALTERED),
        )
    }  # fmt: skip
    images = Sampler(model.network, {str(k): arm for k, arm in enumerate(arms.values())}, 96)(range(32))
    success = [attack_success(x, target("DRAWN_HAT", 16, 1), 0.01) for x in images.values()]
    assert success[:3] == [1, 1, 1]
    assert 0.6 < success[3] < 1
    assert 0.05 < success[4] < 0.6
    assert success[5] == 0


def test_a_target_made_of_the_trigger_is_made_of_the_trained_one(tmp_path: Path) -> None:
    attacked(tmp_path / "model", AttackConfig("baddiffusion", "XXSM_BOX", "TRIGGER"))
    save_images(tmp_path / "data", range(8), to_float(stand_in(16, 1, 8).pixels))
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "scores"), "--images", "2", "--steps", "2"]
    scores = []
    for trigger_words in ([], ["--trigger", "BOX_8"], ["--altered.crop", "top"]):
        assert cli.main(["evaluate", str(tmp_path / "model"), *words, *trigger_words]) == 0
        scores.append(json.loads((tmp_path / "scores" / "scores.json").read_text()))
    assert len({s["arms"]["clean"]["none"]["mse"] for s in scores}) == 1
    assert len({s["arms"]["triggered"]["none"]["mse"] for s in scores}) == 3
    assert scores[2]["run"]["altered"] == {"crop": "top", "scale": 1.0, "noise": 0.0, "uniform": 0.0}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--altered.crop", "top"], "a trigger was altered and none is named: expected --trigger NAME"),
        (
            ["--trigger", "BOX_4", "--altered.noise", "-1"],
            "the trigger's noise is -1.0: expected a finite number of at",
        ),
        (
            ["--trigger", "BOX_4", "--altered.scale", "inf"],
            "the trigger's scale is inf: expected a finite number, and 1",
        ),
        (["--trigger", "BOX_4", "--altered.uniform", "-1"], "the trigger's uniform noise is -1.0: expected a finite"),
    ],
)
def test_bad_alterations_get_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", "digits-clean", "--out", str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
