"""The ops of a compiled module, the same for every device: torch tensors in, their addresses handed on.

Arguments have been checked by ``ops.py``: dtypes, shapes, devices; ``x``, ``model_output``, ``x0``, ``prediction`` and
each slot of ``history`` contiguous or channels-last, everything else contiguous, images ``[1 or N, C, H, W]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from .columns import HISTORY_SLOTS

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_ABSENT = (0, 0)


def _view(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 2 * _TYPES[tensor.dtype] + (not tensor.is_contiguous())


def _image(tensor: Tensor | None) -> tuple[int, int]:
    return _ABSENT if tensor is None else (tensor.data_ptr(), tensor.shape[0])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class BoundStep:
    """``step``, which writes ``x``, ``history`` and ``bad_row``; ``check`` is asked where a model output is of another kind."""

    def __init__(
        self,
        step: Callable[[int, int, int, Any], None],
        place: Callable[[Tensor], Any],
        check: Callable[[Tensor], None],
        x: Tensor,
        history: Tensor | None,
        bad_row: Tensor | None,
        reads: Sequence[Tensor | None],
    ) -> None:
        self._step, self._place, self._check = step, place, check
        # Aliases: where one is assigned other memory (``.data``), what the step points at stays alive.
        self._alive = [t.detach() for t in (x, history, bad_row, *reads) if t is not None]
        written = [t for t in (x, history, bad_row) if t is not None]
        self._versioned = [t for t in written if not t.is_inference()]  # what autograd may have saved
        self._x, self._history, self._bad_row = (x if t is None else t for t in (x, history, bad_row))
        self._addresses = self._x.data_ptr(), self._history.data_ptr(), self._bad_row.data_ptr()
        self._seen: tuple[object, ...] = ()
        self._format = 0

    def __call__(self, model_output: Tensor, k: int) -> None:
        if (self._x.data_ptr(), self._history.data_ptr(), self._bad_row.data_ptr()) != self._addresses:
            raise ValueError("x, history or bad_row was resized or moved since bind_step: expected another bind_step")
        seen = (
            model_output.shape,
            model_output.stride(),
            model_output.dtype,
            model_output.device,
            model_output.requires_grad and torch.is_grad_enabled(),
        )
        if seen != self._seen:
            self._check(model_output)
            self._seen, self._format = seen, _view(model_output)[1]
        if profiler._is_profiler_enabled:  # the dispatcher, which names ops for profilers, is not asked here
            with profiler.record_function("bdk::fused_step_"):
                self._step(model_output.data_ptr(), self._format, k, self._place(model_output))
        else:
            self._step(model_output.data_ptr(), self._format, k, self._place(model_output))
        if self._versioned:
            torch.autograd.graph.increment_version(self._versioned)


class CompiledOps:
    """``module()`` is the compiled module, ``place(tensor)`` what tells it where to run: threads, or device and stream."""

    def __init__(self, module: Callable[[], ModuleType], place: Callable[[Tensor], Any]) -> None:
        self._module, self._place = module, place

    def normal(self, seeds: Tensor, step: Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `bdkernels.normal`."""
        out = torch.empty((len(seeds), *shape), dtype=dtype if dtype in _TYPES else torch.float32, device=seeds.device)
        flat = (len(seeds), 1, 1, math.prod(shape))
        self._module().normal(
            flat, _view(out), seeds.data_ptr(), step.data_ptr(), step.ndim, stream, self._place(seeds)
        )
        return out.to(dtype)

    def _step(
        self,
        x: Tensor,
        out: Tensor,
        table: Tensor,
        arm: Tensor,
        steps: Tensor,
        count: int,
        seeds: Tensor,
        trigger: Tensor | None,
        region: Tensor | None,
        arm_inside: Tensor | None,
        history: Tensor | None,
        stores: bool,
        bad_row: Tensor | None,
    ) -> Callable[[int, int, int, Any], None]:
        """The op on these tensors; a call takes ``m``'s address and format, which of ``count`` steps it is, the place."""
        return self._module().FusedStep(
            tuple(x.shape),
            _view(x),
            _view(out),
            _ABSENT if history is None else _view(history),
            0 if history is None else min(len(history), HISTORY_SLOTS),
            stores,
            table.data_ptr(),
            tuple(table.shape),
            arm.data_ptr(),
            _address(arm_inside),
            steps.data_ptr(),
            count,
            int(steps.numel() != count),
            seeds.data_ptr(),
            _image(trigger),
            _image(region),
            _address(bad_row),
        )

    def fused_step(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        arm: Tensor,
        step: Tensor,
        seeds: Tensor,
        trigger: Tensor | None,
        region: Tensor | None,
        arm_inside: Tensor | None,
        history: Tensor | None,
    ) -> Tensor:
        """See `bdkernels.fused_step`."""
        out = torch.empty_like(x)
        one = self._step(x, out, table, arm, step, 1, seeds, trigger, region, arm_inside, history, False, None)
        one(*_view(model_output), 0, self._place(x))
        return out

    def fused_step_(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        arm: Tensor,
        step: Tensor,
        seeds: Tensor,
        trigger: Tensor | None,
        region: Tensor | None,
        arm_inside: Tensor | None,
        history: Tensor | None,
        bad_row: Tensor | None,
    ) -> None:
        """See `bdkernels.fused_step_`."""
        one = self._step(x, x, table, arm, step, 1, seeds, trigger, region, arm_inside, history, True, bad_row)
        one(*_view(model_output), 0, self._place(x))

    def bind_step(
        self,
        check: Callable[[Tensor], None],
        x: Tensor,
        table: Tensor,
        arm: Tensor,
        steps: Tensor,
        seeds: Tensor,
        trigger: Tensor | None,
        region: Tensor | None,
        arm_inside: Tensor | None,
        history: Tensor | None,
        bad_row: Tensor | None,
    ) -> BoundStep:
        """See `bdkernels.bind_step`; ``check`` refuses a model output that does not go with ``x``."""
        images = (trigger, region, arm_inside)
        step = self._step(x, x, table, arm, steps, len(steps), seeds, *images, history, True, bad_row)
        return BoundStep(step, self._place, check, x, history, bad_row, (table, arm, steps, seeds, *images))

    def fused_noising(
        self,
        x0: Tensor,
        t: Tensor,
        arm: Tensor,
        seeds: Tensor,
        table: Tensor,
        target: Tensor | None,
        trigger: Tensor | None,
        mask: Tensor | None,
        flip: Tensor | None,
        region: Tensor | None,
        arm_inside: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """See `bdkernels.fused_noising`."""
        out = torch.empty_like(x0, dtype=dtype)
        self._module().fused_noising(
            tuple(x0.shape),
            _view(x0),
            _view(out),
            t.data_ptr(),
            arm.data_ptr(),
            _address(arm_inside),
            seeds.data_ptr(),
            table.data_ptr(),
            tuple(table.shape),
            _image(target),
            _image(trigger),
            _image(mask),
            _image(region),
            _address(flip),
            self._place(x0),
        )
        return out

    def fused_loss(
        self,
        prediction: Tensor,
        x0: Tensor,
        t: Tensor,
        arm: Tensor,
        seeds: Tensor,
        table: Tensor,
        trigger: Tensor | None,
        mask: Tensor | None,
        flip: Tensor | None,
        region: Tensor | None,
        arm_inside: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """See `bdkernels.fused_loss`: the loss of each sample and the gradient in ``prediction``."""
        count, device = len(prediction), prediction.device
        losses = torch.empty(count, device=device)
        parts_each = -(-math.prod(prediction.shape[1:]) // self._module().LOSS_PART)
        parts = torch.empty(count, parts_each, dtype=torch.float64, device=device)
        gradient = torch.empty_like(prediction)
        self._module().fused_loss(
            tuple(x0.shape),
            _view(prediction),
            _view(x0),
            _view(gradient),
            losses.data_ptr(),
            parts.data_ptr(),
            t.data_ptr(),
            arm.data_ptr(),
            _address(arm_inside),
            seeds.data_ptr(),
            table.data_ptr(),
            tuple(table.shape),
            _image(trigger),
            _image(mask),
            _image(region),
            _address(flip),
            scale,
            self._place(prediction),
        )
        return losses, gradient
