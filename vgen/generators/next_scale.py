"""What transformers of the next-scale families share: the outer skeleton, adaptive layer norm, attention, feed-forward.

Reads what a tokenizer's `context` gives and predicts token maps, coarse to fine (VAR, 2404.02905). Knows nothing of
codebooks, images or sampling. Families (var.py, mvar.py) bring their blocks.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vgen.layers import Linear, linear
from vgen.types import SettingError

MAX_LOG_SCALE = 4.605170185988092  # log 100
PLAIN_SCALE = 0.25  # published softmax scale without q/k norm: 0.25 / sqrt(head_dim)
# Queries, keys and values (B, H, L, D / H) and the softmax scale -> what each query attends to (B, H, L, D / H).
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Condition:
    """All that depends on the class alone, computed once per call.

    start (B, D); blocks: per block (3 n, B, 1, D) for n branches: their gates, their scales with 1 added, their
    shifts; head (2, B, 1, D): scale (1 added) and shift. Modulations have the residual stream's dtype.
    """

    start: Tensor
    blocks: list[Tensor]
    head: Tensor


class Attention(nn.Module):
    """Multi-head attention with VAR's parameters; with `qk_norm` queries and keys are unit vectors and each head
    learns its temperature. Which keys a query sees, the caller decides."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))  # keys have no bias
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), 4.0).log()) if qk_norm else None

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        batch, length, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D / H) each
        if self.log_scale is None:
            scale = PLAIN_SCALE * q.shape[-1] ** -0.5
        else:
            scale = 1.0
            temperature = self.log_scale.to(torch.promote_types(q.dtype, torch.float32)).clamp_max(MAX_LOG_SCALE).exp()
            q = unit(q) * temperature.to(q.dtype)
            k = unit(k)
        attended = attend(q, k, v, scale)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True))


class AdaptiveBlock(nn.Module):
    """Branches that are each modulated and gated by the class (adaLN), on a stream of at least float32."""

    def __init__(self, width: int, branches: int, shared_adaln: bool, drop_path: float) -> None:
        super().__init__()
        self.branches, self.drop_path = branches, drop_path
        if shared_adaln:
            self.adaln_table = nn.Parameter(torch.zeros(3 * branches, width))
        else:
            self.adaln = Linear(width, 3 * branches * width)

    def modulation(self, activated: Tensor, shared: Tensor | None, stream: torch.dtype) -> Tensor:
        """The block's (3 n, B, 1, D) from SiLU of the class vector (B, D) or from the shared layer's (B, 3 n D)."""
        rows = self.adaln(activated) if shared is None else shared + self.adaln_table.flatten()
        gates, scales, shifts = rows.to(stream).unflatten(-1, (3, self.branches, 1, -1)).movedim(0, 2).unbind()
        return torch.cat([gates, scales + 1, shifts])

    def add(self, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        """x + gate * branch, dropping the branch for whole samples in training (stochastic depth)."""
        if self.training and self.drop_path:
            keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
            gate = gate * keep / (1 - self.drop_path)
        return x + branch.to(x.dtype) * gate


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without parameters, then scale and shift: (B, L, D), (B, 1, D) x 2 -> (B, L, D)."""
    # Not fused into an addcmul: `more_smooth` amplifies the last bit, and this is the published order of rounding.
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis."""
    return F.normalize(x, dim=-1, eps=1e-12)


class NextScaleTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The skeleton: embeddings, class conditioning and head around a family's blocks.

    Args:
        scales: side of the square token map at each scale, as the tokenizer's.
        vocab_size: number of codes, V.
        code_dim: width of the tokenizer's codes, C.
        num_classes: classes; one more embedding serves the unconditional branch.
        width: D; depth: blocks; heads: attention heads.
        shared_adaln: one modulation layer for all blocks and a table per block, as in the published 512 px model.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first; training only.
        block: makes a block, given its rate of stochastic depth.
    """

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
        shared_adaln: bool,
        drop_path: float,
        block: Callable[[float], AdaptiveBlock],
    ) -> None:
        super().__init__()
        if width % heads:
            raise SettingError(f"width {width} is not a multiple of heads {heads}")
        self.scales = tuple(scales)
        self.lengths = [side * side for side in self.scales]
        self.num_tokens = sum(self.lengths)
        self.null_class = num_classes
        self.code_embed = Linear(code_dim, width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.start_position = nn.Parameter(torch.zeros(self.lengths[0], width))
        self.position = nn.Parameter(torch.zeros(self.num_tokens, width))
        self.scale_embed = nn.Embedding(len(self.scales), width)
        blocks = [block(drop_path * i / max(depth - 1, 1)) for i in range(depth)]
        self.adaln = Linear(width, 3 * blocks[0].branches * width) if shared_adaln else None
        self.blocks: Sequence[Any] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.head_adaln = Linear(width, 2 * width)
        self.head = Linear(width, vocab_size)

    # ---- what families provide

    @abstractmethod
    def new_cache(self, batch: int) -> Any:
        """State for one call over `batch` rows (guidance needs two per sample), with `length`, the tokens it has
        seen, and `advance`."""

    @abstractmethod
    def run_blocks(self, x: Tensor, modulations: list[Tensor], cache: Any) -> Tensor:
        """The residual stream (B, n, D) through all blocks: the first scales for None, else the next one."""

    # ---- what they share

    @property
    def stream(self) -> torch.dtype:
        """dtype of the residual stream and of the logits: at least float32."""
        return torch.promote_types(self.head.weight.dtype, torch.float32)

    def condition(self, class_labels: Tensor) -> Condition:
        """Class ids (B,), `null_class` for unconditional rows -> everything that depends on them alone."""
        start = self.class_embed(class_labels.to(self.class_embed.weight.device))
        activated = F.silu(start)
        shared = None if self.adaln is None else self.adaln(activated)
        head = self.head_adaln(activated).to(self.stream).unflatten(-1, (2, 1, -1)).transpose(0, 1)
        head = torch.stack([head[0] + 1, head[1]])
        return Condition(start, [block.modulation(activated, shared, self.stream) for block in self.blocks], head)

    def forward(self, context: Tensor, condition: Condition | Tensor, cache: Any = None) -> Tensor:
        """Logits (B, n, V) float32.

        Without a cache: teacher-forced logits of the first scales, as many as `context` (B, n_1 + ... + n_k, C)
        provides for; later scales never influence earlier ones. With a cache: logits of the next scale, given its
        own context (B, n_k, C); the first scale's context is not read and may be empty. `condition` may be class
        ids (B,).
        """
        if isinstance(condition, Tensor):
            condition = self.condition(condition)
        x = self.run_blocks(self._embed(context, condition, cache), condition.blocks, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.head(modulate(x, *condition.head).to(self.head.weight.dtype)).to(self.stream)

    def _embed(self, context: Tensor, condition: Condition, cache: Any) -> Tensor:
        """The residual stream (B, n, D) float32 at its beginning."""
        start = 0 if cache is None else cache.length
        parts = []
        if start == 0:
            parts.append(condition.start.to(self.stream)[:, None] + self.start_position.to(self.stream))
        if start or cache is None:
            parts.append(self.code_embed(context.to(self.code_embed.weight.dtype)).to(self.stream))
        x = torch.cat(parts, dim=1)
        place = slice(start, start + x.shape[1])
        scale = self.scale_embed(self._scale_ids(x.device)[place])
        return x + self.position[place].to(self.stream) + scale.to(self.stream)

    def _scale_ids(self, device: torch.device) -> Tensor:
        """The number of the scale at each position, (L,)."""
        return torch.arange(len(self.scales)).repeat_interleave(torch.tensor(self.lengths)).to(device)

    @torch.no_grad()
    def init_weights(self, gate: float = 1e-3) -> None:
        """Initialise for training as published: normal with std sqrt(1 / 3D), small head, the first two gates scaled
        by `gate` (VAR's two; in M-VAR the third, the feed-forward's, starts open)."""
        width, depth = self.config["width"], self.config["depth"]
        std = (1 / width / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.start_position, self.position):
            nn.init.trunc_normal_(table, std=std)
        self.head.weight.mul_(0.02)
        self.head_adaln.weight.mul_(0.5)
        for block in self.blocks:
            block.attn.proj.weight.div_((2 * depth) ** 0.5)
            block.ffn.fc2.weight.div_((2 * depth) ** 0.5)
            if self.adaln is not None:
                nn.init.normal_(block.adaln_table, std=width**-0.5)
            rows = block.adaln.weight if self.adaln is None else block.adaln_table
            rows = rows.view(3 * block.branches, -1)
            rows[:2].mul_(gate)
            rows[2:].mul_(0.5)
