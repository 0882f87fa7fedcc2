"""Reading files that anybody may have written, and writing files that are either whole or absent."""

import argparse
import hashlib
import json
import os
import pickle
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vgen.types import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".tmp")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; an existing `path` is replaced only when the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".tmp"))
    try:
        yield partial
        for written in [partial, *partial.rglob("*")]:  # some libraries write files that only their owner can read
            written.chmod((0o777 if written.is_dir() else 0o666) & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".old"))
            path.replace(old / path.name)
            partial.replace(path)
            shutil.rmtree(old)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(*paths: Path) -> str:
    """Hash of the files' contents in the given order, hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Update a hash with named tensors: names and bytes, by name, whatever file they came in."""
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in the order in which their hash is taken."""
    return sorted(folder.rglob("*.safetensors"))


def safetensors_header(path: Path) -> dict | None:
    """The JSON header of a safetensors file, or None where `path` holds something else. Reads no tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return None
        (length,) = struct.unpack("<Q", start)
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            return None
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            return None
    return header if isinstance(header, dict) else None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load a file of tensors by its content, never by its name: safetensors, or torch's format without pickled code.

    Raises FileNotFoundError, or CheckpointError when the file is damaged or holds anything but named tensors.
    Training checkpoints that hold the tensors one or two levels down give their nested dictionaries as they are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if safetensors_header(path) is not None:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or truncated ({error}): download it again") from error
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # of old pickle protocols; what matters is raised
            # torch maps zip files only, and goes by the name of a path, but not by that of an open file
            mapped = file.read(2) == b"PK" and path.suffix != ".safetensors"
            file.seek(0)
            # Checkpoints of the MAE line (MAGE, MAR) keep their command line beside the tensors: a plain record.
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a file of tensors: it is damaged, or holds pickled objects, which are never run; "
            "ask for safetensors or a plain state dict"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: download it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    return loaded
