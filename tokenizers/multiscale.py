"""The multi-scale residual VQ tokenizer of VAR (2404.02905, section 3.2 and algorithms 1 and 2).

An image becomes K token maps, coarse to fine, each quantising what the scales before it left over. The quantiser
works in float32 whatever the dtype of the network. Knows nothing of transformers.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vgen.tokenizers.backbone import Decoder, Encoder, decode_in_parts, network_channels
from vgen.tokenizers.codebook import Codebook, KeepFloat32
from vgen.types import SettingError


def phi_index(scale: int, num_scales: int, num_phi: int) -> int:
    """Which of the shared residual convolutions serves a scale.

    The nearest of `num_phi` ticks to scale / (K - 1), the first of two equally near. For K = 10 two scales are exact
    ties in real arithmetic; float64 rounding, which the published checkpoints were trained with, decides them.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return int(np.abs(ticks - scale / max(num_scales - 1, 1)).argmin())


class Phi(KeepFloat32, nn.Conv2d):
    """The 3x3 convolution that smooths an upsampled scale."""


class MultiScaleVQ(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Images to K token maps and back.

    Args:
        scales: side of the square token map at each scale, strictly increasing; the last is the latent's side.
        vocab_size: number of codes, V.
        code_dim: width of a code, C.
        image_channels: 3, or 1 for grey images; `encode` takes and `decode` gives (B, 3, S, S) in either case.
        base_channels: width of the convolutions at full resolution.
        channel_multipliers: width at each resolution relative to `base_channels`; S = last scale * 2 ** (levels - 1).
        blocks: residual blocks per resolution in the encoder; the decoder has one more.
        attention_levels: resolutions (0 is the highest) with attention after each residual block.
        norm_groups: groups of the group norms.
        num_phi: residual convolutions shared by the scales; 0 for none.
        phi_ratio: weight of a residual convolution against the identity.
        scale_dropout: share of training images that keep only their first scales, at least three of them, as many as
            chance says (quantiser dropout of XQ-GAN, 2412.01762).
    """

    @register_to_config
    def __init__(
        self,
        *,
        scales: Sequence[int],
        vocab_size: int,
        code_dim: int,
        image_channels: int = 3,
        base_channels: int = 160,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        attention_levels: Sequence[int] = (4,),
        norm_groups: int = 32,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        scale_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_scales(scales)
        self.scales = tuple(scales)
        self.image_size = self.scales[-1] * 2 ** (len(channel_multipliers) - 1)
        self.phi_ratio, self.scale_dropout = phi_ratio, scale_dropout
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.encoder = Encoder(image_channels, code_dim, widths, blocks, attention_levels, norm_groups)
        self.decoder = Decoder(image_channels, code_dim, widths, blocks, attention_levels, norm_groups)
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.codebook = Codebook(vocab_size, code_dim, sites=len(self.scales))
        phi = [Phi(code_dim, code_dim, 3, padding=1) for _ in range(num_phi)]
        self.phi: Sequence[Phi] = nn.ModuleList(phi)  # type: ignore[assignment]
        self.phi_of_scale = [phi_index(k, len(self.scales), num_phi) for k in range(len(self.scales)) if num_phi]

    @property
    def code_vectors(self) -> Tensor:
        """All code vectors (V, C), float32."""
        return self.codebook.weight.float()

    # ---- images and latents

    def encode_latent(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] (one channel will do for a grey tokenizer) -> latent (B, C, H, W) float32."""
        images = network_channels(images, self.image_size, self.config["image_channels"])
        weight = self.quant_conv.weight
        return self.quant_conv(self.encoder(images.to(weight.device, weight.dtype))).float()

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Latent (B, C, H, W) -> images (B, 3, S, S) float32, clamped to [-1, 1]."""
        return decode_in_parts(self.reconstruct, latent, self.image_size)

    def reconstruct(self, latent: Tensor) -> Tensor:
        """Latent (B, C, H, W) -> images in the network's own channels, dtype and range: what training compares."""
        return self.decoder(self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype)))

    # ---- images and tokens

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) in [-1, 1] -> tokens, one (B, n_k) int64 per scale in raster order."""
        target = self.encode_latent(images)
        latent, tokens = torch.zeros_like(target), []
        for k in range(len(self.scales)):
            tokens.append(self.quantize_scale(self.aim(target, k) - latent, k))
            latent = self.add_scale(latent, self.embed(tokens[-1]), k)
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens of all scales, or of the first few -> images (B, 3, S, S) in [-1, 1]."""
        return self.decode_latent(self.latent(tokens))

    def latent(self, prefix: Sequence[Tensor]) -> Tensor:
        """Sum of the given scales, coarse to fine: list of (B, n_k) -> (B, C, H, W) float32."""
        self._check_tokens(prefix)
        latent = self.new_latent(len(prefix[0]))
        for k, tokens in enumerate(prefix):
            latent = self.add_scale(latent, self.embed(tokens), k)
        return latent

    def context(self, prefix: Sequence[Tensor]) -> Tensor:
        """What a generator reads to predict the scales after the first, up to the one that follows `prefix`.

        For k given scales (B, n_0 ... n_{k-1}) the rows of scales 1..k one after another: (B, n_1 + ... + n_k, C).
        The last scale has no successor, so all K scales give the teacher-forced input of training.
        """
        self._check_tokens(prefix)
        latent, rows = self.new_latent(len(prefix[0])), []
        for k, tokens in enumerate(prefix[: len(self.scales) - 1]):
            latent = self.add_scale(latent, self.embed(tokens), k)
            rows.append(self.read_scale(latent, k + 1))
        return torch.cat(rows, dim=1) if rows else latent.new_zeros(len(latent), 0, latent.shape[1])

    # ---- one scale at a time (vgen.types.NextScaleTokenizer)

    def new_latent(self, batch: int) -> Tensor:
        """The latent before the first scale: zeros (B, C, H, W) float32."""
        side, weight = self.scales[-1], self.codebook.weight
        return torch.zeros(batch, weight.shape[1], side, side, device=weight.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Code vectors (B, n, C) float32 of tokens (B, n)."""
        return self.codebook.lookup(tokens).float()

    def aim(self, source: Tensor, scale: int) -> Tensor:
        """What the latent should be after scale number `scale`, for the latent of an image (B, C, H, W): all of it."""
        return source

    def quantize_scale(self, residual: Tensor, scale: int) -> Tensor:
        """Nearest codes of a residual (B, C, H, W), averaged over the cells of one scale: (B, n_k) int64."""
        return self.codebook.nearest(self._resize_down(residual, scale))

    def add_scale(self, latent: Tensor, codes: Tensor, scale: int) -> Tensor:
        """The latent after adding scale number `scale`, given its code vectors (B, n_k, C)."""
        side, full = self.scales[scale], self.scales[-1]
        grid = codes.transpose(1, 2).reshape(len(codes), -1, side, side)
        if side != full:
            grid = self._resize_up(grid)
        if not self.phi:
            return latent + grid
        with torch.autocast(grid.device.type, enabled=False):
            smoothed = self.phi[self.phi_of_scale[scale]](grid)
        return latent + grid * (1 - self.phi_ratio) + smoothed * self.phi_ratio

    def read_scale(self, latent: Tensor, scale: int) -> Tensor:
        """The latent averaged over the cells of scale number `scale`, in raster order: (B, n_k, C)."""
        return self._resize_down(latent, scale)

    def _resize_up(self, grid: Tensor) -> Tensor:
        side = self.scales[-1]
        return F.interpolate(grid, size=(side, side), mode="bicubic")

    def _resize_down(self, grid: Tensor, scale: int) -> Tensor:
        side = self.scales[scale]
        if side != self.scales[-1]:
            grid = F.adaptive_avg_pool2d(grid, side)
        return grid.flatten(2).transpose(1, 2)

    def _check_tokens(self, tokens: Sequence[Tensor]) -> None:
        shapes = [tuple(item.shape) for item in tokens]
        wanted = [side * side for side in self.scales[: len(tokens)]]
        if not tokens or [shape[-1] for shape in shapes] != wanted:
            raise SettingError(
                f"tokens have shapes {shapes}, expected (B, n_k) with n_k from {[side**2 for side in self.scales]}"
            )
        for item in tokens:
            last, found = self.config["vocab_size"] - 1, [int(item.min()), int(item.max())]
            if not 0 <= found[0] <= found[1] <= last:
                raise SettingError(f"tokens must lie in 0..{last}, found {found[0]}..{found[1]}")

    # ---- training

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Images in [-1, 1] -> (reconstruction, quantiser losses (2,), what was quantised at each scale).

        The losses are [codebook, commitment], averaged over the scales. Gradients reach the encoder straight through
        the quantiser. Per scale: the vectors (B, n_k, C) that were quantised and their tokens (B, n_k), for usage
        statistics and restarts of dead codes.
        """
        target = self.encode_latent(images)
        with torch.autocast(target.device.type, enabled=False):
            latent, losses, quantized = self._quantize(target)
            straight_through = target + (latent - target).detach()
        return self.reconstruct(straight_through), torch.stack(losses).mean(0), quantized

    def _quantize(self, target: Tensor) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        latent = torch.zeros_like(target)
        losses, quantized = [], []
        last = self._last_scales(target)
        for k in range(len(self.scales)):
            aim = self.aim(target, k)
            vectors = self._resize_down((aim - latent).detach(), k)
            tokens = self.codebook.nearest(vectors)
            added = self.add_scale(latent, self.embed(tokens), k)
            compared = self.compared(target, aim)
            codebook, commitment = (added - compared.detach()).square(), (compared - added.detach()).square()
            if last is not None:
                kept = (k <= last).to(added)[:, None, None, None]
                added = torch.where(kept > 0, added, latent)
                codebook, commitment = codebook * kept, commitment * kept
            latent = added
            losses.append(torch.stack([codebook.mean(), commitment.mean()]))
            quantized.append((vectors, tokens))
        return latent, losses, quantized

    def compared(self, target: Tensor, aim: Tensor) -> Tensor:
        """What a scale's losses compare the latent with: what it aimed at."""
        return aim

    def _last_scales(self, target: Tensor) -> Tensor | None:
        """The last scale that each image of a batch keeps, (B,), or None where all keep all."""
        if not (self.training and self.scale_dropout):
            return None
        total, batch = len(self.scales), len(target)
        dropped = torch.rand(batch, device=target.device) < self.scale_dropout
        last = torch.randint(min(2, total - 1), total, (batch,), device=target.device)
        return torch.where(dropped, last, total - 1)


def check_scales(scales: Sequence[int]) -> None:
    """Raise SettingError unless scales are positive and strictly increasing."""
    if not scales or list(scales) != sorted(set(scales)) or scales[0] < 1:
        raise SettingError(f"scales must be positive and strictly increasing, got {list(scales)}")
