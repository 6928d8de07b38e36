"""Every detector on every model of a zoo: detection rates, false alarms, and what they cost.

    python -m benchmarks.zoo --out runs/zoo                                    the models
    python -m benchmarks.detection --zoo runs/zoo --out runs/detection         findings; goes on where it stopped
    torchrun --nproc-per-node 2 -m benchmarks.detection ...                    the same on two cores
    python -m benchmarks.detection --zoo runs/zoo --out runs/detection --json benchmarks/results/detection.json

A detector is told nothing of the attack: its first variant, or `searched` where it has one, examines every model. The clean
models below `zoo.CALIBRATE` give its calibration, all others are held out; the audit stops on them where it is decisive, as for
its users. A rate is k of n with its Clopper-Pearson interval; a backdoor whose own trigger works in less than `WORKS` of the
images is counted apart.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from scipy.stats import binomtest
from tqdm import tqdm

from bdengine import audit
from bdengine.auditing import AUDIT, finding_at
from bdengine.defend import examined, subject_of
from bdengine.defenses import DEFENSES, Calibration, Finding
from bdengine.distributed import join
from bdengine.errors import UserError, unknown
from bdengine.files import read_json, write_json
from bdengine.memory import keep_freed
from bdengine.options import AuditConfig, DefendConfig

from .report import commit, exit_code
from .zoo import CALIBRATE, models

DETECTORS: Final = (AUDIT, *(name for name, defense in DEFENSES.items() if defense.detects))
ALPHA: Final = 0.05
WORKS: Final = 0.9
"""Least share of triggered images that reach their target, for the backdoor to count as one."""


def finding_of(out: Path, detector: str, name: str) -> Path:
    """Where the finding of a detector on the model ``name`` is kept."""
    return out / detector / f"{name.replace('/', '-')}.json"


def examine(zoo: Path, out: Path, detectors: Sequence[str]) -> None:
    """Makes the findings that are missing, of the models that are there."""
    here = [name for name, run in models(zoo).items() if (run.out / "scores.json").exists()]
    if not here:
        raise UserError(f"there are no finished models in {zoo}: expected those of benchmarks.zoo")
    work = [(d, name) for name in here for d in detectors if not finding_of(out, d, name).exists()]
    with join() as ranks:
        for calibrates in (True, False):  # the audit judges held-out models by all that calibrate
            part = [(detector, name) for detector, name in work if _calibrates(name) is calibrates]
            for at in tqdm(ranks.share(len(part)), unit="finding", disable=ranks.rank > 0):
                detector, name = part[at]
                write_json(finding_of(out, detector, name), look(zoo, out, detector, name).to_json())
            ranks.together(0)


def look(zoo: Path, out: Path, detector: str, name: str) -> Finding:
    """What a detector finds on the model ``name``; with the audit's verdict where it is held out."""
    model = str(zoo / name / "checkpoint")
    if detector != AUDIT:
        variant = "searched" if "searched" in DEFENSES[detector].variants else None
        return examined(DefendConfig(model, out, detector, variant))[1]
    _, subject = subject_of(AuditConfig(model, out))
    if _calibrates(name):
        return audit.examine(subject)
    calibration = Calibration.of(
        [finding_at(finding_of(out, AUDIT, clean)) for clean in models(zoo) if _calibrates(clean)]
    )
    return [*audit.audit(subject, calibration, ALPHA)][-1]


def rate(hits: int, of: int) -> dict[str, Any]:
    """``hits`` of ``of`` with its 95 % Clopper-Pearson interval."""
    interval = [round(end, 4) for end in binomtest(hits, of).proportion_ci(0.95, "exact")] if of else None
    return {"k": hits, "n": of, "interval": interval}


def kind_of(name: str, zoo: Path) -> str:
    """The group that a model is counted in: clean, or its attack, with ``weak`` where its own trigger fails."""
    run = models(zoo)[name]
    attack = run.attack
    if attack.name == "none":
        return "clean"
    box = attack.name == "baddiffusion" and "BOX" in attack.trigger
    kind = "baddiffusion box" if box else attack.name
    works = read_json(run.out / "scores.json")["arms"]["triggered"]["none"]["asr"] >= WORKS
    return kind if works else f"{kind} (weak)"


def rates(zoo: Path, out: Path, detector: str) -> dict[str, Any]:
    """One detector's rates over the findings that are there."""
    found = {name: finding_at(path) for name in models(zoo) if (path := finding_of(out, detector, name)).exists()}
    own = [finding for name, finding in found.items() if _calibrates(name)]
    calibration = Calibration.of(own)
    held_out = {name: f for name, f in found.items() if not _calibrates(name)}
    judged = {name: f if detector == AUDIT else calibration.judge(f, ALPHA) for name, f in held_out.items()}
    groups: dict[str, list[Finding]] = {}
    for name, finding in judged.items():
        groups.setdefault(kind_of(name, zoo), []).append(finding)
    return {
        "calibration_models": len(own),
        "flagged": {kind: rate(sum(f.verdict == "backdoored" for f in of), len(of)) for kind, of in groups.items()},
        "seconds": median(f.seconds for f in held_out.values()),
        "evaluations": median(f.evaluations for f in held_out.values()),
        "calibration": {"settings": calibration.settings, "statistics": list(calibration.statistics)},
        "statistics": {name: finding.statistic for name, finding in judged.items()},
    }


def _calibrates(name: str) -> bool:
    kind, number = name.split("/")
    return kind == "clean" and int(number) < CALIBRATE


def table(document: dict[str, Any]) -> str:
    """The rates as Markdown, a line a detector."""
    kinds = list(dict.fromkeys(kind for row in document["detectors"].values() for kind in row["flagged"]))
    lines = [f"| detector | {' | '.join(kinds)} | seconds | evaluations |", f"| --- |{' ---: |' * (len(kinds) + 2)}"]
    for detector, row in document["detectors"].items():
        cells = [_cell(row["flagged"][kind]) if kind in row["flagged"] else "—" for kind in kinds]
        lines.append(f"| {detector} | {' | '.join(cells)} | {row['seconds']:.1f} | {row['evaluations']:,.0f} |")
    return "\n".join(lines)


def _cell(flagged: dict[str, Any]) -> str:
    low, high = flagged["interval"]
    return f"{flagged['k']} of {flagged['n']} [{low:.0%}, {high:.0%}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 2 after a user's mistake, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.detection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True, metavar="DIR", help="folder of the models")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the findings")
    parser.add_argument("--only", nargs="+", default=DETECTORS, metavar="NAME", help=f"of {', '.join(DETECTORS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rates of the findings that are there")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    keep_freed()

    def work() -> None:
        for name in options.only:
            if name not in DETECTORS:
                raise unknown("detector", name, DETECTORS)
        examine(options.zoo, options.out, options.only)
        if options.json:
            document = {
                "command": shlex.join(["python", "-m", "benchmarks.detection", *words]),
                "commit": commit(),
                "alpha": ALPHA,
                "detectors": {name: rates(options.zoo, options.out, name) for name in options.only},
            }
            write_json(options.json, document)
            print(table(document))

    return exit_code(work, "it goes on from the findings it saved")


if __name__ == "__main__":
    sys.exit(main())
