"""The ops against their formulas in float64, as torch operators, and on bad input."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bdkernels as bdk
from bdkernels import native, noise, reference

BACKENDS = ("cpu", "reference")
SHAPE = (3, 6, 5)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_case(count: int = 4, arms: int = 3, rows: int = 5) -> dict[str, Tensor]:
    """A random row with every term: trigger, region, history, clamps; stores into both slots."""
    table = random(0, arms, rows, bdk.STEP_COLUMNS)
    table[..., bdk.Step.LOW0], table[..., bdk.Step.HIGH0] = -0.9, 0.8
    table[..., bdk.Step.LOW], table[..., bdk.Step.HIGH] = -1.5, 1.7
    table[..., bdk.Step.STORE + bdk.Store.SLOT] = 1
    table[..., bdk.Step.STORE + bdk.STORE_COLUMNS + bdk.Store.SLOT] = 0
    return {
        "x": random(1, count, *SHAPE),
        "model_output": random(2, count, *SHAPE),
        "table": table,
        "arm": torch.arange(count) % arms,
        "step": torch.arange(count) % rows,
        "seeds": torch.arange(count) + 100,
        "trigger": random(3, 1, *SHAPE),
        "region": random(4, 1, *SHAPE) > 0,
        "arm_inside": (torch.arange(count) + 1) % arms,
        "history": random(5, 2, count, *SHAPE),
    }


def step_formula(case: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``columns.py``, one pixel at a time in Python floats: x' and the history after the stores."""
    x, history = case["x"].double(), case["history"].double()
    z = bdk.normal(case["seeds"], SHAPE, step=case["step"], stream=bdk.STREAM_STEP).double()
    out, after = x.clone(), history.clone()
    c, k = bdk.Step, bdk.Store
    for n in range(len(x)):
        for p in torch.cartesian_prod(*(torch.arange(s) for s in SHAPE)).tolist():
            inside = bool(case["region"][0][tuple(p)])
            row = case["table"][case["arm_inside" if inside else "arm"][n], case["step"][n]].double()
            at = (n, *p)
            h = [history[(j, *at)] for j in range(len(history))]
            m, r = case["model_output"][at].double(), case["trigger"][(0, *p)].double()
            x0 = (row[c.A] * x[at] + row[c.B] * m + row[c.D] * r).clamp(row[c.LOW0], row[c.HIGH0])
            new = row[c.P] * x[at] + row[c.Q] * x0 + row[c.S] * m + row[c.Z] * z[at] + row[c.R] * r
            new = (new + sum(row[c.H + j] * h[j] for j in range(len(h)))).clamp(row[c.LOW], row[c.HIGH])
            out[at] = new
            for s in range(bdk.STORES):
                store = row[c.STORE + s * bdk.STORE_COLUMNS :]
                value = store[k.E] * x[at] + store[k.F] * m + store[k.G] * x0 + store[k.K] * new
                value = value + sum(store[k.J + j] * h[j] for j in range(len(h)))
                after[(int(store[k.SLOT]), *at)] = value
    return out, after


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_is_its_formula(backend: str) -> None:
    case = step_case()
    x_next, history = step_formula(case)
    with bdk.use_backend(backend):
        pure = bdk.fused_step(**case)
        state = {**case, "x": case["x"].clone(), "history": case["history"].clone()}
        returned = bdk.fused_step_(**state)
    assert (pure.double() - x_next).abs().max() < 3e-6
    assert returned is state["x"]
    assert torch.equal(pure, state["x"])
    assert (state["history"].double() - history).abs().max() < 1e-5


def numpy_step(case: dict[str, Tensor]) -> np.ndarray:
    """``columns.py`` in NumPy's float32, every product and sum rounded once, left to right."""
    v = {name: value.numpy() for name, value in case.items()}
    outside, inside = (v["table"][v[k], v["step"]] for k in ("arm", "arm_inside"))

    def row(column: int) -> np.ndarray:
        return np.where(v["region"], inside[:, column, None, None, None], outside[:, column, None, None, None])

    c, x, m, r = bdk.Step, v["x"], v["model_output"], v["trigger"]
    z = np.stack(
        [noise.normal(v["seeds"][n : n + 1], SHAPE, int(v["step"][n]), bdk.STREAM_STEP)[0] for n in range(len(x))]
    )
    x0 = np.clip(row(c.A) * x + row(c.B) * m + row(c.D) * r, row(c.LOW0), row(c.HIGH0))
    x_next = row(c.P) * x + row(c.Q) * x0 + row(c.S) * m
    for j, h in enumerate(v["history"]):
        x_next = x_next + row(c.H + j) * h
    x_next = x_next + row(c.Z) * z + row(c.R) * r
    assert x_next.dtype == np.float32
    return np.clip(x_next, row(c.LOW), row(c.HIGH))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_step_is_the_same_bits_as_numpy(backend: str) -> None:
    case = step_case(count=64)
    with bdk.use_backend(backend):
        got = bdk.fused_step(**case).numpy()
    assert np.array_equal(got.view(np.int32), numpy_step(case).view(np.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamps_keep_nan_and_the_first_bad_row_is_noted(backend: str) -> None:
    case = step_case()
    case["model_output"][2, 0, 0, 0] = float("nan")
    case["model_output"][3, 1, 1, 1] = float("inf")
    bad_row = torch.tensor(bdk.NO_BAD_ROW)
    with bdk.use_backend(backend):
        x = bdk.fused_step_(**{**case, "x": case["x"].clone(), "history": case["history"].clone()}, bad_row=bad_row)
    assert x[2, 0, 0, 0].isnan()
    assert x.isnan().sum() == 1
    assert int(bad_row) == 2


def test_float64_runs_in_float64() -> None:
    case = {k: v.double() if v.is_floating_point() else v for k, v in step_case().items()}
    x_next, _ = step_formula(case)
    assert (bdk.fused_step(**case) - x_next).abs().max() < 1e-13


def test_gradients_of_the_step_are_those_of_its_formula() -> None:
    case = {k: v.double() if v.is_floating_point() else v for k, v in step_case(count=2).items()}
    names = ("x", "model_output", "trigger", "history")

    def run(*values: Tensor) -> Tensor:
        return bdk.fused_step(**{**case, **dict(zip(names, values, strict=True))})

    torch.autograd.gradcheck(run, [case[name].clone().requires_grad_() for name in names])


@pytest.mark.skipif(not native.available(), reason=native.reason() or "present")
def test_gradients_of_the_step_draw_their_noise_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits are the reference's, and so are the gradients'; the outer clamp binds in some elements and not in others."""
    case, names = step_case(), ("x", "model_output", "trigger", "history")
    values = [case[name].clone().requires_grad_() for name in names]
    x_next, _, _ = reference.step_formula(**{**case, **dict(zip(names, values, strict=True))})
    weights = random(6, *x_next.shape)
    expected = torch.autograd.grad((x_next * weights).sum(), values)
    monkeypatch.setattr(reference, "normal", None)
    got = torch.autograd.grad(
        (bdk.fused_step(**{**case, **dict(zip(names, values, strict=True))}) * weights).sum(), values
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert 0 < int((expected[0] == 0).sum()) < expected[0].numel()


def training_case(count: int = 4) -> dict[str, Any]:
    x0 = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    return {
        "x0": x0,
        "t": torch.arange(count) % 7,
        "arm": torch.arange(count) % 2,
        "seeds": torch.arange(count) + 50,
        "table": random(7, 3, 7, bdk.NOISING_COLUMNS),
        "trigger": random(8, 1, *SHAPE),
        "mask": (random(9, 1, *SHAPE) > 0).float(),
        "flip": torch.arange(count) % 3 == 0,
        "region": random(10, 1, *SHAPE) > 0.5,
        "arm_inside": torch.full((count,), 2),
    }


def training_formula(case: dict[str, Any], y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``columns.py`` in float64: x_t, the regression target, the weights."""
    x = (case["x0"].double() * 2 - 255) / 255
    x = torch.where(case["flip"].view(-1, 1, 1, 1), x.flip(-1), x)
    outside, inside = (case["table"][case[k], case["t"]].double() for k in ("arm", "arm_inside"))
    row = [
        torch.where(case["region"], inside[:, i, None, None, None], outside[:, i, None, None, None]) for i in range(5)
    ]
    c = bdk.Noising
    eps = bdk.normal(case["seeds"], SHAPE, stream=bdk.STREAM_TRAINING).double()
    poisoned = case["mask"].double() * x + case["trigger"].double()
    data = torch.where((case["arm"] > 0).view(-1, 1, 1, 1), y.double(), x)
    return row[c.A] * data + row[c.M] * poisoned + row[c.S] * eps, eps + row[c.C] * poisoned, row[c.W]


@pytest.mark.parametrize("backend", BACKENDS)
def test_noising_and_loss_are_their_formulas(backend: str) -> None:
    case, y = training_case(), random(11, 1, *SHAPE)
    x_t, target, weight = training_formula(case, y)
    prediction = random(12, *case["x0"].shape).requires_grad_()
    with bdk.use_backend(backend):
        assert (bdk.fused_noising(**case, target=y).double() - x_t).abs().max() < 2e-6
        for reduction, divisor in (("mean", prediction.numel()), ("sum", len(prediction))):
            prediction.grad = None
            loss = bdk.fused_loss(prediction, **case, reduction=reduction)  # type: ignore[arg-type]
            expected = (weight * (prediction.detach().double() - target) ** 2).flatten(1).sum(1) / divisor
            assert torch.allclose(loss.double(), expected, rtol=1e-5)
            loss.sum().backward()
            gradient = 2 * weight * (prediction.detach().double() - target) / divisor
            assert prediction.grad is not None
            assert torch.allclose(prediction.grad.double(), gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_reach_exactly_minus_one_and_one(backend: str) -> None:
    case = training_case(1)
    case["x0"][:] = torch.tensor([0, 255] * (case["x0"].numel() // 2)).to(torch.uint8).view_as(case["x0"])
    case["table"][:] = 0
    case["table"][..., bdk.Noising.A] = 1
    with bdk.use_backend(backend):
        x_t = bdk.fused_noising(case["x0"], case["t"], case["arm"], case["seeds"], case["table"])
    assert set(x_t.flatten().tolist()) == {-1.0, 1.0}


def operators() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    step, training = step_case(), training_case()
    step_arguments = tuple(step.values())
    grad = tuple(v.clone().requires_grad_() if i in (0, 1, 6, 9) else v for i, v in enumerate(step_arguments))
    shared = tuple(training[k] for k in ("trigger", "mask", "flip", "region", "arm_inside"))
    images = tuple(training[k] for k in ("x0", "t", "arm", "seeds", "table"))
    prediction = random(12, *training["x0"].shape).requires_grad_()
    ops = torch.ops.bdk
    return {
        "normal": (ops.normal.default, (step["seeds"], step["step"], 1, list(SHAPE), torch.float32)),
        "fused_step": (ops.fused_step.default, grad),
        "fused_step_": (ops.fused_step_.default, (*step_arguments, torch.tensor(bdk.NO_BAD_ROW))),
        "fused_noising": (ops.fused_noising.default, (*images, random(1, 1, *SHAPE), *shared, torch.float32)),
        "fused_loss": (ops.fused_loss.default, (prediction, *images, *shared, 0.5)),
    }


@pytest.mark.parametrize("name", operators())
def test_opcheck(name: str) -> None:
    op, arguments = operators()[name]
    torch.library.opcheck(op, arguments)


def test_compiled_whole_equals_eager_and_steps_do_not_recompile() -> None:
    case = step_case()
    del case["history"]

    def loop(x: Tensor, step: Tensor) -> Tensor:
        return bdk.fused_step(**{**case, "x": x * 2, "step": step}) * 2

    graphs = []

    def count(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(loop, fullgraph=True, backend=count)
    for step in range(4):
        at = torch.tensor(step)
        assert torch.equal(compiled(case["x"], at), loop(case["x"], at))
    assert len(graphs) == 1


def test_compiled_training_equals_eager() -> None:
    case = training_case()

    def loss(prediction: Tensor) -> Tensor:
        return bdk.fused_loss(prediction * 1.5, **case).sum()

    gradients = []
    torch._dynamo.reset()
    for run in (loss, torch.compile(loss, fullgraph=True)):
        prediction = random(12, *case["x0"].shape).requires_grad_()
        run(prediction).backward()
        gradients.append(prediction.grad)
    assert torch.equal(*gradients)


BAD_STEP: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"x": torch.zeros(4, *SHAPE, dtype=torch.int32)}, TypeError, "x has dtype int32: expected float32 or"),
    "dimensions": ({"x": torch.zeros(3, 4)}, ValueError, "x has shape (3, 4): expected four dimensions"),
    "shape": ({"model_output": torch.zeros(4, 3, 6, 6)}, ValueError, "expected (4, 3, 6, 5)"),
    "stride": ({"x": torch.zeros(4, 3, 5, 6).mT}, ValueError, "expected a contiguous or channels-last tensor"),
    "columns": ({"table": torch.zeros(3, 5, 7)}, ValueError, "expected [arms, rows, 36]"),
    "table dtype": ({"table": torch.zeros(3, 5, 36).double()}, TypeError, "table has dtype float64: expected float32"),
    "seed type": ({"seeds": torch.zeros(4)}, TypeError, "seeds has dtype float32: expected int64"),
    "seed count": ({"seeds": torch.arange(3)}, ValueError, "seeds has shape (3,): expected (4,)"),
    "device": ({"arm": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "arm is on meta: expected cpu"),
    "trigger": ({"trigger": torch.zeros(2, *SHAPE)}, ValueError, "expected (1, 3, 6, 5) or (4, 3, 6, 5)"),
    "region alone": ({"arm_inside": None}, ValueError, "region was given without arm_inside"),
    "history": ({"history": torch.zeros(5, 4, *SHAPE)}, ValueError, "expected [1..4, 4, 3, 6, 5]"),
    "arm": ({"arm": torch.tensor([0, 1, 2, 3])}, ValueError, "3"),
    "row": ({"step": torch.tensor(5)}, ValueError, "5"),
    "negative row": ({"step": torch.tensor(-1)}, ValueError, "-1"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD_STEP)
def test_bad_step_arguments_get_one_sentence_and_change_nothing(name: str, backend: str) -> None:
    change, error, message = BAD_STEP[name]
    case = {**step_case(), **change}
    before = {k: v.clone() for k, v in case.items() if v is not None and v.device.type == "cpu"}
    with bdk.use_backend(backend), pytest.raises(error, match=re.escape(message)) as caught:
        bdk.fused_step_(**case)
    assert "\n" not in str(caught.value)
    for k, v in before.items():
        assert torch.equal(case[k], v)


BAD_TRAINING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "timestep": ({"t": torch.tensor([0, 1, 2, 7])}, ValueError, "7"),
    "mask alone": ({"trigger": None}, ValueError, "mask was given without trigger"),
    "flip": ({"flip": torch.zeros(4)}, TypeError, "flip has dtype float32: expected bool"),
    "image dtype": ({"x0": torch.zeros(4, *SHAPE, dtype=torch.int8)}, TypeError, "expected uint8 or float32"),
    "output dtype": ({"dtype": torch.int64}, TypeError, "dtype is int64"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_training_arguments_get_one_sentence(name: str, backend: str) -> None:
    change, error, message = BAD_TRAINING[name]
    with bdk.use_backend(backend), pytest.raises(error, match=re.escape(message)):
        bdk.fused_noising(**{**training_case(), **change})


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'gpu': expected one of cpu, reference"), bdk.use_backend("gpu"):
        pass


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend: str) -> None:
    case = {k: v[:0] if k in ("x", "model_output", "arm", "seeds", "arm_inside") else v for k, v in step_case().items()}
    case["history"], case["step"] = case["history"][:, :0].contiguous(), torch.tensor(0)
    with bdk.use_backend(backend):
        assert bdk.fused_step_(**case).shape == (0, *SHAPE)
