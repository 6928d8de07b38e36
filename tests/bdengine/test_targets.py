"""Targets against the published geometry, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdengine.errors import UserError
from bdengine.triggers import TARGETS, target, trigger

from .images_for_tests import RANGES, SIZES, equals, picture, published_values, rectangle, sentence


@pytest.mark.parametrize("size", SIZES)
def test_corner(size: int) -> None:
    assert equals(target("CORNER", size, 3), rectangle(size, range(10), range(10), 0, -0.4), 3)
    half = target("CORNER", size, 1, value_range=(0.0, 1.0))
    assert equals(half, rectangle(size, range(10), range(10), 0.5, 0.3), 1)


def test_corner_needs_ten_pixels() -> None:
    with pytest.raises(UserError, match="the target CORNER is 10 px wide: expected a size of at least that, not 9"):
        target("CORNER", 9, 1)


def test_shift_and_noshift_of_box_14() -> None:
    box = trigger("BOX_14", 32, 3)
    kept = box.clone()
    for name in ("NOSHIFT", "TRIGGER"):
        assert equals(target(name, 32, 3, trigger=box), rectangle(32, range(16, 30), range(16, 30), 0, -0.4), 3)
    assert equals(target("SHIFT", 32, 3, trigger=box), rectangle(32, range(13, 27), range(11, 25), 0, -0.4), 3)
    assert torch.equal(box, kept)


def test_shift_goes_around_the_edges() -> None:
    image = torch.full((1, 32, 32), -1.0)
    image[0, 0, 0] = 1
    assert (target("SHIFT", 32, 1, trigger=image) == 1).nonzero().tolist() == [[0, 29, 27]]


def test_targets_made_from_a_trigger_need_one_that_fits() -> None:
    with pytest.raises(
        UserError, match="the target SHIFT is made from the trigger, but there is none: expected one, or"
    ):
        target("SHIFT", 32, 3)
    with pytest.raises(UserError, match=r"the trigger has shape \[3, 16, 16\]: expected \[3, 32, 32\]"):
        target("NOSHIFT", 32, 3, trigger=trigger("BOX_4", 16, 3))


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["HAT", "BWHAT", "CAT", "SHOE", "MICKEY", "IMAGE"])
def test_targets_from_files(name: str, channels: int, value_range: tuple[float, float], tmp_path: Path) -> None:
    vmin, vmax = value_range
    file = picture(tmp_path / "target.png", 50, 70, "RGBA")
    resized = Image.open(file).convert("L" if channels == 1 else "RGB").resize((32, 32), Image.Resampling.BILINEAR)
    expected = published_values(resized, vmin, vmax)
    floor = vmin + 0.3 * (vmax - vmin)
    assert (expected < floor).any()
    if name not in ("MICKEY", "IMAGE"):
        expected[expected <= floor] = floor
    image = target(name, 32, channels, value_range=value_range, file=file)
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-6)


def test_transparency_shows_the_colour_it_hid(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 255, 0)).save(tmp_path / "clear.png")
    assert target("IMAGE", 8, 3, file=tmp_path / "clear.png")[:, 4, 4].tolist() == [1, -1, 1]


def test_a_missing_target_file_names_the_stand_in() -> None:
    with pytest.raises(UserError) as caught:
        target("HAT", 32, 3)
    assert sentence(caught) == (
        "the target HAT needs a picture: expected its file (--target-file, of train --attack.target-file) to be "
        "static/fedora-hat.png of BadDiffusion, or the drawn DRAWN_HAT"
    )


def test_unknown_target() -> None:
    with pytest.raises(UserError, match=r"unknown target 'CORNR': .*; the nearest is 'CORNER'"):
        target("CORNR", 32, 3)


HAT = """
................
................
....########....
....########....
....########....
....########....
....########....
....########....
....########....
....########....
....@@@@@@@@....
.#..@@@@@@@@..#.
.##############.
..############..
................
................
"""


def test_drawn_hat() -> None:
    values = {".": -0.4, "#": 1, "@": -1}
    plane = np.array([[values[mark] for mark in row] for row in HAT.split()], np.float32)
    assert equals(target("DRAWN_HAT", 16, 3), plane, 3)
    assert equals(target("DRAWN_HAT", 32, 1), plane.repeat(2, 0).repeat(2, 1), 1)


@pytest.mark.parametrize("size", [16, 20, 24, 28, 40, 64, 256])
def test_drawn_hat_at_any_size(size: int) -> None:
    hat = target("DRAWN_HAT", size, 3, value_range=(0.0, 1.0))
    assert torch.equal(hat, hat.flip(2))
    assert hat.is_contiguous()
    assert hat.unique().tolist() == [0, np.float32(0.3), 1]
    assert 0.3 < (hat == 1).float().mean() < 0.42


@pytest.mark.parametrize("size", SIZES)
def test_every_target(size: int, tmp_path: Path) -> None:
    file = picture(tmp_path / "picture.png", 51, 52)
    for name in TARGETS:
        needs_file = name not in ("CORNER", "NOSHIFT", "TRIGGER", "SHIFT", "DRAWN_HAT")
        image = target(name, size, 3, trigger=trigger("BOX_4", size, 3), file=file if needs_file else None)
        assert image.shape == (3, size, size)
        assert image.dtype == torch.float32
        assert -1 <= image.min() < image.max() <= 1
