"""Samplers of masked diffusion: first hitting (2409.02908), ancestral in its exact count form, ancestral as published.

In masked diffusion every token is revealed at a time of its own, independent of all else, and the model only decides
what it is. So the times of all revelations can be drawn first, in closed form: the next of n masked tokens is revealed
when the masked share has fallen from m to m u^(1/n). First hitting evaluates the model once per revelation, and so
samples the process itself; the ancestral sampler of T steps evaluates once for all that fall into the same step.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vgen.samplers.logits import temper, truncate
from vgen.samplers.masked import TIMES_KEY, MaskedSettings, Plan, pad, padded_columns, take
from vgen.samplers.recap import Evaluations, FeaturePolicy
from vgen.samplers.schedules import reveal_counts
from vgen.types import Rng, Step

# Masked share m(t) = 1 - alpha(t) of each noise schedule, and its inverse.
LOGLINEAR_EPS = 1e-3
MASKED_SHARE: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: t,
    "cosine": lambda t: torch.cos(math.pi / 2 * (1 - t)),
    "cosine-alpha": lambda t: 1 - torch.cos(math.pi / 2 * t),
    "square": lambda t: t**2,
    "loglinear": lambda t: (1 - LOGLINEAR_EPS) * t,
}
TIME_OF_SHARE: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda m: m,
    "cosine": lambda m: 1 - 2 / math.pi * torch.acos(m),
    "cosine-alpha": lambda m: 2 / math.pi * torch.acos(1 - m),
    "square": lambda m: m**0.5,
    "loglinear": lambda m: m / (1 - LOGLINEAR_EPS),
}


def hitting_shares(rng: Rng, known: Tensor) -> list[Tensor]:
    """The masked share after each revelation: a float64 vector of falling numbers per row, one per masked token.

    m <- m u^(1/n) for n = masked tokens, ..., 1, in logarithms; relative to the share at time 1.
    """
    noise = rng.exponential((known.shape[1],), key=TIMES_KEY).double().cpu()  # -log u
    rows = []
    for row, masked in zip(noise, (~known).sum(1).tolist(), strict=True):
        rows.append((-row[:masked] / torch.arange(masked, 0, -1)).cumsum(0).exp())
    return rows


def hitting_times(shares: Tensor, noise_schedule: str) -> Tensor:
    """When the masked share has fallen to these shares of what it was at time 1."""
    whole = MASKED_SHARE[noise_schedule](torch.ones((), dtype=torch.float64))
    return TIME_OF_SHARE[noise_schedule](shares * whole)


def first_hitting(rng: Rng, known: Tensor, steps: int | None, noise_schedule: str) -> Plan:
    """One revelation per step, or as evenly many as give `steps` steps: all tokens of a step from one evaluation."""
    counts, times = [], []
    for shares in hitting_shares(rng, known):
        masked = len(shares)
        row = reveal_counts(masked, min(steps or masked, masked), "linear")
        counts.append(row)
        times.append(hitting_times(shares[torch.tensor(row).cumsum(0) - 1], noise_schedule))
    return Plan(counts=pad(counts), times=_padded(times))


def ancestral(rng: Rng, known: Tensor, steps: int, noise_schedule: str) -> Plan:
    """The ancestral sampler of `steps` equal steps of time: each reveals a binomial number of tokens.

    Steps that reveal nothing need no evaluation and are left out.
    """
    counts, times = [], []
    for shares in hitting_shares(rng, known):
        # A token hit at time t is revealed in step floor((1 - t) T), which ends at time 1 - (step + 1) / T.
        hit = hitting_times(shares, noise_schedule)
        step, row = ((1 - hit) * steps).long().clamp(0, steps - 1).unique_consecutive(return_counts=True)
        counts.append(row.tolist())
        times.append(1 - (step + 1).double() / steps)
    return Plan(counts=pad(counts), times=_padded(times))


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ---- the slow baseline


def ancestral_categorical(
    evaluate: Evaluations,
    tokens: Tensor,
    known: Tensor,
    rng: Rng,
    settings: MaskedSettings,
    steps: int,
    mask_token_id: int,
    scale_at: Callable[[Tensor], float | Tensor],
) -> Iterator[Step]:
    """The ancestral sampler as it is usually written: in each of `steps` steps every masked token draws from V + 1
    outcomes, the mask among them.

    The model is evaluated again only where something has been revealed since. With ReCAP the steps that begin a group
    evaluate all, the others the tokens that were masked when the group began. Kept as the baseline that the count form
    replaces, and to show what float32 noise does to it (`gumbel_bits`).
    """
    policy = FeaturePolicy(full_steps=settings.full_steps, partial_steps=settings.partial_steps)
    share = MASKED_SHARE[settings.noise_schedule](torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
    share[-1] = 0  # where rounding would leave a mask alive
    whole_steps = {group[0] for group in policy.groups(steps)}
    keep = len(whole_steps) < steps
    columns, places = known, None  # of the group, where partial evaluations follow
    logits: Tensor | None = None  # None where something was revealed since
    whole_is_old = True  # something was revealed since the last whole evaluation
    for step in range(steps):
        evaluated: Tensor | None = torch.zeros_like(known)
        if not known.all() and (logits is None or (step in whole_steps and whole_is_old)):
            scale = scale_at(known.float().mean(1).cpu())
            if places is None or step in whole_steps:
                columns, places = _masked_places(known) if keep else (known, None)
                whole_is_old, evaluated = False, None
                logits = evaluate.whole(tokens, scale, keep)
                logits = logits if places is None else take(logits, places)
            else:
                logits = evaluate.partial(take(tokens, places), places, scale)
                evaluated = torch.zeros_like(known).scatter(1, places, True)
            logits = truncate(temper(logits, settings.temperature), settings.top_k, settings.top_p)
        if logits is not None:
            noise = rng.exponential((logits.shape[1], logits.shape[2] + 1), key=3 * step)
            reveal = float(1 - share[step + 1] / share[step])
            drawn = draw_or_mask(logits, reveal, noise, settings.gumbel_bits)
            drawn = drawn.masked_fill(drawn == logits.shape[2], mask_token_id)
            drawn = drawn if places is None else tokens.scatter(1, places, drawn.gather(1, columns))
            drawn = torch.where(known, tokens, drawn)
            if not torch.equal(drawn, tokens):
                logits, whole_is_old = None, True
            tokens, known = drawn, drawn != mask_token_id
        yield Step(
            index=step,
            total=steps,
            tokens=tokens,
            known=known,
            evaluations=evaluate.count,
            evaluated=evaluated,
            time=torch.full((len(tokens),), 1 - (step + 1) / steps, dtype=torch.float64),
        )


def _masked_places(known: Tensor) -> tuple[Tensor, Tensor]:
    """Columns 0..n-1, rows with fewer masked tokens repeating their last, and the positions behind them, (B, n) each;
    rows with none have a known one."""
    columns = padded_columns((~known).sum(1))
    return columns, known.byte().argsort(dim=1, stable=True).gather(1, columns)


def draw_or_mask(logits: Tensor, reveal: float, noise: Tensor, bits: int = 0) -> Tensor:
    """One of V codes with probability `reveal`, else the mask (id V): logits (B, n, V), noise (B, n, V + 1) -> (B, n).

    With `bits`, as the Gumbel trick on uniform numbers that are multiples of 2^-bits, whose largest value caps the
    noise: codes of probability below 2^-bits can then hardly win against a mask of probability near 1. float32 has 24.
    """
    probabilities = torch.cat([logits.softmax(-1) * reveal, torch.full_like(logits[..., :1], 1 - reveal)], -1)
    if not bits:
        return (probabilities / noise).argmax(-1)
    cells = torch.floor(-torch.expm1(-noise.double()) * 2.0**bits).clamp_max(2.0**bits - 1)
    uniform = (cells / 2.0**bits).clamp_min(1e-300)  # a zero loses to all others, but not to what is impossible
    gumbel = -torch.log(-torch.log(uniform))
    return (probabilities.double().log() + gumbel).argmax(-1)
