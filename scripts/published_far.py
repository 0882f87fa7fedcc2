"""FAR's published way of sampling, to be measured against: not used by the package.

Written from a description of the published code, to spend time where it does; it gives the same velocities.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgen.generators.far import FAR
from vgen.generators.frame_blocks import patches, token_rotations, whole
from vgen.layers import linear, rotate


class PublishedFAR:
    """A short FAR that at every evaluation modulates token by token, builds the rotations and the dense mask of all
    frames so far, concatenates keys and values and rotates all keys again. Takes a generator's place in the sampler.
    """

    def __init__(self, model: FAR) -> None:
        if model.is_long or model.config["prediction"] != "velocity":
            raise ValueError("this loop is of a FAR with one resolution that predicts velocities")
        self.model, self.config = model, model.config

    def new_cache(self, batch: int, frames: int, attend_last: int | None = None) -> "PublishedCache":
        return PublishedCache(len(self.model.blocks))

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        cache: "PublishedCache | None" = None,
        start: int = 0,
        keep: int = 0,
        attend_last: int | None = None,
        slope: float | None = None,
    ) -> Tensor:
        model, tokens, kind = self.model, self.model.frame_tokens, self.model.head.weight.dtype
        batch, count = latents.shape[:2]
        times = timesteps if timesteps.ndim == 2 else timesteps[:, None].expand(batch, count)
        condition = F.silu(model._condition(times, class_labels, actions)).repeat_interleave(tokens, 1)  # (B, L, D)
        x = model.token_embed(patches(latents.to(kind), self.config["patch_size"])).flatten(1, 2).to(model.stream)
        angles, mask = self._angles(start + count), self._mask(start + count, model.stream)[-count * tokens :]
        for layer, block in enumerate(model.blocks):
            x = self._block(block, x, condition, angles, mask.to(kind), cache, layer)
        if cache is not None:
            cache.length = start + keep
            cache.cut(cache.length * tokens)
        scale, shift = linear(condition, model.head_adaln.weight, model.head_adaln.bias).to(model.stream).chunk(2, -1)
        found = model.head(_modulate(x, shift, scale).to(kind)).to(model.stream)
        return whole(found.unflatten(1, (count, tokens)), self.config["patch_size"], self.config["side"])

    def _angles(self, frames: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (L, 1, d / 2) of all tokens so far."""
        side = self.config["side"] // self.config["patch_size"]
        found = token_rotations(self.config["rope_axes"], range(frames), side)[:, None]
        return found.real.to(self.model.stream), found.imag.to(self.model.stream)

    def _mask(self, frames: int, dtype: torch.dtype) -> Tensor:
        """Frame-causal, as numbers to be added, of all tokens so far to one another."""
        number = torch.arange(frames).repeat_interleave(self.model.frame_tokens)
        gap = number[:, None] - number
        return torch.zeros(gap.shape, dtype=dtype).masked_fill(gap < 0, -torch.inf)

    def _block(
        self,
        block: Any,
        x: Tensor,
        condition: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: "PublishedCache | None",
        layer: int,
    ) -> Tensor:
        stream, kind, attn = x.dtype, block.fc1.weight.dtype, block.attn
        shift, scale, gate, shift2, scale2, gate2 = block.adaln(condition).to(stream).chunk(6, -1)  # token by token
        qkv = attn.qkv(_modulate(x, shift, scale).to(kind)).unflatten(-1, (3, attn.heads, -1))
        q, k = (
            F.rms_norm(qkv[:, :, i].to(stream), qkv.shape[-1:], eps=1e-6) * norm
            for i, norm in enumerate((attn.norm_q, attn.norm_k))
        )
        v = qkv[:, :, 2]
        if cache is not None:
            k, v = cache.append(layer, k, v)
        cos, sin = angles
        q, k = rotate(q, cos[-q.shape[1] :], sin[-q.shape[1] :]), rotate(k, cos, sin)
        q, k, v = (part.to(kind).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + gate * attn.proj(mixed).to(stream)
        hidden = block.fc1(_modulate(x, shift2, scale2).to(kind), gelu=True)
        return x + gate2 * block.fc2(hidden).to(stream)


class PublishedCache:
    """Keys, not yet rotated, and values of each layer, grown by concatenation."""

    def __init__(self, layers: int) -> None:
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.new: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.length = 0

    def first_needed(self, frame: int) -> int:
        return self.length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, those (B, n, heads, d) given behind those that are kept."""
        found = self.kept[layer]
        if found is not None:
            k, v = torch.cat([found[0], k], 1), torch.cat([found[1], v], 1)
        self.new[layer] = (k, v)
        return k, v

    def cut(self, tokens: int) -> None:
        """Keep the first `tokens` tokens of what was appended."""
        if tokens:
            self.kept = [None if found is None else (found[0][:, :tokens], found[1][:, :tokens]) for found in self.new]


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
