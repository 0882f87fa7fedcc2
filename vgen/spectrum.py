"""Spatial frequencies of grids: bands from low to high, low-pass filters, and radial power spectra.

The bands are NFIG's (2503.07076, section 3.2). Frequencies are compared as integers: at h = 2 of the "nyquist" schedule
the radius sqrt(2) ties with the cut-off, and one rounding error would move four coefficients to another band. Knows
nothing of codes or networks.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vgen.types import SettingError

SCHEDULES = ("none", "nyquist", "paper_linear", "area", "inscribed")


def band_of_frequency(height: int, width: int, sides: Sequence[int], schedule: str) -> Tensor:
    """The number of the band that each coefficient of a 2-D DFT belongs to: (H, W) int64, in fft2's order.

    Band k holds the radii above cut-off k - 1 up to cut-off k; band 0 also holds the mean, the last one all the rest.
    Radii are relative to the sides of the grid, cut-offs to half its diagonal, the largest radius of even sides:

    - "nyquist": cut-off k is h_k / h_K of the largest, after the sides h of the token maps;
    - "paper_linear": the paper's, by the share of all tokens up to map k (which leaves low bands empty);
    - "area": the same share of the squared radius;
    - "inscribed": h_k / (2 h_K) of the side, below which a map of side h_k aliases nothing;
    - "none": everything in band 0, as in VAR.

    Raises SettingError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise SettingError(f"unknown band schedule {schedule!r}: use one of {', '.join(SCHEDULES)}")
    radius, unit = squared_radius(height, width)
    band = torch.full((height, width), len(sides) - 1)
    for k, (part, whole) in reversed(list(enumerate(_squared_cutoffs(sides, schedule)))):
        band[radius * whole <= part * unit] = k
    return band


def _squared_cutoffs(sides: Sequence[int], schedule: str) -> list[tuple[int, int]]:
    """Squared cut-offs as fractions (numerator, denominator) of the squared side of the grid."""
    last, tokens = sides[-1], list(accumulate(side * side for side in sides))
    total = tokens[-1]
    if schedule == "none":
        return [(1, 1)] * len(sides)
    if schedule == "nyquist":
        return [(side * side, 2 * last * last) for side in sides]
    if schedule == "inscribed":
        return [(side * side, 4 * last * last) for side in sides]
    if schedule == "area":
        return [(count, 2 * total) for count in tokens]
    return [(count * count, 2 * total * total) for count in tokens]


def squared_radius(height: int, width: int) -> tuple[Tensor, int]:
    """Squared radius of each coefficient relative to the sides, (k_y / H)^2 + (k_x / W)^2, as integers (H, W) over a
    common denominator: the second value. In fft2's order."""
    y, x = (_frequencies(side) for side in (height, width))
    return (y[:, None] * width) ** 2 + (x[None] * height) ** 2, (height * width) ** 2


def _frequencies(side: int) -> Tensor:
    """0, 1, ..., -2, -1: what fft2 calls the coefficients of an axis."""
    return (torch.arange(side) + side // 2) % side - side // 2


def split_bands(grid: Tensor, band: Tensor) -> Tensor:
    """A grid (..., H, W) into its bands (K, ..., H, W), K being one more than the highest number in `band`; an
    empty band is zero. `merge_bands` is the inverse."""
    return torch.stack([keep_bands(grid, band == k) for k in range(int(band.max()) + 1)])


def merge_bands(bands: Tensor) -> Tensor:
    """The sum of all bands: (K, ..., H, W) -> (..., H, W)."""
    return bands.sum(0)


def keep_bands(grid: Tensor, kept: Tensor) -> Tensor:
    """The part of a real grid (..., H, W) at the frequencies where `kept` (H, W) is True, in its own dtype of at least
    float32. `kept` must be symmetric, as every union of bands is: k and -k together."""
    height, width = grid.shape[-2:]
    spectrum = torch.fft.rfft2(grid.to(torch.promote_types(grid.dtype, torch.float32)), norm="ortho")
    half = kept[:, : width // 2 + 1].to(grid.device)
    return torch.fft.irfft2(spectrum * half, s=(height, width), norm="ortho")


def radial_power(grid: Tensor) -> Tensor:
    """Mean power of the coefficients in each ring: (B, C, H, W) -> (B, R) float64, averaged over channels.

    Ring r holds the radii that round to r, in cycles per larger side; ring 0 is the mean's power alone. Multiplied by
    `ring_sizes` and summed it is the grid's energy (Parseval).
    """
    ring = rings(*grid.shape[-2:]).to(grid.device).flatten()
    power = torch.fft.fft2(grid.double(), norm="ortho").abs().square().mean(1).flatten(1)
    sums = power.new_zeros(len(grid), int(ring.max()) + 1).index_add_(1, ring, power)
    return sums / torch.bincount(ring)


def ring_sizes(height: int, width: int) -> Tensor:
    """How many coefficients each ring of `radial_power` holds, (R,)."""
    return torch.bincount(rings(height, width).flatten())


def rings(height: int, width: int) -> Tensor:
    """The ring that each coefficient belongs to, (H, W) int64, in fft2's order."""
    radius, unit = squared_radius(height, width)
    return (radius.double() / unit).sqrt().mul(max(height, width)).round().long()


KEEP_WEIGHTS = {"low": 0.57, "mid": 0.28, "high": 0.15}  # NFIG's, of thirds of the largest radius


def compare_spectra(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far two spectra are apart, from mean log10 power per ring (R,) each.

    "psd_error": mean absolute difference over rings, in powers of ten; "keep_low", "keep_mid", "keep_high": e to minus
    the mean absolute difference of natural logarithms in each third of the radii, 1 where equal; "keep": their weighted
    mean. Named after NFIG's power-spectrum error and frequency keep score; the paper does not print its definitions,
    so its values cannot be compared with these.
    """
    apart = (ours - theirs).abs().double()
    third = (torch.arange(len(apart)) * 3 // max(len(apart) - 1, 1)).clamp_max(2)
    kept = {
        name: float((-apart[third == i].mean() * math.log(10)).exp()) if (third == i).any() else 1.0
        for i, name in enumerate(KEEP_WEIGHTS)
    }
    whole = sum(weight * kept[name] for name, weight in KEEP_WEIGHTS.items())
    return {"psd_error": float(apart.mean()), "keep": whole} | {f"keep_{name}": kept[name] for name in kept}
