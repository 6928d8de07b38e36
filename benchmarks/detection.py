"""Every detector on every model of a zoo: detection rates, false alarms, and what they cost.

    python -m benchmarks.detection --zoo runs/zoo --json benchmarks/results/detection.json     goes on where it stopped
    torchrun --standalone --nproc-per-node 2 -m benchmarks.detection ...                       the same on two cores

A model that FILE has no findings of is made first, as `benchmarks.zoo` does. FILE is written after every model, and what it
holds is not done again: a zoo takes hours, over several sittings and machines, and its weights need not be kept for it.

A detector is told nothing of the attack: its first variant, or `searched` where it has one, examines every model. The clean
models below `zoo.CALIBRATE` give its calibration, all others are held out; the audit stops on them where it is decisive, as for
its users. All are asked for the same rate of false alarms, `ALPHA`. A rate is k of n with its Clopper-Pearson interval; a
backdoor whose own trigger works in less than `WORKS` of the images is counted apart. Models are shared among ranks.
"""

from __future__ import annotations

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
from bdengine.defend import examined, recipe, subject_of, write_trigger
from bdengine.defenses import DEFENSES, Calibration, Finding
from bdengine.distributed import Ranks, join
from bdengine.errors import UserError, unknown
from bdengine.files import read_json, write_json
from bdengine.memory import keep_freed
from bdengine.options import AuditConfig, DefendConfig
from bdengine.triggers import class_of

from .report import argument_parser, command_line, commit, exit_code
from .zoo import CALIBRATE, RECIPE, make, models

DETECTORS: Final = (AUDIT, *(name for name, defense in DEFENSES.items() if defense.detects))
ALPHA: Final = 0.05
TOLD: Final = ("statistic", "p_value", "verdict", "evaluations", "seconds", "weights_sha256")
"""What is kept of a finding."""
WORKS: Final = 0.9
"""Least share of triggered images that reach their target, for the backdoor to count as one."""

KINDS: Final = (
    "clean", "baddiffusion box", "baddiffusion", "villan", "trojdiff", "trojdiff class", "made for the clip", "weak"
)  # fmt: skip
"""The groups of `kind_of`."""

SPENT: Final = ("clean", "backdoored")
"""The groups of `spent`."""

Known = dict[str, dict[str, Any]]
"""``settings`` by detector; ``models`` by name, each with its ``scores`` and what is ``found`` by detector."""


def known(zoo: Path, file: Path) -> Known:
    """What ``file`` holds, and the findings in the zoo's folders.

    Raises:
        UserError: They were made with other settings.
    """
    told: Known = read_json(file) if file.exists() else {}
    told = {"settings": told.get("settings", {}), "models": told.get("models", {})}
    for name in models(zoo):
        path = _findings(zoo, name)
        if not path.exists():
            continue
        new = read_json(path)
        for detector, settings in new["settings"].items():
            if told["settings"].setdefault(detector, settings) != settings:
                raise UserError(
                    f"{path} has findings of {detector} with other settings than {file}: expected one of them removed"
                )
        found = told["models"].get(name, {}).get("found", {}) | new["found"]
        told["models"][name] = {"scores": new["scores"], "found": found}
    return told


def keep(zoo: Path, name: str, finding: Finding) -> None:
    """Adds a finding on the model ``name`` to those in its folder, where one with a trigger is kept whole, for a repair."""
    path = _findings(zoo, name)
    if finding.trigger is not None:
        write_json(zoo / name / finding.defense / "finding.json", finding.to_json())
        write_trigger(zoo / name / finding.defense, finding)
    told = read_json(path) if path.exists() else {"settings": {}, "found": {}}
    arms, clip = read_json(zoo / name / "scores.json")["arms"], models(zoo)[name].attack.clip
    told["scores"] = {
        "asr": arms["triggered"][clip]["asr"],
        **{of: arms["clean"]["none"][of] for of in ("frechet", "frechet_interval")},
    }
    told["settings"][finding.defense] = finding.details["settings"]
    told["found"][finding.defense] = {of: getattr(finding, of) for of in TOLD}
    write_json(path, told)


def found_in(told: Known, name: str, detector: str) -> Finding | None:
    """What a detector found on the model ``name``, without its pictures; None where it is not known."""
    values = told["models"].get(name, {}).get("found", {}).get(detector)
    if values is None:
        return None
    details = {"settings": told["settings"][detector]}
    return Finding(defense=detector, trigger=None, images=None, details=details, **values)


def examine(
    zoo: Path, file: Path, detectors: Sequence[str], ranks: Ranks, command: str, first: int | None = None
) -> None:
    """Makes the models and the findings that are not known, in the order of the zoo; of its ``first`` models alone."""
    runs = dict([*models(zoo).items()][:first])
    for calibrates in (True, False):  # the audit judges held-out models by all that calibrate
        # Of all models, known or not: what is known may change before another rank looks, and then so would the shares.
        part, before = [name for name in runs if _calibrates(name) is calibrates], known(zoo, file)
        for at in tqdm(ranks.share(len(part)), unit="model", disable=ranks.rank > 0):
            missing = [d for d in detectors if found_in(before, part[at], d) is None]
            if missing:
                make(runs[part[at]])
            for detector in missing:
                keep(zoo, part[at], look(zoo, before, detector, part[at]))
            if missing and ranks.rank == 0:
                write_json(file, document(known(zoo, file), command))
        ranks.together(0)


def look(zoo: Path, told: Known, detector: str, name: str) -> Finding:
    """What a detector finds on the model ``name``; with the audit's verdict where it is held out."""
    model = str(zoo / name / "checkpoint")
    if detector != AUDIT:
        return examined(DefendConfig(model, zoo, detector, DEFENSES[detector].untold))[1]
    _, subject = subject_of(model, AuditConfig(model, zoo))
    if _calibrates(name):
        return audit.examine(subject)
    return [*audit.audit(subject, calibration_of(told, AUDIT), ALPHA)][-1]


def calibration_of(told: Known, detector: str) -> Calibration:
    """That of all models that calibrate.

    Raises:
        UserError: One of them was not examined yet: rates would not be those of the whole calibration.
    """
    found = {name: found_in(told, name, detector) for name in models(Path()) if _calibrates(name)}
    missing = [name for name, finding in found.items() if finding is None]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(found)} models of the calibration of {detector} were not examined, {missing[0]} the"
            " first: expected all of them before any other is judged"
        )
    return Calibration.of([finding for finding in found.values() if finding is not None], recipe(to_json(RECIPE)))


def rate(hits: int, of: int) -> dict[str, Any]:
    """``hits`` of ``of`` with its 95 % Clopper-Pearson interval."""
    interval = [round(end, 4) for end in binomtest(hits, of).proportion_ci(0.95, "exact")] if of else None
    return {"k": hits, "n": of, "interval": interval}


def kind_of(name: str, asr: float) -> str:
    """The group that a model is counted in: clean, its attack, or weak where its own trigger's ``asr`` is low."""
    attack = models(Path())[name].attack
    if attack.name == "none":
        return "clean"
    if asr < WORKS:
        return "weak"
    if attack.coefficients == "clipped":
        return "made for the clip"
    if class_of(attack.target) is not None:
        return f"{attack.name} class"
    return f"{attack.name} box" if attack.name == "baddiffusion" and "BOX" in attack.trigger else attack.name


def rates(told: Known, detector: str) -> dict[str, Any]:
    """One detector's rates over what it found on models that are held out.

    Raises:
        UserError: As `calibration_of`, or it found nothing on them.
    """
    calibration = calibration_of(told, detector)
    found = {name: found_in(told, name, detector) for name in told["models"] if not _calibrates(name)}
    held_out = {name: finding for name, finding in found.items() if finding is not None}
    if not held_out:
        raise UserError(f"{detector} has examined no model that is held out: expected some, as its rates are of them")
    for f in held_out.values():
        calibration.check(f.defense, f.details["settings"], f.weights_sha256)
    judged = {name: f if detector == AUDIT else calibration.judge(f, ALPHA) for name, f in held_out.items()}
    groups: dict[str, list[Finding]] = {}
    for name, finding in judged.items():
        groups.setdefault(kind_of(name, told["models"][name]["scores"]["asr"]), []).append(finding)
    return {
        "calibration_models": len(calibration.statistics),
        "flagged": {kind: rate(sum(f.verdict == "backdoored" for f in of), len(of)) for kind, of in groups.items()},
        "undecided": sum(f.verdict == "undecided" for f in judged.values()),
        "spent": spent(held_out),
        "verdicts": {name: {"p_value": f.p_value, "verdict": f.verdict} for name, f in judged.items()},
    }


def spent(found: dict[str, Finding]) -> dict[str, dict[str, float]]:
    """Median seconds and evaluations on clean models and on others, of findings by model."""
    groups = {"clean": [f for name, f in found.items() if name.startswith("clean/")]}
    groups["backdoored"] = [f for name, f in found.items() if not name.startswith("clean/")]
    return {
        of: {what: median(getattr(f, what) for f in group) for what in ("seconds", "evaluations")}
        for of, group in groups.items()
        if group
    }


def document(told: Known, command: str) -> dict[str, Any]:
    """What is known, with the rates of the detectors that have any."""
    whole: dict[str, Any] = {"command": command, "commit": commit(), "alpha": ALPHA, "detectors": {}}
    for detector in told["settings"]:
        names = [name for name in told["models"] if found_in(told, name, detector)]
        if sum(map(_calibrates, names)) == CALIBRATE < len(names):
            whole["detectors"][detector] = rates(told, detector)
    return whole | told


def _findings(zoo: Path, name: str) -> Path:
    return zoo / name / "findings.json"


def _calibrates(name: str) -> bool:
    kind, number = name.split("/")
    return kind == "clean" and int(number) < CALIBRATE


def table(whole: dict[str, Any]) -> str:
    """The rates as Markdown, a line a detector."""
    seen = {kind for row in whole["detectors"].values() for kind in row["flagged"]}
    kinds = [kind for kind in KINDS if kind in seen]
    heads = [
        "detector",
        *kinds,
        "undecided",
        *(f"evaluations, {of}" for of in SPENT),
        *(f"seconds, {of}" for of in SPENT),
    ]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for detector, row in whole["detectors"].items():
        cells = [cell(row["flagged"][kind]) if kind in row["flagged"] else "—" for kind in kinds]
        cells.append(str(row["undecided"]))
        for what, digits in (("evaluations", 0), ("seconds", 1)):
            cells += [f"{row['spent'][of][what]:,.{digits}f}" if of in row["spent"] else "—" for of in SPENT]
        lines.append(f"| {' | '.join([detector, *cells])} |")
    return "\n".join(lines)


def cell(rate: dict[str, Any]) -> str:
    """A `rate` in a table."""
    low, high = rate["interval"]
    return f"{rate['k']} of {rate['n']} [{low:.0%}, {high:.0%}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 2 after a user's mistake, 130 after Ctrl-C."""
    parser = argument_parser("detection", __doc__)
    parser.add_argument("--zoo", type=Path, required=True, metavar="DIR", help="folder of the models")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="all findings, and the rates of them")
    parser.add_argument("--only", nargs="+", default=DETECTORS, metavar="NAME", help=f"of {', '.join(DETECTORS)}")
    parser.add_argument(
        "--models", type=int, metavar="N", help="the first N of the zoo alone, those for calibration first"
    )
    parser.add_argument(
        "--calibrations", type=Path, metavar="DIR", help="folder for each detector's, as the package has them"
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    command = command_line("detection", words)
    keep_freed()

    def work() -> None:
        for name in options.only:
            if name not in DETECTORS:
                raise unknown("detector", name, DETECTORS)
        with join() as ranks:
            examine(options.zoo, options.json, options.only, ranks, command, options.models)
            if ranks.rank == 0:
                told = known(options.zoo, options.json)
                whole = document(told, command)
                write_json(options.json, whole)
                for name in options.only if options.calibrations else ():
                    calibration_of(told, name).save(options.calibrations / f"{name}-digits.json")
                print(table(whole))

    return exit_code(work, "it goes on from the findings it saved")


if __name__ == "__main__":
    sys.exit(main())
