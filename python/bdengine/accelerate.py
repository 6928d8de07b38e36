"""A diffusers ``UNet2DModel`` with the same weights and fewer passes over memory.

    block:   h = conv1(norm1(x));  h = conv2(norm2(h + time));  out = (shortcut(x) + h) / scale         norm with its SiLU

Each norm is one pass (`bdkernels.group_norm`), the time's share is added inside of it, a scale of 1 is not divided by, and
everything stays channels-last.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

import bdkernels

if TYPE_CHECKING:
    from diffusers.models import UNet2DModel


def accelerate(unet: UNet2DModel) -> UNet2DModel:
    """The same network, in place: modules, names and state dict stay; residual blocks and upsampling run as above.

    Blocks of other kinds (scale-shift norms, other activations, dropout in training) are left as they are.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = MethodType(_block, module)
        elif isinstance(module, Upsample2D) and module.use_conv and module.interpolate and module.norm is None:
            module.forward = MethodType(_upsample, module)
    if isinstance(unet.conv_act, nn.SiLU) and unet.conv_norm_out is not None:
        unet.conv_norm_out.forward = MethodType(_norm_silu, unet.conv_norm_out)
        unet.conv_act = nn.Identity()
    return unet


def _is_plain(block: Any) -> bool:
    norms = isinstance(block.norm1, nn.GroupNorm) and isinstance(block.norm2, nn.GroupNorm)
    plain = block.time_embedding_norm == "default" and isinstance(block.nonlinearity, nn.SiLU)
    return norms and plain and block.upsample is None and block.downsample is None and block.dropout.p == 0


def _norm_silu(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
    return bdkernels.group_norm(x, norm.weight, norm.bias, norm.num_groups, eps=norm.eps, shift=shift, silu=True)


def _block(block: Any, x: Tensor, temb: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    time = None
    if temb is not None and block.time_emb_proj is not None:
        time = block.time_emb_proj(temb if block.skip_time_act else F.silu(temb))
    h = block.conv1(_norm_silu(block.norm1, x))
    h = block.conv2(_norm_silu(block.norm2, h, time))
    out = (x if block.conv_shortcut is None else block.conv_shortcut(x)) + h
    return out if block.output_scale_factor == 1 else out / block.output_scale_factor


def _upsample(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return (layer.conv if layer.name == "conv" else layer.Conv2d_0)(F.interpolate(x, scale_factor=2.0, mode="nearest"))
