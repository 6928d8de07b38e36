"""Checks, then measures, every op against its peers and its ceiling.

    python -m benchmarks.run
    python -m benchmarks.run step noising --shapes 256x3x32x32 --json benchmarks/results/machine.json
    python -m benchmarks.run samplers

Each op's correctness gate runs first: ours against the reference bit for bit, every other provider against float64
truth; the samplers' whole loops against stock's in float64. A red gate prints no numbers, writes no file and exits
with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from bdengine.errors import UserError, unknown
from bdengine.files import write_json
from bdkernels import native, use_backend

from .bench import CEILING, CPU, PROVIDERS, Provider, Shape
from .registry import OPS, SAMPLER_OPS, shapes
from .report import Row, document, rows, summary, table
from .timing import interleaved

LEAST_REPEATS = 7


class RedGate(Exception):
    """A provider computes something else than its op."""


def ops_of(name: str) -> list[str]:
    """The registry's names of an op; ``step`` is short for ``fused_step``, ``samplers`` for all that are of one.

    Raises:
        UserError: There is no such op.
    """
    if name == "samplers":
        return list(SAMPLER_OPS)
    for full in (name, f"fused_{name}"):
        if full in OPS:
            return [full]
    raise unknown("op", name, [*OPS, "samplers"])


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
            provider.check()
        except Exception as error:
            raise RedGate(f"{op}: {name} is wrong, so nothing is timed: {' '.join(str(error).split())}") from error


def measure(op: str, shape: Shape, wanted: Collection[str], threads: int, repeats: int) -> list[Row]:
    """Checks and times one op at one shape; the ceiling is always among the rows.

    Raises:
        RedGate: A provider is wrong.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    providers = {name: p for name, p in OPS[op](shape).items() if name in wanted or name == CEILING}
    if not native.available():
        providers.pop(CPU, None)
    with use_backend(CPU) if native.available() else contextlib.nullcontext():
        check(op, providers)
        runs, cycle = {name: p.run for name, p in providers.items()}, providers[CEILING].cycle
        return rows(op, shape, threads, interleaved(runs, repeats, cycle))


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with ops and shapes as the registry takes them.

    Raises:
        UserError: An unknown op or provider, a bad shape, too few repeats or threads.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__, formatter_class=_Raw)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(OPS)}, samplers; all where absent")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine to FILE")
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
    for name in options.providers:
        if name not in PROVIDERS:
            raise unknown("provider", name, PROVIDERS)
    for name, value, least in (("repeats", options.repeats, LEAST_REPEATS), ("threads", options.threads, 1)):
        if value < least:
            raise UserError(f"{name} is {value}: expected at least {least}")
    return options


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the example commands on lines of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 for a red gate, 2 after a user's mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    before = torch.get_num_threads()
    measured: list[Row] = []
    try:
        options = parsed(words)
        torch.set_num_threads(options.threads)
        for op in options.ops:
            for shape in options.shapes or shapes(op):
                found = measure(op, shape, options.providers, options.threads, options.repeats)
                print(table(found), end="\n\n", flush=True)
                measured += found
        if samplers := [row for row in measured if row.op in SAMPLER_OPS]:
            print(summary(samplers), end="\n\n")
        if options.json:
            write_json(options.json, document(words, measured))
            print(f"wrote {options.json}")
    except RedGate as error:
        print(error, file=sys.stderr)
        return 1
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
