"""Attacks x defenses x samplers, each cell measured once: ``bdengine matrix``.

1. each attack is a training preset of the digits; a model that is nowhere yet is trained, and a clean one is a row as well;
2. each sampler draws clean and triggered samples, unclipped, latent-clipped and x0-clipped, from the same seeds;
3. each detector examines the model once, with the sampler that the model is made for;
4. each removal repairs the model with the trigger that its detector inverted, and 2 follows once more, unclipped, and under
   the clip that the attack was made for.

A unit of this work ends with a file; where that is, the unit is not done again. The tables are made of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from . import checkpoint
from .auditing import AUDIT
from .cells import (
    AUDITING,
    DETECTION,
    DETECTORS,
    REMOVALS,
    MatrixConfig,
    examine,
    inverter_of,
    judged,
    kind_of,
    model_of,
    place,
    repair,
    score,
)
from .config import claim, to_json
from .defenses import Calibration, Finding
from .defenses.clipping import CLIPS
from .files import read_json
from .matrix_page import Row, console, write_tables
from .options import device
from .presets import preset
from .train import train


@dataclass(frozen=True)
class Unit:
    """Work that ends with a file: what it is called, the file, roughly how many images it sends through a network."""

    name: str
    file: Path
    cost: int
    work: Callable[[], None]


def matrix(config: MatrixConfig) -> int:
    """Run ``bdengine matrix``.

    Raises:
        UserError: A bad value, or a folder that holds another run or other models.
        KeyboardInterrupt: After Ctrl-C: the same call goes on from what is written.
    """
    config.check()
    free = ["out", "attacks", "defenses", "samplers", "models", "micro_batch"]
    if AUDIT not in detectors_of(config):  # which stops where these say; all others are judged anew
        free += ["calibrations", "alpha"]
    claim(config.out / "run.json", to_json(config), free)
    todo = {unit.file: unit for attack in config.attacks for unit in units(config, attack) if not unit.file.exists()}
    with tqdm(total=sum(unit.cost for unit in todo.values()), unit="eval", unit_scale=True, smoothing=0) as bar:
        for unit in todo.values():
            bar.set_description(unit.name)
            unit.work()
            bar.update(unit.cost)
    known = config.known()
    found = [row for attack in config.attacks for row in rows(config, attack, known)]
    write_tables(config, found)
    print(console(found))
    print(f"open {config.out / 'matrix.html'} (and matrix.md, matrix.json and cells/ beside it)")
    return 0


def units(config: MatrixConfig, attack: str) -> Iterator[Unit]:
    """All work on one attack, in its order."""
    arm = 2 * config.images * config.steps
    yield from training(config, attack)
    if set(config.defenses) & set(CLIPS):
        for sampler in config.samplers:
            file = config.cell(attack, sampler) / "scores.json"
            yield Unit(f"{attack} {sampler}", file, len(CLIPS) * arm, partial(score, config, attack, sampler))
    for name in detectors_of(config):
        file = config.cell(attack, name) / "finding.json"
        cost = AUDITING if name == AUDIT else DETECTION
        yield Unit(f"{attack} {name}", file, cost, partial(examine, config, attack, name))
    for name in (name for name in config.defenses if kind_of(name) in REMOVALS):
        file = config.cell(attack, name) / "repair.json"
        yield Unit(f"{attack} {name}", file, DETECTION, partial(repair, config, attack, name))
        for sampler in config.samplers:
            file = config.cell(attack, name, sampler) / "scores.json"
            yield Unit(f"{attack} {name} {sampler}", file, arm, partial(score, config, attack, sampler, name))


def detectors_of(config: MatrixConfig) -> list[str]:
    """The detectors that are asked for, then those whose trigger a removal needs."""
    asked = [name for name in config.defenses if kind_of(name) in DETECTORS]
    return [*dict.fromkeys([*asked, *(inverter_of(n) for n in config.defenses if kind_of(n) in REMOVALS)])]


def training(config: MatrixConfig, attack: str) -> Iterator[Unit]:
    """What has to be trained for an attack: nothing, its model, or the one that it starts from and then itself."""
    if place(config, attack) is not None:
        return
    run = replace(preset(attack), out=config.out / "models" / attack)
    before = None if run.init is None else Path(run.init).name
    if before is not None:
        yield from training(config, before)

    def work() -> None:
        train(run if before is None else replace(run, init=place(config, before)), device=device())

    yield Unit(f"training {attack}", run.out / "checkpoint" / checkpoint.EXTRA, 3 * run.images, work)


def rows(config: MatrixConfig, attack: str, known: Sequence[Calibration]) -> Iterator[Row]:
    """The attack's lines of the table, from the files of its units, judged by the ``known`` calibrations."""
    model = model_of(config, attack)
    own = model.train["sampler"]
    for defense in config.defenses:
        if kind_of(defense) in DETECTORS:
            folder = config.cell(attack, defense)
            finding = judged(Finding.load(folder / "finding.json"), known, config.alpha)
            picture = folder / "images.png"
            names = (attack, defense, own["name"])
            yield Row.of_finding(finding, names, picture.relative_to(config.out) if picture.exists() else None)
            continue
        repaired = [defense] if kind_of(defense) in REMOVALS else []
        spent = read_json(config.cell(attack, defense) / "repair.json")["seconds"] if repaired else 0.0
        clips = ("none", model.attack.clip) if repaired else (defense, defense)
        for sampler in config.samplers:
            folder, made_for = config.cell(attack, *repaired, sampler), (sampler, config.steps)
            scores, is_own = read_json(folder / "scores.json"), made_for == (own["name"], own["steps"])
            picture = (folder / f"{clips[1]}.png").relative_to(config.out)
            yield Row.of_scores(scores, clips, (attack, defense, sampler), picture, is_own, spent)
