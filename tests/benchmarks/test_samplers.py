"""The samplers' steps: which stock scheduler they are held against, their gate, their loops and their summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bdengine.solvers import SAMPLERS, Table, dpm_multistep
from bdkernels import Step
from benchmarks import report, run, samplers, timing
from benchmarks.registry import OPS, SAMPLER_OPS, shapes

TINY = ("--shapes", "2x3x4x4", "--threads", "1", "--repeats", "7")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a moment, from warm caches."""
    monkeypatch.setattr(run, "interleaved", partial(timing.interleaved, least=1e-5))
    monkeypatch.setattr(timing, "_scratch", partial(torch.empty, 1))


def test_every_sampler_has_a_stock_scheduler_and_an_op() -> None:
    assert set(samplers.STOCK) == set(SAMPLERS)
    assert run.parsed(["samplers"]).ops == list(SAMPLER_OPS)
    assert {op for op in OPS if op.startswith("step/")} == {f"step/{name}" for name in SAMPLERS}
    assert shapes("step/ddim")[0] == (1, 3, 32, 32)
    assert shapes("step/ddim")[-1] == (1024, 3, 32, 32)


def test_two_samplers_are_measured_summed_up_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "samplers.json"
    assert run.main(["step/ddpm", "step/dpm++", *TINY, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["op"] for row in rows] == ["step/ddpm"] * 3 + ["step/dpm++"] * 3
    assert [row["provider"] for row in rows][::2] == ["diffusers", "ceiling", rows[4]["provider"]]
    assert all(row["ns_per_element"] > 0 for row in rows)
    assert "ours is slower in " in capsys.readouterr().out.splitlines()[-3]


def wrong_order(table: Table, nodes: samplers.Nodes) -> Table:
    return dpm_multistep(nodes, order=1)


def one_wrong_coefficient(table: Table, nodes: samplers.Nodes) -> Table:
    rows = table.rows.copy()
    rows[10, Step.H] *= 1.001
    return replace(table, rows=rows)


def a_row_short(table: Table, nodes: samplers.Nodes) -> Table:
    return replace(table, rows=table.rows[:-1])


@pytest.mark.parametrize("spoil", [wrong_order, one_wrong_coefficient, a_row_short])
def test_a_wrong_table_prints_no_numbers(
    spoil: Callable[[Table, samplers.Nodes], Table],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = SAMPLERS["dpm++"]
    wrong = replace(kind, build=lambda nodes, config, order: spoil(kind.build(nodes, config, order), nodes))
    monkeypatch.setitem(samplers.SAMPLERS, "dpm++", wrong)
    file = tmp_path / "samplers.json"
    assert run.main(["step/dpm++", *TINY, "--json", str(file)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(("step/dpm++: cpu is wrong, so", "step/dpm++: reference is wrong, so"))
    assert not file.exists()


@pytest.mark.parametrize("name", samplers.STOCK)
def test_a_second_loop_is_the_first(name: str) -> None:
    case, scheduler = samplers.Case(name, (2, 3, 4, 4)), samplers.STOCK[name].make()
    rows = len(case.table)
    theirs = samplers.stock_steps(scheduler, case.stock_start(scheduler), samplers.network)
    ours = samplers.our_steps(case.table, case.start, case.seeds, samplers.network)

    def loop(steps: samplers.Iterator[Tensor]) -> Tensor:
        torch.manual_seed(0)
        return torch.stack([x.clone() for x in islice(steps, rows)])

    for steps in (theirs, ours):
        assert torch.equal(loop(steps), loop(steps))


def test_unequal_calls_are_timed_in_whole_cycles() -> None:
    calls: list[int] = []
    timing.interleaved({"a": partial(calls.append, 1)}, repeats=5, cycle=20)
    assert len(calls) == timing.WARM_UP + 5 * 20


def row(op: str, provider: str, size: int, ns: float) -> report.Row:
    return report.Row(op, provider, [size, 3, 4, 4], "float32", 2, ns, ns, ns, 0.5 / ns)


def test_the_summary_has_every_ratio_and_names_the_slower() -> None:
    measured = [
        row(op, provider, size, ns)
        for op, theirs in (("step/a", (8.0, 6.0)), ("step/b", (1.0, 4.0)))
        for size, stock in zip((1, 16), theirs, strict=True)
        for provider, ns in (("diffusers", stock), ("cpu", 2.0), ("ceiling", 0.5))
    ]
    lines = report.summary(measured).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["diffusers", "to", "ours", "1x3x4x4", "16x3x4x4", "median"],
        ["step/a", "4.00x", "3.00x", "3.50x"],
        ["step/b", "0.50x", "2.00x", "1.25x"],
    ]
    assert lines[3:] == ["median 2.50x, least 0.50x", "ours is slower in step/b 1x3x4x4 (0.50x)"]
    assert "no ratios" in report.summary(measured[:1])


def test_the_gate_measures_the_whole_loop() -> None:
    case = samplers.Case("ddim", (2, 3, 4, 4))
    case.check(case.truth)
    with pytest.raises(AssertionError, match="from float64 truth: expected at most 1e-05"):
        case.check(case.truth * (1 + 2e-5))
    assert np.isfinite(case.truth.numpy()).all()
