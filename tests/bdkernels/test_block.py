"""The residual block in one call: at most twice as wrong as torch's, and bits that depend on nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bdkernels
from bdkernels import BlockWeights, use_backend
from bdkernels.testing import at_most_twice_as_wrong, poisoned_memory

GROUPS = 4
CASES = [
    # samples, channels, filters, side, shift's rows, shortcut
    (8, 16, 16, 8, 8, False),
    (3, 48, 16, 16, 1, True),
    (9, 32, 80, 7, 9, True),
    (40, 64, 64, 4, 0, False),
    (40, 64, 64, 4, 40, True),
    (4, 8, 24, 6, 4, True),  # torch's convolutions
]
Case = tuple[int, int, int, int, int, bool]


def tensors(case: Case) -> list[Tensor | None]:
    """x, shift, the weights, channels-last."""
    n, c, k, side, rows, shortcut = case
    g = torch.Generator().manual_seed(sum(case))

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        v = torch.randn(shape, generator=g) * scale
        return v.to(memory_format=torch.channels_last) if len(shape) == 4 else v

    def filters(k: int, c: int, side: int) -> tuple[Tensor, Tensor]:
        return randn(k, c, side, side, scale=(c * side * side) ** -0.5), randn(k)

    norm1, norm2 = ((1 + 0.3 * randn(width), randn(width)) for width in (c, k))
    last: tuple[Tensor | None, Tensor | None] = filters(k, c, 1) if shortcut else (None, None)
    shift = randn(rows, k) if rows else None
    return [randn(n, c, side, side) + 0.5, shift, *norm1, *filters(k, c, 3), *norm2, *filters(k, k, 3), *last]


def ours(x: Tensor, shift: Tensor | None, *weights: Any) -> Tensor:
    return bdkernels.residual_block(x, BlockWeights(*weights), GROUPS, shift=shift)


def plain(x: Tensor, shift: Tensor | None, *weights: Any) -> Tensor:
    w = BlockWeights(*weights)
    h = F.conv2d(F.silu(F.group_norm(x, GROUPS, w.norm1_weight, w.norm1_bias)), w.conv1_weight, w.conv1_bias, padding=1)
    h = h if shift is None else h + shift[:, :, None, None]
    h = F.conv2d(F.silu(F.group_norm(h, GROUPS, w.norm2_weight, w.norm2_bias)), w.conv2_weight, w.conv2_bias, padding=1)
    return h + (x if w.shortcut_weight is None else F.conv2d(x, w.shortcut_weight, w.shortcut_bias))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: Case, isa: str) -> None:
    values, results = tensors(case), []
    dy = torch.randn(case[0], case[2], case[3], case[3], generator=torch.Generator().manual_seed(9))
    for dtype, function in ((torch.float64, plain), (torch.float32, plain), (torch.float32, ours)):
        leaves = [None if v is None else v.to(dtype).requires_grad_() for v in values]
        with poisoned_memory():
            out = function(*leaves)
            out.backward(dy.to(dtype))
        results.append([out.detach(), *(v.grad for v in leaves if v is not None)])
    for index, (truth, peer, got) in enumerate(zip(*results, strict=True)):
        assert at_most_twice_as_wrong(got, peer, truth), index
        assert got.shape == truth.shape
    assert results[2][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES[:5])
def test_bits_depend_on_neither_batch_nor_threads(case: Case, isa: str) -> None:
    """Of all samples at once, of each alone, on three threads: the same; of all gradients, on any threads."""
    if isa == "reference":
        pytest.skip("torch's own convolutions promise no such thing")
    x, shift, *weights = tensors(case)

    def gradients() -> tuple[Tensor, ...]:
        leaves = [v.detach().requires_grad_() for v in (x, shift, *weights) if v is not None]
        rest = iter(leaves)
        out = ours(*(None if v is None else next(rest) for v in (x, shift, *weights)))
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    expected, threads = gradients(), torch.get_num_threads()
    for i in range(len(x)):
        alone = x[i : i + 1].to(memory_format=torch.channels_last)
        row = shift if shift is None or len(shift) == 1 else shift[i : i + 1]
        assert torch.equal(ours(alone, row, *weights)[0], expected[0][i])
    try:
        torch.set_num_threads(3)
        for got, want in zip(gradients(), expected, strict=True):
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


def test_frozen_weights_get_no_gradient_and_the_input_the_same() -> None:
    values = tensors(CASES[1])
    found = []
    for frozen in (False, True):
        leaves = [None if v is None else v.detach().requires_grad_(i < 2 or not frozen) for i, v in enumerate(values)]
        ours(*leaves).square().sum().backward()
        found.append(leaves)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    assert all(v.grad is None for v in found[1][2:])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("case", [CASES[1], CASES[5]])
def test_the_reference_serves_every_layout_and_dtype(case: Case, layout: torch.memory_format) -> None:
    values = tensors((2, *case[1:3], 4, 2, True))
    values[0] = values[0].contiguous(memory_format=layout)
    y = ours(*values)
    assert y.is_contiguous(memory_format=layout)
    with use_backend("reference"):
        torch.testing.assert_close(y, ours(*values), rtol=1e-5, atol=2e-5)
    torch.autograd.gradcheck(ours, [v.double().requires_grad_() for v in values], fast_mode=True)
    half = [v.bfloat16() for v in values]
    torch.testing.assert_close(ours(*half), plain(*half), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("case", [(16, 16, 16, 8, 16, False), (16, 16, 32, 8, 0, True)])
def test_opcheck_and_compile(case: Case) -> None:
    x, shift, *weights = (None if v is None else v.requires_grad_() for v in tensors(case))
    torch.library.opcheck(torch.ops.bdk.residual_block.default, (x, shift, *weights, GROUPS, 1e-5))
    out, *saved = torch.ops.bdk.residual_block(x, shift, *weights, GROUPS, 1e-5)
    given = [None if v is None else v.detach() for v in (out, x, shift, *saved, *weights)]
    for asked in (True, False):
        torch.library.opcheck(torch.ops.bdk.residual_block_backward.default, (*given, GROUPS, asked))
    compiled = torch.compile(lambda v: ours(v, shift, *weights), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), out)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"conv2_weight": torch.ones(16, 16, 1, 1)}, ValueError, r"conv2_weight has shape .*1, 1\): expected \(16, 16, 3, 3\)"),
        ({"norm2_bias": torch.ones(5)}, ValueError, r"norm2_bias has shape \(5,\): expected \(16,\)"),
        ({"conv1_bias": torch.ones(16).double()}, TypeError, "conv1_bias has dtype float64: expected float32"),
        ({"shortcut_weight": None}, ValueError, "shortcut_weight and shortcut_bias: expected both or neither"),
        ({"shortcut_weight": None, "shortcut_bias": None}, ValueError, "no shortcut_weight: expected one, from 48 channels"),
        ({"shift": torch.ones(2, 16)}, ValueError, r"shift has shape \(2, 16\): expected \(1 or 3, 16\)"),
        ({"groups": 5}, ValueError, "groups is 5: expected a divisor of 48 channels"),
        ({"groups": 3}, ValueError, "groups is 3: expected a divisor of 16 filters"),
    ],
)  # fmt: skip
def test_wrong_arguments_get_one_sentence(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    x, shift, *weights = tensors(CASES[1])
    assert x is not None
    given = {**BlockWeights(*weights)._asdict(), "shift": shift, "groups": GROUPS} | change
    shift, groups = given.pop("shift"), given.pop("groups")
    with pytest.raises(error, match=sentence):
        bdkernels.residual_block(x, BlockWeights(**given), groups, shift=shift)


def test_empty_batches() -> None:
    x, _, *weights = tensors(CASES[1])
    assert x is not None
    assert ours(x[:0], None, *weights).shape == (0, 16, 16, 16)
