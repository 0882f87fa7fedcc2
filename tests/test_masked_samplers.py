"""Unmasking: the loop against a slow one, orders of revelation against closed forms, and ReCAP's evaluations."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tiny_masked import (
    CODES,
    LOOP_SAMPLERS,
    P_BOUND,
    SAMPLERS,
    TOKENS,
    Evaluated,
    goodness,
    many,
    random_tokens,
    sample,
    table_pipeline,
    tiny_generator,
    tiny_pipeline,
)
from torch import Tensor

import vgen.generators.masked
from vgen.rng import BatchStream, SampleStreams
from vgen.samplers.logits import guide, share_guidance, temper
from vgen.samplers.masked import (
    MaskedSettings,
    Plan,
    by_confidence,
    by_order,
    halton_order,
    ramp,
    random_order,
    scheduled,
)
from vgen.samplers.recap import Evaluations, FeaturePolicy
from vgen.samplers.schedules import group_steps, reveal_counts
from vgen.types import SettingError, Step

POLICIES: list[dict[str, Any]] = [{}, {"partial_steps": 1}, {"full_steps": 2, "partial_steps": 2}, {"partial_steps": 7}]


@pytest.fixture(params=POLICIES, ids=str)
def policy(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def revealed(steps: Sequence[Step]) -> list[Tensor]:
    """Positions that each step reveals, (B, N) bool."""
    known = [torch.zeros_like(steps[0].known), *(step.known for step in steps)]
    return [after & ~before for before, after in pairwise(known)]


def first_revealed(pipeline: Any, batch: int, **settings: Any) -> tuple[Tensor, Tensor]:
    """The position that the first step of many samples reveals, one each, and its token."""
    step = many(pipeline, batch, **settings)[0]
    assert (step.known.sum(1) == 1).all()
    place = step.known.long().argmax(1)
    return place, step.tokens.gather(1, place[:, None])[:, 0]


# ---- the loop


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_position_is_revealed_once_and_then_kept(sampler: str, policy: dict[str, Any]) -> None:
    pipe = tiny_pipeline()
    steps = list(pipe.stream([0, 1, 2], seeds=[1, 2, 3], sampler=sampler, steps=8, **policy))
    assert [step.index for step in steps] == list(range(steps[0].total)) and len(steps) == steps[0].total
    tokens, known = torch.full((3, TOKENS), CODES), torch.zeros(3, TOKENS, dtype=torch.bool)
    for step in steps:
        assert torch.equal(step.tokens[known], tokens[known]) and not (known & ~step.known).any()
        assert torch.equal(step.tokens == CODES, ~step.known)
        tokens, known = step.tokens, step.known
    assert known.all() and tokens.min() >= 0 and tokens.max() < CODES
    if sampler != "ancestral-categorical":
        assert [step.evaluations for step in steps] == list(range(1, len(steps) + 1))
        assert all(now.any() for now in revealed(steps))


@pytest.mark.parametrize("sampler", LOOP_SAMPLERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_numbers_of_evaluations_and_tokens_evaluated(sampler: str, guidance_scale: float, policy: dict) -> None:
    """F whole evaluations of N + 1 tokens, the class token included, and partial ones of a group's n + 1."""
    pipe = tiny_pipeline()
    seen = Evaluated(pipe.generator)
    settings = {"sampler": sampler, "steps": 8, "guidance_scale": guidance_scale, **policy}
    steps = list(pipe.stream([1], seeds=[4], **settings))
    full, partial, total = policy.get("full_steps", 0), policy.get("partial_steps", 0), len(steps)
    whole = full + math.ceil((total - full) / (partial + 1))
    assert [call[2] for call in seen.calls].count(False) == whole and len(seen.calls) == total
    counts = [int(now.sum()) for now in revealed(steps)]
    groups = group_steps(range(total), full, partial)
    sizes = [sum(counts[step] for step in group) for group in groups]
    expected = whole * (TOKENS + 1) + sum(
        (len(group) - 1) * (size + 1) for group, size in zip(groups, sizes, strict=True)
    )
    assert seen.queries == expected and {call[0] for call in seen.calls} == {2 if guidance_scale != 1 else 1}
    for group, size in zip(groups, sizes, strict=True):
        assert steps[group[0]].evaluated is None
        inside = torch.stack([revealed(steps)[step] for step in group]).any(0)
        for step in group[1:]:
            evaluated = steps[step].evaluated
            assert evaluated is not None and torch.equal(evaluated, inside) and int(inside.sum()) == size


@pytest.mark.parametrize("sampler", LOOP_SAMPLERS)
def test_one_step_and_one_token_a_step(sampler: str) -> None:
    pipe = tiny_pipeline()
    steps = list(pipe.stream([0, 1], seeds=[0, 1], sampler=sampler, steps=1))
    assert len(steps) == 1 and steps[0].known.all() and steps[0].evaluations == 1
    if sampler != "ancestral":
        steps = list(pipe.stream([0, 1], seeds=[0, 1], sampler=sampler, steps=TOKENS))
        assert [now.sum(1).tolist() for now in revealed(steps)] == [[1, 1]] * TOKENS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_partial_steps_recap_is_the_sampler_itself(sampler: str) -> None:
    """Bit for bit; so it is where every step is a full one."""
    pipe = tiny_pipeline()
    base = list(pipe.stream([0, 1], seeds=[3, 4], sampler=sampler, steps=8))
    for policy in ({"full_steps": 5}, {"full_steps": 8, "partial_steps": 1}, {"full_steps": 8, "partial_steps": 7}):
        other = list(pipe.stream([0, 1], seeds=[3, 4], sampler=sampler, steps=8, **policy))
        assert [step.evaluations for step in other] == [step.evaluations for step in base]
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(base, other, strict=True))
    recap = list(pipe.stream([0, 1], seeds=[3, 4], sampler=sampler, steps=8, partial_steps=1))
    assert any(step.evaluated is not None and step.evaluated.any() for step in recap)


class Appending:
    """A cache by concatenation: keys and values of the tokens outside the group, in no order, then the group's."""

    filled = True

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, slots: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if slots is None:
            self.kept[layer] = k, v
            return k, v
        others = sorted(set(range(TOKENS + 1)) - set(slots[0].tolist()), key=lambda slot: slot * 7 % (TOKENS + 1))
        return tuple(torch.cat([old[:, :, others], new], 2) for old, new in zip(self.kept[layer], (k, v), strict=True))  # type: ignore[return-value]


def slow_maskgit(generator: Any, label: int, seed: int, policy: dict, steps: int, s0: float, scale: float) -> list[int]:
    """ReCAP's MaskGIT for one sample, from its description: lists, branches one by one, concatenated features."""
    noise, x, step = SampleStreams([seed]), [CODES] * TOKENS, 0
    groups = group_steps(reveal_counts(TOKENS, steps), policy.get("full_steps", 0), policy.get("partial_steps", 0))

    def guided(places: list[int] | None, share: float) -> Tensor:
        tokens = torch.tensor([x if places is None else [x[i] for i in places]])
        where = None if places is None else torch.tensor([places])
        cond, uncond = (
            generator(tokens, torch.tensor([c]), where, cache)[0] for c, cache in zip((label, 3), caches, strict=True)
        )
        return uncond + (1 + (scale - 1) * share) * (cond - uncond)

    for number, group in enumerate(groups):
        caches, known = (Appending(), Appending()), TOKENS - x.count(CODES)
        logits = guided(None, (known + group[0]) / TOKENS)
        drawn = (logits.softmax(-1) / noise.exponential((TOKENS, CODES), 3 * step + 1)[0]).argmax(-1)
        score = logits.log_softmax(-1)[range(TOKENS), drawn]
        score -= 4.5 * (1 - (number + 1) / len(groups)) * noise.exponential((TOKENS,), 3 * step + 2)[0].log()
        masked = [i for i in range(TOKENS) if x[i] == CODES]
        targets = sorted(masked, key=lambda i: -float(score[i]))[: sum(group)]
        logits = logits[targets]
        for j, count in enumerate(group):
            start = sum(group[:j])
            if j:
                logits = guided(targets, (known + start + count) / TOKENS)
            heat = s0 + (1 - math.sqrt(step / (steps - 1))) * (1 - s0)
            race = (logits / heat).softmax(-1)[start : start + count]
            race = race / noise.exponential((start + count, CODES), 3 * step)[0, start:]
            for place, token in zip(targets[start : start + count], race.argmax(-1).tolist(), strict=True):
                x[place] = token
            step += 1
    return x


def test_tokens_are_those_of_the_slow_loop(policy: dict[str, Any]) -> None:
    """Also that features scattered in place serve as well as concatenated ones."""
    pipe = tiny_pipeline()
    settings = {"steps": 8, "temperature": 0.7, "temperature_schedule": "sqrt", "guidance_scale": 2.5, **policy}
    tokens = sample(pipe, [0, 1, 2], [5, 6, 7], **settings).tokens
    slow = [slow_maskgit(pipe.generator, i, 5 + i, policy, 8, 0.7, 2.5) for i in range(3)]
    assert tokens.tolist() == slow


# ---- how many tokens, and at which temperature


def test_counts_are_recaps_through_the_pipeline() -> None:
    flat = table_pipeline(torch.full((1, 256, 2), 0.5))
    steps = many(flat, 2, mask_schedule="recap", steps=16, full_steps=8, partial_steps=1)
    counts = [now.sum(1).tolist() for now in revealed(steps)]
    assert counts == [[n, n] for n in (1, 1, 2, 4, 6, 9, 10, 13, 15, 19, 21, 24, 28, 31, 34, 38)]
    evaluated = [None if step.evaluated is None else int(step.evaluated[0].sum()) for step in steps]
    assert evaluated == [None] * 9 + [34, None, 45, None, 59, None, 72]


def test_rows_with_few_masked_tokens_take_one_at_a_time() -> None:
    known = torch.arange(TOKENS) < torch.tensor([0, 9, 13, 15])[:, None]
    for schedule in ("cosine", "recap"):
        plan = scheduled(known, 8, schedule)
        assert plan.counts.sum(1).tolist() == [16, 7, 3, 1] and plan.row_steps.tolist() == [8, 7, 3, 1]
        assert plan.counts[1:].tolist() == [[1] * n + [0] * (8 - n) for n in (7, 3, 1)]


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_temperatures_ramp_as_published(steps: int) -> None:
    """s0 + (1 - sqrt(linspace(0, 1, T))) (1 - s0), by the steps of each row."""
    for schedule, power in (("sqrt", 0.5), ("linear", 1.0)):
        for s0 in (0.65, 1.3, 0.0):
            wanted = s0 + (1 - torch.linspace(0, 1, steps, dtype=torch.float64) ** power) * (1 - s0)
            found = [ramp(schedule, s0, step, torch.tensor([steps, 20])) for step in range(steps)]
            assert torch.tensor([float(item[0]) for item in found]).double().sub(wanted).abs().max() < 1e-6
            assert all(item.shape == (2, 1, 1) for item in found)
    assert ramp("constant", 0.65, 3, torch.tensor([9])) == 0.65


def test_each_row_may_have_a_temperature_of_its_own() -> None:
    logits = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    heats = [0.5, 1.7, 0.0]
    found = temper(logits, torch.tensor(heats)[:, None, None]).softmax(-1)
    for row, heat in enumerate(heats):
        assert torch.allclose(found[row], temper(logits[row], heat).softmax(-1), atol=1e-6)


def test_guidance_grows_with_the_share_known() -> None:
    share = torch.tensor([0.25, 1.0])
    assert share_guidance(3.0, "linear")(share).flatten().tolist() == [1.5, 3.0]  # type: ignore[union-attr]
    assert share_guidance(3.0, "constant")(share) == 3.0 and share_guidance(1.0, "linear")(share) == 1.0
    quarters = torch.linspace(0, 1, 5)
    assert share_guidance(3.0, [0, 1, 0.5])(quarters).flatten().tolist() == [1, 2, 3, 2.5, 2]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="guidance_schedule is 'cosine'"):
        share_guidance(3.0, "cosine")


# ---- MaskGIT's order


def peaked(*tops: float) -> Tensor:
    """One state, three codes: the likeliest, a different one at each position, has the probability given."""
    laws = [torch.full((3,), (1 - top) / 2).index_fill(0, torch.tensor([i % 3]), top) for i, top in enumerate(tops)]
    return torch.stack(laws)[None].double()


TOPS = (0.5, 0.9, 0.4, 0.7)


def test_without_noise_the_most_confident_go_first() -> None:
    pipe = table_pipeline(peaked(*TOPS))
    for settings in ({"top_k": 1}, {"temperature": 0, "resample_singletons": False}):
        steps = list(pipe.stream([0], seeds=[0], steps=4, choice_temperature=0, **settings))
        assert [int(now.long().argmax()) for now in revealed(steps)] == [1, 3, 0, 2]
        assert steps[-1].tokens.tolist() == [[0, 1, 2, 0]]


def test_the_noise_on_confidence_is_gumbel_noise() -> None:
    """So the first of greedy draws is position i with a probability proportional to p_i^(1 / noise)."""
    pipe = table_pipeline(peaked(*TOPS))
    place, _ = first_revealed(pipe, 20_000, steps=4, top_k=1, choice_temperature=2.0)
    law = torch.tensor(TOPS, dtype=torch.float64) ** (1 / (2.0 * (1 - 1 / 4)))
    counts = torch.bincount(place, minlength=4)
    assert goodness(counts, law / law.sum()) > P_BOUND
    wrong = torch.tensor(TOPS, dtype=torch.float64) ** (1 / 2.0)
    assert goodness(counts, wrong / wrong.sum()) < P_BOUND


def test_the_noise_falls_linearly_to_nothing_over_a_rows_groups() -> None:
    """Rows that end earlier have none in their own last group, whatever the others do."""
    plan = Plan(counts=torch.tensor([[2, 3, 4, 3, 4], [1, 2, 3, 0, 0]]))
    groups = FeaturePolicy(full_steps=1, partial_steps=1).groups(5)  # [0], [1, 2], [3, 4]
    rng, settings = SampleStreams([3, 4]), MaskedSettings(choice_temperature=3.0)
    select, logits = by_confidence(rng, settings, plan, groups), torch.randn(2, 16, 5)
    known = torch.arange(16) < torch.tensor([[2], [12]])
    for number, left in enumerate([(2 / 3, 1 / 2), (1 / 3, 0), (0, 0)]):
        step = groups[number][0]
        drawn = (logits.softmax(-1) / rng.exponential((16, 5), 3 * step + 1)).argmax(-1)
        noise = -rng.exponential((16,), 3 * step + 2).log()
        score = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0] + 3 * torch.tensor(left)[:, None] * noise
        order, kept = select(logits, known, number)
        assert kept is None and torch.equal(order.sort(1).values, torch.arange(16).expand(2, -1))
        for row, given in enumerate((2, 12)):
            assert (order[row, 16 - given :] < given).all(), "known ones come last"
            assert (score[row, order[row, : 16 - given]].diff() <= 1e-6).all()


@pytest.mark.parametrize("heat", [1.0, 0.5])
def test_scored_tokens_are_kept_or_drawn_again(heat: float) -> None:
    """Of two positions with the same law MaskGIT reveals the more confident draw, which is unlikely only if both are;
    ReCAP draws another token there, from the law itself, as all do in groups of several steps."""
    law = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    pipe = table_pipeline(law.expand(1, 2, -1))
    settings = {"steps": 2, "choice_temperature": 0, "temperature": heat}
    tempered = law ** (1 / heat) / (law ** (1 / heat)).sum()
    behind = tempered.flip(0).cumsum(0).flip(0)  # this code or a less likely one
    kept_law = behind**2 - torch.cat([behind[1:], torch.zeros(1)]) ** 2
    cases = [({"resample_singletons": False}, kept_law, tempered), ({}, tempered, kept_law)]
    cases.append(({"resample_singletons": False, "partial_steps": 1}, tempered, kept_law))  # a group of two
    for changes, wanted, other in cases:
        _, token = first_revealed(pipe, 10_000, **settings, **changes)
        counts = torch.bincount(token, minlength=3)
        assert goodness(counts, wanted) > P_BOUND and goodness(counts, other) < P_BOUND


def test_scores_are_taken_before_tempering() -> None:
    """Position 0 ends up likelier at a low temperature, position 1 is likelier at temperature 1."""
    laws = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.55, 0.45, 0, 0, 0, 0]], dtype=torch.float64) + 1e-12
    settings = {"steps": 2, "choice_temperature": 0, "resample_singletons": False}
    cold = laws**5 / (laws**5).sum(-1, keepdim=True)
    assert cold[0, 0] > cold[1].max() > laws[0, 0]
    place, _ = first_revealed(table_pipeline(laws[None]), 2000, temperature=0.2, **settings)
    likely = float(cold[1, 0] + cold[1, 1] * (cold[0, 1:].sum()))
    assert float((place == 1).double().mean()) == pytest.approx(likely, abs=0.04)


# ---- fixed orders


def radical_inverse(number: int, base: int) -> Fraction:
    mirrored = np.base_repr(number, base)[::-1]
    return Fraction(int(mirrored, base), base ** len(mirrored))


@pytest.mark.parametrize("side", [1, 2, 4, 5, 7, 9, 16, 18, 24, 27])
def test_halton_order_is_the_sequence(side: int) -> None:
    cells: dict[int, None] = {}
    for point in range(1, 40 * side * side):
        row, column = (int(radical_inverse(point, base) * side) for base in (2, 3))
        cells[row * side + column] = None
    wanted = list(cells)
    assert sorted(wanted) == list(range(side * side))
    for row in halton_order(SampleStreams(range(5)), side * side).tolist():
        start = wanted.index(row[0])
        assert row == wanted[start:] + wanted[:start]


def test_halton_begins_anywhere_and_spreads_out() -> None:
    orders = halton_order(BatchStream(torch.Generator().manual_seed(0), 8000), TOKENS)
    assert goodness(torch.bincount(orders[:, 0], minlength=TOKENS), torch.full((TOKENS,), 1 / TOKENS)) > P_BOUND
    order = halton_order(SampleStreams([1]), 256)[0]
    steps = torch.stack([order // 16, order % 16]).diff(dim=1).abs().sum(0).double()
    raster = torch.arange(256)
    near = torch.stack([raster // 16, raster % 16]).diff(dim=1).abs().sum(0).double()
    assert steps.mean() > 4 * near.mean() and (steps == 1).sum() < 3
    with pytest.raises(SettingError, match="'halton' needs a square grid of tokens, 12 is no square"):
        halton_order(SampleStreams([1]), 12)


def test_random_orders_are_uniform_and_belong_to_the_sample() -> None:
    orders = random_order(BatchStream(torch.Generator().manual_seed(1), 6000), 3)
    index = (orders * torch.tensor([9, 3, 1])).sum(1)
    counts = torch.bincount(index, minlength=27)
    assert (counts > 0).sum() == 6 and goodness(counts[counts > 0], torch.full((6,), 1 / 6)) > P_BOUND
    assert torch.equal(random_order(SampleStreams([7, 8]), 9)[1:], random_order(SampleStreams([8]), 9))


@pytest.mark.parametrize("sampler", ["halton", "random"])
def test_fixed_orders_are_followed_past_known_tokens(sampler: str) -> None:
    order = {"halton": halton_order, "random": random_order}[sampler](SampleStreams([3]), TOKENS)[0].tolist()
    known = torch.arange(TOKENS) % 3 == 0
    settings = {"sampler": sampler, "steps": TOKENS, "tokens": random_tokens(1), "known": known}
    steps = list(tiny_pipeline().stream([1], seeds=[3], **settings))
    seen = known.clone()
    for step, place in zip(steps, [place for place in order if not known[place]], strict=True):
        assert (step.known[0] & ~seen).nonzero().tolist() == [[place]]
        seen = step.known[0]
    select = by_order(torch.tensor([order]))
    assert select(torch.zeros(0), torch.zeros(1, TOKENS) > 0, 0)[0].tolist() == [order]


# ---- features and branches


def test_partial_equals_whole_where_the_context_cannot_see_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """With context rows blind to the group, and to the class token, which sees it, nothing cached goes stale."""
    model, places = tiny_generator(depth=5).double(), [2, 7, 11]
    allowed = torch.ones(TOKENS + 1, TOKENS + 1, dtype=torch.bool)
    context = [slot for slot in range(1, TOKENS + 1) if slot - 1 not in places]
    for slot in [0, *(place + 1 for place in places)]:
        allowed[context, slot] = False
    plain = vgen.generators.masked.attention

    def blind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v, mask=allowed) if q.shape[2] == TOKENS + 1 else plain(q, k, v)

    tokens = random_tokens(1).masked_fill(torch.arange(TOKENS) > 5, CODES)
    where, labels = torch.tensor([places]), torch.tensor([1])
    after = tokens.scatter(1, where, torch.tensor([[4, 8, CODES]]))
    for attention, equal in ((blind, True), (plain, False)):
        monkeypatch.setattr(vgen.generators.masked, "attention", attention)
        cache = model.new_cache(1)
        model(tokens.scatter(1, where, CODES), labels, cache=cache)
        partial = model(after.gather(1, where), labels, where, cache)
        assert torch.allclose(partial, model(after, labels)[:, places], atol=1e-6) == equal


def evaluations_of(labels: list[int], guided: bool = True) -> Evaluations:
    return Evaluations(tiny_generator().double(), torch.tensor(labels), 3, guided)


def test_branches_of_guidance_keep_their_own_features() -> None:
    """The two halves exchanged by hand, and the guidance mirrored, give the same; and each half is what it is alone."""
    tokens, where = random_tokens(2).masked_fill(torch.arange(TOKENS) > 5, CODES), torch.tensor([[6, 9], [15, 7]])
    ours, mirrored = evaluations_of([0, 1]), evaluations_of([0, 1])
    mirrored.labels = mirrored.labels.roll(2)
    assert ours.labels.tolist() == [0, 1, 3, 3] and mirrored.labels.tolist() == [3, 3, 0, 1]
    alone = [evaluations_of(labels, guided=False) for labels in ([0, 1], [3, 3])]
    given = torch.tensor([[3, 5], [CODES, 2]])
    for scale in (2.5, torch.tensor([2.5, 0.5])[:, None, None]):
        for ask in (lambda e, s: e.whole(tokens, s, keep=True), lambda e, s: e.partial(given, where, s)):
            found, cond, uncond = ask(ours, scale), ask(alone[0], 1.0), ask(alone[1], 1.0)
            assert torch.allclose(found, ask(mirrored, 1 - scale), atol=1e-5)
            assert torch.allclose(found, guide(cond, uncond, scale), atol=1e-5)
            assert not torch.allclose(found, cond, atol=1e-2)
    assert ours.count == 4
