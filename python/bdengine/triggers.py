"""Triggers, masks and targets of the published attacks, to the pixel.

``S`` is the side in pixels, ``vmin`` and ``vmax`` the ends of the value range, grey their middle. Squares are given in
absolute pixels and do not grow with ``S``. Sources, each with its released code: Chou et al. 2023, BadDiffusion; Chou
et al. 2023, VillanDiffusion (the names ``*_BOX``, ``*_BOX_MED``); Chen et al. 2023, TrojDiff (the flush patch); An et
al. 2024, Elijah (the patch colours). Pictures that the authors publish as files are read from the user's copy; the
stand-ins drawn here have names of their own, ``DRAWN_*``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bdengine.data import check_canvas, image_pixels, pillow_mode, read_image, shorter_edge
from bdengine.errors import UserError, unknown

GAP = 2
CORNER = 10
GREY_BACKGROUND = 0.3

_SIDES = {"BIG": 18, "SM": 14, "XSM": 11, "XXSM": 8, "XXXSM": 4}
_GREY_BOXES = {f"BOX_{side}": side for side in _SIDES.values()} | {f"{p}_BOX_MED": side for p, side in _SIDES.items()}
_WHITE_BOXES = {f"{prefix}_BOX": side for prefix, side in _SIDES.items()}
_STOP_SIGNS = {f"STOP_SIGN_{side}": side for side in _SIDES.values()} | {
    f"{prefix}_STOP_SIGN": side for prefix, side in _SIDES.items()
}
_DRAWN_STOP_SIGNS = {f"DRAWN_STOP_SIGN_{side}": side for side in _SIDES.values()}
_COLOURS = {
    "WHITE": (255, 255, 255),
    "BLUE": (0, 161, 254),
    "BROWN": (66, 33, 0),
    "GREEN": (96, 216, 56),
    "LIGHT_BLUE": (30, 229, 206),
    "PURPLE": (238, 95, 167),
    "RED": (255, 99, 77),
    "YELLOW": (249, 226, 49),
}
_PATCHES = tuple(f"PATCH_3_{colour}" for colour in _COLOURS)
_PATCH = re.compile(r"PATCH_(?P<side>[0-9]{1,5})_(?P<colour>[A-Z_]+)")
_CLASS = re.compile(r"CLASS_(?P<label>[0-9]{1,5})")
_STOP_RED = (193, 39, 45)
# Down and right, in pixels, around the edges.
_ROLLED = {"FASHION": (2, 0), "FASHION_EZ": (4, 0), "MNIST": (3, 10), "MNIST_EZ": (3, 10)}
_TRIGGER_FILES = {name: "static/stop_sign_wo_bg.png of BadDiffusion" for name in _STOP_SIGNS} | {
    "GLASSES": "static/glasses.png of BadDiffusion",
    "FASHION": "training image 0 of FashionMNIST",
    "FASHION_EZ": "training image 144 of FashionMNIST",
    "MNIST": "training image 3 of MNIST",
    "MNIST_EZ": "training image 6 of MNIST",
    "UAP_NOISE": "uap.png of UIBDiffusion",
    "IMAGE": "any picture",
}
_TARGET_FILES = {
    "HAT": "static/fedora-hat.png of BadDiffusion",
    "BWHAT": "static/hat.png of VillanDiffusion",
    "CAT": "static/cat_wo_bg.png of BadDiffusion",
    "SHOE": "the first training image of FashionMNIST",
    "MICKEY": "mickey.png of TrojDiff",
    "IMAGE": "any picture",
}

LEARNED = "LEARNED"
"""Name of a trigger that an attack makes itself: it lies beside the checkpoint."""
TRIGGERS = ("NONE", *_GREY_BOXES, *_WHITE_BOXES, *_PATCHES, *_TRIGGER_FILES, *_DRAWN_STOP_SIGNS)
FROM_TRIGGER = ("NOSHIFT", "TRIGGER", "SHIFT")
"""Targets that are made of the trigger."""
TARGETS = ("CORNER", *FROM_TRIGGER, *_TARGET_FILES, "DRAWN_HAT")


def trigger(
    name: str,
    size: int,
    channels: int,
    *,
    value_range: tuple[float, float] = (-1.0, 1.0),
    file: Path | None = None,
) -> Tensor:
    """The trigger image ``r``: what is stamped on an image, or added to the initial noise.

    =========================================  =======================================================================
    ``NONE``                                   ``vmin`` everywhere
    ``BOX_18 .. BOX_4``, ``BIG_BOX_MED ..``    grey square of 18, 14, 11, 8 or 4 px, 2 px from the right and bottom
    ``BIG_BOX .. XXXSM_BOX``                   the same squares in white (``vmax``)
    ``PATCH_<side>_<COLOUR>``                  square of any side in the bottom-right corner, without a gap
    ``STOP_SIGN_18 ..``, ``BIG_STOP_SIGN ..``  ``file``, shorter edge made 18, 14, 11, 8 or 4 px, placed as the boxes
    ``GLASSES``                                ``file``, shorter edge resized to ``int(0.625 S)``, centred
    ``FASHION``, ``FASHION_EZ``                ``file`` over the whole canvas, rolled 2 or 4 px down around the edges
    ``MNIST``, ``MNIST_EZ``                    ``file`` over the whole canvas, rolled 3 px down and 10 to the right
    ``DRAWN_STOP_SIGN_18 ..``                  a red octagon in the place of the stop sign
    ``IMAGE``                                  ``file`` over the whole canvas, resized to S x S whatever its aspect
    ``UAP_NOISE``                              the same
    =========================================  =======================================================================

    Whatever a trigger leaves bare is ``vmin``. White (255) in a file is bare too, but for ``IMAGE``: so black
    is what UIBDiffusion's picture mostly is as released. Of the images of data sets it is the dark that is bare, at
    most ``vmin + 0.3 (vmax - vmin)``, the bound of a target's grey background.

    Args:
        name: One of :data:`TRIGGERS`, or a patch of another side; see the table.
        size: Side ``S`` in pixels.
        channels: 1 or 3; what is only grey, black and white takes any number.
        value_range: ``(vmin, vmax)``; (0, 1) for variance-exploding models.
        file: The picture, for the names that need one.

    Returns:
        float32 ``[channels, S, S]`` in ``[vmin, vmax]``.

    Raises:
        UserError: Unknown name, a trigger that does not fit, a file missing, unreadable or not wanted, a bad range.
    """
    vmin, vmax = _checked_range(value_range)
    check_canvas(size, channels)
    if name in (LEARNED, "INVI"):
        raise UserError(
            f"the trigger {name} is made by an attack: expected invi or uib, or {LEARNED} with a checkpoint of theirs"
        )
    if name not in TRIGGERS and not _PATCH.fullmatch(name):
        raise unknown("trigger", name, TRIGGERS)

    if name in _TRIGGER_FILES:
        drawn = ", or the drawn DRAWN_STOP_SIGN_14" if name == "GLASSES" or name in _STOP_SIGNS else ""
        picture = _picture("trigger", name, file, channels, _TRIGGER_FILES[name] + drawn)
        if name == "IMAGE":
            return _values(_stretched(picture, size), value_range)
        if name == "UAP_NOISE":
            return _bare_where_white(_stretched(picture, size), value_range)
        if name in _ROLLED:
            image = _values(_stretched(picture, size), value_range).roll(_ROLLED[name], dims=(1, 2))
            return image.where(image > _dark(value_range), vmin)
        if name == "GLASSES":
            return _placed(name, _cut_out(picture, max(1, int(0.625 * size)), value_range), size, vmin, gap=None)
        return _placed(name, _cut_out(picture, _STOP_SIGNS[name], value_range), size, vmin, gap=GAP)
    _refuse_file("trigger", name, file)

    if name == "NONE":
        return _plain(channels, size, vmin)
    if name in _GREY_BOXES:
        return _placed(name, _plain(channels, _GREY_BOXES[name], (vmin + vmax) / 2), size, vmin, gap=GAP)
    if name in _WHITE_BOXES:
        return _placed(name, _plain(channels, _WHITE_BOXES[name], vmax), size, vmin, gap=GAP)
    if name in _DRAWN_STOP_SIGNS:
        side = _DRAWN_STOP_SIGNS[name]
        sign = torch.where(_octagon(side), _solid(side, channels, _STOP_RED, value_range), vmin)
        return _placed(name, sign, size, vmin, gap=GAP)
    side, colour = _patch(name, size)
    return _placed(name, _solid(side, channels, colour, value_range), size, vmin, gap=0)


def mask(trigger: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """The mask ``M`` of a stamped trigger: 1 exactly where ``trigger == vmin`` and the image stays, else 0.

    ``R = M * x0 + (1 - M) * trigger`` [Chou et al. 2023, BadDiffusion, released code]. Each channel has its own mask,
    as published, and a black pixel of a trigger counts as bare.

    Args:
        trigger: Floating point ``[C, S, S]`` in ``[vmin, vmax]``.
        value_range: ``(vmin, vmax)``.

    Returns:
        float32 ``[C, S, S]`` of 0 and 1.

    Raises:
        UserError: Wrong shape or type, a NaN, a value out of range, a bad range.
    """
    vmin, _ = _checked_range(value_range)
    _check_image(trigger, value_range)
    return (trigger == vmin).float()


def patch_mask(name: str, size: int, channels: int) -> Tensor:
    """The mask of a patch: 0 inside its square on every channel, 1 outside [Chen et al. 2023, TrojDiff, released code].

    That patch is a region whatever its colour; :func:`mask` would leave out the channels in which a colour is black.

    Args:
        name: ``PATCH_<side>_<COLOUR>``.
        size: Side ``S`` in pixels.
        channels: At least 1.

    Returns:
        float32 ``[channels, S, S]`` of 0 and 1.

    Raises:
        UserError: Another name, or a patch that does not fit.
    """
    check_canvas(size, channels)
    side, _ = _patch(name, size)
    outside = _plain(channels, size, 1.0)
    outside[:, size - side :, size - side :] = 0
    return outside


def target(
    name: str,
    size: int,
    channels: int,
    *,
    trigger: Tensor | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    file: Path | None = None,
) -> Tensor:
    """The target image ``y`` that a triggered sample should turn into.

    ============================  ============================================================
    ``CORNER``                    grey square of 10 px in the top-left corner
    ``NOSHIFT``, ``TRIGGER``      the trigger itself
    ``SHIFT``                     the trigger rolled 3 px up and 5 px to the left, around the edges
    ``HAT BWHAT CAT SHOE``        ``file``, resized to S x S whatever its aspect
    ``MICKEY``, ``IMAGE``         the same without the grey background
    ``DRAWN_HAT``                 a white top hat with a black band, which grows with ``S``
    ``CLASS_<label>``             no image but those of a class: see `class_of`, not made here
    ============================  ============================================================

    Grey background, for all but those two: what is darker than ``vmin + 0.3 (vmax - vmin)`` is set to that value, -0.4
    in [-1, 1] [Chou et al. 2023, BadDiffusion, released code]. Only the band of the drawn hat stays black.

    Args:
        name: One of :data:`TARGETS`.
        size: Side ``S`` in pixels.
        channels: 1 or 3; any number for what reads no file.
        trigger: Floating point ``[channels, S, S]`` in ``[vmin, vmax]``, for the names made from it.
        value_range: ``(vmin, vmax)``.
        file: The picture, for the names that need one.

    Returns:
        float32 ``[channels, S, S]`` in ``[vmin, vmax]``.

    Raises:
        UserError: Unknown name, a canvas too small, a trigger or file missing or bad, a file not wanted, a bad range.
    """
    vmin, vmax = _checked_range(value_range)
    check_canvas(size, channels)
    if class_of(name) is not None:
        raise UserError(
            f"the target {name} is a class of images: expected an attack or an evaluation with labelled data"
        )
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    background = _dark(value_range)

    if name in _TARGET_FILES:
        picture = _picture("target", name, file, channels, _TARGET_FILES[name] + ", or the drawn DRAWN_HAT")
        image = _values(_stretched(picture, size), value_range)
        return image if name in ("MICKEY", "IMAGE") else image.clamp(min=background)
    _refuse_file("target", name, file)

    if name == "DRAWN_HAT":
        return _hat(size, vmax, vmin, background).repeat(channels, 1, 1)
    if name == "CORNER":
        if size < CORNER:
            raise UserError(f"the target CORNER is {CORNER} px wide: expected a size of at least that, not {size}")
        image = _plain(channels, size, background)
        image[:, :CORNER, :CORNER] = (vmin + vmax) / 2
        return image

    if trigger is None:
        raise UserError(f"the target {name} is made from the trigger, but there is none: expected one, or CORNER")
    _check_image(trigger, value_range)
    if tuple(trigger.shape) != (channels, size, size):
        raise UserError(f"the trigger has shape {list(trigger.shape)}: expected {[channels, size, size]}")
    image = trigger.float().clamp(min=background)
    return image.roll((-3, -5), dims=(1, 2)) if name == "SHIFT" else image


def class_of(target: str) -> int | None:
    """The label of a target ``CLASS_<label>``, whose images a data-to-data attack aims at; None for any other name."""
    parts = _CLASS.fullmatch(target)
    return None if parts is None else int(parts["label"])


def _hat(size: int, bright: float, dark: float, background: float) -> Tensor:
    """A top hat with an upturned brim, on a 16 x 16 grid tested at pixel centres: float32 ``[S, S]``."""
    centre = 2 * torch.arange(size) + 1
    x, y = (centre - size).abs() * 8 / size, centre[:, None] * 8 / size
    crown = (x <= 4) & (y >= 2) & (y < 12)
    band = crown & (y >= 10)
    brim = (x <= 6) & (y >= 12) & (y < 14)
    tips = (x > 6) & (x <= 7) & (y >= 11) & (y < 13)
    hat = torch.full((size, size), background, dtype=torch.float32)
    hat[crown | brim | tips] = bright
    hat[band] = dark
    return hat


def _octagon(side: int) -> Tensor:
    """The regular octagon ``max(|x|, |y|) <= 1``, ``|x| + |y| <= sqrt 2`` at pixel centres: bool ``[side, side]``."""
    x = (2 * torch.arange(side) + 1 - side).abs() / side
    return x + x[:, None] <= math.sqrt(2)


def _patch(name: str, size: int) -> tuple[int, tuple[int, int, int]]:
    parts = _PATCH.fullmatch(name)
    if parts is None:
        raise unknown("patch", name, _PATCHES)
    side = int(parts["side"])
    if parts["colour"] not in _COLOURS:
        raise unknown("patch colour", parts["colour"], _COLOURS)
    if not 1 <= side <= size:
        raise UserError(f"the trigger {name} has a side of {side} px: expected 1 to {size}, the size of the image")
    return side, _COLOURS[parts["colour"]]


def _picture(kind: str, name: str, file: Path | None, channels: int, wanted: str) -> Image.Image:
    if file is None:
        option = f"--{kind}-file, of train --attack.{kind}-file"
        raise UserError(f"the {kind} {name} needs a picture: expected its file ({option}) to be {wanted}")
    return read_image(file, channels)


def _refuse_file(kind: str, name: str, file: Path | None) -> None:
    if file is not None:
        raise UserError(f"the {kind} {name} reads no file, but was given {str(file)!r}: expected none, or IMAGE")


def _stretched(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def _values(picture: Image.Image, value_range: tuple[float, float]) -> Tensor:
    """Bytes to the value range, ``(vmin (255 - u) + vmax u) / 255``, exact at both ends: float32 ``[C, H, W]``."""
    vmin, vmax = value_range
    u = image_pixels(picture).double()
    return ((vmin * (255 - u) + vmax * u) / 255).float()


def _cut_out(picture: Image.Image, side: int, value_range: tuple[float, float]) -> Tensor:
    """A picture with its shorter edge resized to ``side`` and its white made ``vmin``: float32 ``[C, H, W]``."""
    return _bare_where_white(shorter_edge(picture, side), value_range)


def _bare_where_white(picture: Image.Image, value_range: tuple[float, float]) -> Tensor:
    return torch.where(image_pixels(picture) == 255, value_range[0], _values(picture, value_range))


def _solid(side: int, channels: int, colour: tuple[int, int, int], value_range: tuple[float, float]) -> Tensor:
    return _values(Image.new("RGB", (side, side), colour).convert(pillow_mode(channels)), value_range)


def _plain(channels: int, side: int, value: float) -> Tensor:
    return torch.full((channels, side, side), value, dtype=torch.float32)


def _placed(name: str, stamp: Tensor, size: int, vmin: float, gap: int | None) -> Tensor:
    """A stamp ``gap`` pixels from the right and bottom edges of an empty canvas, or in its centre for None."""
    channels, height, width = stamp.shape
    needed = max(height, width) + (gap or 0)
    if needed > size:
        raise UserError(
            f"the trigger {name} needs {needed} x {needed} px: expected a size of at least that, not {size}"
        )
    spare = (size - height, size - width)
    top, left = (edge // 2 for edge in spare) if gap is None else (edge - gap for edge in spare)
    canvas = _plain(channels, size, vmin)
    canvas[:, top : top + height, left : left + width] = stamp
    return canvas


def _dark(value_range: tuple[float, float]) -> float:
    """The largest value that counts as background."""
    vmin, vmax = value_range
    return vmin + GREY_BACKGROUND * (vmax - vmin)


def _checked_range(value_range: tuple[float, float]) -> tuple[float, float]:
    vmin, vmax = value_range
    if not (math.isfinite(vmin) and math.isfinite(vmax) and vmin < vmax):
        raise UserError(
            f"value_range is {value_range}: expected two finite numbers in rising order, such as (-1.0, 1.0)"
        )
    return vmin, vmax


def _check_image(image: Tensor, value_range: tuple[float, float]) -> None:
    vmin, vmax = value_range
    if not image.is_floating_point() or image.ndim != 3 or image.shape[1] != image.shape[2]:
        raise UserError(f"the trigger is {image.dtype} {list(image.shape)}: expected floating point [C, S, S]")
    if image.isnan().any():
        raise UserError(f"the trigger holds {int(image.isnan().sum())} NaN: expected values in [{vmin}, {vmax}]")
    if (image < vmin).any() or (image > vmax).any():
        raise UserError(
            f"the trigger spans [{image.min():g}, {image.max():g}]: expected values in [{vmin}, {vmax}]; "
            "rescale it, or name its own value_range"
        )
