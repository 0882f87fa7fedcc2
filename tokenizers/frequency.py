"""NFIG's tokenizer (2503.07076): VAR's multi-scale quantiser, each scale aiming at a low-passed latent.

Scale k quantises what its low-pass of the latent has beyond the scales before it, so that scales add frequency bands,
low to high. The Fourier transform is needed for encoding alone: decoding is VAR's. What the paper leaves open (cut-offs
of the low bands, resizing, smoothing) is decided here and marked in docs/nfig.md.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vgen.spectrum import band_of_frequency, keep_bands
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.types import SettingError

RESIZES = ("area", "fourier")
COMPARISONS = ("lowpass", "full")


class FrequencyVQ(MultiScaleVQ):
    """Images to K token maps of rising frequency and back.

    Args, beside those of MultiScaleVQ:
        band_schedule: where bands end (vgen.spectrum.band_of_frequency); "none" is VAR's quantiser, bit for bit.
        compare: what the losses of a scale compare the latent with: "lowpass", its own low-pass, or "full", all of it.
        resize: "area" means cell averages down and bicubic up, as VAR; "fourier" crops and pads spectra.
        limit_bands: keep what a scale adds to its band and those below, which makes partial reconstructions exactly
            low-pass, at the price of a Fourier transform in decoding.
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
        band_schedule: str = "nyquist",
        compare: str = "lowpass",
        resize: str = "area",
        limit_bands: bool = False,
    ) -> None:
        super().__init__(
            scales=scales,
            vocab_size=vocab_size,
            code_dim=code_dim,
            image_channels=image_channels,
            base_channels=base_channels,
            channel_multipliers=channel_multipliers,
            blocks=blocks,
            attention_levels=attention_levels,
            norm_groups=norm_groups,
            num_phi=num_phi,
            phi_ratio=phi_ratio,
            scale_dropout=scale_dropout,
        )
        for name, value, known in (("resize", resize, RESIZES), ("compare", compare, COMPARISONS)):
            if value not in known:
                raise SettingError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
        self.compare, self.resize, self.limit_bands = compare, resize, limit_bands
        side = self.scales[-1]
        with torch.device("cpu"):  # also where a model is being built on the meta device
            self.band = band_of_frequency(side, side, self.scales, band_schedule)
            self.whole = [bool((self.band <= k).all()) for k in range(len(self.scales))]

    def aim(self, source: Tensor, scale: int) -> Tensor:
        """The latent (B, C, H, W) low-passed to the bands up to number `scale`."""
        return source if self.whole[scale] else keep_bands(source, self.band <= scale)

    def compared(self, target: Tensor, aim: Tensor) -> Tensor:
        return aim if self.compare == "lowpass" else target

    def add_scale(self, latent: Tensor, codes: Tensor, scale: int) -> Tensor:
        if not self.limit_bands:
            return super().add_scale(latent, codes, scale)
        return latent + self.aim(super().add_scale(torch.zeros_like(latent), codes, scale), scale)

    def _resize_up(self, grid: Tensor) -> Tensor:
        return fourier_resize(grid, self.scales[-1]) if self.resize == "fourier" else super()._resize_up(grid)

    def _resize_down(self, grid: Tensor, scale: int) -> Tensor:
        side = self.scales[scale]
        if self.resize == "area" or side == self.scales[-1]:
            return super()._resize_down(grid, scale)
        return fourier_resize(grid, side).flatten(2).transpose(1, 2)


def fourier_resize(grid: Tensor, side: int) -> Tensor:
    """Resample (B, C, N, N) to (B, C, side, side) by cropping or padding its spectrum; values keep their scale.

    Exact for what both grids can hold. At an even smaller side the lone Nyquist row keeps its real part only.
    """
    old = grid.shape[-1]
    small = min(old, side)
    spectrum = torch.fft.fftshift(torch.fft.fft2(grid, norm="forward"), dim=(-2, -1))
    first, start = old // 2 - small // 2, side // 2 - small // 2
    resized = spectrum.new_zeros(*grid.shape[:2], side, side)
    resized[..., start : start + small, start : start + small] = spectrum[
        ..., first : first + small, first : first + small
    ]
    return torch.fft.ifft2(torch.fft.ifftshift(resized, dim=(-2, -1)), norm="forward").real
