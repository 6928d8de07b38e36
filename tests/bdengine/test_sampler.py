"""Sample ``k`` is the same image, bit for bit, whatever the batch, the order, the process or the restart."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bdkernels
from bdengine.errors import UserError
from bdengine.networks import Network, batch_noise
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, ddim, ddpm
from bdengine.triggers import trigger

from .networks_for_tests import elementwise, tiny_unet

TABLE = ddpm(Nodes.of(linear(), 5))


def sampled(network: Network, seeds: list[int], micro_batch: int, exact: bool = False) -> dict[int, Tensor]:
    images = Sampler(network, {"": Arm(TABLE)}, micro_batch, exact)(seeds)[""]
    return dict(zip(seeds, images, strict=True))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_elementwise_networks_are_bit_exact_in_any_batch(micro_batch: int) -> None:
    seeds = list(range(70))
    expected = sampled(elementwise(), seeds, 16)
    shuffled = random.Random(0).sample(seeds, len(seeds))
    got = sampled(elementwise(), shuffled, micro_batch)
    assert all(torch.equal(got[k], expected[k]) for k in seeds)


def test_a_unet_is_bit_exact_at_its_micro_batch() -> None:
    network, seeds = tiny_unet(), list(range(40))
    expected = sampled(network, seeds, 16, exact=True)
    shuffled = random.Random(0).sample(seeds, len(seeds))
    for some in (shuffled, seeds[5:6], seeds[3:10]):
        got = sampled(network, some, 16, exact=True)
        assert all(torch.equal(got[k], expected[k]) for k in some)


def test_without_it_the_last_bits_move_by_little() -> None:
    network = tiny_unet()
    assert batch_noise(network) < 1e-5
    one, other = sampled(network, list(range(8)), 16), sampled(network, list(range(8)), 3)
    assert max(float((one[k] - other[k]).abs().max()) for k in one) < 1e-3


def test_a_network_that_mixes_its_batch_is_refused_in_exact_mode() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    with pytest.raises(UserError, match=r"micro-batch of 16 .* depend on a sample's neighbours: try a multiple of 16"):
        Sampler(Network(Mixing(), (1, 8, 8)), {"": Arm(TABLE)}, 16, exact=True)


def test_arms_share_their_noise_and_differ_by_their_row_and_trigger() -> None:
    r = trigger("BOX_4", 8, 1)
    arms = {
        "clean": Arm(TABLE),
        "triggered": Arm(TABLE, r),
        "clipped": Arm(TABLE.clipped("latent")),
        "ddim": Arm(ddim(Nodes.of(linear(), 5))),
    }
    together = Sampler(elementwise(), arms, 8)(range(10))
    for name, arm in arms.items():
        alone = Sampler(elementwise(), {name: arm}, 3)(range(10))
        assert torch.equal(alone[name], together[name])
    starts: list[Tensor] = []
    sampler = Sampler(elementwise(), arms, 4)
    sampler.batch(torch.arange(2), torch.tensor([9, 9]), lambda row, x: starts.append(x.clone()) if row == 0 else None)
    eps = bdkernels.normal(torch.tensor([9]), (1, 8, 8))
    assert torch.equal(starts[0], torch.cat([eps, eps + r]))
    assert together["clipped"].abs().max() <= 1


def test_a_bad_network_is_named_by_its_row() -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.where(t.reshape(-1, 1, 1, 1) < 500, float("nan"), 0.0) * x

    with pytest.raises(FloatingPointError, match=r"not finite at row 3 \(t = 399\)"):
        Sampler(Network(Bad(), (1, 8, 8)), {"": Arm(TABLE)}, 2)([1])


@pytest.mark.parametrize("seeds", [[], [1.5], [2**63], [True], ["1"]])
def test_bad_seeds_are_refused(seeds: list[object]) -> None:
    with pytest.raises(UserError, match=r"expected (at least 1 seed|an integer of 64 bits)"):
        Sampler(elementwise(), {"": Arm(TABLE)}, 2)(seeds)  # type: ignore[arg-type]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bdengine.cli", "sample", *map(str, arguments)]


def pngs(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("[0-9]*.png")}


def test_two_processes_and_a_kill_make_the_same_files(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """``bdengine sample``: whole; in two halves by two processes; and killed with SIGKILL, then run again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rest = ("--exact", "--micro-batch", 16, "--steps", 300)

    def run(out: str, seeds: str) -> None:
        made = command(tiny_checkpoint, "--out", tmp_path / out, "--seeds", seeds, *rest)
        subprocess.run(made, env=environment, check=True, capture_output=True)

    run("whole", "0-47")
    run("halves", "0-19")
    run("halves", "20-47")
    killed = subprocess.Popen(
        command(tiny_checkpoint, "--out", tmp_path / "killed", "--seeds", "0-47", *rest),
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while killed.poll() is None and not pngs(tmp_path / "killed"):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 0 < len(pngs(tmp_path / "killed")) < 48
    run("killed", "0-47")
    expected = pngs(tmp_path / "whole")
    assert len(expected) == 48
    assert pngs(tmp_path / "halves") == expected
    assert pngs(tmp_path / "killed") == expected
