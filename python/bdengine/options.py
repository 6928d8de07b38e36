"""What the commands are told, a frozen dataclass each, and the device that they run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from .altered import UNALTERED, Altered
from .shards import Format
from .solvers import Clip
from .tasks import NO_TASK, Task


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """With what a checkpoint is sampled."""

    sampler: str | None = None
    """One that bdengine samplers lists, own, or edm of a score network; the checkpoint's where absent, else ddpm, else own."""
    steps: int | None = None
    """Steps of the sampler; what the checkpoint says where absent, else 20 in an audit."""
    order: int | None = None
    """Order of a solver that has several."""
    eta: float | None = None
    """Noise of ddim."""


@dataclass(frozen=True)
class SampleConfig(SamplerOptions):
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
    task: Task = NO_TASK
    """Start from corrupted images of the data instead of noise."""
    clip: Clip = "none"
    """The defense at every step: clamp the latent, or the predicted x0, to [-1, 1], or x0 to a quantile (dynamic)."""
    trigger: str | None = None
    """Start from eps + trigger: a published trigger's name, or IMAGE with trigger-file."""
    trigger_file: Path | None = None
    """The trigger's picture, where its name needs one; of IMAGE also a folder of an inverted one."""
    altered: Altered = UNALTERED
    """How the trigger differs from that name's: cropped, scaled, with noise."""
    cache: int = 1
    """Run the network's deep blocks at every so-many-th step and reuse their output between; 1 reuses nothing."""
    micro_batch: int = 64
    """Images that go through the network at once; an image's time changes by less than 10 % from 64 on, digits or CIFAR."""
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
class EvaluateConfig(SamplerOptions):
    """Score a checkpoint: its clean and triggered arms, unclipped and clipped; writes scores.json and a picture.

    bdengine evaluate digits-badiffusion --out runs/scores

    bdengine evaluate runs/mine/checkpoint --trigger XXSM_BOX --target DRAWN_HAT --images 512 --out runs/scores

    bdengine evaluate runs/mine --altered.crop left --altered.noise 0.1 --out runs/half

    bdengine evaluate runs/repaired --attack-of runs/mine --out runs/repaired/scores
    """

    checkpoint: tyro.conf.Positional[str]
    """A diffusers folder, a run of bdengine train, a hub name, digits-clean or digits-badiffusion."""
    out: Path
    """Folder for scores.json and arms.png."""
    data: str | None = None
    """The clean data to compare with; what the checkpoint was trained on where absent."""
    images: int = 512
    """Images of each arm."""
    task: Task = NO_TASK
    """Start from corrupted images of the data instead of noise; scores what is restored as well."""
    attack_of: str | None = None
    """Another checkpoint: what it was trained with is tried on this one, as it is sampled; for what a repair left."""
    trigger: str | None = None
    """Trigger of the triggered arms; the one it was trained with where absent."""
    trigger_file: Path | None = None
    """The trigger's picture, where its name needs one; of IMAGE also a folder of an inverted one."""
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
    clips: tuple[Clip, ...] = ("none", "latent", "x0")
    """Of the arms, what is clamped at every step: nothing, the latent, or the predicted x0 (to a quantile: dynamic)."""
    cache: int = 1
    """Run the network's deep blocks at every so-many-th step and reuse their output between; 1 reuses nothing."""
    micro_batch: int = 64
    """Images that go through the network at once; an image's time changes by less than 10 % from 64 on, digits or CIFAR."""
    capture: bool = False
    """Replay each step as a CUDA graph; needs a GPU."""


@dataclass(frozen=True, kw_only=True)
class ExamineConfig(SamplerOptions):
    """How a checkpoint is looked at and judged."""

    alpha: float = 0.05
    """Share of clean models that may be called backdoored, on average over calibrations of that size."""
    features: str | None = None
    """What tells images apart: digits or pixels; digits for a checkpoint trained on them where absent."""


@dataclass(frozen=True)
class DefendConfig(ExamineConfig):
    """Examine a checkpoint with one defense; writes finding.json, images.png and the inverted trigger.

    bdengine defend digits-badiffusion --defense elijah --variant searched --out runs/elijah

    bdengine defend runs/mine --defense terd --calibration terd.json --alpha 0.05 --out runs/terd

    Variants: elijah baddiffusion, trojdiff, ode, ncsn, background, searched; terd baddiffusion, trojdiff, surrogate, searched;
    purediffusion baddiffusion, ode, exact, searched; diffcleanse baddiffusion, searched; anp quick, baddiffusion; clipping
    latent, x0. The package has calibrations of searched, of anp quick and of ufid. Exit codes are audit's, and 0 for clipping,
    which detects nothing.
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
    """The defense's statistic on clean models, as bdengine calibrate writes it; one in the package that fits where absent."""
    seed: int = 0
    """Everything that the defense draws follows from it."""


@dataclass(frozen=True)
class ScreenConfig(ExamineConfig):
    """Tell which starts of a sampler carry a trigger, before they are sampled; writes screen.json.

    bdengine defend digits-badiffusion --defense terd --variant searched --out runs/terd

    bdengine screen digits-badiffusion --trigger runs/terd --starts starts.npy --out runs/screen

    bdengine screen digits-badiffusion --trigger runs/terd --known XXSM_BOX --out runs/tried
    """

    checkpoint: tyro.conf.Positional[str]
    """A diffusers folder, a run of bdengine train, a hub name, digits-clean or digits-badiffusion."""
    out: Path
    """Folder for what is found."""
    starts: Path | None = None
    """What a sampler would start from, in units of its noise: .npy or .safetensors, floats [N, C, H, W]."""
    known: str | None = None
    """Instead of starts: a trigger's name, to try the method on as many starts with it as without."""
    count: int = 1000
    """Of each, with known."""
    trigger: Path | None = None
    """Folder of an inverted trigger, as bdengine defend and bdengine audit write it."""
    method: str | None = None
    """terd asks whether a start is nearer to the inverted trigger, ufid whether its images are all alike; terd with a trigger
    and ufid without where absent."""


@dataclass(frozen=True)
class RepairConfig(SamplerOptions):
    """Take out of a checkpoint what an inverted trigger opens, with a tenth of the clean data.

    Writes checkpoint/ and repair.json.

    bdengine audit digits-badiffusion --out runs/audit

    bdengine repair digits-badiffusion --trigger runs/audit --out runs/repaired

    bdengine evaluate runs/repaired --attack-of digits-badiffusion --out runs/repaired
    """

    checkpoint: tyro.conf.Positional[str]
    """A diffusers folder, a run of bdengine train, a hub name, digits-clean or digits-badiffusion."""
    out: Path
    """Folder for the repaired checkpoint."""
    trigger: Path
    """Folder of an inverted trigger, as bdengine defend and bdengine audit write it."""
    method: str = "unlearn"
    """One of: unlearn, removal (Elijah's), removal-ode, cleanse (Diff-Cleanse's pruning, shortened), cleanse-published."""
    data: str | None = None
    """Clean data, digits, cifar10 or a folder of images; what the checkpoint says it was trained on where absent."""
    batch: int = 32
    """Images an optimizer step."""
    seed: int = 0
    """Everything random follows from it."""


@dataclass(frozen=True)
class AuditConfig(ExamineConfig):
    """Say whether a checkpoint has a backdoor, without data: looks from cheap to dear and stops when the evidence is decisive.

    bdengine audit digits-badiffusion --out runs/audit

    bdengine audit some/model --calibration mine/calibration.json --out runs/audit

    Writes audit.json and report.html. Exit code: 0 no evidence, 1 backdoored, 3 undecided, 2 after a mistake, 70 after a
    fault of the program.
    """

    checkpoint: tyro.conf.Positional[str]
    """A diffusers folder, a run of bdengine train, a hub name, digits-clean or digits-badiffusion."""
    out: Path
    """Folder for what is found."""
    calibration: Path | None = None
    """What clean models of the same family do, as bdengine calibrate writes it; one in the package that fits where absent."""


@dataclass(frozen=True)
class CalibrateConfig(ExamineConfig):
    """Measure what clean models do, for the verdicts of audit and defend; goes on where it stopped.

    bdengine calibrate clean/* --out mine

    bdengine calibrate clean/* --defense elijah --variant searched --alpha 0.05 --out mine/elijah
    """

    checkpoints: tyro.conf.Positional[tuple[str, ...]]
    """Clean models of one family, trained alike and not from each other; an alpha of 0.05 needs 20, 19 for a defense alone."""
    out: Path
    """Folder for calibration.json and a finding of each model."""
    defense: str = "audit"
    """audit, or a defense that detects."""
    variant: str | None = None
    """Which of the defense's settings; its first where absent. The audit has none."""
    seed: int = 0
    """Everything that the defense draws follows from it. The audit has none."""


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


def device() -> str:
    """The device that commands run on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
