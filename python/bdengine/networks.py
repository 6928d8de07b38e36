"""diffusers' UNets, made and wrapped: one way to call a network, and what its batches do to the bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bdengine.errors import UserError

if TYPE_CHECKING:
    from diffusers.models import UNet2DModel

DIGITS16: dict[str, Any] = {"size": 16, "channels": 1, "widths": (16, 32, 64)}
"""Arguments of `unet` for 16-pixel digits: 0.6 M parameters."""

CIFAR10: dict[str, Any] = {
    "size": 32,
    "channels": 3,
    "widths": (128, 256, 256, 256),
    "layers": 2,
    "groups": 32,
    "attention": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
"""Arguments of `unet` for the architecture of google/ddpm-cifar10-32: 35.7 M parameters."""


def unet(
    size: int,
    channels: int,
    widths: tuple[int, ...],
    *,
    layers: int = 1,
    groups: int = 8,
    attention: int = 0,
    **config: Any,
) -> UNet2DModel:
    """A new diffusers ``UNet2DModel``, float32, channels-last, with random weights from torch's global generator.

    Args:
        size: Side of the image in pixels; each level after the first halves it.
        channels: Channels of the image, in and out.
        widths: Channels of each level, each a multiple of ``groups``.
        layers: Residual blocks a level.
        groups: Groups of each normalisation.
        attention: The level, counted from 1, whose blocks attend, together with the middle; 0 for no attention at all.
        config: Any other argument of ``UNet2DModel``.

    Raises:
        UserError: No widths, layers or groups, a size that cannot be halved so often, a width that is no multiple of
            ``groups``, no such level.
    """
    levels = len(widths)
    for what, value in (("widths", levels), ("layers", layers), ("groups", groups)):
        if value < 1:
            raise UserError(f"a network of {value} {what}; expected at least 1")
    if not 0 <= attention <= levels:
        raise UserError(f"attention at level {attention} of {levels}; expected 0 for none, or 1 to {levels}")
    step = 2 ** (levels - 1)
    if size < step or size % step:
        nearest = max(round(size / step), 1) * step
        raise UserError(
            f"size {size} with {levels} widths; expected a multiple of {step}, and the nearest is {nearest}"
        )
    for width in widths:
        if width < groups or width % groups:
            nearest = max(round(width / groups), 1) * groups
            raise UserError(f"width {width}; expected a multiple of {groups} groups, and the nearest is {nearest}")

    from diffusers.models import UNet2DModel

    attends = [level == attention for level in range(1, levels + 1)]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        norm_num_groups=groups,
        add_attention=attention > 0,
        **config,
    ).to(memory_format=torch.channels_last)


class Network(nn.Module):
    """One way to call any network that predicts from a noisy image and its time.

    The names of parameters and of the state dict are those of the network inside, so a checkpoint of one fits the
    other; for ``torch.func.functional_call`` use the inner `unet`.

    Args:
        unet: A diffusers UNet, or any module called as ``module(x, t)`` that returns a tensor or has it as ``.sample``.
            One with convolutions is made channels-last, in place.
        sample_shape: (C, S, S) of one image; read off the configuration of a diffusers UNet.
        autocast: bfloat16 or float16, in which it runs where torch deems that safe; its weights stay as they are.

    Raises:
        UserError: No ``sample_shape``, and no configuration that says it.
    """

    def __init__(
        self,
        unet: nn.Module,
        sample_shape: tuple[int, int, int] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        convolves = any(parameter.dim() == 4 for parameter in unet.parameters())
        self.memory_format = torch.channels_last if convolves else torch.preserve_format
        self.unet = unet.to(memory_format=self.memory_format) if convolves else unet  # type: ignore[call-overload]
        self.sample_shape = sample_shape or _sample_shape(unet)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output.

        Args:
            x: float [N,C,S,S]; copied only if the network wants channels-last and ``x`` is not.
            t: [N] or 0-d, integer or float, on the device of ``x``.

        Returns:
            What the network makes of it, [N,C,S,S] for all that predict noise, image or velocity.
        """
        x, t = x.to(memory_format=self.memory_format), t.expand(len(x))
        with nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast):
            out = self.unet(x, t)
        return out if isinstance(out, Tensor) else out.sample

    def frozen(self) -> Network:
        """A copy that stays as it is now, and through whose weights no gradient goes."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The inner network's parameters under its own names."""
        return self.unet.named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The inner network's state dict."""
        return self.unet.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads a state dict of the inner network."""
        return self.unet.load_state_dict(state_dict, *args, **kwargs)


def recompute(network: Network) -> None:
    """Makes a diffusers UNet keep its residual blocks' inputs alone, and run each block again in the backward pass.

    Raises:
        UserError: Another network.
    """
    from diffusers.models import UNet2DModel

    if not isinstance(network.unet, UNet2DModel):
        raise UserError(f"checkpointing was asked for in a {type(network.unet).__name__}: expected a UNet2DModel")
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
    # The state of the generator is read only where it is needed: while a graph is captured it cannot be.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=random)
    network.unet.enable_gradient_checkpointing(again)


def split_spread(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A network's prediction, and the spread of its variance where it returns twice the ``channels``, else None."""
    if out.shape[1] != 2 * channels:
        return out, None
    prediction, spread = (half.contiguous() for half in out.chunk(2, dim=1))
    return prediction, spread


@torch.no_grad()
def micro_batch_is_exact(network: Network, batch: int, *, seed: int = 0, tries: int = 3) -> bool:
    """Whether, in batches of this size, a row's output depends on that row alone, to the bit.

    A fixed random batch is permuted, then has part of its rows replaced; every row that is still there must come out
    with the same bits. A convolution library may choose its blocks by a row's place: on one CPU, multiples of 16
    passed and 7 did not. A sampler whose images must not depend on their neighbours runs in a size that passes.

    Args:
        network: In the mode, dtype and device it will be used in.
        batch: The size to examine.
        seed: Of the random batches.
        tries: Permutations and replacements to try, each.

    Raises:
        UserError: A batch below 1.
    """
    x, t = _probe(network, batch, seed)
    expected = network(x, t)
    for attempt in range(1, tries + 1):
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed + attempt)).to(x.device)
        if not torch.equal(network(x[order], t[order]), expected[order]):
            return False
        kept = order[: (batch + 1) // 2]
        others = _probe(network, batch, seed + attempt)
        mixed = [new.index_copy(0, kept, old[kept]) for old, new in zip((x, t), others, strict=True)]
        if not torch.equal(network(*mixed)[kept], expected[kept]):
            return False
    return True


@torch.no_grad()
def batch_noise(network: Network, batch: int = 16, *, sizes: tuple[int, ...] = (1, 2, 3, 7), seed: int = 0) -> float:
    """By how much a row's output moves when the same rows go through in smaller batches: the largest difference.

    Args:
        network: In the mode, dtype and device it will be used in.
        batch: Rows, first run all at once.
        sizes: The smaller batches to compare with.
        seed: Of the random batch.

    Raises:
        UserError: A batch below 1.
    """
    x, t = _probe(network, batch, seed)
    expected = network(x, t)
    parts = (torch.cat([network(*rows) for rows in zip(x.split(size), t.split(size), strict=True)]) for size in sizes)
    return max(float((part - expected).abs().max()) for part in parts)


def _probe(network: Network, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    if batch < 1:
        raise UserError(f"batch {batch}; expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    like = next((v for v in chain(network.parameters(), network.buffers()) if v.is_floating_point()), torch.empty(0))
    x = torch.randn(batch, *network.sample_shape, generator=generator).to(like)
    t = torch.randint(1, 1000, (batch,), generator=generator).to(like.device)
    return x.to(memory_format=network.memory_format), t


def _sample_shape(unet: nn.Module) -> tuple[int, int, int]:
    config = getattr(unet, "config", None)
    if config is None or not isinstance(config.get("sample_size"), int):
        raise UserError(f"{type(unet).__name__} does not say its image size; expected sample_shape=(C, S, S)")
    return config["in_channels"], config["sample_size"], config["sample_size"]
