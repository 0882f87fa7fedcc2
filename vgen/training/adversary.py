"""The adversarial term of tokenizer training: a discriminator of patches, and what it tells the tokenizer.

VQGAN's recipe (2012.09841): patches judged apart (Isola et al., 1611.07004), hinge losses (Lim and Ye, 1705.02894), and
a weight that balances the term with the reconstruction. VAR and NFIG train with a discriminator on DINO's features; its
weights have to be downloaded, and it is not built here. Knows nothing of tokenizers beyond their images.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vgen.training.config import TrainingConfig
from vgen.types import SettingError

LARGEST_WEIGHT = 1e4  # of the adversarial term against the reconstruction, as VQGAN clamps it
DELTA = 1e-6  # VQGAN's, against a division by zero
GRADIENT_SCALE = 4096.0  # a power of two: exact, and gradients per pixel survive in float16
SMALLEST_MAP = 2


class PatchDiscriminator(nn.Module):
    """Images (B, channels, S, S) -> logits of being real, one per patch (B, 1, H, W), H and W at least 2.

    4x4 convolutions that halve the image `layers` times and then two that do not, with leaky ReLU in between: patches
    of 70 pixels for three layers, 34 for two, 16 for one. Images below 32 pixels have fewer layers, as the map would
    vanish; below 8 pixels none are left, which raises SettingError. Spectral norm (1802.05957) takes the place of
    PatchGAN's batch norm: with it a patch's logit depends on that patch alone. In training mode a forward pass moves
    its estimate of the norms; `refine` does that, so that in evaluation mode a forward pass changes nothing.
    """

    def __init__(self, channels: int, size: int, base: int = 64, layers: int = 3) -> None:
        super().__init__()
        while layers and size // 2**layers - 2 < SMALLEST_MAP:
            layers -= 1
        if not layers:
            raise SettingError(f"images of {size}x{size} are too small to judge, at least 8x8: --set adversarial=0")
        widths = [channels, *(base * 2 ** min(i, 3) for i in range(layers + 1)), 1]
        strides = [2] * layers + [1, 1]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(widths[i], widths[i + 1], 4, stride, padding=1)) for i, stride in enumerate(strides)
        )

    def forward(self, images: Tensor) -> Tensor:
        h = self.layers[0](images)
        for layer in self.layers[1:]:
            h = layer(F.leaky_relu(h, 0.2))
        return h

    @torch.no_grad()
    def refine(self) -> None:
        """One step of power iteration for the norm of every layer; leaves the network in evaluation mode."""
        self.train()
        for layer in self.layers:
            _ = layer.weight
        self.eval()


class Adversary:
    """A discriminator that learns beside a model (a companion of vgen.training.trainer.Trainer).

    Calls of those that build on it leave its state as it was, but for gradients put by; `learn` alone changes it.

    Attributes:
        discriminator: the network.
        done: optimizer steps of the run that are over.
        begin: how many of them pass before the model hears of it.
    """

    def __init__(self, config: TrainingConfig, discriminator: nn.Module) -> None:
        self.discriminator = discriminator
        self.parameters = list(discriminator.parameters())
        # The betas of GANs: with long memories two players that chase each other overshoot. VQGAN decays no weights.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.5, 0.9), weight_decay=0.0)
        schedule = get_scheduler(
            config.schedule, self.optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
        )
        self.lr, self.lr_factor = config.lr, schedule.lr_lambdas[0]
        self.done, self.begin = 0, int(config.adversarial_start * config.steps)
        self.gradients: list[Tensor] = []  # sums over the batches since the last step
        self.batches = 0

    @property
    def active(self) -> bool:
        """Whether the step that follows is one with the adversarial term."""
        return self.done >= self.begin

    def unmoved(self, *judged: Tensor) -> Any:
        """The discriminator's logits, with gradients for what it judges and none for itself."""
        self.discriminator.requires_grad_(False)
        logits = self.discriminator(*judged)
        self.discriminator.requires_grad_(True)
        return logits

    def put_by(self, loss: Tensor) -> Tensor:
        """Add the gradients of a batch's scalar loss to those of earlier batches of this step; the loss, detached."""
        found = torch.autograd.grad(loss, self.parameters)
        self.gradients = [a + b for a, b in zip(self.gradients, found, strict=True)] if self.batches else list(found)
        self.batches += 1
        return loss.detach()

    def learn(self, step: int) -> None:
        """One optimizer step on the mean over all batches since the last, and over all processes.

        `step` is the number, from 1, of the model's step that is over: both have that step's learning rate.
        """
        self.done = step
        if not self.batches:
            return
        for parameter, gradient in zip(self.parameters, process_mean(self.gradients), strict=True):
            parameter.grad = gradient / self.batches
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.lr_factor(step - 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.gradients, self.batches = [], 0

    # ---- what the trainer asks of a companion

    def to(self, device: torch.device) -> None:
        """Move to a device, before the first step or `load_state_dict`."""
        self.discriminator.to(device)

    def state_dict(self) -> dict[str, object]:
        network, optimizer = self.discriminator.state_dict(), self.optimizer.state_dict()
        return {"done": self.done, "discriminator": network, "optimizer": optimizer}

    def load_state_dict(self, state: dict) -> None:
        self.done = state["done"]
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


class PatchAdversary(Adversary):
    """VQGAN's: patches, hinge losses and the weight that balances. All in float32, and in evaluation mode."""

    discriminator: PatchDiscriminator

    def __init__(self, config: TrainingConfig, channels: int, size: int) -> None:
        torch.manual_seed(config.seed + 1)  # the same in all processes, and not the tokenizer's
        super().__init__(config, PatchDiscriminator(channels, size).eval())

    def __call__(
        self, real: Tensor, fake: Tensor, error: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the tokenizer's loss gains, less the user's weight, and figures to log.

        Args:
            real: images (B, C, S, S), float32.
            fake: what the tokenizer made of them, with its graph; the discriminator gets no gradient through the term.
            error: the scalar reconstruction error, with its graph.
            last_layer: weight of the decoder's last convolution.

        Also puts by the gradients that `learn` needs, of the same images.
        """
        with torch.autocast(fake.device.type, enabled=False):
            term = self.generator_loss(fake)
            weight = adaptive_weight(error, term, last_layer)
            logits = self.discriminator(torch.cat([real, fake.detach()]))
            loss = self.put_by(hinge_loss(*logits.split([len(real), len(fake)])))
        return weight * term, {"adversarial": term, "adversarial_weight": weight, "discriminator": loss}

    def generator_loss(self, fake: Tensor) -> Tensor:
        """Minus the mean logit of fake images (B, C, S, S), a scalar."""
        return -self.unmoved(fake).mean()

    def learn(self, step: int) -> None:
        """As every adversary, and then the estimates of the layers' norms keep up."""
        learns = self.batches > 0
        super().learn(step)
        if learns:
            self.discriminator.refine()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean max(0, 1 - real) + mean max(0, 1 + fake) of logits, a scalar; 2 where nothing is known (1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def adaptive_weight(error: Tensor, term: Tensor, last_layer: Tensor) -> Tensor:
    """How many times larger the gradient of `error` is than that of `term` (2012.09841, equation 7), a scalar.

    Both are scalars with graphs, which are kept; gradients are taken at the weight `last_layer`, and over the batches
    of all processes. From 0 to 1e4, without a graph.
    """
    scale = torch.tensor(GRADIENT_SCALE, device=error.device)
    found = [torch.autograd.grad(part, last_layer, scale, retain_graph=True)[0] for part in (error, term)]
    upper, lower = (gradient.norm() / GRADIENT_SCALE for gradient in process_mean(found))
    return (upper / (lower + DELTA)).clamp(0, LARGEST_WEIGHT)


def process_mean(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor's mean over the processes of a distributed run; the tensors themselves where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = (flat / torch.distributed.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
