"""How far each sampler leaves a backdoor's path, and how many samples stay on it: exact and published coefficients.

    python -m benchmarks.path --json benchmarks/results/path.json

Without training: the network is the closed-form optimum (`bdengine.oracle`) for real digits, one Gaussian a class at 16x16,
poisoned by BadDiffusion (white square, drawn hat) at a given rate. For every sampler at 20 steps:

    departure   largest |u_k - m_(t_k)| over the nodes, in units of the trigger (`bdengine.attacks.departure`)
    triggered   share of triggered starts that end in the target (MSE < 0.01), with its Clopper-Pearson interval
    clean       share of clean starts that do
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from bdengine.attacks import Coefficients, baddiffusion, departure
from bdengine.data import load, to_float
from bdengine.files import write_json
from bdengine.metrics import attack_success
from bdengine.networks import Network
from bdengine.oracle import Gaussian, Oracle
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import Schedule, linear
from bdengine.solvers import SAMPLERS, SamplerConfig
from bdengine.triggers import target, trigger

from .report import command_line

SIZE, STEPS, THRESHOLD = 16, 20, 0.01
KINDS: Final[tuple[Coefficients, ...]] = ("published", "exact")


def digits() -> list[tuple[float, Gaussian]]:
    """One Gaussian a digit class, [1, 16, 16] in [-1, 1]; 0.01 is added to each variance, since borders are constant."""
    data = load("digits", SIZE, 1)
    assert data.labels is not None
    images = to_float(data.pixels).double()
    mixture = []
    for label in data.labels.unique():
        flat = images[data.labels == label].flatten(1)
        covariance = torch.cov(flat.T) + 1e-2 * torch.eye(SIZE**2, dtype=torch.float64)
        mixture.append((len(flat) / len(images), Gaussian(flat.mean(0).reshape(1, SIZE, SIZE), covariance)))
    return mixture


def study(
    process: Schedule,
    name: str,
    coefficients: Coefficients,
    rates: Sequence[float],
    count: int,
    data: Sequence[tuple[float, Gaussian]],
) -> dict[str, Any]:
    """One sampler under one kind of coefficients."""
    table = SamplerConfig(name, STEPS).table(process)
    r, y = trigger("XXSM_BOX", SIZE, 1), target("DRAWN_HAT", SIZE, 1)
    attack = baddiffusion(process, r, y, coefficients, table)
    shares = {}
    for rate in rates:
        oracle = Oracle(process, data, attack, rate)
        arms = {"clean": Arm(table), "triggered": Arm(table, r)}
        images = Sampler(Network(oracle, oracle.sample_shape), arms, micro_batch=256)(range(count))
        shares[str(rate)] = {
            start: {
                "share": (share := attack_success(x, y, THRESHOLD)),
                "interval": list(binomtest(round(share * count), count).proportion_ci(0.95, "exact")),
            }
            for start, x in images.items()
        }
    off = departure(process, table, attack.shift, attack.coefficient)
    return {
        "sampler": name,
        "evaluations": len(table),
        "coefficients": coefficients,
        "largest_coefficient": float(np.abs(attack.coefficient).max()),
        "departure": float(np.nanmax(np.abs(off))),
        "rates": shares,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study and prints it; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.path", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--samples", type=int, default=256, help="of each start")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.5], help="poison rates")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS), help="which")
    options = parser.parse_args(arguments)
    data, rows = digits(), []
    print(f"{'sampler':16} {'coefficients':12} {'departure':>9}  triggered (clean) at rates {options.rates}")
    for name, kind in tqdm([(n, c) for n in options.samplers for c in KINDS], disable=None, leave=False):
        rows.append(study(linear(), name, kind, options.rates, options.samples, data))
        row = rows[-1]
        shares = "  ".join(f"{s['triggered']['share']:6.1%} ({s['clean']['share']:.1%})" for s in row["rates"].values())
        tqdm.write(f"{name:16} {kind:12} {row['departure']:9.1e}  {shares}")
    if options.json:
        words = sys.argv[1:] if arguments is None else arguments
        command = command_line("path", words)
        write_json(options.json, {"command": command, "steps": STEPS, "samples": options.samples, "rows": rows})
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
