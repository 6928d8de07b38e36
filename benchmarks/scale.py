"""How time and memory grow: one axis at a time, each with its exponent.

    python -m benchmarks.scale --json benchmarks/results/scale.json

    y = a n^p        p by least squares of the logarithms, with its standard error

Time is that of the digits' UNet, accelerated, on one thread, or one for each rank; sizes are interleaved, ranks are not. Memory
is the peak of a process that samples into shards (a small random UNet at 8x8), its imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tqdm import tqdm

from bdengine.accelerate import accelerate
from bdengine.attacks import AttackConfig
from bdengine.checkpoint import save_pipeline
from bdengine.errors import UserError
from bdengine.files import write_json
from bdengine.memory import keep_freed
from bdengine.networks import DIGITS16, Network, unet
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.solvers import SamplerConfig
from bdengine.train import TrainConfig, Trainer

from .device import find
from .report import command_line, exit_code, machine
from .timing import interleaved

REPEATS: Final = 5
RANKS: Final = (1, 2)
IMAGES: Final = (2000, 8000, 32000)
"""Of the runs whose memory is measured."""
_PEAK: Final = """
import re, sys
from pathlib import Path
from bdengine.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""
"""A command, then the peak of its process; ``ru_maxrss`` would begin at that of the process which started it."""


@dataclass(frozen=True)
class Growth:
    """One quantity along one axis.

    Attributes:
        axis: What grows.
        of: What is measured.
        unit: Of the values, s or MiB.
        sizes: Along the axis.
        values: At each.
        exponent: ``p``.
        error: Its standard error; None of two sizes.
        expected: What it would be without costs that all sizes share.
    """

    axis: str
    of: str
    unit: str
    sizes: list[int]
    values: list[float]
    exponent: float
    error: float | None
    expected: float

    @classmethod
    def fit(cls, axis: str, of: str, unit: str, measured: Mapping[int, float], expected: float) -> Growth:
        """From at least two values by size."""
        x, y = (v - v.mean() for v in (np.log([*measured]), np.log([*measured.values()])))
        p = x @ y / (x @ x)
        free = len(x) - 2
        error = float(np.sqrt(np.square(y - p * x).sum() / free / (x @ x))) if free else None
        return cls(axis, of, unit, [*measured], [*measured.values()], float(p), error, expected)

    def __str__(self) -> str:
        values = ", ".join(f"{value:.3g}" for value in self.values)
        error = "" if self.error is None else f" ± {self.error:.3f}"
        sizes = ", ".join(map(str, self.sizes))
        return f"{self.of} by {self.axis} {sizes}: {values} {self.unit}; exponent {self.exponent:.3f}{error}"


def sampler(side: int = 16, batch: int = 64, steps: int = 2) -> Sampler:
    """Of the digits' network with random weights, by DDIM."""
    torch.manual_seed(0)
    network = Network(accelerate(unet(**DIGITS16 | {"size": side}))).eval().requires_grad_(False)
    return Sampler(network, {"": Arm(SamplerConfig("ddim", steps).table(linear()))}, batch)


def training(batch: int) -> TrainConfig:
    """Of the digits' network, with BadDiffusion."""
    attack = AttackConfig("baddiffusion", "XXSM_BOX", "DRAWN_HAT", rate=0.2)
    return TrainConfig(Path("never"), batch=batch, attack=attack)


def _images(n: int) -> Callable[[], object]:
    run = sampler(batch=16)
    return lambda: run(range(n))


def _batch(n: int) -> Callable[[], object]:
    run = sampler(batch=n)
    return lambda: run(range(n))


def _steps(n: int) -> Callable[[], object]:
    run = sampler(batch=8, steps=n)
    return lambda: run(range(8))


def _side(n: int) -> Callable[[], object]:
    run = sampler(side=n, batch=4)
    return lambda: run(range(4))


def _training(n: int) -> Callable[[], object]:
    return Trainer(training(n)).step


TIMED: Final[dict[str, tuple[str, tuple[int, ...], float, Callable[[int], Callable[[], object]]]]] = {
    "images": ("sampling", (32, 64, 128, 256), 1, _images),
    "micro-batch": ("sampling", (1, 4, 16, 64), 1, _batch),
    "steps": ("sampling", (4, 8, 16, 32), 1, _steps),
    "side": ("sampling", (16, 32, 64, 128), 2, _side),
    "batch": ("training", (4, 8, 16, 32), 1, _training),
}
"""By axis: what is timed, the sizes, the exponent to expect, and what makes the work of a size."""
AXES: Final = (*TIMED, "ranks", "memory")


def timed(axis: str, repeats: int = REPEATS) -> Growth:
    """Seconds along an axis of `TIMED`."""
    of, sizes, expected, work = TIMED[axis]
    timings = interleaved({str(n): work(n) for n in sizes}, repeats)
    return Growth.fit(axis, of, "s", {n: timings[str(n)].median for n in sizes}, expected)


def ranks(counts: Sequence[int] = RANKS) -> list[Growth]:
    """Seconds of the same work by so many ranks, one thread each."""
    taken: dict[int, dict[str, float]] = {}
    for count in counts:
        launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
        command = [sys.executable, "-m", *launch, "benchmarks.scale_rank"]
        taken[count] = json.loads(_output(command).splitlines()[-1])
    return [Growth.fit("ranks", of, "s", {n: taken[n][of] for n in counts}, -1) for of in taken[counts[0]]]


def memory(sizes: Sequence[int] = IMAGES) -> Growth:
    """MiB at the peak of a process that samples so many images."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_pipeline(Path(folder, "tiny"), unet(8, 1, (8, 16), groups=4), linear().to_config())
        for n in sizes:
            words = ["sample", f"{folder}/tiny", "--out", f"{folder}/{n}", "--seeds", f"0-{n - 1}", "--format", "npy"]
            words += ["--shard", "256", "--sampler", "ddim", "--steps", "1"]
            measured[n] = int(_output([sys.executable, "-c", _PEAK, *words]).split()[-1]) / 1024
    return Growth.fit("images", "peak memory of sampling", "MiB", measured, 0)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{shlex.join(command[:8])} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def measure(axis: str) -> list[Growth]:
    """One of `AXES`."""
    if axis in TIMED:
        return [timed(axis)]
    return ranks() if axis == "ranks" else [memory()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; see the module. Returns 2 where a process of its own fails."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES, help="which")
    options = parser.parse_args(words)
    keep_freed()
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def work() -> None:
        found: list[Growth] = []
        for axis in tqdm(options.axes, disable=None, leave=False):
            for growth in measure(axis):
                tqdm.write(str(growth))
                found.append(growth)
        if options.json:
            command = command_line("scale", words)
            about: dict[str, Any] = machine(words, find("cpu")) | {"command": command}
            write_json(options.json, {"machine": about, "growth": [asdict(growth) for growth in found]})
            print(f"wrote {options.json}")

    try:
        return exit_code(work, "it begins anew")
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
