"""FAR's blocks: rotation in three axes, tokens of frames, and attention and feed-forward modulated frame by frame.

B batch, F frames, C channels, H W latent sides, N tokens of a frame, D width, L = F N.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.layers import Linear, rotate, rotations

TIME_FEATURES = 256
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys and values (B, heads, L, d) -> attended


def time_features(timesteps: Tensor) -> Tensor:
    """Cosines, then sines, of timesteps (...) at 128 frequencies from 1 to exactly 1e-4: (..., 256)."""
    half = TIME_FEATURES // 2
    steps = torch.arange(half, device=timesteps.device, dtype=timesteps.dtype)
    angles = timesteps[..., None] * torch.exp(-math.log(10_000) / (half - 1) * steps)
    return torch.cat([angles.cos(), angles.sin()], -1)


def token_rotations(axes: Sequence[int], numbers: Sequence[int], side: int, step: int = 1) -> Tensor:
    """Unit complex numbers (L, d / 2) that rotate all tokens' heads by time, row and column.

    Tokens are those of frames `numbers`, in raster order, on a grid of `side` places of which each covers `step` in
    either direction and stands at the first. Computed on the CPU: not every device has float64.
    """
    time_axis, row_axis, column_axis = axes
    places = torch.arange(0, side, step)
    square = (len(places), len(places), -1)
    rows = rotations(row_axis, places)[:, None].expand(square).flatten(0, 1)
    columns = rotations(column_axis, places)[None].expand(square).flatten(0, 1)
    space = torch.cat([rows, columns], -1).expand(len(numbers), -1, -1)
    time = rotations(time_axis, torch.tensor(numbers))[:, None].expand(-1, len(places) ** 2, -1)
    return torch.cat([time, space], -1).flatten(0, 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then scale (1 is added) and shift: (B, F, N, D), (B, F, 1, D) x 2."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale + 1)


def patches(latents: Tensor, size: int) -> Tensor:
    """(B, F, C, H, W) -> (B, F, N, C size^2), channels first inside a token."""
    cut = latents.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # (B, F, C, h, size, w, size)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


def whole(tokens: Tensor, size: int, side: int) -> Tensor:
    """The inverse of `patches`, for latents of `side` rows and columns."""
    grid = tokens.unflatten(3, (-1, size, size)).unflatten(2, (side // size, side // size))
    return grid.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def drop_frames(parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """Tensors (B, F_i, ...) without their first `count` frames in total; those left empty are left out."""
    kept = []
    for part in parts:
        rest = part[:, min(count, part.shape[1]) :]
        count -= part.shape[1] - rest.shape[1]
        if rest.shape[1]:
            kept.append(rest)
    return kept


class Projections(nn.Module):
    """Queries and keys, normalised per head, values, and the way back to the stream."""

    def __init__(self, width: int, heads: int, out: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.norm_q = nn.Parameter(torch.ones(width // heads))
        self.norm_k = nn.Parameter(torch.ones(width // heads))
        self.proj = Linear(width, width) if out else None

    def reset(self) -> None:
        """Initialise queries, keys and values as the three matrices they are."""
        for matrix in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(matrix)
        nn.init.ones_(self.norm_q)
        nn.init.ones_(self.norm_k)

    def forward(self, x: Tensor, stream: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, F, N, D) -> queries and keys (B, F N, 2, heads, d) in the stream's dtype, values (B, F N, heads, d)."""
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        qk = F.rms_norm(qkv[:, :, :2].to(stream), qkv.shape[-1:], eps=1e-6)
        return qk * torch.stack([self.norm_q, self.norm_k])[:, None].to(stream), qkv[:, :, 2]


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by its frame's condition.

    The stream comes in parts (B, F_i, N_i, D), coarse frames (FAR-Long) first, which differ in their projections alone.
    """

    def __init__(self, width: int, heads: int, coarse: bool, last: bool, shared_adaln: bool = False) -> None:
        super().__init__()
        # Shift, scale and gate of attention, then of the feed-forward.
        if shared_adaln:
            self.adaln_table = nn.Parameter(torch.zeros(6, width))
        else:
            self.adaln = Linear(width, 6 * width)
        self.shared_adaln = shared_adaln
        self.attn = Projections(width, heads)
        # Nothing reads what the last block's coarse tokens would add to the stream, so it has no such projection.
        self.context_attn = Projections(width, heads, out=not last) if coarse else None
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(
        self,
        streams: Sequence[Tensor],
        conditions: Sequence[Tensor],
        rotation: tuple[Tensor, Tensor],
        attend: Attend,
        silent: int = 0,
    ) -> list[Tensor]:
        """One part after the other: streams (B, F_i, N_i, D), activated conditions (B, F_i, D), or, where the
        modulation is shared, what its layer made of them (B, F_i, 6 D).

        Of the first `silent` frames nothing but keys and values is wanted: they are absent from what is returned.
        """
        stream, kind = streams[0].dtype, self.fc1.weight.dtype
        modulations = [self._modulation(part, stream) for part in conditions]
        layers = [self.attn] if self.context_attn is None or len(streams) == 1 else [self.context_attn, self.attn]
        projected = [
            layer(modulate(x, m[:, :, 0], m[:, :, 1]).to(kind), stream)
            for layer, x, m in zip(layers, streams, modulations, strict=True)
        ]
        qk, v = (torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*projected, strict=True))
        q, k = rotate(qk, *rotation).to(v.dtype).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        streams, modulations = drop_frames(streams, silent), drop_frames(modulations, silent)
        wanted = [x.shape[1] * x.shape[2] for x in streams]
        attended = attend(q[:, :, q.shape[2] - sum(wanted) :], k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
        layers = layers[len(layers) - len(streams) :]
        results = zip(layers, streams, modulations, attended.split(wanted, 1), strict=True)
        return [self._finish(layer, x, m, y.view(x.shape)) for layer, x, m, y in results]

    def _modulation(self, condition: Tensor, stream: torch.dtype) -> Tensor:
        """(B, F_i, 6, 1, D) of one part's condition."""
        rows = condition + self.adaln_table.flatten() if self.shared_adaln else self.adaln(condition)
        return rows.to(stream).unflatten(-1, (6, 1, -1))

    def _finish(self, layer: Projections, x: Tensor, modulation: Tensor, attended: Tensor) -> Tensor:
        """One part's stream after its attention and feed-forward."""
        _, _, gate, shift, scale, second_gate = modulation.unbind(2)
        x = torch.addcmul(x, gate, (attended if layer.proj is None else layer.proj(attended)).to(x.dtype))
        hidden = self.fc1(modulate(x, shift, scale).to(self.fc1.weight.dtype), gelu=True)
        return torch.addcmul(x, second_gate, self.fc2(hidden).to(x.dtype))
