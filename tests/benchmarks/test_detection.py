"""What `benchmarks.detection` makes of findings, and that it goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bdengine.config import to_json
from bdengine.defenses import DEFENSES, Finding, elijah
from bdengine.files import read_json, write_json
from benchmarks import detection, zoo


def finished(folder: Path, name: str, asr: float) -> None:
    write_json(folder / name / "scores.json", {"arms": {"triggered": {"none": {"asr": asr}}}})


def found(out: Path, name: str, statistic: float) -> None:
    details = {"settings": {"lam": 0.5}}
    finding = Finding("elijah", statistic, None, "undecided", None, None, 100, 2.0, details)
    write_json(detection.finding_of(out, "elijah", name), finding.to_json())


def test_rates_are_of_held_out_models_by_attack(tmp_path: Path) -> None:
    for k in range(zoo.CALIBRATE + 3):
        finished(tmp_path / "zoo", f"clean/{k:03d}", 0.0)
        found(tmp_path, f"clean/{k:03d}", 30.0 if k == zoo.CALIBRATE else float(k % zoo.CALIBRATE))
    for k, (asr, statistic) in enumerate(((1.0, 50.0), (1.0, 5.0), (0.3, 60.0))):
        finished(tmp_path / "zoo", f"backdoored/{k:03d}", asr)
        found(tmp_path, f"backdoored/{k:03d}", statistic)
    row = detection.rates(tmp_path / "zoo", tmp_path, "elijah")
    assert row["calibration_models"] == zoo.CALIBRATE
    counts = {kind: (rate["k"], rate["n"]) for kind, rate in row["flagged"].items()}
    assert counts == {"clean": (1, 3), "baddiffusion box": (1, 2), "baddiffusion box (weak)": (1, 1)}
    assert row["flagged"]["clean"]["interval"] == [0.0084, 0.9057]  # 1 - 0.975^(1/3), and the larger root for 1 of 3
    assert "1 of 3 [1%, 91%]" in detection.table({"detectors": {"elijah": row}})


def test_findings_that_are_there_are_kept(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"baddiffusion": replace(elijah.VARIANTS["baddiffusion"], iterations=1, noises=2)}
    monkeypatch.setitem(DEFENSES, "elijah", replace(DEFENSES["elijah"], variants=short))
    for k in range(2):
        finished(tmp_path / "zoo", f"clean/{k:03d}", 0.0)
        (tmp_path / "zoo" / f"clean/{k:03d}" / "checkpoint").symlink_to(tiny_checkpoint.resolve())
    found(tmp_path, "clean/000", 7.0)
    command = ["--zoo", str(tmp_path / "zoo"), "--out", str(tmp_path), "--only", "elijah"]
    assert detection.main(command) == 0
    kept, made = (read_json(detection.finding_of(tmp_path, "elijah", f"clean/{k:03d}")) for k in range(2))
    assert kept["statistic"] == 7.0
    assert made["details"]["settings"] == to_json(short["baddiffusion"]) | {
        "sampler": "ddpm-1000",
        "features": "pixels",
    }


def test_an_unknown_detector_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detection.main(["--zoo", str(tmp_path), "--out", str(tmp_path), "--only", "elija"]) == 2
    assert "elijah" in capsys.readouterr().err
