"""Ten real kills of a run of ``bdengine sample``; ``python -m benchmarks.kills`` does hundreds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import kills


def test_ten_kills_lose_double_and_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kills", "10", "--images", "4000", "--seed", "1", "--json", str(tmp_path / "kills.json")]
    assert kills.main(words) == 0
    proof = json.loads((tmp_path / "kills.json").read_text())
    assert proof["command"].startswith("python -m benchmarks.kills --kills 10 --images 4000")
    assert (proof["kills"], proof["lost"], proof["changed"], proof["doubled"]) == (10, 0, 0, 0)
    assert proof["runs"] >= 1
    assert sum(proof["moments"].values()) == 10
    assert proof["moments"]["within a write"] >= 1
    assert "'lost': 0" in capsys.readouterr().out


def test_the_moments_of_kills_are_told_apart(tmp_path: Path) -> None:
    seen = [kills._moment(tmp_path)]
    for name in ("run.json", "shard-000000.npy", "shard-000000.npy.sha256", ".shard-000001.npy.01234567.tmp"):
        (tmp_path / name).touch()
        seen.append(kills._moment(tmp_path))
    assert seen == [
        "before the run was described",
        "elsewhere",
        "between a shard and its checksum",
        "elsewhere",
        "within a write",
    ]
