"""The single-scale VQGAN of MaskGIT and MAGE: images to one grid of tokens and back (2012.09841, 2202.04200).

The network is MaskGIT's: no attention, no biases within the residual blocks, averages for downsampling, and a shortcut
of its own (see `ResBlock`). Tensor names are the published ones. Knows nothing of generators.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vgen.tokenizers.backbone import Upsample, decode_in_parts, network_channels
from vgen.tokenizers.codebook import Codebook
from vgen.types import SettingError


class ResBlock(nn.Module):
    """Two convolutions: (B, C_in, H, W) -> (B, C_out, H, W).

    Where the width changes, the published network adds to h = conv2(...) a 1x1 convolution of h itself, not of its
    input, which is dropped. The released weights were trained so.
    """

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_out, width_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class Level(nn.Module):
    """The residual blocks of one resolution."""

    upsample: Upsample

    def __init__(self, width_in: int, width_out: int, blocks: int, groups: int) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.block = nn.Sequential(*(ResBlock(a, b, groups) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.block_2 = ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Images (B, channels, S, S) -> latent (B, code_dim, S / f, S / f), f = 2 ** (levels - 1)."""

    def __init__(self, channels: int, code_dim: int, widths: Sequence[int], blocks: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        inputs = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(Level(a, b, blocks, groups) for a, b in zip(inputs, widths, strict=True))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for i, level in enumerate(self.down):
            h = level(F.avg_pool2d(h, 2) if i else h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent (B, code_dim, H, W) -> images (B, channels, f H, f W)."""

    def __init__(self, channels: int, code_dim: int, widths: Sequence[int], blocks: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(code_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        inputs = [*widths[1:], widths[-1]]
        up = [Level(a, b, blocks, groups) for a, b in zip(inputs, widths, strict=True)]
        for level, width in list(zip(up, widths, strict=True))[1:]:
            level.upsample = Upsample(width)
        self.up: Sequence[Level] = nn.ModuleList(up)  # type: ignore[assignment]  # 0 is the highest resolution
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VQGAN(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Images to a square grid of tokens and back.

    Args:
        side: side of the token grid; images have S = side * 2 ** (levels - 1) pixels a side.
        vocab_size: number of codes, V.
        code_dim: width of a code, C.
        image_channels: 3, or 1 for grey images; `encode` takes and `decode` gives (B, 3, S, S) in either case.
        base_channels: width of the convolutions at full resolution.
        channel_multipliers: width at each resolution relative to `base_channels`.
        blocks: residual blocks per resolution.
        norm_groups: groups of the group norms.
    """

    @register_to_config
    def __init__(
        self,
        *,
        side: int,
        vocab_size: int,
        code_dim: int,
        image_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if side < 1:
            raise SettingError(f"side is {side}: it must be at least 1")
        self.side, self.image_size = side, side * 2 ** (len(channel_multipliers) - 1)
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.encoder = Encoder(image_channels, code_dim, widths, blocks, norm_groups)
        self.decoder = Decoder(image_channels, code_dim, widths, blocks, norm_groups)
        self.codebook = Codebook(vocab_size, code_dim)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, N = side * side."""
        return self.side * self.side

    def encode_latent(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] (one channel will do for a grey tokenizer) -> (B, C, side, side) float32."""
        images = network_channels(images, self.image_size, self.config["image_channels"])
        weight = self.encoder.conv_in.weight
        return self.encoder((images.to(weight.device, weight.dtype) + 1) / 2).float()  # published range: [0, 1]

    def reconstruct(self, latent: Tensor) -> Tensor:
        """Latent (B, C, side, side) -> images in the network's own channels and dtype, [-1, 1] but for overshoots."""
        return self.decoder(latent.to(self.decoder.conv_in.weight.dtype)) * 2 - 1

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Latent (B, C, side, side) -> images (B, 3, S, S) float32, clamped to [-1, 1]."""
        return decode_in_parts(self.reconstruct, latent, self.image_size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> tokens (B, N) int64 in raster order."""
        return self.codebook.nearest(self.encode_latent(images).flatten(2).transpose(1, 2))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) -> images (B, 3, S, S) in [-1, 1]."""
        return self.decode_latent(self.latent(tokens))

    def latent(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N) -> code vectors on their grid, (B, C, side, side) float32."""
        self._check_tokens(tokens)
        vectors = self.codebook.lookup(tokens.to(self.codebook.weight.device)).float()
        return vectors.transpose(1, 2).reshape(len(tokens), -1, self.side, self.side)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise SettingError(f"tokens have shape {tuple(tokens.shape)}, expected (B, {self.num_tokens})")
        last = self.config["vocab_size"] - 1
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= last:
            raise SettingError(f"tokens must lie in 0..{last}, found {int(tokens.min())}..{int(tokens.max())}")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Images in [-1, 1] -> (reconstruction, quantiser losses (2,), [(vectors, tokens)]).

        The losses are [codebook, commitment]; gradients reach the encoder straight through the quantiser. Vectors
        (B, N, C) and tokens (B, N) serve usage statistics and restarts of dead codes.
        """
        target = self.encode_latent(images)
        with torch.autocast(target.device.type, enabled=False):
            vectors = target.flatten(2).transpose(1, 2)
            tokens = self.codebook.nearest(vectors.detach())
            codes = self.codebook.lookup(tokens).float()
            losses = torch.stack([F.mse_loss(codes, vectors.detach()), F.mse_loss(vectors, codes.detach())])
            straight_through = target + (codes.transpose(1, 2).reshape(target.shape) - target).detach()
        return self.reconstruct(straight_through), losses, [(vectors.detach(), tokens)]
