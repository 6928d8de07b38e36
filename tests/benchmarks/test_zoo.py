"""The zoo of models: which they are, and how it ends before its time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bdengine.errors import UserError
from bdengine.train import train
from benchmarks import zoo


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["zoo", *map(str, words)])
    return zoo.main()


def test_every_model_has_a_seed_and_a_folder_of_its_own() -> None:
    models = zoo.models(Path("zoo"))
    assert len(models) == zoo.CLEAN + len(zoo.ATTACKS)
    assert len({run.seed for run in models.values()}) == len({run.out for run in models.values()}) == len(models)
    assert all(run.out == Path("zoo") / name for name, run in models.items())
    assert list(models)[: zoo.CALIBRATE] == [f"clean/{k:03d}" for k in range(zoo.CALIBRATE)]


def test_ctrl_c_ends_it_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "make", interrupted)
    assert run(monkeypatch, "--out", tmp_path) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "benchmarks: interrupted; called again, the zoo goes on where it stopped"
    assert not any("Traceback" in line for line in said)


def test_a_name_that_no_model_has_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--out", tmp_path, "--only", "clear") == 2
    assert "no model's name begins with 'clear': expected clean/NNN" in capsys.readouterr().err


def test_a_model_of_another_recipe_is_not_taken_for_one_of_the_zoo(tmp_path: Path) -> None:
    made = replace(zoo.models(tmp_path)["clean/000"], images=64, warmup=0)
    train(made, progress=False)
    with pytest.raises(UserError, match="holds a model of another recipe"):
        zoo.make(zoo.models(tmp_path)["clean/000"])
