"""Figures that follow a training run in seconds: class accuracy and Fréchet distance by a small classifier."""

from typing import Any

import torch
from torch import Tensor

from vgen.data import ImageSource, spread, to_uint8
from vgen.evaluation.extractors import ExtractorOptions, build_extractor
from vgen.evaluation.metrics import Moments, frechet_distance
from vgen.types import SettingError

MAX_REFERENCE = 10_000  # images
BATCH = 100


class QuickJudge:
    """A classifier, and the features of the real images that samples are compared with.

    Args:
        classifier: "fashion-classifier", or the folder of one that was trained on the same classes.
        reference: held-out images.

    Raises SettingError where the classifier knows other classes.
    """

    def __init__(self, classifier: str, reference: ImageSource, device: str = "cpu") -> None:
        self.extractor: Any = build_extractor(classifier, ExtractorOptions(device=device))
        known = list(getattr(self.extractor, "class_names", []))
        if known != list(reference.class_names):
            raise SettingError(
                f"classifier {classifier} knows {', '.join(known[:3]) or 'no classes'}, ..., but the data has "
                f"{', '.join(reference.class_names[:3])}, ...: train one on this data, or leave it out"
            )
        self.reference = Moments()
        indices = spread(len(reference.labels), MAX_REFERENCE)
        for start in range(0, len(indices), BATCH):
            images = reference.images(indices[start : start + BATCH]).expand(-1, 3, -1, -1)
            self.reference.add(self.extractor(images, ("features",))["features"].cpu())

    def __call__(self, pipeline: Any, number: int, **settings: Any) -> dict[str, float]:
        """Accuracy and Fréchet distance of `number` samples, seeds 0, 1, ..., classes in turn."""
        moments, right = Moments(), 0
        classes = pipeline.null_class
        for start in range(0, number, BATCH):
            seeds = list(range(start, min(start + BATCH, number)))
            labels = [seed % classes for seed in seeds]
            images: Tensor = pipeline(class_labels=labels, seeds=seeds, output_type="pt", **settings).images
            found = self.extractor(to_uint8(images), ("features", "logits"))
            moments.add(found["features"].cpu())
            right += int((found["logits"].argmax(1).cpu() == torch.tensor(labels)).sum())
        distance = frechet_distance(
            moments.mean, moments.covariance(), self.reference.mean, self.reference.covariance()
        )
        return {"class_accuracy": right / number, "classifier_frechet": distance}
