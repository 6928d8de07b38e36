"""Fused kernels for diffusion models: sampler steps, training noise and loss, with counter-based noise.

    x_t = bdkernels.normal(seeds, (3, 32, 32))
    bdkernels.fused_step_(x_t, eps, table, arm, step, seeds)

The formulas are in `bdkernels.columns`, the noise contract in `bdkernels.noise`.
"""

from .backends import BACKENDS, use_backend
from .block import Weights as BlockWeights
from .columns import (
    HISTORY_SLOTS,
    NOISING_COLUMNS,
    STEP_COLUMNS,
    STORE_COLUMNS,
    STORES,
    Noising,
    Step,
    Store,
)
from .noise import (
    STREAM_INITIAL,
    STREAM_POISON,
    STREAM_SAMPLE,
    STREAM_SHUFFLE,
    STREAM_STEP,
    STREAM_TIMESTEP,
    STREAM_TRAINING,
)
from .ops import (
    NO_BAD_ROW,
    bind_step,
    conv3x3,
    fused_loss,
    fused_noising,
    fused_step,
    fused_step_,
    group_norm,
    normal,
    residual_block,
)

__all__ = [
    "BACKENDS",
    "HISTORY_SLOTS",
    "NOISING_COLUMNS",
    "NO_BAD_ROW",
    "STEP_COLUMNS",
    "STORES",
    "STORE_COLUMNS",
    "STREAM_INITIAL",
    "STREAM_POISON",
    "STREAM_SAMPLE",
    "STREAM_SHUFFLE",
    "STREAM_STEP",
    "STREAM_TIMESTEP",
    "STREAM_TRAINING",
    "BlockWeights",
    "Noising",
    "Step",
    "Store",
    "bind_step",
    "conv3x3",
    "fused_loss",
    "fused_noising",
    "fused_step",
    "fused_step_",
    "group_norm",
    "normal",
    "residual_block",
    "use_backend",
]

__version__ = "0.1.0"
