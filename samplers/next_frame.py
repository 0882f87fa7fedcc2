"""Next-frame sampling: every frame by flow matching, given the frames before it (FAR, 2503.19325).

One loop serves frame after frame, all frames at once, and the pyramids between (diffusion forcing, 2407.01392): they
differ in when a frame starts. Finished frames are the history, whose noise level can guide (2502.06764).
A frame at noise level sigma is z = (1 - sigma) x + sigma n, its velocity is n - x, and timesteps are 1000 sigma.
Knows no tokenizer; frames are latents (C, H, W) of any kind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vgen.rng import BatchStream
from vgen.samplers.schedules import flow_sigmas, level_rows, num_passes
from vgen.types import Rng, Step, VideoGenerator

SCHEDULES = ("autoregressive", "pyramid", "full-sequence")
TIMESTEPS = 1000  # timestep of pure noise
CLEAN = -1.0  # timestep of a finished frame
HISTORY_KEY = 1 << 32  # added to a frame's number, the key of the noise that its part in the history gets


@dataclass(frozen=True, kw_only=True)
class NextFrameSettings:
    """How many frames, in how many steps each, and how they see those before them."""

    frames: int = 16  # in all, those given included
    steps: int = 10  # Euler steps of every frame
    sigma_min: float = 0.001  # noise level that the last of them begins at
    guidance_scale: float = 1.0  # of class or actions: uncond + s * (cond - uncond)
    schedule: str = "autoregressive"  # "pyramid", "full-sequence"
    uncertainty: float = 1.0  # pyramid: passes between the starts of neighbours, 0 (full sequence) to steps
    stabilization: float = 0.0  # noise level by whose label generated frames are history, scaled alike; 0 is clean
    history_guidance: float = 1.0  # weight of the history: none + w * (history - none); 1 is off
    history_noise: float = 0.0  # noise level of the history that counts w - 1 times (fractional guidance)
    context_window: int | None = None  # frames before it that a frame sees; None: all
    slope: float | None = None  # temporal decay of attention; None: the model's own
    cached: bool = True  # keep what finished frames were computed to; the same frames, faster

    @property
    def spacing(self) -> float:
        """Passes between the starts of neighbouring frames."""
        return {"autoregressive": float(self.steps), "full-sequence": 0.0}.get(self.schedule, self.uncertainty)


@dataclass(frozen=True)
class Branch:
    """One way of looking at a frame, and its weight in the velocity."""

    null: bool  # without class and actions
    noise: float  # level of the history; 1 is no history at all
    weight: float


def history_terms(*terms: tuple[float, float]) -> dict[float, float]:
    """Weights by noise level of the history for v(none) + sum of w (v(level) - v(none)), terms being (w, level).

    Equal levels are one, and what weighs nothing is left out: each entry is an evaluation (2502.06764, section 4).
    No history is level 1.
    """
    weights = {1.0: 1 - sum(weight for weight, _ in terms)}
    for weight, level in terms:
        weights[level] = weights.get(level, 0.0) + weight
    return {level: weight for level, weight in weights.items() if weight}


def branches(settings: NextFrameSettings, guided: bool) -> list[Branch]:
    """All evaluations that make up a velocity, unconditional ones first; their weights sum to 1, none is 0."""
    histories = history_terms((1.0, 0.0), (settings.history_guidance - 1, settings.history_noise))
    scale = settings.guidance_scale if guided else 1.0
    sides = [(null, weight) for null, weight in ((True, 1 - scale), (False, scale)) if weight]
    return [Branch(null, level, side * weight) for null, side in sides for level, weight in histories.items()]


def frame_noise(rng: Rng, first: int, stop: int, shape: tuple[int, ...], key: int = 0) -> Tensor:
    """Standard normal noise (B, stop - first, *shape) float32 of frames first..stop - 1.

    Each sample's frame has a stream of its own, so that a longer video begins with the shorter one; a torch.Generator
    draws all frames at once, as published.
    """
    if isinstance(rng, BatchStream):
        return rng.normal((stop - first, *shape), key=key)
    return torch.stack([rng.normal(shape, key=key + frame) for frame in range(first, stop)], 1)


class Velocities:
    """Velocities of the frames at work, all branches of guidance in one evaluation. Holds the cache."""

    def __init__(
        self,
        generator: VideoGenerator,
        context: Tensor,
        class_labels: Tensor | None,
        actions: Tensor | None,
        null_class: int,
        rng: Rng,
        settings: NextFrameSettings,
    ) -> None:
        self.generator, self.settings, self.given = generator, settings, context.shape[1]
        self.branches = branches(settings, any(ids is not None for ids in (class_labels, actions)))
        self.labels, self.actions = (self._rows(ids, null_class) for ids in (class_labels, actions))
        self.noise: Tensor | None = None  # of the history, (B, F, C, H, W)
        if any(branch.noise for branch in self.branches):
            self.noise = frame_noise(rng, 0, settings.frames, tuple(context.shape[2:]), HISTORY_KEY).to(context)
        self.cache = None
        if settings.cached and (generator.config["context_patch_size"] is None or settings.spacing >= settings.steps):
            rows = len(self.branches) * len(context)
            self.cache = generator.new_cache(rows, settings.frames, settings.context_window)

    def __call__(self, latents: Tensor, first: int, stop: int, sigma: Tensor) -> Tensor:
        """Velocities (B, stop - first, C, H, W) of frames first..stop - 1 of latents (B, F, C, H, W).

        Those before are finished; later ones have not begun, and nothing looks ahead. sigma: (stop - first,).
        """
        # Frames that have become history since the last evaluation are passed along, to be cached.
        start = 0 if self.cache is None else self.cache.first_needed(first)
        work, times = latents[:, first:stop], (TIMESTEPS * sigma).expand(len(latents), -1)
        inputs, timesteps = [], []
        for branch in self.branches:
            past, past_times = self._history(latents, start, first, branch.noise)
            inputs.append(torch.cat([past, work], 1))
            timesteps.append(torch.cat([past_times.to(times).expand(len(times), -1), times], 1))
        found = self.generator(
            torch.cat(inputs),
            torch.cat(timesteps),
            self.labels,
            None if self.actions is None else self.actions[:, start:stop],
            cache=self.cache,
            start=start,
            keep=0 if self.cache is None else first - start,
            attend_last=self.settings.context_window,
            slope=self.settings.slope,
        )
        parts = found[:, first - start :].to(latents.dtype).chunk(len(self.branches))
        if len(parts) == 1:
            return parts[0]
        return torch.stack([branch.weight * part for branch, part in zip(self.branches, parts, strict=True)]).sum(0)

    def _rows(self, ids: Tensor | None, null_class: int) -> Tensor | None:
        """Labels or actions of every branch's rows, (branches x B, ...)."""
        if ids is None:
            return None
        null = torch.full_like(ids, null_class)
        return torch.cat([null if branch.null else ids for branch in self.branches])

    def _history(self, latents: Tensor, start: int, stop: int, level: float) -> tuple[Tensor, Tensor]:
        """Finished frames start..stop - 1 as a branch sees them, (B, n, C, H, W), and their timesteps (n,)."""
        past, times = latents[:, start:stop], torch.full((stop - start,), CLEAN)
        if level and self.noise is not None:
            return torch.lerp(past, self.noise[:, start:stop], level), torch.full_like(times, TIMESTEPS * level)
        if tau := self.settings.stabilization:
            own = max(self.given - start, 0)  # frames that were given are what they are
            past = torch.cat([past[:, :own], (1 - tau) * past[:, own:]], 1)
            times[own:] = TIMESTEPS * tau
        return past, times


def next_frame(
    generator: VideoGenerator,
    context: Tensor,
    class_labels: Tensor | None,
    actions: Tensor | None,
    null_class: int,
    rng: Rng,
    settings: NextFrameSettings,
) -> Iterator[Step]:
    """Continue clips (B, c, C, H, W), c = 0 for none, to `settings.frames` frames, yielding after every evaluation.

    Noise of frame k is drawn with key k. The cache lives as long as the iterator.

    Args:
        class_labels: (B,) ids, or None. actions: (B, F) ids, or None: one for every frame, those given included.
        null_class: the id of guidance's other branch, in place of either.
    """
    (batch, given), shape, frames, steps = context.shape[:2], tuple(context.shape[2:]), settings.frames, settings.steps
    total = num_passes(frames - given, steps, settings.spacing)
    latents = torch.cat([context, frame_noise(rng, given, frames, shape).to(context)], 1)
    velocities = Velocities(generator, context, class_labels, actions, null_class, rng, settings)
    sigma_left = flow_sigmas(steps, settings.sigma_min).flip(0)  # by the number of steps left
    rows = (torch.tensor([0] * given + row) for row in level_rows(frames - given, steps, settings.spacing))
    for index, (before, after) in enumerate(pairwise(rows)):
        moving = (before != after).nonzero().flatten().tolist()
        first, stop = moving[0], moving[-1] + 1  # neighbours all: starts are ordered, and overlap
        sigma, later = (sigma_left[left].to(latents.device) for left in (before, after))
        velocity = velocities(latents, first, stop, sigma[first:stop])
        change = (later - sigma)[first:stop, None, None, None].to(latents) * velocity
        latents = torch.cat([latents[:, :first], latents[:, first:stop] + change, latents[:, stop:]], 1)
        yield Step(
            index=index,
            total=total,
            tokens=latents,
            known=(after == 0).to(latents.device).expand(batch, -1),
            evaluations=index + 1,
            time=later.expand(batch, -1),
        )
