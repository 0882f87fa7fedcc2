"""The pipeline of MAR: continuous tokens unmasked in a random order, each drawn by a diffusion head."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vgen.data import to_unit_range
from vgen.pipelines.base import Labels, build_settings
from vgen.pipelines.grid import GridPipeline, check_recap
from vgen.samplers.mar import MARSettings, mar
from vgen.types import Output, Rng, SettingError, Step


class MARPipeline(GridPipeline):
    """An autoencoder and a generator of its continuous tokens.

    Args:
        tokenizer: vgen.tokenizers.kl.KLAutoencoder, or anything with its interface; None gives tokens only.
        generator: vgen.generators.mar.MAR, or anything with its interface.
        id2label: class names by id.
        settings: this model's default sampling settings, fields of MARSettings.
    """

    samplers = ("mar",)

    def shared_sizes(self) -> dict[str, tuple[Any, Any]]:
        config, tokenizer = self.generator.config, self.tokenizer
        return {
            "number of tokens": (tokenizer.num_tokens, config["num_tokens"]),
            "token_dim": (tokenizer.token_dim, config["token_dim"]),
        }

    @torch.no_grad()
    def __call__(self, class_labels: Labels = None, *, output_type: str = "pil", **settings: Any) -> Output:
        """Sample images.

        Args:
            class_labels: ids or names, one per image (a single one serves all seeds); None is unconditional.
            seeds: one whole number per image; image i depends on its own seed alone.
            generator: one torch.Generator for the whole batch instead.
            sampler: "mar".
            steps: evaluations; a run with few masked tokens takes at most one each.
            tokens, known: in-painting: given tokens (N, C) or (B, N, C), and which of them are kept, (N,) or (B, N)
                bool, equally many in each row.
            guidance_scale: uncond + s * (cond - uncond) of the noise that the head predicts; 1 is off.
            guidance_schedule: "linear" (by the share of tokens known, from 1), "constant",
                or a curve such as [0, 1, 0.5] (vgen.samplers.logits.read_schedule).
            temperature: factor on the noise of the diffusion steps; published: 1 with guidance, 0.95 without.
            diffusion_steps: of the head, 2..1000.
            full_steps, partial_steps: ReCAP: whole evaluations at the start, then partial ones after each whole one.
            partial_diffusion_steps: of the head for tokens of partial evaluations; None is half of `diffusion_steps`.
            cache_buffer, group_order: see vgen.samplers.mar.MARSettings.
            output_type: "pil", "np" ((B, H, W, 3) in [0, 1]), "pt" ((B, 3, H, W) in [0, 1]) or "latent" (the tokens,
                (B, N, C)); without a tokenizer only the last.

        Raises SettingError (a ValueError) naming the value and the remedy.
        """
        return self.sample(class_labels, output_type, settings)

    def steps(
        self, labels: Tensor, rng: Rng, tokens: Tensor, known: Tensor, sampler: str, settings: MARSettings
    ) -> Iterator[Step]:
        return mar(self.generator, labels, self.null_class, tokens, known, rng, settings)

    # ---- settings

    def chosen_settings(self, settings: dict[str, Any], sampler: str | None) -> MARSettings:
        self.resolve_sampler(sampler)
        number = self.generator.config["num_tokens"]
        defaults = {"steps": min(MARSettings.steps, number)} | self.config["settings"]
        bounds: dict[str, tuple[float, float]] = {
            "guidance_scale": (0.0, 1000.0),
            "temperature": (0.0, 1000.0),
            "steps": (1, number),
            "diffusion_steps": (2, 1000),
            "partial_diffusion_steps": (2, 1000),
            "full_steps": (0, number),
            "partial_steps": (0, number),
        }
        choices = {"group_order": ("raster", "random")}
        chosen = build_settings(MARSettings, defaults | settings, bounds, choices)
        check_recap(chosen.full_steps, chosen.partial_steps, chosen.steps)
        return chosen

    # ---- given tokens

    def given_tokens(self, tokens: Any, known: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) and which are known, (B, N) bool."""
        number, width = self.generator.config["num_tokens"], self.generator.config["token_dim"]
        if tokens is None and known is None:
            kept = torch.zeros(batch, number, device=self.device, dtype=torch.bool)
            return torch.zeros(batch, number, width, device=self.device, dtype=self._precision), kept
        given, kept = self.both_given(tokens, known, batch, (number, width))
        counts = kept.sum(1).tolist()
        if len(set(counts)) > 1:
            raise SettingError(
                f"rows with {min(counts)} and {max(counts)} known tokens: MAR takes equally many in each, sample "
                "them one at a time"
            )
        if not given.is_floating_point() or not bool(given[kept].isfinite().all()):
            raise SettingError("known tokens must be finite floating-point numbers, as the tokenizer's encode gives")
        return given.to(self._precision), kept

    @property
    def _precision(self) -> torch.dtype:
        """Tokens are kept in float32 whatever the model computes in; a float64 model keeps its own."""
        return torch.promote_types(torch.float32, self.generator.dtype)

    # ---- looking at tokens

    @torch.no_grad()
    def decode_floats(self, step: Step | Tensor) -> Tensor:
        """A Step, or tokens (B, N, C) -> images (B, 3, S, S) float32 in [0, 1]; masked tokens as zeros, the mean."""
        self.check_tokenizer()
        return to_unit_range(self.tokenizer.decode(step.tokens if isinstance(step, Step) else step))

    def latent(self, step: Step) -> Tensor:
        return step.tokens
