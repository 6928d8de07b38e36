"""The command line: ``bdengine demo | train | sample | export | evaluate | defend | screen | repair | audit | calibrate |
matrix | samplers | convert | env``, each with ``--help``.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final

import tyro

from . import checkpoint
from .errors import UserError, unknown
from .memory import keep_freed
from .options import (
    AuditConfig,
    CalibrateConfig,
    ConvertConfig,
    DefendConfig,
    EvaluateConfig,
    ExportConfig,
    RepairConfig,
    SampleConfig,
    SamplersConfig,
    ScreenConfig,
    device,
)


def _train(arguments: Sequence[str]) -> int:
    from .distributed import join
    from .presets import PRESETS, preset
    from .train import TrainConfig, train

    rest, name = [word for a in arguments for word in (a.split("=", 1) if a.startswith("--preset=") else [a])], None
    if "--preset" in rest:
        at = rest.index("--preset")
        if at + 1 == len(rest):
            raise UserError(f"--preset has no name: expected one of {', '.join(PRESETS)}")
        name = rest[at + 1]
        del rest[at : at + 2]
    start: dict[str, Any] = {"default": preset(name)} if name else {}
    config = tyro.cli(
        TrainConfig,
        prog="bdengine train",
        description="Train or fine-tune, clean or poisoned; an unfinished run is resumed.\n\n"
        "bdengine train --preset digits-badiffusion\n\n"
        "bdengine train --out runs/mine --init digits-clean --images 64000 --attack.name baddiffusion"
        " --attack.trigger XXSM_BOX --attack.target DRAWN_HAT --attack.rate 0.3\n\n"
        "torchrun --nproc-per-node 2 -m bdengine train --preset digits-clean\n\n"
        f"--preset NAME starts from one of: {', '.join(PRESETS)}",
        args=rest,
        **start,
    )
    with join() as ranks:
        train(config, device=device(), ranks=ranks)
        if ranks.rank == 0:
            print(f"wrote {config.out / 'checkpoint'}")
    return 0


def _sample(arguments: Sequence[str]) -> int:
    from .commands import sample

    return sample(tyro.cli(SampleConfig, prog="bdengine sample", args=arguments))


def _export(arguments: Sequence[str]) -> int:
    from .seeds import Seeds
    from .shards import Shards

    config = tyro.cli(ExportConfig, prog="bdengine export", args=arguments)
    seeds = Seeds.parse(config.seeds)
    Shards.open(config.folder).export(seeds, config.out)
    print(f"wrote {len(seeds)} images to {config.out}")
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    from .commands import evaluate

    return evaluate(tyro.cli(EvaluateConfig, prog="bdengine evaluate", args=arguments))


def _defend(arguments: Sequence[str]) -> int:
    from .defend import defend

    return defend(tyro.cli(DefendConfig, prog="bdengine defend", args=arguments))


def _screen(arguments: Sequence[str]) -> int:
    from .screen import screen

    return screen(tyro.cli(ScreenConfig, prog="bdengine screen", args=arguments))


def _repair(arguments: Sequence[str]) -> int:
    from .repair import repair

    return repair(tyro.cli(RepairConfig, prog="bdengine repair", args=arguments))


def _audit(arguments: Sequence[str]) -> int:
    from .auditing import audit

    return audit(tyro.cli(AuditConfig, prog="bdengine audit", args=arguments))


def _calibrate(arguments: Sequence[str]) -> int:
    from .auditing import calibrate

    return calibrate(tyro.cli(CalibrateConfig, prog="bdengine calibrate", args=arguments))


def _matrix(arguments: Sequence[str]) -> int:
    from .cells import MatrixConfig
    from .matrix import matrix

    return matrix(tyro.cli(MatrixConfig, prog="bdengine matrix", args=arguments))


def _demo(arguments: Sequence[str]) -> int:
    from .demo import DemoConfig, demo

    demo(tyro.cli(DemoConfig, prog="bdengine demo", args=arguments))
    return 0


def _samplers(arguments: Sequence[str]) -> int:
    from .own import OWN
    from .solvers import SAMPLERS

    tyro.cli(SamplersConfig, prog="bdengine samplers", args=arguments)
    print(f"{'name':16} {'order':12} {'evaluations':12} {'noise':6} reference")
    for name, kind in SAMPLERS.items():
        orders = ", ".join(
            f"{o}*" if o == kind.order and kind.orders[1:] else str(o) for o in kind.orders or (kind.order,)
        )
        noise = "eta" if name == "ddim" else "yes" if kind.noise else "no"
        print(f"{name:16} {orders:12} {kind.evaluations:12} {noise:6} {kind.reference}")
    print(f"{OWN:16} the scheduler in the checkpoint, read off: any linear one of diffusers, and score-SDE's")
    print("n is --steps; * is the order where --order is absent")
    return 0


def _convert(arguments: Sequence[str]) -> int:
    config = tyro.cli(ConvertConfig, prog="bdengine convert", args=arguments)
    checkpoint.convert(config.old, config.new)
    print(f"wrote {config.new}")
    return 0


def _env(arguments: Sequence[str]) -> int:
    from bdkernels import env

    return env.main(list(arguments), prog="bdengine env")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (_demo, "implant, trigger and defend on real digits, in five minutes"),
    "train": (_train, "train or fine-tune, clean or poisoned"),
    "sample": (_sample, "images of a checkpoint, by seed"),
    "export": (_export, "images of a folder of shards, by seed"),
    "evaluate": (_evaluate, "attack and quality scores of a checkpoint"),
    "defend": (_defend, "look for a backdoor in a checkpoint, with one defense"),
    "screen": (_screen, "which starts of a sampler carry a trigger"),
    "repair": (_repair, "a checkpoint without what an inverted trigger opens"),
    "audit": (_audit, "a verdict on a checkpoint, without data"),
    "calibrate": (_calibrate, "what clean models do, for verdicts"),
    "matrix": (_matrix, "attacks x defenses x samplers: one table, a picture of each cell"),
    "samplers": (_samplers, "the samplers, with order, evaluations and noise"),
    "convert": (_convert, "an old pickled checkpoint to safetensors, safely"),
    "env": (_env, "what was found on this machine, and what will run"),
}


FAULT: Final = 70
"""Exit code after an error that nobody foresaw."""


def usage() -> str:
    """The text of ``bdengine --help``."""
    lines = [f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: bdengine COMMAND [--help]", "", *lines, "", "example: bdengine demo"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``bdengine``; returns the exit code: 2 after a user's mistake, 130 after Ctrl-C, or `FAULT`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    try:
        if words[0] not in COMMANDS:
            raise unknown("command", words[0], COMMANDS)
        keep_freed()
        return COMMANDS[words[0]][0](words[1:])
    except (UserError, FloatingPointError) as error:
        print(f"bdengine: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nbdengine: interrupted; called again, train, sample, calibrate, matrix and demo go on from what they saved",
            file=sys.stderr,
        )
        return 130
    except Exception:  # Python would exit with 1, which of an audit is a verdict
        traceback.print_exc()
        return FAULT


if __name__ == "__main__":
    sys.exit(main())
