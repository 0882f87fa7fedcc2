"""M-VAR: next-scale prediction with attention inside each scale and Mamba-2 across scales (2411.10433).

The state of the scan is carried from scale to scale, which is exact: it replaces VAR's key-value cache, and does not
grow.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vgen.generators.next_scale import AdaptiveBlock, Attention, FeedForward, NextScaleTransformer, modulate
from vgen.layers import Linear, attention
from vgen.scan import METHODS, scan
from vgen.types import SettingError


class ScanCache:
    """What Mamba carries from scale to scale in every block, for one call: the state of the scan, (blocks, B, H, P, N)
    in at least float32, and the last columns that the convolution will need, (blocks, B, conv_width - 1, D_conv).

    `length` tokens have been seen. The memory is that of one token's state, however many there are.
    """

    def __init__(self, states: Tensor, columns: Tensor) -> None:
        self.states, self.columns, self.length = states, columns, 0

    def advance(self, count: int) -> None:
        """Count tokens as seen, once every block has dealt with them."""
        self.length += count


class Mamba(nn.Module):
    """Mamba-2 (2405.21060) with one group of heads: projection, causal convolution, scan, gated norm, projection.

    The order of projected rows is gate z, input x, B, C, step size dt.
    """

    def __init__(self, width: int, inner: int, head_width: int, state_size: int, conv_width: int) -> None:
        super().__init__()
        self.heads, self.state_size = inner // head_width, state_size
        mixed = inner + 2 * state_size  # what the convolution sees: x, B and C
        self.in_proj = Linear(width, inner + mixed + self.heads, bias=False)
        self.conv = nn.Conv1d(mixed, mixed, conv_width, groups=mixed)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cache: ScanCache | None, layer: int, method: str) -> Tensor:
        """x (B, n, D) -> (B, n, D), going on from the cache's state of this layer, or from nothing."""
        inner, mixed = self.norm.weight.numel(), self.conv.bias.numel()  # type: ignore[union-attr]
        z, xBC, dt = self.in_proj(x).split([inner, mixed, self.heads], dim=-1)
        shape = (len(x), self.conv.kernel_size[0] - 1, mixed)
        columns = xBC.new_zeros(shape) if cache is None else cache.columns[layer]
        padded = torch.cat([columns, xBC], dim=1)
        values, B, C = self._convolve(padded).split([inner, self.state_size, self.state_size], dim=-1)
        y, state = scan(
            values.unflatten(-1, (self.heads, -1)),
            F.softplus(dt.to(wide(dt)) + self.dt_bias.to(wide(dt))),
            -self.A_log.to(wide(dt)).exp(),
            B,
            C,
            self.D,
            None if cache is None else cache.states[layer],
            method,
        )
        if cache is not None:
            cache.states[layer] = state
            cache.columns[layer] = padded[:, x.shape[1] :]
        gated = y.flatten(2) * F.silu(z.to(y.dtype))
        normed = F.rms_norm(gated, (inner,), self.norm.weight.to(gated.dtype), self.norm.eps)
        return self.out_proj(normed.to(x.dtype))

    def _convolve(self, padded: Tensor) -> Tensor:
        """SiLU of the causal convolution: (B, n + conv_width - 1, D_conv) -> (B, n, D_conv).

        As a picture one row high: oneDNN then keeps the layout, and in bfloat16 on a CPU is 10 times faster than
        `conv1d`, or 40 times faster than a sum of shifted products.
        """
        weight = self.conv.weight.to(padded.dtype)[:, :, None]  # (D_conv, 1, 1, conv_width)
        bias = self.conv.bias.to(padded.dtype)  # type: ignore[union-attr]
        return F.silu(F.conv2d(padded.mT[:, :, None], weight, bias, groups=len(bias))[:, :, 0].mT)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As published: rates uniform in 1..16, step sizes log-uniform in 0.001..0.1, the convolution almost closed."""
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.A_log.copy_(torch.empty(self.heads).uniform_(1, 16).log())
        dt = torch.empty(self.heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt back
        nn.init.ones_(self.D)


def wide(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)


class Block(AdaptiveBlock):
    """Attention within each scale, Mamba over all tokens so far, and feed-forward."""

    def __init__(
        self, width: int, heads: int, qk_norm: bool, mamba: partial[Mamba], shared_adaln: bool, drop_path: float
    ) -> None:
        super().__init__(width, 3, shared_adaln, drop_path)
        self.attn = Attention(width, heads, qk_norm)
        self.mamba = mamba()
        self.ffn = FeedForward(width, 4 * width)

    def forward(
        self, x: Tensor, modulation: Tensor, lengths: list[int], cache: ScanCache | None, layer: int, method: str
    ) -> Tensor:
        gate1, gate2, gate3, scale1, scale2, scale3, shift1, shift2, shift3 = modulation
        dtype = self.ffn.fc1.weight.dtype
        within = partial(_within_scales, lengths)
        x = self.add(x, gate1, self.attn(modulate(x, scale1, shift1).to(dtype), within))
        x = self.add(x, gate2, self.mamba(modulate(x, scale2, shift2).to(dtype), cache, layer, method))
        return self.add(x, gate3, self.ffn(modulate(x, scale3, shift3).to(dtype)))


def _within_scales(lengths: list[int], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Each scale attends to itself alone."""
    parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
    return torch.cat([attention(*part, None, scale) for part in parts], dim=2)


class MVAR(NextScaleTransformer):
    """The M-VAR transformer.

    Args:
        scales: side of the square token map at each scale, as the tokenizer's.
        vocab_size: number of codes, V.
        code_dim: width of the tokenizer's codes, C.
        num_classes: classes; one more embedding serves the unconditional branch.
        width: D; depth: blocks; heads: attention heads.
        qk_norm: unit-length queries and keys with a learned temperature per head.
        shared_adaln: one modulation layer for all blocks and a table per block.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first; training only.
        expand: Mamba's inner width by D. mamba_head_width: P; state_size: N; conv_width: of its convolution.
        scan_method: as vgen.scan.scan's `method`.
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
        expand: int = 2,
        mamba_head_width: int = 64,
        state_size: int = 64,
        conv_width: int = 4,
        scan_method: str = "auto",
    ) -> None:
        if expand * width % mamba_head_width:
            raise SettingError(
                f"Mamba's inner width {expand * width} is not a multiple of mamba_head_width {mamba_head_width}"
            )
        if scan_method not in METHODS:
            raise SettingError(f"unknown scan_method {scan_method!r}: use one of {', '.join(METHODS)}")
        mamba = partial(Mamba, width, expand * width, mamba_head_width, state_size, conv_width)
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
            block=partial(Block, width, heads, qk_norm, mamba, shared_adaln),
        )
        self.scan_method = scan_method

    def new_cache(self, batch: int) -> ScanCache:
        """The state before the first scale, for one call over `batch` rows (guidance needs two per sample)."""
        mamba, weight, layers = self.blocks[0].mamba, self.head.weight, len(self.blocks)
        inner, mixed = mamba.norm.weight.numel(), mamba.conv.bias.numel()
        state = (layers, batch, mamba.heads, inner // mamba.heads, mamba.state_size)
        columns = (layers, batch, mamba.conv.kernel_size[0] - 1, mixed)
        return ScanCache(
            torch.zeros(state, device=weight.device, dtype=self.stream),
            torch.zeros(columns, device=weight.device, dtype=weight.dtype),
        )

    def run_blocks(self, x: Tensor, modulations: list[Tensor], cache: ScanCache | None) -> Tensor:
        lengths = [x.shape[1]] if cache is not None else self._lengths_of(x.shape[1])
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            x = block(x, modulation, lengths, cache, layer, self.scan_method)
        return x

    def _lengths_of(self, tokens: int) -> list[int]:
        """Lengths of the scales that make up the first `tokens` tokens."""
        found: list[int] = []
        while sum(found) < tokens:
            found.append(self.lengths[len(found)])
        return found

    @torch.no_grad()
    def init_weights(self, gate: float = 1e-3) -> None:
        """Fresh weights as VAR has them (`NextScaleTransformer.init_weights`), and those of Mamba-2."""
        super().init_weights(gate)
        for block in self.blocks:
            block.mamba.init_weights()
