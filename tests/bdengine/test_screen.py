"""``bdengine screen``: both tests at their stated error rates, the files that it reads, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from scipy.stats import binom

import bdkernels
from bdengine.checkpoint import write_safetensors
from bdengine.cli import main
from bdengine.commands import Model
from bdengine.defend import subject_of, write_trigger
from bdengine.defenses import elijah, terd
from bdengine.files import read_json
from bdengine.inverted import Inverted
from bdengine.options import ExamineConfig, ScreenConfig
from bdengine.screen import CLEAN, FIRST_SEED, noise, tried
from bdengine.triggers import trigger


def found(folder: Path, tau: torch.Tensor) -> Path:
    """A folder as ``bdengine defend`` leaves it."""
    folder.mkdir()
    write_safetensors(folder / "trigger.safetensors", {"trigger": tau})
    return folder


def test_terds_test_errs_at_the_rate_it_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A faint trigger, true and at known start: counts outside of a 1e-6 interval of the binomial on each side."""
    weak = 0.15 * trigger("XXSM_BOX", 16, 1)
    folder = found(tmp_path / "found", weak)
    x = bdkernels.normal(torch.arange(4000), (1, 16, 16))
    x[2000:] += weak
    np.save(tmp_path / "starts.npy", x.numpy())
    words = ["screen", "digits-clean", "--starts", str(tmp_path / "starts.npy"), "--trigger", str(folder)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    told = read_json(tmp_path / "out" / "screen.json")
    rate = terd.predicted_errors(weak, weak)[0]
    assert told["predicted_false_alarms"] == pytest.approx(rate)
    flagged = np.array(told["starts"]["given"]["flagged"])
    low, high = binom.interval(1 - 1e-6, 2000, rate)
    assert low <= flagged[:2000].sum() <= high
    assert low <= 2000 - flagged[2000:].sum() <= high
    assert told["flagged"]["given"] == flagged.sum()
    assert f"terd: {flagged.sum()} of 4000 given starts flagged" in capsys.readouterr().out


def test_a_known_trigger_is_tried_beside_clean_starts(tmp_path: Path) -> None:
    folder = found(tmp_path / "found", trigger("XXSM_BOX", 16, 1))
    for method, count in (("terd", 50), ("ufid", 4)):
        words = ["--trigger", str(folder), "--method", method, "--known", "XXSM_BOX", "--count", str(count)]
        assert main(["screen", "digits-badiffusion", *words, "--out", str(tmp_path / method)]) == 0
        told = read_json(tmp_path / method / "screen.json")
        assert told["flagged"] == {"clean": 0, "triggered": count}
        assert len(told["starts"]["triggered"]["score"]) == count


def test_a_schedulers_own_scale_leaves_the_trigger_as_it_is(tmp_path: Path) -> None:
    """Euler's states are 157 times the noise."""
    model = Model.load("digits-badiffusion")
    scheduler = dict(EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02).config)
    own = replace(model, scheduler=scheduler | {"_class_name": "EulerDiscreteScheduler"})
    config = ScreenConfig(model.path, tmp_path, known="XXSM_BOX", count=3, sampler="own", steps=20)
    starts = tried(config, own)
    torch.testing.assert_close(starts["clean"], noise(3, (1, 16, 16), FIRST_SEED + CLEAN))
    shift = starts["triggered"] - starts["clean"]
    torch.testing.assert_close(shift, trigger("XXSM_BOX", 16, 1).expand(3, 1, 16, 16), rtol=0, atol=1e-4)


def test_a_trigger_of_every_step_is_held_against_its_own_noise(tmp_path: Path) -> None:
    """A start of ``0.6 eps + mu``: what `defend` wrote with a gamma that was assumed, and TERD's test with it."""
    _, subject = subject_of("digits-clean", ExamineConfig(steps=2))
    config = replace(elijah.VARIANTS["trojdiff"], noises=2, iterations=1)
    finding = elijah.examine(subject, config)
    write_trigger(tmp_path, replace(finding, trigger=torch.full((1, 16, 16), 0.02)))
    inverted = Inverted.load(tmp_path, (1, 16, 16))
    assert inverted.in_steps
    assert inverted.gamma is not None
    assert inverted.gamma.unique().tolist() == [pytest.approx(0.6)]
    x = noise(200, (1, 16, 16), 0)
    x[100:] = 0.6 * x[100:] + 0.02
    np.save(tmp_path / "starts.npy", x.numpy())
    words = ["screen", "digits-clean", "--starts", str(tmp_path / "starts.npy"), "--trigger", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    told = read_json(tmp_path / "out" / "screen.json")
    assert told["starts"]["given"]["flagged"] == [False] * 100 + [True] * 100
    assert told["predicted_false_alarms"] is None
    shift = torch.zeros(1, 2, 2)
    shift[:, 1, 1] = 0.9
    gamma = Inverted(shift, "patched").gamma
    assert gamma is not None
    assert gamma.flatten().tolist() == [1, 1, 1, pytest.approx(0.1)]


def test_starts_are_read_from_safetensors_too(tmp_path: Path) -> None:
    folder = found(tmp_path / "found", trigger("XXSM_BOX", 16, 1))
    x = torch.stack([trigger("XXSM_BOX", 16, 1), torch.zeros(1, 16, 16)])
    write_safetensors(tmp_path / "starts.safetensors", {"x_T": x})
    words = ["--starts", str(tmp_path / "starts.safetensors"), "--trigger", str(folder), "--out", str(tmp_path / "out")]
    assert main(["screen", "digits-clean", *words]) == 0
    assert read_json(tmp_path / "out" / "screen.json")["starts"]["given"]["flagged"] == [True, False]


def test_what_cannot_be_screened_gets_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = found(tmp_path / "found", torch.zeros(1, 8, 8)), tmp_path / "out"
    np.save(tmp_path / "small.npy", np.zeros((2, 1, 8, 8), np.float32))
    np.save(tmp_path / "empty.npy", np.zeros((0, 1, 16, 16), np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((2, 1, 16, 16), np.int64))
    (tmp_path / "none.npy").write_bytes(b"")
    nothing = found(tmp_path / "nothing", torch.zeros(1, 16, 16))
    np.save(tmp_path / "inf.npy", np.full((2, 1, 16, 16), np.inf, np.float32))
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "x.pt").write_bytes(b"")
    write_safetensors(tmp_path / "two.safetensors", {"a": torch.zeros(1), "b": torch.zeros(1)})
    given = ["--trigger", str(folder), "--starts"]
    for words, sentence in (
        ([], "expected starts or known"),
        (["--known", "XXSM_BOX", "--starts", "x"], "expected starts or known"),
        (["--known", "XXSM_BOX", "--method", "trd"], "unknown method 'trd'"),
        (["--known", "XXSM_BOX", "--method", "terd"], "terd was asked for without a trigger"),
        (["--known", "XXSM_BOX", "--count", "0"], "0 starts were asked for"),
        (["--known", "XXSM_BOX", "--trigger", str(folder)], r"the trigger is (1, 8, 8): expected (1, 16, 16)"),
        (["--known", "XXSM_BOX", "--alpha", "2"], "alpha is 2"),
        (["--known", "XXSM_BOX", "--alpha", "0.005"], "alpha is 0.005 and ufid compares with 100 clean starts"),
        (["--known", "XXSM_BOX", "--trigger", str(nothing)], "the trigger is 0 everywhere"),
        ([*given, str(tmp_path / "none.npy")], "is no array of numbers"),
        ([*given, str(tmp_path / "absent.npy")], "there is no file"),
        ([*given, str(tmp_path / "small.npy")], "holds (2, 1, 8, 8) of torch.float32: expected floats (N, 1, 16, 16)"),
        ([*given, str(tmp_path / "empty.npy")], "holds (0, 1, 16, 16)"),
        ([*given, str(tmp_path / "whole.npy")], "of torch.int64: expected floats"),
        ([*given, str(tmp_path / "inf.npy")], "not finite"),
        ([*given, str(tmp_path / "pickle.npy")], "is no array of numbers"),
        ([*given, str(tmp_path / "x.pt")], "is a .pt file: expected .npy or .safetensors"),
        ([*given, str(tmp_path / "two.safetensors")], "has 2 tensors: expected one"),
    ):
        assert main(["screen", "digits-clean", *words, "--out", str(out)]) == 2, words
        assert sentence in capsys.readouterr().err, words
    assert not out.exists()
