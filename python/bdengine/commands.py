"""What ``bdengine sample`` and ``bdengine evaluate`` do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from . import checkpoint, pictures, report
from .accelerate import accelerate
from .altered import UNALTERED, Altered
from .attacks import AttackConfig
from .caching import Cached
from .config import claim, from_json, to_json
from .data import Images, load, to_float
from .distributed import ALONE, Ranks, join
from .errors import UserError, unknown
from .evaluate import ClassTarget, Reference, against, sample_arms, score_arms
from .extractors import Extractor, extractor_of
from .files import read_json, remove_leftovers, write_json
from .inverted import Inverted
from .metrics import FrechetStatistics, check_threshold, frechet
from .networks import Network
from .options import EvaluateConfig, SampleConfig, SamplerOptions, device
from .own import EDM, OWN, in_unit_range, is_preserving, own_table
from .sampler import Arm, Sampler
from .schedule import Schedule
from .seeds import Seeds
from .shards import PngFiles, Shards
from .shipped import find
from .solvers import SAMPLERS, SamplerConfig, Table
from .streamed import Streamed, statistics_of
from .tasks import NO_TASK, Task, originals
from .triggers import FROM_TRIGGER, LEARNED, class_of, trigger
from .volume import fill

SHOWN: Final = 16
"""Images of each arm in a picture."""
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
            UserError: Nothing there, a broken or foreign file, or weights that are not finite.
        """
        path = find(name)
        network = Network(accelerate(checkpoint.load_unet(path))).to(device()).requires_grad_(False)
        broken = next((of for of, weight in network.state_dict().items() if not weight.isfinite().all()), None)
        if broken is not None:
            raise UserError(f"{path} has weights in {broken} that are not finite: expected numbers")
        extra = Path(path) / checkpoint.EXTRA
        made_by = read_json(extra) if extra.is_file() else {}
        return cls(network, checkpoint.load_scheduler_config(path), made_by, path)

    def cached(self, every: int, capture: bool = False) -> Model:
        """With the network's deep blocks run at every so-many-th step.

        Raises:
            UserError: As `Cached`, or to ``capture``, since what runs at a step is not decided on a GPU.
        """
        if capture and every > 1:
            raise UserError(
                f"cache is {every} with capture: expected 1, as a graph replays the same blocks at every step"
            )
        return self if every == 1 else replace(self, network=Cached(self.network, every))

    def attacked_as(self, other: Model) -> Model:
        """Its network, sampled and attacked as another checkpoint's.

        Raises:
            UserError: The other's images have another shape.
        """
        own, others = (tuple(model.network.sample_shape) for model in (self, other))
        if own != others:
            raise UserError(f"{self.path} makes images of shape {own} and {other.path} of {others}: expected one shape")
        return replace(other, network=self.network)

    @property
    def train(self) -> dict[str, Any]:
        """The configuration it was trained with; empty for a stranger's.

        Raises:
            UserError: What stands there is none.
        """
        train = self.made_by.get("train", {})
        if not isinstance(train, dict) or not isinstance(train.get("sampler", {}), dict):
            raise UserError(
                f"{self.path} says that it was trained with {train!r}: expected an object, with one of its sampler"
            )
        return train

    @property
    def attack(self) -> AttackConfig:
        """The attack it was trained with."""
        return from_json(AttackConfig, self.train.get("attack", {}))

    def table(self, said: SamplerOptions, task: Task = NO_TASK) -> tuple[Table, dict[str, Any]]:
        """The sampler it was made for, with what the user said instead, and its description; from where a task starts.

        A stranger's checkpoint is sampled by ddpm where its scheduler has betas, else by its own scheduler.

        Raises:
            UserError: A sampler, or a number of steps, that does not fit the checkpoint.
        """
        if said.sampler is not None and said.sampler not in (*SAMPLERS, OWN, EDM):
            raise unknown("sampler", said.sampler, (*SAMPLERS, OWN, EDM))
        preserving, told = is_preserving(self.scheduler), self.train.get("sampler", {})
        name = said.sampler
        if name is None and not preserving:
            name = EDM if told.get("name") == EDM else OWN
        if name in (OWN, EDM):
            whose = "the checkpoint's own scheduler" if name == OWN else name
            if task.first is not None:
                raise UserError(f"the task {task.name} was asked of {whose}: expected a sampler by name")
            for what, value in (("order", said.order), ("eta", said.eta)):
                if value is not None:
                    raise UserError(f"{what} is {value:g} with {whose}: expected none")
            steps = told.get("steps", OWN_STEPS) if said.steps is None else said.steps
            return own_table(self.scheduler, steps, name), {"name": name, "steps": steps}
        if not preserving:
            kind = self.scheduler.get("_class_name", "no known class")
            raise UserError(f"the sampler {name} needs betas and the checkpoint's scheduler is {kind}: expected {OWN}")
        variance = _VARIANCES.get(self.scheduler.get("variance_type", ""), "small")
        recorded = from_json(SamplerConfig, {"variance": variance} | told)
        if name not in (None, recorded.name):
            recorded = SamplerConfig(name, recorded.steps, recorded.spacing, variance=recorded.variance)
        changes: dict[str, Any] = {"steps": said.steps, "order": said.order, "eta": said.eta}
        sampler = replace(recorded, **{field: value for field, value in changes.items() if value is not None})
        process = Schedule.from_config(self.scheduler)
        task.check(process.T)
        return sampler.table(process, task.first), to_json(sampler)

    def on_task(self, task: Task, arm: Arm, corrupted: Tensor | None) -> Arm:
        """The arm of a task on images float32 [K, C, H, W]; as it is where there are none."""
        return arm if corrupted is None else task.on(arm, Schedule.from_config(self.scheduler), corrupted)

    def data(self, name: str | None) -> Images:
        """A data set at its images' size; what it was trained on where ``name`` is None, digits where nobody says."""
        channels, size, _ = self.network.sample_shape
        images = load(name or self.train.get("data", "digits"), size, channels)
        left_out = self.train.get("without")
        return images if name is not None or left_out is None else images.without(left_out)

    def shown(self, images: Tensor) -> Tensor:
        """Its sampler's images in [-1, 1]."""
        return 2 * images - 1 if in_unit_range(self.scheduler) else images

    def trigger(self, name: str, file: Path | None) -> Tensor:
        """A trigger of its images' shape; that it was trained with, as its sampling starts with it, if LEARNED.

        Raises:
            UserError: As `bdengine.triggers.trigger` and `Inverted.load`, or an inverted one of every step.
        """
        channels, size, _ = self.network.sample_shape
        if is_inverted(name, file):
            assert file is not None
            inverted = Inverted.load(file, self.network.sample_shape)
            if inverted.in_steps:
                raise UserError(
                    f"the trigger in {file} is one of every step ({inverted.stage}): expected one of the start"
                )
            return inverted.shift
        return checkpoint.load_trigger(self.path) if name == LEARNED else trigger(name, size, channels, file=file)

    def triggered(self, table: Table, names: AttackConfig, altered: Altered = UNALTERED) -> Arm:
        """Samples with the trigger that is named, altered, as the attack that it was trained with starts them."""
        learned = names.trigger == LEARNED or is_inverted(names.trigger, names.trigger_file)
        r = altered.cropped(
            self.trigger(names.trigger, names.trigger_file), 0.0 if learned or names.name == "uib" else -1.0
        )
        r = (r + 1) / 2 if in_unit_range(self.scheduler) and not learned else r
        if not is_preserving(self.scheduler):
            return Arm(table, altered.perturbed(r))
        process = Schedule.from_config(self.scheduler)
        attack = replace(names, coefficients="published").made(process, r, torch.zeros_like(r))
        return replace(attack, trigger=altered.perturbed(r if learned else attack.trigger)).arm(process, table)


def is_inverted(name: str, file: Path | None) -> bool:
    """Whether a trigger is one that was inverted, in a folder that ``bdengine defend`` or ``bdengine audit`` wrote."""
    return name == "IMAGE" and file is not None and file.is_dir()


def sample(config: SampleConfig) -> int:
    """Run ``bdengine sample``, as one rank of those that torchrun started, if it did."""
    seeds = Seeds.parse(config.seeds)
    if config.trigger_file and not config.trigger:
        raise UserError(f"the trigger file {config.trigger_file} was given without a trigger: expected --trigger IMAGE")
    config.altered.check()
    if config.altered != UNALTERED and not config.trigger:
        raise UserError("a trigger was altered and none is named: expected --trigger NAME")
    if config.frechet and config.format == "png":
        raise UserError("a Fréchet distance was asked for with --format png: expected --format npy or tar")
    if config.exact and config.cache > 1:
        raise UserError(
            f"cache is {config.cache} with exact: expected 1, as the self-check calls the network outside of a loop"
        )
    with join() as ranks:
        return _sample(config, seeds, ranks)


def _sample(config: SampleConfig, seeds: Seeds, ranks: Ranks) -> int:
    model = Model.load(config.checkpoint).cached(config.cache, config.capture)
    table, sampler = model.table(config, config.task)
    images = None if config.task.first is None else originals(model.data(config.data))
    corrupted = None if images is None else config.task.corrupted(images)
    arm = Arm(table)
    if config.trigger:
        names = replace(model.attack, trigger=config.trigger, trigger_file=config.trigger_file)
        arm = model.triggered(table, names, config.altered)
    arm = model.on_task(config.task, arm, corrupted)
    run = Sampler(model.network, {"": arm.clipped(config.clip)}, config.micro_batch, config.exact, config.capture)
    about = {
        "sampler": sampler,
        "weights_sha256": checkpoint.digest(model.network.state_dict()),
        "trigger_sha256": None if arm.trigger is None else checkpoint.digest({"trigger": arm.trigger}),
    }
    free = ["out", "checkpoint", "trigger_file", "frechet", "capture"] + (["data"] if corrupted is None else [])
    folder: PngFiles | Shards
    streamed = None
    if config.format == "png":
        # Only the bit-exact mode promises the same bits again, and only with the same micro-batch.
        free += ["seeds", "shard"] + ([] if config.exact else ["micro_batch"])
        folder = PngFiles(config.out, seeds, config.micro_batch)
    else:
        folder = Shards(config.out, seeds, config.shard, config.format, model.network.sample_shape)
        if config.frechet:
            streamed = Streamed(folder, extractor_of(config.frechet), device())
    data, real = None, None
    if ranks.rank == 0:
        if streamed:
            data, real = _real(config, model, streamed)
        claim(config.out / "run.json", to_json(config) | about, free)
        remove_leftovers(config.out)
    ranks.together(0)  # nobody writes before the folder is known to be this run's
    made, there = fill(folder, run, ranks, streamed, model.shown)
    if ranks.rank > 0:
        return 0
    folder.finish({"micro_batch": config.micro_batch, "clip": config.clip, "trigger": config.trigger} | about)
    pictures.save_png(config.out / "grid.png", pictures.grid(folder.first(64)))
    if corrupted is not None:
        before = torch.stack([corrupted[seed % len(corrupted)] for seed in seeds[:64]])
        pictures.save_png(config.out / "corrupted.png", pictures.grid(before))
    print(f"wrote {made} images to {config.out} ({there} were there)")
    if streamed and data and real:
        score = {
            "frechet": frechet(real, streamed.total()),
            "images": len(seeds),
            "extractor": streamed.extractor.name,
            "data": data.name,
            "data_images": len(data),
        }
        write_json(config.out / "frechet.json", score)
        print(f"Fréchet distance {score['frechet']:.6g} of {len(seeds)} images to {len(data)} of {data.name}")
    return 0


def _goal(names: AttackConfig, r: Tensor, data: Images, extractor: Extractor) -> Tensor | ClassTarget:
    """What triggered samples are held against."""
    label = class_of(names.target)
    if label is None:
        return names.targets(r, data)
    data = names.class_data(r, data)
    return ClassTarget(label, Reference.of(data.of_class(label), extractor), data.are_digits)


def _real(config: SampleConfig, model: Model, streamed: Streamed) -> tuple[Images, FrechetStatistics]:
    """The clean data and its statistics, refused where the distance to it could not be told at the end."""
    data = model.data(config.data)
    real = statistics_of(data.pixels, streamed.extractor, streamed.device)
    if len(streamed.shards.seeds) <= len(real.total):
        raise UserError(
            f"a Fréchet distance of {len(streamed.shards.seeds)} images with {len(real.total)} features:"
            f" expected at least {len(real.total) + 1} images"
        )
    return data, real


def evaluate(config: EvaluateConfig) -> int:
    """Run ``bdengine evaluate``, as one rank of those that torchrun started, if it did."""
    if config.images < 1:
        raise UserError(f"{config.images} images were asked for: expected at least 1")
    check_threshold(config.threshold)
    config.altered.check()
    with join() as ranks:
        model = Model.load(config.checkpoint).cached(config.cache, config.capture)
        if config.attack_of is not None:
            model = model.attacked_as(Model.load(config.attack_of))
        scores, shown = scored(model, config, ranks, progress=True)
    if ranks.rank > 0:
        return 0
    write_json(config.out / "scores.json", scores)
    pictures.save_png(config.out / "arms.png", pictures.labelled(shown))
    print(report.console_table(scores))
    print(f"wrote {config.out / 'scores.json'} and {config.out / 'arms.png'}")
    return 0


def scored(
    model: Model, config: EvaluateConfig, ranks: Ranks = ALONE, progress: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``scores.json`` holds, and the first images of each arm by "start / clip"; both empty on all ranks but the first.

    Raises:
        UserError: No attack is known, or a name or number that does not fit the model.
    """
    attack = model.attack
    names = replace(
        attack,
        trigger=config.trigger or attack.trigger,
        trigger_file=config.trigger_file if config.trigger else config.trigger_file or attack.trigger_file,
        target=config.target or attack.target,
        target_data=attack.target_data if class_of(config.target or attack.target) is not None else None,
        target_file=config.target_file if config.target else config.target_file or attack.target_file,
    )
    if attack.name == "none" and not (config.trigger and config.target):
        raise UserError(
            f"{config.attack_of or config.checkpoint} does not say how it was attacked: expected --trigger and --target,"
            " or --attack-of CHECKPOINT"
        )
    # A target that is made of the trigger is made of that in training, whatever sampling starts with.
    made_of = names if attack.name == "none" or names.target not in FROM_TRIGGER else attack
    r = model.trigger(made_of.trigger, made_of.trigger_file)
    data, extractor = model.data(config.data), extractor_of(config.extractor)
    y, reference = _goal(names, r, data, extractor), None
    if ranks.rank == 0:
        reference = Reference.of(data, extractor)
        # What cannot be scored is refused before hours of sampling: a size that a metric does not take, too few real images.
        score_arms({("data", "none"): to_float(data.pixels[:SHOWN])}, y, reference, config.threshold)
    table, sampler = model.table(config, config.task)
    images = None if config.task.first is None else originals(data)
    corrupted = None if images is None else config.task.corrupted(images)
    clean, triggered = (
        model.on_task(config.task, arm, corrupted)
        for arm in (Arm(table), model.triggered(table, names, config.altered))
    )
    arms, speed = sample_arms(
        model.network,
        clean,
        triggered,
        range(config.images),
        config.micro_batch,
        progress and ranks.rank == 0,
        ranks,
        config.capture,
        config.clips,
    )
    if reference is None:
        return {}, {}
    arms = {key: model.shown(images) for key, images in arms.items()}
    scored, first = score_arms(arms, y, reference, config.threshold), {}
    if images is not None and corrupted is not None:
        chosen = torch.arange(config.images) % len(images)
        for (start, clip), restored in arms.items():
            scored[start][clip] |= against(restored, images[chosen])
        first = {"image": images[chosen][:SHOWN], "corrupted": corrupted[chosen][:SHOWN]}
    scores = {
        "source": Path(config.checkpoint).name,
        "arms": scored,
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
    return scores, first | {" / ".join(key): made[:SHOWN] for key, made in arms.items()}
