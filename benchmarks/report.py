"""Rows, the console's table, and the machine they were measured on."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from bdengine.errors import UserError
from bdkernels import env
from bdkernels.backends import missing

from .bench import CEILING, COPY, CPU, FUSED, OURS, PEERS, REFERENCE, Provider, Shape
from .device import Device
from .timing import Timing

PART: Final = ", a part"
"""Beside a provider's name, what its share is of."""
PER_SECOND: Final = "images_per_s"


@dataclass(frozen=True)
class Row:
    """One provider of one op at one shape; times in ns per element, ``of_ceiling`` 1 at the ceiling's speed.

    ``more``: columns that not every device or op has, by name.
    """

    op: str
    provider: str
    shape: list[int]
    dtype: str
    threads: int
    ns_per_element: float
    p20: float
    p80: float
    of_ceiling: float
    more: Mapping[str, float] = field(default_factory=dict)


def of_row(flat: Mapping[str, Any]) -> Row:
    """A row of a result file, whose further columns stand beside the others."""
    own = {one.name for one in fields(Row)} - {"more"}
    return Row(**{k: v for k, v in flat.items() if k in own}, more={k: v for k, v in flat.items() if k not in own})


def images_per_second(count: int, timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """Of calls that each make, or take, ``count`` images, by provider; and the seconds of a call."""
    return {
        provider: {"seconds": round(timing.median, 5), PER_SECOND: float(f"{count / timing.median:.4g}")}
        for provider, timing in timings.items()
    }


def shares(name: str, providers: Mapping[str, Provider], taken: Mapping[str, Timing]) -> dict[str, float]:
    """A provider's columns beside its speed: the share of a part of it, and 1 where its time is calculated.

    The same columns for all of an op's providers, 0 where there is no such part.
    """
    named = {p.share[0] for p in providers.values() if p.share}
    part = round(taken[name + PART].median / taken[name].median, 4) if name + PART in taken else 0.0
    calculated = {"calculated": float(providers[name].whole is not None)}
    return dict.fromkeys(named, part) | (calculated if any(p.whole for p in providers.values()) else {})


def traffic(moved: float, timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """GB/s of ``moved`` bytes a call, and 1 at the speed of the copy; no columns where no copy was measured."""
    if COPY not in timings:
        return {provider: {} for provider in timings}
    copied = timings[COPY].median
    return {
        provider: {
            "gb_per_s": round(moved / timing.median / 1e9, 2),
            "of_copy": round(copied / timing.median, 4),
        }
        for provider, timing in timings.items()
    }


def rows(
    op: str,
    shape: Shape,
    threads: int,
    timings: Mapping[str, Timing],
    more: Mapping[str, Mapping[str, float]],
) -> list[Row]:
    """The measurements of one op at one shape, in float32."""
    scale = 1e9 / math.prod(shape)
    ceiling = timings[CEILING].median
    return [
        Row(
            op,
            provider,
            list(shape),
            "float32",
            threads,
            round(timing.median * scale, 4),
            round(timing.p20 * scale, 4),
            round(timing.p80 * scale, 4),
            round(ceiling / timing.median, 4),
            more[provider],
        )
        for provider, timing in timings.items()
    ]


def fastest(measured: Sequence[Row]) -> Row | None:
    """Ours: the fastest of our kernels, or the plain torch reference where none was measured."""
    fused = [row for row in measured if row.provider in FUSED]
    plain = [row for row in measured if row.provider == REFERENCE]
    return min(fused or plain, key=lambda row: row.ns_per_element, default=None)


def table(measured: Sequence[Row], device: str = CPU) -> str:
    """The rows of one op at one shape as text, each with its ratio to ours, and where ours is not ahead."""
    by_provider = {row.provider: row for row in measured}
    ours = fastest(measured)
    first = measured[0]
    head = f"{first.op} {'x'.join(map(str, first.shape))} {first.dtype}, threads: {first.threads}"
    more = "".join(f" {name:>12}" for name in first.more)
    lines = [head, f"{'provider':10} {'ns/element':>10} {'p20':>8} {'p80':>8} {'to ours':>8} {'of ceiling':>10}{more}"]
    for row in measured:
        ratio = f"{row.ns_per_element / ours.ns_per_element:.2f}x" if ours else ""
        times = f"{row.ns_per_element:10.3f} {row.p20:8.3f} {row.p80:8.3f}"
        more = "".join(f" {value:>12.6g}" for value in row.more.values())
        lines.append(f"{row.provider:10} {times} {ratio:>8} {row.of_ceiling:>10.1%}{more}")
    return "\n".join([*lines, *([verdict(ours, by_provider, device)] if ours else [])])


def verdict(ours: Row, by_provider: Mapping[str, Row], device: str) -> str:
    """Says of which peers ours is not ahead, medians compared."""
    peers = [by_provider[name] for name in PEERS if name in by_provider]
    behind = [f"{p.provider} ({p.ns_per_element / ours.ns_per_element:.2f}x)" for p in peers
              if p.ns_per_element <= ours.ns_per_element]  # fmt: skip
    if ours.provider == REFERENCE:
        reason = "; ".join(filter(None, map(missing, OURS[device]))) or "our kernels were not asked for"
        return f"ours here is the plain torch reference ({reason}); it is not ahead of {', '.join(behind) or 'none'}"
    return f"ours is not ahead of {', '.join(behind)}" if behind else "ours is ahead of every peer measured"


def summary(measured: Sequence[Row]) -> str:
    """How many times as long as ours diffusers takes, a line an op and a column a shape; empty where one is missing."""
    ratios: dict[str, dict[tuple[int, ...], float]] = {}
    for row in measured:
        ours = fastest([r for r in measured if (r.op, r.shape) == (row.op, row.shape)])
        if row.provider == "diffusers" and ours:
            ratios.setdefault(row.op, {})[tuple(row.shape)] = row.ns_per_element / ours.ns_per_element
    everything = [ratio for of_op in ratios.values() for ratio in of_op.values()]
    if not everything:
        return "diffusers and ours were not both measured: no ratios"
    shapes = list(dict.fromkeys(shape for of_op in ratios.values() for shape in of_op))
    names = ["x".join(map(str, shape)) for shape in shapes]
    lines = [f"{'diffusers to ours':22}" + "".join(f" {name:>12}" for name in [*names, "median"])]
    for op, of_op in ratios.items():
        numbers = [*(of_op[shape] for shape in shapes), median(of_op.values())]
        lines.append(f"{op:22}" + "".join(f" {number:>11.2f}x" for number in numbers))
    slower = [f"{op} {name} ({of_op[shape]:.2f}x)" for op, of_op in ratios.items()
              for shape, name in zip(shapes, names, strict=True) if of_op[shape] < 1]  # fmt: skip
    lines.append(f"median {median(everything):.2f}x, least {min(everything):.2f}x")
    return "\n".join([*lines, f"ours is slower in {', '.join(slower) or 'no case'}"])


def machine(arguments: Sequence[str], device: Device) -> dict[str, Any]:
    """Where, when, with which versions and by which command the numbers were made."""
    found = env.found()
    return {
        "device": device.name,
        **{name: found[name] for name in ("cpu", "cores", "vector", "os", "torch", "native")},
        "versions": {name: found[name] for name in ("python", "numpy", "diffusers", "triton")},
        "caches": device.caches,
        "tf32": tf32(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("run", arguments),
    }


def tf32() -> str:
    """What float32 may be rounded to 10 bits in, on CUDA devices that can: torch's defaults, with which all is timed.

    Gates run without: see `bench.in_full`.
    """
    allowed = {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "matrix products": torch.get_float32_matmul_precision() != "highest",
    }
    return ", ".join(name for name, on in allowed.items() if on) or "nowhere"


def argument_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Of the arguments of ``benchmarks.NAME``, whose help is its module's ``doc`` as it stands there."""
    kept = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"benchmarks.{name}", description=doc, formatter_class=kept)


def command_line(name: str, words: Sequence[str]) -> str:
    """The command line of ``benchmarks.NAME`` with these arguments."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *words])


def exit_code(work: Callable[[], object], goes_on: str) -> int:
    """That of a command that does ``work``: 2 after a user's mistake, 130 after Ctrl-C, each with a sentence."""
    try:
        work()
    except (UserError, FloatingPointError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nbenchmarks: interrupted; called again, {goes_on}", file=sys.stderr)
        return 130
    return 0


def commit() -> str:
    """The commit of this checkout, with ``-dirty`` where the tree differs from it; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def document(arguments: Sequence[str], measured: Sequence[Row], device: Device) -> dict[str, Any]:
    """What ``--json`` writes; a row's further columns stand beside the others."""
    flat = [asdict(row) for row in measured]
    for row in flat:
        row |= row.pop("more")
    return {"machine": machine(arguments, device), "rows": flat}
