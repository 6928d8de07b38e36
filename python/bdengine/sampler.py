"""The sampling loop. Its API is seeds: sample ``k`` is the same image whatever the batch, the order or the restart
(to the bit with an element-wise network, and with any other in a micro-batch that passes its self-check).

    x_T = start (eps(seed) + r)         r = 0 in arms without a trigger
    for each row:  m = network(x, time);  x = fused_step(x, m)

The arms of a seed (clean, triggered, clipped, other samplers) share its noise and stand side by side in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

import bdkernels
from bdkernels import NO_BAD_ROW, STREAM_STEP, Step

from .errors import UserError
from .networks import Network, micro_batch_is_exact
from .solvers import Table, stack


@dataclass(frozen=True, eq=False)
class Arm:
    """How one arm of a batch is sampled.

    Attributes:
        table: Its sampler.
        trigger: Added to the initial noise, float32 [C, H, W]; None for a clean arm.
    """

    table: Table
    trigger: Tensor | None = None


class Sampler:
    """Samples a network in one or several arms.

    Args:
        network: Predicts the noise; see `bdengine.networks.Network`.
        arms: Arms by name, all with the same number of network evaluations.
        micro_batch: Samples that go through the network at once; the last batch is padded to it.
        exact: Require that a sample's bits do not depend on its neighbours, by a self-check of the network.

    Raises:
        UserError: No arms, arms of unequal length, a trigger of the wrong shape, or a network that fails the self-check.
    """

    def __init__(self, network: Network, arms: Mapping[str, Arm], micro_batch: int = 64, exact: bool = False) -> None:
        if not arms:
            raise UserError("no arms were given: expected at least one")
        if micro_batch < 1:
            raise UserError(f"the micro-batch is {micro_batch}: expected at least 1")
        if exact and not micro_batch_is_exact(network, micro_batch):
            raise UserError(
                f"with a micro-batch of {micro_batch} this network's last bits depend on a sample's neighbours:"
                " try a multiple of 16, or sample without the bit-exact mode"
            )
        shape = network.sample_shape
        for name, arm in arms.items():
            if arm.trigger is not None and arm.trigger.shape != shape:
                raise UserError(f"the trigger of arm {name!r} has shape {tuple(arm.trigger.shape)}: expected {shape}")
        device = next(chain(network.parameters(), network.buffers()), torch.empty(0)).device
        self.network, self.names, self.micro_batch, self.shape = network, list(arms), micro_batch, shape
        self.table = stack([arm.table for arm in arms.values()]).to(device)
        self.corrector = _correctors([arm.table for arm in arms.values()])
        self.slots = max(arm.table.slots for arm in arms.values())
        self.start = torch.stack([torch.zeros(shape) if a.trigger is None else a.trigger for a in arms.values()])
        self.start = self.start.to(device)
        self.scale = torch.tensor([a.table.start for a in arms.values()], device=device).reshape(-1, 1, 1, 1)
        self.rows = torch.arange(self.table.shape[1], device=device)

    @torch.inference_mode()
    def batch(self, arm: Tensor, seeds: Tensor, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One batch through every row.

        Args:
            arm: int64 [N], index of each sample's arm.
            seeds: int64 [N].
            watch: Called with (row, x) before each row and once after the last; must not change ``x``.

        Returns:
            float32 [N, C, H, W].

        Raises:
            FloatingPointError: The network's output was not finite; names the first such row.
        """
        x = (bdkernels.normal(seeds, self.shape) + self.start[arm]) * self.scale[arm]
        history = x.new_zeros((self.slots, *x.shape)) if self.slots else None
        bad_row = torch.full_like(seeds[0], NO_BAD_ROW)
        scale, time = (self.table[arm, :, c].T.contiguous() for c in (Step.IN, Step.TIME))
        scaled = bool((self.table[..., Step.IN] != 1).any())
        step = bdkernels.bind_step(x, self.table, arm, self.rows, seeds, history=history, bad_row=bad_row)
        for row in range(len(self.rows)):
            if watch:
                watch(row, x)
            m = self.network(x * scale[row].reshape(-1, 1, 1, 1) if scaled else x, time[row])
            if snr := self.corrector[row]:
                x.copy_(langevin(x, m, bdkernels.normal(seeds, self.shape, step=row, stream=STREAM_STEP), snr))
            else:
                step(m, row)
        if watch:
            watch(len(self.rows), x)
        if (bad := int(bad_row)) != NO_BAD_ROW:
            raise FloatingPointError(f"the network's output is not finite at row {bad} (t = {time[bad, 0]:g})")
        return x

    def __call__(
        self, seeds: Sequence[int], *, progress: bool = False, done: Callable[[str, int, Tensor], None] | None = None
    ) -> dict[str, Tensor]:
        """The images of ``seeds`` in every arm, by arm: float32 [len(seeds), C, H, W] on the CPU, about [-1, 1].

        Args:
            seeds: 64-bit seeds.
            progress: Show a progress bar.
            done: Called with (arm, seed, image) as soon as an image is made.

        Raises:
            UserError: No seeds, or one that is not a 64-bit integer.
        """
        check_seeds(seeds)
        device, count = self.table.device, len(seeds)
        arm = torch.arange(len(self.names), device=device).repeat(count)
        seed = torch.tensor(list(seeds), device=device, dtype=torch.int64).repeat_interleave(len(self.names))
        out = torch.empty((len(arm), *self.shape))
        bar = tqdm(total=len(arm), unit="img", desc="sampling", disable=not progress)
        for at in range(0, len(arm), self.micro_batch):
            here = torch.arange(at, min(at + self.micro_batch, len(arm)), device=device)
            padded = torch.nn.functional.pad(here, (0, self.micro_batch - len(here)), value=at)
            out[at : at + len(here)] = self.batch(arm[padded], seed[padded])[: len(here)]
            if done:
                for i in range(at, at + len(here)):
                    done(self.names[i % len(self.names)], seeds[i // len(self.names)], out[i])
            bar.update(len(here))
        bar.close()
        return {name: out[i :: len(self.names)] for i, name in enumerate(self.names)}


def langevin(x: Tensor, score: Tensor, z: Tensor, snr: float) -> Tensor:
    """``x + e score + sqrt(2 e) z`` with ``e = 2 (snr |z| / |score|)^2``, norms of each sample (see `solvers.exploding`).

    Args:
        x, score, z: float32 [N, C, H, W].
    """
    z_norm, norm = (v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for v in (z, score))
    e = 2 * (snr * z_norm / norm).square()
    return x + e * score + (2 * e).sqrt() * z


def _correctors(tables: Sequence[Table]) -> list[float]:
    """The rows that are correctors, in every arm alike.

    Raises:
        UserError: They differ.
    """
    marks = [[0.0] * len(t) if t.corrector is None else t.corrector.tolist() for t in tables]
    if any(one != marks[0] for one in marks):
        raise UserError("arms of one batch have their corrector steps in different rows: expected the same rows")
    return marks[0]


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse an empty sequence and anything that is not a 64-bit integer.

    Raises:
        UserError: As said.
    """
    if len(seeds) == 0:
        raise UserError("0 images were asked for: expected at least 1 seed")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise UserError(f"seed {seed!r} is not a seed: expected an integer of 64 bits")
