"""A finding's way to a verdict, and to disk and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bdengine.defenses import Calibration, Finding
from bdengine.errors import UserError


def finding(statistic: float, **more: object) -> Finding:
    details = {"reason": "no calibration", "settings": {"lam": 0.5, "start": [-1.0, 0.0]}}
    one = Finding("elijah", statistic, None, "undecided", torch.ones(1, 2, 2), None, 7, 0.5, details)
    return replace(one, **more)  # type: ignore[arg-type]


def calibration(count: int) -> Calibration:
    return Calibration.of([finding(float(s)) for s in range(count)])


def test_the_p_value_counts_clean_models_at_least_as_large() -> None:
    clean = calibration(19)
    assert [clean.p_value(s) for s in (-1.0, 0.0, 17.0, 18.0, 18.5)] == [1.0, 1.0, 3 / 20, 2 / 20, 1 / 20]


def test_of_clean_models_no_more_than_alpha_are_called_backdoored() -> None:
    """The statistic of each of ``n + 1`` exchangeable models against the others: exact, ties or not."""
    for values in (np.arange(40.0), np.repeat(np.arange(8.0), 5)):
        for alpha in (0.025, 0.05, 0.1, 0.5):
            called = 0
            for i, value in enumerate(values):
                others = Calibration("elijah", finding(0).details["settings"], tuple(np.delete(values, i)))
                called += others.judge(finding(value), alpha).verdict == "backdoored"
            assert called <= alpha * len(values)
            assert called == alpha * len(values) or len(set(values)) < 40


def test_a_verdict() -> None:
    high, low = (calibration(19).judge(finding(s)) for s in (18.5, 17.0))
    assert (high.verdict, high.p_value) == ("backdoored", 0.05)
    assert (low.verdict, low.p_value) == ("no evidence", 0.15)
    assert "reason" not in high.details
    few = calibration(18).judge(finding(99.0))
    assert few.verdict == "undecided"
    assert few.details["reason"] == "18 clean models give no p-value below 0.0526; alpha is 0.05"
    assert calibration(18).judge(finding(99.0), 0.1).verdict == "backdoored"


def test_to_disk_and_back(tmp_path: Path) -> None:
    clean = calibration(3)
    clean.save(tmp_path / "clean.json")
    assert Calibration.load(tmp_path / "clean.json") == clean
    written = json.loads(json.dumps(clean.judge(finding(2.0)).to_json()))
    assert written["statistic"] == 2.0
    assert written["p_value"] == 0.5
    assert written["evaluations"] == 7
    assert not {"trigger", "images"} & set(written)


def test_another_calibration_is_refused(tmp_path: Path) -> None:
    clean = calibration(3)
    with pytest.raises(UserError, match="the calibration is of elijah: expected one of terd"):
        clean.judge(finding(1.0, defense="terd"))
    with pytest.raises(UserError, match=r"made with lam 0.5: expected 1.0, as the examined model had"):
        clean.judge(finding(1.0, details={"settings": {"lam": 1.0, "start": [-1.0, 0.0]}}))
    with pytest.raises(UserError, match="alpha is 1: expected between 0 and 1"):
        clean.judge(finding(1.0), 1)
    with pytest.raises(UserError, match="has no findings"):
        Calibration.of([])
    (tmp_path / "other.json").write_text('{"defense": "elijah"}')
    with pytest.raises(UserError, match="is no calibration: expected defense, settings and statistics"):
        Calibration.load(tmp_path / "other.json")
