"""Which optimizer serves which parameters."""

import re

import torch
from torch import nn

from vgen.training.config import TrainingConfig
from vgen.training.muon import Muon


def build_optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices inside the model's blocks and AdamW for the rest. One-dimensional tensors,
    embeddings and codebooks are not decayed."""
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or any(
            word in name for word in ("embed.weight", "position", "codebook", "table", "bias")
        ):
            plain.append(parameter)
        elif config.optimizer == "muon" and re.match(r"(\w+_)?blocks?\.", name) and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)]
    if matrices:
        lr = config.muon_lr or 1.5 * config.lr
        decay = config.weight_decay
        optimizers.append(Muon(matrices, lr, decay))
    return optimizers
