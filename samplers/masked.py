"""Unmasking tokens step by step: MaskGIT's confidence order (2202.04200), Halton (2503.17076) and random orders.

One loop serves them all, the masked-diffusion samplers of `first_hitting` too, and MAR: a plan says how many tokens
each step reveals, `select` which, `draw` what they are, and the feature policy which evaluations are partial.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from vgen.samplers.logits import Schedule, draw, temper, temperature_at, truncate
from vgen.samplers.schedules import MASK_SCHEDULES, recap_counts, reveal_counts
from vgen.types import Rng, SettingError, Step

# Keys of the noise that decides a whole run; a step's own keys are 3 step, + 1 and + 2.
ORDER_KEY, TIMES_KEY = 1 << 40, (1 << 40) + 1


@dataclass(frozen=True, kw_only=True)
class MaskedSettings:
    """How tokens are chosen, in which order, and which evaluations are partial."""

    guidance_scale: float = 2.0
    guidance_schedule: Schedule = "linear"  # by the share of tokens known, from 1; "constant"; a curve
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    temperature_schedule: str = "constant"  # or from 1 to `temperature`: "linear", or "sqrt" as ReCAP
    steps: int | None = None  # None: the sampler's own
    mask_schedule: str | None = None  # maskgit, halton, random: None is the sampler's own
    choice_temperature: float = 4.5  # maskgit: Gumbel noise on the confidence, falling to 0 over the run
    resample_singletons: bool = True  # maskgit: draw tokens anew once their places are chosen, also without ReCAP
    noise_schedule: str = "linear"  # ancestral, first-hitting: how the masked share falls with time
    gumbel_bits: int = 0  # ancestral-categorical: resolution of its noise; 0 is exact, 24 what float32 gives
    full_steps: int = 0  # ReCAP: whole evaluations at the start
    partial_steps: int = 0  # ReCAP: partial evaluations after each later whole one; 0 is off


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many tokens each row reveals at each step: (B, T) int64 on the CPU, zeros only behind a row's last step."""

    counts: Tensor
    times: Tensor | None = None  # (B, T): diffusion time after each step

    @property
    def steps(self) -> int:
        """Of the row that has most."""
        return self.counts.shape[1]

    @property
    def row_steps(self) -> Tensor:
        """Steps of each row, (B,)."""
        return (self.counts > 0).sum(1)


class Evaluator(Protocol):
    """Whole and partial evaluations of a run; what they return is for `select` and `draw`."""

    count: int

    def whole(self, tokens: Tensor, scale: Any, keep: bool) -> Tensor: ...

    def partial(self, tokens: Tensor, positions: Tensor, scale: Any) -> Tensor: ...


# Given a whole evaluation, what is known (B, N) and the number of the group: positions (B, N), those to reveal first in
# front and known ones last; and tokens (B, N) by position with the rows (B,) bool that keep them, or None to draw all.
Select = Callable[[Tensor, Tensor, int], tuple[Tensor, tuple[Tensor, Tensor] | None]]
# Given outputs (B, n, ...) for n columns of a group, the first column's number and the step: their tokens.
Draw = Callable[[Tensor, int, int], Tensor]


def unmask(
    evaluate: Evaluator,
    tokens: Tensor,
    known: Tensor,
    plan: Plan,
    groups: Sequence[Sequence[int]],
    select: Select,
    choose: Draw,
    scale_at: Callable[[Tensor], Any],
) -> Iterator[Step]:
    """Reveal tokens (B, N) until all are known, yielding after every evaluation.

    Args:
        tokens: given tokens, the mask's id elsewhere. known: (B, N) bool, which are given.
        groups: step indices; the first of each group is a whole evaluation, the others are partial.
        scale_at: guidance for a share (B,) of tokens known after the step.
    """
    for number, group in enumerate(groups):
        ends = plan.counts[:, list(group)].cumsum(1)  # (B, m): tokens of the group known after each of its steps
        scales = [scale_at(share) for share in ((known.sum(1, keepdim=True).cpu() + ends) / known.shape[1]).unbind(1)]
        outputs = evaluate.whole(tokens, scales[0], keep=len(group) > 1)
        order, kept = select(outputs, known, number)
        # Rows that reveal fewer tokens than others repeat their last one, which changes nothing.
        columns = padded_columns(ends[:, -1]).to(tokens.device)
        places = order.gather(1, columns)
        outputs = take(outputs, places)
        given, given_known = take(tokens, places), known.gather(1, places)
        for j, step in enumerate(group):
            if j:
                outputs = evaluate.partial(given, places, scales[j])
            starts = ends[:, j - 1] if j else torch.zeros_like(ends[:, 0])
            low, high = int(starts.min()), int(ends[:, j].max())
            drawn = choose(outputs[:, low:high], low, step)
            if kept is not None and not j:
                drawn = torch.where(kept[1][:, None], take(kept[0], places[:, low:high]), drawn)
            span = torch.arange(low, high)
            revealed = ((span >= starts[:, None]) & (span < ends[:, j, None])).to(tokens.device)
            given = _put(given, low, revealed, drawn, columns)
            given_known = _put(given_known, low, revealed, torch.ones_like(revealed), columns)
            tokens = tokens.scatter(1, _like(places, tokens).expand_as(given), given)
            known = known.scatter(1, places, given_known)
            yield Step(
                index=step,
                total=plan.steps,
                tokens=tokens,
                known=known,
                evaluations=evaluate.count,
                evaluated=torch.zeros_like(known).scatter(1, places, True) if j else None,
                time=None if plan.times is None else plan.times[:, step],
            )


def _put(values: Tensor, low: int, where: Tensor, new: Tensor, columns: Tensor) -> Tensor:
    """Values (B, n, ...) of a group with new ones at the columns from `low` on, where asked; repeats repeat them."""
    span = slice(low, low + new.shape[1])
    values = values.clone()
    values[:, span] = torch.where(_like(where, new), new, values[:, span])
    return take(values, columns)


def padded_columns(counts: Tensor) -> Tensor:
    """Columns 0..n-1 for the largest of `counts` (B,), rows with fewer repeating their last: (B, n)."""
    return torch.arange(int(counts.max()), device=counts.device).minimum((counts[:, None] - 1).clamp_min(0))


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, n) or latents (B, n, C) at `places` (B, m)."""
    return tokens.gather(1, _like(places, tokens).expand(-1, -1, *tokens.shape[2:]))


def _like(places: Tensor, tokens: Tensor) -> Tensor:
    return places if tokens.ndim == 2 else places[..., None]


# ---- what tokens are


def ramp(schedule: str, temperature: float, step: int, row_steps: Tensor) -> float | Tensor:
    """The temperature at a step, a float where it is the same for every row, else (B, 1, 1).

    Schedules go from 1 at a row's first step to `temperature` at its last (`temperature_at`).
    """
    share = (step / (row_steps - 1).clamp_min(1)).clamp_max(1)
    found = temperature_at(temperature, schedule, share)
    return found[:, None, None] if isinstance(found, Tensor) else found


def token_draw(rng: Rng, settings: MaskedSettings, plan: Plan) -> Draw:
    """Tokens by the exponential race; the noise of a column depends on its number within the group and the step."""

    def choose(logits: Tensor, low: int, step: int) -> Tensor:
        heat = ramp(settings.temperature_schedule, settings.temperature, step, plan.row_steps)
        logits = truncate(temper(logits, _to(heat, logits)), settings.top_k, settings.top_p)
        noise = rng.exponential((low + logits.shape[1], logits.shape[2]), key=3 * step)
        return draw(logits, noise[:, low:])

    return choose


def _to(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like) if isinstance(value, Tensor) else value


# ---- which tokens


def by_confidence(rng: Rng, settings: MaskedSettings, plan: Plan, groups: Sequence[Sequence[int]]) -> Select:
    """MaskGIT's order: every masked position draws a token, and the likeliest draws are revealed.

    Gumbel noise on their log-probabilities falls linearly to 0 over a row's groups. As in ReCAP's release the drawn
    tokens only decide the order, at temperature 1, and the revealed ones are drawn again; without
    `resample_singletons` a group of one step keeps what it scored, as MaskGIT does.
    """
    group_counts = torch.stack([plan.counts[:, group[0]] > 0 for group in groups], 1).sum(1)

    def select(logits: Tensor, known: Tensor, number: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        step = groups[number][0]
        single = (plan.counts[:, list(groups[number])] > 0).sum(1) == 1
        keep = single if not settings.resample_singletons else torch.zeros_like(single)
        heat = ramp(settings.temperature_schedule, settings.temperature, step, plan.row_steps)
        if not bool(keep.all()):
            heat = torch.where(keep[:, None, None], torch.as_tensor(heat), 1.0) if bool(keep.any()) else 1.0
        tempered = truncate(temper(logits, _to(heat, logits)), settings.top_k, settings.top_p)
        drawn = draw(tempered, rng.exponential(logits.shape[1:], key=3 * step + 1))
        score = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        noise = -rng.exponential(logits.shape[1:2], key=3 * step + 2).log()
        left = (1 - (number + 1) / group_counts.clamp_min(1)).clamp_min(0)[:, None].to(score)
        score = score + settings.choice_temperature * left * noise
        order = score.masked_fill(known, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        return order, (drawn, keep.to(drawn.device)) if bool(keep.any()) else None

    return select


def by_order(order: Tensor) -> Select:
    """A fixed order of positions, (B, N)."""

    def select(outputs: Tensor, known: Tensor, number: int) -> tuple[Tensor, None]:
        behind = known.gather(1, order).byte().argsort(dim=1, stable=True)
        return order.gather(1, behind), None

    return select


def random_order(rng: Rng, num_tokens: int) -> Tensor:
    """A uniformly random order of all positions for each sample, (B, N)."""
    return rng.exponential((num_tokens,), key=ORDER_KEY).argsort(1)


def halton_order(rng: Rng, num_tokens: int) -> Tensor:
    """The 2-D Halton sequence over the grid, begun at a random place for each sample: (B, N).

    Raises SettingError where the tokens form no square.
    """
    start = -torch.expm1(-rng.exponential((1,), key=ORDER_KEY))  # uniform in [0, 1)
    order = torch.tensor(_halton(num_tokens), device=start.device)
    place = torch.arange(num_tokens, device=start.device) + (start * num_tokens).long()
    return order[place % num_tokens]


@cache
def _halton(num_tokens: int) -> list[int]:
    """Cells of a square grid in the order in which the Halton points of bases 2 and 3 first meet them."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise SettingError(f"sampler 'halton' needs a square grid of tokens, {num_tokens} is no square: use 'random'")
    cells: dict[int, None] = {}
    point = 0
    while len(cells) < num_tokens:
        point += 1
        row, column = (_mirrored_cell(point, base, side) for base in (2, 3))
        cells[row * side + column] = None
    return list(cells)


def _mirrored_cell(number: int, base: int, side: int) -> int:
    """The cell, of `side` in a row, of the digits of `number` mirrored behind the point; in integers, hence exact."""
    value, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        value, scale = value * base + digit, scale * base
    return value * side // scale


# ---- how many tokens


def scheduled(known: Tensor, steps: int, schedule: str) -> Plan:
    """A mask schedule for every row's masked tokens; a row with fewer of them than steps takes one at a time.

    `schedule` is one of MASK_SCHEDULES, or "recap" for the integers of ReCAP's release. These need two tokens a step
    or so: rows with fewer masked ones take the same curve with MaskGIT's rounding. Raises SettingError where even a
    whole image has too few.
    """
    rows = []
    for masked in (~known).sum(1).tolist():
        taken, recap = min(steps, masked), schedule == "recap"
        if recap and masked < known.shape[1]:
            with suppress(SettingError):
                rows.append(recap_counts(masked, taken))
                continue
            recap = False
        curve = "pow2.5" if schedule == "recap" else schedule
        rows.append(recap_counts(masked, taken) if recap else reveal_counts(masked, taken, curve))
    return Plan(counts=pad(rows))


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Lists of counts with zeros behind the shorter ones, (B, T)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


SCHEDULES = (*MASK_SCHEDULES, "recap")
