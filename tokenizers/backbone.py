"""The convolutional encoder and decoder of VQGAN (2012.09841), as VAR's tokenizer uses them.

Module names follow the published checkpoints, so their tensors load by name. Knows nothing of quantisation.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.types import SettingError

CPU_DECODE_PIXELS = 1 << 16  # decoded at once: four 256x256 images together outgrow the cache and take 20% longer


class ResBlock(nn.Module):
    """Two convolutions with group norm and SiLU, and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=not x.requires_grad))
        h = self.conv2(F.silu(self.norm2(h), inplace=not h.requires_grad))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h


class AttentionBlock(nn.Module):
    """Single-head attention over all positions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, width, height * breadth)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, H*W, C)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(-1, -2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the sides with a strided convolution, padded on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self, width_in: int, width_out: int, blocks: int, attention: bool, groups: int) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.block = nn.ModuleList(ResBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(width_out, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.attn_1 = AttentionBlock(width, groups)
        self.block_2 = ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, channels, S, S) -> features (B, code_dim, S / f, S / f), f = 2 ** (levels - 1)."""

    def __init__(
        self,
        channels: int,
        code_dim: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        down = []
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, blocks, i in attention, groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            down.append(level)
        self.down: Sequence[Level] = nn.ModuleList(down)  # type: ignore[assignment]
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], code_dim, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features (B, code_dim, H, W) -> images (B, channels, f * H, f * W); one block more per level than the encoder."""

    def __init__(
        self,
        channels: int,
        code_dim: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(code_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        up = []  # index 0 is the highest resolution, as published; traversed from the other end
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, last)], width, blocks + 1, i in attention, groups)
            if i > 0:
                level.upsample = Upsample(width)
            up.append(level)
        self.up: Sequence[Level] = nn.ModuleList(up)  # type: ignore[assignment]
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        h = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def network_channels(images: Tensor, size: int, channels: int) -> Tensor:
    """Images (B, 3, S, S), or (B, channels, S, S), as a network of so many channels takes them. Raises SettingError."""
    if images.ndim != 4 or images.shape[-2:] != (size, size) or images.shape[1] not in (3, channels):
        raise SettingError(
            f"images have shape {tuple(images.shape)}, this tokenizer takes (B, 3, {size}, {size}): resize or crop"
        )
    return grey(images) if channels == 1 and images.shape[1] == 3 else images


def decode_in_parts(reconstruct: Callable[[Tensor], Tensor], latent: Tensor, size: int) -> Tensor:
    """Latent (B, C, H, W) -> images (B, 3, S, S) float32 clamped to [-1, 1], as many at once as suit the device."""
    rows = max(1, CPU_DECODE_PIXELS // size**2) if latent.device.type == "cpu" else max(1, len(latent))
    images = torch.cat([reconstruct(part) for part in latent.split(rows)])
    return images.float().clamp(-1, 1).expand(-1, 3, -1, -1)


def grey(images: Tensor) -> Tensor:
    """Luma of (B, 3, H, W) as (B, 1, H, W); exact where the three channels are equal."""
    red, green, blue = images.unbind(1)
    return torch.stack([red + 0.587 * (green - red) + 0.114 * (blue - red)], dim=1)
