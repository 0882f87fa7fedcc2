"""From logits to tokens: guidance, truncation against the published rule, the exponential race."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vgen.rng import BatchStream, SampleStreams
from vgen.samplers.logits import draw, guidance_at, guide, temper, truncate


def random_logits(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


# ---- guidance


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
def test_guidance_goes_from_the_unconditional_through_the_conditional(scale: float) -> None:
    cond, uncond = random_logits(2, 3, 9), random_logits(2, 3, 9, seed=1)
    torch.testing.assert_close(guide(cond, uncond, scale), uncond + scale * (cond - uncond), rtol=0, atol=1e-12)


def test_guidance_of_one_is_off_bit_for_bit() -> None:
    cond, uncond = random_logits(2, 3, 9).float(), random_logits(2, 3, 9, seed=1).float()
    assert torch.equal(guide(cond, uncond, 1.0), cond)


def test_guidance_has_the_published_rounding() -> None:
    cond, uncond, t = random_logits(500).float(), random_logits(500, seed=1).float(), 2.0
    assert torch.equal(guide(cond, uncond, 1 + t), (1 + t) * cond - t * uncond)


def test_guidance_schedules() -> None:
    assert [guidance_at(3.0, "linear", k, 5) for k in range(5)] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert [guidance_at(3.0, "constant", k, 5) for k in range(5)] == [3.0] * 5
    assert guidance_at(3.0, "linear", 0, 1) == 1.0


def test_a_curve_of_guidance_goes_straight_between_its_points() -> None:
    assert [guidance_at(3.0, [0, 1, 0.5], k, 5) for k in range(5)] == [1.0, 2.0, 3.0, 2.5, 2.0]
    assert [guidance_at(3.0, "0:0.25:1:1:0", k, 5) for k in range(5)] == [1.0, 1.5, 3.0, 3.0, 1.0]
    assert guidance_at(3.0, [0.5, 1], 0, 1) == 2.0
    for name, curve in (("linear", [0, 1]), ("constant", [1, 1, 1])):
        assert [guidance_at(2.7, curve, k, 7) for k in range(7)] == pytest.approx(
            [guidance_at(2.7, name, k, 7) for k in range(7)], rel=1e-15
        )


@pytest.mark.parametrize(
    "schedule", ["cosine", "", "1", "0:2", "0:-0.1", "0:nan", [0.5], [0, "x"], None, 3, [0.0] * 65]
)
def test_no_other_schedule_is_taken(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"guidance_schedule is .*'linear', 'constant', or 2 to 64 shares in 0\.\.1"):
        guidance_at(3.0, schedule, 0, 5)


# ---- truncation


def published_truncation(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Spec 3.1 c and d, one row at a time: ties at the k-th value stay, the largest always stays."""
    out = logits.clone().flatten(0, -2)
    for row in out:
        if 0 < top_k < len(row):
            kth = sorted(row.tolist(), reverse=True)[top_k - 1]
            row[row < kth] = -torch.inf
        if top_p < 1:
            order = sorted(range(len(row)), key=lambda i: float(row[i]))
            probabilities = row.softmax(-1)
            mass = 0.0
            for index in order[:-1]:
                mass += float(probabilities[index])
                if mass <= 1 - top_p:
                    row[index] = -torch.inf
    return out.view_as(logits)


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 39, 40, 100])
@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_truncation_is_the_published_rule(top_k: int, top_p: float) -> None:
    logits = random_logits(4, 25, 40)
    assert torch.equal(truncate(logits, top_k, top_p), published_truncation(logits, top_k, top_p))


def test_truncation_leaves_its_argument_alone() -> None:
    logits = random_logits(5, 10)
    before = logits.clone()
    truncate(logits, top_k=3, top_p=0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab_and_more", [0, 6, 7, 1000])
def test_keeping_everything_changes_nothing(vocab_and_more: int) -> None:
    logits = random_logits(5, 6)
    assert torch.equal(truncate(logits, top_k=vocab_and_more, top_p=1.0), logits)


def test_all_the_mass_on_one_token() -> None:
    logits = torch.tensor([[0.0, 1000.0, 1.0]])
    for top_p in (0.0, 0.5, 0.999999):
        assert truncate(logits, top_p=top_p).isfinite().tolist() == [[False, True, False]]
    assert truncate(logits, top_p=1.0).isfinite().all()


def test_tokens_that_were_masked_before_stay_masked() -> None:
    logits = torch.tensor([[2.0, -math.inf, 1.0, 0.0, -math.inf]])
    assert truncate(logits, top_k=4).isfinite().tolist() == [[True, False, True, True, False]]
    assert truncate(logits, top_p=0.7).isfinite().tolist() == [[True, False, True, False, False]]


def test_ties_with_the_kth_largest_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert truncate(logits, top_k=2).isfinite().tolist() == [[False, True, True, True, True, False]]
    assert truncate(logits, top_k=1).isfinite().sum() == 1
    assert truncate(torch.zeros(1, 6), top_k=2).isfinite().all()


def tied_logits() -> Tensor:
    """Logits on a coarse grid, as bfloat16 heads give them: most rows tie at their k-th value."""
    return (random_logits(200, 40, spread=2.0) * 2).round() / 2


@pytest.mark.parametrize("top_k", [1, 2, 7, 20])
def test_top_k_with_ties_is_the_published_rule(top_k: int) -> None:
    logits = tied_logits()
    assert torch.equal(truncate(logits, top_k), published_truncation(logits, top_k, 1.0))


def test_top_p_counts_the_mass_of_ties_that_top_k_kept() -> None:
    """Of [2, 1, 1, 1] top-k of 2 keeps all; the smallest has 0.175 of the mass, so p = 0.7 must keep several."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0]])
    assert published_truncation(logits, 2, 0.7).isfinite().sum() == 3
    assert truncate(logits, 2, 0.7).isfinite().sum() >= 3


def test_top_p_never_cuts_deeper_than_the_published_rule_where_logits_tie() -> None:
    """Which of several equal logits goes is an accident of sorting there; here all of them stay."""
    logits = tied_logits()
    ours, published = truncate(logits, 0, 0.6).isfinite(), published_truncation(logits, 0, 0.6).isfinite()
    assert (ours | ~published).all()
    assert torch.equal(
        logits.masked_fill(~ours, torch.inf).amin(-1), logits.masked_fill(~published, torch.inf).amin(-1)
    )


# ---- the exponential race


@pytest.mark.parametrize("masked", [False, True])
def test_the_race_is_multinomial_with_the_same_generator(masked: bool) -> None:
    """Same tokens, and the generator ends in the same state."""
    logits = random_logits(3, 50, 20).float()
    logits = truncate(logits, top_k=5) if masked else logits
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    drawn = draw(logits, BatchStream(ours, batch=3).exponential((50, 20), key=0))
    wanted = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, replacement=True, generator=theirs).view(3, 50)
    assert torch.equal(drawn, wanted)
    assert torch.equal(ours.get_state(), theirs.get_state())


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic over the tokens that can occur."""
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * tokens.numel()
    return float(((counts[possible] - expected).square() / expected).sum())


DRAWS = 100_000
LAW = torch.tensor([1.5, 0.0, -1.0, 0.7, -math.inf, 2.0, -2.5, 0.9], dtype=torch.float64)
BOUND = 29.9  # chi-square with 6 degrees of freedom exceeds it with probability 4e-5


def noise() -> Tensor:
    return SampleStreams([11]).exponential((DRAWS, len(LAW)), key=0)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_race_has_the_softmax_law(temperature: float) -> None:
    tokens = draw(temper(LAW.float(), temperature).expand(DRAWS, -1), noise())
    assert chi_square(tokens, (LAW / temperature).softmax(-1)) < BOUND


def test_the_bound_would_notice_a_wrong_law() -> None:
    """Slightly wrong temperatures, and other noise, fail it by far."""
    logits, law = LAW.float().expand(DRAWS, -1), LAW.softmax(-1)
    assert chi_square(draw(temper(logits, 1.05), noise()), law) > 2 * BOUND
    uniform = torch.rand(DRAWS, len(LAW), generator=torch.Generator().manual_seed(0))
    assert chi_square(draw(logits, uniform), law) > 2 * BOUND
    gumbel = (logits - noise()).argmax(-1)  # exponential where Gumbel noise belongs
    assert chi_square(gumbel, law) > 2 * BOUND


# ---- limits


def test_no_temperature_is_greedy() -> None:
    logits = random_logits(20, 30).float()
    assert torch.equal(draw(temper(logits, 0.0), noise()[:20].repeat(1, 4)[:, :30]), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-38])
def test_as_the_temperature_goes_to_zero_the_likeliest_token_wins(temperature: float) -> None:
    logits = torch.tensor([[4.0, 5.0, 4.5], [70.0, 0.0, -70.0]])
    for row in range(20):
        tokens = draw(temper(logits, temperature), noise()[2 * row : 2 * row + 2, :3])
        assert tokens.tolist() == [1, 0]


def test_top_k_of_one_is_greedy_whatever_the_noise() -> None:
    logits = random_logits(20, 8).float()
    for start in range(0, 200, 20):
        assert torch.equal(draw(truncate(logits, top_k=1), noise()[start : start + 20]), logits.argmax(-1))


def test_drawing_changes_neither_logits_nor_noise() -> None:
    logits, race = random_logits(20, 8).float(), noise()[:20]
    before = logits.clone(), race.clone()
    temper(logits, 0.7)
    temper(logits, 0.0)
    draw(logits, race)
    assert torch.equal(logits, before[0]) and torch.equal(race, before[1])
