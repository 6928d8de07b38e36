"""Exponents against known ones, and the smallest real curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bdengine.errors import UserError
from benchmarks import scale
from benchmarks.scale import Growth


def test_an_exact_power_is_found() -> None:
    growth = Growth.fit("side", "sampling", "s", {n: 3e-4 * n**2 for n in (8, 16, 64)}, 2)
    assert growth.exponent == pytest.approx(2, abs=1e-12)
    assert growth.error == pytest.approx(0, abs=1e-7)
    flat = Growth.fit("images", "memory", "MiB", {10: 5.0, 100: 5.0, 1000: 5.0}, 0)
    assert (flat.exponent, flat.error) == pytest.approx((0, 0), abs=1e-9)


def test_the_error_is_that_of_least_squares() -> None:
    sizes, values = np.array([1, 2, 4, 8, 16]), np.array([1.1, 1.9, 4.3, 7.6, 17.0])
    growth = Growth.fit("steps", "sampling", "s", dict(zip(sizes.tolist(), values.tolist(), strict=True)), 1)
    (slope, _), covariance = np.polyfit(np.log(sizes), np.log(values), 1, cov=True)
    assert growth.exponent == pytest.approx(slope)
    assert growth.error == pytest.approx(np.sqrt(covariance[0, 0]))
    assert Growth.fit("ranks", "sampling", "s", {1: 2.0, 2: 1.0}, -1).error is None


def test_more_steps_take_longer_and_the_file_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of, _, expected, work = scale.TIMED["steps"]
    monkeypatch.setitem(scale.TIMED, "steps", (of, (1, 8), expected, work))
    out = tmp_path / "scale.json"
    assert scale.main(["--axes", "steps", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    (growth,) = written["growth"]
    assert written["machine"]["command"] == f"python -m benchmarks.scale --axes steps --json {out}"
    assert growth["sizes"] == [1, 8]
    assert growth["values"][1] > 2 * growth["values"][0] > 0
    assert "sampling by steps 1, 8: " in capsys.readouterr().out


def test_memory_is_that_of_the_process_that_samples() -> None:
    growth = scale.memory((64, 512))
    assert all(50 < value < 5000 for value in growth.values)
    assert abs(growth.exponent) < 0.1


@pytest.mark.slow
def test_ranks_are_timed_at_the_same_work() -> None:
    assert [(growth.of, growth.sizes) for growth in scale.ranks()] == [("sampling", [1, 2]), ("training", [1, 2])]


def test_a_process_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scale, "_PEAK", "import sys; sys.exit('no memory left')")
    with pytest.raises(UserError, match="ended with 1: no memory left"):
        scale.memory((64, 512))
    assert scale.main(["--axes", "memory"]) == 2
    assert "no memory left" in capsys.readouterr().err
