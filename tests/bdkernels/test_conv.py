"""The 3 x 3 convolution: values and gradients at most twice as wrong as torch's, and bits that depend on nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bdkernels
from bdkernels import use_backend
from bdkernels.testing import at_most_twice_as_wrong, poisoned_memory

CASES = [
    # samples, channels, filters, height, width, upsample
    (8, 16, 16, 8, 8, False),
    (9, 32, 48, 7, 9, False),
    (2, 96, 64, 17, 16, False),
    (130, 64, 80, 1, 3, False),
    (40, 48, 16, 3, 5, True),
    (3, 80, 96, 8, 8, True),
    (70, 128, 32, 4, 4, False),
    (1, 16, 32, 4, 150, False),
    (3, 32, 32, 2, 2, False),  # too few tiles for the weight's gradient
]
Case = tuple[int, int, int, int, int, bool]


def tensors(case: Case, seed: int = 0) -> list[Tensor]:
    """x, weight, bias, skip, dy, channels-last."""
    n, c, k, h, w, upsample = case
    g = torch.Generator().manual_seed(sum(case) + seed)
    s = 2 if upsample else 1
    weight = torch.randn(k, c, 3, 3, generator=g) / (9 * c) ** 0.5
    x, skip, dy = (torch.randn(n, *rest, generator=g) for rest in ((c, h, w), *[(k, s * h, s * w)] * 2))
    x, weight, skip, dy = (v.to(memory_format=torch.channels_last) for v in (x, weight, skip, dy))
    return [x + 0.5, weight, torch.randn(k, generator=g), skip, dy]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, upsample: bool) -> Tensor:
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    out = F.conv2d(x, weight, bias, padding=1)
    return out if skip is None else out + skip


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, upsample: bool) -> Tensor:
    return bdkernels.conv3x3(x, weight, bias, skip=skip, upsample=upsample)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: Case, isa: str) -> None:
    values, results = tensors(case), []
    for dtype, function in ((torch.float64, plain), (torch.float32, plain), (torch.float32, ours)):
        *leaves, dy = (v.to(dtype).requires_grad_(i < 4) for i, v in enumerate(values))
        with poisoned_memory():
            out = function(*leaves, case[-1])
            out.backward(dy)
        results.append([out.detach(), *(v.grad for v in leaves)])
    truth, peer, got = results
    for name, t, p, o in zip(("y", "x", "weight", "bias", "skip"), truth, peer, got, strict=True):
        assert at_most_twice_as_wrong(o, p, t), name
        assert o.is_contiguous(memory_format=torch.channels_last) or name == "bias"


@pytest.mark.parametrize("case", CASES[1:6])
def test_what_is_left_out_and_how_weights_lie(case: Case, isa: str) -> None:
    x, weight, bias, skip, _ = tensors(case)
    for b, s in ((None, None), (bias, None), (None, skip)):
        torch.testing.assert_close(ours(x, weight, b, s, case[-1]), plain(x, weight, b, s, case[-1]), rtol=0, atol=1e-5)
    assert torch.equal(
        ours(x, weight.contiguous(), bias, skip.contiguous(), case[-1]), ours(x, weight, bias, skip, case[-1])
    )


@pytest.mark.parametrize("case", CASES[:6])
def test_bits_depend_on_neither_batch_nor_threads(case: Case, isa: str) -> None:
    """Of all samples at once, of each alone, on three threads: the same; of the weight's gradient, on any threads."""
    if isa == "reference":
        pytest.skip("torch's own convolutions promise no such thing")
    x, weight, bias, skip, dy = tensors(case)
    expected, threads = ours(x, weight, bias, skip, case[-1]), torch.get_num_threads()
    gradients = torch.ops.bdk.conv3x3_weight_gradient(dy, x, case[-1])
    for i in range(len(x)):
        alone = [v[i : i + 1].to(memory_format=torch.channels_last) for v in (x, skip)]
        if alone[0].is_contiguous():
            continue  # one pixel wide and high: torch's
        assert torch.equal(ours(alone[0], weight, bias, alone[1], case[-1])[0], expected[i])
    try:
        torch.set_num_threads(3)
        assert torch.equal(ours(x, weight, bias, skip, case[-1]), expected)
        for got, want in zip(torch.ops.bdk.conv3x3_weight_gradient(dy, x, case[-1]), gradients, strict=True):
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("channels", [16, 6])
def test_the_reference_serves_every_layout_and_dtype(
    upsample: bool, layout: torch.memory_format, channels: int
) -> None:
    x, weight, bias, skip, _ = tensors((2, channels, 16, 4, 6, upsample))
    x = x.contiguous(memory_format=layout)
    y = ours(x, weight, bias, skip, upsample)
    assert y.is_contiguous(memory_format=layout)
    with use_backend("reference"):
        torch.testing.assert_close(y, ours(x, weight, bias, skip, upsample), rtol=1e-5, atol=1e-5)
    wide = [v.double().requires_grad_() for v in (x, weight, bias, skip)]
    torch.autograd.gradcheck(lambda *v: ours(*v, upsample), wide, fast_mode=True)
    half = [v.bfloat16() for v in (x, weight, bias, skip)]
    torch.testing.assert_close(ours(*half, upsample), plain(*half, upsample))


@pytest.mark.parametrize("upsample", [False, True])
def test_opcheck_and_compile(upsample: bool) -> None:
    x, weight, bias, skip, dy = (v.requires_grad_() for v in tensors((16, 16, 32, 8, 6, upsample)))
    torch.library.opcheck(torch.ops.bdk.conv3x3.default, (x, weight, bias, skip, upsample))
    torch.library.opcheck(torch.ops.bdk.conv3x3_input_gradient.default, (dy.detach(), weight.detach(), upsample))
    torch.library.opcheck(torch.ops.bdk.conv3x3_weight_gradient.default, (dy.detach(), x.detach(), upsample))
    call = lambda v: bdkernels.conv3x3(v, weight, bias, skip=skip, upsample=upsample)  # noqa: E731  compiled and not
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), call(x))


def test_nan_stays_where_the_filters_reach() -> None:
    x, weight, bias, skip, _ = tensors((2, 16, 16, 12, 12, False))
    x[0, 3, 5, 5] = torch.nan
    got = ours(x, weight, bias, skip, False).isnan()
    assert got[0, :, 4:7, 4:7].all()
    assert not got[0, :, :2].any()
    assert not got[1].any()


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"weight": torch.ones(8, 16, 1, 1)}, ValueError, r"weight has shape \(8, 16, 1, 1\): expected \(filters, 16, 3, 3\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias has shape \(5,\): expected \(16,\), contiguous"),
        ({"bias": torch.ones(16).double()}, TypeError, "bias has dtype float64: expected float32"),
        ({"upsample": True}, ValueError, r"skip has shape \(2, 16, 4, 4\): expected \(2, 16, 8, 8\)"),
        ({"x": torch.ones(2, 16)}, ValueError, "four dimensions"),
    ],
)  # fmt: skip
def test_wrong_arguments_get_one_sentence(change: dict, error: type[Exception], sentence: str) -> None:
    x, weight, bias, skip, _ = tensors((2, 16, 16, 4, 4, False))
    arguments = {"x": x, "weight": weight, "bias": bias, "skip": skip} | change
    with pytest.raises(error, match=sentence):
        bdkernels.conv3x3(**arguments)


def test_empty_batches() -> None:
    weight = torch.ones(16, 16, 3, 3)
    assert bdkernels.conv3x3(torch.zeros(0, 16, 4, 4), weight, upsample=True).shape == (0, 16, 8, 8)
