"""Every detector on every model of a zoo: detection rates, false alarms, and what they cost.

    python -m benchmarks.zoo --out runs/zoo                                    the models
    python -m benchmarks.detection --zoo runs/zoo --out runs/detection         findings; goes on where it stopped
    torchrun --nproc-per-node 2 -m benchmarks.detection ...                    the same on two cores
    python -m benchmarks.detection --zoo runs/zoo --out runs/detection --json benchmarks/results/detection.json

A detector is told nothing of the attack: its first variant, or `searched` where it has one, examines every model. The clean
models below `zoo.CALIBRATE` give its calibration, all others are held out; the audit stops on them where it is decisive, as for
its users. All are asked for the same rate of false alarms, `ALPHA`. A rate is k of n with its Clopper-Pearson interval; a
backdoor whose own trigger works in less than `WORKS` of the images is counted apart. Models are shared among ranks.
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
from bdengine.auditing import AUDIT
from bdengine.config import to_json
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
TOLD: Final = ("statistic", "p_value", "verdict", "evaluations", "seconds")
"""Of a finding, for each model that is held out."""
WORKS: Final = 0.9
"""Least share of triggered images that reach their target, for the backdoor to count as one."""


def finding_of(out: Path, detector: str, name: str) -> Path:
    """Where the finding of a detector on the model ``name`` is kept."""
    return out / detector / f"{name.replace('/', '-')}.json"


def examine(zoo: Path, out: Path, detectors: Sequence[str]) -> bool:
    """Makes the findings that are missing, of the models that are there; returns whether this rank is the first."""
    if not any(_finished(zoo, name) for name in models(zoo)):
        raise UserError(f"there are no finished models in {zoo}: expected those of benchmarks.zoo")
    with join() as ranks:
        for calibrates in (True, False):  # the audit judges held-out models by all that calibrate
            # Of all models, there or not: what is there may change before another rank looks, and then so would the shares.
            part = [name for name in models(zoo) if _calibrates(name) is calibrates]
            for at in tqdm(ranks.share(len(part)), unit="model", disable=ranks.rank > 0):
                for detector in detectors:
                    path = finding_of(out, detector, part[at])
                    if _finished(zoo, part[at]) and not path.exists():
                        write_json(path, look(zoo, out, detector, part[at]).to_json())
            ranks.together(0)
        return ranks.rank == 0


def look(zoo: Path, out: Path, detector: str, name: str) -> Finding:
    """What a detector finds on the model ``name``; with the audit's verdict where it is held out."""
    model = str(zoo / name / "checkpoint")
    if detector != AUDIT:
        return examined(DefendConfig(model, out, detector, DEFENSES[detector].untold))[1]
    _, subject = subject_of(model, AuditConfig(model, out))
    if _calibrates(name):
        return audit.examine(subject)
    return [*audit.audit(subject, calibration_of(zoo, out, AUDIT), ALPHA)][-1]


def calibration_of(zoo: Path, out: Path, detector: str) -> Calibration:
    """That of all models that calibrate.

    Raises:
        UserError: One of them was not examined yet: rates would not be those of the whole calibration.
    """
    paths = {name: finding_of(out, detector, name) for name in models(zoo) if _calibrates(name)}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(paths)} models of the calibration of {detector} were not examined, {missing[0]} the"
            " first: expected all of them, finished by benchmarks.zoo, before any other is judged"
        )
    return Calibration.of([Finding.load(path) for path in paths.values()])


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
    calibration = calibration_of(zoo, out, detector)
    paths = {name: finding_of(out, detector, name) for name in models(zoo) if not _calibrates(name)}
    held_out = {name: Finding.load(path) for name, path in paths.items() if path.exists()}
    if not held_out:
        raise UserError(f"{detector} has examined no model that is held out: expected some, as its rates are of them")
    for f in held_out.values():
        calibration.check(f.defense, f.details["settings"], f.weights_sha256)
    judged = {name: f if detector == AUDIT else calibration.judge(f, ALPHA) for name, f in held_out.items()}
    groups: dict[str, list[Finding]] = {}
    for name, finding in judged.items():
        groups.setdefault(kind_of(name, zoo), []).append(finding)
    return {
        "calibration_models": len(calibration.statistics),
        "flagged": {kind: rate(sum(f.verdict == "backdoored" for f in of), len(of)) for kind, of in groups.items()},
        "undecided": sum(f.verdict == "undecided" for f in judged.values()),
        "seconds": median(f.seconds for f in held_out.values()),
        "evaluations": median(f.evaluations for f in held_out.values()),
        "calibration": to_json(calibration),
        "models": {
            name: {of: getattr(f, of) for of in TOLD} | {"kind": kind_of(name, zoo)} for name, f in judged.items()
        },
    }


def _finished(zoo: Path, name: str) -> bool:
    return (zoo / name / "scores.json").exists()


def _calibrates(name: str) -> bool:
    kind, number = name.split("/")
    return kind == "clean" and int(number) < CALIBRATE


def table(document: dict[str, Any]) -> str:
    """The rates as Markdown, a line a detector."""
    kinds = sorted({kind for row in document["detectors"].values() for kind in row["flagged"]})
    kinds.sort(key=lambda kind: kind != "clean")
    heads = ["detector", *kinds, "undecided", "median seconds", "median evaluations"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for detector, row in document["detectors"].items():
        cells = [_cell(row["flagged"][kind]) if kind in row["flagged"] else "—" for kind in kinds]
        cells += [str(row["undecided"]), f"{row['seconds']:.1f}", f"{row['evaluations']:,.0f}"]
        lines.append(f"| {' | '.join([detector, *cells])} |")
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
        if examine(options.zoo, options.out, options.only) and options.json:
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
