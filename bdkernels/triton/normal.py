"""Standard normals by the contract of ``bdkernels.noise``, four a Philox call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import normals, place
from .launch import VARYING, launch, on


@triton.jit(do_not_specialize=VARYING)
def normal_kernel(
    out: tl.tensor,
    seeds: tl.tensor,
    step: tl.tensor,
    step_stride: tl.tensor,
    noise_stream: tl.tensor,
    elements: tl.tensor,
    tiles: tl.tensor,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    sample, tile, e, valid = place(elements, tiles, GROUPS, VECTOR)
    index = tl.load(step + sample * step_stride).to(tl.uint32)
    z = normals(tl.load(seeds + sample), index, noise_stream, tile, GROUPS)
    tl.store(out + sample * elements + e, z.to(out.dtype.element_ty), mask=valid)


def normal(seeds: Tensor, step: Tensor, stream: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See `bdkernels.normal`."""
    out = torch.empty((len(seeds), *shape), dtype=dtype, device=seeds.device)
    with on(seeds.device):
        launch(
            normal_kernel,
            len(seeds),
            math.prod(shape),
            stored=dtype,
            out=out,
            seeds=seeds,
            step=step,
            step_stride=step.ndim,
            noise_stream=stream,
        )
    return out
