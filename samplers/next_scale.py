"""Next-scale sampling (VAR, 2404.02905, section 3.2): one model evaluation per scale, coarse to fine.

Written against the Protocols of vgen.types; serves every generator and tokenizer that predict scale by scale.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgen.samplers.logits import Schedule, draw, guidance_at, guide, temper, temperature_at, truncate
from vgen.types import NextScaleGenerator, NextScaleTokenizer, Rng, Step

# Given (scale, latent so far): which tokens of the scale are dictated, (B, n_k) bool, and what they are, (B, n_k).
Dictation = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class NextScaleSettings:
    """How tokens are chosen from logits."""

    guidance_scale: float = 2.0
    guidance_schedule: Schedule = "linear"
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    temperature_schedule: str = "constant"  # or from 1 at first to `temperature` at last: "linear", "sqrt"
    more_smooth: bool = False  # VAR's demo option: feed back a soft mixture of codes instead of the drawn ones


def next_scale(
    generator: NextScaleGenerator,
    tokenizer: NextScaleTokenizer,
    class_labels: Tensor,
    null_class: int,
    rng: Rng,
    settings: NextScaleSettings,
    dictation: Dictation | None = None,
) -> Iterator[Step]:
    """Sample a batch scale by scale, yielding after each: class_labels (B,) -> K steps.

    Noise of scale k is drawn with key 2 k (and 2 k + 1 for `more_smooth`), (n_k, V) per sample. `dictation` fixes
    tokens, for editing. The cache lives as long as the iterator.
    """
    scales, batch = tokenizer.scales, len(class_labels)
    lengths = torch.tensor([side * side for side in scales])
    null = torch.full_like(class_labels, null_class)
    guided = settings.guidance_scale != 1 and not torch.equal(class_labels, null)
    condition = generator.condition(torch.cat([class_labels, null]) if guided else class_labels)
    cache = generator.new_cache(2 * batch if guided else batch)
    latent = tokenizer.new_latent(batch)
    tokens: list[Tensor] = []
    for k in range(len(scales)):
        context = tokenizer.read_scale(latent, k)
        logits = _logits(generator, condition, cache, context, guided, k, len(scales), settings)
        drawn, codes = _choose(logits, tokenizer, rng, settings, k, len(scales))
        if dictation is not None:
            dictated, given = dictation(k, latent)
            drawn = torch.where(dictated, given, drawn)
            codes = torch.where(dictated[..., None], tokenizer.embed(given), codes)
        tokens = [*tokens, drawn]
        latent = tokenizer.add_scale(latent, codes, k)
        known = torch.arange(int(lengths.sum())) < int(lengths[: k + 1].sum())
        yield Step(
            index=k,
            total=len(scales),
            tokens=tokens,
            known=known.expand(batch, -1),
            evaluations=k + 1,
            latent=latent,
        )


def _logits(
    generator: NextScaleGenerator,
    condition: Any,
    cache: Any,
    context: Tensor,
    guided: bool,
    k: int,
    total: int,
    settings: NextScaleSettings,
) -> Tensor:
    """Guided logits of scale k, (B, n_k, V)."""
    if not guided:
        return generator(context, condition, cache)
    cond, uncond = generator(torch.cat([context, context]), condition, cache).chunk(2)
    return guide(cond, uncond, guidance_at(settings.guidance_scale, settings.guidance_schedule, k, total))


def _choose(
    logits: Tensor, tokenizer: NextScaleTokenizer, rng: Rng, settings: NextScaleSettings, k: int, total: int
) -> tuple[Tensor, Tensor]:
    """Tokens (B, n_k) and the code vectors to feed back (B, n_k, C)."""
    ratio = k / max(total - 1, 1)
    heat = temperature_at(settings.temperature, settings.temperature_schedule, ratio)
    logits = truncate(temper(logits, heat), settings.top_k, settings.top_p)
    shape = logits.shape[1:]
    # The published code draws even where only one token is left, so the noise must be drawn too.
    drawn = draw(logits, rng.exponential(shape, key=2 * k))
    if not settings.more_smooth:
        return drawn, tokenizer.embed(drawn)
    gumbel = -rng.exponential(shape, key=2 * k + 1).log()
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    mixture = ((logits * (1 + ratio) + gumbel) / tau).softmax(-1)
    return drawn, mixture.to(tokenizer.code_vectors.dtype) @ tokenizer.code_vectors
