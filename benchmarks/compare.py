"""Our kernels as they are here against those of another revision, built beside them.

    python -m benchmarks.run step --compare HEAD~20

Each is measured by its own runner in a process of its own, `ROUNDS` times in turn, so that a busy moment falls on both alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Final

from bdengine.errors import UserError
from bdengine.files import read_json

from .bench import FUSED

ROOT: Final = Path(__file__).parents[1]
ROUNDS: Final = 5
Times = dict[str, float]
"""ns per element by case: op, shape and provider."""


def _run(where: Path, *words: str) -> None:
    """One command in a checkout, on its own sources.

    Raises:
        UserError: It failed, with what it said last.
    """
    paths = os.pathsep.join([str(where), str(where / "python")])
    done = subprocess.run(words, cwd=where, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{' '.join(words[:4])} failed in {where}: {said}")


@contextmanager
def built(revision: str) -> Iterator[Path]:
    """A checkout of ``revision`` with its compiled kernels, removed afterwards.

    Raises:
        UserError: There is no such revision, or it cannot be built.
    """
    with tempfile.TemporaryDirectory(prefix="bdk-") as folder:
        where = Path(folder) / "revision"
        _run(ROOT, "git", "worktree", "add", "--detach", str(where), revision)
        try:
            _run(where, sys.executable, "setup.py", "build_ext", "--inplace")
            yield where
        finally:
            _run(ROOT, "git", "worktree", "remove", "--force", str(where))


def times(where: Path, words: Sequence[str]) -> Times:
    """Of our kernels in a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        _run(where, sys.executable, "-m", "benchmarks.run", *words, "--json", str(file))
        rows = [row for row in read_json(file)["rows"] if row["provider"] in FUSED]
    return {f"{r['op']} {'x'.join(map(str, r['shape']))} {r['provider']}": r["ns_per_element"] for r in rows}


def report(then: Sequence[Times], now: Sequence[Times]) -> str:
    """A line a case: ns per element then and now, medians of the rounds, and the ratio's median, least and most.

    Raises:
        UserError: No case was measured in both.
    """
    cases = [case for case in now[0] if case in then[0]]
    if not cases:
        raise UserError("the revisions have no case in common: expected an op that both measure")
    lines = [f"{'case':40} {'then':>9} {'now':>9} {'then/now':>9} {'least':>7} {'most':>7}"]
    for case in cases:
        before, after = ([round_[case] for round_ in rounds] for rounds in (then, now))
        ratios = [b / a for b, a in zip(before, after, strict=True)]
        numbers = (
            f"{median(before):9.3f} {median(after):9.3f} {median(ratios):8.2f}x {min(ratios):6.2f}x {max(ratios):6.2f}x"
        )
        lines.append(f"{case:40} {numbers}")
    return "\n".join(lines)


def compare(revision: str, words: Sequence[str]) -> str:
    """The report of ``python -m benchmarks.run WORDS`` at ``revision`` and here.

    Raises:
        UserError: No such revision, one that cannot be built or lacks what is asked for, or nothing in common.
    """
    then, now = [], []
    with built(revision) as where:
        for _ in range(ROUNDS):
            then.append(times(where, words))
            now.append(times(ROOT, words))
    return report(then, now)
