"""What several generators share: linear layers and attention that are fast on any device, and the key-value cache."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# PyTorch's own entry to oneDNN, which its compiler uses; absent from builds without oneDNN.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
ONEDNN_TYPES = [torch.float32]
if ONEDNN_LINEAR is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # not on processors before AVX512
    ONEDNN_TYPES.append(torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x W^T + b, then a tanh-approximated GELU where asked for: (..., D_in) -> (..., D_out).

    Without gradients on a CPU it calls oneDNN directly, which fuses the GELU and, on AMD's AVX512 cores, multiplies
    float32 matrices 2.3 times faster than the MKL that PyTorch ships with.
    """
    usual = torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != weight.dtype
    if ONEDNN_LINEAR is not None and not usual and x.dtype in ONEDNN_TYPES:
        return ONEDNN_LINEAR(x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


class Linear(nn.Linear):
    """`torch.nn.Linear` by way of `linear`."""

    def forward(self, input: Tensor, gelu: bool = False) -> Tensor:
        """(..., in) -> (..., out), with GELU (its tanh form) on request."""
        return linear(input, self.weight, self.bias, gelu)


SMALL_SCORES = 1 << 17  # entries of one sample's score matrix below which the plain form is no slower in float32


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention: q (B, H, M, D), k and v (B, H, N, D) -> (B, H, M, D).

    `mask` (M, N) is bool, True where allowed, or of q's dtype, added to the scores.

    On a CPU in bfloat16 the plain matrix form is 2.2 times faster than SDPA, training or not (one AVX512-BF16 core);
    in float32 SDPA wins as soon as the scores outgrow the cache. The choice never depends on the batch size, so that
    a row of a batch is computed as it is alone.
    """
    scores_per_sample = q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type != "cpu" or (q.dtype != torch.bfloat16 and scores_per_sample > SMALL_SCORES):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q if scale == 1 else q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def rotations(axis: int, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Unit complex numbers (n, axis / 2) that rotate the pairs of an axis by its positions (n,) (RoPE, 2104.09864), in
    float64: position 100,000 is as exact as position 0."""
    frequencies = base ** (-2 * torch.arange(axis // 2, dtype=torch.float64) / axis)
    angles = positions.double()[:, None] * frequencies
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels (2j, 2j + 1) of x (..., d) by angles (..., d / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class KVCache:
    """Keys and values of every layer for one call, preallocated: (layers, B, H, L, D) each.

    `length` positions are filled. Layers write at `length` and the generator calls `advance` once all have written.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.keys = torch.empty(layers, batch, heads, length, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, n, D) of a layer; returns views of all its keys and values so far."""
        stop = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : stop] = k
        self.values[layer, :, :, self.length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, count: int) -> None:
        """Count tokens as kept, once every layer has stored them."""
        self.length += count
