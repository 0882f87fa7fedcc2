"""Means and covariances of features on disk: ours, with their protocol, ADM's and pytorch-fid's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgen.evaluation.arrays import ArrayMember, ArrayMissing
from vgen.evaluation.extractors import Extractor, digest_of
from vgen.evaluation.features import Features
from vgen.evaluation.metrics import Moments
from vgen.files import atomic_file, sha256
from vgen.types import SettingError

MEMBERS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # by layer, as ADM names them
MAX_WIDTH = 1 << 14


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D), float64, of some layers of one extractor over one set of images."""

    moments: dict[str, tuple[Tensor, Tensor]]  # by layer
    protocol: dict[str, Any]  # empty where the file does not record it
    sha256: str = ""  # of the file they were read from


def measure(features: Features, extractor: Extractor, layer: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a layer, streamed from the store."""
    moments = Moments()
    for block in features.blocks(extractor, layer):
        moments.add(block)
    return moments.mean, moments.covariance()


def save_statistics(path: Path, features: Features, extractor: Extractor, layers: tuple[str, ...]) -> None:
    """Write means and covariances of the layers, with their protocol, as an .npz that others' tools read too."""
    protocol = extractor_facts(extractor) | {
        "images": features.images.name,
        "n": len(features),
        "images_sha256": features.content,
        "image_size": features.images.facts["size"],
    }
    arrays: dict[str, Any] = {"protocol": np.array(json.dumps(protocol, sort_keys=True))}
    for layer in layers:
        mean, covariance = measure(features, extractor, layer)
        arrays |= dict(zip(MEMBERS[layer], (mean.numpy(), covariance.numpy()), strict=True))
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def extractor_facts(extractor: Extractor, layer: str = "features") -> dict[str, str]:
    """What must agree for features to be comparable."""
    return {"extractor": extractor.name, "extractor_sha256": digest_of(extractor, layer), **extractor.protocol}


def read_statistics(path: Path) -> Statistics | None:
    """Read an .npz with `mu` and `sigma`; None where it holds none. Raises SettingError for a damaged one."""
    moments = {}
    for layer, names in MEMBERS.items():
        mean, covariance = (_matrix(path, name) for name in names)
        if mean is not None and covariance is not None:
            if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
                shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
                raise SettingError(
                    f"{names[0]} and {names[1]} of {path} have shapes {shapes}: expected (D,) and (D, D)"
                )
            if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
                raise SettingError(f"{names[0]} or {names[1]} of {path} is not finite: make the statistics again")
            moments[layer] = mean, covariance
    return Statistics(moments, _protocol(path), sha256(path)) if moments else None


def _matrix(path: Path, name: str) -> Tensor | None:
    member = _member(path, name)
    if member is None:
        return None
    if member.dtype.kind != "f" or not 1 <= len(member.shape) <= 2 or max(member.shape) > MAX_WIDTH:
        raise SettingError(f"{name} of {path} is {member.dtype} {member.shape}: expected floats up to {MAX_WIDTH} wide")
    return torch.from_numpy(member.read(0, member.shape[0]).astype(np.float64))


def _protocol(path: Path) -> dict[str, Any]:
    member = _member(path, "protocol")
    if member is None or member.dtype.kind != "U" or member.dtype.itemsize > 1 << 16:
        return {}
    content = member.read_scalar()
    try:
        found = json.loads(str(content))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _member(path: Path, name: str) -> ArrayMember | None:
    try:
        return ArrayMember(path, name)
    except ArrayMissing:
        return None


def check_comparable(statistics: Statistics, extractor: Extractor, name: str) -> list[str]:
    """Warnings about a statistics file for figures with this extractor. Raises SettingError where they do not match."""
    if not statistics.protocol:
        if "Inception" not in type(extractor).__name__:
            raise SettingError(f"{name} does not say which network it is of: it is taken for Inception's only")
        resize = extractor.protocol.get("resize", "legacy")
        if resize != "legacy":
            raise SettingError(
                f"{name} does not record its protocol, and is taken for the usual legacy resize: it cannot be compared "
                f"with --resize {resize}"
            )
        return [f"{name} does not record its protocol: taken for {extractor.name} with the legacy resize"]
    for fact, ours in extractor_facts(extractor).items():
        theirs = statistics.protocol.get(fact)
        if theirs != ours:
            raise SettingError(
                f"{name} was made with {fact} {str(theirs)[:40]}, but this run uses {ours[:40]}: make the statistics "
                "again, or evaluate as they were made"
            )
    return []
