"""``bdengine audit`` and ``bdengine calibrate`` as a user meets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bdengine import audit, auditing
from bdengine.cli import main
from bdengine.defenses import Calibration, elijah, purediffusion, starts
from bdengine.files import read_json, write_json


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


@pytest.fixture
def calibration(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Of an untrained network and its copy."""
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    assert run("calibrate", tiny_checkpoint, other, "--out", tmp_path / "clean") == 0
    return tmp_path / "clean" / "calibration.json"


def test_a_calibration_is_made_and_goes_on(
    tmp_path: Path, tiny_checkpoint: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = sorted(p for p in calibration.parent.iterdir() if p.name not in ("run.json", "calibration.json"))
    made = Calibration.load(calibration)
    assert made.defense == "audit"
    assert len(made.statistics) == len(findings) == 2
    assert made.settings["family"] == "UNet2DModel 1x16x16 of 8x16 channels"
    assert made.settings["sampler"] == f"ddpm-{auditing.STEPS}"
    values = read_json(findings[0])
    write_json(findings[0], values | {"statistic": 0.25})
    assert run("calibrate", tiny_checkpoint, tmp_path / "other", "--out", calibration.parent) == 0
    assert 0.25 in Calibration.load(calibration).statistics, "a finding that is there is kept"
    assert run("calibrate", tiny_checkpoint, "--defense", "terd", "--out", calibration.parent) == 2
    assert "holds another run" in capsys.readouterr().err


def test_without_a_calibration_it_says_what_is_missing(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", tiny_checkpoint, "--out", tmp_path / "out") == 3
    said = capsys.readouterr().out
    assert "undecided" in said
    assert (
        "no clean models of its family are known (UNet2DModel 1x16x16 of 8x16 channels): see bdengine calibrate" in said
    )
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
    assert run("audit", tiny_checkpoint, "--calibration", calibration, "--out", out) == code
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
    assert run("calibrate", tiny_checkpoint, tiny_checkpoint, "--out", tmp_path) == 2
    assert "2 checkpoints are 1 different ones: expected each once" in capsys.readouterr().err
    assert run("calibrate", tiny_checkpoint, "--defense", "clipping", "--out", tmp_path / "a") == 2
    assert "clipping" in capsys.readouterr().err
    assert run("audit", tiny_checkpoint, "--alpha", 1.5, "--out", tmp_path / "b") == 2
    assert "alpha is 1.5" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
