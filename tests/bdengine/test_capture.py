"""The loop that a GPU captures, run step by step on a CPU; captured where there is a GPU. And: neither the loop nor a
training step's gradient reads anything back."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bdkernels
from bdengine.attacks import AttackConfig
from bdengine.capture import Loop
from bdengine.cli import main
from bdengine.errors import UserError
from bdengine.networks import Network
from bdengine.sampler import Arm, Sampler
from bdengine.schedule import linear
from bdengine.solvers import Nodes, ddim, ddpm, dpm_multistep, unipc
from bdengine.start import NetworkConfig
from bdengine.train import TrainConfig, Trainer, train

from .networks_for_tests import elementwise, tiny_unet

NODES = Nodes.of(linear(), 6)
PATCH = torch.arange(64).reshape(1, 8, 8) % 3 == 0
TRIGGER = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
ARMS = {
    "clean": Arm(ddpm(NODES)),
    "triggered": Arm(dpm_multistep(NODES, 2).clipped("x0"), TRIGGER),
    "clipped": Arm(unipc(NODES, 3).clipped("latent"), TRIGGER),
    "patch": Arm(ddim(NODES), TRIGGER, ddim(NODES, 0.5), PATCH),
}


class NoHostRead:
    """Raises where the host would wait for a device: a value read, a shape that depends on values, a copy to the host.

    On a CPU no op makes such a copy, so it is the methods that ask for one that are refused.
    """

    class Ops(TorchDispatchMode):
        READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(func.__name__.startswith(read) for read in self.READS):
                raise AssertionError(f"{func} reads from the device")
            return func(*args, **(kwargs or {}))

    class Methods(TorchFunctionMode):
        READS = ("cpu", "numpy", "tolist", "__array__")

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in self.READS:
                raise AssertionError(f"{func} copies to the host")
            return func(*args, **(kwargs or {}))

    def __enter__(self) -> None:
        self.modes = ExitStack()
        for mode in (self.Ops(), self.Methods()):
            self.modes.enter_context(mode)

    def __exit__(self, *_: object) -> None:
        self.modes.close()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_captured_loop_is_the_loop(backend: str) -> None:
    with bdkernels.use_backend(backend):
        sampler = Sampler(elementwise(), ARMS, 8)
        loop = Loop(elementwise(), sampler.arms, 8, capture=False)
        for first in (0, 40):  # the buffers are used again
            arm = torch.arange(8) % len(ARMS)
            seeds = torch.arange(first, first + 8)
            x, bad_row = loop(arm.flip(0), seeds)
            assert torch.equal(x, sampler.batch(arm.flip(0), seeds))
            assert bad_row == bdkernels.NO_BAD_ROW


def test_new_tables_and_triggers_are_written_into_the_same_buffers() -> None:
    sampler, other = (
        Sampler(elementwise(), {"": ARMS["triggered"]}, 4),
        Sampler(elementwise(), {"": ARMS["clipped"]}, 4),
    )
    loop = Loop(elementwise(), sampler.arms, 4, capture=False)
    arm, seeds = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    loop(arm, seeds)
    table = dpm_multistep(NODES, 2)
    sampler.arms.table.copy_(Sampler(elementwise(), {"": Arm(table)}, 4).arms.table)
    sampler.arms.trigger.mul_(0.5)
    again, _ = loop(arm, seeds)
    assert torch.equal(again, Sampler(elementwise(), {"": Arm(table, 0.5 * TRIGGER)}, 4).batch(arm, seeds))
    assert not torch.equal(again, other.batch(arm, seeds))


@pytest.mark.parametrize("network", [elementwise(), tiny_unet()], ids=["elementwise", "unet"])
def test_from_the_first_step_to_the_last_nothing_is_read_back(network: Network) -> None:
    """In the loop's own ops and the network's; a compiled step takes addresses and returns nothing."""
    mode, rows = NoHostRead(), []

    def watch(row: int, _: Tensor) -> None:
        rows.append(row)
        if row == 0:
            mode.__enter__()
        if row == len(NODES):
            mode.__exit__()

    sampler = Sampler(network, ARMS, 8)
    sampler.batch(torch.arange(8) % len(ARMS), torch.arange(8), watch)
    assert rows == list(range(len(NODES) + 1))
    loop = Loop(network, sampler.arms, 8, capture=False)
    with NoHostRead():
        loop(torch.arange(8) % len(ARMS), torch.arange(8))


@pytest.mark.parametrize(
    "read", [lambda x: float(x), lambda x: x.item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: bool(x > 0)]
)
def test_what_would_be_read_back_is_seen(read: Callable[[Tensor], object]) -> None:
    x = torch.ones(()) * 2
    with pytest.raises(AssertionError, match=r"reads from the device|copies to the host"), NoHostRead():
        read(x)


def test_capture_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="capture was asked for on the device cpu: expected a CUDA device"):
        Sampler(elementwise(), ARMS, 8, capture=True)


COMMANDS = {
    "sample": ("sample", "{}", "--seeds", "0-19", "--steps", "3", "--micro-batch", "16"),
    "evaluate": (
        *("evaluate", "{}", "--images", "20", "--steps", "3", "--micro-batch", "16"),
        *("--trigger", "BOX_4", "--target", "DRAWN_HAT"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_captured_command_without_a_gpu_is_refused(
    command: str,
    tmp_path: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bdengine.commands.device", lambda: "cpu")
    words = [word.format(tiny_checkpoint) for word in COMMANDS[command]]
    assert main([*words, "--capture", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == "bdengine: capture was asked for on the device cpu: expected a CUDA device\n"
    assert not (tmp_path / "out").exists()


def small_run(out: Path, **changes: Any) -> TrainConfig:
    """Of 64 poisoned images in micro-batches."""
    attack = AttackConfig("baddiffusion", "BOX_4", "CORNER", rate=0.5)
    network = NetworkConfig((8, 16), groups=4)
    return replace(TrainConfig(out, attack=attack, network=network, images=64, batch=32, micro_batch=16), **changes)


def test_a_batchs_gradient_reads_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what the loss reads on the CPU alone."""
    monkeypatch.setattr(bdkernels._schemas, "_all_ones", lambda _: False)
    trainer = Trainer(small_run(tmp_path))
    with NoHostRead():
        trainer._backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainer.parameters)


def test_captured_training_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="capture was asked for on the device cpu: expected a CUDA device"):
        train(small_run(tmp_path / "run", capture=True), progress=False)
    assert not (tmp_path / "run").exists()


def test_an_autocast_network_runs_with_a_float32_state() -> None:
    plain = tiny_unet()
    half = Network(plain.unet, autocast=torch.bfloat16)
    seeds = list(range(4))
    x, y = (Sampler(n, {"": Arm(ddim(NODES))}, 4)(seeds)[""] for n in (plain, half))
    assert half(torch.zeros(1, 1, 8, 8), torch.zeros(1)).dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert 0 < (x - y).abs().max() < 0.1 * x.abs().max()


@pytest.mark.gpu
def test_capture_and_replay_equal_eager() -> None:
    device = torch.device("cuda")
    for network in (elementwise(), tiny_unet()):
        network = network.to(device)
        eager, captured = Sampler(network, ARMS, 16), Sampler(network, ARMS, 16, capture=True)
        for first in (0, 100):
            seeds = list(range(first, first + 20))
            a, b = eager(seeds), captured(seeds)
            assert all(torch.equal(a[name], b[name]) for name in ARMS)


@pytest.mark.gpu
@pytest.mark.parametrize("command", COMMANDS)
def test_a_captured_command_makes_the_same(command: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Pictures to the byte, and scores but for the speed; a run may go on without the flag that it began with."""
    words = [word.format(tiny_checkpoint) for word in COMMANDS[command]]
    eager, captured = tmp_path / "eager", tmp_path / "captured"
    assert main([*words, "--out", str(eager)]) == 0
    assert main([*words, "--capture", "--out", str(captured)]) == 0
    pictures = sorted(file.name for file in eager.glob("*.png"))
    assert pictures == sorted(file.name for file in captured.glob("*.png"))
    assert all((eager / name).read_bytes() == (captured / name).read_bytes() for name in pictures)
    if command == "evaluate":
        a, b = (json.loads((folder / "scores.json").read_text())["arms"] for folder in (eager, captured))
        assert a == b
    assert main([*words, "--out", str(captured)]) == 0


TRAININGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "region": {"attack": AttackConfig("trojdiff", "PATCH_4_WHITE", "CORNER", rate=0.5)},
    "invi": {"attack": AttackConfig("invi", "LEARNED", "CORNER", rate=0.5, bound=0.5)},
    "initial": {"init": "", "clean_target": "initial"},
}
"""Changes to `small_run`, by what they add to a batch's graph; an empty ``init`` stands for the tiny checkpoint."""


def on_cuda(case: str, out: Path, checkpoint: Path, capture: bool) -> Trainer:
    changes = TRAININGS[case] | ({"init": str(checkpoint)} if "init" in TRAININGS[case] else {})
    return Trainer(small_run(out, ema=0.9, warmup=0, lr=1e-2, capture=capture, **changes), "cuda")


def assert_near(eager: Trainer, captured: Trainer) -> None:
    """The gradients and the average of two runs."""
    for a, b in zip(eager.parameters, captured.parameters, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-2, atol=1e-3)
    for a, b in zip(eager.ema.parameters(), captured.ema.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", TRAININGS)
def test_captured_training_equals_eager(case: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    eager, captured = (on_cuda(case, tmp_path, tiny_checkpoint, capture) for capture in (False, True))
    first = [p.detach().clone() for p in eager.parameters]
    for k in range(5):
        for trainer in (eager, captured):
            if trainer.inner is not None and k == 2:  # a step learns 1e-3, of which no loss tells
                trainer.inner.delta.detach().fill_(0.5)
        assert torch.allclose(eager.step(), captured.step(), rtol=1e-3)
        assert_near(eager, captured)
    assert all(bool((a != b).any()) for a, b in zip(first, eager.parameters, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", TRAININGS)
def test_a_captured_run_goes_on_where_it_is_told_to(case: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """One that has its graph already, and one that has yet to make it."""
    whole, begun, fresh = (on_cuda(case, tmp_path, tiny_checkpoint, capture=True) for _ in range(3))
    whole.step()
    saved = {name: value.clone() for name, value in whole.state().items()}
    begun.step()
    begun.step()
    loss = whole.step()
    for resumed in (begun, fresh):
        resumed.restore(saved, images_seen=32)
        assert torch.allclose(resumed.step(), loss, rtol=1e-3)
        assert_near(whole, resumed)
