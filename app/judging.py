"""Figures that need seconds, not hours: samples judged by the bundled classifier, with real images or without.

Knows neither jobs nor pages. What takes long is an iterator that yields after every batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgen.data import data_root, open_source, spread
from vgen.evaluation import metrics
from vgen.evaluation.extractors import (
    CLASSIFIER,
    SPECTRUM,
    Extractor,
    ExtractorOptions,
    build_extractor,
    digest_of,
)
from vgen.spectrum import compare_spectra
from vgen.types import SettingError

REFERENCE, SPLIT = "fashion-mnist", "test"
MAX_REFERENCE = 2000  # images: seconds on a CPU, and enough for the covariance of 128 features
BATCH = 100
NEIGHBOURS = 3  # of precision and recall
LARGEST = 32  # side of images whose pixels are compared


@dataclass(frozen=True)
class Figure:
    """How a figure is called and read."""

    label: str
    better: str  # "higher", "lower", or "" where neither is
    what: str
    share: bool = False  # shown in per cent

    def text(self, value: float | None) -> str:
        if value is None or value != value:
            return "none"
        return f"{100 * value:.1f}%" if self.share else f"{value:.4g}"


FIGURES = {
    "class_accuracy": Figure(
        "Class accuracy", "higher", "samples that the classifier takes for the class asked for", share=True
    ),
    "classifier_score": Figure(
        "Classifier score", "higher", "the Inception Score's formula with this classifier: sure and varied answers"
    ),
    "diversity": Figure("Diversity in a class", "", "typical distance between features of two samples of one class"),
    "classifier_frechet": Figure("Classifier Fréchet distance", "lower", "FID's formula in this classifier's features"),
    "spectrum_error": Figure("Spectrum error", "lower", "mean error of the power at each frequency, in powers of ten"),
    "precision": Figure("Precision", "higher", f"samples among real images (k = {NEIGHBOURS})", share=True),
    "recall": Figure("Recall", "higher", f"real images among samples (k = {NEIGHBOURS})", share=True),
}


class Gathered:
    """Features of images, batch by batch."""

    def __init__(self, extractors: Sequence[Extractor]) -> None:
        self.extractors = extractors
        self.found: dict[str, list[Tensor]] = {}
        self.labels: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, pixels: Tensor, labels: Sequence[int]) -> None:
        """Take in images (B, 3, H, W) uint8 and the class of each, -1 for none."""
        for extractor in self.extractors:
            seen = shrunk(pixels) if extractor.name == "pixels" else pixels
            for layer, rows in extractor(seen, extractor.layers).items():
                name = SPECTRUM if extractor.name == SPECTRUM else layer
                self.found.setdefault(name, []).append(rows.cpu())
        self.labels += labels

    def rows(self, layer: str) -> Tensor:
        """A layer of all images, (N, D)."""
        return torch.cat(self.found[layer])


def shrunk(pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 with no side above LARGEST, by averaging: as many values as pixels are compared by."""
    height, width = (min(side, LARGEST) for side in pixels.shape[-2:])
    if (height, width) == tuple(pixels.shape[-2:]):
        return pixels
    return torch.nn.functional.adaptive_avg_pool2d(pixels.float(), (height, width)).round().to(torch.uint8)


class Judge:
    """What tells the samples of one kind of model good from bad.

    Args:
        class_names: of the model, none for one without classes.
        image_size: of its images.

    The bundled classifier judges what has its classes and size; of anything else pixels tell how diverse it is.
    """

    def __init__(self, class_names: Sequence[str], image_size: int, device: str = "cpu") -> None:
        options = ExtractorOptions(device=device)
        classifier = build_extractor(CLASSIFIER, options)
        known: list[str] = list(getattr(classifier, "class_names", []))
        size = classifier.model.config["image_size"]  # type: ignore[attr-defined]
        self.knows_classes = bool(class_names) and set(class_names) <= set(known) and image_size == size
        if self.knows_classes:
            self.first: Extractor = classifier
            self.ids = [known.index(name) for name in class_names]
        else:
            self.first = build_extractor("pixels", options)
            self.ids = list(range(len(class_names)))
        self.extractors = (self.first, build_extractor(SPECTRUM, options))
        self.image_size = image_size
        self.reference: Gathered | None = None
        self.reference_digest = ""
        self.missing = "" if self.knows_classes else self._stranger(known, size)

    @staticmethod
    def _stranger(known: Sequence[str], size: int) -> str:
        listed = ", ".join(known[:3])
        return (
            f"The bundled classifier tells {listed}, … apart in {size}x{size} images, which this model does not make: "
            "without it only the diversity of pixels is measured."
        )

    def prepare(self) -> Iterator[str]:
        """Read the reference where it is on this disk; nothing is ever downloaded. Yields after every batch how far it
        is."""
        if self.reference is not None or not self.knows_classes:
            return
        try:
            source = open_source(REFERENCE, SPLIT, self.image_size, 1, download=False)
        except SettingError:
            self.missing = (
                f"No real images to compare with: {REFERENCE} was looked for in {data_root()}. To get it, run 'vgen "
                f"evaluate fashion-var --metrics frechet --reference {REFERENCE}:{SPLIT}' once, or set VGEN_DATA."
            )
            return
        found = self.gather()
        chosen = torch.tensor(spread(len(source.labels), MAX_REFERENCE))
        for part in chosen.split(BATCH):
            labels = [self.ids.index(known) if known in self.ids else -1 for known in source.labels[part].tolist()]
            found.add(source.images(part.tolist()).expand(-1, 3, -1, -1), labels)
            yield f"Reading real images: {len(found)} of {len(chosen)}"
        self.reference, self.reference_digest, self.missing = found, source.fingerprint(), ""

    def gather(self) -> Gathered:
        return Gathered(self.extractors)

    def figures(self, samples: Gathered) -> dict[str, float]:
        """All figures that can be had of these samples."""
        labels, features = torch.tensor(samples.labels), samples.rows("features")
        found: dict[str, float] = {}
        if self.knows_classes:
            logits = samples.rows("logits")
            right = logits.argmax(1) == torch.tensor([self.ids[label] if label >= 0 else -1 for label in labels])
            if (labels >= 0).all():
                found["class_accuracy"] = float(right.double().mean())
            found["classifier_score"] = metrics.inception_score(logits, splits=1)[0]
        found["diversity"] = metrics.class_diversity(features, labels)
        return found | (self._compared(samples) if self.reference is not None else {})

    def _compared(self, samples: Gathered) -> dict[str, float]:
        assert self.reference is not None
        ours, theirs = samples.rows("features"), self.reference.rows("features")
        moments = []
        for rows in (ours, theirs):
            moments.append(metrics.Moments())
            moments[-1].add(rows)
        spectra = [gathered.rows(SPECTRUM).double().mean(0) for gathered in (samples, self.reference)]
        precision, recall = metrics.precision_recall(ours, theirs, NEIGHBOURS)
        return {
            "classifier_frechet": metrics.frechet_distance(
                moments[0].mean, moments[0].covariance(), moments[1].mean, moments[1].covariance()
            ),
            "spectrum_error": compare_spectra(*spectra)["psd_error"],
            "precision": precision,
            "recall": recall,
        }

    def of_reference(self) -> dict[str, float]:
        """What real images themselves reach, of the figures that do not compare with them."""
        if self.reference is None:
            return {}
        labels, logits = torch.tensor(self.reference.labels), self.reference.rows("logits")
        known = labels >= 0
        right = logits[known].argmax(1) == torch.tensor(self.ids)[labels[known]]
        return {
            "class_accuracy": float(right.double().mean()),
            "classifier_score": metrics.inception_score(logits[known], splits=1)[0],
            "diversity": metrics.class_diversity(self.reference.rows("features")[known], labels[known]),
        }

    def protocol(self) -> dict[str, Any]:
        """What judged, and against what."""
        judge = {"name": self.first.name, "sha256": digest_of(self.first, "features")}
        if self.reference is None:
            return {"judge": judge, "reference": None}
        facts = {"name": f"{REFERENCE}:{SPLIT}", "n": len(self.reference), "sha256": self.reference_digest}
        return {"judge": judge, "reference": facts}
