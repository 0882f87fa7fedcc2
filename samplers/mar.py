"""MAR's sampling: conditions from masked autoregression, tokens from a diffusion head (2406.11838, algorithm of 3.3).

Positions are revealed in a random order, by the loop of `masked.unmask`. Latents travel through it with one channel
more, 1 where a token is known: no value of a latent could mark it as masked. ReCAP's partial evaluations (2505.19089)
come with fewer diffusion steps.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vgen.samplers.logits import Schedule, share_guidance
from vgen.samplers.masked import Draw, Plan, Select, by_order, random_order, scheduled, unmask
from vgen.samplers.recap import Evaluations, FeaturePolicy
from vgen.types import Rng, Step


@dataclass(frozen=True, kw_only=True)
class MARSettings:
    """How tokens are drawn, how many at a time, and which evaluations are partial."""

    guidance_scale: float = 3.0
    guidance_schedule: Schedule = "linear"  # by the share of tokens known, from 1; "constant"; a curve
    temperature: float = 1.0  # of the noise that diffusion steps add
    steps: int = 64  # evaluations, whole and partial; as many as there are masked tokens at most
    diffusion_steps: int = 100  # for the tokens of a whole evaluation
    partial_diffusion_steps: int | None = None  # for those of a partial one; None: half as many, as ReCAP's release ran
    full_steps: int = 0  # ReCAP: whole evaluations at the start
    partial_steps: int = 0  # ReCAP: partial evaluations after each later whole one; 0 is off
    cache_buffer: bool = False  # ReCAP: do not evaluate the buffer tokens again either
    group_order: str = "raster"  # ReCAP: order of revelation within a group, as published; or "random"

    @property
    def partial_diffusion(self) -> int:
        """Diffusion steps for the tokens of a partial evaluation."""
        return self.partial_diffusion_steps or max(2, self.diffusion_steps // 2)


class Head(Protocol):
    """What draws tokens from conditions."""

    def sample(
        self,
        condition: Tensor,
        noise: Tensor,
        steps: int,
        temperature: float,
        uncond: Tensor | None,
        scale: float | Tensor,
    ) -> Tensor:
        """Tokens (M, C) given conditions (M, W) of both branches, and noise (M, steps + 1, C)."""
        ...


class ContinuousGenerator(Protocol):
    """What this sampler asks of a generator."""

    @property
    def head(self) -> Any: ...

    def new_cache(self, batch: int) -> Any:
        """Preallocated state for evaluations of `batch` rows."""
        ...

    def __call__(
        self,
        tokens: Tensor,
        known: Tensor,
        class_labels: Tensor,
        positions: Tensor | None = None,
        cache: Any = None,
        cache_buffer: bool = False,
    ) -> Tensor:
        """Conditions (B, n, W) of tokens (B, n, C), known or not, (B, n) bool, at `positions` (B, n), all for None."""
        ...


class Conditions(Evaluations):
    """Conditions of one run, those of both branches of guidance side by side: (B, n, 2 W), or (B, n, W) without.

    Tokens travel marked, (B, n, C + 1). `scale` is the guidance of the last evaluation, for the diffusion head.
    """

    def __init__(
        self, generator: ContinuousGenerator, class_labels: Tensor, null_class: int, guided: bool, cache_buffer: bool
    ) -> None:
        super().__init__(generator, class_labels, null_class, guided)  # type: ignore[arg-type]
        self.generator: Any = generator
        self.cache_buffer = cache_buffer
        self.scale: float | Tensor = 1.0

    def _evaluate(self, tokens: Tensor, positions: Tensor | None, cache: Any, scale: float | Tensor) -> Tensor:
        self.count += 1
        self.scale = scale
        if self.guided:
            tokens = torch.cat([tokens, tokens])
            positions = None if positions is None else torch.cat([positions, positions])
        latents, known = unmark(tokens)
        found = self.generator(latents, known, self.labels, positions, cache, self.cache_buffer)
        return torch.cat(found.chunk(2), -1) if self.guided else found


def mark(latents: Tensor, known: Tensor) -> Tensor:
    """Latents (B, N, C), zeros where they are not known, with what is known, (B, N) bool, as one channel more."""
    return torch.cat([latents.where(known[..., None], 0), known[..., None].to(latents)], -1)


def unmark(marked: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `mark`."""
    return marked[..., :-1], marked[..., -1] > 0


def diffusion_draw(
    head: Head, rng: Rng, settings: MARSettings, groups: Sequence[Sequence[int]], conditions: Conditions
) -> Draw:
    """Tokens by the diffusion head; the noise of a column depends on its number within the group and the step."""
    partial = {step for group in groups for step in group[1:]}

    def choose(found: Tensor, low: int, step: int) -> Tensor:
        batch, count, _ = found.shape
        steps = settings.partial_diffusion if step in partial else settings.diffusion_steps
        channels = conditions.generator.head.token_dim
        noise = rng.normal((low + count, steps + 1, channels), key=step)[:, low:]
        condition, uncond = found.flatten(0, 1).chunk(2, -1) if conditions.guided else (found.flatten(0, 1), None)
        scale = conditions.scale
        if isinstance(scale, Tensor):  # of each row, (B, 1, 1)
            scale = scale.expand(batch, count, 1).flatten()
        drawn = head.sample(condition, noise.flatten(0, 1), steps, settings.temperature, uncond, scale)
        drawn = drawn.view(batch, count, -1)
        return torch.cat([drawn, torch.ones_like(drawn[..., :1])], -1)

    return choose


def in_raster_order(select: Select, plan: Plan, groups: Sequence[Sequence[int]]) -> Select:
    """The same positions in each group, but revealed in raster order where the group has more than one step."""
    sizes = [int(plan.counts[:, list(group)].sum(1).max()) for group in groups]

    def ordered(outputs: Tensor, known: Tensor, number: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        order, kept = select(outputs, known, number)
        if len(groups[number]) > 1:
            front, rest = order.tensor_split([sizes[number]], dim=1)
            order = torch.cat([front.sort(1).values, rest], 1)
        return order, kept

    return ordered


def mar(
    generator: ContinuousGenerator,
    class_labels: Tensor,
    null_class: int,
    latents: Tensor,
    known: Tensor,
    rng: Rng,
    settings: MARSettings,
) -> Iterator[Step]:
    """Reveal latents (B, N, C) until all are known, yielding after every evaluation; unknown ones are zeros.

    Args:
        class_labels: (B,). null_class: the class of guidance's other branch.
        latents: given latents, anything elsewhere. known: (B, N) bool, equally many in each row and not all.
    """
    guided = settings.guidance_scale != 1 and bool((class_labels != null_class).any())
    conditions = Conditions(generator, class_labels, null_class, guided, settings.cache_buffer)
    plan = scheduled(known, settings.steps, "cosine")
    policy = FeaturePolicy(full_steps=settings.full_steps, partial_steps=settings.partial_steps)
    groups = policy.groups(plan.steps)
    select = by_order(random_order(rng, known.shape[1]))
    if settings.group_order == "raster":
        select = in_raster_order(select, plan, groups)
    choose = diffusion_draw(generator.head, rng, settings, groups, conditions)
    scale_at = share_guidance(settings.guidance_scale, settings.guidance_schedule, known.device)
    for step in unmask(conditions, mark(latents, known), known, plan, groups, select, choose, scale_at):
        yield dataclasses.replace(step, tokens=unmark(step.tokens)[0])
