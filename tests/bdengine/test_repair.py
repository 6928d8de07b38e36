"""``bdengine repair``: each method from the command line, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from bdengine import repair
from bdengine.attacks import baddiffusion, trojdiff
from bdengine.checkpoint import load_scheduler_config, load_unet, write_safetensors
from bdengine.cli import main
from bdengine.commands import Model
from bdengine.defend import subject_of, write_trigger
from bdengine.defenses import Subject, pruning, removal, ufid, unlearning
from bdengine.defenses.removal import RemovalConfig
from bdengine.defenses.ufid import UfidConfig
from bdengine.errors import UserError
from bdengine.inverted import Inverted
from bdengine.networks import Network
from bdengine.options import ExamineConfig, RepairConfig
from bdengine.schedule import linear
from bdengine.solvers import Nodes, SamplerConfig, ddim
from bdengine.train import TrainConfig
from bdengine.triggers import trigger

from .subjects_for_tests import DDPM, PROCESS, SHAPE, TARGET, cosine, subject


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """A folder as ``bdengine defend`` leaves it."""
    folder = tmp_path / "found"
    folder.mkdir()
    write_safetensors(folder / "trigger.safetensors", {"trigger": torch.full((1, 16, 16), -0.5)}, {})
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of two steps."""
    for variant, told in removal.VARIANTS.items():
        monkeypatch.setitem(removal.VARIANTS, variant, replace(told, epochs=1, share=0.01))
    for name in ("START", "IN_STEPS"):
        monkeypatch.setattr(unlearning, name, RemovalConfig(epochs=1, share=0.01))
    for variant, pruned in pruning.VARIANTS.items():
        monkeypatch.setitem(pruning.VARIANTS, variant, replace(pruned, steps=2))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("method", repair.METHODS)
def test_a_repaired_checkpoint_is_one_that_samples(
    method: str, found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["repair", "digits-badiffusion", "--trigger", str(found), "--out", str(out), "--method", method]
    assert main(words) == 0
    assert f"{method}: 64 images in" in capsys.readouterr().out
    about = json.loads((out / "repair.json").read_text())
    assert (about["images"], about["run"]["method"]) == (64, method)
    before, after = (
        load_unet(path).state_dict() for path in (Model.load("digits-badiffusion").path, out / "checkpoint")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert main(["sample", str(out), "--seeds", "0-1", "--steps", "2", "--out", str(tmp_path / "pictures")]) == 0


def test_a_run_keeps_what_the_checkpoint_was_made_for(found: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    known = repair.run_of(Model.load("digits-badiffusion"), RepairConfig("digits-badiffusion", tmp_path, found))
    assert (known.attack.name, known.sampler) == ("none", SamplerConfig("ddpm", 20))
    told = RepairConfig(str(tiny_checkpoint), tmp_path, found, sampler="unipc", steps=10, batch=8, data="digits")
    stranger = repair.run_of(Model.load(str(tiny_checkpoint)), told)
    sampler = SamplerConfig("unipc", 10)
    assert stranger == TrainConfig(tmp_path, init=str(tiny_checkpoint), batch=8, sampler=sampler, warmup=0)


def test_what_cannot_be_repaired_gets_a_sentence_before_anything_is_inverted(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inverted, "sharpened", lambda *_: pytest.fail("the trigger was inverted first"))
    (tmp_path / "small").mkdir()
    small = {"trigger": torch.zeros(1, 8, 8)}
    write_safetensors(tmp_path / "small" / "trigger.safetensors", small, {"stage": "start"})
    for words, sentence in (
        (["--trigger", str(tmp_path / "small")], "the trigger is (1, 8, 8): expected (1, 16, 16)"),
        (["--method", "unlern"], "unknown method 'unlern'"),
        (["--trigger", str(tmp_path)], "has no trigger.safetensors"),
        (["--data", "nowhere"], "nowhere"),
    ):
        given = ["repair", "digits-badiffusion", "--trigger", str(found), "--out", str(tmp_path / "out"), *words]
        assert main(given) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_scheduler_stays(found: Path, tmp_path: Path, short: None) -> None:
    model, changed = tmp_path / "model", {"variance_type": "fixed_large"}
    shutil.copytree(Model.load("digits-badiffusion").path, model)
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    out = tmp_path / "out"
    assert main(["repair", str(model), "--trigger", str(found), "--out", str(out)]) == 0
    assert load_scheduler_config(out / "checkpoint").items() >= changed.items()


def test_nothing_is_replaced_by_a_repair(
    found: Path, tmp_path: Path, short: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(Model.load("digits-badiffusion").path, run / "checkpoint")
    for out in (run, run / "checkpoint"):
        assert main(["repair", str(run), "--trigger", str(found), "--out", str(out)]) == 2
        assert "holds the checkpoint that is repaired" in capsys.readouterr().err
    words = ["repair", str(run), "--trigger", str(found), "--out", str(tmp_path / "out"), "--method"]
    assert [main([*words, method]) for method in ("unlearn", "removal")] == [0, 2]
    assert "holds another run, whose method is 'unlearn'" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["start", "patched", "blended"])
def test_a_trigger_of_every_step_is_unlearned_as_such(
    stage: str, found: Path, tmp_path: Path, short: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published removals know triggers of the start alone."""
    trigger = {"trigger": torch.full((1, 16, 16), -0.5)}
    write_safetensors(found / "trigger.safetensors", trigger, {"stage": stage})
    words = ["repair", "digits-badiffusion", "--trigger", str(found), "--out"]
    assert main([*words, str(tmp_path / "unlearned")]) == 0
    assert main([*words, str(tmp_path / "removed"), "--method", "removal"]) == (0 if stage == "start" else 2)
    if stage != "start":
        assert f"is one of every step ({stage}), which removal cannot remove" in capsys.readouterr().err
        assert not (tmp_path / "removed").exists()


def test_what_the_audit_found_is_the_attack_that_makes_it() -> None:
    """Its shifts are those that TrojDiff's sampler starts from."""
    delta, nothing = torch.linspace(-1, 1, 256).reshape(1, 16, 16), torch.zeros(1, 16, 16)
    corner = torch.ones(1, 16, 16, dtype=torch.bool).tril(-8)
    for stage, region in (("blended", None), ("patched", corner)):
        attack = trojdiff(linear(), delta, nothing, region)
        again = Inverted(attack.trigger, stage).attack(SamplerConfig(steps=20))
        assert (again.name, again.gamma, again.in_steps) == (attack.name, attack.gamma, True)
        torch.testing.assert_close(again.stamp, attack.stamp)
        assert (again.region is None) if region is None else torch.equal(again.region, region & (delta != 0))


def test_a_repaired_model_is_scored_as_the_one_it_was(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the trigger, the target and the sampler of the other, and its own network."""
    words = ["evaluate", "digits-clean", "--images", "32", "--clips", "none"]
    assert main([*words, "--attack-of", "digits-badiffusion", "--out", str(tmp_path / "as")]) == 0
    assert main([*words, "--trigger", "XXSM_BOX", "--target", "DRAWN_HAT", "--out", str(tmp_path / "named")]) == 0
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("as", "named")]
    assert scores[0]["arms"] == scores[1]["arms"]
    assert scores[0]["arms"]["triggered"]["none"]["asr"] == 0
    capsys.readouterr()
    assert main([*words, "--attack-of", "digits-clean", "--out", str(tmp_path / "no")]) == 2
    assert "digits-clean does not say how it was attacked" in capsys.readouterr().err


def test_networks_that_predict_something_else_are_refused(found: Path, tmp_path: Path) -> None:
    model = Model.load("digits-badiffusion")
    velocity = replace(model, scheduler=model.scheduler | {"prediction_type": "v_prediction"})
    blocks: dict[str, Any] = {f"{way}_block_types": (f"{way.title()}Block2D",) * 2 for way in ("down", "up")}
    unet = UNet2DModel(16, 1, 2, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    with_variance = replace(model, network=Network(unet))
    for other, sentence in (
        (velocity, "predicts v_prediction in 1 channels"),
        (with_variance, "predicts epsilon in 2"),
    ):
        with pytest.raises(UserError, match=sentence):
            repair.run_of(other, RepairConfig(model.path, tmp_path, found))


def test_other_betas_are_refused(found: Path, tmp_path: Path) -> None:
    model = Model.load("digits-badiffusion")
    for scheduler in (model.scheduler | {"beta_end": 0.03}, {"_class_name": "EDMEulerScheduler"}):
        other = replace(model, scheduler=scheduler)
        with pytest.raises(UserError, match="expected the linear betas of DDPM"):
            repair.run_of(other, RepairConfig(model.path, tmp_path, found))


def test_what_would_be_trained_on_other_data_or_over_another_run_is_refused(
    found: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    with pytest.raises(UserError, match="does not say what it was trained on: expected --data"):
        repair.run_of(Model.load(str(tiny_checkpoint)), RepairConfig(str(tiny_checkpoint), tmp_path, found))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a training run: expected another folder"):
        repair.repaired(Model.load("digits-clean"), RepairConfig("digits-clean", tmp_path / "run", found))


def test_a_trigger_says_which_stage_found_it_whatever_lies_beside_it(tmp_path: Path) -> None:
    r = torch.full((1, 16, 16), -0.5)
    (tmp_path / "audit.json").write_text('{"details": {"stage": "blended"}}')
    write_safetensors(tmp_path / "trigger.safetensors", {"trigger": r})
    assert not Inverted.load(tmp_path, (1, 16, 16)).in_steps
    write_safetensors(tmp_path / "trigger.safetensors", {"trigger": r}, {"stage": "patched"})
    assert Inverted.load(tmp_path, (1, 16, 16)).in_steps


@pytest.mark.parametrize(("stage", "inverts"), [("start", True), ("blended", False), ("elijah", False), (None, False)])
def test_what_a_search_found_is_inverted_from_there(stage: str | None, inverts: bool) -> None:
    """A square of 12 pixels opens the shipped backdoor, and Elijah's inversion from it is nearer to its trigger, of 8."""
    wide, true = trigger("XXSM_BOX", 16, 1), trigger("XXSM_BOX", 16, 1)
    wide[:, 2:14, 2:14] = 1
    table = SamplerConfig(steps=20).table(linear())
    found = Inverted(wide, stage).sharpened(Subject(Model.load("digits-badiffusion").network, linear(), table))
    assert found.stage == stage
    assert torch.equal(found.shift, wide) is not inverts
    assert (cosine(found.shift, true) > 0.9) is inverts


@pytest.mark.parametrize("stage", ["clipped", "ode"])
def test_it_is_inverted_as_its_stage_opens_and_kept_where_that_says_nothing(stage: str) -> None:
    """The closed-form network: a box a pixel wider and taller than the trigger under the clip, and DDIM's own trigger.

    Made for DDIM, ``c_T`` is 1, and Elijah's inversion from the trigger itself ends at noise.
    """
    made = DDPM if stage == "clipped" else ddim(Nodes.of(PROCESS, 20))
    told: dict[str, Any] = {"coefficients": "clipped" if stage == "clipped" else "exact", "table": made}
    r = torch.full(SHAPE, -0.6)
    r[:, 5:10, 5:10] = 0.6
    wide = r.clone()
    if stage == "clipped":
        wide[:, 4:10, 4:10] = 0.6
    attack = baddiffusion(PROCESS, r, TARGET, trigger_only=True, **told)
    found = Inverted(wide, stage).sharpened(subject(0.3, attack))
    assert torch.equal(found.shift, wide) is (stage == "ode")
    assert cosine(found.shift, r) > max(cosine(wide, r) - 1e-6, 0.95)


def test_what_a_defense_only_searched_says_so(tmp_path: Path) -> None:
    _, of = subject_of("digits-clean", ExamineConfig(steps=2))
    write_trigger(tmp_path, ufid.examine(of, UfidConfig(images=2)))
    assert Inverted.load(tmp_path, (1, 16, 16)).stage == "start"


def test_a_start_that_opens_under_ddim_is_unlearned_with_its_coefficient() -> None:
    r, own = torch.full((1, 16, 16), -0.5), SamplerConfig("ddpm", 20)
    made = {stage: Inverted(r, stage).attack(own).coefficient for stage in ("start", "ode")}
    assert made["start"].tolist() == Inverted(r).attack(own).coefficient.tolist()
    assert made["ode"].tolist() == Inverted(r).attack(SamplerConfig("ddim", 20)).coefficient.tolist()
    assert abs(made["ode"] - made["start"]).max() > 0.1
