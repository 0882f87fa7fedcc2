"""The adversarial term of decoder training: a discriminator that knows the class, kept calm by a penalty on gradients.

The discriminator of patches that tokenizers train with (vgen.training.adversary) is kept calm by spectral norm, which
also keeps it from seeing fine texture. Here the layers are free, the loss is the logistic one, and the R1 penalty
(Mescheder et al., 1801.04406) keeps the discriminator from running away. The class enters as a projection (Miyato and
Koyama, 1802.05637). Knows nothing of tokenizers beyond their images.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.training.adversary import Adversary
from vgen.training.config import TrainingConfig
from vgen.types import SettingError

PENALTY_EVERY = 4  # steps; the penalty is so many times larger then (lazy regularisation, 1912.04958)
FASTER = 2.0  # the discriminator's learning rate, in the decoder's (two time scales, 1706.08500)
LOCAL, GLOBAL = 4, 4  # pixels to a logit of the fine map; largest side of the coarse one


class ClassDiscriminator(nn.Module):
    """Images (B, channels, S, S) and class ids (B,) -> logits of being real: a fine map and a coarse one.

    Convolutions without normalisation. The fine map (B, h * w) has a logit for every 4 x 4 pixels, which sees 20 x 20
    around them; the coarse one, at most 4 x 4, sees nearly all of the image. Images below 8 pixels raise SettingError.
    """

    def __init__(self, channels: int, size: int, classes: int, base: int = 32) -> None:
        super().__init__()
        if size < 8:
            raise SettingError(f"images of {size}x{size} are too small to judge: at least 8x8")
        fine = 4 * base
        self.fine = nn.ModuleList(
            [
                nn.Conv2d(channels, base, 3, padding=1),
                nn.Conv2d(base, 2 * base, 4, 2, padding=1),
                nn.Conv2d(2 * base, fine, 4, 2, padding=1),
                nn.Conv2d(fine, fine, 3, padding=1),
            ]
        )
        halvings = max(1, math.ceil(math.log2(size / LOCAL / GLOBAL)))
        self.coarse = nn.ModuleList(
            nn.Conv2d(fine * (1 if i == 0 else 2), 2 * fine, 4, 2, padding=1) for i in range(halvings)
        )
        for layer in (*self.fine, *self.coarse):
            nn.init.kaiming_normal_(layer.weight, 0.2)
            nn.init.zeros_(layer.bias)
        self.heads = nn.ModuleList(ProjectionHead(width, classes) for width in (fine, 2 * fine))

    def forward(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        h, found = images, []
        for part, head in zip((self.fine, self.coarse), self.heads, strict=True):
            for layer in part:
                h = F.leaky_relu(layer(h), 0.2)
            found.append(head(h, classes).flatten(1).float())
        return found[0], found[1]


class ProjectionHead(nn.Module):
    """Features (B, width, h, w) and class ids (B,) -> a logit per place (B, 1, h, w); at first of no class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.any = nn.Conv2d(width, 1, 1)
        self.of_class = nn.Embedding(classes, width)
        nn.init.zeros_(self.of_class.weight)

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        return self.any(features) + (features * self.of_class(classes)[:, :, None, None]).mean(1, keepdim=True)


class ClassAdversary(Adversary):
    """A discriminator that learns from the first step; the decoder hears of it once it is `active`."""

    def __init__(self, config: TrainingConfig, channels: int, size: int, classes: int) -> None:
        torch.manual_seed(config.seed + 1)  # the same in all processes, and not the tokenizer's
        network = ClassDiscriminator(channels, size, classes).to(memory_format=torch.channels_last)
        super().__init__(config, network)
        self.lr, self.penalty = FASTER * config.lr, config.gradient_penalty

    def __call__(
        self, real: Tensor, fake: Tensor, real_classes: Tensor, fake_classes: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the decoder's loss gains, less the user's weight, and figures to log; 0 until it is `active`.

        Args:
            real: images (B, C, S, S), float32.
            fake: what the decoder made (N, C, S, S), with its graph; the discriminator gets no gradient through the
                term.
            real_classes, fake_classes: their class ids (B,) and (N,).

        Also puts by the gradients that `learn` needs, of the same images.
        """
        with torch.autocast(fake.device.type, torch.bfloat16, enabled=_in_bfloat16(fake.device.type)):
            term = self.decoder_loss(fake, fake_classes) if self.active else fake.new_zeros(())
            loss = logistic_loss(
                self.discriminator(real, real_classes), self.discriminator(fake.detach(), fake_classes)
            )
        figures = {"adversarial": term, "discriminator": loss.detach()}
        if self.penalty and self.done % PENALTY_EVERY == 0:
            loss = loss + PENALTY_EVERY * self.penalty / 2 * gradient_penalty(self.discriminator, real, real_classes)
        self.put_by(loss)
        return term, figures

    def decoder_loss(self, fake: Tensor, classes: Tensor) -> Tensor:
        """Mean softplus(-logit) of fake images (N, C, S, S), a scalar: the non-saturating loss (1406.2661)."""
        return _over_maps(F.softplus(-each) for each in self.unmoved(fake, classes))


def logistic_loss(real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> Tensor:
    """Mean softplus(-real) + mean softplus(fake) of maps of logits, a scalar; 2 log 2 where nothing is known."""
    return _over_maps(F.softplus(-each) for each in real) + _over_maps(F.softplus(each) for each in fake)


def gradient_penalty(discriminator: nn.Module, real: Tensor, classes: Tensor) -> Tensor:
    """R1: mean over images (B, C, S, S) of the squared norm of the gradient of their mean logit, a scalar (1801.04406).

    In float32. Its graph is there for the discriminator's parameters.
    """
    with torch.autocast(real.device.type, enabled=False):
        images = real.detach().float().requires_grad_(True)
        logits = sum(each.mean(1).sum() for each in discriminator(images, classes)) / 2
        (gradient,) = torch.autograd.grad(logits, images, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean()


def _over_maps(values: Iterable[Tensor]) -> Tensor:
    """The mean of each map, and of these the mean: both maps have an equal say."""
    return torch.stack([each.mean() for each in values]).mean()


def _in_bfloat16(device: str) -> bool:
    """Whether the run computes in it. Float16 is not for gradients per pixel."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
