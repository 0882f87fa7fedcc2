"""The pipeline of the families that predict scale by scale: VAR, and all that share its loop."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vgen.data import to_model_range, to_unit_range
from vgen.pipelines.base import Labels, Pipeline, build_settings
from vgen.pipelines.editing import keep_masks
from vgen.pipelines.given import check_both, check_codes, check_given, check_left
from vgen.samplers.logits import TEMPERATURE_SCHEDULES
from vgen.samplers.next_scale import Dictation, NextScaleSettings, next_scale
from vgen.types import Output, Rng, SettingError, Step


class NextScalePipeline(Pipeline):
    """A multi-scale tokenizer and a next-scale generator.

    Args:
        tokenizer: vgen.tokenizers.multiscale.MultiScaleVQ, or anything with its interface.
        generator: vgen.generators.var.VAR, or anything with its interface.
        id2label: class names by id.
        settings: this model's default sampling settings, fields of NextScaleSettings.
    """

    samplers = ("next-scale",)

    def shared_sizes(self) -> dict[str, tuple[Any, Any]]:
        ours, theirs = self.tokenizer.config, self.generator.config
        sizes = {name: (ours[name], theirs[name]) for name in ("vocab_size", "code_dim")}
        return {"scales": (list(ours["scales"]), list(theirs["scales"]))} | sizes

    @torch.no_grad()
    def __call__(self, class_labels: Labels = None, *, output_type: str = "pil", **settings: Any) -> Output:
        """Sample images.

        Args:
            class_labels: ids or names, one per image (a single one serves all seeds); None is unconditional.
            seeds: one whole number per image; image i depends on its own seed alone.
            generator: one torch.Generator for the whole batch instead, drawn in the published order.
            guidance_scale: uncond + s * (cond - uncond); 1 is off. VAR's published cfg = c is s = 1 + c.
            guidance_schedule: "linear" (from 1 at the first scale to s at the last, as published), "constant",
                or a curve such as [0, 1, 0.5] (vgen.samplers.logits.read_schedule).
            top_k, top_p, temperature: truncation of each token's distribution; 0, 1 and 1 are off.
            temperature_schedule: "constant", or from 1 at the first scale to `temperature` at the last: "linear",
                "sqrt".
            more_smooth: VAR's demo option, feeding back soft mixtures of codes: smoother pictures, worse FID.
            tokens, known: given tokens of every scale, or of the first few: lists of (n_k,) or (B, n_k), and which of
                them are kept, bool, likewise. The rest is drawn with the noise it has in any run of the seed.
            sampler: "next-scale".
            output_type: "pil", "np" ((B, H, W, 3) in [0, 1]), "pt" ((B, 3, H, W) in [0, 1]) or "latent".

        Raises SettingError (a ValueError) naming the value and the remedy.
        """
        steps, rng = self._begin(class_labels, **settings)
        return self.run(steps, rng, output_type)

    def stream(self, class_labels: Labels = None, **settings: Any) -> Iterator[Step]:
        """Sample, yielding a Step after every scale. Takes the arguments of the call, less `output_type`; they are
        checked before the first step is asked for."""
        return self._begin(class_labels, **settings)[0]

    def _begin(
        self,
        class_labels: Labels,
        *,
        seeds: Sequence[int] | int | None = None,
        generator: torch.Generator | None = None,
        sampler: str | None = None,
        tokens: Sequence[Any] | None = None,
        known: Sequence[Any] | None = None,
        dictation: Dictation | None = None,
        images: int = 1,
        **settings: Any,
    ) -> tuple[Iterator[Step], Rng]:
        self.resolve_sampler(sampler)
        self.check_tokenizer()
        chosen = self.chosen_settings(settings)
        labels, rng = self.inputs(class_labels, seeds, generator)
        if images not in (1, len(labels)):
            raise SettingError(f"{images} images but {len(labels)} labels or seeds: give one image, or one for each")
        if check_both(tokens, known):
            if dictation is not None:
                raise SettingError("tokens are given, and an edit dictates its own: leave tokens and known out")
            dictation = self._dictate(tokens, known, len(labels))
        steps = next_scale(self.generator, self.tokenizer, labels, self.null_class, rng, chosen, dictation)
        return self.without_gradients(steps), rng

    def _dictate(self, tokens: Any, known: Any, batch: int) -> Dictation:
        """What keeps given tokens, scale by scale. Raises SettingError."""
        lengths, codes = [side * side for side in self.tokenizer.scales], self.generator.config["vocab_size"]
        for what, value in (("tokens", tokens), ("known", known)):
            if not isinstance(value, (list, tuple)) or not 0 < len(value) <= len(lengths):
                raise SettingError(f"{what} must be a list of 1..{len(lengths)} scales, as a run's tokens are")
        if len(tokens) != len(known):
            raise SettingError(f"tokens of {len(tokens)} scales but known of {len(known)}: give as many of both")
        given: list[tuple[Tensor, Tensor]] = []
        for k, number in enumerate(lengths):
            nothing = torch.zeros(number, dtype=torch.long), torch.zeros(number, dtype=torch.bool)
            theirs, which = (tokens[k], known[k]) if k < len(tokens) else nothing
            values, kept = check_given(theirs, which, batch, (number,), self.device)
            given.append((kept, check_codes(values, kept, codes).masked_fill(~kept, 0)))
        check_left(torch.cat([kept for kept, _ in given], 1))
        return lambda scale, latent: given[scale]

    def resolve_settings(self, settings: dict[str, Any], sampler: str | None = None) -> dict[str, Any]:
        return dataclasses.asdict(self.chosen_settings(settings))

    def chosen_settings(self, settings: dict[str, Any]) -> NextScaleSettings:
        """The model's defaults and the settings given, each within its bounds. Raises SettingError."""
        bounds: dict[str, tuple[float, float]] = {
            "guidance_scale": (0.0, 1000.0),
            "top_k": (0, self.generator.config["vocab_size"]),
            "top_p": (0.0, 1.0),
            "temperature": (0.0, 1000.0),
        }
        choices = {"temperature_schedule": TEMPERATURE_SCHEDULES}
        return build_settings(NextScaleSettings, self.config["settings"] | settings, bounds, choices)

    def begin_edit(
        self, original: Tensor, painted: Tensor, class_labels: Labels, **settings: Any
    ) -> tuple[Iterator[Step], Rng]:
        """Kept cells are requantised against what has been generated so far (closed loop), so that generated content
        does not leak into them."""
        source = self.tokenizer.encode_latent(to_model_range(original))
        keep = keep_masks(painted, self.tokenizer.scales)

        def dictate(scale: int, latent: Tensor) -> tuple[Tensor, Tensor]:
            given = self.tokenizer.quantize_scale(self.tokenizer.aim(source, scale) - latent, scale)
            return keep[scale].to(given.device).expand(len(given), -1), given

        return self._begin(class_labels, dictation=dictate, images=len(original), **settings)

    @property
    def token_pixels(self) -> int:
        return self.tokenizer.image_size // self.tokenizer.scales[-1]

    @torch.no_grad()
    def decode_floats(self, step: Step | Sequence[Tensor]) -> Tensor:
        """A Step, or the tokens of the first scales -> images (B, 3, S, S) float32 in [0, 1]."""
        self.check_tokenizer()
        latent = step.latent if isinstance(step, Step) else self.tokenizer.latent(step)
        return to_unit_range(self.tokenizer.decode_latent(latent))

    @torch.no_grad()
    def logits(self, tokens: Sequence[Tensor], class_labels: Labels = None) -> Tensor:
        """Teacher-forced logits (B, L, V) float32 of all scales one after another; tokens as `encode` gives them."""
        self.check_tokenizer()
        return self.generator(self.tokenizer.context(tokens), self.row_labels(class_labels, len(tokens[0])))
