"""Training a masked generator: predict masked tokens from the rest, without being told how many are masked.

With masked counts n uniform in 1..N and the mean over a sample's masked tokens, the loss is the negative evidence bound
of masked diffusion per token, whatever its schedule: the 1/t weight of the linear one integrates to 1/n (MDLM,
2406.07524; RADD, 2406.03736). Other laws of n and weights train other mixtures of the same conditionals.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.generators.masked import MaskedTransformer
from vgen.pipelines.masked import MaskedPipeline
from vgen.tokenizers.vqgan import VQGAN
from vgen.training.config import TrainingConfig
from vgen.training.generators import GeneratorTask

BETA = torch.distributions.Beta(12.0, 3.0)  # AutoNAT's law of the masked share


def masked_counts(law: str, uniform: Tensor, num_tokens: int) -> Tensor:
    """How many of N tokens are masked, in 1..N, from numbers (B,) uniform in [0, 1): (B,) int64.

    "uniform": each count as likely; "cosine": MaskGIT's, N cos(pi u / 2); "beta": N times Beta(12, 3), as AutoNAT.
    """
    if law == "uniform":
        return (uniform * num_tokens).long().clamp_max(num_tokens - 1) + 1
    if law == "cosine":
        share = torch.cos(uniform * (math.pi / 2))
    else:  # by the quantile function, on a grid: Beta's own has no closed form
        grid = torch.linspace(0, 1, 4097, dtype=torch.float64)
        density = BETA.log_prob(grid.clamp(1e-9, 1 - 1e-9)).exp()
        cumulative = density.cumsum(0) / density.sum()
        share = grid[torch.searchsorted(cumulative, uniform.double()).clamp_max(4096)]
    return (share * num_tokens).round().long().clamp(1, num_tokens)


def random_mask(counts: Tensor, num_tokens: int, rng: torch.Generator) -> Tensor:
    """`counts` (B,) positions of each row at random: (B, N) bool."""
    order = torch.rand(len(counts), num_tokens, generator=rng).argsort(1)
    return order.argsort(1) < counts[:, None]


class MaskedTask(GeneratorTask):
    """A masked transformer and the grids of tokens it learns from."""

    model_class = MaskedTransformer
    tokenizer_class = VQGAN

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        self.pipeline()  # wrong `sample_settings` show before the first step, not after the last

    def decided(self) -> dict[str, Any]:
        return {"num_tokens": self.tokenizer.num_tokens, "vocab_size": self.tokenizer.config["vocab_size"]}

    def training_loss(
        self, model: nn.Module, tokens: Tensor, labels: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch, length = tokens.shape
        # Stratified over the batch: every batch holds few and many masks, which takes most of the noise out.
        uniform = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        masked = random_mask(masked_counts(self.config.mask_law, uniform, length), length, rng).to(tokens.device)
        losses, rows = self._losses(model, tokens, labels, masked)
        if self.config.mask_weight == "uniform":
            return losses.mean(), {}
        weight = 1 / masked.sum(1)
        return (losses * weight[rows]).sum() / batch, {}

    def test_losses(self, tokens: Tensor, labels: Tensor, first: int) -> dict[str, Tensor]:
        """The evidence bound in nats per token: an upper bound of the negative log-likelihood given the label."""
        batch, length = tokens.shape
        rng = torch.Generator().manual_seed(first)  # the same masks at every evaluation
        uniform = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        masked = random_mask(masked_counts("uniform", uniform, length), length, rng).to(tokens.device)
        losses, rows = self._losses(self.model, tokens, labels, masked)
        mean = torch.zeros(batch, device=tokens.device).index_add_(0, rows, losses) / masked.sum(1)
        return {"test_loss": mean}

    def _losses(self, model: nn.Module, tokens: Tensor, labels: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every masked token, one after another, and the rows they belong to."""
        logits = model(tokens.masked_fill(masked, self.model.mask_token_id), labels)
        losses = F.cross_entropy(logits[masked], tokens[masked], reduction="none")
        return losses, masked.nonzero()[:, 0]

    def pipeline(self) -> MaskedPipeline:
        names, settings = dict(enumerate(self.class_names)), self.config.sample_settings
        return MaskedPipeline(self.tokenizer, self.model, id2label=names, settings=settings)
