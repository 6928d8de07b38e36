"""What `benchmarks.detection` makes of findings, and that it goes on where it stopped."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bdengine.config import to_json
from bdengine.defenses import DEFENSES, Calibration, Finding, elijah
from bdengine.distributed import Ranks
from bdengine.errors import UserError
from bdengine.files import read_json, write_json
from bdengine.shipped import find
from benchmarks import detection, zoo


def finished(folder: Path, name: str, asr: float) -> None:
    clean = {"asr": 0.0, "frechet": 0.5, "frechet_interval": [0.4, 0.6]}
    triggered = {clip: {"asr": asr} for clip in ("none", "latent")}
    write_json(folder / name / "scores.json", {"arms": {"clean": {"none": clean}, "triggered": triggered}})


def found(folder: Path, name: str, statistic: float, weights: str | None = None, lam: float = 0.5) -> None:
    details = {"settings": {"lam": lam}}
    finding = Finding("elijah", statistic, None, "undecided", None, None, 100, 2.0, details, weights or name)
    detection.keep(folder, name, finding)


def rates(folder: Path) -> dict[str, Any]:
    return detection.rates(detection.known(folder, folder / "absent.json"), "elijah")


def test_rates_are_of_held_out_models_by_attack(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="20 of the 20 models of the calibration of elijah were not examined, clean/000"
    ):
        rates(tmp_path)
    for k in range(zoo.CALIBRATE + 3):
        if k == zoo.CALIBRATE:
            with pytest.raises(UserError, match="elijah has examined no model that is held out"):
                rates(tmp_path)
        finished(tmp_path, f"clean/{k:03d}", 0.0)
        found(tmp_path, f"clean/{k:03d}", 30.0 if k == zoo.CALIBRATE else float(k % zoo.CALIBRATE))
    for k, (asr, statistic) in enumerate(((1.0, 50.0), (1.0, 5.0), (0.3, 60.0))):
        finished(tmp_path, f"backdoored/{k:03d}", asr)
        found(tmp_path, f"backdoored/{k:03d}", statistic)
    row = rates(tmp_path)
    assert row["calibration_models"] == zoo.CALIBRATE
    counts = {kind: (rate["k"], rate["n"]) for kind, rate in row["flagged"].items()}
    assert counts == {"clean": (1, 3), "baddiffusion box": (1, 2), "weak": (1, 1)}
    assert row["flagged"]["clean"]["interval"] == [0.0084, 0.9057]  # 1 - 0.975^(1/3), and the larger root for 1 of 3
    assert row["verdicts"]["backdoored/000"] == {"p_value": 1 / 21, "verdict": "backdoored"}
    assert len(row["verdicts"]) == 6
    said = detection.table({"detectors": {"elijah": row | {"undecided": 4}}})
    assert "| elijah | 1 of 3 [1%, 91%] | 1 of 2 [1%, 99%] | 1 of 1 [2%, 100%] | 4 | 100 | 100 | 2.0 | 2.0 |" in said
    found(tmp_path, "backdoored/000", 50.0, "clean/003")
    with pytest.raises(UserError, match="the model of weights clean/003 is in the calibration already"):
        rates(tmp_path)


def test_what_the_file_holds_is_known_without_the_models(tmp_path: Path) -> None:
    file, first, second = tmp_path / "detection.json", tmp_path / "first", tmp_path / "second"
    for folder, name, statistic in ((first, "clean/000", 7.0), (second, "clean/001", 8.0)):
        finished(folder, name, 0.0)
        found(folder, name, statistic)
    write_json(file, detection.document(detection.known(first, file), "a command"))
    told = detection.known(second, file)
    assert [detection.found_in(told, f"clean/{k:03d}", "elijah") is not None for k in range(3)] == [True, True, False]
    assert told["models"]["clean/000"]["scores"] == {"asr": 0.0, "frechet": 0.5, "frechet_interval": [0.4, 0.6]}
    finding = detection.found_in(told, "clean/000", "elijah")
    assert finding is not None
    assert (finding.statistic, finding.details, finding.weights_sha256) == (
        7.0,
        {"settings": {"lam": 0.5}},
        "clean/000",
    )
    assert detection.document(told, "a command")["detectors"] == {}
    found(second, "clean/001", 8.0, lam=0.6)
    with pytest.raises(UserError, match=r"findings\.json has findings of elijah with other settings than .*detection"):
        detection.known(second, file)


def test_findings_that_are_there_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"baddiffusion": replace(elijah.VARIANTS["baddiffusion"], iterations=1, noises=2)}
    monkeypatch.setitem(DEFENSES, "elijah", replace(DEFENSES["elijah"], variants=short))
    runs = dict([*zoo.models(tmp_path).items()][: zoo.CALIBRATE + 1])
    monkeypatch.setattr(detection, "models", lambda out: runs)
    monkeypatch.setattr(detection, "make", lambda run: None)
    for name in runs:
        finished(tmp_path, name, 0.0)
        (tmp_path / name / "checkpoint").symlink_to(find("digits-clean"))
    made, file = [*runs][-1], tmp_path / "detection.json"
    for name in [*runs][:-1]:
        found(tmp_path, name, 7.0)
    command = ["--zoo", str(tmp_path), "--json", str(file), "--only", "elijah"]
    assert detection.main(command) == 2
    assert "has findings of elijah with other settings" in capsys.readouterr().err
    settings = read_json(tmp_path / made / "findings.json")["settings"]["elijah"]
    assert settings["sampler"] == "ddpm-20"
    assert settings.items() >= to_json(short["baddiffusion"]).items()
    for name in [*runs][:-1]:
        path = tmp_path / name / "findings.json"
        write_json(path, read_json(path) | {"settings": {"elijah": settings}})
    before = (tmp_path / made / "findings.json").read_bytes()
    assert detection.main([*command, "--calibrations", str(tmp_path / "calibrations")]) == 0
    assert (tmp_path / made / "findings.json").read_bytes() == before
    calibration = Calibration.load(tmp_path / "calibrations" / "elijah-digits.json")
    assert (calibration.settings, len(calibration.statistics)) == (settings, zoo.CALIBRATE)
    assert "| elijah | " in capsys.readouterr().out
    assert read_json(file)["detectors"]["elijah"]["calibration_models"] == zoo.CALIBRATE


def test_two_ranks_look_at_each_model_once_whatever_is_there_when_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank starts when the first is done with its share: what it then finds there does not move its own."""
    looks: list[str] = []

    def look(folder: Path, told: detection.Known, detector: str, name: str) -> Finding:
        looks.append(name)
        return Finding(detector, 0.0, None, "undecided", None, None, 1, 1.0, {"settings": {}}, name)

    monkeypatch.setattr(detection, "look", look)
    monkeypatch.setattr(detection, "make", lambda run: finished(tmp_path, str(run.out.relative_to(tmp_path)), 1.0))
    monkeypatch.setattr(Ranks, "together", lambda self, *counts: [*counts])
    command = ["--zoo", str(tmp_path), "--json", str(tmp_path / "out.json"), "--only", "elijah", "terd"]
    monkeypatch.setattr(detection, "join", lambda: nullcontext(Ranks(0, 1)))
    assert detection.main([*command, "--models", "3"]) == 0
    assert looks == [name for name in [*zoo.models(tmp_path)][:3] for _ in range(2)]
    looks.clear()
    shutil.rmtree(tmp_path)
    for rank in range(2):
        monkeypatch.setattr(detection, "join", lambda rank=rank: nullcontext(Ranks(rank, 2)))
        assert detection.main(command) == 0
    assert sorted(looks) == sorted(2 * [*zoo.models(tmp_path)])
    monkeypatch.setattr(detection, "join", lambda: nullcontext(Ranks(0, 1)))
    assert detection.main(command) == 0
    assert len(looks) == 2 * len(zoo.models(tmp_path))
    assert len(read_json(tmp_path / "out.json")["models"]) == len(zoo.models(tmp_path))


def test_held_out_models_are_audited_by_the_whole_calibration_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "backdoored/000").mkdir(parents=True)
    (tmp_path / "backdoored/000/checkpoint").symlink_to(tiny_checkpoint.resolve())
    told = detection.known(tmp_path, tmp_path / "absent.json")
    with pytest.raises(UserError, match="20 of the 20 models of the calibration of audit were not examined"):
        detection.look(tmp_path, told, "audit", "backdoored/000")


def test_an_unknown_detector_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--zoo", str(tmp_path), "--json", str(tmp_path / "out.json"), "--only", "elija"]
    assert detection.main(words) == 2
    assert "elijah" in capsys.readouterr().err
