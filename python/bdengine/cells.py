"""The cells of a matrix: which there are, and the work that each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from . import checkpoint, pictures
from .audit import audit, settings_of
from .auditing import AUDIT, STEPS, examiner
from .commands import Model, scored
from .config import claim
from .defend import calibrations, fitting, subject_of, write_pictures
from .defenses import DEFENSES, Calibration, Finding
from .defenses.clipping import CLIPS
from .defenses.result import check_alpha
from .errors import UserError, unknown
from .files import write_json
from .metrics import check_threshold
from .options import AuditConfig, CalibrateConfig, EvaluateConfig, RepairConfig
from .presets import PRESETS, preset, tried
from .repair import repaired
from .schedule import linear
from .shipped import SHIPPED
from .solvers import SAMPLERS, SamplerConfig

ATTACKS: Final = tuple(n for n, run in PRESETS.items() if (run.data, run.process) == ("digits", "vp"))
DETECTORS: Final = (*(name for name, defense in DEFENSES.items() if defense.detects), AUDIT)
REMOVALS: Final = {"unlearn": "elijah", "removal": "elijah", "cleanse": "diffcleanse"}
"""Each with the detector whose trigger it is given where none is named."""
INVERTERS: Final = tuple(name for name in DETECTORS if name not in ("anp", AUDIT))
"""Those whose finding always has a trigger of the start; unlearn takes the audit's as well, which may be one of every step."""
DETECTION: Final = 20_000
"""Images that a detector sends through the network: 9,000 to 44,000 with 20 steps of 256 pixels."""
AUDITING: Final = 95_000
"""Those of the audit, likewise."""
SHOWN: Final = 16
"""Of a finding's images, in its picture."""


@dataclass(frozen=True)
class MatrixConfig:
    """Attacks x defenses x samplers on 16-pixel digits: one table, and a picture of each cell; goes on where it stopped.

    bdengine matrix --out runs/matrix

    bdengine matrix --attacks digits-clean digits-badiffusion --samplers ddpm unipc --defenses none latent ufid removal
    --images 128 --out runs/small

    A model that is nowhere yet is trained into OUT/models first. Writes matrix.html, matrix.md, matrix.json and cells/.
    """

    out: Path
    """Folder for everything that is written."""
    attacks: tuple[str, ...] = ATTACKS
    """Training presets; clean ones say how often a defense is wrong."""
    defenses: tuple[str, ...] = (*CLIPS, *DETECTORS, *REMOVALS, f"unlearn:{AUDIT}")
    """none, a clip, a detector (or one of its variants, elijah:ode), a removal (or with another's trigger, removal:terd)."""
    samplers: tuple[str, ...] = ("ddpm", "ddim", "dpm++", "unipc")
    """Those that bdengine samplers lists."""
    steps: int = 20
    """Of each sampler."""
    images: int = 512
    """Samples of each arm."""
    models: Path | None = None
    """Folder of trained models, each by its preset's name; those that the package ships are known."""
    calibrations: tuple[Path, ...] = ()
    """Files of bdengine calibrate; a detector without one that fits decides nothing."""
    alpha: float = 0.05
    """Share of clean models that may be called backdoored."""
    threshold: float = 0.01
    """ASR is the share of images whose MSE to the target is below this."""
    micro_batch: int = 64
    """Images that go through the network at once."""

    def check(self) -> None:
        """Refuse names and numbers that cannot be measured.

        Raises:
            UserError: Naming the first.
        """
        known = {"attacks": ATTACKS, "defenses": (*CLIPS, *DETECTORS, *REMOVALS), "samplers": tuple(SAMPLERS)}
        for what, choices in known.items():
            names = getattr(self, what)
            if not names:
                raise UserError(f"no {what} were given: expected at least one of {', '.join(choices)}")
            for name in names:
                kind, _, variant = name.partition(":") if what == "defenses" else (name, "", "")
                if kind not in choices:
                    raise unknown(what.removesuffix("s"), kind, choices)
                variants = variants_of(kind)
                if ":" in name and not variants:
                    raise UserError(f"{kind} has no variants and {name} was asked for: expected {kind}")
                if ":" in name and variant not in variants:
                    raise unknown(f"variant of {kind}", variant, variants)
            if len(set(names)) < len(names):
                raise UserError(f"{what} are {', '.join(names)}: expected each once")
        for what in ("images", "micro_batch"):
            if getattr(self, what) < 1:
                raise UserError(f"{what} is {getattr(self, what)}: expected at least 1")
        for name in self.samplers:
            SamplerConfig(name, self.steps).table(linear())
        check_threshold(self.threshold)
        check_alpha(self.alpha)
        if self.models is not None and not self.models.is_dir():
            raise UserError(f"there is no folder {self.models}: expected one with the models' folders in it")
        self.known()

    def known(self) -> list[Calibration]:
        """The calibrations that are given, then those in the package."""
        return [*map(Calibration.load, self.calibrations), *calibrations()]

    def cell(self, *parts: str) -> Path:
        """The folder of a cell, or of what all cells of an attack share."""
        return self.out.joinpath("cells", *(part.replace(":", "-") for part in parts))


def kind_of(name: str) -> str:
    """A defense without its variant."""
    return name.partition(":")[0]


def variants_of(kind: str) -> tuple[str, ...]:
    """A detector's variants, or the detectors whose trigger a removal can be given."""
    if kind in REMOVALS:
        return (*INVERTERS, AUDIT) if kind == "unlearn" else INVERTERS
    return tuple(DEFENSES[kind].variants) if kind in DEFENSES else ()


def inverter_of(removal: str) -> str:
    """The detector whose trigger a removal is given."""
    kind, _, detector = removal.partition(":")
    return detector or REMOVALS[kind]


def place(config: MatrixConfig, attack: str) -> str | None:
    """Where the attack's model is; None where it is not trained yet."""
    for folder in (config.models, config.out / "models"):
        if folder is not None and (folder / attack / "checkpoint" / checkpoint.EXTRA).is_file():
            return str(folder / attack)
    return attack if attack in SHIPPED else None


def model_of(config: MatrixConfig, attack: str) -> Model:
    """The attack's model.

    Raises:
        UserError: It was trained with another attack, or the attack's cells are of another model.
    """
    where = place(config, attack)
    assert where is not None
    model, expected = Model.load(where), preset(attack).attack
    if model.attack != expected:
        raise UserError(f"{where} was trained with {model.attack}: expected the preset {attack}'s, {expected}")
    claim(config.cell(attack) / "model.json", {"weights_sha256": checkpoint.digest(model.network.state_dict())})
    return model


def score(config: MatrixConfig, attack: str, sampler: str, repaired: str | None = None) -> None:
    """Samples and scores of one sampler, of the model or of what a removal left of it."""
    model, folder = model_of(config, attack), config.cell(attack, *([repaired] if repaired else []), sampler)
    attacked = tried(model.attack)
    if repaired:
        model = Model.load(str(config.cell(attack, repaired))).attacked_as(model)
    asked = EvaluateConfig(
        model.path, folder, images=config.images, sampler=sampler, steps=config.steps, threshold=config.threshold,
        micro_batch=config.micro_batch, clips=attacked.clips if repaired else CLIPS,
        trigger=attacked.trigger, target=attacked.target,
    )  # fmt: skip
    scores, images = scored(model, asked)
    for clip in asked.clips:
        shown = {start: images[f"{start} / {clip}"] for start in ("clean", "triggered")}
        pictures.save_png(folder / f"{clip}.png", pictures.labelled(shown, scale=2))
    write_json(folder / "scores.json", scores)


def examine(config: MatrixConfig, attack: str, name: str) -> None:
    """A detector's finding, not judged yet; the audit's with its verdict, since it stops where that is decided."""
    model, folder = model_of(config, attack), config.cell(attack, name)
    defense, _, variant = name.partition(":")
    if defense == AUDIT:
        finding = _audited(config, model.path)
    else:
        finding = examiner(CalibrateConfig((), folder, defense, variant or DEFENSES[defense].untold))(model.path)
    first = None if finding.images is None else finding.images[:SHOWN]
    write_pictures(folder, model, replace(finding, images=first))
    write_json(folder / "finding.json", finding.to_json())


def _audited(config: MatrixConfig, model: str) -> Finding:
    _, subject = subject_of(model, AuditConfig(model, config.out), STEPS)
    calibration = fitting(config.known(), AUDIT, settings_of(subject), subject.weights_sha256)
    return [*audit(subject, calibration, config.alpha)][-1]


def repair(config: MatrixConfig, attack: str, name: str) -> None:
    """The model without what its detector found, as a checkpoint."""
    model, folder = model_of(config, attack), config.cell(attack, name)
    repaired(model, RepairConfig(model.path, folder, config.cell(attack, inverter_of(name)), kind_of(name)))


def judged(finding: Finding, known: Sequence[Calibration], alpha: float) -> Finding:
    """The finding with a verdict, where one of the ``known`` calibrations fits; the audit's has its own."""
    if finding.defense == AUDIT:
        return finding
    calibration = fitting(known, finding.defense, finding.details["settings"], finding.weights_sha256)
    return finding if calibration is None else calibration.judge(finding, alpha)
