"""Pictures and planes of pixels, made without the code under test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bdengine.errors import UserError

RANGES = [(-1.0, 1.0), (0.0, 1.0)]
SIZES = [16, 32, 64, 256]


def sentence(caught: pytest.ExceptionInfo[UserError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert ". " not in text
    return text


def rectangle(size: int, rows: range, columns: range, inside: float, outside: float) -> np.ndarray:
    image = np.full((size, size), outside, np.float32)
    for row in rows:
        for column in columns:
            image[row, column] = inside
    return image


def equals(image: Tensor, plane: np.ndarray, channels: int) -> bool:
    return image.dtype == torch.float32 and np.array_equal(image.numpy(), np.stack([plane] * channels))


def picture(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    values[: height // 3] = 255
    Image.fromarray(values.squeeze(), mode).save(path)
    return path


def published_values(image: Image.Image, vmin: float, vmax: float) -> np.ndarray:
    unit = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1) / 255
    return unit * (vmax - vmin) + vmin
