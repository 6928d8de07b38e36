"""Training under a real torchrun: one rank's bits, one rank's files, and what stays after a kill or Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bdengine.checkpoint import load_state
from bdengine.cli import main
from bdengine.errors import UserError
from bdengine.train import TrainConfig

from .ranks_for_tests import ENVIRONMENT, rank_process, torchrun

SMALL = shlex.split("--size 8 --network.widths 8 16 --network.groups 4 --lr 1e-3 --warmup 0 --ema 0.9 --seed 5")
BACKDOOR = shlex.split("--attack.name baddiffusion --attack.trigger BOX_4 --attack.target DRAWN_HAT --attack.rate 0.3")
LEARNED = shlex.split("--attack.name invi --attack.trigger LEARNED --attack.target DRAWN_HAT --attack.rate 0.3")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def words(out: Path, *more: object) -> list[str]:
    return ["train", "--out", str(out), *SMALL, *map(str, more)]


def alone(*command: str) -> None:
    assert main(command) == 0


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "stats.jsonl").read_text().splitlines()]


def test_three_ranks_are_one_to_the_bit(tmp_path: Path) -> None:
    """Each with two of six micro-batches, and a trigger that is learned meanwhile."""
    run = ("--batch", 48, "--micro-batch", 8, "--images", 48 * 4, "--status", 48, *LEARNED)
    made = subprocess.run(
        torchrun(*words(tmp_path / "three", *run), ranks=3), env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    alone(*words(tmp_path / "one", *run))
    assert made.stdout.count("wrote") == 1
    assert made.stderr.count("training:   0%") == 1
    assert len(losses(tmp_path / "one")) == 4
    assert losses(tmp_path / "three") == losses(tmp_path / "one")
    one, three = (load_state(tmp_path / name / "state.safetensors")[0] for name in ("one", "three"))
    assert one.keys() == three.keys()
    assert all(bool((one[name] == three[name]).all()) for name in one)
    assert bool((one["inner.delta"] != 0).any())
    assert weights(tmp_path / "three") == weights(tmp_path / "one")


def test_another_order_of_the_sum_is_rounding_alone(tmp_path: Path) -> None:
    """Two ranks with three micro-batches each: the losses of 20 steps within 1e-5."""
    run = ("--batch", 48, "--micro-batch", 8, "--images", 48 * 20, "--status", 48, *BACKDOOR)
    subprocess.run(torchrun(*words(tmp_path / "two", *run)), env=ENVIRONMENT, check=True, capture_output=True)
    alone(*words(tmp_path / "one", *run))
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5, abs=0)
    assert losses(tmp_path / "two") != losses(tmp_path / "one")


def begun(command: list[str], state: Path) -> subprocess.Popen[str]:
    """A run that has saved its state once."""
    run = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not state.exists():
        time.sleep(0.01)
    assert run.poll() is None
    return run


LONG = ("--batch", 32, "--micro-batch", 16, "--images", 32 * 120, "--status", 32, "--snapshot", 320, *BACKDOOR)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are stopped in, by one rank."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "whole"
    alone(*words(out, *LONG))
    return out


@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_run_and_any_number_goes_on(dead: int, tmp_path: Path, whole: Path) -> None:
    out, state = tmp_path / "killed", tmp_path / "killed" / "state.safetensors"
    killed = begun(torchrun(*words(out, *LONG)), state)
    process = rank_process(killed.pid, dead)
    assert process is not None
    os.kill(process, signal.SIGKILL)
    _, said = killed.communicate()
    assert killed.returncode != 0
    saved = load_state(state)[1]["images_seen"]
    report = re.findall(r"bdengine: another rank ended early: (\d+) of 3840 images are saved in (\S+); expected", said)
    assert report == [(str(saved), str(out))], said
    assert not (out / "checkpoint").exists()
    alone(*words(out, *LONG))
    assert weights(out) == weights(whole)
    assert losses(out) == losses(whole)


def test_ctrl_c_stops_all_ranks_after_the_same_step(tmp_path: Path, whole: Path) -> None:
    out, state = tmp_path / "stopped", tmp_path / "stopped" / "state.safetensors"
    stopped = begun(torchrun(*words(out, *LONG)), state)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate()
    assert stopped.returncode != 0
    assert said.count("bdengine: interrupted") == 2, said
    assert 320 <= load_state(state)[1]["images_seen"] < 3840
    alone(*words(out, *LONG))
    assert weights(out) == weights(whole)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "message"),
    [
        (32, None, 3, "the batch is 32 for 3 ranks: expected a multiple of 3, nearest 33"),
        (32, 8, 3, "the batch is 32 for 3 ranks with micro-batches of 8: expected a multiple of 24, nearest 24"),
        (1, None, 4, "the batch is 1 for 4 ranks: expected a multiple of 4, nearest 4"),
    ],
)
def test_a_batch_that_ranks_cannot_share_is_refused(batch: int, micro: int | None, ranks: int, message: str) -> None:
    config = TrainConfig(Path("never"), batch=batch, micro_batch=micro)
    config.check()
    with pytest.raises(UserError) as refused:
        config.check(ranks)
    assert str(refused.value) == message
