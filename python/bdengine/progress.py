"""What a run hears and tells while it goes on: Ctrl-C, and ``stats.jsonl``."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType

from .files import write_atomic


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after the step in progress; a second one acts at once."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)


def keep_stats(path: Path, images_seen: int) -> None:
    """Drop the lines after ``images_seen``: a killed run may have written some, the last in part, after its last save."""
    if path.exists():
        whole = (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
        write_atomic(path, "".join(line for line in whole if json.loads(line)["images"] <= images_seen))
