"""How samples of one batch differ: their arms, and those of a batch as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import bdkernels
from bdkernels import Step

from .errors import UserError
from .solvers import Clip, Table, stack
from .solvers.table import SLOTS


@dataclass(frozen=True, eq=False)
class Arm:
    """How one arm of a batch is sampled.

    Attributes:
        table: Its sampler.
        trigger: ``r``, added to the initial noise, float32 [C, H, W]; None for a clean arm. A `Table.shifted` has it in
            every step too.
        inside: The sampler of the pixels in ``region``: of the same times as ``table``, and of its history slots or none.
        region: bool [C, H, W]; goes with ``inside``.
        images: float32 [K, C, H, W], of which seed ``k`` starts from image ``k mod K``; the same in all arms of a batch.
        share: Of the image in the start.
        known: Whether the image is the operand ``r`` of ``inside``, instead of the trigger.
    """

    table: Table
    trigger: Tensor | None = None
    inside: Table | None = None
    region: Tensor | None = None
    images: Tensor | None = None
    share: float = 0.0
    known: bool = False

    def clipped(self, clip: Clip) -> Arm:
        """The same arm with a clip, see `Table.clipped`; what is known stays as it is."""
        inside = self.inside if self.inside is None or self.known else self.inside.clipped(clip)
        return replace(self, table=self.table.clipped(clip), inside=inside)

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        """Refuse what does not fit images of ``shape``.

        Raises:
            UserError: A trigger or region of another shape or dtype, one of ``inside`` and ``region`` alone, or two samplers
                that ask the network for different times or store in different slots.
        """
        wanted = (("trigger", self.trigger, torch.float32), ("region", self.region, torch.bool))
        for what, image, dtype in wanted:
            if image is not None and (image.shape != shape or image.dtype != dtype):
                given, expected = (
                    f"{str(d).removeprefix('torch.')} {tuple(s)}"
                    for d, s in ((image.dtype, image.shape), (dtype, shape))
                )
                raise UserError(f"the {what} of arm {name!r} is {given}: expected {expected}")
        if self.images is not None and (self.images.shape[1:] != shape or len(self.images) == 0):
            raise UserError(f"the images of arm {name!r} are {tuple(self.images.shape)}: expected (K, {str(shape)[1:]}")
        if (self.inside is None) != (self.region is None):
            given, missing = (
                ("a region", "a sampler inside") if self.inside is None else ("a sampler inside", "a region")
            )
            raise UserError(f"arm {name!r} has {given} without {missing}: expected both or neither")
        if self.inside is not None:
            told = (Step.IN, Step.TIME)
            if self.inside.rows[:, told].tolist() != self.table.rows[:, told].tolist():
                raise UserError(
                    f"arm {name!r} asks the network for other times inside its region ({self.inside.name}) than outside"
                    f" ({self.table.name}): expected the same"
                )
            if self.inside.slots and self.inside.rows[:, SLOTS].tolist() != self.table.rows[:, SLOTS].tolist():
                raise UserError(
                    f"arm {name!r} keeps other history inside its region ({self.inside.name}) than outside"
                    f" ({self.table.name}): expected a sampler inside that keeps the same or none"
                )


class Arms:
    """The arms of a batch, an arm in each row.

    Attributes:
        names: Of the arms.
        table: float32 [B, rows, STEP_COLUMNS]. B is A, or 2 A where any has a region: those inside follow those outside.
        region: bool [A, C, H, W], or None where no arm has one.
        trigger: float32 [A, C, H, W], zero in clean arms.
        start, gamma: Scales of the initial state and of its noise, float32 [A, C, H, W].
        images: float32 [K, C, H, W], or None where no arm starts from any.
        share: Of the image in the start, float32 [A, 1, 1, 1].
        known: Where the image is the step's operand, bool [A, C, H, W]; None where it is nowhere.
        slots: History slots that any of them uses.
        corrector: Signal-to-noise ratio of each row that is a corrector's, else 0; the same rows in all arms.
        log_variance: Ends of each row's learned variance, float32 [B, rows, 2]; None where it is not learned.
        dynamic: Which threshold ``x0``, bool [B]; None where none does.
        nonlinear: Whether any row needs more than the fused step: a corrector, a learned variance, a threshold.
        with_trigger: Whether the trigger is in any step, and not in the initial state alone.
        with_scale: Whether the network's input is scaled anywhere.

    Raises:
        UserError: No arms, or arms that do not fit the images or each other.
    """

    def __init__(self, arms: Mapping[str, Arm], shape: tuple[int, int, int], device: torch.device) -> None:
        if not arms:
            raise UserError("no arms were given: expected at least one")
        for name, arm in arms.items():
            arm.check(name, shape)
        self.names, each = list(arms), list(arms.values())
        outside, inside = [a.table for a in each], [a.inside or a.table for a in each]
        with_region = any(a.region is not None for a in each)
        tables = [*outside, *inside] if with_region else outside
        region = torch.stack([torch.zeros(shape, dtype=torch.bool) if a.region is None else a.region for a in each])
        trigger = torch.stack([torch.zeros(shape) if a.trigger is None else a.trigger for a in each])
        self.start, self.gamma = (
            torch.stack([torch.where(r, float(getattr(i, scale)), float(getattr(o, scale)))
                         for r, i, o in zip(region, inside, outside, strict=True)]).to(device)
            for scale in ("start", "gamma")
        )  # fmt: skip
        self.table = stack(tables).to(device)
        self.region = region.to(device) if with_region else None
        self.trigger = trigger.to(device)
        self.images, self.share, self.known = _images(each, device)
        self.slots = max(table.slots for table in tables)
        self.corrector = _alike([[0.0] * len(t) if t.corrector is None else t.corrector.tolist() for t in tables])
        learned = [torch.tensor(t.log_variance, dtype=torch.float32) for t in tables if t.log_variance is not None]
        if len(learned) not in (0, len(tables)):
            raise UserError("some arms of one batch have a learned variance: expected all of them or none")
        self.log_variance = torch.stack(learned).to(device) if learned else None
        dynamic = [t.dynamic for t in tables]
        self.dynamic = torch.tensor(dynamic, device=device) if any(dynamic) else None
        self.nonlinear = any(self.corrector) or self.log_variance is not None or self.dynamic is not None
        self.with_trigger = bool((self.table[..., [Step.D, Step.R]] != 0).any())
        self.with_scale = bool((self.table[..., Step.IN] != 1).any())

    def begin(self, arm: Tensor, seeds: Tensor) -> Tensor:
        """``x_T = start (gamma eps(seed) + r) + share image`` of samples in ``arm`` [N] with ``seeds`` int64 [N].

        float32 [N, C, H, W].
        """
        x = (self.gamma[arm] * bdkernels.normal(seeds, self.trigger.shape[1:]) + self.trigger[arm]) * self.start[arm]
        return x if self.images is None else x + self.share[arm] * self.images[seeds % len(self.images)]

    def operand(self, arm: Tensor, seeds: Tensor) -> Tensor:
        """The steps' ``r`` of samples in ``arm`` [N] with ``seeds`` int64 [N]: float32 [N, C, H, W]."""
        if self.images is None or self.known is None:
            return self.trigger[arm]
        return torch.where(self.known[arm], self.images[seeds % len(self.images)], self.trigger[arm])

    def told(self, arm: Tensor) -> tuple[Tensor, Tensor]:
        """Input scales and times of samples in ``arm`` [N] for the network, float32 [rows, N] each."""
        scale, time = (self.table[arm, :, column].T.contiguous() for column in (Step.IN, Step.TIME))
        return scale, time

    def inside(self, arm: Tensor) -> dict[str, Tensor]:
        """What the step is told of the regions of samples in ``arm`` [N]."""
        return {} if self.region is None else {"region": self.region[arm], "arm_inside": arm + len(self.names)}

    def of_pixels(self, values: Tensor, arm: Tensor) -> Tensor:
        """What each pixel of samples in ``arm`` [N] has of ``values`` [B]: [N, 1, 1, 1], or [N, C, H, W] with regions."""
        outside = values[arm][:, None, None, None]
        if self.region is None:
            return outside
        return torch.where(self.region[arm], values[arm + len(self.names)][:, None, None, None], outside)


def _alike(correctors: Sequence[list[float]]) -> list[float]:
    if any(one != correctors[0] for one in correctors):
        raise UserError("arms of one batch have their corrector steps in different rows: expected the same rows")
    return correctors[0]


def _images(arms: Sequence[Arm], device: torch.device) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``images, share, known`` of `Arms`."""
    share = torch.tensor([a.share for a in arms], device=device).reshape(-1, 1, 1, 1)
    images = arms[0].images
    if any(a.images is not images for a in arms):
        raise UserError("arms of one batch start from different images: expected the same tensor or none")
    if images is None:
        return None, share, None
    nowhere = torch.zeros(images.shape[1:], dtype=torch.bool)
    known = torch.stack([a.region if a.known and a.region is not None else nowhere for a in arms])
    return images.to(device), share, known.to(device) if known.any() else None
