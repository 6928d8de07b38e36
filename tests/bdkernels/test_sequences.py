"""A thousand random tables, batches and sequences of rows: the compiled step against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bdkernels
from bdkernels import HISTORY_SLOTS, STEP_COLUMNS, STORE_COLUMNS, STORES, Step, Store, native, use_backend
from bdkernels.testing import assert_same_bits

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "")

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 1, 8, 8), (4, 2, 3, 11), (5, 3, 16, 16)]


@st.composite
def loops(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """Arguments of `bind_step`, its options, and the network's outputs of its steps."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731  short, and used as a word
    shape, arms, rows, calls = draw(st.sampled_from(SHAPES)), integer(1, 4), integer(1, 6), integer(1, 8)
    x_type, m_type = (draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])) for _ in range(2))
    layouts = [torch.contiguous_format, torch.channels_last]
    slots, trigger, region, one_row = integer(0, HISTORY_SLOTS), integer(0, 1), integer(0, 1), integer(0, 1)
    absent = draw(st.sampled_from([0.0, 0.5, 0.9]))
    g = torch.Generator().manual_seed(integer(0, 2**32))

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    def index(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=g)

    def image(dtype: torch.dtype) -> Tensor:
        return randn(*shape).to(dtype).to(memory_format=layouts[int(index(2))])

    table = randn(arms, rows, STEP_COLUMNS)
    table[torch.rand(table.shape, generator=g) < absent] = 0
    for low, high in ((Step.LOW0, Step.HIGH0), (Step.LOW, Step.HIGH)):
        bound = torch.where(index(2, arms, rows) == 0, randn(arms, rows).abs(), torch.inf)
        table[..., low], table[..., high] = -bound, bound
    for k in range(STORES):
        table[..., Step.STORE + k * STORE_COLUMNS + Store.SLOT] = index(slots + 1, arms, rows) - 1.0
    count = shape[0]
    arguments = {
        "x": image(x_type),
        "table": table,
        "arm": index(arms, count),
        "steps": index(rows, calls) if one_row else index(rows, calls, count),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (count,), generator=g),
    }
    options: dict[str, Tensor] = {"bad_row": torch.tensor(bdkernels.NO_BAD_ROW)}
    if slots:
        options["history"] = randn(slots, *shape)
    if trigger:
        options["trigger"] = randn(1 + int(index(2)) * (count - 1), *shape[1:])
    if region:
        options["region"], options["arm_inside"] = index(2, 1, *shape[1:]) == 0, index(arms, count)
    outputs = [image(m_type) for _ in range(calls)]
    if integer(0, 9) == 0:
        outputs[-1][0, 0, 0, 0] = torch.nan
    return arguments, options, outputs


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(loops())
def test_every_loop_is_the_references(case: tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]) -> None:
    """As one bound loop, and as single ops."""
    arguments, options, outputs = case
    ended = []
    for backend, bound in (("reference", False), ("cpu", True), ("cpu", False)):
        own = {k: v.clone() for k, v in {**arguments, **options}.items()}
        steps, x = own.pop("steps"), own["x"]
        with use_backend(backend):
            if bound:
                step = bdkernels.bind_step(steps=steps, **own)
            for k, m in enumerate(outputs):
                if bound:
                    step(m, k)
                else:
                    bdkernels.fused_step_(model_output=m, step=steps[k], **own)
        ended.append({"x": x, **{k: own[k] for k in ("history", "bad_row") if k in own}})
    for other in ended[1:]:
        for name, value in ended[0].items():
            assert_same_bits(name, other[name], value)


def bound_loop() -> tuple[dict[str, Tensor], Tensor]:
    x = torch.zeros(2, 3, 4, 4)
    table = torch.ones(1, 5, STEP_COLUMNS)
    arm = torch.zeros(2, dtype=torch.int64)
    return {"x": x, "table": table, "arm": arm, "steps": torch.arange(5), "seeds": arm}, torch.ones_like(x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": torch.zeros(5, 3, dtype=torch.int64)}, r"steps has shape \(5, 3\): expected \(K,\) or \(K, 2\)"),
        ({"steps": torch.zeros(5)}, "steps has dtype float32: expected int64"),
        ({"arm": torch.zeros(3, dtype=torch.int64)}, r"arm has shape \(3,\): expected \(2,\)"),
        ({"m": torch.ones(2, 3, 4, 5)}, r"model_output has shape \(2, 3, 4, 5\): expected \(2, 3, 4, 4\)"),
        ({"m": torch.ones(2, 3, 4, 4, dtype=torch.int64)}, "model_output has dtype int64"),
        ({"m": torch.ones(2, 3, 4, 8)[..., ::2]}, "model_output has strides"),
        ({"k": 5}, "step 5 was asked for: expected 0 to 4"),
        ({"k": -1}, "step -1 was asked for: expected 0 to 4"),
    ],
)
def test_a_wrong_loop_is_refused_before_anything_changes(backend: str, wrong: dict, sentence: str) -> None:
    arguments, m = bound_loop()
    before = arguments["x"].clone()

    def run() -> None:
        step = bdkernels.bind_step(**{**arguments, **{k: v for k, v in wrong.items() if k not in ("m", "k")}})
        step(wrong.get("m", m), wrong.get("k", 0))

    with use_backend(backend), pytest.raises((TypeError, ValueError), match=sentence):
        run()
    assert_same_bits("x", arguments["x"], before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_output_elsewhere_is_refused_after_good_ones_too(backend: str) -> None:
    arguments, m = bound_loop()
    with use_backend(backend):
        step = bdkernels.bind_step(**arguments)
        step(m, 0)
        with pytest.raises(ValueError, match="model_output is on meta: expected cpu"):
            step(m.to("meta"), 1)


def test_a_loop_may_change_the_layout_and_dtype_of_its_outputs() -> None:
    arguments, m = bound_loop()
    expected = arguments["x"].clone()
    step = bdkernels.bind_step(**arguments)
    for k, output in enumerate((m, m.to(memory_format=torch.channels_last), m.bfloat16(), m.half(), m)):
        step(output, k)
        bdkernels.fused_step_(
            expected, output, step=torch.tensor(k), **{n: arguments[n] for n in ("table", "arm", "seeds")}
        )
    assert_same_bits("x", arguments["x"], expected)


def step_in_place(arguments: dict[str, Tensor], m: Tensor, bound: bool, **options: Tensor) -> None:
    if bound:
        bdkernels.bind_step(**arguments, **options)(m, 0)
    else:
        rest = {k: v for k, v in arguments.items() if k != "steps"}
        bdkernels.fused_step_(model_output=m, step=torch.tensor(0), **rest, **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bound", [True, False])
def test_a_graph_that_saved_x_does_not_go_backward_through_a_step(backend: str, bound: bool) -> None:
    arguments, m = bound_loop()
    history = torch.ones(1, *m.shape)
    weight = torch.ones_like(m, requires_grad=True)
    for saved in (arguments["x"], history):
        loss = (saved * weight).sum()
        with use_backend(backend), torch.no_grad():
            step_in_place(arguments, m, bound, history=history)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("name", ["x", "model_output", "trigger", "history"])
def test_a_gradient_is_not_lost_silently(backend: str, bound: bool, name: str) -> None:
    arguments, m = bound_loop()
    options = {"trigger": torch.zeros(1, 3, 4, 4), "history": torch.zeros(1, *m.shape)}
    {**arguments, **options, "model_output": m}[name].requires_grad_()
    before = arguments["x"].detach().clone()
    with use_backend(backend):
        with pytest.raises(ValueError, match=f"{name} requires a gradient.*expected torch.no_grad"):
            step_in_place(arguments, m, bound, **options)
        assert_same_bits("x", arguments["x"].detach(), before)
        with torch.no_grad():
            step_in_place(arguments, m, bound, **options)
    assert (arguments["x"] != before).any()


def test_a_bound_step_sees_that_gradients_came_on() -> None:
    arguments, m = bound_loop()
    m.requires_grad_()
    with torch.no_grad():
        step = bdkernels.bind_step(**arguments)
        step(m, 0)
    with pytest.raises(ValueError, match="model_output requires a gradient"):
        step(m, 1)


@pytest.mark.parametrize("name", ["x", "history", "bad_row"])
@pytest.mark.parametrize("how", ["resized", "assigned"])
def test_what_a_bound_step_writes_must_stay_where_it_is(name: str, how: str) -> None:
    arguments, m = bound_loop()
    own = {**arguments, "history": torch.ones(1, *m.shape), "bad_row": torch.tensor(bdkernels.NO_BAD_ROW)}
    with use_backend("cpu"):
        step = bdkernels.bind_step(**own)
    if how == "resized":
        own[name].resize_(100, 3, 4, 4)
    else:
        own[name].data = own[name].clone()
    with pytest.raises(ValueError, match="was resized or moved since bind_step: expected another bind_step"):
        step(m, 0)


def test_what_a_bound_step_reads_stays_alive() -> None:
    """Other memory for the table: the step goes on with the old one, which nothing else holds."""
    arguments, m = bound_loop()
    expected, place = arguments["x"].clone(), arguments["table"].data_ptr()
    with use_backend("cpu"):
        step = bdkernels.bind_step(**arguments)
        bdkernels.fused_step_(expected, m, step=torch.tensor(0), **{n: arguments[n] for n in ("table", "arm", "seeds")})
    size = arguments["table"].shape
    arguments["table"].data = torch.zeros(size)
    assert all(torch.full(size, torch.nan).data_ptr() != place for _ in range(10))
    step(m, 0)
    assert_same_bits("x", arguments["x"], expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_profiler_sees_each_call_under_the_name_of_the_op(backend: str) -> None:
    """Also a step that was bound before it was started; the results do not change with it."""
    arguments, m = bound_loop()
    expected = arguments["x"].clone()
    with use_backend(backend):
        step, silent = bdkernels.bind_step(**arguments), bdkernels.bind_step(**{**arguments, "x": expected})
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for k in range(3):
                step(m, k)
        for k in range(3):
            silent(m, k)
    assert [event.name for event in profile.events()].count("bdk::fused_step_") == 3
    assert_same_bits("x", arguments["x"], expected)
