"""The kernels in Triton, for CUDA tensors: the functions of ``reference.py``, bit for bit.

Arguments have been checked by ``ops.py``. Triton itself is imported here and nowhere above, so the first CUDA call pays
for it.
"""

from __future__ import annotations

import re

try:
    import triton

    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) < (3, 7, 1):
        raise ImportError(f"version {triton.__version__} is older than 3.7.1")
    from .launch import device_type
    from .loss import fused_loss
    from .noising import fused_noising
    from .normal import normal
    from .step import fused_step, fused_step_
except ImportError as error:
    _missing = f"triton cannot be used ({error}): run `pip install bdengine[gpu]`"
else:
    _missing = ""

__all__ = ["available", "fused_loss", "fused_noising", "fused_step", "fused_step_", "normal", "reason", "serves"]


def serves() -> str:
    """Type of the devices whose tensors the kernels take: ``cuda``, ``cpu`` where they are interpreted, empty for none."""
    return "" if _missing else device_type()


def available() -> bool:
    """Whether Triton imports and has a device to run on."""
    return bool(serves())


def reason() -> str:
    """Why nothing can run and what to do about it, in one sentence; empty where all is well."""
    if available():
        return ""
    return (
        _missing
        or "triton has no device: run on a machine with an NVIDIA GPU and its driver, or set TRITON_INTERPRET=1"
    )
