"""MAR: masked autoregression over continuous tokens, an encoder of what is known, a decoder of all (2406.11838).

The transformer gives every position a condition, and its diffusion head draws the token from that. Knows nothing of
tokenizers or samplers. Besides whole evaluations it makes partial ones: of some tokens alone, against the keys and
values that all others had in the last whole one (ReCAP, 2505.19089).
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vgen.generators.diffusion_head import DiffusionHead
from vgen.generators.masked import MaskedCache
from vgen.layers import Linear, attention
from vgen.types import SettingError


class MARCache:
    """Both stacks' keys and values, and which of the encoder's slots hold a token: masked ones are not encoded."""

    def __init__(self, encoder: MaskedCache, decoder: MaskedCache) -> None:
        self.encoder, self.decoder = encoder, decoder
        _, batch, _, slots, _ = encoder.keys.shape
        self.encoded = torch.zeros(batch, slots, device=encoder.keys.device, dtype=torch.bool)
        self.filled = False  # by a whole evaluation


class Block(nn.Module):
    """Pre-norm attention and MLP: (B, L, W) -> (B, L, W)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = Linear(width, mlp_ratio * width)
        self.fc2 = Linear(mlp_ratio * width, width)

    def forward(
        self, x: Tensor, cache: MaskedCache | None, layer: int, slots: Tensor, partial: bool, mask: Tensor | None
    ) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        if cache is not None:
            keys, values = cache.update(layer, slots, k, v)
            if partial:  # a whole evaluation has all there is to attend to at hand
                k, v = keys, values
        attended = attention(q, k, v, mask)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class MAR(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Continuous tokens, some of them masked, to a condition at every position; `head` draws tokens from conditions.

    Args:
        num_tokens: tokens of an image, N.
        token_dim: width of a token, C.
        num_classes: classes; the id of the null class, for guidance, is `num_classes`.
        width: width of the residual stream and of conditions, W.
        encoder_depth, decoder_depth: blocks of either stack.
        heads: attention heads.
        mlp_ratio: width of the MLPs relative to W.
        buffer_tokens: copies of the class embedding in front of the tokens, in both stacks.
        diffusion_width, diffusion_depth: size of the diffusion head.
    """

    @register_to_config
    def __init__(
        self,
        *,
        num_tokens: int,
        token_dim: int,
        num_classes: int,
        width: int,
        encoder_depth: int,
        decoder_depth: int,
        heads: int,
        mlp_ratio: int = 4,
        buffer_tokens: int = 64,
        diffusion_width: int,
        diffusion_depth: int,
    ) -> None:
        super().__init__()
        if width % heads:
            raise SettingError(f"width {width} is not a multiple of heads {heads}")
        if buffer_tokens < 1:
            raise SettingError(f"buffer_tokens is {buffer_tokens}: it must be at least 1, they carry the class")
        self.null_class, self.buffer = num_classes, buffer_tokens
        slots = buffer_tokens + num_tokens
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.token_embed = Linear(token_dim, width)
        self.encoder_position = nn.Parameter(torch.zeros(slots, width))
        self.token_norm = nn.LayerNorm(width, eps=1e-6)
        self.encoder_blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.decoder_position = nn.Parameter(torch.zeros(slots, width))
        self.decoder_blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.head_position = nn.Parameter(torch.zeros(num_tokens, width))
        self.head = DiffusionHead(token_dim, width, diffusion_width, diffusion_depth)

    def new_cache(self, batch: int) -> MARCache:
        """Preallocated state for evaluations of `batch` rows."""
        config, weight = self.config, self.mask_token

        def stack(depth: int) -> MaskedCache:
            slots, head_width = self.buffer + config["num_tokens"], config["width"] // config["heads"]
            return MaskedCache((depth, batch, config["heads"], slots, head_width), weight.device, weight.dtype)

        return MARCache(stack(config["encoder_depth"]), stack(config["decoder_depth"]))

    def forward(
        self,
        tokens: Tensor,
        known: Tensor,
        class_labels: Tensor,
        positions: Tensor | None = None,
        cache: MARCache | None = None,
        cache_buffer: bool = False,
    ) -> Tensor:
        """Conditions (B, n, W) of tokens (B, n, C) of classes (B,); what masked tokens hold makes no difference.

        Without `positions` all N tokens are given, and a cache is filled. With `positions` (B, n) these tokens alone
        are evaluated, and the buffer unless `cache_buffer`: all others take part as keys and values of the cache, as
        they were at the last whole evaluation; those of the given tokens are replaced.

        Args:
            known: (B, n) bool, equally many in every row: masked tokens are left out of the encoder. Which tokens
                outside a partial evaluation's group are known, the cache tells.

        Raises SettingError where shapes or counts do not fit.
        """
        self._check(tokens, known, positions, cache)
        partial = positions is not None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        slots = positions + self.buffer
        start = torch.arange(0 if partial and cache_buffer else self.buffer, device=slots.device)
        start = start.expand(len(slots), -1)
        seen = _known_columns(known)
        if cache is not None:
            if not partial:
                cache.encoded[:, : self.buffer] = True
            cache.encoded.scatter_(1, slots, known)
        encoded = self._encode(tokens, class_labels, seen, torch.cat([start, slots.gather(1, seen)], 1), partial, cache)
        x = self.decoder_embed(encoded) if encoded.shape[1] else encoded
        length = start.shape[1]
        masked = self.mask_token.expand(*slots.shape, -1)
        given = masked.scatter(1, seen[..., None].expand(-1, -1, x.shape[-1]), x[:, length:])
        every = torch.cat([start, slots], 1)
        x = torch.cat([x[:, :length], given], 1) + self.decoder_position[every]
        x = self._stack(self.decoder_blocks, x, every, partial, None if cache is None else cache.decoder, None)
        if cache is not None:
            cache.filled = True
        return self.decoder_norm(x)[:, length:] + self.head_position[positions]

    def _encode(
        self,
        tokens: Tensor,
        class_labels: Tensor,
        seen: Tensor,
        slots: Tensor,
        partial: bool,
        cache: MARCache | None,
    ) -> Tensor:
        """What the encoder makes of the buffer and of the known tokens, which are those in columns `seen` (B, m):
        (B, L, W) for `slots` (B, L), the buffer's, where it is evaluated, in front."""
        if not slots.shape[1]:  # the buffer is cached, and none of the tokens known
            return self.mask_token.new_empty(*slots.shape, self.mask_token.shape[0])
        picked = tokens.gather(1, seen[..., None].expand(-1, -1, tokens.shape[-1])).to(self.mask_token.dtype)
        buffer = self.class_embed(class_labels)[:, None].expand(-1, slots.shape[1] - seen.shape[1], -1)
        x = torch.cat([buffer, self.token_embed(picked)], 1) if seen.shape[1] else buffer
        x = self.token_norm(x + self.encoder_position[slots])
        mask = cache.encoded[:, None, None] if partial and cache is not None else None
        stack = None if cache is None else cache.encoder
        return self.encoder_norm(self._stack(self.encoder_blocks, x, slots, partial, stack, mask))

    @staticmethod
    def _stack(
        blocks: nn.ModuleList, x: Tensor, slots: Tensor, partial: bool, cache: MaskedCache | None, mask: Tensor | None
    ) -> Tensor:
        for layer, block in enumerate(blocks):
            x = block(x, cache, layer, slots, partial, mask)
        return x

    def _check(self, tokens: Tensor, known: Tensor, positions: Tensor | None, cache: MARCache | None) -> None:
        count, width = self.config["num_tokens"], self.config["token_dim"]
        if tokens.ndim != 3 or tokens.shape[2] != width:
            raise SettingError(f"tokens have shape {tuple(tokens.shape)}, the model takes (B, n, {width})")
        if known.shape != tokens.shape[:2]:
            raise SettingError(f"known has shape {tuple(known.shape)}, tokens {tuple(tokens.shape)}")
        if positions is None:
            if tokens.shape[1] != count:
                raise SettingError(f"{tokens.shape[1]} tokens were given, the model takes {count}")
            return
        if cache is None or not cache.filled:
            raise SettingError("a partial evaluation needs the cache of a whole one: call without positions first")
        if positions.shape != known.shape:
            raise SettingError(f"positions have shape {tuple(positions.shape)}, tokens {tuple(tokens.shape)}")


def _known_columns(known: Tensor) -> Tensor:
    """Columns of the known tokens in each row of (B, n), ascending: (B, m). Raises SettingError for unequal rows."""
    counts = known.sum(1).tolist()
    if len(set(counts)) > 1:
        raise SettingError(f"rows with {min(counts)} and {max(counts)} known tokens: MAR takes equally many in each")
    return (~known).byte().argsort(dim=1, stable=True)[:, : counts[0] if counts else 0]
