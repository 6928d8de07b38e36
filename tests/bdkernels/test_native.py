"""The compiled kernels make the bits of ``reference.py``: every op, dtype, layout, size, thread count, instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from bdkernels import columns, native, noise, reference
from bdkernels.columns import Noising, Step, Store

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

ISAS = native.isas()
THREADS = [1, 2, 3]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}
SHAPES = [(2, 3, 5, 7), (3, 1, 1, 1), (1, 1, 1, 37), (2, 4, 8, 8), (1, 3, 57, 59), (5, 2, 3, 11)]
EMPTY = [(0, 3, 4, 4), (2, 3, 0, 4)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where a test does not say how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """For the native call alone: the reference's many small regions crawl on a busy machine."""
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(1)


def assert_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    got, want = got.contiguous(), want.contiguous()
    same = (got.view(INTS[got.dtype]) == want.view(INTS[want.dtype])) | (got.isnan() & want.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ, first {got[~same][:3]} for {want[~same][:3]}"


def layout(tensor: Tensor, channels_last: bool) -> Tensor:
    """The same values, each [N, C, H, W] of ``tensor`` in the layout asked for."""
    if not channels_last:
        return tensor.contiguous()
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)


class Case:
    """Random tensors of one shape, from one seed."""

    def __init__(self, shape: tuple[int, int, int, int], seed: int = 0, arms: int = 3, rows: int = 5) -> None:
        self.shape, self.arms, self.rows = shape, arms, rows
        self.generator = torch.Generator().manual_seed(seed)
        self.arm, self.arm_inside = self.index(arms), self.index(arms)
        self.seeds = torch.randint(-(2**63), 2**63 - 1, (shape[0],), generator=self.generator)

    def images(self, *lead: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        return layout(torch.randn(*lead, *self.shape[1:], generator=self.generator).to(dtype), channels_last)

    def index(self, limit: int) -> Tensor:
        return torch.randint(limit, (self.shape[0],), generator=self.generator)

    def flags(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.5

    def step_table(self) -> Tensor:
        """Random rows: half of them without noise, half without clamps, stores into any slot or none."""
        table = torch.randn(self.arms, self.rows, columns.STEP_COLUMNS, generator=self.generator)
        for low, high in ((Step.LOW0, Step.HIGH0), (Step.LOW, Step.HIGH)):
            bound = torch.where(self.flags(self.arms, self.rows), table[..., high].abs(), torch.inf)
            table[..., low], table[..., high] = -bound, bound
        table[..., Step.Z] *= self.flags(self.arms, self.rows)
        for k in range(columns.STORES):
            slots = torch.randint(-1, columns.HISTORY_SLOTS, (self.arms, self.rows), generator=self.generator)
            table[..., Step.STORE + k * columns.STORE_COLUMNS + Store.SLOT] = slots.float()
        return table

    def noising_table(self) -> Tensor:
        return torch.randn(self.arms, self.rows, columns.NOISING_COLUMNS, generator=self.generator)


def step_arguments(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], last: tuple[bool, bool, bool], options: int, per_sample: bool
) -> list[Tensor | None]:
    """Arguments of `fused_step_` but the last; bits of ``options``: trigger, region, history, one image or one each."""
    n = case.shape[0]
    lead = n if options & 8 else 1
    region = case.flags(lead, *case.shape[1:]) if options & 2 else None
    return [
        case.images(n, dtype=dtypes[0], channels_last=last[0]),
        case.images(n, dtype=dtypes[1], channels_last=last[1]),
        case.step_table(),
        case.arm,
        case.index(case.rows) if per_sample else torch.tensor(case.rows - 2),
        case.seeds,
        case.images(lead) if options & 1 else None,
        region,
        case.arm_inside if region is not None else None,
        case.images(1 + options % 4, n, channels_last=last[2]) if options & 4 else None,
    ]


def check_step(arguments: list[Tensor | None], threads: int = 1) -> None:
    """Both forms of the step, with the history and the bad row, against the reference."""
    with on_threads(threads):
        x_next = native.fused_step(*arguments)
    assert_bits(x_next, reference.fused_step(*arguments))
    copies = []
    for module in (native, reference):
        clones = [a.clone() if a is not None else None for a in arguments]
        bad_row = torch.tensor(3)
        with on_threads(threads if module is native else 1):
            module.fused_step_(*clones, bad_row)
        copies.append((clones[0], clones[9], bad_row))
    (x, history, bad), (x_reference, history_reference, bad_reference) = copies
    assert_bits(x, x_reference)
    assert bad == bad_reference
    if history is not None:
        assert_bits(history, history_reference)


def test_columns_are_those_of_python() -> None:
    numbers = native._module().columns()
    for enum in (Step, Store, Noising):
        expected = {column.name: int(column) for column in enum if column.name not in ("IN", "TIME")}
        assert numbers[enum.__name__] == expected
    for name in ("HISTORY_SLOTS", "STORES", "STEP_COLUMNS", "STORE_COLUMNS", "NOISING_COLUMNS"):
        assert numbers[name] == getattr(columns, name)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_is_random123(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    seed = int(np.array(key[0] | key[1] << 32, np.uint64).view(np.int64))
    assert native._module().philox(counter, seed) == words


def test_normals_of_random123_words(isa: str) -> None:
    words = tuple(np.array([w], np.uint32) for w in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))
    z = native.normal(torch.zeros(1, dtype=torch.int64), torch.tensor(0), 0, (4,), torch.float32)
    assert_bits(z[0], torch.from_numpy(np.concatenate(noise.normals(words))))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("elements", [*range(1, 38), 8192, 20001])
def test_normal(elements: int, dtype: torch.dtype, isa: str) -> None:
    case = Case((3, 1, 1, elements), elements)
    for step in (torch.tensor(2**32 - 1), case.index(1000)):
        arguments = (case.seeds, step, noise.STREAM_POISON, (elements,), dtype)
        assert_bits(native.normal(*arguments), reference.normal(*arguments))


@pytest.mark.parametrize("threads", THREADS)
def test_normal_is_the_numpy_contract(isa: str, threads: int) -> None:
    seeds = torch.arange(-40, 40) * 0x1234567890AB
    with on_threads(threads):
        z = native.normal(seeds, torch.tensor(7), noise.STREAM_INITIAL, (3, 64, 65), torch.float32)
    assert_bits(z, torch.from_numpy(noise.normal(seeds.numpy(), (3, 64, 65), 7)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", range(16))
def test_step_options(shape: tuple[int, int, int, int], options: int, isa: str) -> None:
    for per_sample in (False, True):
        check_step(step_arguments(Case(shape, options), (torch.float32,) * 2, (False,) * 3, options, per_sample))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("m_dtype", FLOATS)
@pytest.mark.parametrize("last", [(False, False, False), (True, False, True), (False, True, False), (True, True, True)])
def test_step_dtypes_and_layouts(
    x_dtype: torch.dtype, m_dtype: torch.dtype, last: tuple[bool, bool, bool], isa: str
) -> None:
    for seed, shape in enumerate(SHAPES):
        check_step(step_arguments(Case(shape, seed), (x_dtype, m_dtype), last, 15, True))


@pytest.mark.parametrize("threads", THREADS)
def test_step_threads(threads: int, isa: str) -> None:
    for shape in ((70, 3, 16, 16), (3, 3, 80, 90)):
        check_step(step_arguments(Case(shape), (torch.float32,) * 2, (False,) * 3, 15, True), threads)


def test_step_on_std_threads() -> None:
    native._module().use_gomp_parallel(0)
    try:
        check_step(step_arguments(Case((70, 3, 16, 16)), (torch.float32,) * 2, (False,) * 3, 15, True), 3)
    finally:
        native._module().use_gomp_parallel(native._gomp_parallel())


@pytest.mark.parametrize("dtype", FLOATS)
def test_step_passes_special_values(dtype: torch.dtype, isa: str) -> None:
    """NaN and infinities go through clamps, zeros keep their sign, subnormal halves survive; the bad row is found."""
    for position in range(0, 37, 4):
        case = Case((2, 1, 1, 37), position)
        arguments = step_arguments(case, (dtype, dtype), (False,) * 3, 7, True)
        x, m = arguments[0], arguments[1]
        x[0, 0, 0, :8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, -6e-8, 65504.0]).to(dtype)
        m[position % 2, 0, 0, position] = (torch.nan, torch.inf, -torch.inf)[position % 3]
        check_step(arguments)


def test_every_half_is_read_and_written_exactly(isa: str) -> None:
    """An identity row on all 65,536 values of each half type, then float32 rounded to halves around every tie."""
    table = torch.zeros(1, 1, columns.STEP_COLUMNS)
    table[0, 0, Step.P] = 1
    for low, high in ((Step.LOW0, Step.HIGH0), (Step.LOW, Step.HIGH)):
        table[0, 0, low], table[0, 0, high] = -torch.inf, torch.inf
    zero = torch.zeros(1, dtype=torch.int64)
    for dtype in FLOATS[1:]:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)
        table[0, 0, Step.P], table[0, 0, Step.S] = 1, 0
        arguments = [x, torch.zeros_like(x), table, zero, zero[0], zero, None, None, None, None]
        assert_bits(native.fused_step(*arguments), reference.fused_step(*arguments))
        table[0, 0, Step.P], table[0, 0, Step.S] = 0, 1
        half = x.float().reshape(-1)
        for nudge in (0, 1, -1):
            tie = (half.view(torch.int32) + (0x8000 if dtype == torch.bfloat16 else 0x1000) + nudge).view(torch.float32)
            arguments[0], arguments[1] = torch.zeros_like(x), tie.reshape(1, 1, 256, 256).contiguous()
            assert_bits(native.fused_step(*arguments), reference.fused_step(*arguments))


def noising_arguments(case: Case, byte: bool, last: bool, options: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Arguments of `fused_noising`; bits of ``options``: trigger, mask, region, target, one image or one each."""
    n = case.shape[0]
    lead = n if options & 16 else 1
    x0 = case.images(n)
    x0 = (x0 * 99 + 128).clamp(0, 255).to(torch.uint8) if byte else x0
    region = case.flags(lead, *case.shape[1:]) if options & 4 else None
    return [
        layout(x0, last),
        case.index(case.rows),
        case.arm,
        case.seeds,
        case.noising_table(),
        case.images(lead) if options & 8 else None,
        case.images(lead) if options & 1 else None,
        case.flags(lead, *case.shape[1:]).float() if options & 2 else None,
        case.flags(n) if options % 3 else None,
        region,
        case.arm_inside if region is not None else None,
        dtype,
    ]


def loss_arguments(arguments: list[Tensor | None], prediction: Tensor) -> list[Tensor | float | None]:
    x0, t, arm, seeds, table, _, trigger, mask, flip, region, arm_inside, _ = arguments
    return [prediction, x0, t, arm, seeds, table, trigger, mask, flip, region, arm_inside, 0.37]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", range(32))
def test_noising_and_loss(shape: tuple[int, int, int, int], options: int, isa: str) -> None:
    for byte, last, dtype in ((True, False, torch.float32), (False, True, torch.bfloat16), (True, True, torch.float16)):
        case = Case(shape, options)
        arguments = noising_arguments(case, byte, last, options, dtype)
        assert_bits(native.fused_noising(*arguments), reference.fused_noising(*arguments))
        prediction = case.images(shape[0], dtype=dtype, channels_last=options % 2 == 1)
        value, gradient = native.fused_loss(*loss_arguments(arguments, prediction))
        value_reference, gradient_reference = reference.fused_loss(*loss_arguments(arguments, prediction))
        assert_bits(gradient, gradient_reference)
        torch.testing.assert_close(value, value_reference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("threads", THREADS)
def test_loss_is_the_sum_in_float64_for_any_threads(threads: int, isa: str) -> None:
    case = Case((3, 3, 120, 111), 5)
    arguments = noising_arguments(case, True, False, 3, torch.float32)
    exact = [a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in arguments]
    prediction = case.images(3)
    with on_threads(threads):
        value, _ = native.fused_loss(*loss_arguments(arguments, prediction))
    truth, _ = reference.fused_loss(*loss_arguments(exact, prediction.double()))
    torch.testing.assert_close(value.double(), truth, rtol=1e-7, atol=0)
    native.set_isa("baseline")
    assert_bits(value, native.fused_loss(*loss_arguments(arguments, prediction))[0])


@pytest.mark.parametrize("shape", EMPTY)
def test_nothing_to_do(shape: tuple[int, int, int, int], isa: str) -> None:
    case = Case(shape)
    arguments = step_arguments(case, (torch.float32,) * 2, (False,) * 3, 15, True)
    bad_row = torch.tensor(9)
    assert native.fused_step(*arguments).shape == shape
    native.fused_step_(*arguments, bad_row)
    assert bad_row == 9
    arguments = noising_arguments(case, True, False, 7, torch.float32)
    assert native.fused_noising(*arguments).shape == shape
    value, gradient = native.fused_loss(*loss_arguments(arguments, torch.zeros(shape)))
    assert_bits(value, torch.zeros(shape[0]))
    assert gradient.shape == shape
    assert native.normal(case.seeds, torch.tensor(0), 0, shape[1:], torch.float32).shape == shape


@pytest.mark.parametrize(("name", "value"), [("arm", 3), ("arm", -1), ("step", 5), ("arm_inside", 9), ("step", -2)])
def test_step_refuses_before_writing(name: str, value: int) -> None:
    arguments = step_arguments(Case((4, 3, 5, 5)), (torch.float32,) * 2, (False,) * 3, 15, True)
    position = {"arm": 3, "step": 4, "arm_inside": 8}[name]
    arguments[position][2] = value
    x, history = arguments[0].clone(), arguments[9].clone()
    with pytest.raises(ValueError, match=f"{name} {value} of sample 2 is out of range: expected 0 to"):
        native.fused_step_(*arguments, None)
    assert_bits(arguments[0], x)
    assert_bits(arguments[9], history)


def test_noising_and_normal_refuse() -> None:
    arguments = noising_arguments(Case((4, 3, 5, 5)), True, False, 7, torch.float32)
    arguments[1][1] = 5
    with pytest.raises(ValueError, match="timestep 5 of sample 1 is out of range: expected 0 to 4"):
        native.fused_noising(*arguments)
    with pytest.raises(ValueError, match="timestep 5 of sample 1"):
        native.fused_loss(*loss_arguments(arguments, torch.zeros(4, 3, 5, 5)))
    with pytest.raises(ValueError, match=r"step 4294967296 of sample 0 is out of range: expected 0 to 4294967295"):
        native.normal(torch.zeros(1, dtype=torch.int64), torch.tensor(2**32), 0, (4,), torch.float32)
    with pytest.raises(ValueError, match="instruction set 'avx9' does not run here"):
        native.set_isa("avx9")


def test_a_wrong_isa_in_the_environment_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDK_ISA", "avx9")
    module, reason = native._load()
    assert module is None
    assert "instruction set 'avx9' does not run here: expected one of " in reason
