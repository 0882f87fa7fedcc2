"""Features of a set of images, kept on disk by content, so that an interrupted or repeated run goes on at once.

Images are taken in chunks of fixed bounds, whichever process takes them: the figures do not depend on how many there
are. Each process takes every n-th chunk, so none is padded or taken twice.
"""

import atexit
import hashlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgen.evaluation.extractors import Extractor, digest_of
from vgen.evaluation.images import Batch, ImageSet, chunks, image_digests, pixel_bytes
from vgen.files import atomic_file
from vgen.memory import is_out_of_memory
from vgen.progress import progress
from vgen.types import SettingError

Wanted = dict[str, tuple[Extractor, tuple[str, ...]]]  # by the extractor's name in the request: the layers


class FeatureStore:
    """Tensors by the key of a chunk of images, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, space: str, key: str) -> Path:
        """Where the tensors of a key are kept, or would be."""
        return self.folder / space / key[:2] / f"{key}.safetensors"

    def load(self, space: str, key: str) -> dict[str, Tensor] | None:
        """What was saved, or None; a damaged file counts as absent."""
        path = self.path(space, key)
        try:
            return load_file(path) if path.is_file() else None
        except (SafetensorError, OSError):
            return None

    def has(self, space: str, key: str) -> bool:
        """Whether a whole file is there; looks at its header and length only."""
        path = self.path(space, key)
        try:
            if path.is_file():
                with safe_open(path, "pt"):
                    return True
        except (SafetensorError, OSError):
            pass
        return False

    def save(self, space: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a key; the file is there whole or not at all."""
        with atomic_file(self.path(space, key)) as partial:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)


class Features:
    """Everything extracted from one set of images."""

    def __init__(self, images: ImageSet, store: FeatureStore, keys: Sequence[str], records: dict[str, Tensor]) -> None:
        self.images, self.store, self.keys, self.records = images, store, list(keys), records
        self.content = hashlib.sha256(records["digest"].numpy().tobytes()).hexdigest()  # of the images, in order

    def __len__(self) -> int:
        return len(self.images)

    def blocks(self, extractor: Extractor, layer: str) -> Iterator[Tensor]:
        """A layer in chunks (B, D), in order."""
        for key in self.keys:
            found = self.store.load(space_of(extractor, layer), key)
            if found is None:
                self.store.path(space_of(extractor, layer), key).unlink(missing_ok=True)
                raise RuntimeError(f"the cached features {key[:16]} were damaged and are removed: run again")
            yield found[layer]

    def all(self, extractor: Extractor, layer: str) -> Tensor:
        """A layer of all images, (N, D)."""
        return torch.cat(list(self.blocks(extractor, layer)))


def space_of(extractor: Extractor, layer: str) -> str:
    """Folder of a layer: two extractors share one only where they compute the same."""
    parts = [
        re.sub(r"[^\w.-]+", "_", extractor.name),
        digest_of(extractor, layer)[:16],
        *extractor.protocol.values(),
        layer,
    ]
    return "-".join(parts)


def processes() -> PartialState:
    """This process among those that torchrun started; alone without it."""
    on_cpu = not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))  # others may wait long for the slowest
    if state.num_processes > 1:
        _leave_group_at_exit()
    return state


@cache
def _leave_group_at_exit() -> None:
    """Left to the interpreter's end, a process whose peer is gone first may abort."""
    atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def extract(images: ImageSet, wanted: Wanted, store: FeatureStore, batch_size: int = 64) -> Features:
    """Extract every wanted layer, but for what the store has; shared among all processes.

    Raises SettingError where features are not finite; what is in the store by then stays.
    """
    state = processes()
    bounds = list(chunks(len(images), batch_size))
    mine = bounds[state.process_index :: state.num_processes]
    found: dict[int, tuple[str, dict[str, Tensor]]] = {}
    label = f"features of {images.name}"
    count = sum(stop - start for start, stop in mine)
    with progress(count, label, "images", quiet=not state.is_main_process) as shown, _Reader(images, mine) as reader:
        for start, stop in mine:
            found[start] = _extract_chunk(images, start, stop, reader, wanted, store)
            shown.advance(stop - start)
    if state.num_processes > 1:
        gathered: list[Any] = [None] * state.num_processes
        torch.distributed.all_gather_object(gathered, found)
        found = {start: chunk for part in gathered for start, chunk in part.items()}
    ordered = [found[start] for start, _ in bounds]
    names = ordered[0][1] if ordered else {}
    records = {name: torch.cat([record[name] for _, record in ordered]) for name in names}
    return Features(images, store, [key for key, _ in ordered], records)


def _extract_chunk(
    images: ImageSet, start: int, stop: int, reader: "_Reader", wanted: Wanted, store: FeatureStore
) -> tuple[str, dict[str, Tensor]]:
    """The key of a chunk and its record: a digest of every image, and what was measured while they were made."""
    batch: Batch | None = None
    key = images.identity(start, stop)
    record = store.load("records", key) if key else None
    if key is None or record is None or not {"digest", *images.columns} <= record.keys():
        batch = reader.get(start, stop)
        record = {"digest": image_digests(batch.pixels)} | batch.columns
        if key is None:
            key = hashlib.sha256(f"{list(batch.pixels.shape)}".encode() + pixel_bytes(batch.pixels)).hexdigest()
        else:
            store.save("records", key, record)
    for extractor, layers in wanted.values():
        missing = [layer for layer in layers if not store.has(space_of(extractor, layer), key)]
        if not missing:
            continue
        batch = batch or reader.get(start, stop)
        found = _in_memory(extractor, batch.pixels, missing)
        for layer in missing:
            _check_finite(found[layer], extractor, images, start)
            store.save(space_of(extractor, layer), key, {layer: found[layer]})
    return key, record


def _in_memory(extractor: Extractor, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Run the extractor in parts of the size it prefers, halved while memory does not suffice."""
    size = min(extractor.preferred_batch, len(pixels))
    parts: list[dict[str, Tensor]] = []
    start = 0
    while start < len(pixels):
        try:
            found = extractor(pixels[start : start + size], layers)
            parts.append({layer: found[layer].cpu() for layer in layers})
            start += size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = extractor.preferred_batch = max(1, size // 2)
    return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}


def _check_finite(features: Tensor, extractor: Extractor, images: ImageSet, start: int) -> None:
    bad = ~torch.isfinite(features).all(1)
    if bad.any():
        first = images.describe(start + int(bad.nonzero()[0]))
        raise SettingError(
            f"{extractor.name} gave features that are not finite for {int(bad.sum())} images, first {first}: look at "
            "the image and the weights (and at dtype, unless it is float32); features extracted so far are kept"
        )


class _Reader:
    """Reads chunks; where that is cheap, one ahead, while features of the one before are extracted."""

    def __init__(self, images: ImageSet, bounds: Sequence[tuple[int, int]]) -> None:
        self.images = images
        self.following = dict(pairwise(bounds))
        self.pool = ThreadPoolExecutor(1)
        self.ahead: dict[tuple[int, int], Future[Batch]] = {}

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def get(self, start: int, stop: int) -> Batch:
        if not self.images.cheap:
            return self.images.read(start, stop)
        future = self.ahead.pop((start, stop), None) or self.pool.submit(self.images.read, start, stop)
        if (after := self.following.get((start, stop))) is not None:
            self.ahead = {after: self.pool.submit(self.images.read, *after)}
        return future.result()
