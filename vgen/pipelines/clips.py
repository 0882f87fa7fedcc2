"""Clips that a video model continues: given in any form, or those that lie in the model's folder."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgen.pipelines.base import as_tensor
from vgen.types import CheckpointError, SettingError

CONTEXT_FILE = "context.npz"  # in a model's folder: arr_0 (K, F, S, S, 3 or 1) uint8
FINGERPRINT = "sha256:"  # what stands for clips in a request


def to_clips(context: Any, size: int) -> tuple[Tensor, bool]:
    """Clips (K, F, 3, S, S) uint8, and whether they were given one by one: a single clip serves all samples.

    Args:
        context: an array or tensor (F, S, S, 3), (F, 3, S, S), or one axis more for several clips, of one channel or
            three, uint8 or floats in [0, 1]; a list of PIL images, or a list of clips in any of these forms.
        size: the model's, S.

    Raises SettingError.
    """
    several = isinstance(context, (list, tuple)) and bool(context) and not isinstance(context[0], Image.Image)
    if several:
        clips = [_to_clip(clip, size) for clip in context]
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) > 1:
            raise SettingError(
                f"clips of {lengths[0]} and {lengths[-1]} frames: give equally many of each, or sample them one by one"
            )
        return torch.stack(clips), True
    if isinstance(context, (np.ndarray, Tensor)) and context.ndim == 5:
        return _frames(_tensor(context), size), True
    return _to_clip(context, size)[None], False


def _to_clip(context: Any, size: int) -> Tensor:
    """One clip -> (F, 3, S, S) uint8."""
    if isinstance(context, (list, tuple)) and context and all(isinstance(item, Image.Image) for item in context):
        sizes = sorted({item.size for item in context})
        if sizes != [(size, size)]:
            width, height = next(found for found in sizes if found != (size, size))
            raise SettingError(f"a context frame is {width}x{height}, this model takes {size}x{size}: resize or crop")
        context = np.stack([np.asarray(item.convert("RGB")) for item in context])
    if not isinstance(context, (np.ndarray, Tensor)):
        raise SettingError(f"context is a {type(context).__name__}: give an array, a tensor or a list of PIL images")
    if context.ndim != 4:
        raise SettingError(f"a context clip has shape {tuple(context.shape)}: give (F, {size}, {size}, 3)")
    return _frames(_tensor(context), size)


def _tensor(values: np.ndarray | Tensor) -> Tensor:
    contiguous = values if isinstance(values, Tensor) else np.ascontiguousarray(values)
    return as_tensor("context", contiguous, torch.device("cpu"))


def _frames(frames: Tensor, size: int) -> Tensor:
    """Frames (..., S, S, 3 or 1) or (..., 3 or 1, S, S) -> (..., 3, S, S) uint8."""
    shape = tuple(frames.shape)
    if 0 in shape:
        raise SettingError(f"context has shape {shape}: there is no frame in it, leave context out instead")
    if shape[-3:-1] == (size, size) and shape[-1] in (1, 3):
        frames = frames.movedim(-1, -3)
    elif shape[-2:] != (size, size) or shape[-3] not in (1, 3):
        raise SettingError(f"context has shape {shape}, this model takes (F, {size}, {size}, 3): resize or crop it")
    if frames.dtype != torch.uint8:
        if not frames.is_floating_point():
            raise SettingError(f"context is {frames.dtype}: give uint8, or floats in [0, 1]")
        if not torch.isfinite(frames).all() or frames.min() < 0 or frames.max() > 1:
            raise SettingError("a context of floats must lie in [0, 1]")
        frames = frames.float().mul(255).round().to(torch.uint8)
    return frames.expand(*frames.shape[:-3], 3, -1, -1)


def fingerprint(clips: Tensor) -> str:
    """What stands for clips (K, F, 3, S, S) uint8 in a request: the hash of their pixels."""
    return FINGERPRINT + hashlib.sha256(clips.cpu().contiguous().numpy().tobytes()).hexdigest()


def read_clips(folder: Path | None, size: int) -> Tensor | None:
    """The clips (K, F, 3, S, S) uint8 in a model's folder, None where it has none. Raises CheckpointError."""
    path = None if folder is None else folder / CONTEXT_FILE
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            clips = arrays["arr_0"]
        if clips.dtype != np.uint8 or clips.ndim != 5:
            raise ValueError(f"it holds {clips.dtype} of shape {clips.shape}")
        return _frames(torch.from_numpy(clips), size)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} holds no clips for this model ({error}): get the model again") from error
