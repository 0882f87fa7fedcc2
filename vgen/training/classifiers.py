"""Training the small classifier that the evaluator judges samples by."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vgen.data import flip_at_random, open_source, spread, to_model_range, to_uint8, to_unit_range
from vgen.evaluation.classifier import ImageClassifier
from vgen.media import contact_sheet, sheet_zoom, to_pil
from vgen.training.config import TrainingConfig
from vgen.training.families import build_model

FAMILIES = {"convnet": ImageClassifier}
MAX_SHIFT = 2  # pixels, in each direction


class ClassifierTask:
    """A classifier and the images it learns from, shifted and flipped at random (vgen.training.trainer.Task)."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        size, channels = config.image_size, config.model.get("image_channels", 1)
        self.source = open_source(config.data, "train", size, channels, config.data_root)
        self.held_out = open_source(config.data, "test", size, channels, config.data_root)
        self.num_examples = len(self.source.labels)
        self.model = build_model(FAMILIES, config, class_names=self.source.class_names, image_size=size)
        self.model.to(memory_format=torch.channels_last)

    def batch(self, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        images = to_model_range(self.source.images(indices.tolist(), crop_seed=seed))
        rng = np.random.default_rng(seed)
        if self.config.flip:
            images = flip_at_random(images, rng)
        size, shifts = images.shape[-1], rng.integers(0, 2 * MAX_SHIFT + 1, (len(images), 2))
        padded = F.pad(images, [MAX_SHIFT] * 4, value=-1)
        images = torch.stack([x[:, top : top + size, left : left + size] for x, (top, left) in zip(padded, shifts)])  # noqa: B905
        return images, self.source.labels[torch.from_numpy(indices)]

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        return F.cross_entropy(model(images), labels), {}

    def after_step(self, step: int, rng: torch.Generator) -> None:
        pass

    def evaluate(self) -> dict[str, float]:
        parts = [range(start, min(start + 500, self._held_out())) for start in range(0, self._held_out(), 500)]
        logits = torch.cat([self.model(to_model_range(self.held_out.images(part))).cpu() for part in parts])
        labels = self.held_out.labels
        return {
            "test_accuracy": float((logits.argmax(1) == labels).float().mean()),
            "test_loss": float(F.cross_entropy(logits, labels)),
        }

    def _held_out(self) -> int:
        return len(self.held_out.labels)

    def picture(self) -> Image.Image:
        """Held-out images that it takes for another class."""
        indices = spread(self._held_out(), 2000)
        images, labels = to_model_range(self.held_out.images(indices)), self.held_out.labels[indices]
        wrong = images[self.model(images).argmax(1).cpu() != labels][:64]
        wrong = wrong if len(wrong) else images[:1]
        return contact_sheet(
            to_pil(to_uint8(to_unit_range(wrong.expand(-1, 3, -1, -1)))), 16, sheet_zoom(images.shape[-1])
        )

    def export(self, folder: Path, card: str) -> None:
        torch.nn.Module.half(self.model)
        self.model.save_pretrained(folder)
        self.model.float()
        (folder / "README.md").write_text(card)
