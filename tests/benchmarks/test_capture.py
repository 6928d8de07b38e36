"""The whole loop with its network: its gate, its rows on a machine without a GPU, its words."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdengine.sampler import Sampler
from benchmarks import capture, run, timing
from benchmarks.bench import HOST, ours
from benchmarks.registry import LOOP_OPS, OPS, shapes

TINY = ("--threads", "1", "--repeats", "7", "--shapes", "2x1x16x16", "--providers", "diffusers", "cpu", "reference")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of three steps, measured for a moment from warm caches."""
    monkeypatch.setattr(run, "interleaved", partial(timing.interleaved, least=1e-5))
    monkeypatch.setattr(timing, "_scratch", partial(torch.empty, 1))
    for op in LOOP_OPS:
        monkeypatch.setitem(run.EVERY_OP, op, partial(capture.sampling_loop, 3))


def test_it_is_measured_where_it_is_asked_for() -> None:
    assert run.parsed(["capture"]).ops == list(LOOP_OPS) == ["capture/20", "capture/100"]
    assert not set(LOOP_OPS) & set(OPS)
    assert shapes("capture/20") == ((256, 1, 16, 16),)


def test_the_eager_rows_of_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "loops.json"
    assert run.main(["capture", *TINY, "--json", str(file)]) == 0
    said = capsys.readouterr()
    assert said.err.count("capture: a captured loop needs CUDA, so it has no row here\n") == 2
    assert "images_per_s" in said.out
    rows = json.loads(file.read_text())["rows"]
    eager = ours(HOST) or ("reference",)
    assert [(row["op"], row["provider"]) for row in rows] == [
        (op, provider) for op in LOOP_OPS for provider in ("diffusers", *eager, "ceiling")
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(1e9 / (256 * row["ns_per_element"]), rel=0.05, abs=0.06)


def test_a_loop_that_is_off_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    batch = Sampler.batch

    def a_little_off(sampler: Sampler, *arguments: Tensor) -> Tensor:
        return batch(sampler, *arguments) + 1e-3

    monkeypatch.setattr(Sampler, "batch", a_little_off)
    assert run.main(["capture/20", *TINY]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert (
        f"capture/20: {(ours(HOST) or ('reference',))[0]} is wrong, so nothing is timed: the worst of 4 images is"
        in said.err
    )


def test_images_of_another_size_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["capture", "--shapes", "2x3x32x32"]) == 2
    expected = "benchmarks: shape 2x3x32x32 is not of the network digits-clean: expected 2x1x16x16\n"
    assert capsys.readouterr().err == expected


@torch.inference_mode()
def test_what_is_timed_on_the_host_is_the_loop_without_its_read() -> None:
    """The same images; a network that is not finite is seen by the loop that reads its flag alone."""
    provider = capture.sampling_loop(3, (2, 1, 16, 16), HOST)[(ours(HOST) or ("reference",))[0]]
    assert provider.queued is not None
    assert provider.steps == 3
    images, again = provider.run(), provider.queued()
    assert isinstance(images, Tensor)
    assert isinstance(again, Tensor)
    assert torch.equal(images, again)


@pytest.mark.slow
def test_the_compiled_pipeline_passes_the_gate() -> None:
    capture.sampling_loop(3, (2, 1, 16, 16), HOST)["compile"].check()
