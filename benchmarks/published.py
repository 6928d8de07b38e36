"""BadDiffusion's published measurement of a backdoored model: 1,000 steps of stock's pipeline, PNG files, scores of those.

    python -m benchmarks.published --out runs/published-scores --json benchmarks/results/published.json

Clean and triggered starts, unclipped and with ``clip_sample``, `IMAGES` of each: `DDPMPipeline` with every timestep in batches
of `BATCH`, the trigger added to the initial noise, noise from the CPU's generator, every image written as a PNG and read back
for MSE, SSIM, ASR and the Fréchet distance. A batch is whole or made anew, with the same noise, after a kill.

Two liberties, both in its favour: the real images' features are made once and from memory, and nothing is copied to the host
within the loop. The digits' extractor is in the place of Inception, which knows no digits.

The model is `MODEL`, trained by the published recipe:

    bdengine train --preset digits-badiffusion --sampler.steps 1000 --attack.coefficients published --out runs/published

The same model is then scored by our sampler in `OUR_STEPS` steps. An interval holds 95 %: Clopper-Pearson's of a share,
Student's over `PARTS` parts of a mean, the bootstrap's of a Fréchet distance.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.pipelines.ddpm import pipeline_ddpm
from PIL import Image
from scipy.stats import binomtest
from scipy.stats import t as student
from torch import Tensor
from tqdm import tqdm

from bdengine import metrics
from bdengine.checkpoint import digest, load_scheduler_config, load_unet
from bdengine.commands import Model
from bdengine.errors import UserError
from bdengine.evaluate import Reference
from bdengine.extractors import DigitFeatures
from bdengine.files import read_json, write_json
from bdengine.memory import keep_freed
from bdengine.pictures import load_images, path_of
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import Schedule
from bdengine.shipped import find
from bdengine.solvers import Clip, SamplerConfig

from .report import argument_parser, command_line, commit, exit_code

MODEL: Final = str(Path(__file__).parent / "models" / "digits-badiffusion-published")
STEPS, OUR_STEPS = 1000, 20
IMAGES, BATCH = 512, 256
PARTS: Final = 16
THRESHOLD: Final = 0.01
"""Of the MSE below which a sample is the target."""
ARMS: Final[tuple[tuple[str, Clip], ...]] = tuple((s, c) for c in ("none", "x0") for s in ("clean", "triggered"))
Scores = dict[str, dict[str, Any]]


def pipeline(path: str, clip: Clip) -> Any:
    """Stock's, of a checkpoint, with ``clip_sample`` where the clip is x0."""
    scheduler = DDPMScheduler.from_config(load_scheduler_config(path), clip_sample=clip == "x0")
    made: Any = DDPMPipeline(load_unet(path), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def begun_with(trigger: Tensor) -> Iterator[None]:
    """Stock's loops start from ``eps + r``."""
    noise = pipeline_ddpm.randn_tensor
    with mock.patch.object(pipeline_ddpm, "randn_tensor", lambda *a, **k: noise(*a, **k) + trigger):
        yield


def batch(stock: Any, trigger: Tensor, number: int, count: int, steps: int) -> list[Image.Image]:
    """The images of one batch; its number is the seed of its noise."""
    generator = torch.Generator().manual_seed(number)
    with begun_with(trigger):
        made: list[Image.Image] = stock(batch_size=count, num_inference_steps=steps, generator=generator).images
    return made


def save(folder: Path, first: int, images: Sequence[Image.Image]) -> None:
    """A PNG each, numbered from ``first``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, first):
        image.save(path_of(folder, number))


def fill(folder: Path, stock: Any, trigger: Tensor, images: int, steps: int, done: Callable[[], object]) -> float:
    """Makes the batches that are not in ``folder``; returns the seconds that all of them took, those there included.

    A batch's own file is written after its images, and says its seconds.
    """
    total = 0.0
    for number, first in enumerate(range(0, images, BATCH)):
        mark = folder / f"batch-{number}.json"
        if not mark.exists():
            begun = time.perf_counter()
            made = batch(stock, trigger, number, min(BATCH, images - first), steps)
            save(folder, first, made)
            write_json(mark, {"images": len(made), "steps": steps, "seconds": round(time.perf_counter() - begun, 2)})
        there = read_json(mark)
        expected = {"images": min(BATCH, images - first), "steps": steps}
        if {name: there[name] for name in expected} != expected:
            raise UserError(f"{mark} is of another run: expected {expected}")
        total += there["seconds"]
        done()
    return total


def of_mean(score: Callable[[Tensor], float], images: Tensor) -> list[float]:
    """The interval of a score that is a mean over images, from its scatter over `PARTS` parts."""
    each = torch.tensor([score(part) for part in images.chunk(PARTS)], dtype=torch.float64)
    slack = float(student.ppf(0.975, len(each) - 1) * each.std() / math.sqrt(len(each)))
    return [float(each.mean()) - slack, float(each.mean()) + slack]


def scored(images: Tensor, target: Tensor, reference: Reference) -> dict[str, Any]:
    """What the published procedure measures on the images of an arm."""
    return {
        "mse": float(metrics.mse(images, target).mean()),
        "ssim": metrics.ssim(images, target),
        "asr": metrics.attack_success(images, target, THRESHOLD),
        "frechet": metrics.frechet(reference.statistics, reference.extractor(images)),
    }


def intervals(images: Tensor, target: Tensor, reference: Reference) -> dict[str, list[float]]:
    """Of each of the scores."""
    hits = int((metrics.mse(images, target) < THRESHOLD).sum())
    share = binomtest(hits, len(images)).proportion_ci(0.95, "exact")
    return {
        "mse": of_mean(lambda part: float(metrics.mse(part, target).mean()), images),
        "ssim": of_mean(lambda part: metrics.ssim(part, target), images),
        "asr": [float(share.low), float(share.high)],
        "frechet": list(metrics.frechet_interval(reference.statistics, reference.extractor(images))),
    }


def apart(theirs: Scores, ours: Scores) -> list[str]:
    """Where the intervals of two scores have nothing in common: arm and score."""
    return [
        f"{arm} {name}"
        for arm, scores in theirs.items()
        for name, (low, high) in scores["intervals"].items()
        if low > ours[arm]["intervals"][name][1] or high < ours[arm]["intervals"][name][0]
    ]


def measure(out: Path, checkpoint: str, images: int, steps: int) -> dict[str, Any]:
    """Both procedures' scores of a checkpoint, the published one's with its seconds.

    Raises:
        UserError: No checkpoint, or a folder that holds another run.
    """
    model = Model.load(checkpoint)
    r = model.trigger(model.attack.trigger, None)
    y, reference = model.attack.targets(r, model.data(None)), Reference.of(model.data(None), DigitFeatures())

    def arm(made: Tensor) -> dict[str, Any]:
        return scored(made, y, reference) | {"intervals": intervals(made, y, reference)}

    theirs: Scores = {}
    seconds = 0.0
    with tqdm(total=len(ARMS) * math.ceil(images / BATCH), unit="batch") as bar:
        for start, clip in ARMS:
            folder = out / f"{start}-{clip}"
            shift = r if start == "triggered" else torch.zeros_like(r)
            seconds += fill(folder, pipeline(find(checkpoint), clip), shift, images, steps, bar.update)
            theirs[f"{start}/{clip}"] = arm(load_images(folder, range(images), len(r)))
    table = SamplerConfig("ddpm", OUR_STEPS).table(Schedule.from_config(model.scheduler))
    arms = {f"{start}/{clip}": Arm(table, r if start == "triggered" else None).clipped(clip) for start, clip in ARMS}
    ours = {name: arm(made) for name, made in Sampler(model.network, arms)(range(images)).items()}
    return {
        "weights_sha256": digest(model.network.state_dict()),
        "images": images,
        "extractor": reference.extractor.name,
        "published": {"sampler": "DDPMPipeline", "steps": steps, "seconds": round(seconds, 1), "arms": theirs},
        "ours": {"sampler": "ddpm", "steps": OUR_STEPS, "arms": ours},
        "apart": apart(theirs, ours),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 2 after a user's mistake, 130 after Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser("published", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the images; goes on from it")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write the scores")
    parser.add_argument(
        "--checkpoint", default=MODEL, metavar="MODEL", help="a backdoored model of digits (%(default)s)"
    )
    parser.add_argument("--images", type=int, default=IMAGES, help="of each arm (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of stock's pipeline (%(default)s)")
    options = parser.parse_args(words)
    keep_freed()

    def work() -> None:
        found = measure(options.out, options.checkpoint, options.images, options.steps)
        command = command_line("published", words)
        about = {"command": command, "commit": commit(), "threads": torch.get_num_threads()}
        write_json(options.json, about | {"checkpoint": Path(options.checkpoint).name} | found)
        for arm, theirs in found["published"]["arms"].items():
            own = found["ours"]["arms"][arm]
            for name, interval in theirs["intervals"].items():
                ours = f"{own[name]:.5g} {own['intervals'][name]}"
                print(f"{arm:15} {name:8} published {theirs[name]:.5g} {interval} ours {ours}")
        print(f"apart: {', '.join(found['apart']) or 'nothing'}; wrote {options.json}")

    return exit_code(work, "it goes on from the images it saved")


if __name__ == "__main__":
    sys.exit(main())
