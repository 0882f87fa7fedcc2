"""Frequency bands of grids: golden counts, exact partitions, filters that are projections, radial power spectra."""

import math
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from vgen.spectrum import (
    SCHEDULES,
    band_of_frequency,
    keep_bands,
    merge_bands,
    radial_power,
    ring_sizes,
    rings,
    split_bands,
)
from vgen.types import SettingError

SIDES = {16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 8: (1, 2, 3, 4, 6, 8), 7: (1, 2, 3, 5, 7)}
GRIDS = ((7, 7), (8, 8), (16, 16), (8, 16), (7, 8))
EXACT = {"rtol": 0, "atol": 1e-12}

# How many coefficients each band holds, counted by hand when the schedules were chosen.
COUNTS = {
    (16, "paper_linear"): [1, 0, 0, 0, 0, 8, 12, 40, 88, 107],
    (16, "nyquist"): [1, 8, 4, 12, 12, 24, 40, 60, 70, 25],
    (16, "area"): [1, 0, 8, 12, 16, 20, 40, 48, 82, 29],
    (16, "inscribed"): [1, 4, 4, 4, 8, 8, 20, 32, 56, 119],
    (8, "nyquist"): [1, 8, 4, 12, 30, 9],
    (8, "paper_linear"): [1, 0, 0, 4, 20, 39],
    (7, "nyquist"): [1, 8, 4, 24, 12],
    (7, "paper_linear"): [1, 0, 0, 12, 36],
}
# Share of the energy, less the mean's, up to each band when power falls with the square of the frequency.
ENERGY = {
    "paper_linear": [0, 0, 0, 0, 0, 0.367, 0.527, 0.729, 0.901, 1],
    "nyquist": [0, 0.367, 0.429, 0.557, 0.634, 0.729, 0.826, 0.915, 0.984, 1],
    "area": [0, 0, 0.367, 0.527, 0.634, 0.715, 0.819, 0.896, 0.981, 1],
    "inscribed": [0, 0.245, 0.367, 0.429, 0.527, 0.585, 0.687, 0.783, 0.885, 1],
}


def name(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=GRIDS, ids=name)
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture
def band(size: tuple[int, int], schedule: str) -> Tensor:
    return band_of_frequency(*size, SIDES[max(size)], schedule)


def frequencies(side: int) -> list[int]:
    """Signed whole frequencies in the order of a DFT, from numpy."""
    return [round(value) for value in np.fft.fftfreq(side, 1 / side)]


def random_grid(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wave(size: tuple[int, int], y: int, x: int, phase: float = 0.0) -> Tensor:
    """One cosine of y cycles down and x cycles across, (H, W) float64."""
    down, across = (torch.arange(side, dtype=torch.float64) / side for side in size)
    return torch.cos(2 * math.pi * (y * down[:, None] + x * across[None]) + phase)


# ---- which coefficient belongs where


@pytest.mark.parametrize(("side", "schedule", "counts"), [(*key, counts) for key, counts in COUNTS.items()])
def test_bands_hold_the_published_numbers_of_coefficients(side: int, schedule: str, counts: list[int]) -> None:
    band = band_of_frequency(side, side, SIDES[side], schedule)
    assert torch.bincount(band.flatten(), minlength=len(counts)).tolist() == counts


def slow_band(y: Fraction, x: Fraction, sides: tuple[int, ...], schedule: str) -> int:
    """The first band whose cut-off reaches the radius, in exact fractions of the half diagonal; squared throughout."""
    if schedule == "none":
        return 0
    radius = (y * y + x * x) / Fraction(1, 2)
    tokens = list(accumulate(side * side for side in sides))
    for k, (side, count) in enumerate(zip(sides, tokens, strict=True)):
        cutoff = {
            "nyquist": Fraction(side, sides[-1]) ** 2,
            "paper_linear": Fraction(count, tokens[-1]) ** 2,
            "area": Fraction(count, tokens[-1]),
            "inscribed": Fraction(side, sides[-1]) ** 2 / 2,
        }[schedule]
        if radius <= cutoff:
            return k
    return len(sides) - 1


def test_bands_are_those_of_exact_fractions(size: tuple[int, int], schedule: str, band: Tensor) -> None:
    wanted = [
        [
            slow_band(Fraction(y, size[0]), Fraction(x, size[1]), SIDES[max(size)], schedule)
            for x in frequencies(size[1])
        ]
        for y in frequencies(size[0])
    ]
    assert band.dtype == torch.int64 and band.tolist() == wanted


def test_the_mean_is_in_the_first_band_and_none_puts_everything_there(
    size: tuple[int, int], schedule: str, band: Tensor
) -> None:
    assert band.shape == size and band[0, 0] == 0
    assert int(band.max()) == (0 if schedule == "none" else len(SIDES[max(size)]) - 1)


@pytest.mark.parametrize("side", range(3, 41))
def test_a_radius_that_ties_with_its_cutoff_belongs_to_the_lower_band(side: int) -> None:
    """A map of even side h cuts off at h / sqrt(2): the radius of the diagonal (h/2, h/2), sqrt(2) itself at h = 2.

    In floats sqrt(2) lands on either side, after the side of the grid.
    """
    sides = tuple(range(1, side + 1))
    band = band_of_frequency(side, side, sides, "nyquist")
    for step in range(1, (side - 1) // 2 + 1):
        corners = [band[y, x].item() for y in (step, -step) for x in (step, -step)]
        assert corners == [2 * step - 1] * 4


def test_a_coefficient_and_its_mirror_share_a_band(band: Tensor) -> None:
    mirrored = band.flip(0, 1).roll((1, 1), (0, 1))
    assert torch.equal(band, mirrored)


def test_radii_rise_from_band_to_band(size: tuple[int, int], band: Tensor) -> None:
    height, width = size
    radius = torch.tensor(
        [[(y * width) ** 2 + (x * height) ** 2 for x in frequencies(width)] for y in frequencies(height)]
    )
    filled = [radius[band == k] for k in range(int(band.max()) + 1) if (band == k).any()]
    assert all(low.max() < high.min() for low, high in pairwise(filled))


def test_bands_do_not_depend_on_which_axis_is_which(schedule: str) -> None:
    sides = SIDES[16]
    assert torch.equal(band_of_frequency(8, 16, sides, schedule), band_of_frequency(16, 8, sides, schedule).T)


@pytest.mark.parametrize("unknown", ["linear", "", "Nyquist"])
def test_an_unknown_schedule_is_refused_with_the_known_ones(unknown: str) -> None:
    with pytest.raises(
        SettingError, match=f"unknown band schedule '{unknown}': use one of none, nyquist, paper_linear"
    ):
        band_of_frequency(8, 8, SIDES[8], unknown)


# ---- splitting and merging


def test_splitting_is_masking_a_complex_transform(size: tuple[int, int], band: Tensor) -> None:
    """And nothing imaginary is left over."""
    grid = random_grid(2, 3, *size)
    for k, part in enumerate(split_bands(grid, band)):
        wanted = torch.fft.ifft2(torch.fft.fft2(grid) * (band == k))
        assert wanted.imag.abs().max() < 1e-12
        torch.testing.assert_close(part, wanted.real, **EXACT)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_merging_undoes_splitting(size: tuple[int, int], band: Tensor, dtype: torch.dtype, bound: float) -> None:
    grid = random_grid(2, 3, *size, dtype=dtype)
    bands = split_bands(grid, band)
    assert bands.shape == (int(band.max()) + 1, 2, 3, *size) and bands.dtype == dtype
    torch.testing.assert_close(merge_bands(bands), grid, rtol=0, atol=bound)


def test_an_impulse_splits_into_masks_that_cover_the_plane_once(size: tuple[int, int], band: Tensor) -> None:
    impulse = torch.zeros(size, dtype=torch.float64)
    impulse[0, 0] = 1
    masks = torch.fft.fft2(split_bands(impulse, band))
    torch.testing.assert_close(masks.sum(0).real, torch.ones(size, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(masks.abs().square(), masks.abs(), **EXACT)


def test_bands_are_orthogonal_and_share_out_the_energy(size: tuple[int, int], band: Tensor) -> None:
    grid = random_grid(*size)
    bands = split_bands(grid, band).flatten(1)
    products = bands @ bands.T
    torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-11)
    torch.testing.assert_close(products.diagonal().sum(), grid.square().sum(), rtol=1e-12, atol=0)


def test_a_band_holds_itself_and_nothing_of_the_others(size: tuple[int, int], band: Tensor) -> None:
    bands = split_bands(random_grid(*size), band)
    twice = split_bands(bands, band)  # (K, K, H, W): band j of band i
    wanted = torch.zeros_like(twice)
    for k, part in enumerate(bands):
        wanted[k, k] = part
    torch.testing.assert_close(twice, wanted, **EXACT)


def test_splitting_is_linear_and_moves_with_the_grid(size: tuple[int, int], band: Tensor) -> None:
    grid, other = random_grid(*size), random_grid(*size, seed=1)
    both = split_bands(3 * grid - other, band)
    torch.testing.assert_close(both, 3 * split_bands(grid, band) - split_bands(other, band), **EXACT)
    rolled = split_bands(grid.roll((2, -3), (0, 1)), band)
    torch.testing.assert_close(rolled, split_bands(grid, band).roll((2, -3), (1, 2)), **EXACT)


def test_low_passes_are_sums_of_bands_and_idempotent(size: tuple[int, int], band: Tensor) -> None:
    grid = random_grid(*size)
    sums = split_bands(grid, band).cumsum(0)
    for k, wanted in enumerate(sums):
        low = keep_bands(grid, band <= k)
        torch.testing.assert_close(low, wanted, **EXACT)
        torch.testing.assert_close(keep_bands(low, band <= k), low, **EXACT)


def test_a_constant_is_all_in_the_first_band(size: tuple[int, int], band: Tensor) -> None:
    bands = split_bands(torch.full(size, 3.0, dtype=torch.float64), band)
    torch.testing.assert_close(bands[0], torch.full(size, 3.0, dtype=torch.float64), **EXACT)
    assert (bands[1:].abs() < 1e-12).all()


def test_a_cosine_is_all_in_the_band_of_its_frequency(size: tuple[int, int], band: Tensor) -> None:
    for y, x in [(0, 1), (1, 0), (1, 1), (2, -1), (0, size[1] // 2), (size[0] // 2, 0), (size[0] // 2, size[1] // 2)]:
        grid = wave(size, y, x, phase=0.3)
        bands = split_bands(grid, band)
        own = int(band[y % size[0], x % size[1]])
        torch.testing.assert_close(bands[own], grid, **EXACT)
        bands[own] = 0
        assert (bands.abs() < 1e-12).all()


def test_an_empty_band_is_zero() -> None:
    band = band_of_frequency(16, 16, SIDES[16], "paper_linear")
    bands = split_bands(random_grid(2, 16, 16), band)
    assert (bands[1:5] == 0).all() and bands[5:].abs().amax((1, 2, 3)).gt(0.1).all()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_filters_work_in_float32_at_least(given: torch.dtype, found: torch.dtype) -> None:
    band, grid = band_of_frequency(8, 8, SIDES[8], "nyquist"), random_grid(8, 8).to(given)
    low = keep_bands(grid, band <= 2)
    assert low.dtype == found
    torch.testing.assert_close(low.double(), keep_bands(grid.double(), band <= 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(5, 5), (4, 6)], ids=name)
def test_gradients_are_exact_and_never_longer_than_what_comes_back(size: tuple[int, int]) -> None:
    """A low-pass is an orthogonal projection, and its own transpose."""
    band = band_of_frequency(*size, (1, 2, 3, max(size)), "nyquist")
    grid = random_grid(*size).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda given: split_bands(given, band), grid)
    back = random_grid(*size, seed=1)
    for k in range(4):
        (gradient,) = torch.autograd.grad(keep_bands(grid, band <= k), grid, back)
        torch.testing.assert_close(gradient, keep_bands(back, band <= k), **EXACT)
        assert gradient.norm() <= back.norm() * (1 + 1e-12)


# ---- natural spectra


def falling_fields(count: int, side: int) -> Tensor:
    """Random fields (count, side, side) without a mean whose power falls with the square of the frequency."""
    radius = torch.tensor([[math.hypot(y, x) for x in frequencies(side)] for y in frequencies(side)])
    amplitude = torch.where(radius > 0, 1 / radius.clamp_min(1), 0.0)
    return torch.fft.ifft2(torch.fft.fft2(random_grid(count, side, side)) * amplitude).real


@pytest.mark.parametrize("schedule", ENERGY)
def test_low_bands_hold_most_of_a_natural_spectrum(schedule: str) -> None:
    """The expected shares to the third digit, and those of a thousand samples within 0.02."""
    band = band_of_frequency(16, 16, SIDES[16], schedule)
    power = torch.tensor([[1 / max(y * y + x * x, 1) for x in frequencies(16)] for y in frequencies(16)])
    power[0, 0] = 0
    expected = torch.bincount(band.flatten(), weights=power.flatten().double(), minlength=10).cumsum(0)
    assert (expected / expected[-1]).tolist() == pytest.approx(ENERGY[schedule], abs=6e-4)

    fields = falling_fields(1000, 16)
    shares = split_bands(fields, band).square().sum((1, 2, 3)).cumsum(0) / fields.square().sum()
    assert shares.tolist() == pytest.approx(ENERGY[schedule], abs=0.02)
    assert (shares.diff() >= 0).all() and shares[-1].item() == pytest.approx(1, abs=1e-12)


# ---- radial power


def test_rings_are_rounded_radii_in_cycles_per_larger_side(size: tuple[int, int]) -> None:
    larger = max(size)
    wanted = [
        [round(math.hypot(y * larger / size[0], x * larger / size[1])) for x in frequencies(size[1])]
        for y in frequencies(size[0])
    ]
    assert rings(*size).tolist() == wanted
    counts = np.bincount(np.array(wanted).ravel())
    assert ring_sizes(*size).tolist() == counts.tolist() and counts.min() > 0 and counts[0] == 1


@pytest.mark.parametrize("size", [*GRIDS, (1, 1), (1, 9), (6, 2)], ids=name)
def test_rings_share_out_the_energy(size: tuple[int, int]) -> None:
    grid = random_grid(4, 3, *size)
    power = radial_power(grid)
    assert power.shape == (4, len(ring_sizes(*size))) and power.dtype == torch.float64
    energy = (power * ring_sizes(*size)).sum(1)
    torch.testing.assert_close(energy, grid.square().sum((2, 3)).mean(1), rtol=1e-12, atol=0)


def test_a_cosine_lands_in_the_ring_of_its_frequency(size: tuple[int, int]) -> None:
    """With all its energy: half the number of cells."""
    height, width = size
    larger = max(size)
    for y, x in [(0, 1), (1, 0), (1, 1), (2, 1), (1, -3), (3, 2), (0, 3)]:
        energy = radial_power(wave(size, y, x)[None, None])[0] * ring_sizes(*size)
        wanted = torch.zeros_like(energy)
        wanted[round(math.hypot(y * larger / height, x * larger / width))] = height * width / 2
        torch.testing.assert_close(energy, wanted, rtol=0, atol=1e-10)


def test_the_mean_is_alone_in_the_first_ring(size: tuple[int, int]) -> None:
    power = radial_power(torch.full((1, 2, *size), -3.0))
    assert power[0, 0].item() == pytest.approx(9 * size[0] * size[1]) and (power[0, 1:] < 1e-12).all()


def test_white_noise_is_flat(size: tuple[int, int]) -> None:
    """Five standard errors: coefficients come in equal pairs, or are real, so a ring of n has the variance 2 / n."""
    power = radial_power(random_grid(200, 3, *size)).mean(0)
    error = (2 / ring_sizes(*size) / 600).sqrt()
    assert ((power - 1).abs() < 5 * error).all() and error.max() < 0.06


def test_rows_are_apart_and_channels_are_averaged(size: tuple[int, int]) -> None:
    grid = random_grid(3, 2, *size)
    power = radial_power(grid)
    for row in range(3):
        alone = [radial_power(grid[row : row + 1, c : c + 1])[0] for c in range(2)]
        torch.testing.assert_close(power[row], (alone[0] + alone[1]) / 2, **EXACT)


def test_power_does_not_lose_digits_to_a_large_mean() -> None:
    """float32 grids are transformed in float64: a faint wave on a bright ground keeps its power."""
    faint = wave((16, 16), 0, 5).float() / 4
    power = radial_power((faint + 4096)[None, None]) * ring_sizes(16, 16)
    assert power[0, 5].item() == pytest.approx(128 / 16, rel=1e-2) and power[0, 6:].max() < 1e-2
