"""A diffusers ``UNet2DModel`` with the same weights, fewer passes over memory and fewer products.

    block:   h = conv1(norm1(x));  h = conv2(norm2(h + time));  out = (shortcut(x) + h) / scale         norm with its SiLU

On a CPU a block is one op (`bdkernels.residual_block`) and the way up another (`bdkernels.conv3x3`, which upsamples as it
reads): norms are one pass each and convolutions take Winograd's way. A scale of 1 is not divided by, everything stays
channels-last, and the time's embedding is made once where all samples share one time, as in sampling.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bdkernels

if TYPE_CHECKING:
    from diffusers.models import UNet2DModel


def accelerate(unet: UNet2DModel) -> UNet2DModel:
    """The same network, in place: modules, names and state dict stay; residual blocks, upsampling and the whole run as above.

    Blocks of other kinds (scale-shift norms, other activations, dropout in training) are left as they are, and so is the
    arithmetic on other devices than the CPU. `bdengine.memory.keep_freed` adds to the gain.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = MethodType(_block, module)
        elif isinstance(module, Upsample2D) and _is_repeated_pixels(module):
            module.forward = MethodType(_upsample, module)
    if _is_positional(unet):
        unet.forward = MethodType(_unet, unet)
    if isinstance(unet.conv_act, nn.SiLU) and unet.conv_norm_out is not None:
        unet.conv_norm_out.forward = MethodType(_norm_silu, unet.conv_norm_out)
        unet.conv_act = nn.Identity()
    return unet


def _is_positional(unet: Any) -> bool:
    skips = any(hasattr(block, "skip_conv") for block in (*unet.down_blocks, *unet.up_blocks))
    config = unet.config
    return (
        config.time_embedding_type == "positional"
        and unet.class_embedding is None
        and not config.center_input_sample
        and not skips
    )


def _is_plain(block: Any) -> bool:
    norms = all(isinstance(norm, nn.GroupNorm) for norm in (block.norm1, block.norm2))
    norms = norms and (block.norm1.num_groups, block.norm1.eps) == (block.norm2.num_groups, block.norm2.eps)
    plain = block.time_embedding_norm == "default" and isinstance(block.nonlinearity, nn.SiLU)
    return norms and plain and block.upsample is None and block.downsample is None and block.dropout.p == 0


def _is_repeated_pixels(layer: Any) -> bool:
    return layer.use_conv and layer.interpolate and layer.norm is None and _is_conv3x3(_conv_of(layer))


def _is_conv3x3(conv: nn.Conv2d) -> bool:
    size = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    return size and conv.groups == 1 and conv.padding_mode == "zeros"


def _unet(unet: Any, sample: Tensor, timestep: Any, *, return_dict: bool = True) -> Any:
    t = torch.as_tensor(timestep, device=sample.device)
    t = t.reshape(1) if t.dim() == 0 else t[:1] if t.stride(0) == 0 else t
    time = unet.time_embedding(unet.time_proj(t).to(unet.conv_in.weight.dtype))
    x = unet.conv_in(sample)
    skips = [x]
    for block in unet.down_blocks:
        x, more = block(x, time)
        skips += more
    if unet.mid_block is not None:
        x = unet.mid_block(x, time)
    for block in unet.up_blocks:
        here = len(skips) - len(block.resnets)
        x, skips = block(x, tuple(skips[here:]), time), skips[:here]
    x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
    if not return_dict:
        return (x,)
    from diffusers.models.unets.unet_2d import UNet2DOutput

    return UNet2DOutput(sample=x)


def _is_served(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if _is_served(x, norm.weight):
        return bdkernels.group_norm(x, norm.weight, norm.bias, norm.num_groups, eps=norm.eps, silu=True)
    return F.silu(nn.GroupNorm.forward(norm, x))


def _block(block: Any, x: Tensor, temb: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    time = None
    if temb is not None and block.time_emb_proj is not None:
        time = block.time_emb_proj(temb if block.skip_time_act else F.silu(temb))
    if _is_served(x, block.conv1.weight):
        parts = [block.norm1, block.conv1, block.norm2, block.conv2]
        if block.conv_shortcut is not None:
            parts.append(block.conv_shortcut)
        weights = bdkernels.BlockWeights(*(tensor for part in parts for tensor in (part.weight, part.bias)))
        out = bdkernels.residual_block(x, weights, block.norm1.num_groups, shift=time, eps=block.norm1.eps)
    else:
        h = block.conv1(F.silu(block.norm1(x)))
        h = F.silu(block.norm2(h if time is None else h + time[:, :, None, None]))
        out = block.conv2(h) + (x if block.conv_shortcut is None else block.conv_shortcut(x))
    return out if block.output_scale_factor == 1 else out / block.output_scale_factor


def _upsample(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    conv = _conv_of(layer)
    if _is_served(x, conv.weight):
        return bdkernels.conv3x3(x, conv.weight, conv.bias, upsample=True)
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _conv_of(layer: Any) -> Any:
    return layer.conv if layer.name == "conv" else layer.Conv2d_0
