"""What ``bdengine audit`` and ``bdengine calibrate`` do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from torch import Tensor
from tqdm import tqdm

from . import checkpoint, markup, pictures
from .arms import Arm
from .audit import AUDIT_SEEDS, examine, lacking, settings_of, stages_of
from .audit import audit as audited
from .commands import Model
from .config import claim, command, to_json
from .defend import calibrations, chosen, fitting, keep_apart, recipe, remarks, subject_of, unfitting, write_trigger
from .defenses import DEFENSES, Calibration, Finding
from .defenses.result import EXIT, check_alpha
from .errors import UserError, unknown
from .files import write_atomic, write_json
from .options import AuditConfig, CalibrateConfig

AUDIT: Final = "audit"
STEPS: Final = 20
"""Of the sampler where neither the user nor the checkpoint says."""
SHOWN: Final = 16
SENTENCES: Final = {
    "backdoored": "This model has a backdoor.",
    "no evidence": "No evidence of a backdoor.",
    "undecided": "Undecided.",
}


def audit(config: AuditConfig) -> int:
    """Run ``bdengine audit``; returns `EXIT` of the verdict."""
    given = None if config.calibration is None else Calibration.load(config.calibration)
    model, subject = subject_of(config.checkpoint, config, STEPS)
    keep_apart(config.out, AUDIT, subject.weights_sha256)
    known, examined = [] if given else calibrations(), (AUDIT, settings_of(subject), subject.weights_sha256)
    calibration = given or fitting(known, *examined)
    reason = unfitting(known, *examined) if calibration is None else lacking(calibration, config.alpha)
    if reason is not None:
        print(f"it will end undecided, since {reason}", file=sys.stderr)
    told = remarks(calibration, reason, model)
    for name in ("report.html", checkpoint.TRIGGER):
        (config.out / name).unlink(missing_ok=True)  # of an earlier audit, which the first stage's audit.json is not
    stages, names, finding = audited(subject, calibration, config.alpha), stages_of(subject), None
    run = {name: value for name, value in to_json(config).items() if name != "out"}
    with tqdm(total=len(names), unit="stage", desc=names[0]) as bar:
        for finding in stages:
            write_json(config.out / "audit.json", finding.to_json() | {"run": run})
            bar.update()
            done = len(finding.details["stages"])
            bar.set_description(names[done] if done < len(names) else "done")
    if finding is None:
        raise UserError("the audit has no stages for this model: expected at least one")
    finding = replace(finding, details=finding.details | told)
    write_json(config.out / "audit.json", finding.to_json() | {"run": run})
    same_seeds = range(AUDIT_SEEDS, AUDIT_SEEDS + SHOWN)
    own = subject.sampled({"": Arm(subject.table)}, same_seeds, SHOWN)[""]
    write_atomic(config.out / "report.html", page(config, finding, model, own))
    write_trigger(config.out, finding)
    print(f"{finding.verdict}: {sentence(finding)}")
    if caveat := finding.details.get("caveat"):
        print(caveat)
    print(f"{finding.evaluations:,} evaluations of the network in {finding.seconds:.1f} s")
    print(f"open {config.out / 'report.html'} (and audit.json beside it)")
    return EXIT[finding.verdict]


def sentence(finding: Finding) -> str:
    """What was seen, and how sure it is."""
    best = next(stage for stage in finding.details["stages"] if stage["defense"] == finding.details["stage"])
    seen = (
        f"{best['copies']} of {best['images']} images from the shift that opens most are one image ({best['defense']})"
    )
    if finding.verdict == "undecided":
        return f"{seen}; undecided since {finding.details['reason']}"
    limit = f"clean models of the family: at most {finding.details['p0']:.1%}"
    return f"{seen}; {limit}; p = {finding.p_value:.2g}"


def page(config: AuditConfig, finding: Finding, model: Model, own: Tensor) -> str:
    """report.html; ``own`` are the model's images from plain noise, float [N, C, H, W] in [-1, 1]."""
    made = None if finding.images is None else finding.images[1 : 1 + SHOWN]
    marks = "" if finding.trigger is None else markup.mark(model.shown(finding.trigger).clamp(-1, 1), "shift")
    if finding.images is not None:
        marks += markup.mark(finding.images[0], "what it makes")
    rows = {"from plain noise": own} | ({} if made is None else {"from the shift": made})
    return markup.page(
        "audit.html",
        f"Audit of {config.checkpoint}",
        alarm="alarm" if finding.verdict == "backdoored" else "calm",
        verdict=markup.text(SENTENCES[finding.verdict]),
        sentence=markup.text(sentence(finding)),
        marks=marks,
        facts=markup.facts(_facts(finding)),
        samples="".join(_row(name, images) for name, images in rows.items()),
        stages=markup.scroll("Stages", _stages(finding)),
        command=markup.text(command(AUDIT, config)),
    )


def _facts(finding: Finding) -> list[tuple[str, str]]:
    details = finding.details
    facts = [("family", details["settings"]["family"]), ("sampler", details["settings"]["sampler"])]
    if "alpha" in details:
        facts += [
            (
                "false alarms",
                f"in at most {details['alpha']:.2g} of clean models trained like the calibration's, on average",
            ),
            ("clean models make copies", f"in at most {details['p0']:.1%}"),
        ]
    if "caveat" in details:
        facts.append(("these rates", details["caveat"]))
    return [*facts, ("network evaluations", f"{finding.evaluations:,}"), ("seconds", f"{finding.seconds:.1f}")]


def _row(name: str, images: Tensor) -> str:
    strip = markup.image(pictures.grid(images, columns=len(images), scale=3), f"{len(images)} samples {name}")
    return f'<figure style="--n:{len(images)}"><figcaption><b>{name}</b></figcaption>{strip}</figure>'


def _stages(finding: Finding) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("stage", "arms", "copies", "evaluations", "seconds"))
    rows = "".join(
        f'<tr><th scope="row">{markup.text(s["defense"])}</th><td>{s["arms"]}</td><td>{s["copies"]} of {s["images"]}</td>'
        f"<td>{s['evaluations']:,}</td><td>{s['seconds']:.1f}</td></tr>"
        for s in finding.details["stages"]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def examiner(config: CalibrateConfig) -> Callable[[str], Finding]:
    """What examines one checkpoint for a calibration.

    Raises:
        UserError: An unknown defense or variant, a defense that detects nothing, or settings for the audit.
    """
    if config.defense == AUDIT:
        for name, value, absent in (("variant", config.variant, None), ("seed", config.seed, 0)):
            if value != absent:
                raise UserError(f"{name} is {value!r} and the audit has none: expected a defense with it, or no {name}")
        return lambda name: examine(subject_of(name, config, STEPS)[1])
    detectors = [AUDIT, *(name for name, defense in DEFENSES.items() if defense.detects)]
    if config.defense not in detectors:
        raise unknown("defense", config.defense, detectors)
    defense, settings = chosen(config)
    return lambda name: defense.examine(subject_of(name, config)[1], settings)


def calibrate(config: CalibrateConfig) -> int:
    """Run ``bdengine calibrate``."""
    if not config.checkpoints:
        raise UserError("no checkpoints were given: expected clean models of one family")
    check_alpha(config.alpha)
    look, (names, recipes) = examiner(config), _by_weights(config.checkpoints)
    claim(config.out / "run.json", to_json(config), ["checkpoints", "out", "alpha"])
    found = []
    for weights, name in tqdm(names.items(), unit="model"):
        path = config.out / f"{weights}.json"
        if not path.exists():
            write_json(path, look(name).to_json())
        found.append(Finding.load(path))
    alike = all(one == recipes[0] for one in recipes)
    calibration = Calibration.of(found, recipes[0] if alike else None)
    calibration.save(config.out / "calibration.json")
    greatest = max(calibration.statistics.values())
    print(f"{len(found)} models, statistic at most {greatest:.6g}; wrote {config.out / 'calibration.json'}")
    reason = lacking(calibration, config.alpha) if config.defense == AUDIT else calibration.lacking(config.alpha)
    if reason is not None:
        print(f"it decides nothing yet: {reason}")
    if not alike:
        print("these models were not trained alike: rates are of models that are trained as varied as they are")
    return 0


def _by_weights(checkpoints: Sequence[str]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The checkpoints by the digest of their weights, as a path says nothing of what lies there; and how each was trained."""
    names: dict[str, str] = {}
    recipes = []
    for name in checkpoints:
        model = Model.load(name)
        if model.attack.name != "none":
            raise UserError(
                f"{name} says that it was trained with the attack {model.attack.name}: expected clean models"
            )
        weights = checkpoint.digest(model.network.state_dict())
        recipes.append(recipe(model.train))
        if weights in names:
            raise UserError(f"{names[weights]} and {name} are one model: expected each once")
        names[weights] = name
    return names, recipes
