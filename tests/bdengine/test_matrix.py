"""``bdengine matrix`` as a user meets it: which cells there are, that none is measured twice, and what the tables say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bdengine import cells, matrix
from bdengine.audit import settings_of
from bdengine.cells import MatrixConfig
from bdengine.cli import main
from bdengine.config import to_json
from bdengine.defend import subject_of
from bdengine.defenses import DEFENSES, Calibration, Finding, Subject, elijah, removal
from bdengine.matrix_page import Row, markdown
from bdengine.options import AuditConfig
from bdengine.presets import PRESETS
from bdengine.shipped import ASSETS
from bdengine.start import NetworkConfig

SMALL = ("--steps", 20, "--images", 8)


def run(*arguments: object) -> int:
    return main(["matrix", *map(str, arguments)])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elijah in two iterations from a given start, and a removal of 100 images: what is tested is what is made of them."""
    short = {"searched": replace(elijah.VARIANTS["baddiffusion"], iterations=2, noises=4)}
    monkeypatch.setitem(DEFENSES, "elijah", replace(DEFENSES["elijah"], variants=short))
    monkeypatch.setitem(removal.VARIANTS, "baddiffusion", removal.RemovalConfig(epochs=1, share=0.02))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The work that is done, by name; the fourth call is interrupted."""
    made: list[str] = []

    def counted(work: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            made.append(work.__name__)
            if len(made) == 4:
                raise KeyboardInterrupt
            work(*arguments)

        return call

    for work in (cells.score, cells.examine, cells.repair):
        monkeypatch.setattr(matrix, work.__name__, counted(work))
    return made


def rows(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    found = json.loads((out / "matrix.json").read_text())["rows"]
    return {(row["attack"], row["defense"], row["sampler"]): row for row in found}


def test_no_cell_is_measured_twice_and_all_have_numbers_and_a_picture(
    tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A backdoored and a clean model; Ctrl-C after three units, then on to the end; then one of them with one more sampler."""
    attacks, defenses = ("digits-badiffusion", "digits-clean"), ("none", "latent", "elijah", "removal")
    options = ("--out", tmp_path, "--attacks", *attacks, "--defenses", *defenses, *SMALL, "--samplers", "ddpm")
    assert run(*options) == 130
    assert not (tmp_path / "matrix.json").exists()
    assert run(*options) == 0
    assert calls == ["score", "examine", "repair", "score", "score", "score", "examine", "repair", "score"]
    found = rows(tmp_path)
    cells_of_each = {("none", "ddpm"), ("latent", "ddpm"), ("elijah", "ddpm"), ("removal", "ddpm")}
    assert set(found) == {(attack, *cell) for attack in attacks for cell in cells_of_each}
    for (_, defense, _), row in found.items():
        assert row["seconds"] > 0
        assert Image.open(tmp_path / row["picture"]).width > 64
        assert (row["statistic"] is None) == (row["mse"] is not None) == (defense != "elijah")
    assert found["digits-badiffusion", "none", "ddpm"]["mse"] < 0.1 < found["digits-clean", "none", "ddpm"]["mse"]
    page = (tmp_path / "matrix.html").read_text()
    assert page.count('src="data:image/png') == len(found)
    assert not re.search(r"https?:|<script|\$\w", page)
    assert run(*options, "unipc", "--attacks", "digits-badiffusion") == 0
    assert calls[9:] == ["score", "score"]
    assert len(rows(tmp_path)) == 7
    assert "digits-badiffusion  removal  unipc" in capsys.readouterr().out
    assert run(*options, "--images", 9) == 2
    assert "holds another run, whose images is 8 and not 9" in capsys.readouterr().err
    assert len(calls) == 11


def test_what_was_made_for_a_clip_is_tried_under_it_after_a_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the clip it never works, and any removal would seem to have removed it."""
    small = replace(PRESETS["digits-clipped"], images=16, batch=8)
    monkeypatch.setitem(PRESETS, "digits-clipped", small)
    options = ("--attacks", "digits-clipped", "--defenses", "removal", "--samplers", "ddpm", *SMALL)
    assert run("--out", tmp_path, *options) == 0
    ((_, row),) = rows(tmp_path).items()
    scores = json.loads((tmp_path / "cells/digits-clipped/removal/ddpm/scores.json").read_text())["arms"]
    assert row["under"] == "latent"
    assert row["mse"] == scores["triggered"]["latent"]["mse"] != scores["triggered"]["none"]["mse"]
    assert row["picture"] == "cells/digits-clipped/removal/ddpm/latent.png"
    assert "% (latent clip)" in (tmp_path / "matrix.md").read_text()
    page = (tmp_path / "matrix.html").read_text()
    assert "bdengine matrix --out" in page
    assert "--attacks digits-clipped --defenses removal" in page


def test_a_model_is_trained_from_one_that_is_trained_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the class that its data do not have; the second table finds both models where they are."""
    for name in ("digits-clean-without-7", "digits-out-d2d"):
        small = replace(PRESETS[name], images=16, batch=8, network=NetworkConfig((8, 16), groups=4))
        monkeypatch.setitem(PRESETS, name, small)
    options = ("--attacks", "digits-out-d2d", "--defenses", "none", "--samplers", "ddim", *SMALL)
    assert run("--out", tmp_path / "one", *options) == 0
    models = tmp_path / "one" / "models"
    assert {path.name for path in models.iterdir()} == {"digits-clean-without-7", "digits-out-d2d"}
    trained = json.loads((models / "digits-out-d2d" / "config.json").read_text())
    assert trained["init"] == str(models / "digits-clean-without-7")
    ((_, row),) = rows(tmp_path / "one").items()
    assert (row["asr_class"], row["mse"], row["own"]) == (7, None, False)
    assert run("--out", tmp_path / "two", *options, "--models", models) == 0
    assert not (tmp_path / "two" / "models").exists()
    assert rows(tmp_path / "two")["digits-out-d2d", "none", "ddim"]["asr"] == row["asr"]


def test_a_row_is_of_the_model_that_its_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, models, out = ASSETS / "digits-clean", tmp_path / "models", tmp_path / "out"
    shutil.copytree(clean, models / "digits-villan" / "checkpoint")
    options = ("--models", models, "--samplers", "ddpm", "--defenses", "none", *SMALL, "--out", out)
    assert run("--attacks", "digits-villan", *options) == 2
    assert "expected the preset digits-villan's" in capsys.readouterr().err
    assert run("--attacks", "digits-clean", *options) == 0
    monkeypatch.setitem(
        PRESETS, "digits-clean", replace(PRESETS["digits-clean"], attack=PRESETS["digits-badiffusion"].attack)
    )
    shutil.copytree(ASSETS / "digits-badiffusion", models / "digits-clean" / "checkpoint")
    assert run("--attacks", "digits-clean", *options) == 2
    assert "holds another run, whose weights_sha256 is" in capsys.readouterr().err


def test_a_detector_decides_with_a_calibration_that_fits(tmp_path: Path) -> None:
    options = ("--attacks", "digits-badiffusion", "--defenses", "elijah", "--samplers", "ddpm", *SMALL)
    assert run("--out", tmp_path, *options) == 0
    finding = json.loads((tmp_path / "cells" / "digits-badiffusion" / "elijah" / "finding.json").read_text())
    settings, clean = finding["details"]["settings"], {f"model {k}": finding["statistic"] - k for k in range(1, 20)}
    fits, other = Calibration("elijah", settings, clean), Calibration("elijah", settings | {"noises": 5}, clean)
    own = Calibration("elijah", settings, clean | {finding["weights_sha256"]: 0.0})
    for calibration, verdict, p in ((other, "undecided", None), (own, "undecided", None), (fits, "backdoored", 0.05)):
        calibration.save(tmp_path / "calibration.json")
        assert run("--out", tmp_path, *options, "--calibrations", tmp_path / "calibration.json") == 0
        row = rows(tmp_path)["digits-badiffusion", "elijah", "ddpm"]
        assert (row["verdict"], row["p_value"]) == (verdict, p)


def test_the_audits_verdict_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of 64 is above all of a calibration without any, which decides nothing in a sequential test."""
    asked = []

    def audited(subject: Subject, calibration: Calibration | None, alpha: float) -> Iterator[Finding]:
        asked.append((calibration, alpha))
        details = {"settings": settings_of(subject), "stage": "start"}
        yield Finding("audit", 1 / 64, 1.0, "no evidence", None, None, 1, 1.0, details, subject.weights_sha256)

    monkeypatch.setattr(cells, "audit", audited)
    _, subject = subject_of("digits-clean", AuditConfig("digits-clean", tmp_path))
    clean = Calibration("audit", to_json(settings_of(subject)), {f"model {k}": 0.0 for k in range(20)})
    clean.save(tmp_path / "audit.json")
    options = ("--attacks", "digits-clean", "--defenses", "audit", "--samplers", "ddpm", "--alpha", 0.06, *SMALL)
    assert run("--out", tmp_path / "out", *options, "--calibrations", tmp_path / "audit.json") == 0
    assert asked == [(clean, 0.06)]
    assert rows(tmp_path / "out")["digits-clean", "audit", "ddpm"]["verdict"] == "no evidence"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("--attacks", "digits-vilan"), "unknown attack 'digits-vilan'.*digits-villan"),
        (("--attacks", "digits-ve"), "unknown attack 'digits-ve'"),
        (("--defenses", "elija"), "unknown defense 'elija'.*elijah"),
        (("--defenses", "elijah:serched"), "unknown variant of elijah 'serched'.*searched"),
        (("--defenses", "removal:anp"), "unknown variant of removal 'anp'"),
        (("--defenses", "removal:audit"), "unknown variant of removal 'audit'"),
        (("--defenses", "latent:x"), "latent has no variants and latent:x was asked for"),
        (("--defenses", "none:"), "none has no variants"),
        (("--defenses", "elijah:"), "unknown variant of elijah ''"),
        (("--attacks", "digits-clean", "digits-clean"), "expected each once"),
        (("--alpha", 7), "alpha is 7"),
        (("--models", "nowhere"), "there is no folder nowhere"),
        (("--calibrations", "nowhere.json"), "nowhere.json"),
        (("--steps", 2000), "steps is 2000: expected 1 to 1000"),
        (("--samplers", "unpic"), "unknown sampler 'unpic'.*unipc"),
        (("--samplers",), "no samplers were given"),
        (("--steps", 0), "steps is 0: expected 1 to 1000"),
        (("--threshold", -1), "threshold"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    changes: tuple[object, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", tmp_path / "out", *changes) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_tables_say_what_the_rows_hold() -> None:
    """The overview has the model's own sampler, or the first where that is not there."""
    sampled = [
        Row("a", "none", "ddim", False, "", 1.0, frechet=0.5, mse=0.25, ssim=0.125, asr=0.25),
        Row("a", "none", "ddpm", True, "", 2.0, frechet=None, mse=0.0, ssim=1.0, asr=1.0),
        Row("b", "none", "ddim", False, "", 1.0, frechet=0.5, asr=0.5, asr_class=7),
    ]
    examined = [
        Row("a", "ufid", "ddpm", True, "", 3.0, verdict="backdoored", statistic=0.99, p_value=0.05),
        Row("b", "ufid", "ddpm", True, "", 3.0, verdict="undecided", statistic=0.5),
    ]
    said = markdown([*sampled, *examined])
    assert "| a | 100.0 % | backdoored, 0.99, p = 0.05 |\n| b | 50.0 % (class 7) | 0.5 |\n" in said
    assert "| a | none | ddim | 0.50 | 0.2500 | 0.125 | 25.0 % | — | 1.0 |\n" in said
    assert "| a | none | ddpm * | — | 0.0000 | 1.000 | 100.0 % | — | 2.0 |\n" in said
    assert "| b | ufid | ddpm * | — | — | — | — | undecided, 0.5 | 3.0 |\n" in said


def test_without_flags_it_is_every_attack_on_the_digits_with_every_defense(tmp_path: Path) -> None:
    config = MatrixConfig(tmp_path)
    config.check()
    work = [unit for attack in config.attacks for unit in matrix.units(config, attack)]
    assert len({unit.file for unit in work}) == len(work) - 1  # what two attacks start from is asked for by both
    assert {kind for kind in DEFENSES if DEFENSES[kind].detects} <= set(config.defenses)
