"""Training the decoder of a finished model further, under the same tokens, for what its generator really samples.

A tokenizer's decoder has only seen tokens of real images. A generator's are others, and what the decoder makes of them
is blurred or does not fit together ("Image Tokenizer Needs Post-Training", 2509.12474). Here the decoder alone learns:
it rebuilds images as before, and a discriminator judges these and what it makes of samples. Unlike that paper's, our
samples are drawn freely, so there is no image to compare them with. An anchor may hold them to what they were drawn as
before, seen from a little further away: the discriminator changes their texture and not what they show.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vgen import hub
from vgen.data import open_source, spread, to_model_range
from vgen.evaluation.quick import QuickJudge
from vgen.progress import progress
from vgen.tokenizers.frequency import FrequencyVQ
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.tokenizers.vqgan import VQGAN
from vgen.training.class_adversary import ClassAdversary
from vgen.training.config import TrainingConfig
from vgen.training.generators import sample_sheet
from vgen.training.tokenizers import HELD_OUT, reconstruction_psnr
from vgen.training.tokens import flat_latent, flat_tokens, stored_tokens
from vgen.types import SettingError

FIRST_SEED = 1_000_000_000  # of the samples to learn from, far from those that evaluations begin with
DRAWN_TOGETHER = 100
TEXTURE = 2  # pixels; what is finer than their mean may differ from what samples were drawn as at first
DECODERS = ("decoder", "post_quant_conv")  # the parts that learn


class Decoding(nn.Module):
    """A tokenizer as a map from latents (B, C, H, W) to images in its own channels; all but its decoder is frozen."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False).to(memory_format=torch.channels_last)
        for name in DECODERS:
            getattr(tokenizer, name, nn.Identity()).requires_grad_(True)

    def forward(self, latents: Tensor) -> Tensor:
        return self.tokenizer.reconstruct(latents)


class DecoderTask:
    """A model's decoder, images with their tokens, and the model's samples (vgen.training.trainer.Task)."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.folder = hub.find(str(config.init_from))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline = hub.load(self.folder, device=device, dtype=torch.float32)
        tokenizer = self.pipeline.tokenizer
        if type(tokenizer) not in (MultiScaleVQ, FrequencyVQ, VQGAN):
            raise SettingError(
                f"init_from is {config.init_from!r}, whose tokenizer is a {type(tokenizer).__name__}: "
                "it must be a MultiScaleVQ, a FrequencyVQ or a VQGAN"
            )
        size, channels = tokenizer.image_size, tokenizer.config["image_channels"]
        self.source = open_source(config.data, "train", size, channels, config.data_root)
        self.held_out = open_source(config.data, "test", size, channels, config.data_root)
        if (found := len(self.source.class_names)) != self.pipeline.null_class:
            raise SettingError(
                f"{config.data} has {found} classes, but {config.init_from} {self.pipeline.null_class}: "
                "take the data it was trained on"
            )
        self.samples = self._draw()
        self.pipeline.to("cpu")
        folder = hub.component_folders(self.folder)["tokenizer"]
        self.tokens = stored_tokens(tokenizer, folder, config, self.source, "train", 1, 1)
        self.num_examples = len(self.tokens)
        self.model: Any = Decoding(tokenizer)
        self.at_first = copy.deepcopy(self.model).requires_grad_(False) if config.anchor else None
        self.labels = self.source.labels.numpy()
        self.adversary = ClassAdversary(config, channels, size, found)
        self.judge = QuickJudge(config.classifier, self.held_out) if config.classifier else None

    @property
    def companions(self) -> Sequence[ClassAdversary]:
        return (self.adversary,)

    def _draw(self) -> np.ndarray:
        """Tokens of the model's samples (N, L), its classes in turn."""
        found = []
        settings = {"guidance_scale": self.config.sample_guidance} | self.config.sample_settings
        with progress(self.config.samples, f"samples of {self.config.init_from}", "images") as shown:
            for start in range(0, self.config.samples, DRAWN_TOGETHER):
                rows = range(start, min(start + DRAWN_TOGETHER, self.config.samples))
                labels = [row % self.pipeline.null_class for row in rows]
                seeds = [FIRST_SEED + row for row in rows]
                made = self.pipeline(labels, seeds=seeds, output_type="latent", **settings)
                found.append(flat_tokens(made.tokens).cpu().numpy())
                shown.advance(len(rows))
        return np.concatenate(found)

    # ---- what the trainer asks for

    def batch(self, indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, S, S); tokens (2 B, L), theirs and those of as many samples; the classes of all (2 B,)."""
        images = to_model_range(self.source.images(indices.tolist()))
        chosen = np.random.default_rng(seed).integers(len(self.samples), size=len(indices))
        tokens = np.concatenate([self.tokens[indices], self.samples[chosen]]).astype(np.int64)
        classes = np.concatenate([self.labels[indices], chosen % self.pipeline.null_class]).astype(np.int64)
        images = images.contiguous(memory_format=torch.channels_last)
        return images, torch.from_numpy(tokens), torch.from_numpy(classes)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, tokens, classes = batch
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            latents = flat_latent(self.model.tokenizer, tokens)
        made = model(latents).float()
        difference = made[: len(images)] - images
        squared, absolute = difference.square().mean(), difference.abs().mean()
        term, figures = self.adversary(images, made, classes[: len(images)], classes)
        loss = squared + self.config.l1 * absolute + self.config.adversarial * term
        figures = {"squared_error": squared} | figures
        if self.at_first is not None:
            with torch.no_grad():
                at_first = self.at_first.to(images.device)(latents[len(images) :]).float()
            figures["moved"] = F.avg_pool2d(made[len(images) :] - at_first, TEXTURE).square().mean()
            loss = loss + self.config.anchor * figures["moved"]
        return loss, figures

    def after_step(self, step: int, rng: torch.Generator) -> None:
        self.adversary.learn(step)

    def evaluate(self) -> dict[str, float]:
        """PSNR of held-out images, and with a classifier what it says of samples."""
        chosen = spread(len(self.held_out.labels), HELD_OUT)
        figures = {"test_psnr": reconstruction_psnr(self.model.tokenizer, self.held_out, chosen)}
        if self.judge is None:
            return figures
        settings = {"guidance_scale": self.config.sample_guidance}
        return figures | self.judge(self._placed(), self.config.score_samples, **settings)

    def picture(self) -> Image.Image:
        """A column of samples per class."""
        return sample_sheet(self._placed(), self.config.sample_guidance)

    def export(self, folder: Path, card: str) -> None:
        """The whole model. Its tokenizer has the new card, and the model its own with a line about it."""
        parts = (self.pipeline.generator, self.pipeline.tokenizer)
        for part in parts:
            torch.nn.Module.half(part)
        self.pipeline.save_pretrained(folder)
        for part in parts:
            part.float()
        (folder / "tokenizer" / "README.md").write_text(card)
        own = self.folder / "README.md"
        if own.is_file():
            line = "| decoder | trained further afterwards, for this model's samples: tokenizer/README.md |\n"
            (folder / "README.md").write_text(own.read_text() + line)

    def _placed(self) -> Any:
        """The pipeline, its generator where the decoder is."""
        self.pipeline.generator.to(self.model.tokenizer.device)
        return self.pipeline
