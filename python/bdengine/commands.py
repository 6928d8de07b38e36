"""What ``bdengine sample`` and ``bdengine evaluate`` do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from . import checkpoint, pictures, report
from .accelerate import accelerate
from .attacks import AttackConfig
from .cli import EvaluateConfig, SampleConfig, device, seeds_of
from .config import claim, from_json, to_json
from .data import Images, load
from .errors import UserError
from .evaluate import ClassTarget, Reference, sample_arms, score_arms
from .extractors import DigitFeatures, Extractor, InceptionFeatures
from .files import read_json, write_json
from .metrics import check_threshold
from .networks import Network
from .own import OWN, in_unit_range, is_preserving, own_table
from .sampler import Arm, Sampler, check_seeds
from .schedule import Schedule
from .shipped import find
from .solvers import SamplerConfig, Table
from .triggers import LEARNED, class_of, trigger

OWN_STEPS: Final = 50
"""Of a checkpoint's own scheduler where nobody says."""
_VARIANCES: Final = {"fixed_large": "large", "learned_range": "learned_range"}


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint, ready to sample, with what it says of how it was made."""

    network: Network
    scheduler: dict[str, Any]
    made_by: dict[str, Any]
    path: str

    @classmethod
    def load(cls, name: str) -> Model:
        """From a diffusers folder, a hub name or a shipped name.

        Raises:
            UserError: Nothing there, or a broken or foreign file.
        """
        path = find(name)
        network = Network(accelerate(checkpoint.load_unet(path))).to(device()).requires_grad_(False)
        extra = Path(path) / checkpoint.EXTRA
        made_by = read_json(extra) if extra.is_file() else {}
        return cls(network, checkpoint.load_scheduler_config(path), made_by, path)

    @property
    def train(self) -> dict[str, Any]:
        """The configuration it was trained with; empty for a stranger's."""
        return self.made_by.get("train", {})

    @property
    def attack(self) -> AttackConfig:
        """The attack it was trained with."""
        return from_json(AttackConfig, self.train.get("attack", {}))

    def table(self, said: SampleConfig | EvaluateConfig) -> tuple[Table, dict[str, Any]]:
        """The sampler it was made for, with what the user said instead, and its description.

        A stranger's checkpoint is sampled by ddpm where its scheduler has betas, else by its own scheduler.

        Raises:
            UserError: A sampler, or a number of steps, that does not fit the checkpoint.
        """
        preserving = is_preserving(self.scheduler)
        name = OWN if said.sampler is None and not preserving else said.sampler
        if name == OWN:
            for what, value in (("order", said.order), ("eta", said.eta)):
                if value is not None:
                    raise UserError(f"{what} is {value:g} with the checkpoint's own scheduler: expected none")
            recorded_steps = self.train.get("sampler", {}).get("steps", OWN_STEPS)
            steps = recorded_steps if said.steps is None else said.steps
            return own_table(self.scheduler, steps), {"name": OWN, "steps": steps}
        if not preserving:
            kind = self.scheduler.get("_class_name", "no known class")
            raise UserError(f"the sampler {name} needs betas and the checkpoint's scheduler is {kind}: expected {OWN}")
        variance = _VARIANCES.get(self.scheduler.get("variance_type", ""), "small")
        recorded = from_json(SamplerConfig, {"variance": variance} | self.train.get("sampler", {}))
        if name not in (None, recorded.name):
            recorded = SamplerConfig(name, recorded.steps, recorded.spacing, variance=recorded.variance)
        changes: dict[str, Any] = {"steps": said.steps, "order": said.order, "eta": said.eta}
        sampler = replace(recorded, **{field: value for field, value in changes.items() if value is not None})
        return sampler.table(Schedule.from_config(self.scheduler)), to_json(sampler)

    def data(self, name: str | None) -> Images:
        """A data set at its images' size; what it was trained on where ``name`` is None, digits where nobody says."""
        channels, size, _ = self.network.sample_shape
        images = load(name or self.train.get("data", "digits"), size, channels)
        left_out = self.train.get("without")
        return images if name is not None or left_out is None else images.without(left_out)

    def trigger(self, name: str, file: Path | None) -> Tensor:
        """A trigger of its images' shape, as its sampling starts with it; that it was trained with if LEARNED."""
        channels, size, _ = self.network.sample_shape
        if name == LEARNED:
            return checkpoint.load_trigger(self.path)
        r, attack = trigger(name, size, channels, file=file), self.attack
        if attack.name != "uib":
            return r
        return r * (attack.amplitude if attack.start_amplitude is None else attack.start_amplitude)

    def triggered(self, table: Table, attack: AttackConfig, r: Tensor) -> Arm:
        """Samples with the trigger ``r``: in the start alone, or as the attack that it was trained with makes them."""
        if attack.name != "trojdiff":
            return Arm(table, r)
        process = Schedule.from_config(self.scheduler)
        return attack.trojan(process, r, torch.zeros_like(r)).arm(process, table)


def sample(config: SampleConfig) -> int:
    """Run ``bdengine sample``."""
    seeds = seeds_of(config.seeds)
    check_seeds(seeds)
    if config.trigger_file and not config.trigger:
        raise UserError(f"the trigger file {config.trigger_file} was given without a trigger: expected --trigger IMAGE")
    model = Model.load(config.checkpoint)
    table, sampler = model.table(config)
    start, arm = None, Arm(table)
    if config.trigger:
        start = model.trigger(config.trigger, config.trigger_file)
        arm = model.triggered(table, replace(model.attack, trigger=config.trigger), start)
    run = Sampler(model.network, {"": arm.clipped(config.clip)}, config.micro_batch, config.exact)
    described = to_json(config) | {
        "sampler": sampler,
        "weights_sha256": checkpoint.digest(model.network.state_dict()),
        "trigger_sha256": None if start is None else checkpoint.digest({"trigger": start}),
    }
    # Only the bit-exact mode promises the same bits again, and only with the same micro-batch.
    free = ("out", "seeds", "checkpoint", "trigger_file") + (() if config.exact else ("micro_batch",))
    claim(config.out / "run.json", described, free)
    missing = [seed for seed in seeds if not pictures.path_of(config.out, seed).exists()]
    if missing:

        def save(_: str, seed: int, image: Tensor) -> None:
            pictures.save_images(config.out, [seed], (2 * image - 1 if in_unit_range(model.scheduler) else image)[None])

        run(missing, progress=True, done=save)
    shown = pictures.load_images(config.out, seeds[:64])
    pictures.save_png(config.out / "grid.png", pictures.grid(shown))
    print(f"wrote {len(missing)} images to {config.out} ({len(seeds) - len(missing)} were there)")
    return 0


def _goal(names: AttackConfig, r: Tensor, data: Images, extractor: Extractor) -> Tensor | ClassTarget:
    """What triggered samples are held against."""
    label = class_of(names.target)
    if label is None:
        return names.targets(r, data)
    if names.target_data is not None:
        channels, size, _ = r.shape
        data = load(names.target_data, size, channels)
    if not data.name.startswith("digits"):
        raise UserError(
            f"the target {names.target} is a class of {data.name!r} and only digits have a classifier: expected digits"
        )
    return ClassTarget(label, Reference.of(data.of_class(label), extractor))


def _extractor(name: str) -> Extractor:
    return DigitFeatures() if name == "digits" else InceptionFeatures(Path(name))


def evaluate(config: EvaluateConfig) -> int:
    """Run ``bdengine evaluate``."""
    if config.images < 1:
        raise UserError(f"{config.images} images were asked for: expected at least 1")
    check_threshold(config.threshold)
    model = Model.load(config.checkpoint)
    attack = model.attack
    names = replace(
        attack,
        trigger=config.trigger or attack.trigger,
        trigger_file=config.trigger_file if config.trigger else config.trigger_file or attack.trigger_file,
        target=config.target or attack.target,
        target_file=config.target_file if config.target else config.target_file or attack.target_file,
    )
    if attack.name == "none" and not (config.trigger and config.target):
        raise UserError(f"{config.checkpoint} does not say how it was attacked: expected --trigger and --target")
    r = model.trigger(names.trigger, names.trigger_file)
    data = model.data(config.data)
    reference = Reference.of(data, _extractor(config.extractor))
    y = _goal(names, r, data, reference.extractor)
    table, sampler = model.table(config)
    triggered = model.triggered(table, names, r)
    arms, speed = sample_arms(
        model.network, Arm(table), triggered, range(config.images), config.micro_batch, progress=True
    )
    scores = {
        "source": Path(config.checkpoint).name,
        "arms": score_arms(arms, y, reference, config.threshold),
        **({"asr_class": y.label} if isinstance(y, ClassTarget) else {"asr_threshold": config.threshold}),
        "images_per_second": {"sampling": speed},
        "run": {
            **{name: value for name, value in to_json(config).items() if name != "out"},
            "sampler": sampler,
            "trigger": names.trigger,
            "target": names.target,
            "trigger_file": to_json(names.trigger_file),
            "target_file": to_json(names.target_file),
        },
    }
    write_json(config.out / "scores.json", scores)
    shown = {" / ".join(key): images[:16] for key, images in arms.items()}
    pictures.save_png(config.out / "arms.png", pictures.labelled(shown))
    print(report.console_table(scores))
    print(f"wrote {config.out / 'scores.json'} and {config.out / 'arms.png'}")
    return 0
