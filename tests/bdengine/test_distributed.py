"""Ranks under a real torchrun: the files of one process to the byte, its scores, and what is said of one that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bdengine.cli import main
from bdengine.distributed import ALONE, Ranks, join
from bdengine.errors import UserError

from .ranks_for_tests import ENVIRONMENT, rank_process, torchrun


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def sample(checkpoint: Path, out: Path, steps: int) -> list[str]:
    words = ("--seeds", "0-299", "--format", "npy", "--shard", 32, "--micro-batch", 16, "--frechet", "digits")
    return ["sample", *map(str, (checkpoint, "--out", out, *words, "--sampler", "ddim", "--steps", steps))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def test_two_ranks_make_the_folder_of_one_process(tmp_path: Path, tiny_checkpoint: Path) -> None:
    made = subprocess.run(
        torchrun(*sample(tiny_checkpoint, tmp_path / "two", 3)),
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert made.stdout.count("wrote 300 images") == 1
    assert "sampling, rank 0 of 2: 100%" in made.stderr
    assert main(sample(tiny_checkpoint, tmp_path / "one", 3)) == 0
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert len(files(tmp_path / "one")) == 3 * 10 + 3


def test_two_ranks_score_as_one_process(tmp_path: Path, tiny_checkpoint: Path) -> None:
    # 13 images in 6 arms are 78 samples, which are 5 micro-batches, the last of them not full.
    attack = ("--trigger", "BOX_4", "--target", "DRAWN_HAT", "--images", 13, "--micro-batch", 16)
    words = ["evaluate", *map(str, (tiny_checkpoint, "--sampler", "ddim", "--steps", 3, *attack, "--out"))]
    subprocess.run(torchrun(*words, tmp_path / "two"), env=ENVIRONMENT, check=True, capture_output=True)
    assert main([*words, str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("two", "one"))
    assert two["arms"] == one["arms"]
    assert (tmp_path / "two" / "arms.png").read_bytes() == (tmp_path / "one" / "arms.png").read_bytes()


@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_dies_is_reported_and_its_shards_are_made_later(
    dead: int, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = sample(tiny_checkpoint, tmp_path / "out", 60)
    run = subprocess.Popen(torchrun(*words), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (tmp_path / "out" / f"shard-{dead:06d}.npy.sha256").exists():
        time.sleep(0.01)
    process = rank_process(run.pid, dead)
    assert process is not None
    os.kill(process, signal.SIGKILL)
    _, said = run.communicate()
    assert run.returncode != 0
    report = re.search(
        r"bdengine: another rank ended early: of 10 parts, (.*); expected all, and the same command", said
    )
    assert report is not None, said
    lacking = {
        int(rank): (int(n), seeds) for rank, n, seeds in re.findall(r"rank (\d) lacks (\d) of seeds (\S+)", report[1])
    }
    there = {int(path.name[6:12]) for path in (tmp_path / "out").glob("*.sha256")}
    of_dead = [k for k in range(dead, 10, 2) if k not in there]
    assert lacking[dead][0] == len(of_dead) > 0
    assert lacking[dead][1].startswith(f"{32 * of_dead[0]}-{32 * of_dead[0] + 31}")
    assert not (tmp_path / "out" / "index.json").exists()

    assert main(words) == 0
    assert f"wrote {300 - sum(min(32, 300 - 32 * k) for k in there)} images" in capsys.readouterr().out
    assert main([str(tmp_path / "one") if word == str(tmp_path / "out") else word for word in words]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_shares_are_all_parts_once() -> None:
    for world in (1, 2, 3, 7):
        shares = [k for rank in range(world) for k in Ranks(rank, world).share(10)]
        assert sorted(shares) == list(range(10))
    assert ALONE.together(3, 4) == [3, 4]


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(UserError, match="WORLD_SIZE is 2 without LOCAL_RANK, MASTER_ADDR, MASTER_PORT: expected all"),
        join(),
    ):
        pass
