"""VAR: next-scale prediction with a block-causal transformer (2404.02905)."""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vgen.generators.next_scale import AdaptiveBlock, Attend, Attention, FeedForward, NextScaleTransformer, modulate
from vgen.layers import KVCache, attention


class Block(AdaptiveBlock):
    """Attention over this scale and all before it, and feed-forward."""

    def __init__(self, width: int, heads: int, qk_norm: bool, shared_adaln: bool, drop_path: float) -> None:
        super().__init__(width, 2, shared_adaln, drop_path)
        self.attn = Attention(width, heads, qk_norm)
        self.ffn = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, modulation: Tensor, attend: Attend) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        dtype = self.ffn.fc1.weight.dtype
        x = self.add(x, gate1, self.attn(modulate(x, scale1, shift1).to(dtype), attend))
        return self.add(x, gate2, self.ffn(modulate(x, scale2, shift2).to(dtype)))


class VAR(NextScaleTransformer):
    """The VAR transformer.

    Args:
        scales: side of the square token map at each scale, as the tokenizer's.
        vocab_size: number of codes, V.
        code_dim: width of the tokenizer's codes, C.
        num_classes: classes; one more embedding serves the unconditional branch.
        width: D; depth: blocks; heads: attention heads.
        qk_norm: unit-length queries and keys with a learned temperature per head.
        shared_adaln: one modulation layer for all blocks and a table per block, as in the published 512 px model.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first; training only.
    """

    @register_to_config
    def __init__(
        self,
        *,
        scales: Sequence[int],
        vocab_size: int,
        code_dim: int,
        num_classes: int,
        width: int,
        depth: int,
        heads: int,
        qk_norm: bool = True,
        shared_adaln: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            scales=scales,
            vocab_size=vocab_size,
            code_dim=code_dim,
            num_classes=num_classes,
            width=width,
            depth=depth,
            heads=heads,
            shared_adaln=shared_adaln,
            drop_path=drop_path,
            block=partial(Block, width, heads, qk_norm, shared_adaln),
        )

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for one call over `batch` rows (guidance needs two per sample)."""
        width, heads, weight = self.config["width"], self.config["heads"], self.head.weight
        layers = len(self.blocks)
        return KVCache(layers, batch, heads, self.num_tokens, width // heads, weight.device, weight.dtype)

    def run_blocks(self, x: Tensor, modulations: list[Tensor], cache: KVCache | None) -> Tensor:
        mask = None if cache is not None else self.mask(x.shape[1], x.device)
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            x = block(x, modulation, partial(_attend, mask, cache, layer))
        return x

    def mask(self, length: int, device: torch.device) -> Tensor:
        """(length, length) bool: a token sees its own scale and the ones before it."""
        scale = self._scale_ids(device)[:length]
        return scale[:, None] >= scale[None, :]


def _attend(
    mask: Tensor | None, cache: KVCache | None, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """Attention of a whole pass under its mask, or of one scale to everything in the cache."""
    if cache is not None:
        k, v = cache.update(layer, k, v)
    return attention(q, k, v, mask, scale)
