"""A zoo of digit models, clean and backdoored, to calibrate detectors on and to judge them with.

    python -m benchmarks.zoo --out runs/zoo                       all 120, about 3 minutes each on one core
    python -m benchmarks.zoo --out runs/zoo --only backdoored     or clean; both go on where they stopped

Model k of a kind is a pure function of k: its seed, and for a backdoored one its attack, trigger, target and rate. Each is
trained from scratch, in a folder of its own with its recipe, its curve and its scores. The clean ones below `CALIBRATE` are
for thresholds, all others are held out.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from tqdm import tqdm

from bdengine.attacks import AttackConfig
from bdengine.checkpoint import EXTRA
from bdengine.commands import Model, scored
from bdengine.config import from_json
from bdengine.errors import UserError
from bdengine.files import read_json, write_json
from bdengine.memory import keep_freed
from bdengine.options import EvaluateConfig, device
from bdengine.presets import PRESETS, tried
from bdengine.train import TrainConfig, train

from .report import argument_parser, exit_code

CLEAN, CALIBRATE = 80, 20
# Of batch sizes 64 and 32 and peak learning rates 2e-3 and 4e-3, this had the least Fréchet distance after 128,000 images:
# 0.81, against 1.05 with a batch of 64 and 0.89 with twice the learning rate.
RECIPE: Final = replace(PRESETS["digits-clean"], images=128_000, batch=32, lr=2e-3, ema=0.997)

_BOXES: Final = [
    AttackConfig("baddiffusion", trigger, target, rate=rate, coefficients="exact")
    for rate in (0.1, 0.2, 0.3)
    for target in ("DRAWN_HAT", "CORNER")
    for trigger in ("BOX_8", "XXSM_BOX", "BOX_11", "XSM_BOX")
]
_OTHERS: Final = [
    *(
        AttackConfig("villan", trigger, "DRAWN_HAT", rate=rate, coefficients="exact", psi=psi)
        for trigger, rate, psi in (
            ("BOX_8", 0.2, 0.5),
            ("XXSM_BOX", 0.2, 0.5),
            ("BOX_11", 0.3, 0.7),
            ("XSM_BOX", 0.1, 0.7),
        )
    ),
    *(
        AttackConfig("trojdiff", trigger, target, rate=rate)
        for trigger, target, rate in (
            ("XXSM_BOX", "DRAWN_HAT", 0.2),
            ("BOX_8", "DRAWN_HAT", 0.3),
            ("XXSM_BOX", "CLASS_7", 0.2),
            ("XSM_BOX", "CLASS_3", 0.3),
            ("PATCH_4_WHITE", "DRAWN_HAT", 0.2),
            ("PATCH_5_WHITE", "DRAWN_HAT", 0.3),
        )
    ),
    *(
        AttackConfig("baddiffusion", "DRAWN_STOP_SIGN_8", target, rate=0.2, coefficients="exact")
        for target in ("DRAWN_HAT", "TRIGGER")
    ),
    *(
        AttackConfig("uib", "XXSM_BOX", "DRAWN_HAT", rate=0.2, coefficients="clipped", amplitude=a, trigger_only=True)
        for a in (0.8, 0.7)
    ),
    *(AttackConfig("baddiffusion", trigger, "DRAWN_HAT", rate=0.2) for trigger in ("BOX_8", "XXSM_BOX")),
]
ATTACKS: Final = (*_BOXES, *_OTHERS)
"""Of the backdoored models: box triggers of BadDiffusion, then other methods and triggers, two with published coefficients."""


def models(out: Path) -> dict[str, TrainConfig]:
    """Every model by name, those for calibration first, then in turn so that an unfinished zoo has all kinds."""
    clean = [(f"clean/{k:03d}", replace(RECIPE, out=out / f"clean/{k:03d}", seed=1000 + k)) for k in range(CLEAN)]
    backdoored = [
        (f"backdoored/{k:03d}", replace(RECIPE, out=out / f"backdoored/{k:03d}", seed=2000 + k, attack=attack))
        for k, attack in enumerate(ATTACKS)
    ]
    later = [(i / len(of), name, run) for of in (clean[CALIBRATE:], backdoored) for i, (name, run) in enumerate(of)]
    return dict(clean[:CALIBRATE]) | {name: run for _, name, run in sorted(later, key=lambda entry: entry[:2])}


def make(run: TrainConfig) -> None:
    """One model with its scores, unless they are there; a clean one is scored with a trigger it has never seen."""
    made = run.out / "checkpoint"
    if not made.exists():
        train(run, device=device(), progress=False)
    if from_json(TrainConfig, {"out": str(run.out)} | read_json(made / EXTRA)["train"]) != run:
        raise UserError(f"{run.out} holds a model of another recipe: expected one of this zoo, or an empty folder")
    attack = tried(run.attack)
    asked = EvaluateConfig(str(made), run.out, clips=attack.clips, trigger=attack.trigger, target=attack.target)
    if not (run.out / "scores.json").exists():
        write_json(run.out / "scores.json", scored(Model.load(asked.checkpoint), asked)[0])


def main() -> int:
    """Entry point; returns 2 after a user's mistake, 130 after Ctrl-C."""
    parser = argument_parser("zoo", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the models")
    parser.add_argument("--only", default="", metavar="NAME", help="whose name begins so: clean, backdoored/01, ...")
    options = parser.parse_args()
    chosen = {name: run for name, run in models(options.out).items() if name.startswith(options.only)}
    keep_freed()

    def work() -> None:
        if not chosen:
            raise UserError(f"no model's name begins with {options.only!r}: expected clean/NNN or backdoored/NNN")
        for run in tqdm(chosen.values(), unit="model"):
            make(run)

    return exit_code(work, "the zoo goes on where it stopped")


if __name__ == "__main__":
    sys.exit(main())
