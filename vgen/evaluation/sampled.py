"""Images that a model makes for the evaluation: samples of a pipeline, reconstructions by a tokenizer."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vgen import __version__
from vgen.batch import Item
from vgen.data import to_model_range, to_uint8, to_unit_range
from vgen.evaluation.images import Batch, ImageSet, image_digests, pixel_bytes, sampling_facts
from vgen.evaluation.metrics import per_image_error
from vgen.memory import is_out_of_memory
from vgen.types import SettingError


def _in_memory(make: Callable[[int, int], Batch], start: int, stop: int) -> Batch:
    """Images start..stop, made in halves while memory does not suffice for all at once."""
    try:
        return make(start, stop)
    except (RuntimeError, MemoryError) as error:
        if stop - start == 1 or not is_out_of_memory(error):
            raise
    middle = (start + stop) // 2
    first, second = _in_memory(make, start, middle), _in_memory(make, middle, stop)
    columns = {name: torch.cat([column, second.columns[name]]) for name, column in first.columns.items()}
    return Batch(torch.cat([first.pixels, second.pixels]), columns)


class SampledImages:
    """Samples of a pipeline. Columns: seconds (wall clock per image) and evaluations (of the model, per image)."""

    cheap = False
    columns: tuple[str, ...] = ("seconds", "evaluations")

    def __init__(
        self, pipeline: Any, items: Sequence[Item], settings: dict[str, Any], sampler: str | None = None
    ) -> None:
        self.pipeline, self.items, self.sampler = pipeline, list(items), sampler
        self.settings = pipeline.resolve_settings(settings, sampler)
        self.name = pipeline.source
        labels = [item.class_label for item in items if item.class_label is not None]
        self.labels = labels if len(labels) == len(items) else None
        named = pipeline.config.get("id2label") if hasattr(pipeline, "config") else None
        self.label_names: list[str] | None = pipeline.class_names if named else None
        first = self._request(0, 1)
        self.facts = {"files": "none, sampled", "size": "", "sampling": sampling_facts(first)}
        size = pipeline.tokenizer.image_size
        self.facts["size"] = f"{size}x{size}"
        self.facts["seeds"] = f"{self.items[0].seed}..{self.items[-1].seed}"
        self.warnings: list[str] = []

    def __len__(self) -> int:
        return len(self.items)

    def _request(self, start: int, stop: int) -> Any:
        labels, seeds = self._inputs(start, stop)
        return self.pipeline.request(labels, seeds, self.sampler, self.settings)

    def _inputs(self, start: int, stop: int) -> tuple[list[Any] | None, list[int]]:
        chosen = self.items[start:stop]
        labels = None if chosen[0].class_label is None else [item.class_label for item in chosen]
        return labels, [item.seed for item in chosen]

    def read(self, start: int, stop: int) -> Batch:
        return _in_memory(self._sample, start, stop)

    def _sample(self, start: int, stop: int) -> Batch:
        labels, seeds = self._inputs(start, stop)
        sampler = {} if self.sampler is None else {"sampler": self.sampler}
        out = self.pipeline(class_labels=labels, seeds=seeds, output_type="pt", **sampler, **self.settings)
        each = torch.ones(stop - start, dtype=torch.float64)
        columns = {"seconds": each * (out.seconds / len(seeds)), "evaluations": each * out.evaluations}
        return Batch(to_uint8(out.images).cpu(), columns)

    def identity(self, start: int, stop: int) -> str | None:
        request = dataclasses.replace(self._request(start, stop), model="")  # the checkpoint decides, not its name
        return hashlib.sha256(request.to_json().encode()).hexdigest()

    def describe(self, index: int) -> str:
        item = self.items[index]
        return f"the sample of class {item.class_label} and seed {item.seed}"


class ReconstructedImages:
    """What a tokenizer makes of a set of images. Columns: psnr, ssim, mse of each image, and its original's digest."""

    cheap = False
    columns: tuple[str, ...] = ("psnr", "ssim", "mse", "original")

    def __init__(self, tokenizer: Any, name: str, digest: str, originals: ImageSet) -> None:
        self.tokenizer, self.digest, self.originals = tokenizer, digest, originals
        self.name = f"{name} of {originals.name}"
        self.labels, self.label_names = originals.labels, originals.label_names
        size = tokenizer.image_size
        if originals.facts["size"] != f"{size}x{size}":
            raise SettingError(
                f"the tokenizer takes {size}x{size} images, but {originals.name} has {originals.facts['size']}"
            )
        dtype = str(tokenizer.dtype).removeprefix("torch.")
        self.facts = {
            "files": "none, reconstructed",
            "size": originals.facts["size"],
            "sampling": {"tokenizer": name, "checkpoint": digest[:16], "dtype": dtype, "device": tokenizer.device.type},
        }
        self.warnings: list[str] = []

    def __len__(self) -> int:
        return len(self.originals)

    def read(self, start: int, stop: int) -> Batch:
        return _in_memory(self._rebuild, start, stop)

    @torch.no_grad()
    def _rebuild(self, start: int, stop: int) -> Batch:
        pixels = self.originals.read(start, stop).pixels
        images = to_model_range(pixels).to(self.tokenizer.device)
        rebuilt = to_uint8(to_unit_range(self.tokenizer.decode(self.tokenizer.encode(images)))).cpu()
        return Batch(rebuilt, per_image_error(rebuilt, pixels) | {"original": image_digests(pixels)})

    def identity(self, start: int, stop: int) -> str | None:
        place = {name: value for name, value in self.facts["sampling"].items() if name in ("dtype", "device")}
        known = [str(place), self.digest, __version__]
        pixels = self.originals.read(start, stop).pixels
        return hashlib.sha256("".join(known).encode() + pixel_bytes(pixels)).hexdigest()

    def describe(self, index: int) -> str:
        return f"the reconstruction of {self.originals.describe(index)}"
