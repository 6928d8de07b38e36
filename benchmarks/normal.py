"""`bdkernels.normal`, a seed a sample, against torch's one-seed generator and against diffusers' list of generators."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import bdkernels
from bdkernels import noise, reference, testing

from .bench import CEILING, HOST, REFERENCE, Provider, Shape, assert_standard_normal, compiled, moved, ours, seeds_of


def normal_bytes(shape: Shape) -> int:
    """Of ``z``, written."""
    return 4 * math.prod(shape)


def normal(shape: Shape, device: torch.device = HOST) -> dict[str, Provider]:
    """The providers of `bdkernels.normal` at ``shape``."""
    seeds = seeds_of(shape[0])
    generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
    on_host: dict[str, Any] = {"seeds": seeds, "step": torch.tensor(0), "stream": noise.STREAM_INITIAL}
    on_host["shape"] = shape[1:]
    case = moved(on_host, device)
    out = torch.empty(shape, device=device)
    compiled_randn = compiled(torch.randn_like)

    def per_sample() -> Tensor:
        return randn_tensor(shape, generator=generators, device=device)

    def plain() -> Tensor:
        return torch.randn(shape, device=device)

    def check_reference() -> None:
        expected = torch.from_numpy(noise.normal(seeds.numpy(), shape[1:])).to(device)
        testing.assert_same_bits("normal", reference.normal(**case, dtype=torch.float32), expected)

    return {
        "diffusers": Provider(per_sample, lambda: assert_standard_normal("z", per_sample())),
        "torch": Provider(plain, lambda: assert_standard_normal("z", plain())),
        "compile": Provider(lambda: compiled_randn(out), lambda: assert_standard_normal("z", compiled_randn(out))),
        **dict.fromkeys(
            ours(device),
            Provider(
                lambda: bdkernels.normal(**case),
                lambda: testing.assert_matches_reference("normal", on_host | {"dtype": torch.float32}, device.type),
            ),
        ),
        REFERENCE: Provider(lambda: reference.normal(**case, dtype=torch.float32), check_reference),
        CEILING: Provider(lambda: out.fill_(0.5)),
    }
