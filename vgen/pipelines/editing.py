"""Pixels and masks for editing: reading them, snapping a mask to tokens, compositing the result."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vgen.types import SettingError


def to_pixels(image: Any, size: int) -> Tensor:
    """A PIL image, array (S, S, 3) or tensor (B, 3, S, S) or (3, S, S) -> (B, 3, S, S) uint8. Raises SettingError."""
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
        image = image.expand(3, -1, -1) if image.ndim == 2 else image.permute(2, 0, 1) if image.ndim == 3 else image
    if not isinstance(image, Tensor):
        raise SettingError(f"image is a {type(image).__name__}: give a PIL image, an array or a tensor")
    image = image[None] if image.ndim == 3 else image
    if image.ndim == 4 and image.shape[1] == 1:
        image = image.expand(-1, 3, -1, -1)
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[-2:] != (size, size):
        shape = "x".join(str(side) for side in reversed(image.shape[-2:]))
        raise SettingError(f"the image is {shape}, this model edits {size}x{size}: resize or crop it first")
    if image.dtype == torch.uint8:
        return image
    if not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise SettingError("a floating-point image must lie in [0, 1]")
    return image.float().mul(255).round().to(torch.uint8)


def to_mask(mask: Any, size: int) -> Tensor:
    """A PIL image, array or tensor (S, S), nonzero where the image is repainted -> (S, S) bool."""
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L")) > 127
    mask = torch.as_tensor(np.array(mask) if not isinstance(mask, Tensor) else mask)
    mask = mask.reshape(mask.shape[-2:]) if mask.ndim > 2 and mask.numel() == mask.shape[-2:].numel() else mask
    if mask.shape != (size, size):
        raise SettingError(
            f"the mask has shape {tuple(mask.shape)}, the image is {size}x{size}: give one value a pixel"
        )
    mask = mask != 0
    if not mask.any():
        raise SettingError("the mask is empty: mark what to repaint with nonzero (white) pixels")
    return mask


def touched_tokens(painted: Tensor, pixels: int) -> Tensor:
    """Tokens of `pixels` a side any of whose pixels is painted: (S, S) bool -> (h, h) bool."""
    return F.max_pool2d(painted[None, None].float(), pixels)[0, 0] > 0


def keep_masks(painted: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Which tokens of each scale are kept, (n_k,) bool each, for painted pixels (S, S).

    A token of the last scale is repainted when any of its pixels is. Coarser scales follow the published rule: a
    bilinear resize over one half keeps, and the first scale (fewer than four tokens) is always kept.
    """
    side, size = scales[-1], painted.shape[-1]
    kept = (~touched_tokens(painted, size // side)).float()[None, None]
    masks = []
    for scale in scales:
        resized = F.interpolate(kept, size=(scale, scale), mode="bilinear") if scale != side else kept
        masks.append((resized > 0.5).flatten() if scale * scale > 3 else torch.ones(scale * scale, dtype=torch.bool))
    return masks


def composite(original: Tensor, generated: Tensor, painted: Tensor, feather: int) -> Tensor:
    """Generated pixels inside the mask, the original's exactly outside: uint8 (B, 3, S, S) x 2, (S, S) bool -> uint8.

    Over `feather` pixels inside the mask's edge the two are blended; the picture's border is no edge.
    """
    outside = 1 - painted[None, None].float()
    weight = torch.zeros_like(outside)
    for _ in range(feather + 1):
        weight += (1 - outside) / (feather + 1)
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
    blended = torch.lerp(original.float(), generated.float(), weight).round().to(torch.uint8)
    return torch.where(painted, blended, original)
