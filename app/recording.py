"""A run's steps, kept so that previews, the scrubber and the inspector can look at any of them again."""

import dataclasses
import io
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgen.media import contact_sheet, to_pil
from vgen.types import Request, Step

MAX_BYTES = 128 << 20  # of steps; beyond it every second one is dropped, never the last
PREVIEW = 448  # pixels a side that previews are enlarged to, about
FILM_COLUMNS = 10
Show = Callable[[Any, Step], Tensor]  # a pipeline and a step of its -> images (B, 3, H, W), or videos, uint8


class Recording:
    """The steps of one call of a pipeline, on the CPU.

    Steps are added by the thread that samples; pictures are decoded by whoever asks, once, so that a run nobody looks
    at costs nothing.

    Args:
        show: what a step looks like; the pipeline's `decode` for None.
        glance: seconds that the last picture took of a run like this one; 0 where that is not known.
    """

    def __init__(self, pipeline: Any, request: Request, show: Show | None = None, glance: float = 0.0) -> None:
        self.pipeline, self.request, self.glance = pipeline, request, glance
        self._show = show or (lambda pipeline, step: pipeline.decode(step))
        self.steps: list[Step] = []
        self.dropped = 0
        self._bytes = 0
        self._lock = threading.Lock()  # of decoding
        self._seen: dict[tuple[int, int], bytes] = {}
        self._pixels = lru_cache(maxsize=2)(self._decode)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def rows(self) -> int:
        """Images or videos."""
        return len(self.request.seeds)

    def add(self, step: Step) -> None:
        step = _on_cpu(step)
        self._bytes += _size(step)
        self.steps.append(step)
        if self._bytes > MAX_BYTES and len(self.steps) > 2:
            self.dropped += len(self.steps) // 2
            self.steps = self.steps[::-1][::2][::-1]  # the newest stays
            self._bytes = sum(_size(kept) for kept in self.steps)

    def pixels(self, index: int) -> Tensor:
        """Images (B, 3, H, W), or videos (B, F, 3, H, W), uint8, as step `index` has them."""
        return self._pixels(self._place(index))

    def picture(self, index: int) -> bytes:
        """All images at a step in one PNG, enlarged without smoothing."""
        step = self.steps[self._place(index)]
        key = (step.index, step.evaluations)
        if key not in self._seen:
            began, file = time.monotonic(), io.BytesIO()
            sheet(self.pixels(index)).save(file, format="PNG", compress_level=1)
            self._seen[key] = file.getvalue()
            self.glance = time.monotonic() - began
        return self._seen[key]

    def label(self, index: int) -> str:
        """What a step is, in words."""
        return describe_step(self.pipeline, self.steps[self._place(index)])

    def _place(self, index: int) -> int:
        return index if index >= 0 else len(self.steps) + index

    def _decode(self, index: int) -> Tensor:
        with self._lock, torch.no_grad():
            return self._show(self.pipeline, _on(self.steps[index], self.pipeline.device)).cpu()


GAP = 2


def layout(rows: int, side: int) -> tuple[int, int]:
    """Columns and zoom of a picture of so many images of a side."""
    columns = max(1, int(np.ceil(np.sqrt(rows))))
    return columns, max(1, round(PREVIEW / (columns * side)))


def sheet(pixels: Tensor) -> Image.Image:
    """Images (B, 3, H, W) uint8 in a square, or the frames of videos (B, F, 3, H, W) in rows, enlarged."""
    side = max(pixels.shape[-2:])
    if pixels.ndim == 4:
        columns, zoom = layout(len(pixels), side)
        return contact_sheet(to_pil(pixels), columns, zoom, GAP)
    frames = pixels.shape[1]
    columns = min(frames, FILM_COLUMNS)
    blank = Image.new("RGB", (pixels.shape[-1], pixels.shape[-2]), "white")
    tiles = []
    for video in pixels:
        tiles += to_pil(video) + [blank] * (-frames % columns)
    return contact_sheet(tiles, columns, max(1, round(2 * PREVIEW / (columns * side))), GAP)


def describe_step(pipeline: Any, step: Step) -> str:
    """One line on what a step has reached."""
    known = step.known.float().mean(-1)
    share = f"{100 * float(known.mean()):.0f}% of tokens known"
    if step.time is not None and step.time.ndim == 2:  # videos: noise levels by frame
        clean = int((step.time <= 0).all(0).sum())
        return f"evaluation {step.index + 1} of {step.total}: {clean} of {step.time.shape[1]} frames finished"
    if step.wave is not None:
        done = int(step.known.sum(-1).min())
        return f"pass {step.wave.passes}: {done} of {step.known.shape[-1]} tokens final"
    if isinstance(step.tokens, list):  # scale by scale
        side = round(step.tokens[-1].shape[-1] ** 0.5)
        what = "band" if getattr(pipeline.tokenizer, "band_schedule", "none") != "none" else "scale"
        return f"{what} {step.index + 1} of {step.total}: {side}x{side} tokens, {share}"
    return f"step {step.index + 1} of {step.total}: {share}"


def export_gif(recording: Recording, milliseconds: int = 250) -> bytes:
    """All steps one after the other as an endless GIF, the last one held."""
    images = [Image.open(io.BytesIO(recording.picture(i))).convert("RGB") for i in range(len(recording))]
    images = [image.convert("P", palette=Image.Palette.ADAPTIVE) for image in images]
    times = [milliseconds] * (len(images) - 1) + [4 * milliseconds]
    file = io.BytesIO()
    images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=times, loop=0)
    return file.getvalue()


def _tensors(step: Step) -> dict[str, Any]:
    return {item.name: getattr(step, item.name) for item in dataclasses.fields(step)}


def _on(step: Step, device: torch.device) -> Step:
    """The same step with its tensors on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return [move(item) for item in value] if isinstance(value, list) else value

    return dataclasses.replace(step, **{name: move(value) for name, value in _tensors(step).items()})


def _on_cpu(step: Step) -> Step:
    return _on(step, torch.device("cpu"))


def _size(step: Step) -> int:
    """Bytes of its tensors."""

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        return sum(count(item) for item in value) if isinstance(value, Sequence) and not isinstance(value, str) else 0

    return sum(count(value) for value in _tensors(step).values())
