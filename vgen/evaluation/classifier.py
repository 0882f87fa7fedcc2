"""A small convolutional classifier: whether samples show their class, and features for quick Fréchet distances.

Its figures go by its own name. They follow a training run in seconds; they are no FID.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vgen.types import SettingError


class ImageClassifier(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Two 3x3 convolutions with group norm at each width, half the resolution between widths, then the mean.

    Args:
        class_names: name by class id.
        image_size: side S of the square images it was trained on.
        image_channels: 1 for grey images, which may come as three equal channels; or 3.
        widths: channels at each resolution; the last is the number of features D.
        norm_groups: groups of every norm.
    """

    @register_to_config
    def __init__(
        self,
        class_names: list[str],
        image_size: int,
        image_channels: int = 1,
        widths: tuple[int, ...] = (32, 64, 128),
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        inputs = [image_channels, *widths[:-1]]
        self.blocks = nn.ModuleList(
            nn.Sequential(_Layer(a, b, norm_groups), _Layer(b, b, norm_groups))
            for a, b in zip(inputs, widths, strict=True)
        )
        self.head = nn.Linear(widths[-1], len(class_names))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3 or image_channels, S, S) in [-1, 1] -> (B, D) float32. Raises SettingError for another size."""
        size, channels = self.config["image_size"], self.config["image_channels"]
        if images.shape[-2:] != (size, size):
            height, width = images.shape[-2:]
            raise SettingError(f"images of {width}x{height}: the classifier was trained on {size}x{size}")
        if channels == 1 and images.shape[1] == 3:
            images = images.mean(1, keepdim=True)
        weight = self.head.weight
        x = images.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last)
        for i, block in enumerate(self.blocks):
            x = F.max_pool2d(x, 2) if i else x
            x = block(x)
        return x.mean((2, 3)).float()

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, D) -> logits (B, classes) float32."""
        return self.head(features.to(self.head.weight.dtype)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) in [-1, 1] -> logits (B, classes) float32."""
        return self.classify(self.features(images))


class _Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))
