"""What benchmarks do on a device, as far as a machine without one can show it: where tensors are, clocks, columns, traces."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdkernels import backends, native
from benchmarks import bench, device, network, normal, report, run, samplers, step, timing, training
from benchmarks.bench import HOST
from benchmarks.registry import BYTES, NETWORK_OPS, OPS, SAMPLER_OPS

TINY = ("--shapes", "2x3x4x4", "--threads", "1", "--repeats", "7", "--providers", "diffusers", "cpu", "reference")
META = torch.device("meta")
MODULES = (normal, step, training, samplers)
without_a_device = pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a moment, from warm caches."""
    monkeypatch.setattr(run, "interleaved", partial(timing.interleaved, least=1e-5))
    monkeypatch.setattr(timing, "_scratch", partial(torch.empty, 1))


@without_a_device
def test_without_a_device_a_sentence_and_the_rows_of_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["step", *TINY, "--device", "cuda"]) == 0
    said = capsys.readouterr()
    assert said.err == "benchmarks: torch finds no CUDA device: the rows that follow are the CPU's, none is a GPU's\n"
    assert "fused_step 2x3x4x4 float32, threads: 1" in said.out
    ours = ["cpu"] if native.available() else []
    assert [line.split()[0] for line in said.out.splitlines()[2:-2]] == ["diffusers", *ours, "reference", "ceiling"]


@without_a_device
def test_without_a_device_no_file_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.json"
    assert run.main(["step", *TINY, "--device", "cuda", "--json", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "benchmarks: the device cuda was asked for with --json and torch finds none: expected --device cpu\n"
    )
    assert not file.exists()


def test_the_machine_tells_where_float32_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert report.tf32() == "convolutions"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert report.tf32() == "convolutions, matrix products"
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert report.tf32() == "nowhere"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--device", "cudo"], "unknown device 'cudo': expected one of cpu, cuda; the nearest is 'cuda'"),
        (["step", "--nvtx"], "--nvtx marks ranges for Nsight, which sees CUDA devices: this run is on the CPU"),
        (["step", "--nvtx", "--trace", "t.json"], "--nvtx times nothing and writes no file: expected it without"),
    ],
)
def test_mistakes_get_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"benchmarks: {sentence}")
    assert len(said.err.splitlines()) == 1


def on_the_device(name: str, *tensors: object) -> None:
    """In place of the gates' comparisons: values are nothing that a tensor without memory has."""
    for tensor in tensors:
        assert not isinstance(tensor, Tensor) or tensor.device == META, f"{name} is on {tensor.device}"


def from_the_host(op: str, case: dict[str, Any], where: str) -> None:
    """In place of the comparison with the reference, which moves its arguments itself."""
    assert where == "meta"
    assert {value.device for value in case.values() if isinstance(value, Tensor)} == {HOST}


def generator(real: Callable[[], torch.Generator], where: torch.device | str = "cpu") -> torch.Generator:
    """The meta device draws nothing and has no generator of its own."""
    return real()


@pytest.mark.parametrize("op", OPS)
def test_everything_runs_on_the_device_that_was_given(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses tensors of two devices in one op, on the meta device too: providers and gates must make theirs on it."""
    monkeypatch.setattr(torch, "Generator", partial(generator, torch.Generator))
    for module in MODULES:
        replaced: dict[str, Any] = {
            "ours": lambda _: ("triton",),
            "compiled": lambda function: function,
            "assert_close": on_the_device,
            "assert_standard_normal": on_the_device,
        }
        for name, value in replaced.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("bdkernels.testing.assert_same_bits", on_the_device)
    monkeypatch.setattr("bdkernels.testing.assert_matches_reference", from_the_host)
    providers = OPS[op]((2, 3, 4, 4), META)
    assert "triton" in providers
    for name, provider in providers.items():
        provider.check()
        for _ in range(provider.cycle):
            result = provider.run()
        for tensor in result if isinstance(result, tuple) else (result,):
            on_the_device(name, tensor)


@pytest.mark.parametrize("op", NETWORK_OPS)
def test_a_network_off_the_cpu_is_stock_s(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device that was given; compiled too, also its gradients, which a CPU's compiler gets wrong."""
    monkeypatch.setattr(network, "compiled", lambda function: function)
    providers = NETWORK_OPS[op]((2, 1, 16, 16), META)
    assert list(providers) == ["diffusers", "torch", "compile", "ceiling"]
    for name, provider in providers.items():
        result = provider.run()
        for tensor in result if isinstance(result, list) else (result,):
            on_the_device(name, tensor)


COUNTED = {
    "fused_step": 3 * 4 * 2 * 48,  # x, m, x'
    "normal": 4 * 2 * 48,
    "fused_noising": 2 * 4 * 2 * 48 + 3 * 4 * 48,  # x0, x_t; target, trigger and mask once
    "fused_loss": 3 * 4 * 2 * 48 + 2 * 4 * 48,  # prediction, x0, gradient; trigger and mask once
    "step/ddpm": 3 * 4 * 2 * 48,
    "step/ddim": 3 * 4 * 2 * 48,
    # 20 rows: the first has no x0 before it and the last, which leads to the data, takes none; the 18 between read what
    # the 18 before them stored.
    "step/dpm++": (3 + (18 + 18) / 20) * 4 * 2 * 48,
    # 39 rows: 19 pairs of which one stores the slope and the other reads it, and the last step, which has no second.
    "step/heun": (3 + (19 + 19) / 39) * 4 * 2 * 48,
}


@pytest.mark.parametrize("op", COUNTED)
def test_bytes_are_those_counted_by_hand(op: str) -> None:
    assert BYTES[op]((2, 3, 4, 4)) == pytest.approx(COUNTED[op], rel=1e-12)


def test_every_op_has_its_bytes() -> None:
    assert set(BYTES) == set(OPS)
    assert all(BYTES[op]((1, 3, 4, 4)) >= 3 * 4 * 48 for op in SAMPLER_OPS)


class Recorded:
    """An event whose time is what the log says."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("event")
        self.at = len(self.log)

    def elapsed_time(self, after: Recorded) -> float:
        assert self.log[-1] == "wait", "times are read before the device is done"
        return float(after.at - self.at)


def test_the_clock_of_a_stream_counts_what_is_between_its_events() -> None:
    log: list[str] = []
    evict, call, wait = (partial(log.append, word) for word in ("evict", "call", "wait"))
    seconds = device.between_events(call, 3, evict, partial(Recorded, log), wait)
    assert log == ["evict", "event", "call", "event"] * 3 + ["wait"]
    assert seconds == 3 * 2 / 1e3  # from event to event two places, in milliseconds


def test_queueing_is_timed_from_an_empty_queue() -> None:
    log: list[str] = []
    seconds = device.queueing(lambda: time.sleep(1e-4), 2, partial(log.append, "wait"))
    assert len(log) == device.HOST_ROUNDS + 1
    assert 1e-4 <= seconds < 1e-2


def test_launches_are_counted_by_the_runtime_and_the_driver() -> None:
    names = [
        "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync",
        "cudaEventRecord", "cudaStreamSynchronize", "aten::add", "step_kernel",
    ]  # fmt: skip
    assert device.launches(iter(names)) == 4


def test_the_clock_and_what_calls_run_in_are_the_device_s() -> None:
    log: list[str] = []

    class Within:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            log.append(f"in {self.name}")

        def __exit__(self, *_: object) -> None:
            log.append("out")

    def clock(function: Callable[[], object], loops: int) -> float:
        function()
        return float(loops)

    runs = {name: partial(log.append, name) for name in "ab"}
    timings = timing.interleaved(runs, 2, clock=clock, within=Within)  # type: ignore[arg-type]
    assert timings["a"].median == 1
    assert log == [*(["in a", "a", "a", "out", "in b", "b", "b", "out"]), *["in a", "a", "out", "in b", "b", "out"] * 2]


def test_rows_of_ours_are_the_device_s_backends() -> None:
    assert bench.ours(HOST) == (("cpu",) if native.available() else ())
    assert bench.ours(META) == ()
    usual = backends.name_for(HOST, torch.float32)
    for provider, expected in (("reference", "reference"), ("diffusers", usual), ("ceiling", usual)):
        with bench.backend_of(provider):
            assert backends.name_for(HOST, torch.float32) == expected


def test_columns_of_a_device_are_shown_and_written() -> None:
    timings = {name: timing.Timing(*[t] * 3) for name, t in (("diffusers", 8e-6), ("triton", 4e-6), ("cuda", 2e-6),
                                                             ("ceiling", 1e-6), ("copy", 1e-6))}  # fmt: skip
    traffic = report.traffic(4e6, timings)
    assert traffic["cuda"] == {"gb_per_s": 2000.0, "of_copy": 0.5}
    assert report.traffic(4e6, {"cpu": timings["cuda"]}) == {"cpu": {}}
    more = {name: columns | {"launches": 1.0, "host_us": 2.5} for name, columns in traffic.items()}
    measured = report.rows("fused_step", (1, 1, 10, 100), 1, timings, more)
    lines = report.table(measured, "cuda").splitlines()
    assert lines[1].split()[-4:] == ["gb_per_s", "of_copy", "launches", "host_us"]
    assert lines[2].split() == ["diffusers", "8.000", "8.000", "8.000", "4.00x", "12.5%", "500", "0.125", "1", "2.5"]
    assert lines[-1] == "ours is ahead of every peer measured"
    assert report.fastest(measured).provider == "cuda"  # type: ignore[union-attr]
    written = report.document([], measured, device.Cpu())["rows"]
    assert written[2]["host_us"] == 2.5
    assert "more" not in written[2]


def test_without_our_kernels_the_table_says_what_is_missing() -> None:
    timings = {name: timing.Timing(1e-6, 1e-6, 1e-6) for name in ("reference", "ceiling")}
    measured = report.rows("normal", (1, 1, 1, 1), 1, timings, {name: {} for name in timings})
    said = report.table(measured, "cuda").splitlines()[-1]
    assert said.startswith("ours here is the plain torch reference (")
    assert torch.cuda.is_available() or "triton" in said
    assert torch.cuda.is_available() or "CUDA" in said


def test_a_trace_has_a_range_of_each_op_and_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    assert run.main(["step", "normal", "step/ddim", *TINY, "--trace", str(file)]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    document = json.loads(file.read_text())
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    ranges = {
        event["name"]: event for event in events if event["cat"] == "user_annotation" and " 2x3x4x4" in event["name"]
    }
    assert list(ranges) == ["fused_step 2x3x4x4", "normal 2x3x4x4", "step/ddim 2x3x4x4"]

    def inside(op: str) -> list[str]:
        outer = ranges[op]
        return [
            e["name"] for e in events if outer["ts"] <= e["ts"] and e["ts"] + e["dur"] <= outer["ts"] + outer["dur"]
        ]

    assert {"diffusers", "reference", "ceiling"} <= set(inside("fused_step 2x3x4x4"))
    if native.available():
        assert inside("fused_step 2x3x4x4").count("bdk::fused_step_") == 3
        assert inside("step/ddim 2x3x4x4").count("bdk::fused_step_") == samplers.STEPS
        assert inside("normal 2x3x4x4").count("bdk::normal") == 3
    ends = [ranges[name]["ts"] + ranges[name]["dur"] for name in ranges]
    assert all(end <= ranges[name]["ts"] for end, name in zip(ends, list(ranges)[1:], strict=False))


class OnTheHost(device.Cuda):
    """What a CUDA device adds to a table, on tensors of the host: only its clock and its profiler's marks are not there."""

    activities = device.Cpu.activities

    def __init__(self) -> None:
        self.where, self.name, self.caches = HOST, "none", "warm"

    def seconds(self, function: Callable[[], object], loops: int) -> float:
        return timing.seconds(function, loops)

    def wait(self) -> None:
        pass

    def nvtx(self) -> AbstractContextManager[Any]:
        return torch.profiler.record_function("marked")


def test_the_further_columns_reach_the_table_and_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "find", lambda name, kept: OnTheHost())
    file = tmp_path / "rows.json"
    assert run.main(["step", "step/ddim", *TINY, "--json", str(file)]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("provider")]
    assert [head.split()[-4:] for head in heads] == [["gb_per_s", "of_copy", "launches", "host_us"]] * 2
    rows = json.loads(file.read_text())["rows"]
    assert [row["provider"] for row in rows if row["op"] == "fused_step"][-2:] == ["ceiling", "copy"]
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(3 * 4 / row["ns_per_element"], rel=0.01, abs=0.01)
        assert row["launches"] == 0
        assert row["host_us"] > 0
        assert row["of_copy"] == 1 or row["provider"] != "copy"


def test_marks_are_made_of_checked_providers_and_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "find", lambda name, kept: OnTheHost())
    with torch.profiler.profile(activities=device.Cpu.activities) as recorded:
        assert run.main(["normal", *TINY, "--nvtx"]) == 0
    assert capsys.readouterr().out == ""
    events = {event.name: event for event in recorded.events() or ()}
    marked, region = (events[name].time_range for name in ("marked", "normal 2x3x4x4"))
    assert marked.start <= region.start <= events["ceiling"].time_range.start
    assert events["ceiling"].time_range.end <= region.end <= marked.end
    monkeypatch.setattr(normal.reference, "normal", lambda **_: torch.zeros(2, 3, 4, 4))
    assert run.main(["normal", *TINY, "--nvtx"]) == 1
