"""The study of backdoor paths, at the smallest size that says something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import path


def test_ddim_is_on_the_path_with_the_exact_coefficient_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "path.json"
    words = ["--json", str(out), "--samples", "8", "--rates", "0.1", "--samplers", "ddim"]
    assert path.main(words) == 0
    written = json.loads(out.read_text())
    assert written["command"] == f"python -m benchmarks.path {' '.join(words)}"
    assert written["samples"] == 8
    shares = {row["coefficients"]: row["rates"]["0.1"] for row in written["rows"]}
    assert shares["exact"]["triggered"]["share"] == 1
    assert shares["published"]["triggered"]["share"] == 0
    assert shares["exact"]["triggered"]["interval"] == pytest.approx([0.025 ** (1 / 8), 1])  # Clopper and Pearson's
    assert all(share["clean"]["share"] == 0 for share in shares.values())
    departures = {row["coefficients"]: row["departure"] for row in written["rows"]}
    assert departures["exact"] < 1e-9 < departures["published"]
    assert "ddim" in capsys.readouterr().out
