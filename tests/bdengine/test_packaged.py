"""The calibration in the package: what it is for, and that its settings are those of the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdengine import auditing, defend
from bdengine.audit import settings_of
from bdengine.cli import main
from bdengine.config import to_json
from bdengine.defenses import DEFENSES
from bdengine.options import AuditConfig
from benchmarks.zoo import RECIPE


def test_it_convicts_the_shipped_backdoor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "digits-badiffusion", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("backdoored: ")
    found = json.loads((tmp_path / "audit.json").read_text())
    assert [stage["defense"] for stage in found["details"]["stages"]] == ["start"]
    assert found["p_value"] <= 0.05
    assert "images 512000 instead of 128000, batch 64 instead of 32" in found["details"]["caveat"]
    assert found["details"]["caveat"] in (tmp_path / "report.html").read_text().replace("&#x27;", "'")


def test_defend_decides_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the variant is the calibration's, and says which that is where it is another."""
    words = ["defend", "digits-badiffusion", "--defense", "elijah", "--out", str(tmp_path)]
    assert main([*words, "--variant", "searched"]) == 1
    assert "elijah: backdoored" in capsys.readouterr().out
    assert main(words) == 3
    assert "or the variant searched, which the package has one of" in capsys.readouterr().out


@pytest.mark.parametrize("name", [auditing.AUDIT, *(name for name, one in DEFENSES.items() if one.detects)])
def test_there_is_one_for_the_shipped_clean_model_and_each_detector(name: str, tmp_path: Path) -> None:
    """Of who is told nothing of the attack."""
    subject = defend.subject_of("digits-clean", AuditConfig("digits-clean", tmp_path), auditing.STEPS)[1]
    if name == auditing.AUDIT:
        told = settings_of(subject)
    else:
        defense = DEFENSES[name]
        told = defense.settings(subject, defense.variants[defense.untold])
    known = defend.fitting(defend.calibrations(), name, told, subject.weights_sha256)
    assert known is not None
    assert (len(known.statistics), known.lacking(0.05)) == (20, None)
    assert known.trained == defend.recipe(to_json(RECIPE))
