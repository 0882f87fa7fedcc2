"""The bidirectional masked-token transformer of AutoNAT and ReCAP's MaskGIT: a U-ViT over code tokens (2202.04200).

Knows nothing of tokenizers or samplers. Besides whole evaluations it makes partial ones: of some tokens alone, against
the keys and values that all others had in the last whole one (ReCAP, 2505.19089).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vgen.layers import Linear, attention, linear
from vgen.types import SettingError


class MaskedCache:
    """Keys and values of a stack of blocks, a slot for what stands in front and each token: (blocks, B, H, L, D)."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.filled = False  # by a whole evaluation

    def update(self, layer: int, slots: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, n, D) at `slots` (B, n), everywhere for None; returns those of all slots."""
        keys, values = self.keys[layer], self.values[layer]
        if slots is None:
            keys.copy_(k)
            values.copy_(v)
        else:
            index = slots[:, None, :, None].expand_as(k)
            keys.scatter_(2, index, k)
            values.scatter_(2, index, v)
        return keys, values


class Block(nn.Module):
    """Pre-norm attention and MLP; an out block first joins what its in block gave: (B, L, W) -> (B, L, W)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.skip_linear = Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = Linear(width, mlp_ratio * width)
        self.fc2 = Linear(mlp_ratio * width, width)

    def forward(
        self, x: Tensor, skip: Tensor | None, cache: MaskedCache | None, layer: int, slots: Tensor | None
    ) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        if cache is not None:
            k, v = cache.update(layer, slots, k, v)
        attended = attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class MaskedTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Tokens, some of them masked, to logits over the codes at every position.

    Args:
        num_tokens: tokens of an image, N.
        vocab_size: number of codes, V; the mask's id is V.
        num_classes: classes; the id of the null class, for guidance, is `num_classes`.
        width: width of the residual stream, W.
        depth: blocks, odd: as many in blocks as out blocks, and one between them.
        heads: attention heads.
        mlp_ratio: width of the MLPs relative to W.
        dropout: of the embeddings, in training.
        train_tied_head: the head multiplies by the codes' embeddings; whether that use trains them too. The published
            model's does not; small models learn far faster when it does.
    """

    @register_to_config
    def __init__(
        self,
        *,
        num_tokens: int,
        vocab_size: int,
        num_classes: int,
        width: int = 768,
        depth: int = 25,
        heads: int = 8,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        train_tied_head: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1 or depth % 2 == 0:
            raise SettingError(f"depth is {depth}: it must be odd, as many in blocks as out blocks and one between")
        if width % heads:
            raise SettingError(f"width {width} is not a multiple of heads {heads}")
        self.null_class, self.mask_token_id, self.dropout = num_classes, vocab_size, dropout
        self.token_embed = nn.Embedding(vocab_size + 1, width)
        self.position = nn.Parameter(torch.zeros(num_tokens, width))
        self.token_norm = nn.LayerNorm(width, eps=1e-6)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.class_position = nn.Parameter(torch.zeros(width))
        self.class_norm = nn.LayerNorm(width, eps=1e-6)
        half = depth // 2
        ins = [Block(width, heads, mlp_ratio, skip=False) for _ in range(half)]
        outs = [Block(width, heads, mlp_ratio, skip=True) for _ in range(half)]
        self.in_blocks: Sequence[Block] = nn.ModuleList(ins)  # type: ignore[assignment]
        self.mid_block = Block(width, heads, mlp_ratio, skip=False)
        self.out_blocks: Sequence[Block] = nn.ModuleList(outs)  # type: ignore[assignment]
        self.norm = nn.LayerNorm(width)
        self.head_fc = Linear(width, width)
        self.head_norm = nn.LayerNorm(width)
        self.head_bias = nn.Parameter(torch.zeros(vocab_size + 1))

    def new_cache(self, batch: int) -> MaskedCache:
        """Preallocated state for evaluations of `batch` rows."""
        config, weight = self.config, self.token_embed.weight
        head_width = config["width"] // config["heads"]
        shape = (config["depth"], batch, config["heads"], config["num_tokens"] + 1, head_width)
        return MaskedCache(shape, weight.device, weight.dtype)

    def forward(
        self,
        tokens: Tensor,
        class_labels: Tensor,
        positions: Tensor | None = None,
        cache: MaskedCache | None = None,
    ) -> Tensor:
        """Logits (B, n, V) float32 of tokens (B, n) of classes (B,).

        Without `positions` all N tokens are given, and a cache is filled. With `positions` (B, n) these tokens alone
        are evaluated, and the class token: all others take part as keys and values of the cache, as they were at the
        last whole evaluation; those of the given tokens are replaced. Raises SettingError where shapes do not fit.
        """
        slots = slots_of(tokens, positions, self.config["num_tokens"], cache is not None and cache.filled)
        place = self.position if positions is None else self.position[positions]
        x = self.token_norm(self.token_embed(tokens) + place)
        start = self.class_norm(self.class_embed(class_labels) + self.class_position)
        x = F.dropout(torch.cat([start[:, None], x], 1), self.dropout, self.training)
        skips: list[Tensor] = []
        for layer, (block, kind) in enumerate(self._blocks()):
            x = block(x, skips.pop() if kind == "out" else None, cache, layer, slots)
            if kind == "in":
                skips.append(x)
        if cache is not None:
            cache.filled = True
        h = self.head_norm(F.gelu(self.head_fc(self.norm(x[:, 1:]))))
        codes = self.token_embed.weight if self.config["train_tied_head"] else self.token_embed.weight.detach()
        return linear(h, codes, self.head_bias)[..., : self.mask_token_id].float()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise for training: normal with std 0.02, what joins the residual stream scaled down by depth."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.position, self.class_position):
            nn.init.trunc_normal_(table, std=0.02)
        for block, _ in self._blocks():
            for joining in (block.proj, block.fc2):
                joining.weight.div_((2 * self.config["depth"]) ** 0.5)

    def _blocks(self) -> Iterator[tuple[Block, str]]:
        yield from ((block, "in") for block in self.in_blocks)
        yield self.mid_block, "mid"
        yield from ((block, "out") for block in self.out_blocks)


def slots_of(tokens: Tensor, positions: Tensor | None, num_tokens: int, filled: bool) -> Tensor | None:
    """Where the token in front and the given tokens (B, n) stand in a cache, (B, n + 1); None for everywhere.

    Raises SettingError where shapes do not fit, or a partial evaluation has no cache that a whole one `filled`.
    """
    if positions is None:
        if tokens.shape[1] != num_tokens:
            raise SettingError(f"{tokens.shape[1]} tokens were given, the model takes {num_tokens}")
        return None
    if not filled:
        raise SettingError("a partial evaluation needs the cache of a whole one: call without positions first")
    if positions.shape != tokens.shape:
        raise SettingError(f"positions have shape {tuple(positions.shape)}, tokens {tuple(tokens.shape)}")
    return F.pad(positions + 1, (1, 0))
