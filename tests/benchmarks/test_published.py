"""The published measurement and ours: what stock's loop begins with, a kill, the intervals, the calculated time, the gate."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ddpm import pipeline_ddpm

from bdengine.checkpoint import digest, load_unet
from bdengine.files import read_json
from bdengine.pictures import path_of
from benchmarks import pipeline, published, report, run, tables, timing
from benchmarks.bench import HOST, ours

IMAGES = 40
"""Of an arm: more than the features of a Fréchet distance."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes, of a run with three steps."""
    folder = tmp_path_factory.mktemp("published")
    words = ["--out", str(folder / "images"), "--json", str(folder / "scores.json"), "--steps", "3"]
    assert published.main([*words, "--images", str(IMAGES)]) == 0
    return read_json(folder / "scores.json")


@pytest.fixture
def agreed(found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Published scores that are ours, and ours as the command tells them."""
    (tmp_path / "scores.json").write_text(json.dumps({"published": {"arms": found["ours"]["arms"]}}))
    monkeypatch.setattr(pipeline, "SCORES", tmp_path / "scores.json")
    arms: dict[str, Any] = {"clean": {}, "triggered": {}}
    for arm, scores in found["ours"]["arms"].items():
        start, clip = arm.split("/")
        arms[start][clip] = scores
    return arms


def test_the_scores_that_are_there_are_of_the_model_that_is_there() -> None:
    scores = read_json(pipeline.SCORES)
    assert scores["weights_sha256"] == digest(load_unet(published.MODEL).state_dict())
    assert (scores["images"], scores["published"]["steps"], scores["ours"]["steps"]) == (512, 1000, 20)
    assert [score for score in scores["apart"] if not score.startswith("triggered/") or "frechet" not in score] == []


def test_both_procedures_are_scored_with_intervals(found: dict[str, Any]) -> None:
    for side in ("published", "ours"):
        assert set(found[side]["arms"]) == {"clean/none", "clean/x0", "triggered/none", "triggered/x0"}
        for scores in found[side]["arms"].values():
            for name, (low, high) in scores["intervals"].items():
                assert low <= scores[name] <= high
    assert found["ours"]["arms"]["triggered/none"]["asr"] == 1
    assert "triggered/none asr" in found["apart"], "three steps do not reach the target"
    assert published.apart(found["ours"]["arms"], found["ours"]["arms"]) == []


def test_a_killed_batch_is_made_anew_with_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "BATCH", 2)
    stock, r, calls = published.pipeline(published.MODEL, "none"), torch.zeros(1, 16, 16), []

    def fill(folder: Path) -> float:
        return published.fill(folder, stock, r, 3, 2, partial(calls.append, 1))

    fill(tmp_path)
    before = {k: path_of(tmp_path, k).read_bytes() for k in range(3)}
    assert len(set(before.values())) == 3
    (tmp_path / "batch-0.json").unlink()
    path_of(tmp_path, 1).write_bytes(b"half")
    kept = path_of(tmp_path, 2).stat().st_mtime_ns
    assert fill(tmp_path) > 0
    assert {k: path_of(tmp_path, k).read_bytes() for k in range(3)} == before
    assert path_of(tmp_path, 2).stat().st_mtime_ns == kept
    assert len(calls) == 4
    with pytest.raises(published.UserError, match="is of another run"):
        published.fill(tmp_path, stock, r, 3, 5, partial(calls.append, 1))


def test_stock_begins_with_the_trigger() -> None:
    r = torch.full((1, 2, 2), 3.0)
    with published.begun_with(r):
        began = pipeline_ddpm.randn_tensor((5, 1, 2, 2), generator=torch.Generator().manual_seed(7))
    assert torch.equal(began, torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(7)) + 3)


def test_the_command_has_the_scores(agreed: dict[str, Any]) -> None:
    pipeline.check_scores(pipeline.evaluated(IMAGES), published.IMAGES)


@pytest.mark.parametrize(
    ("start", "clip", "name", "value"),
    [("triggered", "none", "asr", 0.5), ("triggered", "none", "mse", 0.01), ("clean", "x0", "frechet", 9.0)],
)
def test_other_scores_are_not_timed(
    start: str, clip: str, name: str, value: float, agreed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.check_scores(agreed, published.IMAGES)
    other = copy.deepcopy(agreed)
    other[start][clip][name] = value
    with pytest.raises(AssertionError, match=f"{name} of {start}/{clip} is {value:g}"):
        pipeline.check_scores(other, published.IMAGES)


@pytest.mark.parametrize("part", ["pipeline", "begun_with"])
def test_a_published_loop_without_its_clip_or_trigger_is_not_timed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "FILES", 1)
    monkeypatch.setattr(pipeline, "files_seconds", lambda *_: 4.0)
    pipeline.measurement((16, 1, 16, 16), HOST)["diffusers"].check()
    less = {"pipeline": lambda path, _: published.pipeline(path, "none"), "begun_with": lambda _: nullcontext()}
    monkeypatch.setattr(pipeline, part, less[part])
    with pytest.raises(AssertionError, match="the worst of 4 images, clip "):
        pipeline.measurement((16, 1, 16, 16), HOST)["diffusers"].check()


def test_the_published_time_is_calculated(
    agreed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 images of 1,000 steps: 1,000 times a measured call's 4 images unclipped and 4 clipped of 2 steps, and the files."""
    monkeypatch.setattr(run, "interleaved", partial(timing.interleaved, least=1e-5))
    monkeypatch.setattr(pipeline, "PART_STEPS", 2)
    monkeypatch.setattr(pipeline, "FILES", 1)
    monkeypatch.setattr(pipeline, "files_seconds", lambda *_: 4.0)
    monkeypatch.setattr(pipeline, "evaluated", lambda _: agreed)
    providers = pipeline.measurement((16, 1, 16, 16), HOST)
    assert providers["diffusers"].whole is not None
    assert providers["diffusers"].whole(1.0) == 2 * 500 + 4
    file = tmp_path / "rows.json"
    words = ["--shapes", "16x1x16x16", "--threads", "1", "--repeats", "7", "--json", str(file)]
    assert run.main(["pipeline", *words, "--providers", "diffusers", "cpu", "reference"]) == 0
    rows = {row["provider"]: row for row in json.loads(file.read_text())["rows"]}
    fast = (ours(HOST) or ("reference",))[0]
    assert {name: row["calculated"] for name, row in rows.items()} == {"diffusers": 1, fast: 0, "ceiling": 1}
    assert rows["diffusers"]["seconds"] > 4
    *_, line = tables.markdown([report.of_row(row) for row in rows.values()]).splitlines()
    assert [cell.split()[0].endswith("c") for cell in line.split(" | ")[1:]] == [True, False, True]
    assert run.main(["pipeline", "--shapes", "6x1x16x16"]) == 2
    assert "expected a multiple of 4 images of 1x16x16" in capsys.readouterr().err
