"""Images of many seeds in folders: a PNG file each, or shards of fixed size, as NumPy arrays or as tar files of PNGs.

    shard k holds     seeds k*S .. (k+1)*S - 1, counted in the run's range        S = --shard, so nothing else moves it
    shard-000007.npy  uint8 [n, H, W, C]
    shard-000007.tar  {seed}.png, as WebDataset reads them; dates, owners and order are fixed
    *.sha256          written after its shard, as ``sha256sum -c`` reads it: what has none is not there
    index.json        written when all shards are there

A shard is one file of bytes that depend on its images alone, so the same images make the same folder.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import pictures
from .data import image_pixels, pillow_mode, to_float
from .errors import UserError
from .files import read_json, write_atomic, write_json
from .seeds import Seeds

Format = Literal["png", "npy", "tar"]
MOST_FILES: Final = 10_000_000
"""Of one folder of PNG files."""
MOST_BYTES: Final = 2**31
"""Of one shard, which is held in memory."""
INDEX: Final = "index.json"


class _Parts:
    """Seeds of a folder, cut into parts of ``size`` by their place in the run's range."""

    def __init__(self, folder: Path, seeds: Seeds, size: int) -> None:
        self.folder, self.seeds, self.size = folder, seeds, size

    def __len__(self) -> int:
        return -(-len(self.seeds) // self.size)

    def part(self, k: int) -> Seeds:
        """The seeds of part ``k``."""
        return self.seeds[k * self.size : (k + 1) * self.size]


class PngFiles(_Parts):
    """A folder with a PNG file a seed; its parts are micro-batches.

    Args:
        folder: Made if missing.
        seeds: Of the run.
        size: Seeds of a part.

    Raises:
        UserError: More seeds than a folder takes.
    """

    def __init__(self, folder: Path, seeds: Seeds, size: int) -> None:
        if len(seeds) > MOST_FILES:
            raise UserError(f"{len(seeds):,} images as png: expected at most {MOST_FILES:,}, or --format npy or tar")
        super().__init__(folder, seeds, size)

    def missing(self, k: int) -> int:
        """How many images of part ``k`` are to be made."""
        return sum(not pictures.path_of(self.folder, seed).exists() for seed in self.part(k))

    def there(self, k: int) -> bool:
        """Whether part ``k`` was written."""
        return not self.missing(k)

    def write(self, k: int, pixels: Tensor) -> None:
        """Writes those images of part ``k`` that are missing, of uint8 [n, C, H, W]."""
        for seed, image in zip(self.part(k), to_float(pixels), strict=True):
            if not pictures.path_of(self.folder, seed).exists():
                pictures.save_images(self.folder, [seed], image[None])

    def first(self, count: int) -> Tensor:
        """The first images, float32 [n, C, H, W] in [-1, 1]."""
        return pictures.load_images(self.folder, self.seeds[:count])

    def finish(self, about: Mapping[str, Any]) -> None:
        """Nothing: the files are their own index."""


class Shards(_Parts):
    """A folder of shards; its parts are those.

    Args:
        folder: Made if missing.
        seeds: Of the run.
        size: Seeds of a shard; the last may have fewer.
        form: "npy" or "tar".
        shape: (C, H, W) of an image.

    Raises:
        UserError: A size below 1 or too large for memory, or a tar of images that are neither grey nor RGB.
    """

    def __init__(self, folder: Path, seeds: Seeds, size: int, form: Format, shape: tuple[int, int, int]) -> None:
        most = MOST_BYTES // int(np.prod(shape))
        if not 1 <= size <= most:
            raise UserError(f"a shard of {size} images: expected 1 to {most:,} of this size, such as 4096")
        if form == "tar":
            pillow_mode(shape[0])
        super().__init__(folder, seeds, size)
        self.form, self.shape = form, shape

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Those of a finished run.

        Raises:
            UserError: There is none.
        """
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} has no {INDEX}: expected the folder of a finished run with --format npy or tar")
        index = read_json(folder / INDEX)
        try:
            (height, width, channels), form = index["image"], index["format"]
            return cls(folder, Seeds.parse(index["seeds"]), index["shard"], form, (channels, height, width))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder / INDEX} is no index of shards: expected one that bdengine sample wrote"
            ) from error

    def path(self, k: int) -> Path:
        """The file of shard ``k``."""
        return self.folder / f"shard-{k:06d}.{self.form}"

    def checksum(self, k: int) -> str | None:
        """What shard ``k``'s SHA-256 was when it was written; None where it is not there."""
        path = _seal(self.path(k))
        return path.read_text()[:64] if path.is_file() and self.path(k).is_file() else None

    def missing(self, k: int) -> int:
        """How many images of shard ``k`` are to be made: none, or all. A damaged shard loses its checksum, and this is said."""
        if (expected := self.checksum(k)) is None:
            return len(self.part(k))
        if sha256_of(self.path(k)) == expected:
            return 0
        _seal(self.path(k)).unlink()
        print(f"{self.path(k)} does not match its checksum and is made again")
        return len(self.part(k))

    def there(self, k: int) -> bool:
        """Whether shard ``k`` was written."""
        return self.checksum(k) is not None

    def write(self, k: int, pixels: Tensor) -> None:
        """Writes shard ``k``, then its checksum.

        Args:
            k: Its number.
            pixels: uint8 [n, C, H, W].

        Raises:
            UserError: As `write_atomic`.
        """
        data = _npy(pixels) if self.form == "npy" else _tar(self.part(k), pixels)
        path = self.path(k)
        write_atomic(path, data)
        write_atomic(_seal(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")

    def read(self, k: int) -> Tensor:
        """The images of shard ``k``, uint8 [n, C, H, W].

        Raises:
            UserError: It is missing, or is not what was written.
        """
        path = self.path(k)
        if (expected := self.checksum(k)) is None:
            raise UserError(f"{path} is missing: expected all shards of {self.folder}; the same command makes it again")
        if sha256_of(path) != expected:
            raise UserError(f"{path} does not match its checksum: the command that made it makes it again")
        seeds = self.part(k)
        pixels = _from_npy(path) if self.form == "npy" else _from_tar(path, seeds, self.shape[0])
        if pixels.shape != (len(seeds), *self.shape):
            raise UserError(
                f"{path} holds {list(pixels.shape)}: expected {[len(seeds), *self.shape]}, as its index says"
            )
        return pixels

    def first(self, count: int) -> Tensor:
        """The first images, those of the first shard at most, float32 [n, C, H, W] in [-1, 1]."""
        return to_float(self.read(0)[:count])

    def finish(self, about: Mapping[str, Any]) -> None:
        """Writes the index.

        Args:
            about: How the images were made, of JSON types.

        Raises:
            UserError: Shards are missing.
        """
        shards = []
        for k in range(len(self)):
            if (digest := self.checksum(k)) is None:
                raise UserError(f"{self.path(k)} is missing: expected all shards; the same command makes it again")
            shards.append({"file": self.path(k).name, "seeds": str(self.part(k)), "sha256": digest})
        channels, height, width = self.shape
        index = {
            "format": self.form,
            "image": [height, width, channels],
            "images": len(self.seeds),
            "seeds": str(self.seeds),
            "shard": self.size,
            **about,
            "shards": shards,
        }
        write_json(self.folder / INDEX, index)

    def export(self, seeds: Seeds, out: Path) -> None:
        """Writes the images of ``seeds`` as PNG files, as ``--format png`` would have.

        Raises:
            UserError: A seed that is not there, or a shard that is missing or damaged; or as `write_atomic`.
        """
        self.seeds.require(seeds)
        held, pixels = -1, torch.empty(0)
        for seed in seeds:
            k, row = divmod(self.seeds.place(seed), self.size)
            if k != held:
                held, pixels = k, self.read(k)
            pictures.save_images(out, [seed], to_float(pixels[row])[None])


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _npy(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    array = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _tar(seeds: Seeds, pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for seed, image in zip(seeds, pictures.of_images(to_float(pixels)), strict=True):
            data = pictures.png_bytes(image)
            member = tarfile.TarInfo(f"{seed}.png")  # its date and its owner are 0
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _from_npy(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False)).permute(0, 3, 1, 2)


def _from_tar(path: Path, seeds: Seeds, channels: int) -> Tensor:
    images = []
    with tarfile.open(path, "r:") as tar:
        for seed, member in zip(seeds, tar, strict=True):
            file = tar.extractfile(member)
            if member.name != f"{seed}.png" or file is None:
                raise UserError(f"{path} holds {member.name}: expected {seed}.png, as its index says")
            images.append(image_pixels(Image.open(file, formats=("PNG",)).convert(pillow_mode(channels))))
    return torch.stack(images)
