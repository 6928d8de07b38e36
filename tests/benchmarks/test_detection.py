"""What `benchmarks.detection` makes of findings, and that it goes on where it stopped."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from bdengine.config import to_json
from bdengine.defenses import DEFENSES, Finding, elijah
from bdengine.distributed import Ranks
from bdengine.errors import UserError
from bdengine.files import read_json, write_json
from benchmarks import detection, zoo


def finished(folder: Path, name: str, asr: float) -> None:
    write_json(folder / name / "scores.json", {"arms": {"triggered": {"none": {"asr": asr}}}})


def found(out: Path, name: str, statistic: float, weights: str | None = None) -> None:
    details = {"settings": {"lam": 0.5}}
    finding = Finding("elijah", statistic, None, "undecided", None, None, 100, 2.0, details, weights or name)
    write_json(detection.finding_of(out, "elijah", name), finding.to_json())


def test_rates_are_of_held_out_models_by_attack(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="20 of the 20 models of the calibration of elijah were not examined, clean/000"
    ):
        detection.rates(tmp_path / "zoo", tmp_path, "elijah")
    for k in range(zoo.CALIBRATE + 3):
        if k == zoo.CALIBRATE:
            with pytest.raises(UserError, match="elijah has examined no model that is held out"):
                detection.rates(tmp_path / "zoo", tmp_path, "elijah")
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
    told = {"statistic": 50.0, "p_value": 1 / 21, "verdict": "backdoored", "evaluations": 100, "seconds": 2.0}
    assert row["models"]["backdoored/000"] == told | {"kind": "baddiffusion box"}
    assert len(row["models"]) == 6
    said = detection.table({"detectors": {"elijah": row | {"undecided": 4}}})
    assert "| elijah | 1 of 3 [1%, 91%] | 1 of 2 [1%, 99%] | 1 of 1 [2%, 100%] | 4 | 2.0 | 100 |" in said
    found(tmp_path, "backdoored/000", 50.0, "clean/003")
    with pytest.raises(UserError, match="the model of weights clean/003 is in the calibration already"):
        detection.rates(tmp_path / "zoo", tmp_path, "elijah")


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
    settings = made["details"]["settings"]
    assert settings["sampler"] == "ddpm-1000"
    assert settings.items() >= to_json(short["baddiffusion"]).items()


def test_two_ranks_look_at_each_model_once_whatever_is_there_when_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank starts when the first is done with its share: what it then finds there does not move its own."""
    looks: list[str] = []

    def look(zoo: Path, out: Path, detector: str, name: str) -> Finding:
        looks.append(name)
        return Finding(detector, 0.0, None, "undecided", None, None, 1, 1.0, {"settings": {}}, name)

    monkeypatch.setattr(detection, "look", look)
    monkeypatch.setattr(Ranks, "together", lambda self, *counts: [*counts])
    names = [f"clean/{k:03d}" for k in range(7)] + [f"backdoored/{k:03d}" for k in range(4)]
    for name in names:
        finished(tmp_path / "zoo", name, 1.0)
    for rank in range(2):
        monkeypatch.setattr(detection, "join", lambda rank=rank: nullcontext(Ranks(rank, 2)))
        detection.examine(tmp_path / "zoo", tmp_path, ["elijah", "terd"])
    assert sorted(looks) == sorted(2 * names)


def test_held_out_models_are_audited_by_the_whole_calibration_alone(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path / "zoo", "backdoored/000", 1.0)
    (tmp_path / "zoo" / "backdoored/000" / "checkpoint").symlink_to(tiny_checkpoint.resolve())
    assert detection.main(["--zoo", str(tmp_path / "zoo"), "--out", str(tmp_path), "--only", "audit"]) == 2
    assert "20 of the 20 models of the calibration of audit were not examined" in capsys.readouterr().err


def test_an_unknown_detector_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detection.main(["--zoo", str(tmp_path), "--out", str(tmp_path), "--only", "elija"]) == 2
    assert "elijah" in capsys.readouterr().err
