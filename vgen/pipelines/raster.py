"""The pipeline of recurrent-depth generators: tokens in raster order, one at a time or many."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vgen.pipelines.base import Labels, build_settings, check_readers
from vgen.pipelines.grid import CodePipeline
from vgen.samplers.raster import RasterSettings, Run, raster
from vgen.samplers.wavefront import wave_df, wave_exact
from vgen.samplers.zipar import zipar
from vgen.types import ModelWarning, Output, Rng, SettingError, Step

WAVES = ("wave-exact", "wave-df")
PARALLEL = (*WAVES, "jacobi", "zipar")
FREEZE_RULES = ("prefix", "rightmost")
JACOBI_WINDOW = 8
MAX_RECURRENCES = 1024
# Settings that only some samplers read.
READERS: Mapping[str, tuple[str, ...]] = {
    "exit_threshold": ("raster", "wave-df"),
    "inner_recurrences": WAVES,
    "wavefront": (*WAVES, "jacobi"),
    "headway": WAVES,
    "momentum": ("wave-df",),
    "state_noise": ("wave-df",),
    "freeze_rule": ("wave-df",),
    "restart": ("wave-df",),
    "row_lead": ("zipar",),
}
# What a loop must hold for tokens to be read off unfinished states: figure -> (bound, whether it must lie above, what).
GATES: Mapping[str, tuple[float, bool, str]] = {
    "residual": (0.03, False, "median relative change of states in the last recurrence"),
    "deeper": (0.005, False, "nats per token lost by twice the recurrences"),
    "agreement": (0.99, True, "likeliest tokens that do not depend on the state the loop begins with"),
    "shallow": (0.05, False, "nats per token lost by a quarter of the recurrences"),
}


class RasterPipeline(CodePipeline):
    """A single-scale tokenizer and a recurrent-depth generator.

    Args:
        tokenizer: vgen.tokenizers.vqgan.VQGAN, or anything with its interface; None gives tokens only.
        generator: vgen.generators.recurrent.RecurrentTransformer, or anything with its interface.
        id2label: class names by id.
        settings: this model's default sampling settings, fields of RasterSettings.
        gates: figures of how well its loop converges, by the names of GATES; measured in training.
    """

    samplers = ("wave-exact", "raster", "wave-df", "jacobi", "zipar")
    readers = READERS

    def __init__(
        self,
        tokenizer: Any,
        generator: Any,
        id2label: dict[int, str] | None = None,
        settings: dict[str, Any] | None = None,
        gates: dict[str, float] | None = None,
    ) -> None:
        super().__init__(tokenizer, generator, id2label, settings)
        self.register_to_config(gates=dict(gates or {}))

    @torch.no_grad()
    def __call__(self, class_labels: Labels = None, *, output_type: str = "pil", **settings: Any) -> Output:
        """Sample images.

        Args:
            class_labels: ids or names, one per image (a single one serves all seeds); None is unconditional.
            seeds: one whole number per image; image i depends on its own seed alone.
            generator: one torch.Generator for the whole batch instead.
            sampler: "wave-exact" (many tokens at work, the same images as raster), "raster" (one after the other),
                "wave-df" (faster, other images), "jacobi" (guesses of whole windows, the same images) or "zipar" (rows
                side by side, other images).
            tokens, known: in-painting: given tokens (N,) or (B, N), and which of them are kept, bool, likewise. A model
                of words begins with its first one, which must be known.
            guidance_scale: uncond + s * (cond - uncond); 1 is off.
            guidance_schedule: "linear" (by the share of tokens before it, from 1), "constant",
                or a curve such as [0, 1, 0.5] (vgen.samplers.logits.read_schedule).
            top_k, top_p, temperature: truncation of each token's distribution; 0, 1 and 1 are off.
            recurrences: of the core for every token; None: the model's.
            exit_threshold, inner_recurrences, wavefront, headway, momentum, state_noise, freeze_rule, restart,
                state_scale, row_lead: see vgen.samplers.raster.RasterSettings.
            output_type: "pil", "np" ((B, H, W, 3) in [0, 1]), "pt" ((B, 3, H, W) in [0, 1]) or "latent" (code vectors
                (B, C, h, w); without a tokenizer the tokens).

        Raises SettingError (a ValueError) naming the value and the remedy.
        """
        return self.sample(class_labels, output_type, settings)

    def steps(
        self, labels: Tensor, rng: Rng, tokens: Tensor, known: Tensor, sampler: str, settings: RasterSettings
    ) -> Iterator[Step]:
        self._check_first(known)
        if sampler in PARALLEL:
            self._check_gates()
        recurrences = settings.recurrences or self.generator.config["recurrences"]
        slots = 1 if sampler == "wave-df" else recurrences
        run = Run(self.generator, labels, self.null_class, rng, settings, tokens, known, slots)
        if sampler == "raster":
            return raster(run)
        if sampler == "zipar":
            return zipar(run, self.generator.config["grid"], settings.row_lead)
        if sampler == "jacobi":
            most = settings.wavefront or JACOBI_WINDOW
            return wave_exact(run, recurrences, most, most)
        inner = settings.inner_recurrences
        most = settings.wavefront or max(1, recurrences // inner) * settings.headway
        return (wave_exact if sampler == "wave-exact" else wave_df)(run, inner, most, settings.headway)

    # ---- settings

    def chosen_settings(self, settings: dict[str, Any], sampler: str | None) -> RasterSettings:
        name, config = self.resolve_sampler(sampler), self.generator.config
        defaults = {key: value for key, value in self.config["settings"].items() if name in READERS.get(key, (name,))}
        bounds: dict[str, tuple[float, float]] = {
            "guidance_scale": (0.0, 1000.0),
            "top_k": (0, config["vocab_size"]),
            "top_p": (0.0, 1.0),
            "temperature": (0.0, 1000.0),
            "recurrences": (1, MAX_RECURRENCES),
            "state_scale": (0.0, 10.0),
            "exit_threshold": (0.0, 1000.0),
            "inner_recurrences": (1, MAX_RECURRENCES),
            "wavefront": (1, config["num_tokens"]),
            "headway": (1, config["num_tokens"]),
            "momentum": (0.0, 1.0),
            "state_noise": (0.0, 1.0),
            "row_lead": (1, config["grid"] or 1),
        }
        choices = {"freeze_rule": FREEZE_RULES}
        chosen = build_settings(RasterSettings, defaults | settings, bounds, choices)
        check_readers(chosen, name, READERS)
        self._check_passes(chosen, name)
        return chosen

    def _check_passes(self, chosen: RasterSettings, name: str) -> None:
        recurrences = chosen.recurrences or self.generator.config["recurrences"]
        inner = chosen.inner_recurrences
        if name == "wave-exact" and recurrences % inner:
            fits = ", ".join(str(n) for n in range(1, recurrences + 1) if recurrences % n == 0)
            raise SettingError(
                f"inner_recurrences is {inner}, which does not divide recurrences {recurrences}: use {fits}"
            )
        if chosen.wavefront is not None and chosen.headway > chosen.wavefront:
            raise SettingError(
                f"headway is {chosen.headway}, but only wavefront {chosen.wavefront} tokens are at work: lower it"
            )
        if name == "zipar" and self.generator.config["grid"] is None:
            raise SettingError("sampler 'zipar' needs a grid of tokens, and this model reads words: use 'raster'")

    def _check_first(self, known: Tensor) -> None:
        """A model of words begins with one."""
        if self.generator.config["num_classes"] is None and not bool(known[:, 0].all()):
            raise SettingError(
                "this model reads words and begins with a known one: give tokens= and known=, the first set"
            )

    def _check_gates(self) -> None:
        """Warn where the loop does not converge well enough for tokens to be read off unfinished states."""
        for name, value in self.config["gates"].items():
            bound, above, what = GATES[name]
            if value < bound if above else value > bound:
                sign = "at least" if above else "at most"
                warnings.warn(
                    f"this model's gate {name!r} is {value:.4g}, and should be {sign} {bound:g} ({what}): "
                    "parallel samplers gain less, and lossy ones lose more; sampler='raster' is safe",
                    ModelWarning,
                    stacklevel=2,
                )

    # ---- looking at tokens

    @torch.no_grad()
    def logits(self, tokens: Tensor, class_labels: Labels = None, recurrences: int | None = None) -> Tensor:
        """Logits (B, N, V) float32 of every token of (B, N), given those before it; the loop begins with zeros.

        Of a model of words, those of the tokens after each.
        """
        inputs = self.generator.inputs(tokens.to(self.device), self.row_labels(class_labels, len(tokens)))
        state = self.generator.scaled_state(torch.full((*inputs.shape, self.generator.config["width"]), 0.5))
        return self.generator(inputs, state, recurrences).logits
