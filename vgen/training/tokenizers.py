"""Training a tokenizer: reconstruction, codebook and commitment losses, restarts of dead codes.

On request also the perceptual and adversarial terms that VQGAN, VAR and NFIG are trained with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vgen.data import ImageSource, flip_at_random, open_source, spread, to_model_range, to_uint8, to_unit_range
from vgen.media import contact_sheet, sheet_zoom, to_pil
from vgen.tokenizers.frequency import FrequencyVQ
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.tokenizers.vqgan import VQGAN
from vgen.training.adversary import PatchAdversary
from vgen.training.config import TrainingConfig
from vgen.training.families import build_model
from vgen.training.perceptual import Perceptual
from vgen.types import SettingError

FAMILIES = {"multiscale": MultiScaleVQ, "frequency": FrequencyVQ, "vqgan": VQGAN}
HELD_OUT = 2000  # test images that evaluation uses
DEAD_BELOW = 0.03  # a code chosen less often than this share of its fair part is dead


class TokenizerTask:
    """A tokenizer and the images it learns from (vgen.training.trainer.Task)."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.model = build_model(FAMILIES, config)
        size, channels = self.model.image_size, self.model.config["image_channels"]
        if config.image_size not in (0, size):
            raise SettingError(f"image_size is {config.image_size}, but the model's token grid gives {size}")
        self.source = open_source(config.data, "train", size, channels, config.data_root)
        self.held_out = open_source(config.data, "test", size, channels, config.data_root)
        self.num_examples = len(self.source.labels)
        self.model.to(memory_format=torch.channels_last)
        self.quantized: list[tuple[Tensor, Tensor]] = []
        self.perceptual = Perceptual(size) if config.perceptual else None
        self.adversary = PatchAdversary(config, channels, size) if config.adversarial else None

    @property
    def companions(self) -> Sequence[PatchAdversary]:
        """What learns beside the model and belongs into its checkpoints."""
        return (self.adversary,) if self.adversary else ()

    def batch(self, indices: np.ndarray, seed: int) -> tuple[Tensor]:
        images = to_model_range(self.source.images(indices.tolist(), crop_seed=seed))
        if self.config.flip:
            images = flip_at_random(images, np.random.default_rng(seed))
        return (images.contiguous(memory_format=torch.channels_last),)

    def loss(self, model: nn.Module, batch: tuple[Tensor], rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = batch
        reconstruction, quantiser, self.quantized = model(images)
        rebuilt = reconstruction.float()
        difference = rebuilt - images
        squared, absolute = difference.square().mean(), difference.abs().mean()
        figures = {"squared_error": squared, "commitment": quantiser[1]}
        error = squared + self.config.l1 * absolute
        if self.perceptual:
            figures["perceptual"] = self.perceptual(images, rebuilt)
            error = error + self.config.perceptual * figures["perceptual"]
        loss = error + quantiser[0] + self.config.commitment * quantiser[1]
        if self.adversary and self.adversary.active:
            term, seen = self.adversary(images, rebuilt, error, self.model.decoder.conv_out.weight)
            loss, figures = loss + self.config.adversarial * term, figures | seen
        return loss, figures

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Count the codes in use, and restart dead ones on vectors of this batch; the first step places them all.

        The discriminator, where there is one, makes a step of its own.
        """
        if self.adversary:
            self.adversary.learn(step)
        codebook = self.model.codebook
        for scale, (_, tokens) in enumerate(self.quantized):
            codebook.count(tokens, scale)
        if step > self.config.restart_until * self.config.steps:
            return
        if step == 1 or step % self.config.restart_every == 0:
            # every scale has an equal say, though the finest has most of the vectors
            vectors = [found.flatten(0, 1) for found, _ in self.quantized]
            drawn = [v[torch.randint(len(v), (512,), generator=rng).to(v.device)] for v in vectors]
            codebook.restart(torch.cat(drawn), threshold=float("inf") if step == 1 else DEAD_BELOW, generator=rng)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.broadcast(codebook.weight.data, 0)
                torch.distributed.broadcast(codebook.usage, 0)

    def evaluate(self) -> dict[str, float]:
        chosen = spread(len(self.held_out.labels), HELD_OUT)
        return {
            "test_psnr": reconstruction_psnr(self.model, self.held_out, chosen),
            **self.model.codebook.statistics(),
        }

    def picture(self) -> Image.Image:
        """Rows of originals, each above its reconstruction."""
        images = to_model_range(self.held_out.images(spread(len(self.held_out.labels), 32)))
        rebuilt = self.model.decode(self.model.encode(images)).cpu()
        originals, copies = (to_pil(to_uint8(to_unit_range(x.expand(-1, 3, -1, -1)))) for x in (images, rebuilt))
        rows = [row for i in range(0, len(originals), 16) for row in (originals[i : i + 16], copies[i : i + 16])]
        return contact_sheet([tile for row in rows for tile in row], 16, sheet_zoom(self.model.image_size))

    def export(self, folder: Path, card: str) -> None:
        torch.nn.Module.half(self.model)
        self.model.save_pretrained(folder)
        self.model.float()
        (folder / "README.md").write_text(card)


def reconstruction_psnr(tokenizer: Any, source: ImageSource, indices: Sequence[int]) -> float:
    """Mean PSNR of some of the images, in dB, of images in [-1, 1]."""
    errors = []
    for start in range(0, len(indices), 250):
        images = to_model_range(source.images(indices[start : start + 250]))
        rebuilt = tokenizer.decode(tokenizer.encode(images))[:, : images.shape[1]].cpu()
        errors.append(F.mse_loss(rebuilt, images, reduction="none").mean((1, 2, 3)))
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())
