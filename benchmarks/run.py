"""Checks, then measures, every op against its peers and its ceiling.

    python -m benchmarks.run
    python -m benchmarks.run step noising --shapes 256x3x32x32 --json benchmarks/results/machine.json
    python -m benchmarks.run samplers
    python -m benchmarks.run --device cuda --trace trace.json
    python -m benchmarks.run capture --device cuda
    python -m benchmarks.run whole

Each op's correctness gate runs first: ours against the reference bit for bit, every other provider against float64
truth; the samplers' whole loops against stock's in float64. A red gate prints no numbers, writes no file and exits
with 1.

On CUDA a table has more columns: GB/s of what the op must move and its share of a copy's, measured beside it; kernels
launched and microseconds of the host a call (a step, of a whole loop).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from bdengine.errors import UserError, unknown
from bdengine.files import write_json

from . import device
from .bench import CEILING, OURS, PROVIDERS, Provider, Shape, backend_of
from .compare import compare
from .device import Device
from .ranges import Trace, repeat
from .registry import BYTES, EVERY_OP, IN_IMAGES, OPS, SAMPLER_OPS, SHORT, shapes
from .report import PART, Row, document, exit_code, images_per_second, rows, shares, summary, table, traffic
from .timing import interleaved

LEAST_REPEATS = 7


class RedGate(Exception):
    """A provider computes something else than its op."""


def ops_of(name: str) -> list[str]:
    """The registry's names of an op; ``step`` is short for ``fused_step``, see also `registry.SHORT`.

    Raises:
        UserError: There is no such op.
    """
    if name in SHORT:
        return SHORT[name]
    for full in (name, f"fused_{name}"):
        if full in EVERY_OP:
            return [full]
    raise unknown("op", name, [*EVERY_OP, *SHORT])


def shape_of(text: str) -> Shape:
    """``"256x3x32x32"`` as (256, 3, 32, 32).

    Raises:
        UserError: Anything but four positive whole numbers.
    """
    parts = text.lower().split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"shape {text!r} is not [N, C, H, W]: expected four whole numbers above 0, as in 256x3x32x32")
    n, c, h, w = map(int, parts)
    return n, c, h, w


def check(op: str, providers: Mapping[str, Provider]) -> None:
    """The gate of one op.

    Raises:
        RedGate: A provider is wrong, or fails.
    """
    for name, provider in providers.items():
        try:
            with backend_of(name):
                provider.check()
        except Exception as error:
            raise RedGate(f"{op}: {name} is wrong, so nothing is timed: {' '.join(str(error).split())}") from error


def made(op: str, shape: Shape, wanted: Collection[str], on: Device) -> dict[str, Provider]:
    """The providers of one op at one shape, checked; the ceiling is always among them.

    Raises:
        RedGate: A provider is wrong.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    providers = {name: p for name, p in EVERY_OP[op](shape, on.where).items() if name in wanted or name == CEILING}
    check(op, providers)
    return providers


def measure(
    op: str, shape: Shape, providers: Mapping[str, Provider], threads: int, repeats: int, on: Device
) -> list[Row]:
    """Times one op at one shape."""
    moved = BYTES[op](shape) if op in BYTES else 0
    everything = {**providers, **on.copy(moved)} if moved else providers
    runs = {name: p.run for name, p in everything.items()}
    parts = {name + PART: p.share[1] for name, p in everything.items() if p.share}
    taken = interleaved(
        runs | parts,
        repeats,
        providers[CEILING].cycle,
        clock=on.seconds,
        within=lambda name: backend_of(name.removesuffix(PART)),
    )
    timings = {name: taken[name].of(p.whole) if p.whole else taken[name] for name, p in everything.items()}
    speed = images_per_second(shape[0], timings) if op in IN_IMAGES else traffic(moved, timings)
    for name, provider in everything.items():
        with backend_of(name):
            speed[name] |= shares(name, everything, taken) | on.host(provider)
    return rows(op, shape, threads, timings, speed)


def mark(cases: Iterable[tuple[str, Shape]], wanted: Collection[str], on: Device) -> None:
    """Runs each op's providers in ranges that Nsight shows, after a first call of each outside of them.

    Raises:
        RedGate: A provider is wrong.
        UserError: Nsight cannot see the device.
    """
    for op, shape in cases:
        marked = on.nvtx()
        providers = made(op, shape, wanted, on)
        for name, provider in providers.items():
            with backend_of(name):
                on.seconds(provider.run, provider.cycle)
        with marked:
            repeat(op, shape, providers, on)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with ops and shapes as the registry takes them.

    Raises:
        UserError: An unknown op, provider or device, a bad shape, too few repeats or threads, marks with a file.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__, formatter_class=_Raw)
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help=f"{', '.join([*EVERY_OP, *SHORT])}; without any, all but network, capture and whole",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine to FILE")
    parser.add_argument("--device", default="cpu", metavar="NAME", help=f"{' or '.join(device.DEVICES)} (%(default)s)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="also write a Chrome trace of every provider to FILE"
    )
    parser.add_argument(
        "--compare", metavar="REV", help="build another git revision and time its kernels in turn with ours"
    )
    parser.add_argument("--nvtx", action="store_true", help="mark ranges for Nsight and time nothing; on CUDA only")
    parser.add_argument("--threads", type=int, default=2, help="of every provider (%(default)s)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="NxCxHxW",
        help="256 and 1024 images of 3x32x32, of samplers also 1 and 16",
    )
    parser.add_argument("--repeats", type=int, default=11, help=f"rounds, at least {LEAST_REPEATS} (%(default)s)")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), metavar="NAME", help=", ".join(PROVIDERS))
    options = parser.parse_args(arguments)
    options.ops = list(dict.fromkeys(op for name in options.ops for op in ops_of(name))) or list(OPS)
    options.shapes = [shape_of(text) for text in options.shapes]
    if options.device not in device.DEVICES:
        raise unknown("device", options.device, device.DEVICES)
    if options.compare and (options.json or options.trace or options.nvtx):
        raise UserError("--compare writes no file: expected it without --json, --trace and --nvtx")
    if options.nvtx and (options.json or options.trace):
        raise UserError("--nvtx times nothing and writes no file: expected it without --json and --trace")
    for name in options.providers:
        if name not in PROVIDERS:
            raise unknown("provider", name, PROVIDERS)
    for name, value, least in (("repeats", options.repeats, LEAST_REPEATS), ("threads", options.threads, 1)):
        if value < least:
            raise UserError(f"{name} is {value}: expected at least {least}")
    return options


def ours_alone(words: Sequence[str], device: str) -> list[str]:
    """The command line of either side of a comparison: without the revision, and with our rows alone where none are named."""
    at = next(i for i, word in enumerate(words) if word.split("=")[0] == "--compare")
    rest = [*words[:at], *words[at + (1 if "=" in words[at] else 2) :]]
    return rest if "--providers" in rest else [*rest, "--providers", *OURS[device]]


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the example commands on lines of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 for a red gate, 2 after a user's mistake, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    before = torch.get_num_threads()

    def work() -> None:
        options, measured = parsed(words), list[Row]()
        if options.compare:
            print(compare(options.compare, ours_alone(words, options.device)))
            return
        torch.set_num_threads(options.threads)
        on = device.find(options.device, kept=bool(options.json))
        cases = ((op, shape) for op in options.ops for shape in options.shapes or shapes(op))
        if options.nvtx:
            mark(cases, options.providers, on)
            return
        trace = Trace(on) if options.trace else None
        for op, shape in cases:
            providers = made(op, shape, options.providers, on)
            found = measure(op, shape, providers, options.threads, options.repeats, on)
            print(table(found, on.where.type), end="\n\n", flush=True)
            measured += found
            if trace:
                trace.add(op, shape, providers)
        if samplers := [row for row in measured if row.op in SAMPLER_OPS]:
            print(summary(samplers), end="\n\n")
        if trace:
            trace.write(options.trace)
            print(f"wrote {options.trace}")
        if options.json:
            write_json(options.json, document(words, measured, on))
            print(f"wrote {options.json}")

    try:
        return exit_code(work, "it begins anew")
    except RedGate as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
