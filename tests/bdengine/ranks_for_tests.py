"""Ranks under a real torchrun, and the process of each."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

ENVIRONMENT: Final = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*words: object, ranks: int = 2) -> list[str]:
    """The command of ``bdengine`` with ``words`` under so many ranks."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "bdengine",
        *map(str, words),
    ]  # fmt: skip


def rank_process(parent: int, rank: int) -> int | None:
    """The process of a rank, among those that torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            theirs = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if theirs == parent and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            pass  # it ended meanwhile
    return None
