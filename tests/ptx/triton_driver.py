"""Triton kernels without a GPU: launched on CPU tensors, compiled by the whole NVIDIA pipeline, run from the PTX.

    with simulated_gpu(80):
        kernel[grid](x, y, n, BLOCK=256, enable_fp_fusion=False)

ttir, ttgir, llir, ptx and ptxas' cubin are made as on a machine with that device; the executor runs the PTX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import triton
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from benchmarks.triton_target import Target
from tests.ptx.executor import Array, Kernel

# Bytes of shared memory a block may have, by compute capability.
_SHARED: Final = {
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
}


class _Driver(Target):
    """Numbered by its architecture, so that kernels compiled for one serve every launch for it."""

    def __init__(self, arch: int, options: dict[str, Any]) -> None:
        super().__init__(arch, arch)
        self.options, self.utils = options, self


def _prepare(compiled: CompiledKernel) -> None:
    """In place of loading the cubin: the compiled kernel gets a launcher that runs its PTX."""
    if compiled._run is not None:
        return
    metadata, limit = compiled.metadata, _SHARED[compiled.metadata.target.arch]
    if metadata.shared > limit:
        raise OutOfResources(metadata.shared, limit, "shared memory")
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise NotImplementedError(f"{compiled.name} needs scratch memory or clusters")
    kernel = Kernel(compiled.asm["ptx"], compiled.name)
    passed = [i for i, kind in enumerate(compiled.src.signature.values()) if kind != "constexpr"]

    def run(
        x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch: Any, enter: Any, leave: Any, *args: Any
    ) -> None:
        options = triton.runtime.driver.active.options
        # The last two parameters point to scratch memory, of which there is none.
        kernel(
            (x, y, z),
            32 * metadata.num_warps,
            *(args[i] for i in passed),
            None,
            None,
            shared=metadata.shared,
            **options,
        )

    compiled._run = run


@contextmanager
def simulated_gpu(
    arch: int, *, order: str = "ascending", seed: int = 0, readonly: Sequence[Array] = (), buffers: Sequence[Array] = ()
) -> Iterator[None]:
    """Triton launches run here as on a device of compute capability ``arch`` (80, 90, ...); see ``Kernel.__call__``.

    The driver that was active before is active again afterwards, and on machines with none there is again none.
    """
    if arch not in _SHARED:
        raise ValueError(f"arch {arch}; expected one of {', '.join(map(str, _SHARED))}")
    config, previous, load = triton.runtime.driver, triton.runtime.driver._active, CompiledKernel._init_handles
    config.set_active(_Driver(arch, {"order": order, "seed": seed, "readonly": readonly, "buffers": buffers}))
    CompiledKernel._init_handles = _prepare
    try:
        yield
    finally:
        CompiledKernel._init_handles = load
        config._active = previous
