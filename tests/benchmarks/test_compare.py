"""Two revisions side by side: the ratios, the command line of each, and another revision really built and run."""

from __future__ import annotations

import subprocess

import pytest

from bdengine.errors import UserError
from benchmarks import compare, run

REVISION = "HEAD"


def test_the_ratio_is_of_rounds_side_by_side() -> None:
    then = [{"step": 4.0, "gone": 1.0}, {"step": 8.0, "gone": 1.0}, {"step": 3.0, "gone": 1.0}]
    now = [{"step": 2.0, "new": 1.0}, {"step": 4.0, "new": 1.0}, {"step": 3.0, "new": 1.0}]
    head, line = compare.report(then, now).splitlines()
    assert head.split() == ["case", "then", "now", "then/now", "least", "most"]
    assert line.split() == ["step", "4.000", "3.000", "2.00x", "1.00x", "2.00x"]
    with pytest.raises(UserError, match="no case in common"):
        compare.report([{"gone": 1.0}], [{"new": 1.0}])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["step", "--compare", "HEAD~3", "--threads", "1"], ["step", "--threads", "1", "--providers", "cpu"]),
        (["--compare=main", "--providers", "reference"], ["--providers", "reference"]),
    ],
)
def test_each_side_runs_the_rest_of_the_command(words: list[str], expected: list[str]) -> None:
    assert run.ours_alone(words, "cpu") == expected


def test_a_comparison_writes_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["step", "--compare", "HEAD", "--json", "x.json"]) == 2
    assert "--compare writes no file" in capsys.readouterr().err


def test_a_revision_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["step", "--compare", "no-such-revision"]) == 2
    assert "no-such-revision" in capsys.readouterr().err


@pytest.mark.slow
def test_a_revision_is_built_run_and_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BDK_CUDA", "0")
    monkeypatch.setattr(compare, "ROUNDS", 1)
    words = ["normal", "--shapes", "2x3x8x8", "--repeats", "7", "--threads", "1", "--compare", REVISION]
    assert run.main(words) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[:3] == ["normal", "2x3x8x8", "cpu"]
    assert 0.2 < float(line[5].rstrip("x")) < 5
    trees = subprocess.run(["git", "worktree", "list"], cwd=compare.ROOT, capture_output=True, text=True, check=True)
    assert "bdk-" not in trees.stdout
