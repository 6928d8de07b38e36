"""Writing beside sampling: one thread that does what it is handed, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

WAITING = 2
"""Jobs that may wait; then `Writer.put` does."""


class Writer:
    """Runs jobs in a thread. Leaving the block waits for all of them and raises the first error of any.

    After an error the jobs that follow are dropped, and the next `put` raises it.
    """

    def __init__(self) -> None:
        self.jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="writer")

    def __enter__(self) -> Writer:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.jobs.put(None)
        self.thread.join()
        if kind is None:
            self._raise()

    def put(self, job: Callable[[], None]) -> None:
        """Hands over a job; waits while `WAITING` of them do."""
        self._raise()
        self.jobs.put(job)

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            if self.error is None:
                try:
                    job()
                except BaseException as error:
                    self.error = error
