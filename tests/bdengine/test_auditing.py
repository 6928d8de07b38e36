"""``bdengine audit`` and ``bdengine calibrate`` as a user meets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bdengine import audit, auditing, markup, pictures
from bdengine.arms import Arm
from bdengine.checkpoint import EXTRA, save_pipeline
from bdengine.cli import main
from bdengine.commands import Model
from bdengine.defenses import DEFENSES, Calibration, Finding, Subject, elijah, purediffusion, starts, ufid
from bdengine.defenses.ufid import UfidConfig
from bdengine.files import read_json, write_json
from bdengine.networks import unet
from bdengine.options import SampleConfig
from bdengine.sampler import Sampler
from bdengine.schedule import Exploding, linear


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few shifts, images and iterations: what is examined here is what is made of the findings."""
    monkeypatch.setattr(starts, "GRID", ((6, 2),))
    monkeypatch.setattr(starts, "IMAGES", 3)
    monkeypatch.setattr(audit, "IMAGES", 16)
    monkeypatch.setattr(audit, "ODE_STEPS", 3)
    monkeypatch.setitem(
        elijah.VARIANTS, "baddiffusion", replace(elijah.VARIANTS["baddiffusion"], iterations=1, noises=2)
    )
    searched = replace(purediffusion.VARIANTS["searched"], iterations=1, batch=2, steps=2)
    monkeypatch.setitem(purediffusion.VARIANTS, "searched", searched)


def untrained(path: Path, seed: int) -> Path:
    """An untrained network like that of `tiny_checkpoint`, with weights of its own."""
    torch.manual_seed(seed)
    save_pipeline(path, unet(16, 1, (8, 16), groups=4), linear().to_config())
    return path


@pytest.fixture
def clean(tmp_path: Path) -> tuple[Path, Path]:
    """Two untrained networks."""
    return untrained(tmp_path / "a", 1), untrained(tmp_path / "b", 2)


@pytest.fixture
def calibration(tmp_path: Path, clean: tuple[Path, Path]) -> Path:
    """Of both; a rate of 0.4 is what two models can bound."""
    assert run("calibrate", *clean, "--out", tmp_path / "clean", "--alpha", 0.4) == 0
    return tmp_path / "clean" / "calibration.json"


def test_a_calibration_is_made_and_goes_on(
    clean: tuple[Path, Path], calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "decides nothing" not in capsys.readouterr().out
    findings = sorted(p for p in calibration.parent.iterdir() if p.name not in ("run.json", "calibration.json"))
    made = Calibration.load(calibration)
    assert made.defense == "audit"
    assert len(made.statistics) == len(findings) == 2
    assert made.settings["family"] == "UNet2DModel 1x16x16 of 8x16 channels (ead0704c)"
    assert made.settings["sampler"] == f"ddpm-{auditing.STEPS}"
    values = read_json(findings[0])
    write_json(findings[0], values | {"statistic": 0.25})
    again = shutil.copytree(clean[0], clean[0].parent / "moved")
    assert run("calibrate", again, clean[1], "--out", calibration.parent) == 0
    assert 0.25 in Calibration.load(calibration).statistics.values(), (
        "a finding that is there is kept, whatever the path"
    )
    assert capsys.readouterr().out.endswith(
        "it decides nothing yet: 2 clean models bound false alarms at no less than 0.333 and alpha is 0.05:"
        " expected at least 20\n"
    )
    assert run("calibrate", clean[0], "--defense", "terd", "--out", calibration.parent) == 2
    assert "holds another run, whose defense is 'audit' and not 'terd'" in capsys.readouterr().err
    assert run("calibrate", clean[0], "--steps", 3, "--out", calibration.parent) == 2
    assert "holds another run, whose steps is None and not 3" in capsys.readouterr().err


def test_after_an_interruption_a_calibration_goes_on(
    tmp_path: Path, clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examine, seen = ufid.examine, []

    def interrupted(subject: Subject, variant: UfidConfig) -> Finding:
        seen.append(subject.weights_sha256)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return examine(subject, variant)

    monkeypatch.setitem(DEFENSES, "ufid", replace(DEFENSES["ufid"], examine=interrupted))
    options = ("calibrate", *clean, "--defense", "ufid", "--steps", 3, "--out", tmp_path / "out")
    assert run(*options) == 130
    assert "train, sample, calibrate, matrix and demo go on" in capsys.readouterr().err
    assert run(*options) == 0
    assert seen[1:] == [seen[1], seen[1]]
    assert len(Calibration.load(tmp_path / "out" / "calibration.json").statistics) == 2


def test_a_strangers_recipe_that_is_none_is_refused_before_anything_is_examined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = untrained(tmp_path / "model", 1)
    write_json(model / EXTRA, {"train": {"batch": "many"}})
    for command in (("audit",), ("defend", "--defense", "elijah", "--steps", 3)):
        out = tmp_path / command[0]
        assert run(command[0], model, *command[1:], "--out", out) == 2
        assert "batch" in capsys.readouterr().err
        assert not out.exists()


def test_a_folder_has_one_models_finding_of_one_defense(
    tmp_path: Path, clean: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("audit", clean[0], "--steps", 3, "--out", out) == 3
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for words, sentence in (
        (
            ("defend", clean[0], "--defense", "ufid"),
            "holds a finding of audit: expected one of ufid, or another folder",
        ),
        (("audit", clean[1]), "holds a finding on another model: expected the same, or another folder"),
    ):
        assert run(*words, "--steps", 3, "--out", out) == 2
        assert sentence in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_models_that_say_how_they_were_attacked_calibrate_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("calibrate", "digits-badiffusion", "--defense", "ufid", "--out", tmp_path / "out") == 2
    assert "it was trained with the attack baddiffusion: expected clean models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_calibration_has_the_options_of_what_it_is_for(tmp_path: Path, clean: tuple[Path, Path]) -> None:
    """`defend` with the same options is judged by it; it refuses others."""
    options = ("--defense", "ufid", "--sampler", "ddim", "--steps", 3, "--features", "digits")
    assert run("calibrate", clean[0], *options, "--alpha", 0.5, "--out", tmp_path / "ufid") == 0
    calibration = tmp_path / "ufid" / "calibration.json"
    assert Calibration.load(calibration).settings["sampler"] == "ddim-3"
    judged = (clean[1], "--calibration", calibration, "--alpha", 0.5, "--out", tmp_path / "out")
    assert run("defend", *options, *judged) in (0, 1)
    assert read_json(tmp_path / "out" / "finding.json")["p_value"] in (0.5, 1.0)
    assert run("defend", *options, "--eta", 0.5, *judged) == 2


def test_a_model_of_the_calibration_is_not_audited(
    tmp_path: Path, clean: tuple[Path, Path], calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(clean[1], tmp_path / "copy")
    assert run("audit", copy, "--calibration", calibration, "--alpha", 0.4, "--out", tmp_path / "out") == 2
    assert "is in the calibration already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_calibration_it_says_what_is_missing(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", tiny_checkpoint, "--out", tmp_path / "out") == 3
    said = capsys.readouterr().out
    assert "undecided" in said
    family = "UNet2DModel 1x16x16 of 8x16 channels (ead0704c)"
    assert f"no clean models of its family are known ({family}): see bdengine calibrate" in said
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [stage["defense"] for stage in found["details"]["stages"]] == [*audit.STAGES]
    assert found["p_value"] is None
    assert load_file(tmp_path / "out" / "trigger.safetensors")["trigger"].shape == (1, 16, 16)


@pytest.mark.parametrize(("verdict", "code"), [("backdoored", 1), ("no evidence", 0)])
def test_its_verdict_is_its_exit_code_and_its_page(
    verdict: str, code: int, tmp_path: Path, tiny_checkpoint: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "decided", lambda copies, p0, evidence: verdict == "backdoored" if len(copies) else None)
    out = tmp_path / "out"
    assert run("audit", tiny_checkpoint, "--calibration", calibration, "--alpha", 0.4, "--out", out) == code
    found = json.loads((out / "audit.json").read_text())
    assert found["verdict"] == verdict
    assert len(found["details"]["stages"]) == (1 if code else len(audit.STAGES))
    page = (out / "report.html").read_text()
    assert auditing.SENTENCES[verdict] in page
    assert not [name for name in links(page) if not name.startswith("data:")], "the page needs nothing else"


def links(page: str) -> Iterator[str]:
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value or "" for name, value in attrs if name in ("src", "href"))

    Reader().feed(page)
    assert found
    yield from found


def test_mistakes_are_told(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("calibrate", "--out", tmp_path) == 2
    assert "no checkpoints were given" in capsys.readouterr().err
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    assert run("calibrate", tiny_checkpoint, copy, "--out", tmp_path / "a") == 2
    assert f"{tiny_checkpoint} and {copy} are one model: expected each once" in capsys.readouterr().err
    assert run("calibrate", tiny_checkpoint, "--variant", "searched", "--out", tmp_path / "a") == 2
    assert "variant is 'searched' and the audit has none" in capsys.readouterr().err
    assert run("calibrate", tiny_checkpoint, "--alpha", 0, "--out", tmp_path / "a") == 2
    assert "alpha is 0.0" in capsys.readouterr().err
    assert run("calibrate", tiny_checkpoint, "--defense", "clipping", "--out", tmp_path / "a") == 2
    assert "clipping" in capsys.readouterr().err
    assert run("audit", tiny_checkpoint, "--alpha", 1.5, "--out", tmp_path / "b") == 2
    assert "alpha is 1.5" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_variance_exploding_model_is_shown_as_others_are(tmp_path: Path) -> None:
    """Its own samples lie in [0, 1]; a finding's and a page's in [-1, 1]. What is defined in [-1, 1] alone refuses it."""
    torch.manual_seed(0)
    save_pipeline(tmp_path / "ve", unet(16, 1, (8, 16), groups=4), Exploding(np.geomspace(0.01, 10, 20)).to_config())
    options = (tmp_path / "ve", "--steps", 3)
    assert run("audit", *options, "--out", tmp_path / "out") == 3
    found = read_json(tmp_path / "out" / "audit.json")
    assert [stage["defense"] for stage in found["details"]["stages"]] == ["start", "elijah"]
    model = Model.load(str(tmp_path / "ve"))
    table = model.table(SampleConfig(str(tmp_path / "ve"), tmp_path, steps=3))[0]
    seeds = range(audit.AUDIT_SEEDS, audit.AUDIT_SEEDS + auditing.SHOWN)
    own = 2 * Sampler(model.network, {"": Arm(table)}, auditing.SHOWN)(seeds)[""] - 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert markup.image(pictures.grid(own, columns=len(own), scale=3), f"{len(own)} samples from plain noise") in page
    assert run("defend", *options, "--defense", "ufid", "--out", tmp_path / "ufid") == 3
    for defense in ("clipping", "diffcleanse", "terd"):
        assert run("defend", *options, "--defense", defense, "--out", tmp_path / defense) == 2
