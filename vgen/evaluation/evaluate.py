"""Judging a set of images: which figures, against what, by which network, under which protocol."""

import hashlib
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen import __version__
from vgen.evaluation.arrays import ArrayMissing
from vgen.evaluation.extractors import INCEPTION, Extractor, ExtractorOptions, build_extractor
from vgen.evaluation.features import Features, FeatureStore, Wanted, extract, processes
from vgen.evaluation.images import ArrayImages, ImageSet, open_images
from vgen.evaluation.inception import NAME, OFFICIAL_FILE
from vgen.evaluation.judges import Asked, Judged, Options, class_ids
from vgen.evaluation.metrics import check_ssim
from vgen.evaluation.report import Report
from vgen.evaluation.sampled import ReconstructedImages
from vgen.evaluation.statistics import (
    Statistics,
    check_comparable,
    extractor_facts,
    read_statistics,
    save_statistics,
)
from vgen.types import SettingError

FULL_RANK = 2049  # images from which the covariance of Inception's 2048 features has full rank
TRUSTED = 10_000  # images from which FID's bias is small


@dataclass(frozen=True)
class Reference:
    """What images are compared with: other images, a file of statistics, or both in one file, as ADM's."""

    name: str
    images: ImageSet | None = None
    statistics: Statistics | None = None


def open_reference(text: str, *, skip_broken: bool = False, data_root: Path | None = None) -> Reference:
    """Open anything `open_images` takes, or an .npz with `mu` and `sigma`."""
    path = Path(text).expanduser()
    archive = path.is_file() and (path.suffix == ".npz" or zipfile.is_zipfile(path))
    if archive and (statistics := read_statistics(path)) is not None:
        try:
            return Reference(text, ArrayImages(text, path), statistics)
        except ArrayMissing:
            return Reference(text, statistics=statistics)
    return Reference(text, open_images(text, skip_broken=skip_broken, data_root=data_root))


# ---- the evaluation


def build_extractors(asked: Sequence[Asked], options: ExtractorOptions) -> dict[str, Extractor]:
    """The networks that the metrics need, by name. Raises SettingError where a metric cannot have what it needs."""
    extractors = {
        name: build_extractor(name, options)
        for name in dict.fromkeys(item.extractor for item in asked if item.metric is not None)
    }
    for item in asked:
        if item.metric is None or item.metric.layer in extractors[item.extractor].layers:
            continue
        if item.name == "is":
            raise SettingError(
                "the Inception Score needs the classification layer, and these weights come without it: give "
                f"torch-fidelity's {OFFICIAL_FILE} with --weights, or leave 'is' out"
            )
        given = ", ".join(extractors[item.extractor].layers)
        raise SettingError(f"{item.text} needs {item.metric.layer}; {extractors[item.extractor].name} gives {given}")
    return extractors


class Evaluator:
    """Networks and cache for any number of evaluations against one reference."""

    def __init__(
        self,
        asked: Sequence[Asked],
        extractors: dict[str, Extractor],
        reference: Reference | None = None,
        train: ImageSet | None = None,
        options: Options | None = None,
    ) -> None:
        self.asked, self.extractors, self.reference, self.train = list(asked), extractors, reference, train
        self.options = options or Options()
        self.store = FeatureStore(self.options.cache)
        self.warnings: list[str] = list(reference.images.warnings) if reference and reference.images else []
        self.warnings += train.warnings if train else []
        for item in self.asked:
            self._check(item)
        self.real: Features | None = None
        self.learnt: Features | None = None
        self.extracted = False  # the reference's and the training images' features

    def _check(self, item: Asked) -> None:
        """Raise SettingError for what cannot be computed, before hours of work."""
        metric, reference = item.metric, self.reference
        if metric is None:
            return
        extractor = self.extractors[item.extractor]
        if metric.reference in ("images", "moments"):
            if reference is None:
                raise SettingError(f"{item.name} compares with a reference: name one with --reference")
            if reference.images is None and (metric.reference == "images" or not self._has_moments(item)):
                wanted = "images" if metric.reference == "images" else f"the {metric.layer} of images"
                raise SettingError(f"{item.name} needs {wanted}, and {reference.name} holds other statistics alone")
        if self._has_moments(item) and reference is not None and reference.statistics is not None:
            found = check_comparable(reference.statistics, extractor, reference.name)
            self.warnings += [warning for warning in found if warning not in self.warnings]
        if item.name == "memorization" and self.train is None:
            raise SettingError("memorization compares with the training images: name them with --train")

    def _has_moments(self, item: Asked) -> bool:
        """Whether the reference's file has the statistics that a metric compares with."""
        if item.metric is None or item.metric.reference != "moments" or self.reference is None:
            return False
        statistics = self.reference.statistics
        if statistics is None or item.metric.layer not in statistics.moments:
            return False
        # Files of others are of Inception; beside images of their own they need not serve other networks.
        return bool(statistics.protocol) or item.extractor == INCEPTION or self.reference.images is None

    def _needs_real(self, item: Asked) -> bool:
        return item.metric is not None and item.metric.reference != "none" and not self._has_moments(item)

    def _extract_all(self, images: ImageSet | None, needed: Callable[[Asked], bool]) -> Features | None:
        """Features of a set for all metrics that need them; None where none does."""
        chosen = [item for item in self.asked if needed(item)]
        return extract(images, self._wanted(chosen), self.store, self.options.batch_size) if images and chosen else None

    def _wanted(self, asked: Sequence[Asked]) -> Wanted:
        layers: dict[str, list[str]] = {}
        for item in asked:
            if item.metric is not None:
                layers.setdefault(item.extractor, [])
                if item.metric.layer not in layers[item.extractor]:
                    layers[item.extractor].append(item.metric.layer)
        return {name: (self.extractors[name], tuple(found)) for name, found in layers.items()}

    def run(self, images: ImageSet) -> Report | None:
        """Extract and judge one set of images; the report comes from the main process, the others return None."""
        self._check_images(images)
        if not self.extracted:
            self.real = self._extract_all(self.reference.images if self.reference else None, self._needs_real)
            self.learnt = self._extract_all(self.train, lambda item: item.name == "memorization")
            self.extracted = True
        fake = extract(images, self._wanted(self.asked), self.store, self.options.batch_size)
        if not processes().is_main_process:
            return None
        report = Report(images=self._image_facts(fake), warnings=self._warnings(fake))
        for item in self.asked:
            if item.metric is None:
                report.add(item.name, float(fake.records[item.name].mean()), self._paired_protocol(fake))
                continue
            extractor = self.extractors[item.extractor]
            file = self.reference.statistics if self.reference and self._has_moments(item) else None
            sets = (self.real, self.learnt)
            judged = Judged(fake, extractor, self.options, file, *sets, item.metric.layer, item.suffix, report.details)
            figures = item.metric.compute(judged)
            protocol = self._protocol(item, extractor) | judged.notes
            for part, value in figures.items():
                report.add(item.key(part), value, protocol)
        for name in ("seconds", "evaluations"):
            if name in fake.records:
                report.add(f"{name}_per_image", float(fake.records[name].mean()), {})
        return report

    def _check_images(self, images: ImageSet) -> None:
        for item in self.asked:
            if item.metric is None and not isinstance(images, ReconstructedImages):
                raise SettingError(f"{item.name} compares reconstructions with their originals: name a --tokenizer")
            if item.name == "prc" and len(images) <= self.options.neighbours:
                raise SettingError(
                    f"precision and recall with {self.options.neighbours} neighbours need at least "
                    f"{self.options.neighbours + 1} images, but {images.name} has {len(images)}: give more"
                )
            if item.name == "is" and len(images) < self.options.splits:
                raise SettingError(f"{len(images)} images cannot be split in {self.options.splits}: lower --splits")
            if item.metric is not None and item.metric.reference in ("images", "moments") and len(images) < 2:
                raise SettingError(f"{item.name} of {len(images)} image means nothing: give at least 2")
            if item.name == "accuracy":
                class_ids(images, self.extractors[item.extractor])
            if item.name == "ssim":
                width, _, height = images.facts["size"].partition("x")
                check_ssim(int(height), int(width))

    @staticmethod
    def _paired_protocol(fake: Features) -> dict[str, Any]:
        assert isinstance(fake.images, ReconstructedImages)
        content = hashlib.sha256(fake.records["original"].numpy().tobytes()).hexdigest()
        originals = {"name": fake.images.originals.name, "n": len(fake), "sha256": content}
        return {"reference": originals, "pixels": "8 bit, mean over images"}

    def _protocol(self, item: Asked, extractor: Extractor) -> dict[str, Any]:
        layer = item.metric.layer if item.metric else "features"
        found: dict[str, Any] = {**extractor_facts(extractor, layer)}
        if item.metric is None or item.metric.reference == "none":
            return found
        file = self.reference.statistics if self.reference else None
        name = self.reference.name if self.reference else ""
        if self._has_moments(item) and file is not None:
            found["reference"] = {"name": name, "n": file.protocol.get("n"), "sha256": file.sha256}
        elif self.real is not None:
            found["reference"] = {"name": name, "n": len(self.real), "sha256": self.real.content}
        if item.name == "memorization" and self.learnt is not None:
            found["train"] = {"name": self.learnt.images.name, "n": len(self.learnt), "sha256": self.learnt.content}
        return found

    def _image_facts(self, fake: Features) -> dict[str, Any]:
        images = fake.images
        facts = {"name": images.name, "n": len(fake), "sha256": fake.content, **images.facts}
        if images.labels is not None:
            facts["per_class"] = {str(label): number for label, number in sorted(Counter(images.labels).items())}
        return facts | {"vgen": __version__}

    def _warnings(self, fake: Features) -> list[str]:
        images = fake.images
        found = [*self.warnings, *images.warnings]
        names = {item.name for item in self.asked}
        of_inception = names & {"fid", "rfid", "sfid"}
        if of_inception and len(fake) < FULL_RANK:
            found.append(
                f"{len(fake)} images are fewer than {FULL_RANK}: the covariance is singular and FID far too high; "
                "sample more, or go by KID"
            )
        elif of_inception and len(fake) < TRUSTED:
            hint = "" if "kid" in names else "; read KID too"
            found.append(f"FID of {len(fake)} images is biased upward: compare it at equal N only{hint}")
        if of_inception and self.real is not None and len(self.real) < FULL_RANK:
            found.append(f"the reference has {len(self.real)} images, fewer than {FULL_RANK}: FID is far too high")
        counts = set(Counter(images.labels or []).values())
        if len(counts) > 1:
            found.append(f"unequal classes: from {min(counts)} to {max(counts)} images")
        doubles = len(fake) - len(fake.records["digest"].unique())
        if doubles and not isinstance(images, ReconstructedImages):
            found.append(f"{doubles} of {len(fake)} images are exact copies of others: was a seed used twice?")
        theirs = self.reference.images.facts["size"] if self.reference and self.reference.images else None
        if theirs is None and self.reference and self.reference.statistics:
            theirs = self.reference.statistics.protocol.get("image_size")
        if theirs and theirs != images.facts["size"]:
            found.append(f"images of {images.facts['size']} are compared with a reference of {theirs}")
        if INCEPTION in self.extractors and self.extractors[INCEPTION].name != NAME:
            found.append("these Inception weights are not those of FID: the figures compare with no others")
        return found


def make_statistics(
    images: ImageSet, asked: Sequence[Asked], extractors: dict[str, Extractor], path: Path, options: Options
) -> None:
    """Write the statistics file of a set of images, for later runs to compare with. Raises SettingError."""
    names = {item.extractor for item in asked if item.metric and item.metric.reference == "moments"}
    if len(names) != 1:
        raise SettingError("a statistics file is of one extractor: ask for --metrics fid, fid,sfid or frechet")
    (name,) = names
    layers = tuple(layer for layer in ("features", "spatial") if layer in extractors[name].layers)
    features = extract(images, {name: (extractors[name], layers)}, FeatureStore(options.cache), options.batch_size)
    if processes().is_main_process:
        save_statistics(path, features, extractors[name], layers)
