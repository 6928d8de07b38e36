"""What ``bdengine defend`` does: one defense on one checkpoint, its finding and its pictures on disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint, pictures
from .commands import Model
from .config import flat, from_json, to_json
from .defenses import DEFENSES, Calibration, Defense, Finding, Subject
from .defenses.result import EXIT, check_alpha
from .errors import UserError, unknown
from .extractors import DigitFeatures
from .files import write_json
from .options import CalibrateConfig, DefendConfig, ExamineConfig
from .own import in_unit_range, is_preserving
from .schedule import Schedule
from .seeds import check_seeds
from .shipped import ASSETS
from .train import FREE, TrainConfig

FEATURES = ("digits", "pixels")


_FREE = (*FREE, "seed", "attack", "micro_batch")
"""Of a recipe: what may differ between models that are trained alike."""


def recipe(train: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was trained, of its configuration as JSON types, by dotted names; empty where that is.

    Raises:
        UserError: It is none of `TrainConfig`.
    """
    if not train:
        return {}
    whole = to_json(from_json(TrainConfig, {"out": ""} | dict(train)))
    return flat({name: value for name, value in whole.items() if name not in _FREE})


def subject_of(name: str, config: ExamineConfig, steps: int | None = None) -> tuple[Model, Subject]:
    """The checkpoint of that name, and what a defense is told of it.

    Args:
        steps: Of the sampler, where neither the user nor the checkpoint says.

    Raises:
        UserError: As `Model.load` and `Model.table`, or unknown features.
    """
    model = Model.load(name)
    if config.steps is None and "sampler" not in model.train:
        config = replace(config, steps=steps)
    if "sampler" not in model.train and model.scheduler.get("variance_type") == "fixed_large":
        # Few steps of the large variance leave noise in all images, and no two are alike: of digits-badiffusion's from its
        # trigger, in 20 steps, 0 of 64 were copies, and 58 with the small one.
        model = replace(model, scheduler=model.scheduler | {"variance_type": "fixed_small"})
    table, _ = model.table(config)
    features = config.features or ("digits" if model.train.get("data") == "digits" else "pixels")
    if features not in FEATURES:
        raise unknown("features", features, FEATURES)
    preserving = is_preserving(model.scheduler)
    if not preserving and not in_unit_range(model.scheduler):
        kind = model.scheduler.get("_class_name", "no known class")
        raise UserError(f"the checkpoint's scheduler is {kind}: expected one with betas, or ScoreSdeVeScheduler")
    process = Schedule.from_config(model.scheduler) if preserving else None
    return model, Subject(model.network, process, table, DigitFeatures() if features == "digits" else None)


def chosen(config: DefendConfig | CalibrateConfig) -> tuple[Defense, Any]:
    """The defense, and its settings.

    Raises:
        UserError: No such defense or variant.
    """
    if config.defense not in DEFENSES:
        raise unknown("defense", config.defense, DEFENSES)
    defense = DEFENSES[config.defense]
    variant = config.variant or next(iter(defense.variants))
    if variant not in defense.variants:
        raise unknown(f"variant of {config.defense}", variant, defense.variants)
    settings = defense.variants[variant]
    check_seeds([config.seed])
    return defense, replace(settings, seed=config.seed) if hasattr(settings, "seed") else settings


def calibrations() -> list[Calibration]:
    """Those in the package."""
    return [Calibration.load(path) for path in sorted((ASSETS / "calibration").glob("*.json"))]


def fitting(
    known: Sequence[Calibration], defense: str, settings: Mapping[str, Any], weights_sha256: str
) -> Calibration | None:
    """The first of the ``known`` whose clean models were examined with these settings, and that has not this model."""
    told = (defense, to_json(settings))
    return next((c for c in known if (c.defense, c.settings) == told and weights_sha256 not in c.statistics), None)


def unfitting(known: Sequence[Calibration], defense: str, settings: Mapping[str, Any], weights_sha256: str) -> str:
    """Why none of the ``known`` is `fitting`."""
    of = [calibration for calibration in known if calibration.defense == defense]
    if any(weights_sha256 in calibration.statistics for calibration in of):
        return "it is one of the clean models that the calibration of its family is made of: expected another model"
    family = [calibration.settings for calibration in of if calibration.settings["family"] == settings["family"]]
    if not family:
        return f"no clean models of its family are known ({settings['family']}): see bdengine calibrate"
    told = to_json(settings)
    names = [name for name in dict.fromkeys([*told, *family[0]]) if told.get(name) != family[0].get(name)]
    return f"the clean models of its family were examined with other {' and '.join(names)}: see bdengine calibrate"


def examined(config: DefendConfig, warned: bool = False) -> tuple[Model, Finding]:
    """The checkpoint, and the finding with its verdict; that it will have none is said first where ``warned``.

    Raises:
        UserError: As `chosen`, `Calibration.check` and `keep_apart`, or a calibration for what detects nothing.
    """
    defense, settings = chosen(config)
    if config.calibration is not None and not defense.detects:
        raise UserError(f"a calibration was given for {config.defense}, which detects nothing: expected none")
    calibration = None if config.calibration is None else Calibration.load(config.calibration)
    check_alpha(config.alpha)
    model, subject = subject_of(config.checkpoint, config)
    keep_apart(config.out, config.defense, subject.weights_sha256)
    own = defense.settings(subject, settings)
    if calibration is None:
        known = calibrations()
        calibration = fitting(known, config.defense, own, subject.weights_sha256)
    else:
        calibration.check(config.defense, own, subject.weights_sha256)
    reason = None if calibration is None else calibration.lacking(config.alpha)
    if calibration is None and defense.detects:
        told = {name: defense.settings(subject, variant) for name, variant in defense.variants.items()}
        having = [name for name in told if fitting(known, config.defense, told[name], subject.weights_sha256)]
        reason = unfitting(known, config.defense, own, subject.weights_sha256)
        if having:
            reason = (
                f"no calibration of clean models fits: expected one, or the variant {having[0]}, which the package has one"
                " of"
            )
    if reason is not None and warned:
        print(f"it will end undecided, since {reason}", file=sys.stderr)
    remarked = remarks(calibration, reason, model)
    finding = defense.examine(subject, settings)
    if calibration is not None:
        finding = calibration.judge(finding, config.alpha)
    return model, replace(finding, details=finding.details | remarked)


def keep_apart(out: Path, defense: str, weights_sha256: str) -> None:
    """Refuse a folder for a finding that holds another defense's, or one on another model.

    Raises:
        UserError: It does.
    """
    for name in ("finding.json", "audit.json"):
        if not (out / name).exists():
            continue
        told = Finding.load(out / name)
        if told.defense != defense:
            raise UserError(f"{out} holds a finding of {told.defense}: expected one of {defense}, or another folder")
        if told.weights_sha256 != weights_sha256:
            raise UserError(f"{out} holds a finding on another model: expected the same, or another folder")


def remarks(calibration: Calibration | None, reason: str | None, model: Model) -> dict[str, str]:
    """Of a finding's details, what is known before it is made: why there will be no verdict, or what its rates are of.

    Raises:
        UserError: As `recipe`.
    """
    trained = recipe(model.train)
    if calibration is None:
        return {} if reason is None else {"reason": reason}
    caveat = calibration.caveat(trained)
    return {} if caveat is None else {"caveat": caveat}


def write_trigger(out: Path, finding: Finding) -> None:
    """The finding's trigger, if it has one, as `bdengine.inverted` reads it: with the stage that opens with its kind."""
    if finding.trigger is not None:
        assumed = finding.details.get("settings", {})
        in_steps = assumed.get("gamma") is not None or finding.gamma is not None
        stage = "blended" if in_steps else finding.details.get("stage")
        tensors = {"trigger": finding.trigger} | ({} if finding.gamma is None else {"gamma": finding.gamma})
        header = {} if stage is None else {"stage": stage}
        checkpoint.write_safetensors(out / checkpoint.TRIGGER, tensors, header)


def write_pictures(out: Path, model: Model, finding: Finding) -> list[str]:
    """A subject's images and its trigger, as pictures and as a tensor; returns the names of the files in ``out``."""
    written = []
    if finding.images is not None:
        pictures.save_png(out / "images.png", pictures.grid(finding.images))
        written.append("images.png")
    if finding.trigger is not None:
        pictures.save_png(out / "trigger.png", pictures.grid(model.shown(finding.trigger)[None]))
        write_trigger(out, finding)
        written += ["trigger.png", checkpoint.TRIGGER]
    for name in {"images.png", "trigger.png", checkpoint.TRIGGER}.difference(written):
        (out / name).unlink(missing_ok=True)  # of an earlier finding, which this one is not
    return written


def defend(config: DefendConfig) -> int:
    """Run ``bdengine defend``; returns `EXIT` of the verdict, 0 for a defense that detects nothing."""
    model, finding = examined(config, warned=True)
    written = write_pictures(config.out, model, finding)
    run = {name: value for name, value in to_json(config).items() if name != "out"}
    write_json(config.out / "finding.json", finding.to_json() | {"run": run})
    p = "" if finding.p_value is None else f", p = {finding.p_value:.3g}"
    print(f"{finding.defense}: {finding.verdict}, statistic {finding.statistic:.6g}{p}")
    print(f"{finding.evaluations:,} evaluations of the network in {finding.seconds:.1f} s")
    if reason := finding.details.get("reason"):
        print(f"undecided since {reason}")
    if caveat := finding.details.get("caveat"):
        print(caveat)
    print(f"wrote {', '.join(['finding.json', *written])} to {config.out}")
    return EXIT[finding.verdict] if DEFENSES[config.defense].detects else 0
