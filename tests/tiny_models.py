"""Tiny models with random weights: large enough to be wrong, small enough to run in milliseconds."""

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from vgen.generators.mvar import MVAR
from vgen.generators.recurrent import RecurrentTransformer
from vgen.generators.var import VAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.tokenizers.frequency import FrequencyVQ
from vgen.tokenizers.multiscale import MultiScaleVQ

SCALES = (1, 2, 3, 4)
CLASS_NAMES = {0: "ankle boot", 1: "bag", 2: "sneaker"}


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Fill every parameter from its name, none of them left at zero, where a mistake could hide."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if "log_scale" in name:
            noise = math.log(4) + 0.1 * noise
        elif name.endswith("A_log"):  # some heads of a scan forget within two tokens, others after ten
            noise = noise - 1
        elif parameter.ndim >= 2:
            noise = noise / parameter[0].numel() ** 0.5
        else:
            noise = 0.1 * noise + ("norm" in name and name.endswith("weight"))
        parameter.copy_(noise)
    return module.eval().requires_grad_(False)


TOKENIZER: dict[str, Any] = {
    "scales": SCALES,
    "vocab_size": 16,
    "code_dim": 4,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (1,),
    "norm_groups": 4,
}


def tiny_tokenizer(**changes: Any) -> MultiScaleVQ:
    """8 x 8 images, 30 tokens on four scales, 16 codes of width 4."""
    return randomise(MultiScaleVQ(**(TOKENIZER | changes)))


def tiny_frequency(**changes: Any) -> FrequencyVQ:
    """The same in frequency bands, with the same weights."""
    return randomise(FrequencyVQ(**(TOKENIZER | changes)))


TRANSFORMER: dict[str, Any] = {  # for `tiny_tokenizer`, three classes
    "scales": SCALES,
    "vocab_size": 16,
    "code_dim": 4,
    "num_classes": 3,
    "width": 32,
    "depth": 2,
    "heads": 2,
}


def tiny_generator(**changes: Any) -> VAR:
    """Two blocks of width 32 for `tiny_tokenizer`, three classes."""
    return randomise(VAR(**(TRANSFORMER | changes)))


def tiny_mvar(**changes: Any) -> MVAR:
    """The same for M-VAR, whose scans have four heads of width 16."""
    return randomise(MVAR(**(TRANSFORMER | {"mamba_head_width": 16, "state_size": 8} | changes)))


def tiny_pipeline(tokenizer: MultiScaleVQ | None = None, generator: VAR | MVAR | None = None) -> NextScalePipeline:
    """A pipeline of the two, with class names."""
    pipeline = NextScalePipeline(tokenizer or tiny_tokenizer(), generator or tiny_generator(), id2label=CLASS_NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_tokens(tokenizer: MultiScaleVQ, batch: int, seed: int = 0) -> list[Tensor]:
    """Uniform tokens of every scale, (batch, n_k) each."""
    rng = torch.Generator().manual_seed(seed)
    vocab_size = tokenizer.config["vocab_size"]
    return [torch.randint(vocab_size, (batch, side * side), generator=rng) for side in tokenizer.scales]


def random_images(tokenizer: MultiScaleVQ, batch: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Images (batch, channels, S, S) in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    size = tokenizer.image_size
    return torch.rand(batch, channels, size, size, generator=rng) * 2 - 1


def tiny_recurrent(**changes: Any) -> RecurrentTransformer:
    """Sixteen tokens of eleven codes, four blocks of width 32; random weights that tell tokens apart."""
    config: dict[str, Any] = {
        "num_tokens": 16,
        "vocab_size": 11,
        "num_classes": 3,
        "width": 32,
        "heads": 2,
        "mlp_width": 48,
        "recurrences": 6,
        "grid": 4,
        "rope_base": 100.0,
    }
    model = RecurrentTransformer(**(config | changes))
    torch.manual_seed(0)
    model.init_weights()
    with torch.no_grad():
        model.token_embed.weight.mul_(3)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "qk_bias" in name:
                parameter.normal_(std=0.3)
    return model.eval().requires_grad_(False)
