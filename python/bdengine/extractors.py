"""What turns images into features: the digit classifier that ships with the package, Inception-v3, or one's own."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bdengine.digits import FEATURES, SHIPPED, load_classifier
from bdengine.errors import UserError

CHUNK = 64
"""Images or feature rows handled at once; Inception's maps take 12 MB an image."""


class Extractor(Protocol):
    """What turns images into features; any object with these three will do.

    Attributes:
        name: Goes into every score of its features: equal names must mean equal features.
    """

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features float [N,D] of images float [N,C,H,W] in [-1,1]."""

    def maps(self, images: Tensor) -> list[Tensor]:
        """Intermediate feature maps, each float [N,C_l,H_l,W_l]; read by :func:`perceptual` alone."""


class DigitFeatures:
    """The penultimate layer of the digit classifier that ships with the package: 32 features, no download."""

    def __init__(self) -> None:
        self.network = load_classifier()
        self.name = f"digits-{FEATURES}-{_fingerprint(SHIPPED)}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N,32], >= 0, of digits as :class:`bdengine.digits.DigitClassifier` takes them."""
        network = self.network.to(images.device)
        return torch.cat([network.features(part) for part in check_images(images).split(CHUNK)])

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """The outputs of its three convolutions."""
        return self.network.to(images.device).maps(check_images(images))


class InceptionFeatures:
    """Inception-v3 of the published FID (2015-12-05, 2048 features of pool3), as torch-fidelity builds it.

    torch-fidelity itself unpickles its weights; here they are read from safetensors alone. Grey images get three
    equal channels, and the network sees bytes, as from a PNG.

    Args:
        weights: torch-fidelity's weights as safetensors.

    Raises:
        UserError: torch-fidelity is not installed, or ``weights`` is missing, is not safetensors or is another network.
    """

    LAYERS = ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c")
    """Modules whose outputs are the maps: the last one at each resolution."""

    def __init__(self, weights: Path) -> None:
        if weights.suffix != ".safetensors" or not weights.is_file():
            raise UserError(
                f"no Inception weights at {weights}: expected a safetensors file, made once from torch-fidelity's "
                "weights-inception-2015-12-05-6726825d.pth by "
                "`safetensors.torch.save_file(torch.load(PTH, weights_only=True), FILE)`"
            )
        try:
            library: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise UserError(
                f"Inception features need torch-fidelity ({error}): "
                "run `pip install torch-fidelity`, or use DigitFeatures for digits"
            ) from error
        try:
            state = load_file(weights)
            # Its constructor loads the weights itself, and unpickles them: this call is the one door to hand it others.
            with mock.patch.object(library, "load_state_dict_from_url", return_value=state):
                self.network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{weights} does not hold the weights of torch-fidelity's Inception-v3") from error
        self.name = f"inception-v3-2048-{_fingerprint(weights)}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N,2048], >= 0, of images float [N,C,H,W] in [-1,1] with C = 1 or 3."""
        network = self.network.to(images.device)
        return torch.cat([network(_rgb_bytes(part))[0] for part in check_images(images).split(CHUNK)])

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """The outputs of :data:`LAYERS`."""
        maps: list[Tensor] = []
        network = self.network.to(images.device)
        hooks = [
            network.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: maps.append(output))
            for layer in self.LAYERS
        ]
        try:
            network(_rgb_bytes(check_images(images)))
        finally:
            for hook in hooks:
                hook.remove()
        return maps


def extractor_of(name: str) -> Extractor:
    """``digits``, or the Inception of a safetensors file of weights.

    Raises:
        UserError: As `InceptionFeatures`.
    """
    return DigitFeatures() if name == "digits" else InceptionFeatures(Path(name))


def check_images(images: Tensor, name: str = "images") -> Tensor:
    """``images`` in float32.

    Raises:
        UserError: They are not float [N,C,H,W], are none, or hold NaN or infinity.
    """
    if images.ndim != 4 or not images.numel():
        raise UserError(f"{name} of shape {list(images.shape)}: expected [N,C,H,W] with at least one image")
    if not images.is_floating_point():
        raise UserError(f"{name} of {images.dtype}: expected float in [-1,1], as bdengine.data.to_float makes of bytes")
    return check_finite(images.float(), name)


def check_finite(x: Tensor, name: str) -> Tensor:
    """``x`` [N,...] itself.

    Raises:
        UserError: It holds NaN or infinity; the first such row is named.
    """
    bad = (~x.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise UserError(f"{name} hold NaN or infinity, first in row {int(bad[0])} of {len(x)}: expected finite numbers")
    return x


def to_unit(x: Tensor) -> Tensor:
    """[-1,1] to [0,1], clamped as a PNG would."""
    return x.clamp(-1, 1) / 2 + 0.5


def _rgb_bytes(images: Tensor) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise UserError(f"images of {images.shape[1]} channels for Inception: expected 1 or 3")
    return (to_unit(images) * 255).round().byte().expand(-1, 3, -1, -1)


def _fingerprint(weights: Path) -> str:
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
