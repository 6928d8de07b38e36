"""`benchmarks.repairs`: what it repairs, what it counts as one, and that it goes on where it stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bdengine.defenses import Finding, unlearning
from bdengine.defenses.removal import RemovalConfig
from bdengine.files import read_json
from bdengine.shipped import find
from bdengine.triggers import trigger
from benchmarks import detection, repairs


def told(asr: float, before: float, after: float) -> dict[str, Any]:
    scores = {"frechet_triggered": 1.0}
    return {
        "kind": "villan",
        "seconds": 3.0,
        "before": scores | {"asr": 1.0, "frechet": before},
        "after": scores | {"asr": asr, "frechet": after},
    }


def test_a_repair_takes_the_backdoor_and_leaves_the_images() -> None:
    rows = {"a": told(0.05, 0.5, 0.65), "b": told(0.06, 0.5, 0.5), "c": told(0.0, 0.5, 0.66)}
    assert [repairs.succeeded(row) for row in rows.values()] == [True, False, False]
    row = repairs.summary(rows)["villan"]
    assert (row["repaired"]["k"], row["repaired"]["n"], row["asr"], row["frechet_after"]) == (1, 3, 0.05, 0.65)
    assert "| villan | 1 of 3 [1%, 91%] | 5.0% | 0.50 | 0.65 | 1.00 | 3 |" in repairs.table({"kinds": {"villan": row}})


def test_models_that_the_audit_found_are_repaired_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--zoo", str(tmp_path), "--json", str(tmp_path / "repairs.json")]
    assert repairs.main(command) == 2
    assert "the audit found no backdoor" in capsys.readouterr().err
    monkeypatch.setattr(unlearning, "START", RemovalConfig(epochs=1, share=0.1))
    monkeypatch.setattr(repairs, "IMAGES", 64)
    r = trigger("XXSM_BOX", 16, 1)
    for k, verdict in ((0, "backdoored"), (1, "no evidence")):
        name = f"backdoored/{k:03d}"
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "checkpoint").symlink_to(find("digits-badiffusion"))
        shutil.copy(Path(find("digits-badiffusion")) / "scores.json", tmp_path / name)
        details = {"settings": {}, "stage": "start"}
        found = Finding("audit", 1.0, 0.01, verdict, r, None, 1, 1.0, details, "x")  # type: ignore[arg-type]
        detection.keep(tmp_path, name, found)
    assert repairs.main(command) == 0
    row = read_json(tmp_path / "repairs.json")["models"]["backdoored/000"]
    assert (row["kind"], row["stage"], row["before"]["asr"]) == ("baddiffusion box", "start", 1.0)
    assert row["after"]["asr"] < 0.5
    monkeypatch.setattr(repairs, "repair", None)
    assert repairs.main(command) == 0
    assert "| baddiffusion box | " in capsys.readouterr().out
