"""Networks that turn images into features: FID's Inception, the bundled classifier, raw pixels, or a user's own."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vgen import hub
from vgen.data import to_model_range
from vgen.evaluation.classifier import ImageClassifier
from vgen.evaluation.inception import Inception, find_weights
from vgen.files import hash_tensors, sha256, weight_files
from vgen.spectrum import radial_power
from vgen.types import SettingError

INCEPTION, CLASSIFIER, SPECTRUM = "inception", "fashion-classifier", "spectrum"
MAX_PIXEL_FEATURES = 4096
ROUNDING_NOISE = 1 / (12 * 255**2)  # power of rounding to 8 bits: what is below it is not told apart


class Extractor(Protocol):
    """Images (B, 3, H, W) uint8 -> named layers of features, (B, D) float32 each."""

    name: str  # in protocols
    digest: str  # sha256 of what it computes with
    layers: tuple[str, ...]  # of "features", "spatial" (sFID's) and "logits"
    preferred_batch: int

    @property
    def protocol(self) -> dict[str, str]:
        """What besides the digest decides its features."""
        ...

    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]: ...


def digest_of(extractor: Extractor, layer: str) -> str:
    """sha256 of what a layer is computed with; some networks have parts that only some layers need."""
    return getattr(extractor, "layer_digests", {}).get(layer, extractor.digest)


@dataclass(frozen=True)
class ExtractorOptions:
    """How extractors are built."""

    weights: Path | None = None  # Inception's
    resize: str = "legacy"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def build_extractor(name: str, options: ExtractorOptions) -> Extractor:
    """ "inception", "fashion-classifier" or a trained classifier's folder, "pixels", "spectrum", or
    "package.module:factory".

    A factory takes no arguments and returns a callable from (B, 3, H, W) uint8 to (B, D): a module with weights, say.
    Raises SettingError for an unknown name.
    """
    if name == INCEPTION:
        weights = find_weights(options.weights)
        return Inception(weights, resize=options.resize, device=options.device, dtype=options.dtype)
    if name == "pixels":
        return Pixels()
    if name == SPECTRUM:
        return Spectrum()
    folder = hub.ZOO / name if name == CLASSIFIER else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return ClassifierFeatures(folder, options)
    if ":" in name:
        return Custom(name, options)
    raise SettingError(
        f"unknown extractor {name!r}: use {INCEPTION}, {CLASSIFIER}, pixels, {SPECTRUM}, the folder of a trained "
        "classifier, or package.module:factory"
    )


class ClassifierFeatures:
    """The features and logits of an ImageClassifier."""

    layers: tuple[str, ...] = ("features", "logits")

    def __init__(self, folder: Path, options: ExtractorOptions) -> None:
        self.name = folder.name
        self.digest = sha256(*weight_files(folder), folder / "config.json")
        self.model: ImageClassifier = hub.load_component(ImageClassifier, folder, torch.float32)
        self.model.to(options.device, memory_format=torch.channels_last)
        self.class_names = list(self.model.config["class_names"])
        self.protocol = {"dtype": "float32"}
        self.preferred_batch = 64 if options.device == "cpu" else 512

    @torch.no_grad()
    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        features = self.model.features(to_model_range(images.to(self.model.device)))
        found = {"features": features}
        return found | {"logits": self.model.classify(features)} if "logits" in layers else found


class Pixels:
    """The pixels themselves, in 0..1: for small images."""

    name = "pixels"
    digest = hashlib.sha256(b"pixels").hexdigest()
    layers: tuple[str, ...] = ("features",)
    preferred_batch = 1024

    def __init__(self) -> None:
        self.protocol: dict[str, str] = {}

    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        features = images.flatten(1).float().div(255)
        if features.shape[1] > MAX_PIXEL_FEATURES:
            raise SettingError(
                f"images of {images.shape[-1]}x{images.shape[-2]} have {features.shape[1]} values, over the limit of "
                f"{MAX_PIXEL_FEATURES} for the extractor 'pixels': use another one"
            )
        return {"features": features}


class Spectrum:
    """log10 of the power in each ring of frequencies (vgen.spectrum.radial_power), of pixels in 0..1."""

    name = SPECTRUM
    digest = hashlib.sha256(b"spectrum: log10 mean power per ring").hexdigest()
    layers: tuple[str, ...] = ("features",)
    preferred_batch = 256

    def __init__(self) -> None:
        self.protocol: dict[str, str] = {}

    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        power = radial_power(images.double().div(255))
        return {"features": power.clamp_min(ROUNDING_NOISE).log10().float()}


class Custom:
    """A user's own network, by import path; the current folder is searched too."""

    layers: tuple[str, ...] = ("features",)
    preferred_batch = 64

    def __init__(self, path: str, options: ExtractorOptions) -> None:
        module_name, _, name = path.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            module = importlib.import_module(module_name)
            self.function: Callable[[Tensor], Any] = getattr(module, name)()
            source = inspect.getsourcefile(module)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise SettingError(f"extractor {path!r} cannot be built ({error}): write package.module:factory") from error
        if not callable(self.function):
            raise SettingError(f"extractor {path!r} returned {type(self.function).__name__}: it must give a callable")
        self.name, self.device = path, options.device
        digest = hashlib.sha256(path.encode())
        if isinstance(self.function, nn.Module):
            self.function.eval().requires_grad_(False).to(options.device)
            hash_tensors(digest, self.function.state_dict())
        digest.update(Path(source).read_bytes() if source else b"")
        self.digest = digest.hexdigest()
        self.protocol = {"dtype": "float32"}

    @torch.no_grad()
    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        features = self.function(images.to(self.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise SettingError(f"extractor {self.name} gave {shape} for {len(images)} images: expected (B, D)")
        return {"features": features.float()}
