"""Every provider a few times inside named ranges, for a look at what runs: a Chrome trace, or marks for Nsight.

fused_step 256x3x32x32      a range of the op at a shape
  cpu                       one of each provider
    bdk::fused_step_        each op in it, ours by its own name
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch.profiler import profile, record_function

from bdengine.files import write_atomic

from .bench import Provider, Shape, backend_of
from .device import Device

CALLS: Final = 3


def repeat(op: str, shape: Shape, providers: Mapping[str, Provider], device: Device) -> None:
    """Each provider, `CALLS` calls or one whole cycle or loop, until the device is done with it."""
    with record_function(f"{op} {'x'.join(map(str, shape))}"):
        for name, provider in providers.items():
            with backend_of(name), record_function(name):
                for _ in range(CALLS if provider.cycle == provider.steps == 1 else provider.cycle):
                    provider.run()
                device.wait()


class Trace:
    """A Chrome trace, to which ops are added as they are measured."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._document: dict[str, Any] = {"traceEvents": []}

    def add(self, op: str, shape: Shape, providers: Mapping[str, Provider]) -> None:
        """One op at one shape, after its own time was taken.

        Each is a session of the profiler: their times have one origin, and their arrows get numbers of their own. Graphs that
        were captured before outlive a session: torch takes CUPTI down after one, which crashes them under a CUDA before 12.6,
        only where TEARDOWN_CUPTI=1 is set.
        """
        with profile(activities=self._device.activities) as recorded:
            repeat(op, shape, providers, self._device)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(file))
            found = json.loads(file.read_text())
        before = self._document["traceEvents"]
        part = len(before)
        for event in found["traceEvents"]:
            if event["ph"] in "sft":
                event["id"] = f"{part}-{event['id']}"
        self._document = {**found, "traceEvents": before + found["traceEvents"]}

    def write(self, file: Path) -> None:
        """For ui.perfetto.dev or chrome://tracing."""
        write_atomic(file, json.dumps(self._document))
