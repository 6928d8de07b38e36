"""The sampling loop. Its API is seeds: sample ``k`` is the same image whatever the batch, the order or the restart
(to the bit with an element-wise network, and with any other in a micro-batch that passes its self-check).

    x_T = start (gamma eps(seed) + r)       r = 0 in arms without a trigger; plus an image in the tasks that start from one
    for each row:  m = network(x, time);  x = fused_step(x, m)

What no row can say, since it is not linear, has a name and a line in the loop: `langevin` correctors, the `learned_noise` of
a network that returns its variance too, and `thresholded` x0.

The arms of a seed (clean, triggered, clipped, other samplers) share its noise and stand side by side in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

import bdkernels
from bdkernels import NO_BAD_ROW, STREAM_STEP, Step

from .arms import Arm, Arms
from .caching import Cached
from .capture import Loop, check_device
from .distributed import ALONE, Ranks
from .errors import UserError
from .networks import Network, micro_batch_is_exact, split_spread
from .seeds import check_seeds

QUANTILE: Final = 0.995
"""Of `thresholded`."""


class Sampler:
    """Samples a network in one or several arms.

    Args:
        network: Predicts the noise; see `bdengine.networks.Network`.
        arms: Arms by name, all with the same number of network evaluations.
        micro_batch: Samples that go through the network at once; the last batch is padded to it.
        exact: Require that a sample's bits do not depend on its neighbours, by a self-check of the network.
        capture: Replay each step as a CUDA graph: see `bdengine.capture`.

    Raises:
        UserError: No arms, arms that do not fit the images or each other, a network that fails the self-check, or capture
            without a GPU or with rows that are not linear.
    """

    def __init__(
        self,
        network: Network,
        arms: Mapping[str, Arm],
        micro_batch: int = 64,
        exact: bool = False,
        capture: bool = False,
    ) -> None:
        if micro_batch < 1:
            raise UserError(f"the micro-batch is {micro_batch}: expected at least 1")
        if exact and not micro_batch_is_exact(network, micro_batch):
            raise UserError(
                f"with a micro-batch of {micro_batch} this network's last bits depend on a sample's neighbours:"
                " try a multiple of 16, or sample without the bit-exact mode"
            )
        device = next(chain(network.parameters(), network.buffers()), torch.empty(0)).device
        self.network, self.shape, self.micro_batch = network, network.sample_shape, micro_batch
        self.arms = Arms(arms, network.sample_shape, device)
        self.rows = torch.arange(self.arms.table.shape[1], device=device)
        if capture:
            check_device(device)
        if capture and self.arms.nonlinear:
            raise UserError(
                "capture was asked for with a corrector, a learned variance or a dynamic threshold: expected none"
            )
        self.loop = Loop(network, self.arms, micro_batch, capture=True) if capture else None

    @torch.inference_mode()
    def batch(self, arm: Tensor, seeds: Tensor, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One batch through every row.

        Args:
            arm: int64 [N], index of each sample's arm.
            seeds: int64 [N].
            watch: Called with (row, x) before each row and once after the last; must not change ``x``. Not where captured.

        Returns:
            float32 [N, C, H, W].

        Raises:
            FloatingPointError: The network's output was not finite; names the first such row.
            UserError: The network returns no variance where the sampler has it learned.
        """
        arms = self.arms
        if self.loop is not None and watch is None:
            x, bad_row = self.loop(arm, seeds)
            self._check_bad(bad_row)
            return x.clone()
        trigger = arms.operand(arm, seeds)
        x = arms.begin(arm, seeds)
        history = x.new_zeros((arms.slots, *x.shape)) if arms.slots else None
        bad_row = torch.full_like(seeds[0], NO_BAD_ROW)
        step = bdkernels.bind_step(
            x, arms.table, arm, self.rows, seeds, trigger=trigger if arms.with_trigger else None, history=history,
            bad_row=bad_row, **arms.inside(arm),
        )  # fmt: skip
        scale, time = arms.told(arm)
        if isinstance(self.network, Cached):
            self.network.begin()
        for row in range(len(self.rows)):
            if watch:
                watch(row, x)
            m = self.network(x * scale[row].reshape(-1, 1, 1, 1) if arms.with_scale else x, time[row])
            if arms.nonlinear or m.shape[1] != x.shape[1]:
                m = self._nonlinear(m, x, arm, row, seeds, trigger, history)
            step(m, row)
        if watch:
            watch(len(self.rows), x)
        self._check_bad(bad_row)
        return x

    def _check_bad(self, bad_row: Tensor) -> None:
        if (bad := int(bad_row)) != NO_BAD_ROW:
            time = float(self.arms.table[0, bad, Step.TIME])
            raise FloatingPointError(f"the network's output is not finite at row {bad} (t = {time:g})")

    def _nonlinear(
        self, m: Tensor, x: Tensor, arm: Tensor, row: int, seeds: Tensor, trigger: Tensor, history: Tensor | None
    ) -> Tensor:
        """``m`` for what no row can say; changes ``x`` in a corrector's row and the noise of a learned variance."""
        arms = self.arms
        m, spread = split_spread(m, x.shape[1])
        if arms.log_variance is not None and history is not None:
            z = bdkernels.normal(seeds, self.shape, step=row, stream=STREAM_STEP)
            low, high = (arms.of_pixels(arms.log_variance[:, row, end], arm) for end in (0, 1))
            history[0] = learned_noise(spread, low, high, z)
        if snr := arms.corrector[row]:
            x.copy_(langevin(x, m, bdkernels.normal(seeds, self.shape, step=row, stream=STREAM_STEP), snr))
        elif arms.dynamic is not None:
            a, b, d = (arms.of_pixels(arms.table[:, row, c], arm) for c in (Step.A, Step.B, Step.D))
            m = torch.where(arms.of_pixels(arms.dynamic, arm), thresholded(m, a * x + d * trigger, b), m)
        return m

    def batches(self, seeds: Sequence[int], ranks: Ranks = ALONE) -> Iterator[tuple[int, Tensor]]:
        """The samples of ``seeds``, a micro-batch after the other, cut in the same places whatever the ranks.

        Sample ``i`` is that of ``seeds[i // A]`` in arm ``i % A``, of A arms.

        Args:
            seeds: 64-bit seeds.
            ranks: Only this rank's micro-batches.

        Yields:
            The number of a micro-batch's first sample, and its samples, float32 [n, C, H, W] on the network's device.

        Raises:
            UserError: No seeds, or one that is not a 64-bit integer.
        """
        check_seeds(seeds)
        arms, n = len(self.arms.names), self.micro_batch
        count = arms * len(seeds)
        for k in ranks.share(-(-count // n)):
            here = range(k * n, min((k + 1) * n, count))
            padded = [*here, *[here[0]] * (n - len(here))]
            arm, seed = torch.tensor([(i % arms, seeds[i // arms]) for i in padded], device=self.rows.device).T
            yield here[0], self.batch(arm.contiguous(), seed.contiguous())[: len(here)]

    def __call__(
        self,
        seeds: Sequence[int],
        *,
        progress: bool = False,
        done: Callable[[str, int, Tensor], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """The images of ``seeds`` in every arm, by arm: float32 [len(seeds), C, H, W] on the CPU, about [-1, 1].

        Args:
            seeds: 64-bit seeds.
            progress: Show a progress bar.
            done: Called with (arm, seed, image) as soon as an image is made by this rank.
            ranks: Share the work with other ranks; each returns all images.

        Raises:
            UserError: No seeds, or one that is not a 64-bit integer.
            Stopped: Another rank ended.
        """
        names = self.arms.names
        out = torch.zeros(len(names) * len(seeds), *self.shape)
        bar = tqdm(total=len(out), unit="img", desc="sampling", disable=not progress)
        for at, images in self.batches(seeds, ranks):
            out[at : at + len(images)] = images
            if done:
                for i in range(at, at + len(images)):
                    done(names[i % len(names)], seeds[i // len(names)], out[i])
            bar.update(min(ranks.world * len(images), len(out) - bar.n))
        bar.close()
        ranks.fill_in(out)
        return {name: out[i :: len(names)] for i, name in enumerate(names)}


def langevin(x: Tensor, score: Tensor, z: Tensor, snr: float) -> Tensor:
    """``x + e score + sqrt(2 e) z`` with ``e = 2 (snr |z| / |score|)^2``, norms of each sample (see `solvers.exploding`).

    Args:
        x, score, z: float32 [N, C, H, W].
    """
    z_norm, norm = (v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for v in (z, score))
    e = 2 * (snr * z_norm / norm).square()
    return x + e * score + (2 * e).sqrt() * z


def learned_noise(v: Tensor | None, low: Tensor, high: Tensor, z: Tensor) -> Tensor:
    """``exp((f high + (1 - f) low) / 2) z`` with ``f = (v + 1) / 2``: Nichol and Dhariwal 2021, eq. 15.

    Args:
        v: What the network returns beside its prediction, float32 [N, C, H, W].
        low, high: Ends of its logarithm, float32, to be broadcast to ``v``.
        z: float32 [N, C, H, W].

    Raises:
        UserError: The network returned none.
    """
    if v is None:
        raise UserError("the sampler's variance is learned and the network returns none: expected twice the channels")
    return torch.exp((low + (v + 1) / 2 * (high - low)) / 2) * z


def thresholded(m: Tensor, known: Tensor, b: Tensor) -> Tensor:
    """The network output with which ``x0 = known + b m`` is thresholded: clamped to its sample's bound, over the bound.

    What is made of the output itself changes with it, as DDIM's ``eps`` does with diffusers' ``use_clipped_model_output``.
    The bound is the `QUANTILE` of ``|x0|``, at least 1. Source: Saharia et al. 2022 (Imagen), section 2.3.

    Args:
        m, known: float32 [N, C, H, W].
        b: float32, to be broadcast to them.
    """
    x0 = known + b * m
    bound = torch.quantile(x0.abs().flatten(1), QUANTILE, dim=1).clamp(min=1)[:, None, None, None]
    return (x0.clamp(-bound, bound) / bound - known) / b
