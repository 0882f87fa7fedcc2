"""Schedules of unmasking: the published integers, sums and bounds."""

import math

import pytest

from vgen.samplers.schedules import MASK_SCHEDULES, group_steps, recap_counts, reveal_counts
from vgen.types import SettingError

RECAP = {  # of 256 tokens, as ReCAP's released runs use them
    8: "2 6 15 23 34 45 59 72",
    16: "1 1 2 4 6 9 10 13 15 19 21 24 28 31 34 38",
    20: "1 1 2 2 3 5 6 7 9 11 12 14 16 17 20 22 24 26 29 29",
    24: "1 1 1 1 3 2 4 5 6 6 8 9 10 11 13 13 16 16 18 20 21 22 25 24",
    32: "1 1 1 1 1 1 2 2 3 3 4 5 4 6 6 7 7 8 9 10 10 11 12 12 14 14 15 16 17 17 19 17",
}


@pytest.mark.parametrize("steps", RECAP)
def test_recaps_counts_are_the_published_ones(steps: int) -> None:
    assert recap_counts(256, steps) == [int(count) for count in RECAP[steps].split()]


@pytest.mark.parametrize(
    ("steps", "full", "sizes"),
    [
        (32, 12, "1 1 1 1 1 1 2 2 3 3 4 5 10 13 15 19 21 24 28 31 34 36"),
        (24, 10, "1 1 1 1 3 2 4 5 6 6 17 21 26 32 38 43 49"),
        (16, 8, "1 1 2 4 6 9 10 13 34 45 59 72"),
        (16, 0, "2 6 15 23 34 45 59 72"),
    ],
)
def test_recaps_groups_are_the_published_ones(steps: int, full: int, sizes: str) -> None:
    groups = group_steps(recap_counts(256, steps), full, 1)
    assert [sum(group) for group in groups] == [int(size) for size in sizes.split()]


@pytest.mark.parametrize(("full", "partial"), [(0, 0), (5, 2), (4, 3), (11, 1), (0, 20)])
def test_groups_keep_every_step_in_order(full: int, partial: int) -> None:
    """Also with more than one partial step, where the published code skips entries."""
    counts = list(range(1, 12))
    groups = group_steps(counts, full, partial)
    assert [count for group in groups for count in group] == counts
    assert all(len(group) == 1 for group in groups[:full])
    assert all(len(group) == partial + 1 for group in groups[full:-1])
    assert len(groups) == full + math.ceil((11 - full) / (partial + 1))


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
@pytest.mark.parametrize(("tokens", "steps"), [(49, 1), (49, 8), (49, 49), (256, 12), (3, 2)])
def test_every_step_reveals_and_all_is_revealed(schedule: str, tokens: int, steps: int) -> None:
    counts = reveal_counts(tokens, steps, schedule)
    assert len(counts) == steps and min(counts) >= 1 and sum(counts) == tokens


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_schedules_go_from_all_to_nothing(schedule: str) -> None:
    gamma = MASK_SCHEDULES[schedule]
    values = [gamma(i / 100) for i in range(101)]
    assert values[0] == 1 and values[-1] == pytest.approx(0, abs=1e-12)
    assert values == sorted(values, reverse=True)


def test_maskgits_cosine_counts() -> None:
    """floor(256 cos(pi s / 16)) stay masked: 251, 236, 212, 181, 142, 97, 49, 0."""
    assert reveal_counts(256, 8) == [5, 15, 24, 31, 39, 45, 48, 49]


def test_one_token_a_step_where_there_are_as_many() -> None:
    assert reveal_counts(7, 7) == [1] * 7


def test_what_cannot_be_scheduled_is_refused() -> None:
    with pytest.raises(SettingError, match=r"steps is 10: it must lie in 1\.\.9"):
        reveal_counts(9, 10)
    with pytest.raises(SettingError, match="steps is 0"):
        recap_counts(9, 0)
    with pytest.raises(SettingError, match="unknown mask schedule 'cosin'"):
        reveal_counts(9, 3, "cosin")
    with pytest.raises(SettingError, match="leaves no token for the last of 6 steps"):
        recap_counts(6, 6, "sqrt")
    for full, partial in ((-1, 1), (4, 1), (0, -1)):
        with pytest.raises(SettingError, match=r"full_steps is|partial_steps is"):
            group_steps([1, 1, 1], full, partial)
