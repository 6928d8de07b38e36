"""`bdkernels.normal`, a seed a sample, against torch's one-seed generator and against diffusers' list of generators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import bdkernels
from bdkernels import noise, reference, testing

from .bench import CEILING, CPU, REFERENCE, Provider, Shape, assert_standard_normal, compiled


def normal(shape: Shape) -> dict[str, Provider]:
    """The providers of `bdkernels.normal` at ``shape``."""
    seeds = torch.from_numpy(noise.sample_seeds(0, np.arange(shape[0])))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    case: dict[str, Any] = {"seeds": seeds, "step": torch.tensor(0), "stream": noise.STREAM_INITIAL, "shape": shape[1:]}
    out = torch.empty(shape)
    compiled_randn = compiled(torch.randn_like)

    def per_sample() -> Tensor:
        return randn_tensor(shape, generator=generators)

    def check_reference() -> None:
        expected = torch.from_numpy(noise.normal(seeds.numpy(), shape[1:]))
        testing.assert_same_bits("normal", reference.normal(**case, dtype=torch.float32), expected)

    return {
        "diffusers": Provider(per_sample, lambda: assert_standard_normal("z", per_sample())),
        "torch": Provider(lambda: torch.randn(shape), lambda: assert_standard_normal("z", torch.randn(shape))),
        "compile": Provider(lambda: compiled_randn(out), lambda: assert_standard_normal("z", compiled_randn(out))),
        CPU: Provider(
            lambda: bdkernels.normal(**case),
            lambda: testing.assert_matches_reference("normal", case | {"dtype": torch.float32}),
        ),
        REFERENCE: Provider(lambda: reference.normal(**case, dtype=torch.float32), check_reference),
        CEILING: Provider(lambda: out.fill_(0.5)),
    }
