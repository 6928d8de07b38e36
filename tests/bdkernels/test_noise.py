"""The noise contract: known answers, the same bits in NumPy and torch, accuracy over every input, and its statistics.

Statistical tests have fixed seeds; their false-alarm rate is 1e-6 each, so a failure is a fault.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from bdkernels import STREAM_INITIAL, STREAM_STEP, noise, normal, use_backend

FALSE_ALARM = 1e-6


def u32(*words: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([w], np.uint32) for w in words)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Random123's kat_vectors for philox4x32-10."""
    got = noise.philox(u32(*counter), u32(*key))  # type: ignore[arg-type]
    assert tuple(int(w[0]) for w in got) == expected


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 16, 16), (3, 32, 32)])
def test_normals_are_the_same_bits_as_numpy(backend: str, shape: tuple[int, int, int]) -> None:
    seeds = np.array([0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567], np.int64)
    for step, stream in ((0, STREAM_INITIAL), (999, STREAM_STEP), (2**32 - 1, STREAM_STEP)):
        expected = noise.normal(seeds, shape, step, stream)
        with use_backend(backend):
            got = normal(torch.from_numpy(seeds), shape, step=step, stream=stream)
        assert np.array_equal(got.numpy().view(np.int32), expected.view(np.int32))


def test_step_may_differ_by_sample() -> None:
    seeds = torch.tensor([3, 3, 4])
    steps = torch.tensor([0, 7, 7])
    got = normal(seeds, (1, 4, 4), step=steps)
    for i in range(3):
        assert torch.equal(got[i : i + 1], normal(seeds[i : i + 1], (1, 4, 4), step=int(steps[i])))


def test_logarithm_over_every_uniform() -> None:
    """Every float32 in [2^-33, 1]: never above zero; the radius within 5e-7 of float64."""
    first, last = (int(np.float32(v).view(np.int32)) for v in (2.0**-33, 1.0))
    for at in range(first, last + 1, 1 << 24):
        u = np.arange(at, min(at + (1 << 24), last + 1), dtype=np.int32).view(np.float32)
        ln = noise.ln(u)
        assert ln.max() <= 0
        radius = np.sqrt(ln * np.float32(-2))
        assert np.abs(radius - np.sqrt(-2 * np.log(u.astype(np.float64)))).max() < 5e-7


def test_angle_over_a_fine_grid() -> None:
    u = np.concatenate(
        [np.linspace(0, 1, 1 << 23, dtype=np.float32), np.float32(2.0) ** -np.arange(34, dtype=np.float32)]
    )
    cos, sin = noise.cos_sin(u)
    turn = 2 * np.pi * u.astype(np.float64)
    assert max(np.abs(cos - np.cos(turn)).max(), np.abs(sin - np.sin(turn)).max()) < 8e-8


def test_normals_within_a_millionth_of_float64() -> None:
    """Random words, and the largest radii with every angle of a fine grid."""
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 2**32, 1 << 21, dtype=np.uint32) for _ in range(4)]
    words[0][: 1 << 20] = np.arange(1 << 20, dtype=np.uint32) % 64
    z0, z1, z2, z3 = noise.normals(tuple(words))  # type: ignore[arg-type]
    u = [noise.uniform(w).astype(np.float64) for w in words]
    for radius_u, angle_u, cos, sin in ((u[0], u[1], z0, z1), (u[2], u[3], z2, z3)):
        radius = np.sqrt(-2 * np.log(radius_u))
        assert np.abs(cos - radius * np.cos(2 * np.pi * angle_u)).max() < 1e-6
        assert np.abs(sin - radius * np.sin(2 * np.pi * angle_u)).max() < 1e-6
    assert np.abs(z0).max() > 6.5
    assert np.abs(z0).max() <= 6.77


def test_uniform_is_never_zero_and_never_above_one() -> None:
    u = noise.uniform(np.array([0, 1, 2**31, 2**32 - 1], np.uint32))
    assert u[0] == np.float32(2.0**-33)
    assert u[-1] == 1


def draws() -> np.ndarray:
    return normal(torch.arange(3400) * 7919, (3, 32, 32)).numpy()  # 1.04e7


def test_moments_and_kolmogorov_smirnov() -> None:
    z = draws().ravel().astype(np.float64)
    n, limit = len(z), stats.norm.isf(FALSE_ALARM / 2)
    assert n >= 1e7
    assert abs(z.mean()) < limit / np.sqrt(n)
    assert abs(z.var() - 1) < limit * np.sqrt(2 / n)
    assert abs((z**3).mean()) < limit * np.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < limit * np.sqrt(96 / n)
    assert stats.kstest(z, "norm").pvalue > FALSE_ALARM


def test_no_correlation_across_samples_steps_streams_or_elements() -> None:
    """Neighbouring seeds (one bit apart), steps, streams and elements: each product's mean is within its limit of 0."""
    limit = stats.norm.isf(FALSE_ALARM / 2)
    seeds = torch.arange(3400)
    z = normal(seeds, (3, 32, 32), step=5, stream=STREAM_STEP).double()
    others = {
        "next seed": normal(seeds + 1, (3, 32, 32), step=5, stream=STREAM_STEP),
        "high word": normal(seeds + 2**32, (3, 32, 32), step=5, stream=STREAM_STEP),
        "next step": normal(seeds, (3, 32, 32), step=6, stream=STREAM_STEP),
        "next stream": normal(seeds, (3, 32, 32), step=5, stream=STREAM_STEP + 1),
        "next element": z.flatten(1).roll(1, 1).view_as(z),
        "four on": z.flatten(1).roll(4, 1).view_as(z),
    }
    for name, other in others.items():
        for power in (1, 2):
            a, b = z**power - z.pow(power).mean(), other.double() ** power - other.double().pow(power).mean()
            correlation = float((a * b).mean() / (a.std() * b.std()))
            assert abs(correlation) * z.numel() ** 0.5 < limit, (name, power)


def test_sample_seeds_differ_and_reach_every_bit() -> None:
    seeds = noise.sample_seeds(0, np.arange(100_000))
    assert len(np.unique(seeds)) == 100_000
    bits = (seeds[:, None].view(np.uint64) >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    limit = stats.norm.isf(FALSE_ALARM / 128)
    assert np.abs(bits.mean(0) - 0.5).max() < limit * 0.5 / np.sqrt(100_000)
    assert (noise.sample_seeds(1, np.arange(10)) != seeds[:10]).all()
