"""What a run's steps tell beside its tokens: when tokens were hit, which were evaluated, how deep a wave was.

Works on recordings; what evaluates a model yields after every evaluation and returns its result.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgen.app.recording import Recording
from vgen.pipelines.masked import MaskedPipeline
from vgen.rng import SampleStreams
from vgen.samplers.first_hitting import MASKED_SHARE, hitting_shares
from vgen.samplers.logits import share_guidance
from vgen.samplers.recap import Evaluations
from vgen.types import SettingError

# ---- first hitting


def hitting_run(recording: Recording) -> bool:
    """Whether a run was sampled by first-hitting times."""
    return recording.request.sampler == "first-hitting" and isinstance(recording.pipeline, MaskedPipeline)


def order_law(shares: Tensor, number: int, order: int) -> Tensor:
    """P(masked share after the `order`-th of `number` revelations <= x), x being `shares` of what it is at time 1.

    Every token is revealed at a share of its own, uniform and independent of all others, so that the k-th largest of n
    is Beta(n - k + 1, k): at least n - k + 1 of n tokens are still masked at x. Summed up exactly, in float64.
    """
    x = shares.double().clamp(0, 1)
    least = torch.arange(number - order + 1, number + 1, dtype=torch.float64)
    n = torch.tensor(float(number), dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(least + 1) - torch.lgamma(n - least + 1)
    logs = choose + torch.special.xlogy(least, x[..., None]) + torch.special.xlogy(n - least, 1 - x[..., None])
    return logs.exp().sum(-1).clamp(0, 1)


def draw_shares(seeds: Sequence[int], number: int) -> Tensor:
    """Masked shares after each revelation of `number` tokens, (B, N) float64, as these seeds draw them."""
    known = torch.zeros(len(seeds), number, dtype=torch.bool)
    return torch.stack(hitting_shares(SampleStreams(list(seeds)), known))


def share_of_time(times: Tensor, noise_schedule: str) -> Tensor:
    """Masked shares at diffusion times, relative to the share at time 1."""
    mask = MASKED_SHARE[noise_schedule]
    return mask(times.double()) / mask(torch.ones((), dtype=torch.float64))


def recorded_hits(recording: Recording, row: int) -> list[tuple[int, float]]:
    """Of one image: how many tokens were known after each step, and the diffusion time then."""
    steps = [step for step in recording.steps if step.time is not None]
    found: list[tuple[int, float]] = []
    for step in steps:
        assert step.time is not None
        known = int(step.known[row].sum())
        if not found or known > found[-1][0]:  # a row that is done repeats its last step
            found.append((known, float(step.time[row])))
    return found


def distance(drawn: Tensor, law: Tensor) -> float:
    """Kolmogorov's: the largest difference of sorted draws' distribution (n,) from the law at these draws (n,)."""
    steps = torch.arange(len(drawn) + 1, dtype=torch.float64) / len(drawn)
    return float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max())


@dataclass(frozen=True)
class GridCost:
    """What a uniform grid of time costs for one image, expected over its luck."""

    steps: int
    evaluations: float  # steps that reveal something
    together: float  # tokens that share their step with another one: drawn without seeing it


def grid_costs(number: int, noise_schedule: str, steps: Sequence[int]) -> list[GridCost]:
    """The ancestral sampler's expected cost for grids of so many steps, in closed form."""
    found = []
    for count in steps:
        shares = share_of_time(torch.arange(count, -1, -1, dtype=torch.float64) / count, noise_schedule)
        shares[-1] = 0  # the last step reveals the rest
        hit = shares[:-1] - shares[1:]  # probability that a given token falls into each step
        reveal = (1 - (1 - hit) ** number).sum()
        together = number * (hit * (1 - (1 - hit) ** (number - 1))).sum()
        found.append(GridCost(count, float(reveal), float(together)))
    return found


# ---- recurrent depth and noise levels


@dataclass(frozen=True)
class WaveTrace:
    """A run of a looped generator: depths (N, T) of one image after each of T evaluations, and which were final."""

    depths: Tensor
    final: Tensor  # (N, T) bool
    drafts: Tensor  # (T,) guesses that stood after each evaluation
    passes: list[int]
    work: int
    restarts: int


def wave_trace(recording: Recording, row: int) -> WaveTrace:
    """Raises SettingError where the run had no wave."""
    steps = [step for step in recording.steps if step.wave is not None]
    if not steps:
        raise SettingError("this run has no wavefront: run a recurrent-depth model")
    waves = [step.wave for step in steps]
    return WaveTrace(
        depths=torch.stack([wave.depths[row] for wave in waves if wave is not None], 1),
        final=torch.stack([step.known[row] for step in steps], 1),
        drafts=torch.stack([(wave.drafts[row] >= 0).sum() for wave in waves if wave is not None]),
        passes=[wave.passes for wave in waves if wave is not None],
        work=waves[-1].work if waves[-1] is not None else 0,
        restarts=waves[-1].restarts if waves[-1] is not None else 0,
    )


def noise_levels(recording: Recording, row: int) -> Tensor:
    """Noise level of every frame after every evaluation, (F, T). Raises SettingError for a run of images."""
    levels = [step.time[row] for step in recording.steps if step.time is not None and step.time.ndim == 2]
    if not levels:
        raise SettingError("this run has no frames: run a video model")
    return torch.stack(levels, 1)


# ---- ReCAP


@dataclass(frozen=True)
class CacheTrace:
    """Of one image: which tokens each of T steps evaluated, which it fixed, and which steps were whole."""

    evaluated: Tensor  # (N, T) bool
    fixed: Tensor  # (N, T) bool
    whole: Tensor  # (T,) bool

    @property
    def share(self) -> float:
        """Evaluated tokens, of what whole evaluations alone would take."""
        return float(self.evaluated.float().mean())


def recap_run(recording: Recording) -> bool:
    """Whether some evaluations were partial."""
    return any(step.evaluated is not None and bool(step.evaluated.any()) for step in recording.steps)


def cache_trace(recording: Recording, row: int) -> CacheTrace:
    known = torch.stack([step.known[row] for step in recording.steps], 1)
    before = torch.cat([torch.zeros_like(known[:, :1]), known[:, :-1]], 1)
    every = torch.ones_like(known[:, 0])
    evaluated = [every if step.evaluated is None else step.evaluated[row] for step in recording.steps]
    whole = torch.tensor([step.evaluated is None for step in recording.steps])
    return CacheTrace(torch.stack(evaluated, 1), known & ~before, whole)


@dataclass(frozen=True)
class CacheError:
    """How far the distributions of a partial evaluation's new tokens are from those of a whole one."""

    step: int  # counted from 1
    tokens: int
    divergence: float  # KL of whole to partial, nats per token
    apart: float  # total variation per token: the share of draws that must differ
    likeliest: float  # share of tokens whose likeliest code differs


@torch.no_grad()
def cache_errors(recording: Recording, row: int) -> Generator[None, None, list[CacheError]]:
    """For every partial evaluation of a run, the same tokens evaluated whole, with the run's guidance.

    The run's own evaluations are repeated, against the same features. Raises SettingError where they cannot be.
    """
    replay = _Replay(recording, row)
    errors = []
    for number, step in enumerate(recording.steps):
        places = None if step.evaluated is None else step.evaluated[row].nonzero().flatten()[None].to(replay.device)
        new = step.known[row] & ~replay.known
        if bool(new.any()):
            partial, whole = replay.evaluate(places, step.known[row])
            if partial is not None:
                errors.append(_compare(number + 1, partial[new], whole[new]))
            yield
        replay.tokens, replay.known = step.tokens[row : row + 1].to(replay.device), step.known[row]
    return errors


class _Replay:
    """The evaluations of one image of a run, made again."""

    def __init__(self, recording: Recording, row: int) -> None:
        pipeline, request = recording.pipeline, recording.request
        if not isinstance(pipeline, MaskedPipeline) or request.sampler == "ancestral-categorical":
            raise SettingError("the error is known for masked models with codes, and samplers that reveal by a plan")
        if recording.dropped or "edit" in request.settings or "known" in request.settings:
            raise SettingError("some steps of this run are not at hand: repeat it with fewer images, nothing given")
        self.device, settings = pipeline.device, request.settings
        label = pipeline.null_class if request.class_labels is None else request.class_labels[row]
        labels = torch.tensor([label], device=self.device)
        guided = settings["guidance_scale"] != 1 and label != pipeline.null_class
        self.own = Evaluations(pipeline.generator, labels, pipeline.null_class, guided)
        self.full = Evaluations(pipeline.generator, labels, pipeline.null_class, guided)
        self.scale_at = share_guidance(settings["guidance_scale"], settings["guidance_schedule"], self.device)
        number = recording.steps[0].known.shape[1]
        self.tokens = torch.full((1, number), pipeline.generator.mask_token_id, device=self.device)
        self.known = torch.zeros(number, dtype=torch.bool)

    def evaluate(self, places: Tensor | None, after: Tensor) -> tuple[Tensor | None, Any]:
        """Log-probabilities (N, V) as the run had them, None where that was a whole evaluation, and evaluated whole."""
        scale = self.scale_at(after.float().mean()[None])
        if places is None:
            return None, self.own.whole(self.tokens, scale, keep=True)
        partial = self.own.partial(self.tokens.gather(1, places), places, scale)
        whole = self.full.whole(self.tokens, scale, keep=False)[0].float().cpu().log_softmax(-1)
        found = torch.full_like(whole, float("nan"))
        found[places[0].cpu()] = partial[0].float().cpu().log_softmax(-1)
        return found, whole


def _compare(step: int, partial: Tensor, whole: Tensor) -> CacheError:
    """Of log-probabilities (n, V) each."""
    divergence = torch.nn.functional.kl_div(partial, whole, log_target=True, reduction="none").sum(1).mean()
    apart = (partial.exp() - whole.exp()).abs().sum(1).mean() / 2
    differ = (partial.argmax(1) != whole.argmax(1)).float().mean()
    return CacheError(step, len(partial), float(divergence), float(apart), float(differ))
