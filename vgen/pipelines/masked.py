"""The pipeline of the families that unmask a grid of tokens: MaskGIT, masked diffusion, MAGE."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vgen.pipelines.base import Labels, build_settings, check_readers
from vgen.pipelines.grid import CodePipeline, check_recap
from vgen.samplers.first_hitting import MASKED_SHARE, ancestral, ancestral_categorical, first_hitting
from vgen.samplers.logits import TEMPERATURE_SCHEDULES, share_guidance
from vgen.samplers.masked import (
    SCHEDULES,
    MaskedSettings,
    Plan,
    by_confidence,
    by_order,
    halton_order,
    random_order,
    scheduled,
    token_draw,
    unmask,
)
from vgen.samplers.recap import Evaluations, FeaturePolicy
from vgen.types import Output, Rng, SettingError, Step

DEFAULT_STEPS = {"maskgit": 12, "halton": 16, "random": 16, "ancestral": 64, "ancestral-categorical": 64}
DEFAULT_SCHEDULES = {"maskgit": "cosine", "halton": "arccos", "random": "cosine"}
MAX_TIME_STEPS = 100_000
# Settings that only some samplers read.
READERS = {
    "mask_schedule": ("maskgit", "halton", "random"),
    "choice_temperature": ("maskgit",),
    "resample_singletons": ("maskgit",),
    "temperature_schedule": ("maskgit", "halton", "random", "first-hitting", "ancestral"),
    "noise_schedule": ("first-hitting", "ancestral", "ancestral-categorical"),
    "gumbel_bits": ("ancestral-categorical",),
}


class MaskedPipeline(CodePipeline):
    """A single-scale tokenizer and a generator that predicts masked tokens.

    Args:
        tokenizer: vgen.tokenizers.vqgan.VQGAN, or anything with its interface; None gives tokens only.
        generator: vgen.generators.masked.MaskedTransformer, or anything with its interface.
        id2label: class names by id.
        settings: this model's default sampling settings, fields of MaskedSettings.
    """

    samplers = ("maskgit", "halton", "random", "first-hitting", "ancestral", "ancestral-categorical")
    readers = READERS

    @torch.no_grad()
    def __call__(self, class_labels: Labels = None, *, output_type: str = "pil", **settings: Any) -> Output:
        """Sample images.

        Args:
            class_labels: ids or names, one per image (a single one serves all seeds); None is unconditional.
            seeds: one whole number per image; image i depends on its own seed alone.
            generator: one torch.Generator for the whole batch instead.
            sampler: "maskgit" (confidence), "halton", "random", "first-hitting", "ancestral" (its exact count form) or
                "ancestral-categorical" (the slow baseline).
            steps: evaluations; of time for the ancestral samplers. None is the sampler's own number; first-hitting's
                is one token per evaluation. A run with few masked tokens takes at most one step each.
            tokens, known: in-painting: given tokens (N,) or (B, N), and which of them are kept, bool, likewise.
            full_steps, partial_steps: ReCAP: whole evaluations at the start, then partial ones after each whole one.
            guidance_scale: uncond + s * (cond - uncond); 1 is off.
            guidance_schedule: "linear" (by the share of tokens known, from 1), "constant",
                or a curve such as [0, 1, 0.5] (vgen.samplers.logits.read_schedule).
            top_k, top_p, temperature: truncation of each token's distribution; 0, 1 and 1 are off.
            mask_schedule, temperature_schedule, choice_temperature, resample_singletons, noise_schedule, gumbel_bits:
                see vgen.samplers.masked.MaskedSettings.
            output_type: "pil", "np" ((B, H, W, 3) in [0, 1]), "pt" ((B, 3, H, W) in [0, 1]) or "latent" (code vectors
                (B, C, h, w); without a tokenizer the tokens).

        Raises SettingError (a ValueError) naming the value and the remedy.
        """
        return self.sample(class_labels, output_type, settings)

    def steps(
        self, labels: Tensor, rng: Rng, tokens: Tensor, known: Tensor, sampler: str, settings: MaskedSettings
    ) -> Iterator[Step]:
        guided = settings.guidance_scale != 1 and bool((labels != self.null_class).any())
        evaluations = Evaluations(self.generator, labels, self.null_class, guided)
        scale_at = share_guidance(settings.guidance_scale, settings.guidance_schedule, self.device)
        if sampler == "ancestral-categorical":
            steps, mask = settings.steps or DEFAULT_STEPS[sampler], self.generator.mask_token_id
            return ancestral_categorical(evaluations, tokens, known, rng, settings, steps, mask, scale_at)
        plan = self._plan(sampler, settings, rng, known)
        groups = FeaturePolicy(full_steps=settings.full_steps, partial_steps=settings.partial_steps).groups(plan.steps)
        if sampler == "maskgit":
            select = by_confidence(rng, settings, plan, groups)
        else:
            order = halton_order if sampler == "halton" else random_order
            select = by_order(order(rng, known.shape[1]))
        draw = token_draw(rng, settings, plan)
        return unmask(evaluations, tokens, known, plan, groups, select, draw, scale_at)

    def _plan(self, name: str, chosen: MaskedSettings, rng: Rng, known: Tensor) -> Plan:
        if name == "first-hitting":
            return first_hitting(rng, known, chosen.steps, chosen.noise_schedule)
        steps = chosen.steps or DEFAULT_STEPS[name]
        if name == "ancestral":
            return ancestral(rng, known, steps, chosen.noise_schedule)
        steps = min(steps, known.shape[1])  # the sampler's own number may be too large for a small grid
        return scheduled(known, steps, chosen.mask_schedule or DEFAULT_SCHEDULES[name])

    # ---- settings

    def chosen_settings(self, settings: dict[str, Any], sampler: str | None) -> MaskedSettings:
        name, config = self.resolve_sampler(sampler), self.generator.config
        defaults = {key: value for key, value in self.config["settings"].items() if name in READERS.get(key, (name,))}
        if name != self.samplers[0]:
            for key in ("steps", "full_steps", "partial_steps"):  # the model's are its default sampler's
                defaults.pop(key, None)
        if isinstance(steps := settings.get("steps"), int):  # a shorter run than the model's: its ReCAP gives way
            for key, most in (("full_steps", steps), ("partial_steps", steps - 1)):
                if key in defaults:
                    defaults[key] = max(0, min(defaults[key], most))
        bounds: dict[str, tuple[float, float]] = {
            "guidance_scale": (0.0, 1000.0),
            "top_k": (0, config["vocab_size"]),
            "top_p": (0.0, 1.0),
            "temperature": (0.0, 1000.0),
            "steps": (1, MAX_TIME_STEPS),
            "choice_temperature": (0.0, 1000.0),
            "gumbel_bits": (0, 53),
            "full_steps": (0, MAX_TIME_STEPS),
            "partial_steps": (0, MAX_TIME_STEPS),
        }
        choices = {
            "temperature_schedule": TEMPERATURE_SCHEDULES,
            "mask_schedule": SCHEDULES,
            "noise_schedule": tuple(MASKED_SHARE),
        }
        chosen = build_settings(MaskedSettings, defaults | settings, bounds, choices)
        self._check_steps(chosen, name)
        check_readers(chosen, name, READERS)
        return chosen

    def _check_steps(self, chosen: MaskedSettings, name: str) -> None:
        number = self.generator.config["num_tokens"]
        timed = name.startswith("ancestral")
        if chosen.steps is not None and chosen.steps > number and not timed:
            raise SettingError(f"steps is {chosen.steps}, but an image has {number} tokens: take 1..{number} steps")
        usual = DEFAULT_STEPS.get(name, number)
        steps = chosen.steps or (usual if timed else min(usual, number))
        check_recap(chosen.full_steps, chosen.partial_steps, steps)
        if name in DEFAULT_SCHEDULES:  # a schedule that reveals nothing at some step
            scheduled(torch.zeros(1, number, dtype=torch.bool), steps, chosen.mask_schedule or DEFAULT_SCHEDULES[name])

    # ---- looking at tokens

    @torch.no_grad()
    def logits(self, tokens: Tensor, class_labels: Labels = None) -> Tensor:
        """Logits (B, N, V) float32 at every position of tokens (B, N), any of which may be masked."""
        return self.generator(tokens.to(self.device), self.row_labels(class_labels, len(tokens)))
