"""Training a next-scale generator: cross-entropy of every scale at once, given the scales before (2404.02905)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.generators.mvar import MVAR
from vgen.generators.var import VAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.training.generators import GeneratorTask, cross_entropy


class NextScaleTask(GeneratorTask):
    """VAR and the scales it learns from."""

    model_class = VAR
    tokenizer_class = MultiScaleVQ
    init_settings: Mapping[str, str] = {"init_gate": "gate"}

    def decided(self) -> dict[str, Any]:
        return {name: self.tokenizer.config[name] for name in ("scales", "vocab_size", "code_dim")}

    def training_loss(
        self, model: nn.Module, tokens: Tensor, labels: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(self._context(tokens), labels)
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
        return NextScalePipeline(self.tokenizer, self.model, id2label=dict(enumerate(self.class_names)))

    def _context(self, tokens: Tensor) -> Tensor:
        if self.tokenizer.device != tokens.device:
            self.tokenizer.to(tokens.device)
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            return self.tokenizer.context(tokens.split(self.model.lengths, dim=1))


class MVARTask(NextScaleTask):
    """M-VAR: the same loss, another transformer."""

    model_class = MVAR
