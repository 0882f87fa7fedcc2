"""Which frames of a video see which, and the keys and values kept of them: what FAR's attention stands on.

Frames may have different numbers of tokens (FAR-Long's old ones have few). Tokens stand in the order of their frames.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vgen.layers import attention
from vgen.types import SettingError

# Queries' rows, keys' columns, and the mask between them: (rows, columns) bool, or float to be added; None: all seen.
Span = tuple[slice, slice, Tensor | None]
DENSE = 1 << 24  # entries of a mask beyond which attention goes frame by frame: no such mask, and half the products


@dataclass(frozen=True)
class FrameRuns:
    """Consecutive frames of a video: their numbers, and how many tokens each has."""

    numbers: list[int]
    sizes: list[int]

    def __add__(self, other: "FrameRuns") -> "FrameRuns":
        return FrameRuns(self.numbers + other.numbers, self.sizes + other.sizes)

    @property
    def tokens(self) -> int:
        """Of all runs together."""
        return sum(self.sizes)

    def until(self, count: int) -> "FrameRuns":
        """The first `count` frames."""
        return FrameRuns(self.numbers[:count], self.sizes[:count])

    def after(self, count: int) -> "FrameRuns":
        """All but the first `count` frames."""
        return FrameRuns(self.numbers[count:], self.sizes[count:])

    def token_numbers(self, device: torch.device) -> Tensor:
        """The frame number of each token, (L,)."""
        numbers, sizes = torch.tensor(self.numbers), torch.tensor(self.sizes)
        return numbers.repeat_interleave(sizes).to(device)


def causal_spans(
    queries: FrameRuns, keys: FrameRuns, attend_last: int | None, slope: float, device: torch.device
) -> list[Span]:
    """What `queries`, the last frames of `keys`, see: themselves and frames before them, `attend_last` at most.

    With a slope, scores fall by it for each frame of distance (FlexRoPE). A single frame needs no mask.
    """
    if len(queries.numbers) > 1 and queries.tokens * keys.tokens <= DENSE:
        rows, columns = queries.token_numbers(device), keys.token_numbers(device)
        gap = rows[:, None] - columns
        allowed = gap >= 0 if attend_last is None else (gap >= 0) & (gap <= attend_last)
        return [(slice(None), slice(None), _sloped(allowed, gap, slope))]
    spans: list[Span] = []
    ends = [0, *accumulate(keys.sizes)]
    before = len(keys.numbers) - len(queries.numbers)
    for i, number in enumerate(queries.numbers, before):
        first = 0 if attend_last is None else bisect_left(keys.numbers, number - attend_last)
        rows_of = slice(ends[i] - ends[before], ends[i + 1] - ends[before])
        bias = None
        if slope:
            gap = number - FrameRuns(keys.numbers[first : i + 1], keys.sizes[first : i + 1]).token_numbers(device)
            bias = -slope * gap[None].double()
        spans.append((rows_of, slice(ends[first], ends[i + 1]), bias))
    return spans


def two_copies_mask(numbers: Tensor, slope: float) -> Tensor:
    """What the tokens of clean frames, then of the same frames' noisy copies see, given one copy's `numbers` (L,).

    Clean ones see clean frames to their own, noisy ones clean frames before their own, and itself: (2 L, 2 L).
    """
    gap = (numbers[:, None] - numbers).repeat(2, 2)
    noisy = torch.arange(len(gap), device=numbers.device) >= len(numbers)
    from_noisy, to_noisy = noisy[:, None], noisy[None]
    allowed = torch.where(to_noisy, from_noisy & (gap == 0), torch.where(from_noisy, gap > 0, gap >= 0))
    return _sloped(allowed, gap, slope)


def _sloped(allowed: Tensor, gap: Tensor, slope: float) -> Tensor:
    """The mask of what is allowed, falling with distance where there is a slope."""
    return torch.where(allowed, -slope * gap.double(), -torch.inf) if slope else allowed


def spanned_attention(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span]) -> Tensor:
    """Attention of queries (B, heads, M, d) to keys and values (B, heads, N, d), span by span; none for no queries."""
    results = []
    for rows, columns, mask in spans:
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        results.append(attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], bias))
    return torch.cat(results, 2) if len(results) > 1 else (results or [q])[0]


class FrameCache:
    """Rotated keys and values of clean frames, for one call: (layers, B, heads, tokens, d) each.

    `length` frames are stored, the video's first ones. With `attend_last` so many are held, the oldest giving way.
    With `window` (FAR-Long) old frames are held coarsely, and the fine ones are those that frame `length` sees: for
    the next frame they are computed anew, since what they were computed from has then become coarse.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        window: int | None = None,
        attend_last: int | None = None,
    ) -> None:
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.window, self.attend_last = window, attend_last
        self.length = 0
        self.held = FrameRuns([], [])

    @property
    def coarse(self) -> int:
        """How many frames are held coarsely."""
        fine = min(self.length, self.window - 1) if self.window is not None else len(self.held.numbers)
        return len(self.held.numbers) - fine

    def first_needed(self, frame: int) -> int:
        """Number of the first frame that must be given along with `frame`, the frames between them included."""
        if self.window is None or frame == self.length or frame < self.window:
            return self.length
        return self.coarse

    def check(self, batch: int, start: int, count: int, keep: int) -> int:
        """`keep`, where `count` frames of `batch` rows from number `start`, `keep` of them to be stored, fit what is
        held. Raises SettingError."""
        if self.keys.shape[1] != batch:
            raise SettingError(f"the cache is for {self.keys.shape[1]} rows, the latents have {batch}")
        if start != (needed := self.first_needed(start + count - 1)):
            raise SettingError(f"frames {start}..{start + count - 1} were given, the cache needs them from {needed}")
        if not 0 <= keep <= count or (self.window is not None and keep != count - 1):
            rule = f"0..{count}" if self.window is None else f"{count - 1}, all but the last"
            raise SettingError(f"keep is {keep} of {count} frames: it must be {rule}")
        return keep

    def before(self, start: int) -> FrameRuns:
        """What is held and stays in use in a call whose first frame is number `start`."""
        return self.held if start == self.length else self.held.until(self.coarse)

    def reach(self, attend_last: int | None) -> int | None:
        """How many frames back a call sees that asks for `attend_last`: by default as many as are held.

        Raises SettingError where it asks for more than are held.
        """
        if attend_last is None or self.attend_last is None:
            return self.attend_last if attend_last is None else attend_last
        if attend_last > self.attend_last:
            raise SettingError(f"attend_last is {attend_last}, but the cache holds {self.attend_last} frames")
        return attend_last

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens, where there is not enough: many frames may be given at once."""
        if tokens > self.keys.shape[3]:
            self._resize(tokens)

    def extend(self, layer: int, stored: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, heads, n, d) of a layer behind its `stored` ones; views of all of these."""
        end = stored + k.shape[2]
        self.keys[layer, :, :, stored:end] = k
        self.values[layer, :, :, stored:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def commit(self, held: FrameRuns, length: int) -> None:
        """Count `held` frames, which all layers have written, as stored: the video's last before number `length`."""
        self.held, self.length = held, length
        surplus = 0 if self.attend_last is None else len(held.numbers) - self.attend_last
        if surplus <= 0:
            return
        gone, self.held = held.until(surplus).tokens, held.after(surplus)
        for kept in (self.keys, self.values):
            for layer in kept:
                layer[:, :, : held.tokens - gone] = layer[:, :, gone : held.tokens].clone()
        room = self.held.tokens + max(held.sizes)
        if self.keys.shape[3] > 2 * room:  # many frames were given at once, and few of them are still held
            self._resize(room)

    def _resize(self, tokens: int) -> None:
        kept = min(tokens, self.held.tokens)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:3], tokens, old.shape[4])
            new[:, :, :, :kept] = old[:, :, :, :kept]
            setattr(self, name, new)
