"""The perceptual term of tokenizer training: LPIPS (1801.03924), a distance of images by the features of VGG-16.

torchmetrics holds LPIPS's own weights; torchvision downloads those of VGG-16 (528 MB) on first use.
"""

import http.client
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from vgen.types import SettingError

SMALLEST = 16  # pixels; VGG-16 halves an image four times


class Perceptual(nn.Module):
    """Mean LPIPS of image pairs (B, 1 or 3, S, S) in about [-1, 1] -> a scalar. Frozen, float32.

    Raises SettingError where images of `size` pixels are too small, or the weights cannot be had.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < SMALLEST:
            raise SettingError(
                f"images of {size}x{size} are too small for the perceptual term, at least {SMALLEST}x{SMALLEST}: "
                "--set perceptual=0"
            )
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # slow imports, seldom needed
        from torchvision.models import VGG16_Weights

        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg")
        except (OSError, http.client.HTTPException, RuntimeError, EOFError, UnpicklingError) as error:
            place = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_Weights.DEFAULT.url.rpartition("/")[2]
            reason = str(getattr(error, "reason", error)).partition("\n")[0]
            raise SettingError(
                f"the perceptual term needs VGG-16's weights, which could not be downloaded or read ({reason}): "
                f"put {VGG16_Weights.DEFAULT.url} at {place}, or train without the term: --set perceptual=0"
            ) from error
        # The network alone: the metric would gather every score with its graph, and refuse values below -1.
        self.network = metric.net.requires_grad_(False)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        self.network.to(fake.device)
        with torch.autocast(fake.device.type, enabled=False):
            return self.network(*(images.float().expand(-1, 3, -1, -1) for images in (real, fake))).mean()
