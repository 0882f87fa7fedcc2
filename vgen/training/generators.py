"""What training any generator shares: a tokenizer's tokens, computed once and kept on disk, and figures of samples."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vgen.data import ImageSource, data_root, open_source, spread, to_model_range
from vgen.evaluation.quick import QuickJudge
from vgen.files import atomic_file, sha256, weight_files
from vgen.hub import load_tokenizer
from vgen.media import contact_sheet, sheet_zoom
from vgen.progress import progress
from vgen.training.config import TrainingConfig
from vgen.training.families import build_model
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
        self.labels, self.tokens = self._tokens(train, "train", 2 if config.flip else 1, config.crops)
        self.test_labels, self.test_tokens = self._tokens(test, "test", 1, 1)
        self.num_examples = len(self.tokens)
        self.judge = QuickJudge(config.classifier, test) if config.classifier else None

    # ---- what families provide

    @abstractmethod
    def decided(self) -> dict[str, Any]:
        """Settings of the model that the tokenizer decides."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> their tokens (B, L)."""

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
        figures = {name: float(torch.cat(values).mean()) for name, values in found.items()}
        if self.judge is None:
            return figures
        settings = {"guidance_scale": self.config.sample_guidance}
        return figures | self.judge(self.pipeline(), self.config.score_samples, **settings)

    def picture(self) -> Image.Image:
        """One column per class (the first sixteen), eight samples each, always of the same seeds."""
        classes = list(range(min(16, len(self.class_names))))
        labels = [label for _ in range(8) for label in classes]
        images = self.pipeline()(
            class_labels=labels, seeds=list(range(len(labels))), guidance_scale=self.config.sample_guidance
        ).images
        return contact_sheet(images, len(classes), sheet_zoom(self.tokenizer.image_size))

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

    def _tokens(self, source: ImageSource, split: str, copies: int, crops: int) -> tuple[Tensor, np.ndarray]:
        """Labels (N,) and tokens (copies * crops * N, L): the images as they are, then the other crops, then flips.

        Kept beside the data set under a name that says which tokenizer and which images they belong to.
        """
        config, tokenizer = self.config, self.tokenizer
        coder = sha256(*weight_files(self.tokenizer_folder), self.tokenizer_folder / "config.json")
        key = hashlib.sha256(f"{coder} {source.fingerprint()} {copies} {crops}".encode()).hexdigest()[:16]
        path = token_folder(config) / f"{Path(config.data).name}-{split}-{key}.npy"
        if not path.exists():
            dtype = np.uint16 if tokenizer.config["vocab_size"] <= 1 << 16 else np.int32
            with atomic_file(path) as partial:
                blank = torch.zeros(1, 3, tokenizer.image_size, tokenizer.image_size)
                shape = (copies * crops * len(source.labels), self.encode(blank).shape[1])
                stored = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
                if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapped file kills the process
                    with partial.open("r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
                self._tokenize(source, split, crops, copies, stored)
                stored.flush()
                del stored
        return source.labels, np.load(path, mmap_mode="r")

    def _tokenize(self, source: ImageSource, split: str, crops: int, copies: int, stored: np.ndarray) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer.to(device)
        number, size = len(source.labels), 100
        with progress(len(stored), f"tokens of {self.config.data} ({split})", "images") as shown:
            for crop in range(crops):
                for start in range(0, number, size):
                    indices = range(start, min(start + size, number))
                    images = to_model_range(source.images(indices, crop_seed=crop or None)).to(device)
                    for copy in range(copies):
                        tokens = self.encode(images.flip(-1) if copy else images)
                        first = (copy * crops + crop) * number + start
                        stored[first : first + len(tokens)] = tokens.cpu().numpy()
                        shown.advance(len(tokens))
        self.tokenizer.to("cpu")


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of every token (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


def token_folder(config: TrainingConfig) -> Path:
    """Where tokens are kept: beside the data sets, or in the cache where that place is read-only."""
    folder = data_root(config.data_root) / "tokens"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path.home() / ".cache" / "vgen" / "tokens"


def _tokenizer_folder(name: str) -> Path:
    """The folder of a tokenizer: the one named, or the tokenizer/ of the pipeline it names."""
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "tokenizer", folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise SettingError(f"no tokenizer in {folder}: train one, and name its folder with --set tokenizer=FOLDER")
