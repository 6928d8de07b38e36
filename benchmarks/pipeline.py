"""A whole measurement of a backdoored model: ``bdengine evaluate`` in 20 steps against the published procedure in 1,000.

``diffusers`` is `benchmarks.published`. Its time is calculated: that of `PART_STEPS` steps of a batch of each clip, times as
often as it takes them, and that of all its files, written, read back and scored (median of `FILES`, measured before). Ours is
the whole command, in the process that is there; it also samples and scores the latent clip, with intervals, kernel distance
and precision for every arm.

The gate of the published one: a short loop of it has our images. Ours: the scores of one run are those that the published
procedure had on the same model (`SCORES`). The ceiling is the accelerated UNet alone, in the command's micro-batches and as
often as it evaluates them, calculated from one.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from bdengine.commands import Model, evaluate
from bdengine.configs import EvaluateConfig
from bdengine.data import Images, to_float
from bdengine.defenses.clipping import CLIPS
from bdengine.errors import UserError
from bdengine.evaluate import Reference
from bdengine.extractors import DigitFeatures
from bdengine.files import read_json
from bdengine.memory import keep_freed
from bdengine.pictures import load_images, of_images
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import Schedule
from bdengine.solvers import SamplerConfig

from .bench import CEILING, HOST, REFERENCE, Provider, Shape, assert_close, in_full, ours, seeds_of
from .capture import in_unit_range, our_noise, run_pipeline
from .published import ARMS, BATCH, IMAGES, MODEL, OUR_STEPS, STEPS, begun_with, pipeline, save, scored
from .tables import RESULTS

SHAPES: Final = ((len(ARMS) * IMAGES, 1, 16, 16),)
"""All the images of the published procedure."""
SCORES: Final = RESULTS / "published.json"
PART_STEPS, FILES, CHECKED = 20, 3, 4
MICRO_BATCH: Final = EvaluateConfig.micro_batch


def files_seconds(images: Tensor, target: Tensor, data: Images) -> float:
    """Of the published procedure: PNG files of every arm's ``images``, float32 [N, C, H, W], written, read back and scored."""
    begun = time.perf_counter()
    reference = Reference.of(data, DigitFeatures())
    for _ in ARMS:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), 0, of_images(images))
            scored(load_images(Path(folder), range(len(images)), images.shape[1]), target, reference)
    return time.perf_counter() - begun


def evaluated(images: int) -> dict[str, Any]:
    """The scores of one run of the command, which says nothing."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        out = Path(folder)
        evaluate(EvaluateConfig(MODEL, out, images=images, sampler="ddpm", steps=OUR_STEPS))
        arms: dict[str, Any] = read_json(out / "scores.json")["arms"]
    return arms


def check_scores(found: dict[str, Any], images: int) -> None:
    """Scores of ``images`` an arm against the published procedure's, each within what the intervals of both leave.

    A Fréchet distance is one of clean starts, as published: of an arm of equal hats with a digit among them it tells the digit.

    Raises:
        AssertionError: One is outside.
    """
    stretch = 1 + math.sqrt(IMAGES / images)
    for arm, theirs in read_json(SCORES)["published"]["arms"].items():
        start, clip = arm.split("/")
        for name, (low, high) in theirs["intervals"].items():
            if name == "frechet" and start == "triggered":
                continue
            got, middle = found[start][clip][name], theirs[name]
            least, most = middle - stretch * (middle - low), middle + stretch * (high - middle)
            if not least <= got <= most:
                raise AssertionError(f"{name} of {arm} is {got:.4g}: expected {least:.4g} to {most:.4g}, as published")


def measurement(shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of a measurement with ``shape`` of images, over the published arms.

    Raises:
        UserError: A number of images that is no multiple of the arms, or images that are not the model's.
    """
    keep_freed()
    model = Model.load(MODEL)
    images = shape[0] // len(ARMS)
    if shape[0] % len(ARMS) or shape[1:] != model.network.sample_shape:
        expected = "x".join(map(str, model.network.sample_shape))
        raise UserError(f"shape {'x'.join(map(str, shape))}: expected a multiple of {len(ARMS)} images of {expected}")
    r, data = model.trigger(model.attack.trigger, None), model.data(None)
    stock = {clip: pipeline(MODEL, clip).to(device) for clip in dict.fromkeys(clip for _, clip in ARMS)}
    count, generator = min(BATCH, images), torch.Generator().manual_seed(0)
    target, sample = model.attack.targets(r, data), to_float(data.pixels[:images])
    files = median(files_seconds(sample, target, data) for _ in range(FILES))

    def part() -> None:
        with begun_with(r.to(device)):
            for made in stock.values():
                run_pipeline(made, count, PART_STEPS, generator)

    def whole(seconds: float) -> float:
        return seconds * shape[0] / (len(stock) * count) * STEPS / PART_STEPS + files

    def check_part() -> None:
        seeds = seeds_of(CHECKED).to(device)
        triggered = Arm(SamplerConfig("ddpm", PART_STEPS, "leading").table(Schedule.from_config(model.scheduler)), r)
        for clip, made in stock.items():
            with our_noise(seeds), begun_with(r.to(device)):
                theirs = in_full(lambda made=made: run_pipeline(made, CHECKED, PART_STEPS))  # type: ignore[misc]
            sampler = Sampler(model.network, {"": triggered.clipped(clip)}, CHECKED)
            expected = in_unit_range(sampler.batch(torch.zeros_like(seeds), seeds))
            assert_close(f"the worst of {CHECKED} images, clip {clip},", theirs, expected.double())

    x, t = torch.randn(MICRO_BATCH, *shape[1:]).to(device), torch.tensor(500, device=device)
    forwards = math.ceil(2 * len(CLIPS) * images / MICRO_BATCH) * OUR_STEPS

    @torch.inference_mode()
    def forward() -> Tensor:
        return model.network(x, t)

    return {
        "diffusers": Provider(part, check_part, whole=whole),
        **dict.fromkeys(
            ours(device) or (REFERENCE,),
            Provider(lambda: evaluated(images), lambda: check_scores(evaluated(images), images)),
        ),
        CEILING: Provider(forward, whole=lambda seconds: seconds * forwards),
    }
