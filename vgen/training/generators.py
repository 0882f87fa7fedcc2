"""What training any generator shares: a tokenizer's tokens, computed once and kept on disk, and figures of samples."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vgen.data import open_source, spread
from vgen.evaluation.quick import QuickJudge
from vgen.hub import load_tokenizer
from vgen.media import contact_sheet, sheet_zoom
from vgen.training.config import TrainingConfig
from vgen.training.families import build_model
from vgen.training.tokens import stored_tokens
from vgen.types import SettingError

EVALUATION_BATCH = 250


class GeneratorTask(ABC):
    """A generator and the tokens it learns from (vgen.training.trainer.Task). Families subclass this."""

    model_class: Any
    tokenizer_class: Any
    held_out = 2000  # test images that evaluation uses
    init_settings: Mapping[str, str] = {}  # settings under `model` that are arguments of `init_weights`, and which

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.tokenizer_folder = _tokenizer_folder(config.tokenizer or "")
        self.tokenizer, _ = load_tokenizer(self.tokenizer_folder, device="cpu", dtype=torch.float32)
        if not isinstance(self.tokenizer, self.tokenizer_class):
            found, wanted = type(self.tokenizer).__name__, self.tokenizer_class.__name__
            raise SettingError(f"{self.tokenizer_folder} is a {found}, but {config.family} needs a {wanted}")
        self.tokenizer.requires_grad_(False)
        size, channels = self.tokenizer.image_size, self.tokenizer.config["image_channels"]
        train = open_source(config.data, "train", size, channels, config.data_root)
        test = open_source(config.data, "test", size, channels, config.data_root)
        self.class_names = train.class_names
        self.model = build_model(
            {config.family: self.model_class},
            config,
            without=list(self.init_settings),
            **self.decided(),
            num_classes=len(self.class_names),
        )
        given = {theirs: config.model[name] for name, theirs in self.init_settings.items() if name in config.model}
        self.model.init_weights(**given)
        coder = self.tokenizer, self.tokenizer_folder, config
        copies = 2 if config.flip else 1
        self.num_examples = copies * config.crops * len(train.labels)
        self.tokens: Any = None  # with self-correction images are encoded at every step instead
        if not config.self_correction:
            self.tokens = stored_tokens(*coder, train, "train", copies, config.crops)
        self.test_tokens = stored_tokens(*coder, test, "test", 1, 1)
        self.source, self.labels, self.test_labels = train, train.labels, test.labels
        self.judge = QuickJudge(config.classifier, test) if config.classifier else None

    # ---- what families provide

    @abstractmethod
    def decided(self) -> dict[str, Any]:
        """Settings of the model that the tokenizer decides."""

    @abstractmethod
    def training_loss(
        self, model: nn.Module, tokens: Tensor, labels: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over tokens (B, L) with classes (B,), and figures to log."""

    @abstractmethod
    def test_losses(self, tokens: Tensor, labels: Tensor, first: int) -> dict[str, Tensor]:
        """Figures (B,) of test tokens (B, L), to be averaged; `first` is the number of the first of them."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The pipeline of tokenizer and model."""

    def finished_pipeline(self) -> Any:
        """The pipeline that a run ends with."""
        return self.pipeline()

    # ---- what the trainer asks for

    def batch(self, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(self.tokens[indices].astype(np.int64))
        return tokens, self.labels[torch.from_numpy(indices) % len(self.labels)]

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, labels = batch
        dropped = torch.rand(len(labels), generator=rng) < self.config.label_dropout
        labels = labels.masked_fill(dropped.to(labels.device), self.model.null_class)
        return self.training_loss(model, tokens, labels, rng)

    def after_step(self, step: int, rng: torch.Generator) -> None:  # noqa: B027
        """Nothing follows a step."""

    def evaluate(self) -> dict[str, float]:
        """The family's figures on test images, labels given.

        With a classifier, also how many of its samples show their class and how far their features are from the real.
        """
        found: dict[str, list[Tensor]] = {}
        indices = spread(len(self.test_tokens), self.held_out)
        for start in range(0, len(indices), EVALUATION_BATCH):
            rows = indices[start : start + EVALUATION_BATCH]
            tokens = torch.from_numpy(self.test_tokens[rows].astype(np.int64)).to(self.model.device)
            losses = self.test_losses(tokens, self.test_labels[rows].to(self.model.device), start)
            for name, values in losses.items():
                found.setdefault(name, []).append(values)
        figures = {name: torch.cat(values).mean().item() for name, values in found.items()}
        if self.judge is None:
            return figures
        settings = {"guidance_scale": self.config.sample_guidance}
        return figures | self.judge(self.pipeline(), self.config.score_samples, **settings)

    def picture(self) -> Image.Image:
        return sample_sheet(self.pipeline(), self.config.sample_guidance)

    def export(self, folder: Path, card: str) -> None:
        torch.nn.Module.half(self.model)
        torch.nn.Module.half(self.tokenizer)
        self.finished_pipeline().save_pretrained(folder)
        self.model.float()
        self.tokenizer.float()
        tokenizer_card = self.tokenizer_folder / "README.md"
        if tokenizer_card.is_file():
            (folder / "tokenizer" / "README.md").write_text(tokenizer_card.read_text())
        (folder / "README.md").write_text(card)


def sample_sheet(pipeline: Any, guidance_scale: float) -> Image.Image:
    """One column per class (the first sixteen), eight samples each, always of the same seeds."""
    classes = list(range(min(16, pipeline.null_class)))
    labels = [label for _ in range(8) for label in classes]
    seeds = list(range(len(labels)))
    images = pipeline(class_labels=labels, seeds=seeds, guidance_scale=guidance_scale).images
    return contact_sheet(images, len(classes), sheet_zoom(pipeline.tokenizer.image_size))


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of every token (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


def _tokenizer_folder(name: str) -> Path:
    """The folder of a tokenizer: the one named, or the tokenizer/ of the pipeline it names."""
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "tokenizer", folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise SettingError(f"no tokenizer in {folder}: train one, and name its folder with --set tokenizer=FOLDER")
