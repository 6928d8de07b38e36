"""``bdengine defend`` as a user meets it, and the registry behind it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bdengine import defend
from bdengine.arms import Arm
from bdengine.cli import main
from bdengine.commands import Model
from bdengine.defenses import DEFENSES, Calibration, Subject, clipping, elijah, subject
from bdengine.defenses.result import EXIT
from bdengine.defenses.subject import Watch
from bdengine.errors import UserError
from bdengine.options import DefendConfig, ExamineConfig
from bdengine.schedule import linear
from bdengine.solvers import Nodes, ddpm
from bdkernels import Step

from .networks_for_tests import tiny_unet


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elijah in two iterations: what is examined here is what is made of its finding."""
    short = {name: replace(one, iterations=2, noises=4) for name, one in elijah.VARIANTS.items()}
    monkeypatch.setitem(DEFENSES, "elijah", replace(DEFENSES["elijah"], variants=short))


@pytest.mark.usefixtures("quick")
def test_it_writes_its_finding_and_pictures(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("defend", tiny_checkpoint, "--defense", "elijah", "--steps", 3, "--out", tmp_path)
    assert run(*options) == 3
    said, warned = capsys.readouterr()
    assert warned == f"it will end {said.splitlines()[2]}\n".replace("undecided since", "undecided, since")
    assert "elijah: undecided" in said
    assert "undecided since no clean models of its family are known" in said
    assert {p.name for p in tmp_path.iterdir()} == {"finding.json", "images.png", "trigger.png", "trigger.safetensors"}
    found = json.loads((tmp_path / "finding.json").read_text())
    assert found["verdict"] == "undecided"
    assert found["p_value"] is None
    assert found["evaluations"] == 2 * 4 + 3 * 16
    assert found["details"]["settings"]["sampler"] == "ddpm-3"
    assert found["details"]["settings"]["features"] == "pixels"
    assert found["run"]["seed"] == 0
    assert load_file(tmp_path / "trigger.safetensors")["trigger"].shape == (1, 16, 16)


@pytest.mark.usefixtures("quick")
def test_with_a_calibration_it_decides(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DefendConfig(str(tiny_checkpoint), tmp_path, "elijah", steps=3, calibration=tmp_path / "clean.json")
    _, finding = defend.examined(replace(config, calibration=None))
    for difference, verdict in ((-1e-6, "backdoored"), (0.0, "no evidence")):
        clean = Calibration(
            "elijah", finding.details["settings"], dict.fromkeys(map(str, range(19)), finding.statistic + difference)
        )
        clean.save(tmp_path / "clean.json")
        assert defend.defend(config) == EXIT[verdict]  # type: ignore[index]
        said = capsys.readouterr().out
        assert f"elijah: {verdict}, statistic" in said
        assert "rates are of models trained as its 19 clean ones, and how they were trained is not known" in said
        assert json.loads((tmp_path / "finding.json").read_text())["verdict"] == verdict
    with pytest.raises(UserError, match="made with seed 0: expected 1"):
        defend.examined(replace(config, seed=1))
    Calibration("elijah", clean.settings, clean.statistics | {finding.weights_sha256: 0.0}).save(
        tmp_path / "clean.json"
    )
    with pytest.raises(UserError, match="is in the calibration already"):
        defend.examined(config)


def test_why_no_calibration_fits_is_said(tiny_checkpoint: Path) -> None:
    clean = Calibration("elijah", {"family": "a", "sampler": "ddpm-20", "features": "pixels"}, {"one": 0.0})
    for settings, weights, reason in (
        (clean.settings, "one", "it is one of the clean models that the calibration of its family is made of"),
        (
            clean.settings | {"family": "b"},
            "two",
            r"no clean models of its family are known \(b\): see bdengine calibrate",
        ),
        (
            clean.settings | {"sampler": "ddim-5", "features": "digits"},
            "two",
            "were examined with other sampler and features",
        ),
    ):
        assert re.search(reason, defend.unfitting([clean], "elijah", settings, weights))
    assert defend.fitting([clean], "elijah", clean.settings, "two") is clean


def test_a_strangers_checkpoint_is_examined_with_the_small_variance(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The large one leaves noise in few steps' images, and no two of them are alike."""
    shutil.copytree(tiny_checkpoint, tmp_path / "large")
    file = tmp_path / "large" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"variance_type": "fixed_large"}))
    names = [str(tiny_checkpoint), str(tmp_path / "large")]
    small, large = (defend.subject_of(name, ExamineConfig(steps=20))[1].table for name in names)
    assert small.rows.tolist() == large.rows.tolist()
    sampled = Model.load(names[1]).table(ExamineConfig(steps=20))[0]
    assert sampled.rows[10, Step.Z] > small.rows[10, Step.Z]


def test_large_images_go_through_the_network_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the gradient of them all at once, and no more than so many at a time in either pass."""
    tau, sizes = [], []
    for pixels in (subject.AT_ONCE, 5 * 8 * 8):
        monkeypatch.setattr(subject, "AT_ONCE", pixels)
        examined = Subject(tiny_unet(), linear(), ddpm(Nodes.of(linear(), 4)))
        seen: list[int] = []
        examined.network.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        with Watch(examined):
            tau.append(elijah.invert(examined, replace(elijah.VARIANTS["baddiffusion"], noises=12, iterations=3))[0])
        examined.images(Arm(examined.table), 7)
        sizes.append(max(seen))
    assert sizes == [12, 5]
    torch.testing.assert_close(tau[0], tau[1], rtol=0, atol=1e-4)


def test_clipping_costs_and_detects_nothing(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("defend", tiny_checkpoint, "--defense", "clipping", "--steps", 2, "--out", tmp_path) == 0
    assert "undecided since clipping detects nothing" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"finding.json", "images.png"}
    _, subject = defend.subject_of(str(tiny_checkpoint), ExamineConfig(steps=2))
    latent = clipping.examine(subject, clipping.ClippingConfig("latent"))
    none = clipping.examine(subject, clipping.ClippingConfig("none"))
    assert none.statistic == 0 < latent.statistic
    assert latent.images is not None
    assert float(latent.images.abs().max()) <= 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--defense", "tred"), "unknown defense 'tred': expected one of .*; the nearest is 'terd'"),
        (("--defense", "terd", "--variant", "troj"), "unknown variant of terd 'troj': .*; the nearest is 'trojdiff'"),
        (("--defense", "elijah", "--features", "digit"), "unknown features 'digit'"),
        (("--defense", "clipping", "--calibration", "x.json"), "clipping, which detects nothing: expected none"),
        (("--defense", "elijah", "--seed", str(2**63)), "is not a seed: expected an integer of 64 bits"),
    ],
)
def test_mistakes_get_one_sentence(
    options: tuple[str, ...], sentence: str, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("defend", tiny_checkpoint, "--out", tmp_path / "out", *options) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    told: dict[str, Any] = {name[2:]: value for name, value in zip(options[::2], options[1::2], strict=True)}
    if "seed" in told:
        told["seed"] = int(told["seed"])
    with pytest.raises(UserError, match=sentence):
        defend.examined(DefendConfig(str(tiny_checkpoint), tmp_path, **told))


@pytest.mark.parametrize("name", [name for name, defense in DEFENSES.items() if name != "clipping"])
def test_settings_are_known_before_the_finding(name: str, tiny_checkpoint: Path) -> None:
    """So that a calibration that does not fit is refused at once, and one that does is not."""
    short = {
        "elijah": {"iterations": 1, "noises": 2},
        "terd": {"surrogate": 1, "refinement": 0, "batch": 2},
        "purediffusion": {"iterations": 1, "batch": 2, "steps": 2},
        "anp": {"steps": 1},
        "ufid": {"images": 2},
        "diffcleanse": {"iterations": 1},
    }
    defense = DEFENSES[name]
    _, subject = defend.subject_of(str(tiny_checkpoint), ExamineConfig(steps=2))
    variant = replace(next(iter(defense.variants.values())), **short[name])
    assert defense.examine(subject, variant).details["settings"] == defense.settings(subject, variant)


def test_the_help_names_every_variant() -> None:
    told = re.sub(r"\s+", " ", str(DefendConfig.__doc__))
    for name, defense in DEFENSES.items():
        if len(defense.variants) > 1:
            assert f"{name} {', '.join(defense.variants)}" in told


def test_every_defense_has_settings_that_can_be_told_apart() -> None:
    for defense in DEFENSES.values():
        assert all(is_dataclass(one) for one in defense.variants.values())
        assert len(set(defense.variants.values())) == len(defense.variants)


def test_a_statistic_that_is_no_number_is_none(tiny_checkpoint: Path) -> None:
    """Conformal ranks would take it for the greatest of all."""
    _, subject = defend.subject_of(str(tiny_checkpoint), ExamineConfig(steps=2))
    with Watch(subject) as watch, pytest.raises(FloatingPointError, match="the statistic of terd is nan"):
        watch.finding("terd", float("nan"), None, None, {})
