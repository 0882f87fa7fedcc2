"""Which positions, or frames, a step works on: how many masked tokens it reveals, how noisy each frame is after it.

Pure functions of numbers. Masked tokens: a schedule gamma(r) is the share still masked after the share r of the
steps; steps may share one whole evaluation (ReCAP, 2505.19089). Frames: levels of diffusion forcing (2407.01392).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vgen.types import SettingError

MASK_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "pow2.5": lambda r: 1 - r**2.5,
    "cubic": lambda r: 1 - r**3,
    "sqrt": lambda r: 1 - r**0.5,
    "arccos": lambda r: math.acos(r) / (math.pi / 2),  # Halton-MaskGIT's (2503.17076)
}


def reveal_counts(num_tokens: int, steps: int, schedule: str = "cosine") -> list[int]:
    """Tokens that each step reveals (MaskGIT, 2202.04200): positive, `num_tokens` in all.

    After step s, floor(N gamma((s + 1) / T)) tokens stay masked, but at least one less than before and at least one
    until the last step, which reveals the rest. Raises SettingError where there are more steps than tokens.
    """
    gamma = _schedule(num_tokens, steps, schedule)
    counts, masked = [], num_tokens
    for step in range(steps - 1):
        later = steps - 1 - step  # steps that need a token each
        left = min(max(math.floor(num_tokens * gamma((step + 1) / steps)), later), masked - 1)
        counts.append(masked - left)
        masked = left
    return [*counts, masked]


def recap_counts(num_tokens: int, steps: int, schedule: str = "pow2.5") -> list[int]:
    """The integer schedule of ReCAP's MaskGIT: differences of floor(N gamma(i / T)), none below one.

    What zeros are raised by is taken from the last step. Raises SettingError where it does not suffice.
    """
    gamma = _schedule(num_tokens, steps, schedule)
    masked = [math.floor(num_tokens * gamma(i / steps)) for i in range(steps)]
    counts = [max(1, now - after) for now, after in pairwise(masked)]
    last = num_tokens - sum(counts)
    if last < 1:
        raise SettingError(
            f"ReCAP's schedule leaves no token for the last of {steps} steps over {num_tokens} tokens: take fewer steps"
        )
    return [*counts, last]


def group_steps(counts: Sequence[int], full_steps: int, partial_steps: int) -> list[list[int]]:
    """Steps in groups of one whole evaluation each, `partial_steps` partial ones after the first `full_steps` groups.

    Raises SettingError for numbers out of bounds.
    """
    if not 0 <= full_steps <= len(counts):
        raise SettingError(f"full_steps is {full_steps}: it must lie in 0..{len(counts)}, the number of steps")
    if partial_steps < 0:
        raise SettingError(f"partial_steps is {partial_steps}: it must be at least 0")
    groups = [[count] for count in counts[:full_steps]]
    size = partial_steps + 1
    return groups + [list(counts[i : i + size]) for i in range(full_steps, len(counts), size)]


def flow_sigmas(steps: int, sigma_min: float = 0.001) -> Tensor:
    """Noise levels of a frame before each of `steps` Euler steps and after the last, (steps + 1,) float32, 1 to 0.

    Evenly from 1 to `sigma_min`, then 0; FAR (2503.19325) takes 0.001. Raises SettingError for less than one step.
    """
    if steps < 1:
        raise SettingError(f"steps is {steps}: it must be at least 1")
    return torch.from_numpy(np.append(np.linspace(1000, 1000 * sigma_min, steps) / 1000, 0)).float()


def num_passes(frames: int, steps: int, uncertainty: float) -> int:
    """Evaluations in which `frames` frames make `steps` steps each, see `level_rows`. Raises SettingError."""
    if frames < 1 or steps < 1:
        raise SettingError(f"there are {frames} frames and {steps} steps: at least one of each is needed")
    if not 0 <= uncertainty <= steps:
        raise SettingError(f"uncertainty is {uncertainty}: it must lie in 0..{steps}, the number of steps")
    return steps + math.floor((frames - 1) * uncertainty)


def level_rows(frames: int, steps: int, uncertainty: float) -> Iterator[list[int]]:
    """Diffusion forcing's schedule (2407.01392): before and after every pass, how many steps each frame has left.

    Frames start `uncertainty` passes apart: 0 denoises all together, `steps` one frame after the other, anything
    between forms a pyramid. The first row is all `steps`, the last all 0. Raises SettingError.
    """
    starts = [math.floor(frame * uncertainty) for frame in range(frames)]
    for done in range(num_passes(frames, steps, uncertainty) + 1):
        yield [min(max(steps + start - done, 0), steps) for start in starts]


def _schedule(num_tokens: int, steps: int, schedule: str) -> Callable[[float], float]:
    if schedule not in MASK_SCHEDULES:
        raise SettingError(f"unknown mask schedule {schedule!r}: use one of {', '.join(MASK_SCHEDULES)}")
    if not 1 <= steps <= num_tokens:
        raise SettingError(f"steps is {steps}: it must lie in 1..{num_tokens}, the number of tokens")
    return MASK_SCHEDULES[schedule]
