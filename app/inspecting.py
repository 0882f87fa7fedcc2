"""What a run's tokens are under its model: when they were fixed, how probable they were, and what others would be.

Works on recordings, one image at a time. What evaluates a model yields after every evaluation and returns its result.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vgen.app.recording import Recording
from vgen.pipelines.grid import CodePipeline
from vgen.pipelines.masked import MaskedPipeline
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.samplers.logits import guidance_at, guide, share_guidance
from vgen.types import SettingError, Step

LOGITS = 1 << 24  # numbers that one evaluation may give
ALTERNATIVES = 5


@dataclass(frozen=True)
class Tokens:
    """The tokens of one image, scale by scale; families with a single grid have one scale."""

    sides: list[int]
    codes: list[Tensor]  # (n_k,) int64 each; -1 where a token is not known, or no code
    fixed: list[Tensor]  # (n_k,) int64 each: the step that fixed it, from 1; 0: it was given, -1: not known


def read_tokens(recording: Recording, row: int) -> Tokens:
    """Tokens of image `row` as the last step has them. Raises SettingError for videos and before the first step."""
    if not len(recording):
        raise SettingError("the run has no step yet: wait for the first one")
    if recording.pipeline.makes_videos:
        raise SettingError("videos have no grid of tokens: run an image model to look at tokens")
    last, given = recording.steps[-1], _given(recording, row)
    if isinstance(last.tokens, list):
        codes = [tokens[row] for tokens in last.tokens]
        sides = [math.isqrt(len(scale)) for scale in codes]
        fixed = [torch.full_like(scale, k + 1) for k, scale in enumerate(codes)]
        for scale, kept in zip(fixed, given, strict=False):
            scale.masked_fill_(kept, 0)
        return Tokens(sides, codes, fixed)
    known = last.known[row]
    side = math.isqrt(len(known))
    if side * side != len(known):
        raise SettingError(f"the model's {len(known)} tokens form no square: there is no picture to look at them in")
    codes_of = last.tokens[row] if last.tokens.ndim == 2 else torch.full_like(known, -1, dtype=torch.int64)
    fixed_of = _first_known(recording, row)
    for kept in given:
        fixed_of = fixed_of.masked_fill(kept, 0)
    return Tokens([side], [codes_of.masked_fill(~known, -1)], [fixed_of])


def _first_known(recording: Recording, row: int) -> Tensor:
    """The first recorded step that knows each token (N,), counted from 1; -1 for none."""
    known = torch.stack([step.known[row] for step in recording.steps]).byte()
    numbers = torch.tensor([step.index + 1 for step in recording.steps])
    return numbers[known.argmax(0)].where(known[-1].bool(), -1)


def _given(recording: Recording, row: int) -> list[Tensor]:
    """Which tokens an image was given by its request, (n_k,) bool of each scale, or of the grid; none where no were."""
    kept = recording.request.settings.get("known")
    if kept is None:
        return []
    scales = kept if isinstance(recording.steps[-1].tokens, list) else [kept]
    masks = [torch.as_tensor(scale, dtype=torch.bool) for scale in scales]
    return [mask if mask.ndim == 1 else mask[min(row, len(mask) - 1)] for mask in masks]


# ---- distributions


@dataclass(frozen=True)
class Question:
    """Which distribution of a token is meant.

    Args:
        row: the image.
        others: masked families: given all other tokens, instead of what was known when it was fixed.
        guided: with the run's guidance.
    """

    row: int
    others: bool = False
    guided: bool = False


def has_codes(recording: Recording) -> bool:
    """Whether the run's tokens are codes drawn from distributions that can be asked for."""
    return isinstance(recording.pipeline, (NextScalePipeline, CodePipeline))


def asks_context(recording: Recording) -> bool:
    """Whether a token of the family can be predicted from different contexts: masked ones alone."""
    return isinstance(recording.pipeline, MaskedPipeline)


def log_probabilities(recording: Recording, question: Question) -> Generator[None, None, list[Tensor]]:
    """Log-probabilities (n_k, V) of every token of an image, scale by scale; temperature and truncation left out.

    Next scale and raster: given all tokens before. Raises SettingError where the model has no codes.
    """
    if not has_codes(recording):
        raise SettingError("this model's tokens are no codes of a codebook: they have no probabilities")
    teacher = _Teacher(recording, question)
    last = recording.steps[-1]
    if isinstance(last.tokens, list):
        found = _of_scales(teacher, [tokens[question.row] for tokens in last.tokens])
    elif asks_context(recording):
        found = [(yield from _of_masked(teacher, recording, question))]
    else:
        tokens = last.tokens[question.row].masked_fill(~last.known[question.row], 0)
        found = [teacher(tokens[None], teacher.weights((torch.arange(len(tokens)) + 1) / len(tokens)))[0]]
    yield
    return found


class _Teacher:
    """Teacher-forced log-probabilities under a run's label, and its guidance where asked."""

    def __init__(self, recording: Recording, question: Question) -> None:
        request = recording.request
        self.pipeline = recording.pipeline
        self.label = None if request.class_labels is None else request.class_labels[question.row]
        self.schedule = request.settings.get("guidance_schedule", "constant")
        guided = question.guided and self.label is not None
        self.scale = float(request.settings.get("guidance_scale", 1)) if guided else 1.0

    def weights(self, shares: Tensor) -> Tensor:
        """Guidance for shares (n,) of tokens known after a step."""
        return torch.as_tensor(share_guidance(self.scale, self.schedule)(shares)).flatten().expand(len(shares))

    def __call__(self, tokens: Any, weights: Tensor) -> Tensor:
        """Of tokens (B, N), or scales of (B, n_k), with guidance that broadcasts against (B, L): (B, L, V)."""
        rows = len(tokens[0]) if isinstance(tokens, list) else len(tokens)
        logits = self.pipeline.logits(tokens, None if self.label is None else [self.label] * rows).float().cpu()
        if self.scale != 1:
            logits = guide(logits, self.pipeline.logits(tokens, None).float().cpu(), weights[..., None])
        return logits.log_softmax(-1)


def _of_scales(teacher: _Teacher, scales: list[Tensor]) -> list[Tensor]:
    sides = teacher.pipeline.tokenizer.scales
    guidance = [guidance_at(teacher.scale, teacher.schedule, k, len(sides)) for k in range(len(sides))]
    lengths = torch.tensor([side * side for side in sides])[: len(scales) + 1]  # the scale that comes next as well
    weights = torch.tensor(guidance)[: len(lengths)].repeat_interleave(lengths)
    found = teacher([scale[None].to(teacher.pipeline.device) for scale in scales], weights)[0]
    return list(found.split(lengths.tolist())[: len(scales)])


def _of_masked(teacher: _Teacher, recording: Recording, question: Question) -> Generator[None, None, Tensor]:
    """Log-probabilities (N, V), each from what was known before the step that fixed it, or from all others; nan where
    neither asks for it."""
    row, mask = question.row, recording.pipeline.generator.mask_token_id
    final, number = recording.steps[-1].tokens[row], recording.steps[-1].known.shape[1]
    if question.others:
        inputs = final.repeat(number, 1).masked_fill(torch.eye(number, dtype=torch.bool), mask)
        shares, wanted = torch.ones(number), [torch.tensor([i]) for i in range(number)]
    else:
        kept = torch.stack([torch.zeros(number, dtype=torch.bool), *_given(recording, row)]).any(0)
        before = [final.masked_fill(~kept, mask), *(step.tokens[row] for step in recording.steps[:-1])]
        known = torch.stack([kept, *(step.known[row] for step in recording.steps)])
        inputs, shares = torch.stack(before), known[1:].float().mean(1)
        wanted = [(after & ~now).nonzero().flatten() for now, after in pairwise(known)]
    found = torch.full((number, recording.pipeline.generator.config["vocab_size"]), float("nan"))
    size = max(1, LOGITS // found.numel())
    for start in range(0, len(inputs), size):
        part = slice(start, start + size)
        given = teacher(inputs[part], teacher.weights(shares[part])[:, None])
        for probabilities, places in zip(given, wanted[part], strict=True):
            found[places] = probabilities[places]
        yield
    return found


@dataclass(frozen=True)
class Measures:
    """Of the tokens (n,) of a scale: probability of the code that is there, and entropy in bits; nan where unknown."""

    probability: Tensor
    entropy: Tensor
    most: float  # bits of entropy where all codes are alike


def measure(log_probability: Tensor, codes: Tensor) -> Measures:
    """Of log-probabilities (n, V) and codes (n,)."""
    unknown = codes < 0
    probability = log_probability.gather(1, codes.clamp_min(0)[:, None])[:, 0].exp()
    entropy = torch.special.entr(log_probability.exp()).sum(1) / math.log(2)
    nan = float("nan")
    most = math.log2(log_probability.shape[1])
    return Measures(probability.masked_fill(unknown, nan), entropy.masked_fill(unknown, nan), most)


def likeliest(log_probability: Tensor, count: int = ALTERNATIVES) -> list[tuple[int, float]]:
    """The likeliest codes of a distribution (V,) and their probabilities."""
    top = log_probability.topk(min(count, len(log_probability)))
    return list(zip(top.indices.tolist(), top.values.exp().tolist(), strict=True))


# ---- other codes


@torch.no_grad()
def substitute(recording: Recording, row: int, scale: int, token: int, codes: Sequence[int]) -> Tensor:
    """An image with one token replaced by each of `codes`: (len(codes), 3, S, S) uint8."""
    tokens, count = recording.steps[-1].tokens, len(codes)
    device = recording.pipeline.device
    scales = tokens if isinstance(tokens, list) else [tokens]
    copies = [part[row : row + 1].repeat(count, 1).to(device) for part in scales]
    copies[scale][:, token] = torch.tensor(list(codes), device=device)
    return recording.pipeline.decode(copies if isinstance(tokens, list) else copies[0]).cpu()


def patch_box(size: int, side: int, token: int) -> tuple[int, int, int, int]:
    """Where a token of a grid lies in an image of `size` pixels, with half a token around it: left, top, right and
    bottom."""
    row, column = divmod(token, side)

    def span(place: int) -> tuple[int, int]:
        return max(0, math.floor((place - 0.5) * size / side)), min(size, math.ceil((place + 1.5) * size / side))

    (left, right), (top, bottom) = span(column), span(row)
    return left, top, right, bottom


# ---- pictures that were handed in


def record_image(recording: Recording, image: Tensor) -> None:
    """Add the tokens of an image (3, S, S) in [-1, 1] to an empty recording, as if it had been generated: scale by
    scale, or a grid at once."""
    tokenizer, device = recording.pipeline.tokenizer, recording.pipeline.device
    tokens = tokenizer.encode(image[None].to(device))
    if not isinstance(tokens, list):
        known = torch.ones(1, tokens.shape[1], dtype=torch.bool)
        recording.add(Step(index=0, total=1, tokens=tokens, known=known, evaluations=0))
        return
    total = sum(part.shape[1] for part in tokens)
    for k in range(len(tokens)):
        prefix = tokens[: k + 1]
        known = torch.arange(total)[None] < sum(part.shape[1] for part in prefix)
        latent = tokenizer.latent(prefix)
        recording.add(Step(index=k, total=len(tokens), tokens=prefix, known=known, evaluations=0, latent=latent))
