"""What `benchmarks.attacks` measures, and that it goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bdengine.files import read_json
from bdengine.presets import PRESETS
from bdengine.start import NetworkConfig
from benchmarks import attacks

SHORT = ("digits-clean-without-7", "digits-out-d2d", "digits-clean")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of 16 training images, and 40 samples of them."""
    small = NetworkConfig((8, 16), groups=4)
    for name in SHORT[:2]:
        monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], images=16, batch=8, network=small))
    monkeypatch.setattr(attacks, "IMAGES", 40)


@pytest.mark.usefixtures("short")
def test_a_model_is_measured_once_and_what_it_starts_from_is_made_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "models", tmp_path / "attacks.json"
    words = ["--out", str(out), "--json", str(file), "--only"]
    assert attacks.main([*words, "digits-out-d2d"]) == 0
    assert read_json(out / "digits-out-d2d" / "config.json")["init"] == str(out / "digits-clean-without-7")
    first = read_json(file)["attacks"]["digits-out-d2d"]
    assert first["asr_class"] == 7
    assert set(first["arms"]["triggered"]) == {"none", "latent", "x0"}
    assert first["arms"]["clean"]["none"]["frechet"] > 0
    (out / "digits-out-d2d.json").unlink()
    monkeypatch.setattr(attacks, "made", lambda out, name: {"digits-clean": name}[name])
    assert attacks.main([*words, "digits-out-d2d", "digits-clean"]) == 0
    told = read_json(file)
    assert [*told["attacks"]] == ["digits-clean", "digits-out-d2d"]
    assert told["attacks"]["digits-out-d2d"] == first
    assert told["attacks"]["digits-clean"]["arms"]["triggered"]["none"]["asr"] == 0
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.startswith("| none (shipped model) | `digits-clean` | `ddpm`, 20 | 0.0% | 0.0% | 0.0% | ")
    assert attacks.main([*words, "digits-odd"]) == 2
    assert "unknown preset 'digits-odd'" in capsys.readouterr().err


def test_every_preset_of_the_digits_that_is_an_attack_has_a_title() -> None:
    assert set(attacks.TITLES) == {name for name, run in PRESETS.items() if run.data == "digits"} - {SHORT[0]}
