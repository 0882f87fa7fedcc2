"""MAR's tokenizer: an autoencoder with a KL penalty, whose latent pixels are the continuous tokens (2112.10752).

The networks are those of diffusers' AutoencoderKL. Knows nothing of generators.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vgen.tokenizers.backbone import decode_in_parts, network_channels
from vgen.types import SettingError


class KLAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Images to a square grid of continuous tokens and back.

    Args:
        side: side of the token grid; images have S = side * 2 ** (levels - 1) pixels a side.
        token_dim: width of a token, C.
        image_channels: 3, or 1 for grey images; `encode` takes and `decode` gives (B, 3, S, S) in either case.
        base_channels: width of the convolutions at full resolution.
        channel_multipliers: width at each resolution relative to `base_channels`.
        blocks: residual blocks per resolution in the encoder; the decoder has one more.
        attention_levels: resolutions of the encoder with attention behind each block, 0 the highest. The published
            decoder has it in its middle only.
        norm_groups: groups of the group norms.
        latent_scale: factor on latents that gives tokens a variance near 1.
    """

    @register_to_config
    def __init__(
        self,
        *,
        side: int,
        token_dim: int = 16,
        image_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        attention_levels: Sequence[int] = (4,),
        norm_groups: int = 32,
        latent_scale: float = 0.2325,
    ) -> None:
        super().__init__()
        if side < 1:
            raise SettingError(f"side is {side}: it must be at least 1")
        levels = len(channel_multipliers)
        if strangers := [level for level in attention_levels if not 0 <= level < levels]:
            raise SettingError(f"attention level {strangers[0]} is outside 0..{levels - 1}")
        self.side, self.image_size = side, side * 2 ** (levels - 1)
        self.num_tokens, self.token_dim = side * side, token_dim
        down = ["AttnDownEncoderBlock2D" if i in attention_levels else "DownEncoderBlock2D" for i in range(levels)]
        self.autoencoder = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=tuple(down),
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(base_channels * multiplier for multiplier in channel_multipliers),
            layers_per_block=blocks,
            latent_channels=token_dim,
            norm_num_groups=norm_groups,
            sample_size=self.image_size,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] (one channel will do for grey) -> tokens (B, N, C) float32 in raster order.

        The mean of the posterior, scaled. Raises SettingError for images of another size.
        """
        images = network_channels(images, self.image_size, self.config["image_channels"])
        weight = self.autoencoder.encoder.conv_in.weight
        mean = self.autoencoder.encode(images.to(weight.device, weight.dtype)).latent_dist.mean
        return mean.flatten(2).transpose(1, 2).float() * self.config["latent_scale"]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) -> images (B, 3, S, S) float32, clamped to [-1, 1]. Raises SettingError."""
        if tokens.ndim != 3 or tokens.shape[1:] != (self.num_tokens, self.token_dim):
            wanted = f"(B, {self.num_tokens}, {self.token_dim})"
            raise SettingError(f"tokens have shape {tuple(tokens.shape)}, expected {wanted}")
        latent = (tokens / self.config["latent_scale"]).transpose(1, 2)
        return decode_in_parts(
            self._reconstruct, latent.reshape(len(tokens), -1, self.side, self.side), self.image_size
        )

    def _reconstruct(self, latent: Tensor) -> Tensor:
        weight = self.autoencoder.decoder.conv_in.weight
        return self.autoencoder.decode(latent.to(weight.device, weight.dtype)).sample
