"""MAGE: an encoder and a decoder over code tokens, some of them masked, without classes (2211.09117).

Knows nothing of tokenizers or samplers. Like the masked transformer it makes whole and partial evaluations; those of
ReCAP (2505.19089) on MAGE were never released, so both stacks keep keys and values here as its paper describes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vgen.generators.masked import Block, MaskedCache, slots_of
from vgen.layers import Linear, linear
from vgen.types import SettingError


@dataclass
class MAGECache:
    """Keys and values of both stacks. The decoder's are written last: they tell whether a whole evaluation was made."""

    encoder: MaskedCache
    decoder: MaskedCache


def _blocks(count: int, width: int, heads: int, mlp_ratio: int) -> nn.ModuleList:
    """Blocks of the masked transformer with what MAGE has of its own: a bias of q, k and v, and epsilons of 1e-6."""
    blocks = [Block(width, heads, mlp_ratio, skip=False) for _ in range(count)]
    for block in blocks:
        block.qkv = Linear(width, 3 * width)
        block.norm1.eps = block.norm2.eps = 1e-6
    return nn.ModuleList(blocks)


class MAGE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Tokens, some of them masked, to logits over the codes at every position.

    The encoder reads all tokens, the masked ones too, behind one start token (the published fake class). The decoder
    reads the encoder's output, but at masked positions that of the start token.

    Args:
        num_tokens: tokens of an image, N.
        vocab_size: number of codes, V; the mask's id is V.
        width: width of the encoder's residual stream, W.
        decoder_width: width of the decoder's.
        encoder_depth, decoder_depth: blocks of each.
        encoder_heads, decoder_heads: attention heads of each.
        mlp_ratio: width of the MLPs relative to their stack's.

    Raises SettingError where a depth is below 1 or a width is no multiple of its heads.
    """

    @register_to_config
    def __init__(
        self,
        *,
        num_tokens: int,
        vocab_size: int,
        width: int = 768,
        decoder_width: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        _check_stack("encoder", encoder_depth, width, encoder_heads)
        _check_stack("decoder", decoder_depth, decoder_width, decoder_heads)
        self.null_class, self.mask_token_id = 0, vocab_size  # there are no classes: every row is unconditional
        self.token_embed = nn.Embedding(vocab_size + 1, width)
        self.start_embed = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(num_tokens + 1, width))  # the start token's first
        self.token_norm = nn.LayerNorm(width, eps=1e-6)
        self.encoder_blocks = _blocks(encoder_depth, width, encoder_heads, mlp_ratio)
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = Linear(width, decoder_width)
        self.decoder_position = nn.Parameter(torch.zeros(num_tokens + 1, decoder_width))
        self.decoder_blocks = _blocks(decoder_depth, decoder_width, decoder_heads, mlp_ratio)
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.head_fc = Linear(decoder_width, width)
        self.head_norm = nn.LayerNorm(width)
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))

    def new_cache(self, batch: int) -> MAGECache:
        """Preallocated state for evaluations of `batch` rows."""
        config, weight = self.config, self.token_embed.weight

        def stack(depth: int, width: int, heads: int) -> MaskedCache:
            shape = (depth, batch, heads, config["num_tokens"] + 1, width // heads)
            return MaskedCache(shape, weight.device, weight.dtype)

        return MAGECache(
            encoder=stack(config["encoder_depth"], config["width"], config["encoder_heads"]),
            decoder=stack(config["decoder_depth"], config["decoder_width"], config["decoder_heads"]),
        )

    def forward(
        self,
        tokens: Tensor,
        class_labels: Tensor | None = None,
        positions: Tensor | None = None,
        cache: MAGECache | None = None,
    ) -> Tensor:
        """Logits (B, n, V) float32 of tokens (B, n); `class_labels` are there for the samplers' sake and not read.

        Without `positions` all N tokens are given, and a cache is filled. With `positions` (B, n) these tokens alone
        are evaluated, and the start token, in both stacks: all others take part as keys and values of the cache, as
        they were at the last whole evaluation; those of the given tokens are replaced. Raises SettingError where
        shapes do not fit.
        """
        filled = cache is not None and cache.decoder.filled
        slots = slots_of(tokens, positions, self.config["num_tokens"], filled)
        masked = F.pad(tokens == self.mask_token_id, (1, 0))[..., None]  # (B, n + 1, 1)
        start = self.start_embed.expand(len(tokens), 1, -1)
        x = torch.cat([start, self.token_embed(tokens)], 1)
        x = self.token_norm(x + _at(self.position, slots))
        x = _run(self.encoder_blocks, x, cache.encoder if cache else None, slots)
        x = self.decoder_embed(self.encoder_norm(x))
        x = torch.where(masked, x[:, :1], x) + _at(self.decoder_position, slots)
        x = _run(self.decoder_blocks, x, cache.decoder if cache else None, slots)
        h = self.head_norm(F.gelu(self.head_fc(self.decoder_norm(x[:, 1:]))))
        return linear(h, self.token_embed.weight[: self.mask_token_id], self.head_bias).float()


def _at(table: Tensor, slots: Tensor | None) -> Tensor:
    """Rows of a table of positions (N + 1, W): (B, n + 1, W), or all of them."""
    return table if slots is None else table[slots]


def _run(blocks: Sequence[Block] | nn.ModuleList, x: Tensor, cache: MaskedCache | None, slots: Tensor | None) -> Tensor:
    """A stack of blocks, its cache filled on the way: (B, L, W) -> (B, L, W)."""
    for layer, block in enumerate(blocks):
        x = block(x, None, cache, layer, slots)
    if cache is not None:
        cache.filled = True
    return x


def _check_stack(name: str, depth: int, width: int, heads: int) -> None:
    if depth < 1:
        raise SettingError(f"{name}_depth is {depth}: it must be at least 1")
    if heads < 1 or width % heads:
        raise SettingError(f"{name}_heads is {heads}: the {name}'s width {width} is no multiple of it")
