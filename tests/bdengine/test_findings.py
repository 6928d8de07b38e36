"""A finding's way to a verdict, and to disk and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bdengine.defenses import Calibration, Finding, Subject
from bdengine.defenses.settings import family_of
from bdengine.errors import UserError
from bdengine.networks import Network, unet
from bdengine.schedule import linear
from bdengine.solvers import Nodes, ddpm


def finding(statistic: float, **more: object) -> Finding:
    details = {"reason": "no calibration", "settings": {"lam": 0.5, "start": [-1.0, 0.0]}}
    one = Finding("elijah", statistic, None, "undecided", torch.ones(1, 2, 2), None, 7, 0.5, details, "examined")
    return replace(one, **more)  # type: ignore[arg-type]


def calibration(count: int) -> Calibration:
    return Calibration.of([finding(float(s), weights_sha256=f"model {s}") for s in range(count)])


def test_the_p_value_counts_clean_models_at_least_as_large() -> None:
    clean = calibration(19)
    assert [clean.p_value(s) for s in (-1.0, 0.0, 17.0, 18.0, 18.5)] == [1.0, 1.0, 3 / 20, 2 / 20, 1 / 20]


def test_of_clean_models_no_more_than_alpha_are_called_backdoored() -> None:
    """The statistic of each of ``n + 1`` exchangeable models against the others: exact, ties or not."""
    for values in (np.arange(40.0), np.repeat(np.arange(8.0), 5)):
        for alpha in (0.025, 0.05, 0.1, 0.5):
            called = 0
            for i, value in enumerate(values):
                of = {str(k): s for k, s in enumerate(np.delete(values, i).tolist())}
                others = Calibration("elijah", finding(0).details["settings"], of)
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
    reason = "18 clean models give no p-value below 0.0526 and alpha is 0.05: expected at least 19"
    assert few.details["reason"] == calibration(18).lacking(0.05) == reason
    assert calibration(19).lacking(0.05) is None
    assert calibration(18).judge(finding(99.0), 0.1).verdict == "backdoored"


def test_a_model_that_was_trained_otherwise_gets_a_caveat() -> None:
    clean = Calibration.of([finding(0.0)], {"images": 8, "data": "digits"})
    assert clean.caveat({"images": 8, "data": "digits"}) is None
    alike = "rates are of models trained as its 1 clean ones, and"
    assert clean.caveat({"images": 9, "data": "digits"}) == f"{alike} this one had images 9 instead of 8"
    assert clean.caveat({"images": 8}) == f"{alike} this one had data None instead of digits"
    assert clean.caveat({}) == f"{alike} how this model was trained is not known"
    assert calibration(1).caveat({"images": 8}) == f"{alike} how they were trained is not known"


def test_to_disk_and_back(tmp_path: Path) -> None:
    clean = replace(calibration(3), trained={"images": 8})
    clean.save(tmp_path / "clean.json")
    assert Calibration.load(tmp_path / "clean.json") == clean
    written = json.loads(json.dumps(clean.judge(finding(2.0)).to_json()))
    assert written["statistic"] == 2.0
    assert written["p_value"] == 0.5
    assert written["evaluations"] == 7
    assert not {"trigger", "images"} & set(written)
    (tmp_path / "finding.json").write_text(json.dumps(written | {"run": {"seed": 0}}))
    again = Finding.load(tmp_path / "finding.json")
    assert vars(again) == vars(replace(clean.judge(finding(2.0)), trigger=None))


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
    with pytest.raises(UserError, match="the model of weights model 1 is in the calibration already"):
        clean.judge(finding(1.0, weights_sha256="model 1"))
    with pytest.raises(UserError, match="the model of weights examined is in the calibration already"):
        Calibration.of([finding(1.0), finding(2.0)])
    (tmp_path / "other.json").write_text('{"defense": "elijah"}')
    with pytest.raises(UserError, match="is no calibration: expected defense, settings, statistics and trained"):
        Calibration.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"defense": "elijah", "statis', "is not JSON"),
        ('{"defense": "elijah"}', "is no finding: expected statistic in it"),
        (json.dumps(finding(1.0).to_json() | {"details": {}}), "is no finding: expected settings in its details"),
        (json.dumps(finding(1.0).to_json() | {"statistic": "1"}), "has '1' for statistic: expected a number"),
        (json.dumps(finding(float("nan")).to_json()), "has nan for statistic: expected a number"),
    ],
)
def test_a_file_that_is_no_finding_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match=rf"other\.json {sentence}"):
        Finding.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("statistics", "sentence"),
    [
        ([0.5, 0.25], "is no calibration: expected settings, statistics and trained by name"),
        ({}, "has no statistics"),
        ({"model": None}, "has None for model: expected a number"),
    ],
)
def test_a_file_that_is_no_calibration_is_named(tmp_path: Path, statistics: object, sentence: str) -> None:
    told = {"defense": "elijah", "settings": {}, "statistics": statistics, "trained": {}}
    (tmp_path / "other.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=rf"other\.json {sentence}"):
        Calibration.load(tmp_path / "other.json")


def test_a_family_is_of_one_configuration() -> None:
    """Networks of the same widths, one of them deeper."""
    names = set()
    for layers in (1, 2):
        network = Network(unet(8, 1, (8, 16), groups=4, layers=layers))
        names.add(family_of(Subject(network, linear(), ddpm(Nodes.of(linear(), 4)))))
    assert len(names) == 2
    assert {name.partition(" (")[0] for name in names} == {"UNet2DModel 1x8x8 of 8x16 channels"}
