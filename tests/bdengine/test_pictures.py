"""Pictures: every pixel of a grid where it belongs, labels that are there, files that hold the same bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bdengine import pictures
from bdengine.data import read_image, stand_in, to_float, to_uint8
from bdengine.errors import UserError
from bdengine.pictures import INK, film_strip, grid, labelled, load_images, path_of, save_images, save_png


def sample(count: int, channels: int = 1, size: int = 8) -> Tensor:
    return to_float(stand_in(size, channels, count).pixels)


def rgba(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGBA"
    return np.array(image)


def written(image: Image.Image, left: int, top: int, right: int, bottom: int) -> bool:
    """Whether letters, and nothing else, stand in a part of a picture."""
    part = rgba(image.crop((left, top, right, bottom)))
    assert (part[..., :3] == INK).all()
    return bool(part[..., 3].max() > 200)


# Grids


def test_every_pixel_of_a_grey_grid() -> None:
    images = torch.tensor([[[[-1.0, 1], [0, 3]]], [[[1.0, -1], [-9, 1]]], [[[1.0, 1], [1, 1]]]])
    void, black, white, middle = (*INK, 0), (0, 0, 0, 255), (255,) * 4, (128, 128, 128, 255)
    expected = [
        [black, white, void, white, black],
        [middle, white, void, black, white],
        [void] * 5,
        [white, white, void, void, void],
        [white, white, void, void, void],
    ]
    assert rgba(grid(images, columns=2, scale=1)).tolist() == [[list(pixel) for pixel in row] for row in expected]


def test_a_grid_in_colour_at_scale() -> None:
    images = sample(2, channels=3)
    picture = rgba(grid(images, scale=3, gap=2))
    assert picture.shape == (24, 3 * (8 + 2 + 8), 4)
    once = picture[::3, ::3]
    assert np.array_equal(picture, once.repeat(3, 0).repeat(3, 1))
    assert np.array_equal(once[:, :8, :3], to_uint8(images[0]).permute(1, 2, 0).numpy())
    assert np.array_equal(once[:, 10:, :3], to_uint8(images[1]).permute(1, 2, 0).numpy())
    assert (once[..., 3] == 255).sum() == 2 * 64


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(1, 8, (8, 8)), (8, 8, (71, 8)), (9, 8, (71, 17)), (3, 1, (8, 26))]
)
def test_the_size_of_a_grid(count: int, columns: int, size: tuple[int, int]) -> None:
    assert grid(sample(count), columns=columns, scale=1).size == size


def test_images_may_be_strided_half_and_out_of_range() -> None:
    images = sample(4, channels=3)
    plain = rgba(grid(images))
    assert np.array_equal(rgba(grid(images.contiguous(memory_format=torch.channels_last))), plain)
    assert np.array_equal(rgba(grid(images.double())), plain)
    assert np.array_equal(rgba(grid(images.clone().requires_grad_())), plain)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 4, 4), r"images of shape \[0, 1, 4, 4\]: expected \[N, C, S, S\] with N at least 1"),
        (torch.zeros(1, 4, 4), r"images of shape \[1, 4, 4\]"),
        (torch.zeros(1, 1, 4, 5), r"images of shape \[1, 1, 4, 5\]"),
        (torch.zeros(1, 2, 4, 4), "pictures cannot have 2 channels"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "was given torch.uint8"),
        (torch.full((1, 1, 4, 4), float("nan")), "was given 16 NaN"),
    ],
)
def test_what_is_no_images(images: Tensor, message: str, tmp_path: Path) -> None:
    for use in (grid, lambda x: labelled({"x": x}), lambda x: film_strip([x], ["x"])):
        with pytest.raises(UserError, match=message):
            use(images)
    with pytest.raises(UserError, match=message):
        save_images(tmp_path / "out", range(len(images)), images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"scale": 0}, {"gap": -1}])
def test_what_is_no_grid(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected at least 1 column, scale 1 and gap 0"):
        grid(sample(1), **wrong)


# Labels


def test_labelled_rows() -> None:
    rows = {"clean": sample(3), "triggered / latent": -sample(2)}
    picture = labelled(rows, scale=4)
    strips = [grid(images, scale=4) for images in rows.values()]
    left = picture.width - strips[0].width
    assert picture.height == strips[0].height + 4 + strips[1].height
    for strip, top in zip(strips, (0, 36), strict=True):
        part = picture.crop((left, top, left + strip.width, top + strip.height))
        assert np.array_equal(rgba(part), rgba(strip))
        assert written(picture, 0, top, left, top + 32)
    assert not written(picture, 0, 0, left // 2, 32)
    assert written(picture, 0, 36, left // 2, 68)
    with pytest.raises(UserError, match="a picture of no rows"):
        labelled({})


@pytest.mark.parametrize(
    ("size", "labels"), [(16, ["t = 999", "t = 0", "image"]), (4, ["t = 999", "t = 0", "a long one"])]
)
def test_film_strip(size: int, labels: list[str]) -> None:
    frames = [to_float(stand_in(size, 1, 6).pixels[k : k + 2]) for k in range(3)]
    strip = film_strip(frames, labels, scale=4)
    pixels, head = rgba(strip), 2 * pictures.FONT_SIZE
    filled = (pixels[head:, :, 3] == 255).any(0)
    starts = np.flatnonzero(np.diff(filled.astype(int), prepend=0) == 1)
    assert len(starts) == 3
    side = 4 * size
    for frame, start in zip(frames, starts, strict=True):
        for row in range(2):
            picture = rgba(grid(frame[row : row + 1]))
            top = head + row * (strip.height - head - side)
            assert np.array_equal(pixels[top : top + side, start : start + side], picture)
    gaps = starts[1:] - starts[:-1] - side
    assert (gaps > 0).all()
    edges = [0, *(starts[1:] - gaps // 2), strip.width]
    assert all(written(strip, int(a), 0, int(b), head) for a, b in itertools.pairwise(edges))
    for edge in edges[1:-1]:
        assert not written(strip, int(edge) - 1, 0, int(edge) + 1, head)


def test_what_is_no_film() -> None:
    for frames, labels in (([], []), ([sample(1)], ["a", "b"]), ([sample(1), sample(2)], ["a", "b"])):
        with pytest.raises(UserError, match="expected frames of one shape with a label each"):
            film_strip(frames, labels)


# Files


def test_a_png_file_holds_the_picture(tmp_path: Path) -> None:
    picture = labelled({"a": sample(2)})
    save_png(tmp_path / "new" / "a.png", picture)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(rgba(image), rgba(picture))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_survive_their_files(channels: int, tmp_path: Path) -> None:
    images, seeds = sample(3, channels), [7, 0, 12_345_678]
    save_images(tmp_path, seeds, images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000007.png", "12345678.png"]
    assert path_of(tmp_path, 7) == tmp_path / "000007.png"
    with Image.open(path_of(tmp_path, 7)) as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
    assert torch.equal(load_images(tmp_path, seeds, channels), images)
    assert torch.equal(load_images(tmp_path, [0]), images[1:2].expand(1, 3, 8, 8))


def test_seeds_and_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 seeds for 3 images: expected one each"):
        save_images(tmp_path / "out", [0, 1], sample(3))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no seeds to read"):
        load_images(tmp_path, [])
    with pytest.raises(UserError, match=r"cannot read .*000003\.png"):
        load_images(tmp_path, [3])
    save_images(tmp_path, [0], sample(1))
    save_images(tmp_path, [1], sample(1, size=9))
    with pytest.raises(UserError, match="holds images of 2 sizes"):
        load_images(tmp_path, [0, 1])


def test_an_image_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path, [0], sample(1))

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        save_images(tmp_path, [0], -sample(1))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["000000.png"]
    assert read_image(path_of(tmp_path, 0), 1).tobytes() == to_uint8(sample(1)).numpy().tobytes()
