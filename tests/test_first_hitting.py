"""Masked diffusion: its samplers against laws computed by enumeration, times of revelation, and numerical precision.

The toy model is a table of distributions for every state of three tokens of three codes.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_masked import (
    KS_BOUND,
    P_BOUND,
    TOKENS,
    Evaluated,
    Table,
    dirichlet_table,
    goodness,
    known_masks,
    kolmogorov_smirnov,
    many,
    sample,
    table_pipeline,
    tiny_pipeline,
)
from torch import Tensor

from vgen.rng import BatchStream, SampleStreams
from vgen.samplers.first_hitting import (
    LOGLINEAR_EPS,
    MASKED_SHARE,
    TIME_OF_SHARE,
    ancestral,
    draw_or_mask,
    first_hitting,
    hitting_shares,
)
from vgen.samplers.masked import MaskedSettings, Plan, by_order, random_order, token_draw, unmask
from vgen.samplers.recap import Evaluations, FeaturePolicy

N, V = 3, 3
TABLE = dirichlet_table(N, V)
MASKED = (V + 1) ** N - 1  # the state in which nothing is known


def digits(state: int) -> list[int]:
    return [state // (V + 1) ** i % (V + 1) for i in range(N)]


def over_outcomes(law: Tensor) -> Tensor:
    """From probabilities of states to those of the V^N outcomes, the first token first."""
    cells = law.view(*[V + 1] * N).permute(*reversed(range(N)))
    return cells[:V, :V, :V].flatten()


def outcomes(tokens: Tensor) -> Tensor:
    """How often each of the V^N outcomes occurs in tokens (B, N)."""
    assert tokens.max() < V
    return torch.bincount((tokens * V ** torch.arange(N - 1, -1, -1)).sum(1), minlength=V**N)


# ---- laws by enumeration


def first_hitting_law() -> Tensor:
    """One uniformly chosen masked token after another, drawn given all that is known."""
    law = torch.zeros(MASKED + 1, dtype=torch.float64)
    law[MASKED] = 1
    for masked in range(N, 0, -1):
        after = torch.zeros_like(law)
        for state in range(MASKED + 1):
            for i in (i for i, token in enumerate(digits(state)) if token == V):
                to = state + (torch.arange(V) - V) * (V + 1) ** i
                after[to] += law[state] / masked * TABLE[state, i]
        law = after
    return over_outcomes(law)


def ancestral_law(steps: int, schedule: str = "linear") -> Tensor:
    """Every masked token is revealed independently with probability 1 - m(s) / m(t), given the state at time t."""
    share = MASKED_SHARE[schedule](torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
    tokens = torch.tensor([digits(state) for state in range(MASKED + 1)])
    known = torch.nn.functional.one_hot(tokens, V + 1).double()
    law = known[MASKED].new_zeros(MASKED + 1).index_fill(0, torch.tensor(MASKED), 1)
    for step in range(steps):
        reveal = 1 - share[step + 1] / share[step]
        drawn = torch.cat([reveal * TABLE, (1 - reveal).expand(MASKED + 1, N, 1)], -1)
        each = torch.where((tokens == V)[..., None], drawn, known)
        law = torch.einsum("s,sa,sb,sc->cba", law, *each.unbind(1)).flatten()
    return over_outcomes(law)


def test_first_hitting_is_autoregression_in_a_random_order() -> None:
    """The oracle of the tests below, against the average over all orders."""
    average = torch.zeros(V**N, dtype=torch.float64)
    for order in itertools.permutations(range(N)):
        for index, outcome in enumerate(itertools.product(range(V), repeat=N)):
            state, probability = MASKED, 1.0
            for i in order:
                probability *= float(TABLE[state, i, outcome[i]])
                state += (outcome[i] - V) * (V + 1) ** i
            average[index] += probability / math.factorial(N)
    assert torch.allclose(first_hitting_law(), average, atol=1e-12, rtol=0)
    assert float(average.sum()) == pytest.approx(1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "square"])
def test_the_ancestral_law_approaches_it_as_one_over_the_steps(schedule: str) -> None:
    exact = first_hitting_law()
    distance = {steps: float((ancestral_law(steps, schedule) - exact).abs().sum() / 2) for steps in (1, 32, 64, 128)}
    assert distance[1] > 0.1 and 0.002 < distance[32] < 0.1
    for steps in (32, 64):
        assert distance[2 * steps] / distance[steps] == pytest.approx(0.5, rel=0.04)
    assert 128 * distance[128] == pytest.approx(64 * distance[64], rel=0.04)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine-alpha", "square"])
def test_the_evidence_bound_does_not_depend_on_the_schedule(schedule: str) -> None:
    """The integral of m'(t) / m(t) times the loss at m(t) is the sum over n of 1 / n times the loss with n masked."""
    by_number = torch.zeros(N + 1, dtype=torch.float64)  # sum over subsets of n tokens, averaged over all samples
    for outcome in itertools.product(range(V), repeat=N):
        for masked in itertools.product((False, True), repeat=N):
            state = sum((V if masked[i] else outcome[i]) * (V + 1) ** i for i in range(N))
            losses = [-TABLE[state, i, outcome[i]].log() for i in range(N) if masked[i]]
            by_number[sum(masked)] += sum(losses, torch.tensor(0.0)) / V**N
    exact = sum(float(by_number[n]) / n / math.comb(N, n) for n in range(1, N + 1))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    time = torch.tensor((nodes + 1) / 2, requires_grad=True)
    share = MASKED_SHARE[schedule](time)
    (slope,) = torch.autograd.grad(share.sum(), time)
    terms = [share**n * (1 - share) ** (N - n) * float(by_number[n]) for n in range(1, N + 1)]
    integral = (torch.tensor(weights) / 2 * slope / share * sum(terms)).sum()
    assert float(integral.detach()) == pytest.approx(exact, rel=1e-6)


# ---- samples against laws


def first_hitting_samples(batch: int, partial_steps: int = 0) -> Tensor:
    """Tokens (batch, N), one per step; counts and groups do not depend on the sample."""
    rng, settings = BatchStream(torch.Generator().manual_seed(1), batch), MaskedSettings()
    known = torch.zeros(batch, N, dtype=torch.bool)
    plan = Plan(counts=first_hitting(SampleStreams([0]), known[:1], None, "linear").counts.expand(batch, -1))
    groups = FeaturePolicy(partial_steps=partial_steps).groups(plan.steps)
    evaluations = Evaluations(Table(TABLE), torch.zeros(batch, dtype=torch.int64), 1, False)
    select, choose = by_order(random_order(rng, N)), token_draw(rng, settings, plan)
    *_, last = unmask(evaluations, torch.full((batch, N), V), known, plan, groups, select, choose, lambda share: 1.0)
    return last.tokens


def test_samples_have_the_exact_law() -> None:
    counts = outcomes(first_hitting_samples(200_000))
    assert goodness(counts, first_hitting_law()) > P_BOUND
    assert goodness(counts, ancestral_law(64)) < P_BOUND, "the test would notice a distance of a hundredth"


@pytest.mark.parametrize("partial_steps", [1, 2])
def test_partial_evaluations_know_what_the_group_has_revealed(partial_steps: int) -> None:
    """With an ideal partial evaluation ReCAP samples the very same law: every token is drawn given those before."""
    counts = outcomes(first_hitting_samples(100_000, partial_steps))
    assert goodness(counts, first_hitting_law()) > P_BOUND
    assert goodness(counts, ancestral_law(32)) < P_BOUND


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "batch"), [("ancestral", 30_000), ("ancestral-categorical", 100_000)])
def test_both_forms_of_the_ancestral_sampler_have_its_exact_law(sampler: str, batch: int, schedule: str) -> None:
    settings = {"sampler": sampler, "steps": 4, "noise_schedule": schedule}
    counts = outcomes(many(table_pipeline(TABLE), batch, **settings)[-1].tokens)
    assert goodness(counts, ancestral_law(4, schedule)) > P_BOUND
    for other in (ancestral_law(3, schedule), ancestral_law(5, schedule), first_hitting_law()):
        assert goodness(counts, other) < P_BOUND


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine-alpha", "square"])
def test_numbers_revealed_by_each_step_are_multinomial(schedule: str) -> None:
    """Binomial for every step given those before: all together, each token falls into a step of its own."""
    batch, steps = 20_000, 4
    share = MASKED_SHARE[schedule](torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
    chance = (share[:-1] - share[1:]) / share[0]
    rows = list(itertools.product(range(N + 1), repeat=steps))
    cells = [row for row in rows if sum(row) == N]
    ways = [math.factorial(N) / math.prod(map(math.factorial, row)) for row in cells]
    law = torch.tensor(
        [way * float(chance.pow(torch.tensor(row)).prod()) for way, row in zip(ways, cells, strict=True)]
    )
    plan = ancestral(BatchStream(torch.Generator().manual_seed(2), batch), torch.zeros(batch, N) > 0, steps, schedule)
    assert plan.times is not None
    by_step = torch.zeros(batch, steps, dtype=torch.int64)
    taken = ((1 - plan.times) * steps).round().long() - 1
    by_step.scatter_add_(1, taken.clamp_max(steps - 1), plan.counts)
    index = (by_step * (N + 1) ** torch.arange(steps - 1, -1, -1)).sum(1)
    counts = torch.bincount(index, minlength=len(rows))[[rows.index(cell) for cell in cells]]
    assert counts.sum() == batch
    assert goodness(counts, law) > P_BOUND
    assert goodness(counts, law.roll(1)) < P_BOUND


def test_one_step_is_the_product_of_marginals() -> None:
    one, two, three = TABLE[MASKED]
    law = torch.einsum("a,b,c->abc", one, two, three).flatten()
    for sampler, batch in (("first-hitting", 20_000), ("ancestral", 20_000), ("ancestral-categorical", 50_000)):
        steps = many(table_pipeline(TABLE), batch, sampler=sampler, steps=1)
        assert len(steps) == steps[0].evaluations == 1
        counts = outcomes(steps[0].tokens)
        assert goodness(counts, law) > P_BOUND
        assert goodness(counts, first_hitting_law()) < P_BOUND


# ---- times of revelation


def shares_of(batch: int, number: int) -> Tensor:
    """The masked share after each of `number` revelations, (batch, number)."""
    rng = BatchStream(torch.Generator().manual_seed(3), batch)
    return torch.stack(hitting_shares(rng, torch.zeros(batch, number, dtype=torch.bool)))


def test_shares_are_the_order_statistics_of_uniform_numbers() -> None:
    """Hence as many independent uniform numbers when shuffled, and every ratio a power of another one."""
    shares = shares_of(10_000, 8)
    assert (shares.diff(dim=1) < 0).all() and ((shares > 0) & (shares < 1)).all()
    assert kolmogorov_smirnov(shares[:, 0] ** 8) < KS_BOUND
    assert kolmogorov_smirnov(shares) < KS_BOUND
    ratios = torch.cat([shares[:, :1], shares[:, 1:] / shares[:, :-1]], 1) ** torch.arange(8, 0, -1)
    assert all(kolmogorov_smirnov(column) < KS_BOUND for column in ratios.unbind(1))
    assert (torch.corrcoef(ratios.T) - torch.eye(8)).abs().max() < 4.5 / math.sqrt(10_000)
    assert kolmogorov_smirnov(shares[:, 0] ** 7) > KS_BOUND, "the test would notice a wrong power"


@pytest.mark.parametrize("events", [1, 2, 5, 7])
def test_the_share_after_k_of_n_events_is_beta(events: int) -> None:
    """Beta(n - k + 1, k): at most k - 1 of n uniform numbers are larger."""
    number, share = 7, shares_of(10_000, 7)[:, events - 1]
    above = range(events)
    larger = [math.comb(number, j) * (1 - share) ** j * share ** (number - j) for j in above]
    assert kolmogorov_smirnov(torch.stack(larger).sum(0)) < KS_BOUND


@pytest.mark.parametrize("schedule", MASKED_SHARE)
def test_times_follow_the_noise_schedule(schedule: str) -> None:
    time = torch.linspace(0, 1, 101, dtype=torch.float64)
    share = MASKED_SHARE[schedule](time)
    assert (share.diff() > 0).all() and float(share[0]) == pytest.approx(0, abs=1e-12)
    assert float(share[-1]) == pytest.approx(1, abs=1.01 * LOGLINEAR_EPS)
    assert torch.allclose(TIME_OF_SHARE[schedule](share), time, atol=1e-7)
    rng = BatchStream(torch.Generator().manual_seed(4), 4000)
    times = first_hitting(rng, torch.zeros(4000, 5, dtype=torch.bool), None, schedule).times
    assert times is not None and (times.diff(dim=1) <= 0).all()
    assert kolmogorov_smirnov((MASKED_SHARE[schedule](times[:, 0]) / share[-1]) ** 5) < KS_BOUND
    assert times.max() < 1, "all is masked at time 1, also where the schedule does not say so"


@pytest.mark.parametrize("steps", [None, 1, 3, 16])
def test_steps_tell_the_time_of_their_last_revelation(steps: int | None) -> None:
    seen = list(tiny_pipeline().stream([0, 1], seeds=[5, 6], sampler="first-hitting", steps=steps))
    shares = torch.stack(hitting_shares(SampleStreams([5, 6]), torch.zeros(2, TOKENS, dtype=torch.bool)))
    for step in seen:
        assert step.time is not None
        assert torch.equal(step.time, shares[:, int(step.known[0].sum()) - 1])
    assert len(seen) == (steps or TOKENS) == seen[-1].evaluations


def test_ancestral_steps_tell_the_time_at_their_end() -> None:
    """And leave out the steps that reveal nothing; the slow form takes them all."""
    shares = hitting_shares(SampleStreams([5]), torch.zeros(1, TOKENS, dtype=torch.bool))[0]
    hit = torch.floor((1 - shares) * 10)
    seen = list(tiny_pipeline().stream([0], seeds=[5], sampler="ancestral", steps=10))
    assert [float(step.time) for step in seen] == pytest.approx((1 - (hit.unique() + 1) / 10).tolist())
    assert [int(step.known.sum()) for step in seen] == [int((hit <= end).sum()) for end in hit.unique()]
    slow = list(tiny_pipeline().stream([0], seeds=[5], sampler="ancestral-categorical", steps=10))
    assert [float(step.time) for step in slow] == pytest.approx([1 - i / 10 for i in range(1, 11)])


def test_given_tokens_are_no_events() -> None:
    """In-painting n tokens is the process of n tokens, started when all of them are masked."""
    known = known_masks(0, 13, 15)
    rows = hitting_shares(SampleStreams([7, 8, 9]), known)
    assert [len(row) for row in rows] == [16, 3, 1]
    many_rows = hitting_shares(BatchStream(torch.Generator().manual_seed(5), 3000), known_masks(*[13] * 3000))
    assert kolmogorov_smirnov(torch.stack(many_rows)[:, 0] ** 3) < KS_BOUND


# ---- equalities


@pytest.mark.parametrize("policy", [{}, {"partial_steps": 1}], ids=str)
def test_tokens_do_not_depend_on_the_noise_schedule(policy: dict[str, Any]) -> None:
    runs = [
        sample(tiny_pipeline(), [0, 1], [0, 1], sampler="first-hitting", noise_schedule=schedule, **policy).tokens
        for schedule in MASKED_SHARE
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_as_many_steps_as_tokens_is_one_token_per_step() -> None:
    pipe, seeds = tiny_pipeline(), [0, 1, 2]
    for policy in ({}, {"full_steps": 3, "partial_steps": 2}):
        one = sample(pipe, [0, 1, 2], seeds, sampler="first-hitting", **policy)
        all_steps = sample(pipe, [0, 1, 2], seeds, sampler="first-hitting", steps=TOKENS, **policy)
        assert torch.equal(one.tokens, all_steps.tokens) and one.evaluations == all_steps.evaluations == TOKENS


@pytest.mark.parametrize("steps", [2, 5, 8, 15])
def test_steps_reveal_as_evenly_as_they_can(steps: int) -> None:
    plan = first_hitting(SampleStreams([0]), torch.zeros(1, TOKENS, dtype=torch.bool), steps, "linear")
    counts = plan.counts[0].tolist()
    assert len(counts) == steps and sum(counts) == TOKENS and max(counts) - min(counts) <= 1


def test_the_ancestral_sampler_evaluates_where_something_is_revealed() -> None:
    """T (1 - (1 - 1 / T)^N) times on average; the slow form after every revelation that leaves a mask, and at first."""
    steps, number, batch = 32, 16, 300
    flat = torch.full((1, number, 2), 0.5)
    plan = ancestral(SampleStreams(range(batch)), torch.zeros(batch, number, dtype=torch.bool), steps, "linear")
    expected = steps * (1 - (1 - 1 / steps) ** number)
    assert float(plan.row_steps.double().mean()) == pytest.approx(expected, abs=4 * 1.5 / batch**0.5)
    for seed in range(5):
        seen = list(table_pipeline(flat).stream([0], seeds=[seed], sampler="ancestral-categorical", steps=steps))
        known = torch.tensor([0] + [int(step.known.sum()) for step in seen])
        wanted = 1 + ((known.diff() > 0) & (known[1:] < number)).long().cumsum(0)
        assert [1, *wanted[:-1].tolist()] == [step.evaluations for step in seen]


@pytest.mark.parametrize("full_steps", [0, 3])
def test_the_slow_form_evaluates_what_was_masked_when_its_group_began(full_steps: int) -> None:
    pipe = tiny_pipeline()
    seen = Evaluated(pipe.generator)
    settings = {"sampler": "ancestral-categorical", "steps": 9, "partial_steps": 2, "guidance_scale": 1.0}
    steps = list(pipe.stream([1], seeds=[4], full_steps=full_steps, **settings))
    masked = [torch.ones(1, TOKENS) > 0, *(~step.known for step in steps)]
    sizes = []
    for index, step in enumerate(steps):
        if step.evaluations == (steps[index - 1].evaluations if index else 0):
            assert step.evaluated is not None and not step.evaluated.any(), "nothing was evaluated"
        elif step.evaluated is None:
            assert index % 3 == 0 or index < full_steps
            sizes.append(TOKENS)
        else:
            assert torch.equal(step.evaluated, masked[index - index % 3])
            sizes.append(int(step.evaluated.sum()))
    assert sizes == [call[1] for call in seen.calls] and sizes.count(TOKENS) < len(sizes) < len(steps)


# ---- precision

CODES = 64
ZIPF = 1 / torch.arange(1, CODES + 1, dtype=torch.float64)
ZIPF = ZIPF / ZIPF.sum()


def entropy(law: Tensor) -> float:
    law = law[law > 0] / law.sum()
    return -float((law * law.log()).sum())


def revealed_by(rng: Any, delta: float, bits: int, draws: int) -> Tensor:
    """How often each code is revealed in as many draws of reveal probability `delta`."""
    counts, chunk = torch.zeros(CODES + 1, dtype=torch.int64), 50_000
    for key in range(draws // chunk):
        noise = rng.exponential((chunk, CODES + 1), key)
        drawn = draw_or_mask(ZIPF.log().float().expand(1, chunk, -1), delta, noise, bits)
        counts += torch.bincount(drawn.flatten(), minlength=CODES + 1)
    return counts[:CODES].double()


@pytest.mark.parametrize(
    ("bits", "delta", "draws", "low", "high", "rates"),
    [
        (10, 0.05, 300_000, 2.53, 2.61, (0.63, 0.68)),
        (12, 0.02, 500_000, 2.78, 2.86, (0.70, 0.77)),
        (12, 1.0, 50_000, 3.35, 3.37, (1.0, 1.0)),
    ],
)
def test_coarse_noise_lowers_the_entropy(
    bits: int, delta: float, draws: int, low: float, high: float, rates: tuple[float, float]
) -> None:
    """Published figures: 2.56-2.57 and 0.64-0.65; 2.82 and 0.72-0.74; 3.36. The widths allow for chance."""
    assert entropy(ZIPF) == pytest.approx(3.3714, abs=1e-4)
    counts = revealed_by(SampleStreams([1]), delta, bits, draws)
    assert low <= entropy(counts) <= high
    assert rates[0] <= float(counts.sum()) / draws / delta <= rates[1]
    if delta < 1:  # the law of uniform numbers on a lattice
        r = 2.0**-bits / (delta * ZIPF)
        lattice = delta * ZIPF * r / torch.expm1(r)
        assert entropy(counts) == pytest.approx(entropy(lattice), rel=0.02)


@pytest.mark.parametrize("source", ["streams", "generator"])
def test_exact_noise_does_not(source: str) -> None:
    """Where 10 bits lose a third of all revelations, and 12 a quarter."""
    for delta, draws in ((0.05, 300_000), (0.02, 500_000)):
        rng = SampleStreams([2]) if source == "streams" else BatchStream(torch.Generator().manual_seed(2), 1)
        counts = revealed_by(rng, delta, 0, draws)
        assert float(counts.sum()) / draws / delta == pytest.approx(1, abs=0.04)
        assert goodness(counts, ZIPF) > P_BOUND


@pytest.mark.parametrize("source", ["streams", "generator"])
def test_noise_is_finer_than_float32_numbers_between_zero_and_one(source: str) -> None:
    """Codes of probability 1e-7 win by draws as small: on a lattice of 2^-24 those would all be equal, or zero."""
    rng = SampleStreams([3]) if source == "streams" else BatchStream(torch.Generator().manual_seed(3), 1)
    small = torch.cat([values[values < 1e-4] for values in (rng.exponential((2_000_000,), key) for key in range(2))])
    assert len(small) > 300 and small.min() > 0
    assert kolmogorov_smirnov((small.double() * 2**24) % 1) < KS_BOUND


def test_the_sampler_shows_it_too() -> None:
    """All 16 tokens revealed over 20 steps; in the last step alone a coarse lattice hardly matters."""
    pipe = table_pipeline(ZIPF.expand(1, TOKENS, -1))
    found = {}
    for bits in (0, 10):
        tokens = many(pipe, 500, sampler="ancestral-categorical", steps=20, gumbel_bits=bits)[-1].tokens
        found[bits] = torch.bincount(tokens.flatten(), minlength=CODES)[:CODES]
    assert goodness(found[0], ZIPF) > P_BOUND
    assert entropy(found[10].double()) < entropy(ZIPF) - 0.2
