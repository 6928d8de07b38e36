"""Images as pictures to look at: grids, labelled rows, film strips, and PNG files that are whole or absent.

Images are floating point ``[N, C, S, S]`` in [-1, 1] (values outside are clamped), ``C`` 1 for grey or 3 for RGB, on
any device. Pictures are RGBA: what is no pixel of an image is transparent, and labels are a grey that reads on white
and on black, so one file serves light and dark pages.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bdengine.data import image_pixels, pillow_mode, read_image, to_float, to_uint8
from bdengine.errors import UserError
from bdengine.files import write_atomic

INK = (119, 119, 119)
"""Colour of labels: a contrast of 4 to 1 with white, and with the near-black of dark pages."""
FONT_SIZE = 16
"""Height of labels in pixels of the picture, whatever its scale."""


def grid(images: Tensor, columns: int = 8, scale: int = 4, gap: int = 1) -> Image.Image:
    """Images side by side, row by row.

    Args:
        images: float [N,C,S,S].
        columns: Images in a row; fewer images make a narrower picture.
        scale: Side of the square that one pixel becomes.
        gap: Pixels between images, scaled like those of the images.

    Returns:
        RGBA, ``scale * (k * (S + gap) - gap)`` wide and high for k columns and k rows.

    Raises:
        UserError: No images, another shape or channel number, NaN, integers, ``columns`` or ``scale`` below 1, or a
            negative ``gap``.
    """
    pictures = of_images(images)
    if min(columns, scale) < 1 or gap < 0:
        raise UserError(
            f"a grid of {columns} columns, scale {scale} and gap {gap}: expected at least 1 column, scale 1 and gap 0"
        )
    columns = min(columns, len(pictures))
    pitch = pictures[0].width + gap
    size = (columns * pitch - gap, math.ceil(len(pictures) / columns) * pitch - gap)
    sheet = _blank(*size)
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * pitch, k // columns * pitch))
    return sheet.resize((scale * sheet.width, scale * sheet.height), Image.Resampling.NEAREST)


def labelled(rows: Mapping[str, Tensor], scale: int = 4) -> Image.Image:
    """One row of images an entry, its name to the left; rows of equal image size line up.

    Args:
        rows: Name to float [N,C,S,S]; N, C and S may differ.
        scale: As :func:`grid`.

    Returns:
        RGBA.

    Raises:
        UserError: As :func:`grid`, or no rows.
    """
    if not rows:
        raise UserError("a picture of no rows: expected at least one name with its images")
    strips = [grid(images, columns=len(images), scale=scale) for images in rows.values()]
    font = _font()
    margin = max(math.ceil(font.getlength(name)) for name in rows) + FONT_SIZE
    sheet = _blank(margin + max(strip.width for strip in strips), sum(strip.height + scale for strip in strips) - scale)
    draw, top = ImageDraw.Draw(sheet), 0
    for name, strip in zip(rows, strips, strict=True):
        draw.text((margin - FONT_SIZE / 2, top + strip.height / 2), name, INK, font, anchor="rm")
        sheet.paste(strip, (margin, top))
        top += strip.height + scale
    return sheet


def film_strip(frames: Sequence[Tensor], labels: Sequence[str], scale: int = 4) -> Image.Image:
    """Samples on their way: one row a sample, one column a frame, a label over each column.

    Args:
        frames: float [N,C,S,S] each, the same N samples in the same order.
        labels: One a frame, such as ``"t = 999"``; columns move apart where labels are wider than images.
        scale: As :func:`grid`.

    Returns:
        RGBA.

    Raises:
        UserError: As :func:`grid`, no frames, frames of different shapes, or another number of labels.
    """
    shapes = sorted({tuple(frame.shape) for frame in frames})
    if len(shapes) != 1 or len(labels) != len(frames):
        raise UserError(
            f"a film strip of {len(frames)} frames of shape {', '.join(str(list(shape)) for shape in shapes)} "
            f"with {len(labels)} labels: expected frames of one shape with a label each"
        )
    font = _font()
    side = scale * shapes[0][-1]
    widest = max(math.ceil(font.getlength(label)) for label in labels)
    gap = max(1, math.ceil((widest + FONT_SIZE / 2 - side) / scale))
    body = grid(torch.stack(list(frames), 1).flatten(0, 1), columns=len(frames), scale=scale, gap=gap)
    overhang = max(0, math.ceil((widest - side) / 2))
    sheet = _blank(body.width + 2 * overhang, body.height + 2 * FONT_SIZE)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        draw.text((overhang + column * (side + scale * gap) + side / 2, FONT_SIZE), label, INK, font, anchor="mm")
    sheet.paste(body, (overhang, 2 * FONT_SIZE))
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """The bytes of ``image`` as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_png(path: Path, image: Image.Image) -> None:
    """Writes ``image`` as a PNG file, whole or not at all.

    Raises:
        UserError: As :func:`bdengine.files.write_atomic`.
    """
    write_atomic(path, png_bytes(image))


def path_of(folder: Path, seed: int) -> Path:
    """Where :func:`save_images` puts the image of a seed: ``folder/000042.png``."""
    return Path(folder) / f"{seed:06d}.png"


def save_images(folder: Path, seeds: Sequence[int], images: Tensor) -> None:
    """Writes each image, pixel for pixel, as an 8-bit grey or RGB PNG file named by its seed; each whole or not at all.

    Args:
        folder: Where to; made if missing.
        seeds: One an image, at least 0.
        images: float [N,C,S,S].

    Raises:
        UserError: As :func:`grid` and :func:`save_png`, or another number of seeds; nothing is written but for an
            error of the system.
    """
    pictures = of_images(images)
    if len(seeds) != len(pictures):
        raise UserError(f"{len(seeds)} seeds for {len(pictures)} images: expected one each")
    for seed, picture in zip(seeds, pictures, strict=True):
        save_png(path_of(folder, seed), picture)


def load_images(folder: Path, seeds: Sequence[int], channels: int = 3) -> Tensor:
    """Reads what :func:`save_images` wrote.

    Args:
        folder: Where from.
        seeds: At least one; the images come in their order.
        channels: 1 (grey) or 3 (RGB; grey files are repeated).

    Returns:
        float32 [N,channels,S,S] in [-1,1].

    Raises:
        UserError: No seeds, a missing or broken file, or files of different sizes.
    """
    if not seeds:
        raise UserError(f"no seeds to read from {str(folder)!r}: expected at least one")
    pixels = [image_pixels(read_image(path_of(folder, seed), channels)) for seed in seeds]
    sizes = {tuple(image.shape) for image in pixels}
    if len(sizes) != 1:
        raise UserError(f"{str(folder)!r} holds images of {len(sizes)} sizes: expected one, as a run writes them")
    return to_float(torch.stack(pixels))


def of_images(images: Tensor) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[2] != images.shape[3] or 0 in images.shape:
        raise UserError(f"images of shape {list(images.shape)}: expected [N, C, S, S] with N at least 1")
    pillow_mode(images.shape[1])
    return [Image.fromarray(pixels.squeeze(-1).numpy()) for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu()]


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _blank(width: int, height: int) -> Image.Image:
    # In the ink's colour, of which nothing shows but the soft edges of letters.
    return Image.new("RGBA", (width, height), (*INK, 0))
