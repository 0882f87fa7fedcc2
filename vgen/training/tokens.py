"""The tokens of a data set as a tokenizer sees it, computed once and kept on disk."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgen.data import ImageSource, data_root, to_model_range
from vgen.files import atomic_file, sha256, weight_files
from vgen.progress import progress
from vgen.training.config import TrainingConfig

ENCODED_TOGETHER = 100  # images


def flat_tokens(tokens: Any) -> Tensor:
    """Tokens of all positions (B, L), of a tokenizer that gives them so or as a list over scales of (B, n_k)."""
    return torch.cat(tokens, dim=1) if isinstance(tokens, list) else tokens


def flat_latent(tokenizer: Any, tokens: Tensor) -> Tensor:
    """What the decoder is given for tokens (B, L): (B, C, H, W) float32."""
    scales = getattr(tokenizer, "scales", None)
    return tokenizer.latent(tokens.split([side * side for side in scales], dim=1) if scales else tokens)


def stored_tokens(
    tokenizer: Any, folder: Path, config: TrainingConfig, source: ImageSource, split: str, copies: int, crops: int
) -> np.ndarray:
    """Tokens (copies * crops * N, L) of a data set: the images as they are, then the other crops, then flips.

    Kept beside the data set under a name that says which tokenizer, that of `folder`, and which images they belong to.
    """
    coder = sha256(*weight_files(folder), folder / "config.json")
    key = hashlib.sha256(f"{coder} {source.fingerprint()} {copies} {crops}".encode()).hexdigest()[:16]
    path = token_folder(config) / f"{Path(config.data).name}-{split}-{key}.npy"
    if not path.exists():
        dtype = np.uint16 if tokenizer.config["vocab_size"] <= 1 << 16 else np.int32
        with atomic_file(path) as partial:
            blank = torch.zeros(1, 3, tokenizer.image_size, tokenizer.image_size)
            shape = (copies * crops * len(source.labels), flat_tokens(tokenizer.encode(blank)).shape[1])
            stored = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapped file kills the process
                with partial.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
            with progress(len(stored), f"tokens of {config.data} ({split})", "images") as shown:
                for first, tokens in _encode_all(tokenizer, source, copies, crops):
                    stored[first : first + len(tokens)] = tokens.cpu().numpy()
                    shown.advance(len(tokens))
            stored.flush()
            del stored
    return np.load(path, mmap_mode="r")


def _encode_all(tokenizer: Any, source: ImageSource, copies: int, crops: int) -> Iterator[tuple[int, Tensor]]:
    """Of every part of the table: its first row, and its tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.to(device)
    number = len(source.labels)
    for crop in range(crops):
        for start in range(0, number, ENCODED_TOGETHER):
            indices = range(start, min(start + ENCODED_TOGETHER, number))
            images = to_model_range(source.images(indices, crop_seed=crop or None)).to(device)
            for copy in range(copies):
                tokens = tokenizer.encode(images.flip(-1) if copy else images)
                yield (copy * crops + crop) * number + start, flat_tokens(tokens)
    tokenizer.to("cpu")


def token_folder(config: TrainingConfig) -> Path:
    """Where tokens are kept: beside the data sets, or in the cache where that place is read-only."""
    folder = data_root(config.data_root) / "tokens"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path.home() / ".cache" / "vgen" / "tokens"
