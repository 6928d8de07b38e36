"""The benchmark command: its gate, its file, its words. Speed itself is nothing that a test can know."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bdkernels import native, reference
from benchmarks import bench, report, run, step, timing
from benchmarks.registry import EVERY_OP, OPS, SAMPLER_OPS, shapes

TINY = ("--shapes", "2x3x4x4", "--threads", "1", "--repeats", "7")
UNCOMPILED = ("--providers", "diffusers", "torch", "cpu", "reference")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a moment, from warm caches."""
    monkeypatch.setattr(run, "interleaved", partial(timing.interleaved, least=1e-5))
    monkeypatch.setattr(timing, "_scratch", partial(torch.empty, 1))


def test_every_op_is_checked_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "made" / "machine.json"
    assert run.main([*TINY, *UNCOMPILED, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert set(document) == {"machine", "rows"}
    assert set(document["machine"]) == {
        "device", "cpu", "cores", "vector", "os", "torch", "native", "versions", "caches", "tf32", "load", "commit", "date",
        "command",
    }  # fmt: skip
    assert document["machine"]["command"].startswith("python -m benchmarks.run --shapes 2x3x4x4 --threads 1")
    ours = ["cpu", "reference"] if native.available() else ["reference"]
    providers = {
        **{op: ["diffusers", "torch", *ours, "ceiling"] for op in OPS},
        **{op: ["diffusers", ours[0], "ceiling"] for op in SAMPLER_OPS},
        "fused_loss": ["torch", *ours, "ceiling"],
    }
    assert [(r["op"], r["provider"]) for r in document["rows"]] == [(op, p) for op in OPS for p in providers[op]]
    for row in document["rows"]:
        assert set(row) == {
            "op", "provider", "shape", "dtype", "threads", "ns_per_element", "p20", "p80", "of_ceiling",
        }  # fmt: skip
        assert (row["shape"], row["dtype"], row["threads"]) == ([2, 3, 4, 4], "float32", 1)
        assert 0 < row["p20"] <= row["ns_per_element"] <= row["p80"]
        assert row["of_ceiling"] == 1 or row["provider"] != "ceiling"
    out = capsys.readouterr().out
    assert all(f"{op} 2x3x4x4 float32, threads: 1" in out for op in OPS)
    assert out.count("ns/element") == len(OPS)


def identity(*_: Any) -> None:
    """A step that leaves ``x`` as it was."""


@pytest.mark.parametrize("culprit", ["cpu", "reference", "diffusers", "torch"])
def test_a_red_gate_prints_no_numbers(
    culprit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if culprit == "cpu":
        if not native.available():
            pytest.skip(native.reason())
        monkeypatch.setattr(native, "fused_step_", identity)
    elif culprit == "reference":
        monkeypatch.setattr(reference, "fused_step", lambda x, *_, **__: x.clone())
    elif culprit == "diffusers":
        monkeypatch.setattr(step.DDPMScheduler, "_get_variance", lambda *_, **__: torch.tensor(1.0))
    else:
        monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    file = tmp_path / "machine.json"
    assert run.main(["step", *TINY, *UNCOMPILED, "--json", str(file)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"fused_step: {culprit} is wrong, so nothing is timed: ")
    assert len(said.err.splitlines()) == 1
    assert not file.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fused_stap"], "unknown op 'fused_stap': expected one of .*; the nearest is 'fused_step'"),
        (["--providers", "cup"], "unknown provider 'cup': expected one of .*; the nearest is 'cpu'"),
        (["--shapes", "256x3x32"], r"shape '256x3x32' is not \[N, C, H, W\]: expected .* as in 256x3x32x32"),
        (["--shapes", "0x3x4x4"], "shape '0x3x4x4' is not"),
        (["--repeats", "3"], "repeats is 3: expected at least 7"),
        (["--threads", "0"], "threads is 0: expected at least 1"),
    ],
)
def test_mistakes_get_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(said.err)


def test_short_names() -> None:
    assert run.parsed(["step", "normal", "fused_step"]).ops == ["fused_step", "normal"]
    assert run.parsed([]).ops == list(OPS)
    assert run.parsed([]).shapes == []
    assert shapes("fused_step") == ((256, 3, 32, 32), (1024, 3, 32, 32))


def row(provider: str, ns: float) -> report.Row:
    return report.Row("fused_step", provider, [1, 3, 4, 4], "float32", 2, ns, ns, ns, 0.5 / ns)


def test_the_table_says_where_ours_is_not_ahead() -> None:
    text = report.table([row("diffusers", 20.0), row("compile", 1.0), row("cpu", 2.0), row("ceiling", 0.5)])
    assert "diffusers      20.000   20.000   20.000   10.00x       2.5%" in text
    assert text.endswith("ours is not ahead of compile (0.50x)")
    assert report.table([row("torch", 3.0), row("cpu", 2.0)]).endswith("ours is ahead of every peer measured")
    assert "plain torch reference" in report.table([row("torch", 3.0), row("reference", 5.0), row("ceiling", 0.5)])


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []
    timings = timing.interleaved({name: partial(calls.append, name) for name in "ab"}, repeats=5, least=1e-9)
    assert calls[-10:] == list("ababababab")
    assert all(0 < t.p20 <= t.median <= t.p80 for t in timings.values())


def test_calibration_fills_the_time() -> None:
    loops = timing.calibrate(partial(sum, range(100)), 2e-3)
    assert loops > 10
    assert timing.calibrate(partial(timing.seconds, partial(sum, range(10**5)), 10), 1e-6) == 1


def test_gates_refuse_nan_and_bias() -> None:
    z = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    bench.assert_standard_normal("z", z)
    for wrong in (z + 0.2, z * 1.2, z * torch.nan):
        with pytest.raises(AssertionError, match="z has mean"):
            bench.assert_standard_normal("z", wrong)
    with pytest.raises(AssertionError, match="x is nan from float64 truth"):
        bench.assert_close("x", z * torch.nan, z.double())


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op not in SAMPLER_OPS])
def test_the_compiler_passes_the_gate(op: str) -> None:
    OPS[op]((4, 3, 8, 8))["compile"].check()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["network/forward", "network/training"])
def test_the_accelerated_network_passes_the_gate_under_the_compiler(op: str) -> None:
    EVERY_OP[op]((4, 3, 8, 8))["cpu+graph"].check()
