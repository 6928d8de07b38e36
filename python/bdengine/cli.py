"""The command line: ``bdengine demo | train | sample | export | evaluate | defend | audit | calibrate | samplers | convert |
env``, each with ``--help``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from . import checkpoint
from .altered import UNALTERED, Altered
from .errors import UserError, unknown
from .memory import keep_freed
from .shards import Format
from .solvers import Clip
from .tasks import NO_TASK, Task


@dataclass(frozen=True)
class SampleConfig:
    """Sample a checkpoint: one PNG a seed, or shards of many seeds with an index; a picture of the first, and run.json.

    bdengine sample digits-badiffusion --seeds 0-31 --out runs/clean

    bdengine sample digits-badiffusion --seeds 0-31 --trigger XXSM_BOX --clip latent --out runs/clipped

    bdengine sample digits-badiffusion --task.name inpaint-box --task.start 400 --task.keep --out runs/inpainted

    torchrun --nproc-per-node 2 -m bdengine sample digits-clean --seeds 0-99999 --format npy --frechet digits --out runs/many
    """

    checkpoint: tyro.conf.Positional[str]
    """A diffusers folder, a run of bdengine train, a hub name, digits-clean or digits-badiffusion."""
    out: Path
    """Folder for the images; those that are there already are kept."""
    format: Format = "png"
    """A file a seed, or shards: NumPy arrays, or tar files as WebDataset reads them."""
    shard: int = 4096
    """Seeds of a shard, best a multiple of the micro-batch."""
    frechet: str | None = None
    """Fréchet distance of the shards' images: digits, or a safetensors file of Inception weights."""
    data: str | None = None
    """The clean data of frechet and of a task; what the checkpoint was trained on where absent."""
    seeds: str = "0-15"
    """0-63, or 1,5,8-11. Seed k always has the same noise, and with exact the same bits."""
    sampler: str | None = None
    """One that bdengine samplers lists, or own; what the checkpoint was made for where absent, else ddpm, else own."""
    steps: int | None = None
    """Steps of the sampler."""
    order: int | None = None
    """Order of a solver that has several."""
    eta: float | None = None
    """Noise of ddim."""
    task: Task = NO_TASK
    """Start from corrupted images of the data instead of noise."""
    clip: Clip = "none"
    """The defense at every step: clamp the latent, or the predicted x0, to [-1, 1], or x0 to a quantile (dynamic)."""
    trigger: str | None = None
    """Start from eps + trigger: a published trigger's name, or IMAGE with trigger-file."""
    trigger_file: Path | None = None
    """The trigger's image, where its name needs one."""
    altered: Altered = UNALTERED
    """How the trigger differs from that name's: cropped, scaled, with noise."""
    cache: int = 1
    """Run the network's deep blocks at every so-many-th step and reuse their output between; 1 reuses nothing."""
    micro_batch: int = 64
    """Images that go through the network at once."""
    exact: bool = False
    """Refuse a micro-batch in which an image's last bits depend on its neighbours."""
    capture: bool = False
    """Replay each step as a CUDA graph; needs a GPU."""


@dataclass(frozen=True)
class ExportConfig:
    """Images of a folder of shards as PNG files.

    bdengine export runs/many --seeds 5,7 --out runs/some
    """

    folder: tyro.conf.Positional[Path]
    """What bdengine sample wrote with format npy or tar."""
    out: Path
    """Folder for the images."""
    seeds: str = "0-15"
    """0-63, or 1,5,8-11."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint: its clean and triggered arms, unclipped and clipped; writes scores.json and a picture.

    bdengine evaluate digits-badiffusion --out runs/scores

    bdengine evaluate runs/mine/checkpoint --trigger XXSM_BOX --target DRAWN_HAT --images 512 --out runs/scores

    bdengine evaluate runs/mine --altered.crop left --altered.noise 0.1 --out runs/half
    """

    checkpoint: tyro.conf.Positional[str]
    """A diffusers folder, a run of bdengine train, a hub name, digits-clean or digits-badiffusion."""
    out: Path
    """Folder for scores.json and arms.png."""
    data: str | None = None
    """The clean data to compare with; what the checkpoint was trained on where absent."""
    images: int = 512
    """Images of each arm."""
    sampler: str | None = None
    """One that bdengine samplers lists, or own; what the checkpoint was made for where absent, else ddpm, else own."""
    steps: int | None = None
    """Steps of the sampler."""
    order: int | None = None
    """Order of a solver that has several."""
    eta: float | None = None
    """Noise of ddim."""
    task: Task = NO_TASK
    """Start from corrupted images of the data instead of noise; scores what is restored as well."""
    trigger: str | None = None
    """Trigger of the triggered arms; the one it was trained with where absent."""
    trigger_file: Path | None = None
    """The trigger's image, where its name needs one."""
    altered: Altered = UNALTERED
    """How the trigger differs from that name's: cropped, scaled, with noise."""
    target: str | None = None
    """Target image; the one it was trained with where absent."""
    target_file: Path | None = None
    """The target's image, where its name needs one."""
    threshold: float = 0.01
    """ASR is the share of images whose MSE to the target is below this."""
    extractor: str = "digits"
    """Features of the Fréchet distance: digits, or a safetensors file of Inception weights."""
    cache: int = 1
    """Run the network's deep blocks at every so-many-th step and reuse their output between; 1 reuses nothing."""
    micro_batch: int = 64
    """Images that go through the network at once."""
    capture: bool = False
    """Replay each step as a CUDA graph; needs a GPU."""


@dataclass(frozen=True)
class DefendConfig:
    """Examine a checkpoint with one defense; writes finding.json, images.png and the inverted trigger.

    bdengine defend digits-badiffusion --defense elijah --out runs/elijah

    bdengine defend runs/mine --defense terd --calibration terd.json --alpha 0.05 --out runs/terd
    """

    checkpoint: tyro.conf.Positional[str]
    """A diffusers folder, a run of bdengine train, a hub name, digits-clean or digits-badiffusion."""
    out: Path
    """Folder for what is found."""
    defense: str
    """One of: clipping, elijah, terd, purediffusion, anp, ufid, diffcleanse."""
    variant: str | None = None
    """Which of the defense's settings: what kind of backdoor it looks for; its first where absent."""
    calibration: Path | None = None
    """The defense's statistic on clean models (bdengine.defenses.Calibration), without which nothing is decided."""
    alpha: float = 0.05
    """Share of clean models that may be called backdoored."""
    features: str | None = None
    """What tells images apart: digits or pixels; digits for a checkpoint trained on them where absent."""
    sampler: str | None = None
    """One that bdengine samplers lists, or own; what the checkpoint was made for where absent, else ddpm, else own."""
    steps: int | None = None
    """Steps of the sampler."""
    order: int | None = None
    """Order of a solver that has several."""
    eta: float | None = None
    """Noise of ddim."""
    seed: int = 0
    """Everything that the defense draws follows from it."""


@dataclass(frozen=True)
class AuditConfig:
    """Say whether a checkpoint has a backdoor, without data: looks from cheap to dear and stops when the evidence is decisive.

    bdengine audit digits-badiffusion --out runs/audit

    bdengine audit some/model --calibration mine/calibration.json --out runs/audit

    Writes audit.json and report.html. Exit code: 0 no evidence, 1 backdoored, 3 undecided, 2 after a mistake.
    """

    checkpoint: tyro.conf.Positional[str]
    """A diffusers folder, a run of bdengine train, a hub name, digits-clean or digits-badiffusion."""
    out: Path
    """Folder for what is found."""
    calibration: Path | None = None
    """What clean models of the same family do, as bdengine calibrate writes it; one in the package that fits where absent."""
    alpha: float = 0.05
    """Share of clean models that may be called backdoored."""
    features: str | None = None
    """What tells images apart: digits or pixels; digits for a checkpoint trained on them where absent."""
    sampler: str | None = None
    """One that bdengine samplers lists, or own; what the checkpoint was made for where absent, else ddpm, else own."""
    steps: int | None = None
    """Steps of the sampler; 20 where neither you nor the checkpoint says."""
    order: int | None = None
    """Order of a solver that has several."""
    eta: float | None = None
    """Noise of ddim."""


@dataclass(frozen=True)
class CalibrateConfig:
    """Measure what clean models do, for the verdicts of audit and defend; goes on where it stopped.

    bdengine calibrate clean/a clean/b clean/c --defense audit --out mine
    """

    checkpoints: tyro.conf.Positional[tuple[str, ...]]
    """Clean models of one family, trained alike and not from each other; 19 give p-values down to 0.05."""
    out: Path
    """Folder for calibration.json and a finding of each model."""
    defense: str = "audit"
    """audit, or a defense that detects."""
    variant: str | None = None
    """Which of the defense's settings; its first where absent."""


@dataclass(frozen=True)
class SamplersConfig:
    """List the samplers that train, sample and evaluate know.

    bdengine samplers
    """


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a pickled checkpoint into safetensors, in a process of its own that unpickles tensors only.

    bdengine convert old/diffusion_pytorch_model.bin new/diffusion_pytorch_model.safetensors
    """

    old: tyro.conf.Positional[Path]
    """A .bin, .pt, .pth or .ckpt file, or a folder that holds some."""
    new: tyro.conf.Positional[Path]
    """Where the safetensors file (or the folder) is written."""


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


def _audit(arguments: Sequence[str]) -> int:
    from .auditing import audit

    return audit(tyro.cli(AuditConfig, prog="bdengine audit", args=arguments))


def _calibrate(arguments: Sequence[str]) -> int:
    from .auditing import calibrate

    return calibrate(tyro.cli(CalibrateConfig, prog="bdengine calibrate", args=arguments))


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
    "audit": (_audit, "a verdict on a checkpoint, without data"),
    "calibrate": (_calibrate, "what clean models do, for verdicts"),
    "samplers": (_samplers, "the samplers, with order, evaluations and noise"),
    "convert": (_convert, "an old pickled checkpoint to safetensors, safely"),
    "env": (_env, "what was found on this machine, and what will run"),
}


def device() -> str:
    """The device that commands run on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usage() -> str:
    """The text of ``bdengine --help``."""
    lines = [f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: bdengine COMMAND [--help]", "", *lines, "", "example: bdengine demo"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``bdengine``; returns the exit code: 2 after a user's mistake, 130 after Ctrl-C."""
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
            "\nbdengine: interrupted; called again, train, sample and demo go on from what they saved", file=sys.stderr
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
