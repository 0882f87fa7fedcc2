"""What each metric asks for and computes: from the features of two sets to named figures.

Knows formulas by name, networks by their layers, and nothing of files or processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.evaluation import metrics as math
from vgen.evaluation.extractors import CLASSIFIER, INCEPTION, SPECTRUM, Extractor, ExtractorOptions
from vgen.evaluation.features import Features
from vgen.evaluation.images import ImageSet
from vgen.evaluation.inception import cache_root
from vgen.evaluation.statistics import Statistics, measure
from vgen.spectrum import compare_spectra
from vgen.types import SettingError


@dataclass(frozen=True)
class Options:
    """How to evaluate."""

    extractors: ExtractorOptions = field(default_factory=ExtractorOptions)
    neighbours: int = 3  # of precision and recall
    subsets: int = 100  # of KID
    subset_size: int = 1000
    splits: int = 10  # of the Inception Score
    batch_size: int = 64  # images per chunk of the cache
    cache: Path = field(default_factory=lambda: cache_root() / "features")

    def __post_init__(self) -> None:
        counts = {"neighbours": self.neighbours, "kid-subsets": self.subsets, "splits": self.splits}
        for name, value in (counts | {"batch-size": self.batch_size}).items():
            if value < 1:
                raise SettingError(f"{name} is {value}: it must be at least 1")
        if self.subset_size < 2:
            raise SettingError(f"kid-subset-size is {self.subset_size}: it must be at least 2")


@dataclass
class Judged:
    """All that a metric may look at."""

    fake: Features
    extractor: Extractor
    options: Options
    statistics: Statistics | None  # where the reference's file has those that the metric wants
    real: Features | None
    train: Features | None
    layer: str
    suffix: str = ""  # of the names of its figures
    details: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)  # what the protocol says besides

    def real_moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of the reference's features, float64."""
        if self.statistics is not None:
            return self.statistics.moments[self.layer]
        assert self.real is not None
        return measure(self.real, self.extractor, self.layer)

    def rows(self, features: Features | None) -> Tensor:
        """All features (N, D), on the device that extracts."""
        assert features is not None
        return features.all(self.extractor, self.layer).to(self.options.extractors.device)

    def check_width(self, ours: int, theirs: int) -> None:
        """Raise SettingError where features of two sets cannot be compared."""
        if ours != theirs:
            raise SettingError(
                f"{self.extractor.name} gives {ours} features of {self.fake.images.name}, but {theirs} features of "
                "what it is compared with: give images of one size"
            )


def _frechet(judged: Judged) -> dict[str, float]:
    mean, covariance = judged.real_moments()
    own_mean, own_covariance = measure(judged.fake, judged.extractor, judged.layer)
    judged.check_width(len(own_mean), len(mean))
    return {"": math.frechet_distance(own_mean, own_covariance, mean, covariance)}


def _kernel(judged: Judged) -> dict[str, float]:
    options = judged.options
    fake, real = judged.rows(judged.fake), judged.rows(judged.real)
    judged.check_width(fake.shape[1], real.shape[1])
    found = math.kernel_distance(fake, real, options.subsets, options.subset_size)
    judged.notes["subsets"] = f"{found.subsets}x{found.subset_size}"
    return {"": found.mean, "std": found.std, "se": found.error}


def _inception_score(judged: Judged) -> dict[str, float]:
    judged.notes["splits"] = judged.options.splits
    mean, std = math.inception_score(judged.rows(judged.fake), judged.options.splits)
    return {"": mean, "std": std}


def _precision_recall(judged: Judged) -> dict[str, float]:
    judged.notes["k"] = judged.options.neighbours
    fake, real = judged.rows(judged.fake), judged.rows(judged.real)
    judged.check_width(fake.shape[1], real.shape[1])
    precision, recall = math.precision_recall(fake, real, judged.options.neighbours)
    return {"precision": precision, "recall": recall}


def _accuracy(judged: Judged) -> dict[str, float]:
    labels = torch.tensor(class_ids(judged.fake.images, judged.extractor))
    right = judged.rows(judged.fake).argmax(1).cpu() == labels
    names = getattr(judged.extractor, "class_names", [])
    judged.notes["classes"] = "by name" if judged.fake.images.label_names and names else "by number"
    judged.details[f"accuracy_per_class{judged.suffix}"] = {
        names[label] if label < len(names) else str(label): float(right[labels == label].double().mean())
        for label in sorted(set(labels.tolist()))
    }
    return {"": float(right.double().mean())}


def class_ids(images: ImageSet, extractor: Extractor) -> list[int]:
    """The extractor's class of every image, by name where both have names. Raises SettingError for one it lacks."""
    known: list[str] = list(getattr(extractor, "class_names", []))
    if images.labels is None:
        raise SettingError(
            f"accuracy needs the class of every image, and {images.name} does not tell: put them in a folder for each "
            "class, or keep the names that 'vgen sample' gives"
        )
    if images.label_names and known:
        if strange := sorted({images.label_names[label] for label in images.labels} - set(known)):
            raise SettingError(
                f"{images.name} has the class {strange[0]!r}, which {extractor.name} does not know: it tells "
                f"{', '.join(known[:12])} apart"
            )
        return [known.index(images.label_names[label]) for label in images.labels]
    for label in (min(images.labels), max(images.labels)):
        if label < 0 or (known and label >= len(known)):
            raise SettingError(f"class {label} of {images.name} is beyond {extractor.name}'s {len(known)}")
    return images.labels


def _memorization(judged: Judged) -> dict[str, float]:
    """Distances to the nearest training image: of the samples, and of held-out images, which cannot be memorised."""
    assert judged.train is not None
    fake = judged.rows(judged.fake)
    judged.check_width(fake.shape[1], next(judged.train.blocks(judged.extractor, judged.layer)).shape[1])
    found, index = math.nearest(fake, judged.train.blocks(judged.extractor, judged.layer))
    closest = found.argsort()[:16]
    judged.details["nearest"] = [
        {"image": int(i), "train": int(index[i]), "distance": float(found[i])} for i in closest.tolist()
    ]
    figures = {"nearest_train": float(found.median())}
    if judged.real is not None:
        real = judged.rows(judged.real)
        judged.check_width(fake.shape[1], real.shape[1])
        held_out, _ = math.nearest(real, judged.train.blocks(judged.extractor, judged.layer))
        figures["nearest_train_reference"] = float(held_out.median())
        # 1% where samples lie no nearer to the training images than held-out images do
        figures["nearer_than_reference"] = float((found < held_out.quantile(0.01)).double().mean())
    return figures


def _spectrum(judged: Judged) -> dict[str, float]:
    fake, real = judged.rows(judged.fake), judged.rows(judged.real)
    judged.check_width(fake.shape[1], real.shape[1])
    return compare_spectra(fake.double().mean(0).cpu(), real.double().mean(0).cpu())


@dataclass(frozen=True)
class Metric:
    """A figure: what it is computed from, and by which network when nothing else is said."""

    compute: Callable[[Judged], dict[str, float]]
    extractor: str
    layer: str = "features"
    fixed: bool = False  # the name means this extractor and no other
    reference: str = "images"  # "images", "moments" (statistics will do), "optional" or "none"


METRICS = {
    "fid": Metric(_frechet, INCEPTION, fixed=True, reference="moments"),
    "sfid": Metric(_frechet, INCEPTION, "spatial", fixed=True, reference="moments"),
    "kid": Metric(_kernel, INCEPTION, fixed=True),
    "is": Metric(_inception_score, INCEPTION, "logits", fixed=True, reference="none"),
    "prc": Metric(_precision_recall, INCEPTION),
    "frechet": Metric(_frechet, CLASSIFIER, reference="moments"),
    "mmd": Metric(_kernel, CLASSIFIER),
    "accuracy": Metric(_accuracy, CLASSIFIER, "logits", reference="none"),
    "spectrum": Metric(_spectrum, SPECTRUM, fixed=True),
    "memorization": Metric(_memorization, CLASSIFIER, reference="optional"),
}
PAIRED = ("psnr", "ssim", "mse")  # of reconstructions and their originals
VIDEO_METRICS = ("video_psnr", "video_ssim", "video_mse", "fvd")  # see vgen.evaluation.video


@dataclass(frozen=True)
class Asked:
    """A metric as the user asked for it: "fid", "prc@pixels"."""

    text: str
    name: str
    metric: Metric | None  # None for the paired ones
    extractor: str

    def key(self, part: str) -> str:
        """Name of a figure in the report: fid, kid_std, precision, precision@pixels."""
        whole = part if part in ("precision", "recall") or part.startswith("near") else f"{self.name}_{part}"
        whole = whole if part else self.name
        return whole + self.suffix

    @property
    def suffix(self) -> str:
        """What names another network than the metric's own."""
        return f"@{self.extractor}" if self.metric and self.extractor != self.metric.extractor else ""


def parse_metrics(text: str, reconstructed: bool = False) -> list[Asked]:
    """ "fid,kid,prc@pixels" -> what to compute. Raises SettingError naming what there is."""
    asked = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, extractor = part.partition("@")
        if name in PAIRED or name == "rfid":
            if not reconstructed:
                raise SettingError(f"{name} compares reconstructions with their originals: name a --tokenizer")
        elif name not in METRICS:
            names = (*METRICS, "rfid", *PAIRED, *VIDEO_METRICS)
            raise SettingError(f"unknown metric {name!r}: use {', '.join(names)}")
        name = "rfid" if reconstructed and name == "fid" else name
        metric = METRICS["fid" if name == "rfid" else name] if name not in PAIRED else None
        if extractor and metric is not None and metric.fixed and extractor != metric.extractor:
            other = {"fid": "frechet", "rfid": "frechet", "sfid": "frechet", "kid": "mmd"}.get(name)
            hint = f"of another network's it is {other}@{extractor}" if other else "leave out the @"
            raise SettingError(f"{name} means the features of {metric.extractor}: {hint}")
        if extractor and metric is None:
            raise SettingError(f"{name} compares pixels and takes no extractor")
        asked.append(Asked(part, name, metric, extractor or (metric.extractor if metric else "")))
    if not asked:
        raise SettingError(f"no metric to compute: use {', '.join(METRICS)}")
    return asked
