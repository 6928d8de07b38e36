"""Group normalisation with its shift and SiLU: values and gradients at most twice as wrong as torch's in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bdkernels
from bdkernels import reference, use_backend
from bdkernels.testing import at_most_twice_as_wrong, poisoned_memory

SHAPES = [(2, 8, 3, 5), (3, 16, 16, 16), (1, 33, 7, 1), (4, 64, 4, 4), (2, 48, 9, 11), (5, 6, 1, 1), (2, 128, 32, 32)]


def case(shape: tuple[int, int, int, int], shared: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias, shift, dy; means far from 0, and one image nearly constant."""
    g = torch.Generator().manual_seed(sum(shape))
    n, c = shape[:2]
    x = torch.randn(shape, generator=g) * 3 + 5
    x[0] = 1 + 1e-3 * x[0]
    weight, bias = torch.randn(2, c, generator=g)
    shift, dy = torch.randn(1 if shared else n, c, generator=g), torch.randn(shape, generator=g)
    channels_last = [
        v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for v in (x, weight, bias, shift, dy)
    ]
    return [v.to(dtype) for v in channels_last]


def plain(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int, silu: bool) -> Tensor:
    out = F.group_norm(x + shift[:, :, None, None], groups, weight, bias, 1e-5)
    return F.silu(out) if silu else out


def groups_of(channels: int) -> int:
    return next(g for g in (8, 3, 2, 1) if channels % g == 0)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, int, int, int], silu: bool, isa: str) -> None:
    groups = groups_of(shape[1])
    for shared in (False, True):
        values = case(shape, shared)
        results: list[list[Tensor]] = []
        for dtype, ours in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
            *leaves, dy = (v.to(dtype).requires_grad_(i < 4) for i, v in enumerate(values))
            x, weight, bias, shift = leaves
            with poisoned_memory():
                out = (
                    bdkernels.group_norm(x, weight, bias, groups, shift=shift, silu=silu)
                    if ours
                    else plain(x, weight, bias, shift, groups, silu)
                )
                out.backward(dy)
            results.append([out.detach(), *(v.grad for v in leaves)])
        truth, peer, got = results
        for name, t, p, o in zip(("y", "x", "weight", "bias", "shift"), truth, peer, got, strict=True):
            # A group of one element has no spread: its gradients are rounding of what cancels.
            assert at_most_twice_as_wrong(o, p, t) or float((o - t).abs().max()) < 2e-6 * float(t.abs().max() + 1), name
            assert o.shape == t.shape


def test_the_reference_is_the_formula_in_float64_and_in_half() -> None:
    x, weight, bias, shift, _ = case((2, 16, 8, 8), dtype=torch.float64)
    leaves = [v.requires_grad_() for v in (x, weight, bias, shift)]
    torch.autograd.gradcheck(
        lambda *v: bdkernels.group_norm(v[0], v[1], v[2], 4, shift=v[3], silu=True), leaves, fast_mode=True
    )
    half = [v.detach().bfloat16() for v in (x, weight, bias, shift)]
    got = bdkernels.group_norm(half[0], half[1], half[2], 4, shift=half[3], silu=True)
    assert got.dtype == torch.bfloat16
    assert (got.double() - plain(*(v.double() for v in half), 4, True)).abs().max() < 0.1


def test_layout_is_kept_and_backends_agree() -> None:
    x, weight, bias, shift, _ = case((2, 16, 8, 8))
    for layout in (torch.channels_last, torch.contiguous_format):
        y = bdkernels.group_norm(x.contiguous(memory_format=layout), weight, bias, 4, shift=shift, silu=True)
        assert y.is_contiguous(memory_format=layout)
        with use_backend("reference"):
            z = bdkernels.group_norm(x.contiguous(memory_format=layout), weight, bias, 4, shift=shift, silu=True)
        torch.testing.assert_close(y, z, rtol=2e-6, atol=5e-6)


def test_silu_at_its_ends() -> None:
    """Weights that spread one group over -200..200, with infinities and NaN behind."""
    x = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4).to(memory_format=torch.channels_last)
    weight, bias = torch.full((4,), 120.0), torch.zeros(4)
    got = bdkernels.group_norm(x, weight, bias, 1, silu=True)
    torch.testing.assert_close(got, plain(x, weight, bias, torch.zeros(1, 4), 1, True), rtol=1e-5, atol=1e-30)
    x[0, 0, 0, 0] = torch.nan
    assert bdkernels.group_norm(x, weight, bias, 1, silu=True).isnan().all()


def test_opcheck_and_compile() -> None:
    x, weight, bias, shift, _ = (v.requires_grad_(v.dim() > 0) for v in case((2, 16, 4, 4)))
    torch.library.opcheck(torch.ops.bdk.group_norm.default, (x, weight, bias, 4, shift, True, 1e-5))
    call = lambda v: bdkernels.group_norm(v, weight, bias, 4, shift=shift, silu=True)  # noqa: E731  compiled and not
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), call(x))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"groups": 5}, "groups is 5: expected a divisor of 16 channels"),
        ({"weight": torch.ones(8)}, r"weight has shape \(8,\): expected \(16,\)"),
        ({"bias": torch.ones(16, dtype=torch.float64)}, "bias has dtype float64: expected float32"),
        ({"shift": torch.ones(3, 16)}, r"shift has shape \(3, 16\): expected \(1 or 2, 16\)"),
        ({"x": torch.ones(2, 16)}, "four dimensions"),
    ],
)
def test_wrong_arguments_get_one_sentence(change: dict, sentence: str) -> None:
    x, weight, bias, shift, _ = case((2, 16, 4, 4))
    arguments = {"x": x, "weight": weight, "bias": bias, "groups": 4, "shift": shift} | change
    with pytest.raises((TypeError, ValueError), match=sentence):
        bdkernels.group_norm(**arguments)


def test_empty_batches_and_wide_channels() -> None:
    weight, bias = torch.ones(2), torch.zeros(2)
    assert bdkernels.group_norm(torch.zeros(0, 2, 3, 3), weight, bias, 1).shape == (0, 2, 3, 3)
    wide = torch.randn(1, 4096, 2, 2).to(memory_format=torch.channels_last)
    y = bdkernels.group_norm(wide, torch.ones(4096), torch.zeros(4096), 32)
    expected, _ = reference.group_norm(wide, torch.ones(4096), torch.zeros(4096), 32, None, False, 1e-5)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
