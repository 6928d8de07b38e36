"""The benchmarks on a CUDA device: every gate is green, every column is a number, what is shown is what ran."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import device, run, timing
from benchmarks.bench import Provider, ours
from benchmarks.registry import NETWORK_OPS, OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

TINY = ("--device", "cuda", "--shapes", "16x3x32x32", "--repeats", "7")
UNCOMPILED = ("--providers", "diffusers", "torch", "triton", "cuda", "reference")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a moment."""
    monkeypatch.setattr(run, "interleaved", partial(timing.interleaved, least=1e-4))


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_checked_and_measured(op: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert run.main([op, *TINY, *UNCOMPILED, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert torch.cuda.get_device_name() in document["machine"]["device"]
    rows = {row["provider"]: row for row in document["rows"]}
    assert {*ours(torch.device("cuda")), "ceiling", "copy"} <= set(rows)
    for row in rows.values():
        assert min(row["ns_per_element"], row["gb_per_s"], row["of_copy"], row["host_us"]) > 0
    fused = [rows[name]["launches"] for name in ours(torch.device("cuda"))]
    one_call = 2 if op == "fused_loss" else 1  # its parts are summed by a kernel of their own
    assert all(one_call <= launched <= one_call + 4 for launched in fused)
    if op == "fused_step":
        assert fused == [1] * len(fused)
        assert rows["diffusers"]["launches"] > 5
        assert rows["ceiling"]["launches"] == 1


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("op", NETWORK_OPS)
def test_every_network_is_checked_and_measured(op: str, tmp_path: Path) -> None:
    """Also the gradients of the compiled one, which only a CPU gets wrong; a network moves no bytes that could be counted."""
    file = tmp_path / "rows.json"
    words = ["--device", "cuda", "--shapes", "8x1x16x16", "4x3x32x32", "--repeats", "7"]
    assert run.main([op, *words, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["machine"]["tf32"] == "convolutions"
    rows = document["rows"]
    assert [row["provider"] for row in rows] == 2 * ["diffusers", "torch", "compile", "ceiling"]
    for row in rows:
        assert min(row["ns_per_element"], row["launches"], row["host_us"]) > 0
        assert "gb_per_s" not in row


def test_the_clock_is_the_device_s() -> None:
    """A sleep on the device is timed though the host does not wait for it, and not as time of the host's."""
    cuda = device.Cuda()
    cycles = 10_000_000
    sleep = Provider(lambda: torch.cuda._sleep(cycles))
    long, short = (cuda.seconds(partial(torch.cuda._sleep, n), 5) / 5 for n in (cycles, cycles // 10))
    assert 5 < long / short < 15
    host = cuda.host(sleep)
    assert host["launches"] == 1
    assert host["host_us"] < 1e6 * long / 4


def test_the_caches_are_cold() -> None:
    """What fits the L2 takes longer to copy from memory than again; the sleep lets the host get ahead as the flush does."""
    cuda = device.Cuda()
    size = torch.cuda.get_device_properties(cuda.where).L2_cache_size // 4
    copy = cuda.copy(size)["copy"].run
    event = partial(torch.cuda.Event, enable_timing=True)
    warm = device.between_events(copy, 200, partial(torch.cuda._sleep, 200_000), event, cuda.wait)
    assert cuda.seconds(copy, 200) > 1.1 * warm


@pytest.mark.usefixtures("hurried")
def test_a_captured_loop_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "loops.json"
    words = ["capture/20", "--device", "cuda", "--shapes", "16x1x16x16", "--repeats", "7", "--json", str(file)]
    assert run.main([*words, "--providers", "diffusers", *ours(torch.device("cuda")), "captured"]) == 0
    rows = {row["provider"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["captured"]["launches"] < 3  # one graph a step, and the start of a batch over 20 steps
    assert rows["captured"]["launches"] < rows["diffusers"]["launches"] / 10


@pytest.mark.usefixtures("hurried")
def test_a_trace_has_kernels_and_marks_run(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    assert run.main(["step", "normal", *TINY, *UNCOMPILED, "--trace", str(file)]) == 0
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    kernels = [event["name"] for event in events if event["cat"] == "kernel"]
    assert any("step_kernel" in name for name in kernels)
    assert any("normal_kernel" in name for name in kernels)
    assert {"fused_step 16x3x32x32", "bdk::fused_step_", "bdk::normal"} <= {event["name"] for event in events}
    assert run.main(["step", *TINY, *UNCOMPILED, "--nvtx"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not on PATH")
def test_nsight_shows_each_op_by_its_name(tmp_path: Path) -> None:
    """The bound step of the samplers, which the dispatcher does not mark, too; and nothing but what was to be profiled."""
    ops = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "step/ddim",
        "normal",
        *TINY,
        "--providers",
        "cuda",
        "triton",
        "--nvtx",
    ]
    record = ["nsys", "profile", "--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--capture-range-end=none"]
    tell = ["nsys", "stats", "--report=nvtx_pushpop_sum", "--format=csv", str(tmp_path / "ops.nsys-rep")]
    for command in ([*record, f"--output={tmp_path / 'ops'}", *ops], tell):
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    for name in ("step/ddim 16x3x32x32", "bdk::fused_step_", "normal 16x3x32x32", "bdk::normal"):
        assert name in done.stdout
