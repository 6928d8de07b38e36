"""The calibration in the package: what it is for, and that its settings are those of the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdengine import auditing, defend
from bdengine.audit import settings_of
from bdengine.cli import main
from bdengine.options import AuditConfig


def test_it_convicts_the_shipped_backdoor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "digits-badiffusion", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("backdoored: ")
    found = json.loads((tmp_path / "audit.json").read_text())
    assert [stage["defense"] for stage in found["details"]["stages"]] == ["start"]
    assert found["p_value"] <= 0.05


def test_it_knows_the_shipped_clean_model(tmp_path: Path) -> None:
    subject = defend.subject_of("digits-clean", AuditConfig("digits-clean", tmp_path), auditing.STEPS)[1]
    known = defend.packaged(auditing.AUDIT, settings_of(subject), subject)
    assert known is not None
    assert (len(known.statistics), known.lacking(0.05)) == (20, None)
