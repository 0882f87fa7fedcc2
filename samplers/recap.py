"""Which evaluations of a masked generator are whole and which partial: ReCAP (2505.19089), for any order of unmasking.

A partial evaluation recomputes the tokens of the current group alone, against the keys and values that all others had
in the group's whole evaluation. Knows nothing of how tokens are chosen.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgen.samplers.logits import guide
from vgen.samplers.schedules import group_steps
from vgen.types import MaskedGenerator


@dataclass(frozen=True, kw_only=True)
class FeaturePolicy:
    """`full_steps` whole evaluations first, then `partial_steps` partial ones after each whole one; 0 is off."""

    full_steps: int = 0
    partial_steps: int = 0

    def groups(self, steps: int) -> list[list[int]]:
        """Step indices 0..steps-1 in groups of one whole evaluation each."""
        return group_steps(range(steps), min(self.full_steps, steps), self.partial_steps)


class Evaluations:
    """Guided logits of one run. Both branches of guidance are rows of one batch, each with its own features."""

    def __init__(self, generator: MaskedGenerator, class_labels: Tensor, null_class: int, guided: bool) -> None:
        null = torch.full_like(class_labels, null_class)
        self.labels = torch.cat([class_labels, null]) if guided else class_labels
        self.generator, self.guided = generator, guided
        self.cache: Any = None
        self.count = 0

    def whole(self, tokens: Tensor, scale: float | Tensor, keep: bool) -> Tensor:
        """Logits (B, N, V) of all tokens (B, N); `keep` their features where partial evaluations follow."""
        if keep and self.cache is None:
            self.cache = self.generator.new_cache(len(self.labels))
        return self._evaluate(tokens, None, self.cache if keep else None, scale)

    def partial(self, tokens: Tensor, positions: Tensor, scale: float | Tensor) -> Tensor:
        """Logits (B, n, V) of tokens (B, n) at `positions` (B, n), against the features kept of the others."""
        return self._evaluate(tokens, positions, self.cache, scale)

    def _evaluate(self, tokens: Tensor, positions: Tensor | None, cache: Any, scale: float | Tensor) -> Tensor:
        self.count += 1
        if not self.guided:
            return self.generator(tokens, self.labels, positions, cache)
        twice = None if positions is None else torch.cat([positions, positions])
        cond, uncond = self.generator(torch.cat([tokens, tokens]), self.labels, twice, cache).chunk(2)
        return guide(cond, uncond, scale)
