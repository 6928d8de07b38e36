"""What a user waits for: the rows of whole loops and training steps, their gates, their shares and their tables."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bdkernels
from bdengine.sampler import Sampler
from benchmarks import loop, report, run, tables, timing, train_step
from benchmarks.bench import HOST, Provider, ours
from benchmarks.registry import OPS, WHOLE_OPS, shapes

OURS = (ours(HOST) or ("reference",))[0]
TINY = ("--threads", "1", "--repeats", "7", "--providers", "diffusers", "torch", "cpu", "reference")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of two steps, measured for a moment from warm caches."""
    monkeypatch.setattr(run, "interleaved", partial(timing.interleaved, least=1e-5))
    monkeypatch.setattr(timing, "_scratch", partial(torch.empty, 1))
    monkeypatch.setattr(loop, "MANY", 2)
    loop.truth.cache_clear()


def test_they_are_measured_where_they_are_asked_for() -> None:
    assert run.parsed(["whole"]).ops == list(WHOLE_OPS)
    assert not set(WHOLE_OPS) & set(OPS)
    assert shapes("loop") == ((256, 1, 16, 16), (8, 3, 32, 32))


@pytest.mark.parametrize(
    ("op", "share"), [("loop", "step_share"), ("train", "input_share"), ("inversion", "step_share")]
)
def test_rows_have_their_speed_and_their_share(
    op: str, share: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert run.main([op, *TINY, "--shapes", "4x1x16x16", "--json", str(file)]) == 0
    assert share in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["diffusers", "torch", OURS, "ceiling"]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(1e9 / (256 * row["ns_per_element"]), rel=0.05, abs=0.06)
        assert 0 < row[share] < 0.9 or (row["provider"], row[share]) == ("ceiling", 0)
    head, _, line = tables.markdown([report.of_row(row) for row in rows]).splitlines()
    assert head == f"| op, float32, images/s | diffusers | torch | {OURS} | ceiling |"
    assert line.startswith(f"| `{op}` 4x1x16x16 | ")


def test_a_sampler_that_is_off_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Sampler.batch
    monkeypatch.setattr(Sampler, "batch", lambda *arguments: batch(*arguments) + 1e-3)
    assert run.main(["loop", *TINY, "--shapes", "4x1x16x16"]) == 1
    assert f"loop: {OURS} is wrong, so nothing is timed: the worst of 4 images is" in capsys.readouterr().err


def test_an_inversion_with_another_gradient_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = bdkernels.fused_step
    monkeypatch.setattr(bdkernels, "fused_step", lambda x, m, *a, **k: honest(x, 1.01 * m, *a, **k))
    assert run.main(["inversion", *TINY, "--shapes", "4x1x16x16"]) == 1
    assert f"inversion: {OURS} is wrong, so nothing is timed: the gradient is" in capsys.readouterr().err


@pytest.mark.parametrize("culprit", ["diffusers", "torch", OURS])
def test_a_step_on_other_noise_is_not_timed(
    culprit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if culprit == OURS:
        honest = bdkernels.fused_noising
        monkeypatch.setattr(bdkernels, "fused_noising", lambda *a, **k: honest(*a, **k) * 1.01)
    elif culprit == "diffusers":
        formula = train_step.published
        monkeypatch.setattr(train_step, "published", lambda *a: (formula(*a)[0] * 1.01, *formula(*a)[1:]))
    else:
        by_hand = train_step.loop_by_hand

        def off(*arguments: object) -> train_step.Peer:
            peer = by_hand(*arguments)  # type: ignore[arg-type]

            def inputs() -> train_step.Given:
                given = peer.inputs()
                return replace(given, eps=given.eps * 1.01)

            return replace(peer, inputs=inputs)

        monkeypatch.setattr(train_step, "loop_by_hand", off)
    assert run.main(["train", *TINY, "--shapes", "4x1x16x16"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"train: {culprit} is wrong, so nothing is timed: the gradient is" in said.err


def test_the_published_items_are_the_formula() -> None:
    """Of each image, mirrored or not: ``y`` and ``R``, as the engine's trainer has them."""
    trainer = train_step.trainer_of((4, 1, 16, 16), HOST)
    items = train_step.Digits(trainer)
    assert trainer.attack is not None
    assert 0.08 < items.poisoned.mean() < 0.12
    for index in (*torch.arange(4).tolist(), *items.poisoned.nonzero()[0][:4].tolist()):
        item, x = items[index], trainer.pixels[index].float() / 127.5 - 1
        assert any(torch.allclose(item["image"], one, atol=1e-6) for one in (x, x.flip(2)))
        attack, stamped = trainer.attack, trainer.attack.mask * item["image"] + trainer.attack.stamp
        expected = (attack.target, stamped) if items.poisoned[index] else (item["image"], torch.zeros_like(x))
        assert torch.equal(item["target"], expected[0])
        assert torch.allclose(item["pixel_values"], expected[1])


def test_a_part_of_an_op_is_told_as_the_whole() -> None:
    seconds = timing.Timing(2.0, 1.0, 3.0)
    assert seconds.of(lambda s: 10 * s + 1) == timing.Timing(21.0, 11.0, 31.0)
    of = {"a": Provider(int, whole=lambda s: s), "ceiling": Provider(int)}
    assert [report.shares(name, of, {})["calculated"] for name in of] == [1.0, 0.0]


def test_what_takes_long_is_warm_after_one_call() -> None:
    calls: list[int] = []

    def clock(call: object, loops: int) -> float:
        calls.append(loops)
        return 1.0

    timing.warm(int, clock)
    assert calls == [1]


def answers(net: object, x: Tensor) -> Tensor:
    return net(x, torch.tensor(5)).sample  # type: ignore[operator]


def test_a_network_that_answers_at_once_leaves_the_other_as_it_was() -> None:
    net, m = loop.Networks((2, 1, 16, 16), False, HOST).unet(), torch.ones(2, 1, 16, 16)
    before = answers(net, m)
    assert answers(loop.answering(net, m), m) is m
    assert torch.equal(answers(net, m), before)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "provider"), [("loop", "compile"), ("train", "cpu+graph")])
def test_compiled_rows_pass_their_gates(op: str, provider: str) -> None:
    WHOLE_OPS[op]((4, 1, 16, 16), HOST)[provider].check()
