"""Random streams: their law, what they depend on, and what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vgen.rng import MAX_SEED, BatchStream, SampleStreams
from vgen.types import SettingError

DRAWS = 200_000


def stream(seed: int, key: int = 0, draws: int = DRAWS) -> Tensor:
    return SampleStreams([seed]).exponential((draws,), key)[0]


def kolmogorov_smirnov(values: Tensor) -> float:
    """sqrt(N) times the largest distance between the empirical distribution and Exp(1)."""
    ranked = values.double().sort().values
    law = -torch.expm1(-ranked)
    steps = torch.arange(len(ranked) + 1) / len(ranked)
    return float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max()) * math.sqrt(len(ranked))


KS_BOUND = 2.2  # exceeded with probability 1.3e-4


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32, MAX_SEED])
@pytest.mark.parametrize("key", [0, 1, 19])
def test_noise_is_standard_exponential(seed: int, key: int) -> None:
    assert kolmogorov_smirnov(stream(seed, key)) < KS_BOUND


def test_the_bound_would_notice_a_wrong_law() -> None:
    assert kolmogorov_smirnov(stream(0) * 1.02) > KS_BOUND
    assert kolmogorov_smirnov(stream(0).round(decimals=2)) > KS_BOUND


def test_noise_is_finite_and_never_zero() -> None:
    """Drawn in float64: on a float32 grid of 2^-24 one draw in sixteen millions would be zero and win every race."""
    values = stream(0, draws=2_000_000)
    assert values.dtype == torch.float32
    assert values.isfinite().all() and values.min() > 0
    on_the_grid = (values[values < 1e-5].double() * 2**24) % 1
    assert ((on_the_grid > 0.25) & (on_the_grid < 0.75)).any()


def test_streams_are_independent() -> None:
    """Neighbouring seeds and keys, and a seed and key exchanged, have nothing to do with one another."""
    rows = [stream(seed, key) for seed, key in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (1, 2), (2**33, 0)]]
    correlations = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlations.abs().max() < 4.5 / math.sqrt(DRAWS)


def test_noise_depends_on_seed_and_key_alone() -> None:
    together = SampleStreams([5, 8, 5])
    first = together.exponential((4, 6), key=3)
    together.exponential((7,), key=0)
    again = together.exponential((4, 6), key=3)
    alone = SampleStreams([8]).exponential((4, 6), key=3)
    assert torch.equal(first, again)
    assert torch.equal(first[1:2], alone)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first, together.exponential((4, 6), key=4))


def test_neither_global_generator_is_touched_or_read() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = stream(3, draws=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(stream(3, draws=10), first)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 2**64, 1.5, True, "1", None])
def test_a_bad_seed_is_named(seed: Any) -> None:
    with pytest.raises(SettingError, match=rf"seed {seed!r} is not a whole number in 0\.\.{MAX_SEED}"):
        SampleStreams([0, seed])


def test_one_generator_draws_in_order() -> None:
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    rng = BatchStream(ours, batch=2)
    for shape in [(3, 5), (4, 5)]:
        wanted = torch.empty(2, *shape).exponential_(generator=theirs)
        assert torch.equal(rng.exponential(shape, key=0), wanted)
    assert torch.equal(ours.get_state(), theirs.get_state())
