"""Triggers and masks against the published geometry, pixel by pixel."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bdengine.errors import UserError
from bdengine.triggers import TARGETS, TRIGGERS, mask, patch_mask, target, trigger

from .images_for_tests import RANGES, SIZES, equals, picture, published_values, rectangle, sentence

FILES = ("GLASSES", "IMAGE", "UAP_NOISE", "FASHION", "FASHION_EZ", "MNIST", "MNIST_EZ")
BOXES = {18: "BIG", 14: "SM", 11: "XSM", 8: "XXSM", 4: "XXXSM"}


# Triggers


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", BOXES)
def test_boxes(side: int, size: int, value_range: tuple[float, float]) -> None:
    vmin, vmax = value_range
    if side + 2 > size:
        with pytest.raises(UserError) as caught:
            trigger(f"BOX_{side}", size, 3)
        assert (
            sentence(caught)
            == f"the trigger BOX_{side} needs {side + 2} x {side + 2} px: expected a size of at least that, not {size}"
        )
        return
    span = range(size - side - 2, size - 2)
    grey = rectangle(size, span, span, (vmin + vmax) / 2, vmin)
    white = rectangle(size, span, span, vmax, vmin)
    for channels in (1, 3):
        assert equals(trigger(f"BOX_{side}", size, channels, value_range=value_range), grey, channels)
        assert equals(trigger(f"{BOXES[side]}_BOX_MED", size, channels, value_range=value_range), grey, channels)
        assert equals(trigger(f"{BOXES[side]}_BOX", size, channels, value_range=value_range), white, channels)


def test_box_14_golden() -> None:
    image = trigger("BOX_14", 32, 3)
    active = (image != -1).nonzero()
    assert len(active) == 3 * 14 * 14
    assert active.amin(0).tolist() == [0, 16, 16]
    assert active.amax(0).tolist() == [2, 29, 29]
    assert image[image != -1].unique().tolist() == [0.0]
    assert (trigger("BOX_14", 16, 1)[0] == 0).nonzero().amax(0).tolist() == [13, 13]


def test_a_box_that_just_fits() -> None:
    assert (trigger("BOX_18", 20, 1)[0] == 0).nonzero().amin(0).tolist() == [0, 0]
    with pytest.raises(UserError, match="needs 20 x 20 px"):
        trigger("BOX_18", 19, 1)


@pytest.mark.parametrize("value_range", RANGES)
def test_none_is_vmin(value_range: tuple[float, float]) -> None:
    assert equals(trigger("NONE", 16, 3, value_range=value_range), np.full((16, 16), value_range[0], np.float32), 3)


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_flush(size: int) -> None:
    white = rectangle(size, range(size - 3, size), range(size - 3, size), 1, -1)
    assert equals(trigger("PATCH_3_WHITE", size, 3), white, 3)
    assert equals(trigger("PATCH_3_WHITE", size, 1), white, 1)
    blue = trigger("PATCH_6_BLUE", size, 3)
    assert blue[:, -6:, -6:].flatten(1).unique(dim=1)[:, 0].tolist() == [
        np.float32(v) for v in (-1, (2 * 161 - 255) / 255, (2 * 254 - 255) / 255)
    ]
    assert (blue[:, : size - 6] == -1).all()
    assert (blue[:, :, : size - 6] == -1).all()


@pytest.mark.parametrize(
    ("colour", "rgb"),
    {
        "BROWN": (66, 33, 0),
        "GREEN": (96, 216, 56),
        "LIGHT_BLUE": (30, 229, 206),
        "PURPLE": (238, 95, 167),
        "RED": (255, 99, 77),
        "YELLOW": (249, 226, 49),
    }.items(),
)
def test_patch_colours(colour: str, rgb: tuple[int, int, int]) -> None:
    assert (trigger(f"PATCH_1_{colour}", 16, 3)[:, 15, 15] * 127.5 + 127.5).round().int().tolist() == list(rgb)
    grey = (trigger(f"PATCH_1_{colour}", 16, 1)[0, 15, 15] * 127.5 + 127.5).item()
    assert grey == pytest.approx(np.dot(rgb, (0.299, 0.587, 0.114)), abs=0.51)


def test_a_patch_may_fill_the_image() -> None:
    assert (trigger("PATCH_32_WHITE", 32, 3) == 1).all()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("BOX_13", "the nearest is 'BOX_1"),
        ("PATCH_3_WHITE9", "unknown trigger 'PATCH_3_WHITE9': .*; the nearest is 'PATCH_3_WHITE'"),
        ("STOP_SIGN14", "the nearest is 'STOP_SIGN_14'"),
        ("PATCH_3_PURPEL", "unknown patch colour 'PURPEL': expected one of BLUE, .*; the nearest is 'PURPLE'"),
        ("PATCH_0_WHITE", "has a side of 0 px: expected 1 to 32, the size of the image"),
        ("PATCH_33_WHITE", "has a side of 33 px: expected 1 to 32, the size of the image"),
    ],
)
def test_unknown_triggers(name: str, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        trigger(name, 32, 3)
    sentence(caught)


@pytest.mark.parametrize(("size", "value_range"), list(zip(SIZES, RANGES * 2, strict=True)))
def test_every_trigger(size: int, value_range: tuple[float, float], tmp_path: Path) -> None:
    file = picture(tmp_path / "picture.png", 99, 97)
    fitted = 0
    for name in TRIGGERS:
        needs_file = ("SIGN" in name and "DRAWN" not in name) or name in FILES
        try:
            image = trigger(name, size, 3, value_range=value_range, file=file if needs_file else None)
        except UserError as error:
            assert "expected a size of at least that" in str(error)  # noqa: PT017
            assert size == 16
            continue
        fitted += 1
        assert image.shape == (3, size, size)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert value_range[0] <= image.min() <= image.max() <= value_range[1]
        assert (name == "NONE") == bool((image == value_range[0]).all())
    assert fitted == (len(TRIGGERS) if size > 16 else len(TRIGGERS) - 6)


def test_names_are_unique() -> None:
    assert len(set(TRIGGERS)) == len(TRIGGERS)
    assert len(set(TARGETS)) == len(TARGETS)


# Triggers from files


@pytest.fixture(scope="module")
def sign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture(tmp_path_factory.mktemp("signs") / "sign.png", 999, 997, "RGBA")


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "side"), [("STOP_SIGN_14", 14), ("SM_STOP_SIGN", 14), ("BIG_STOP_SIGN", 18)])
def test_stop_sign(name: str, side: int, channels: int, value_range: tuple[float, float], sign: Path) -> None:
    vmin, vmax = value_range
    stamp = Image.open(sign).convert("L" if channels == 1 else "RGB").resize((side, side), Image.Resampling.BILINEAR)
    values = published_values(stamp, vmin, vmax)
    values[values >= 0.999] = vmin
    expected = np.full((channels, 32, 32), vmin)
    expected[:, 30 - side : 30, 30 - side : 30] = values

    image = trigger(name, 32, channels, value_range=value_range, file=sign)
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-6)
    assert np.array_equal(mask(image, value_range).numpy() == 1, expected == vmin)
    assert 0 < mask(image, value_range).mean() < 1


def test_white_of_a_sign_is_bare_in_each_channel_alone(tmp_path: Path) -> None:
    Image.new("RGB", (14, 14), (255, 254, 0)).save(tmp_path / "sign.png")
    image = trigger("STOP_SIGN_14", 32, 3, file=tmp_path / "sign.png")
    assert image[:, 20, 20].tolist() == [-1, np.float32((2 * 254 - 255) / 255), -1]
    assert mask(image)[:, 20, 20].tolist() == [1, 0, 1]


def test_a_wide_sign_keeps_its_shape_and_the_gap(tmp_path: Path) -> None:
    Image.new("RGB", (41, 20), (90, 90, 90)).save(tmp_path / "wide.png")
    active = (trigger("STOP_SIGN_14", 32, 3, file=tmp_path / "wide.png")[0] != -1).nonzero()
    assert active.amin(0).tolist() == [16, 30 - int(14 * 41 / 20)]
    assert active.amax(0).tolist() == [29, 29]
    with pytest.raises(UserError, match=r"the trigger STOP_SIGN_14 needs 30 x 30 px: expected .* not 28"):
        trigger("STOP_SIGN_14", 28, 3, file=tmp_path / "wide.png")


@pytest.mark.parametrize(("size", "first", "last"), [(32, 6, 25), (256, 48, 207), (16, 3, 12), (17, 3, 12)])
def test_glasses_are_centred(size: int, first: int, last: int, tmp_path: Path) -> None:
    Image.new("RGB", (512, 512), (0, 90, 254)).save(tmp_path / "glasses.png")
    image = trigger("GLASSES", size, 3, file=tmp_path / "glasses.png")
    active = (image[2] != -1).nonzero()
    assert active.amin(0).tolist() == [first, first]
    assert active.amax(0).tolist() == [last, last]


def test_image_covers_the_canvas_and_keeps_its_white(tmp_path: Path) -> None:
    file = picture(tmp_path / "any.png", 40, 60)
    resized = Image.open(file).resize((16, 16), Image.Resampling.BILINEAR)
    image = trigger("IMAGE", 16, 3, file=file)
    np.testing.assert_allclose(image.numpy(), published_values(resized, -1, 1), atol=1e-6)
    assert (image[:, 0] == 1).all()


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize(
    ("name", "down", "right"), [("FASHION", 2, 0), ("FASHION_EZ", 4, 0), ("MNIST", 3, 10), ("MNIST_EZ", 3, 10)]
)
def test_images_of_data_sets_roll_and_their_dark_is_bare(
    name: str, down: int, right: int, value_range: tuple[float, float], tmp_path: Path
) -> None:
    vmin, vmax = value_range
    pixels = np.zeros((32, 32), np.uint8)
    pixels[30, 28:31] = 76, 77, 255  # 0.3 of white is 76.5
    Image.fromarray(pixels).save(tmp_path / "one.png")
    image = trigger(name, 32, 1, value_range=value_range, file=tmp_path / "one.png")[0]
    row, columns = (30 + down) % 32, [(28 + k + right) % 32 for k in range(3)]
    assert image[row, columns].tolist() == pytest.approx([vmin, vmin + (vmax - vmin) * 77 / 255, vmax])
    assert (image != vmin).sum() == 2


@pytest.mark.parametrize("name", ["LEARNED", "INVI"])
def test_learned_triggers_are_made_by_attacks(name: str) -> None:
    with pytest.raises(UserError, match=f"the trigger {name} is made by an attack: expected invi or uib"):
        trigger(name, 32, 1)


@pytest.mark.parametrize("name", ["STOP_SIGN_14", "GLASSES"])
def test_a_missing_file_names_the_stand_in(name: str) -> None:
    with pytest.raises(UserError) as caught:
        trigger(name, 32, 3)
    text = sentence(caught)
    assert text.startswith(f"the trigger {name} needs a picture: expected its file (--trigger-file, of train ")
    assert text.endswith("or the drawn DRAWN_STOP_SIGN_14")
    assert "DRAWN_STOP_SIGN_14" in TRIGGERS


def test_what_no_stand_in_replaces_has_none() -> None:
    with pytest.raises(UserError, match=r"to be training image 3 of MNIST$"):
        trigger("MNIST", 32, 3)


def test_a_file_that_would_be_ignored(tmp_path: Path) -> None:
    for make, name in ((trigger, "BOX_14"), (target, "CORNER")):
        with pytest.raises(UserError, match=rf"{name} reads no file, but was given '.*a.png': expected none, or IMAGE"):
            make(name, 32, 3, file=tmp_path / "a.png")


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read '.*none.png' \(No such file or directory\): expected a whole"):
        trigger("IMAGE", 32, 3, file=tmp_path / "none.png")


def test_pictures_have_one_or_three_channels(tmp_path: Path) -> None:
    for name, file in (("IMAGE", picture(tmp_path / "a.png", 9, 9)), ("PATCH_3_RED", None)):
        with pytest.raises(UserError, match=r"pictures cannot have 4 channels: expected 1 \(grey\) or 3 \(RGB\)"):
            trigger(name, 32, 4, file=file)
    assert trigger("BOX_14", 32, 4).shape == (4, 32, 32)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_named_png_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "evil.png").write_bytes(pickle.dumps(_Bomb(tmp_path / "gone_off")))
    for make in (trigger, target):
        with pytest.raises(UserError, match=r"evil.png' \(cannot identify image file") as caught:
            make("IMAGE", 32, 3, file=tmp_path / "evil.png")
        sentence(caught)
    assert not (tmp_path / "gone_off").exists()


def test_drawn_stop_sign() -> None:
    image = trigger("DRAWN_STOP_SIGN_14", 32, 3)
    covered = mask(image)[0] == 0
    assert (mask(image) == mask(image)[:1]).all()
    assert covered.nonzero().amin(0).tolist() == [16, 16]
    assert covered.nonzero().amax(0).tolist() == [29, 29]
    assert covered.sum() == 14 * 14 - 4 * (1 + 2 + 3 + 4)
    assert (covered == covered.T).all()
    red, green, blue = image[:, 22, 22].tolist()
    assert red > 0 > max(green, blue) > -1
    assert (mask(trigger("DRAWN_STOP_SIGN_4", 16, 1)) == 0).sum() == 12


# Masks


@pytest.mark.parametrize("value_range", [*RANGES, (0.1, 0.7)])
def test_mask_is_one_where_the_trigger_is_bare(value_range: tuple[float, float]) -> None:
    expected = rectangle(32, range(16, 30), range(16, 30), 0, 1)
    assert equals(mask(trigger("BOX_14", 32, 3, value_range=value_range), value_range), expected, 3)
    assert (mask(trigger("NONE", 32, 3, value_range=value_range), value_range) == 1).all()


def test_mask_is_per_channel_and_patch_mask_is_not() -> None:
    assert mask(trigger("PATCH_3_BLUE", 32, 3))[:, 31, 31].tolist() == [1, 0, 0]
    region = rectangle(32, range(29, 32), range(29, 32), 0, 1)
    assert equals(patch_mask("PATCH_3_BLUE", 32, 3), region, 3)
    with pytest.raises(UserError, match="unknown patch 'BOX_4': expected one of PATCH_3_BLUE"):
        patch_mask("BOX_4", 32, 3)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (torch.full((3, 8, 8), float("nan")), r"the trigger holds 192 NaN: expected values in \[-1.0, 1.0\]"),
        (torch.full((3, 8, 8), 255.0), r"the trigger spans \[255, 255\]: expected values in \[-1.0, 1.0\]; rescale"),
        (torch.full((3, 8, 8), -float("inf")), r"the trigger spans \[-inf, -inf\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"the trigger is torch.uint8 \[3, 8, 8\]: expected floating point"),
        (torch.zeros(8, 8), r"the trigger is torch.float32 \[8, 8\]: expected floating point \[C, S, S\]"),
        (torch.zeros(3, 8, 9), r"\[3, 8, 9\]"),
    ],
)
def test_bad_trigger_tensors(image: Tensor, text: str) -> None:
    with pytest.raises(UserError, match=text):
        mask(image)
    with pytest.raises(UserError, match=text):
        target("SHIFT", 8, 3, trigger=image)


@pytest.mark.parametrize("value_range", [(1.0, -1.0), (0.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_bad_value_ranges(value_range: tuple[float, float]) -> None:
    for make in (
        lambda: trigger("BOX_4", 16, 1, value_range=value_range),
        lambda: target("CORNER", 16, 1, value_range=value_range),
        lambda: mask(torch.zeros(1, 4, 4), value_range),
    ):
        with pytest.raises(UserError, match=r"value_range is .* expected two finite numbers in rising order"):
            make()


@pytest.mark.parametrize(("size", "channels"), [(0, 3), (-4, 3), (32, 0)])
def test_empty_canvases(size: int, channels: int) -> None:
    for make, name in ((trigger, "NONE"), (target, "CORNER")):
        with pytest.raises(UserError, match="expected at least 1 of each"):
            make(name, size, channels)


def test_uibs_picture_is_black_where_its_file_is_white(tmp_path: Path) -> None:
    """As released; the same file as IMAGE stays as it is."""
    pixels = np.array([[0, 255], [128, 254]], np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels).save(tmp_path / "uap.png")
    r, plain = (trigger(name, 8, 1, file=tmp_path / "uap.png") for name in ("UAP_NOISE", "IMAGE"))
    assert r[0, ::4, ::4].flatten().tolist() == pytest.approx([-1, -1, 2 * 128 / 255 - 1, 2 * 254 / 255 - 1])
    assert plain[0, 0, 4] == 1
