"""Training a next-scale generator: cross-entropy of every scale at once, given the scales before (2404.02905)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.data import flip_at_random, to_model_range
from vgen.generators.mvar import MVAR
from vgen.generators.var import VAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.training.config import TrainingConfig
from vgen.training.generators import GeneratorTask, cross_entropy

MISREAD_AMONG = 16  # a misread token becomes one of the nearest V / 16 codes


class NextScaleTask(GeneratorTask):
    """VAR and the scales it learns from."""

    model_class = VAR
    tokenizer_class = MultiScaleVQ
    init_settings: Mapping[str, str] = {"init_gate": "gate"}

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        self.pipeline()  # wrong `sample_settings` show before the first step, not after the last

    def decided(self) -> dict[str, Any]:
        return {name: self.tokenizer.config[name] for name in ("scales", "vocab_size", "code_dim")}

    def batch(self, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels; with self-correction, which needs more than tokens, images in their place."""
        if not self.config.self_correction:
            return super().batch(indices, seed)
        indices = indices % len(self.labels)
        images = to_model_range(self.source.images(indices.tolist(), seed if self.config.crops > 1 else None))
        if self.config.flip:
            images = flip_at_random(images, np.random.default_rng(seed))
        return images, self.labels[torch.from_numpy(indices)]

    def training_loss(
        self, model: nn.Module, examples: Tensor, labels: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.config.self_correction:
            self._follow(examples)
            with torch.autocast(examples.device.type, enabled=False):
                tokens, context = misread(self.tokenizer, examples, self.config.self_correction, rng)
        else:
            tokens, context = examples, self._context(examples)
        logits = model(context, labels)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), {}

    def test_losses(self, tokens: Tensor, labels: Tensor, first: int) -> dict[str, Tensor]:
        """Cross-entropy per token; the last scale's apart, as VAR's "tail"."""
        loss = self.token_losses(tokens, labels)
        return {"test_loss": loss.mean(1), "test_loss_tail": loss[:, -self.model.lengths[-1] :].mean(1)}

    def token_losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every token (B, L)."""
        logits = self.model(self._context(tokens), labels)
        return cross_entropy(logits, tokens)

    def pipeline(self) -> NextScalePipeline:
        names, settings = dict(enumerate(self.class_names)), self.config.sample_settings
        return NextScalePipeline(self.tokenizer, self.model, id2label=names, settings=settings)

    def _context(self, tokens: Tensor) -> Tensor:
        self._follow(tokens)
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            return self.tokenizer.context(tokens.split(self.model.lengths, dim=1))

    def _follow(self, examples: Tensor) -> None:
        if self.tokenizer.device != examples.device:
            self.tokenizer.to(examples.device)


class MVARTask(NextScaleTask):
    """M-VAR: the same loss, another transformer."""

    model_class = MVAR


@torch.no_grad()
def misread(tokenizer: Any, images: Tensor, most: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens to predict and what to predict them from, some of it wrong: Infinity's self-correction (2412.04431).

    A generator draws the tokens of a scale apart, so that some do not fit together, but in training it would see only
    scales that do. Here a share of each image's tokens, anything up to `most`, is read as other codes that are near,
    and the tokens of the scales that follow are those that mend it. Infinity flips bits of its codes in the same way.

    Args:
        tokenizer: a MultiScaleVQ.
        images: (B, C, S, S) in [-1, 1].
        most: largest share, from 0 to 1.
        rng: of the CPU.

    Returns:
        Tokens of all scales (B, L) int64, and the rows (B, L - n_0, code_dim) of the scales after the first.
    """
    target = tokenizer.encode_latent(images)
    latent, tokens, rows = tokenizer.new_latent(len(images)), [], []
    share = torch.rand(len(images), 1, generator=rng) * most
    for k, side in enumerate(tokenizer.scales):
        vectors = tokenizer.read_scale(tokenizer.aim(target, k) - latent, k)
        tokens.append(tokenizer.codebook.nearest(vectors))
        if side == tokenizer.scales[-1]:
            break
        near = tokenizer.codebook.nearby(vectors, max(2, len(tokenizer.codebook.weight) // MISREAD_AMONG))
        chosen = torch.randint(near.shape[-1], tokens[-1].shape, generator=rng).to(near.device)
        wrong = (torch.rand(tokens[-1].shape, generator=rng) < share).to(near.device)
        read = torch.where(wrong, near.gather(-1, chosen[..., None])[..., 0], tokens[-1])
        latent = tokenizer.add_scale(latent, tokenizer.embed(read), k)
        rows.append(tokenizer.read_scale(latent, k + 1))
    return torch.cat(tokens, 1), torch.cat(rows, 1) if rows else latent.new_zeros(len(latent), 0, latent.shape[1])
