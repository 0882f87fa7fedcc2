"""Frame codecs of FAR (2503.19325): every frame of a clip to a grid of continuous latents and back, by itself.

All of them have one interface: `image_size`, `latent_shape` (C, H, W), `encode` of frames (..., 3, S, S) in [-1, 1] to
latents (..., C, H, W) whose variance is near 1, and `decode`. Any leading axes will do, and parts of bounded size go
through the networks. Knows nothing of generators or of time.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vgen.tokenizers.backbone import CPU_DECODE_PIXELS, grey
from vgen.tokenizers.codebook import KeepFloat32
from vgen.tokenizers.frequency import FrequencyVQ
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.tokenizers.vqgan import VQGAN
from vgen.types import SettingError

DEVICE_PIXELS = 1 << 22  # through a network at once on an accelerator: 64 frames of 256 x 256
DCAE_SCALE = 0.2889  # of the published autoencoders
IMAGE_TOKENIZERS: Mapping[str, type] = {"multiscale": MultiScaleVQ, "frequency": FrequencyVQ, "vqgan": VQGAN}
Shape = tuple[int, int, int]


def in_parts(function: Callable[[Tensor], Tensor], items: Tensor, size: int) -> Tensor:
    """`function` over items (..., a, b, c) that stand for images `size` pixels a side, a bounded number at once."""
    pixels = CPU_DECODE_PIXELS if items.device.type == "cpu" else DEVICE_PIXELS
    flat = items.reshape(-1, *items.shape[-3:])
    done = torch.cat([function(part) for part in flat.split(max(1, pixels // size**2))])
    return done.view(*items.shape[:-3], *done.shape[-3:])


def network_frames(frames: Tensor, size: int, channels: int) -> Tensor:
    """Frames (..., 3, S, S), or with one channel where the codec has one, in the codec's channels. SettingError."""
    if frames.ndim < 4 or frames.shape[-2:] != (size, size) or frames.shape[-3] not in (3, channels):
        raise SettingError(
            f"frames have shape {tuple(frames.shape)}, this codec takes (..., 3, {size}, {size}): resize or crop"
        )
    if not frames.is_floating_point():
        raise SettingError(f"frames are {frames.dtype}: give floats in [-1, 1]")
    if not frames.numel():
        raise SettingError(f"frames have shape {tuple(frames.shape)}: there are none")
    if channels == 1 and frames.shape[-3] == 3:
        return grey(frames.flatten(0, -4)).unflatten(0, frames.shape[:-3])
    return frames


def check_latents(latents: Tensor, shape: Shape) -> None:
    """Raise SettingError where latents are not (..., C, H, W) of `shape`."""
    if latents.ndim < 4 or tuple(latents.shape[-3:]) != shape or not latents.numel():
        wanted = ", ".join(str(side) for side in shape)
        raise SettingError(f"latents have shape {tuple(latents.shape)}, expected (..., {wanted})")


def pixels_of(images: Tensor) -> Tensor:
    """Decoded images (..., 1 or 3, S, S) -> (..., 3, S, S) float32 clamped to [-1, 1]."""
    return images.float().clamp(-1, 1).expand(*images.shape[:-3], 3, -1, -1)


class PixelCodec(KeepFloat32, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A codec without a network: it computes in float32, and says that it has the type that it was cast to.

    Pipelines take the type they report from any one of their parts.
    """

    cast_to = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PixelCodec":
        self.cast_to = fn(torch.empty(0, dtype=self.cast_to)).dtype
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.cast_to


class PatchPCA(PixelCodec):
    """Principal components of square pixel patches: a linear codec that is fitted, not trained.

    Components are ordered by variance and share one scale, so they keep their relative variances: whitening would make
    the many faint components as loud as the first. A shift of a picture is nearly linear in them.

    Args:
        image_size: side of the frames in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        components: of a patch, C, at most as many as it has values.
        image_channels: 3, or 1 for grey frames; `encode` takes and `decode` gives three in either case.
    """

    @register_to_config
    def __init__(self, *, image_size: int, patch_size: int = 8, components: int = 16, image_channels: int = 1) -> None:
        super().__init__()
        side = patch_grid(image_size, patch_size, image_channels)
        values = image_channels * patch_size**2
        if not 1 <= components <= values:
            raise SettingError(f"components is {components}: a patch has {values} values, so use 1..{values}")
        self.image_size, self.patch_size, self.image_channels = image_size, patch_size, image_channels
        self.latent_shape: Shape = (components, side, side)
        self.mean: Tensor
        self.basis: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.eye(values)[:components])  # (C, D), rows orthonormal
        self.register_buffer("scale", torch.ones(1))  # standard deviation of all components together

    @torch.no_grad()
    def fit(self, frames: Tensor | Iterable[Tensor]) -> "PatchPCA":
        """Learn mean, basis and scale from frames (..., 3, S, S) in [-1, 1], or from several such tensors in turn.

        Exact: the eigenvectors of the covariance, in float64. Each one's largest entry is made positive, so that the
        same frames always give the same basis. Raises SettingError where there is nothing to learn from.
        """
        mean, covariance = moments(self._patches(part) for part in parts_of(frames))
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        components = self.latent_shape[0]
        basis = vectors.flip(1)[:, :components].T
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        kept = variances.flip(0)[:components].clamp(min=0).mean()
        if kept <= 1e-12:
            raise SettingError("all patches are alike: nothing can be learnt from these frames")
        self.mean.copy_(mean)
        self.basis.copy_(basis * largest.sign())
        self.scale.fill_(float(kept.sqrt()))
        return self

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (..., 3, S, S) in [-1, 1] (one channel will do for a grey codec) -> latents (..., C, H, W) float32."""
        frames = network_frames(frames, self.image_size, self.image_channels)
        return in_parts(self._encode, frames.to(self.mean.device), self.image_size)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., C, H, W) -> frames (..., 3, S, S) float32, clamped to [-1, 1]."""
        check_latents(latents, self.latent_shape)
        return pixels_of(in_parts(self._decode, latents.to(self.mean.device), self.image_size))

    def _patches(self, frames: Tensor) -> Tensor:
        """Frames (..., 3, S, S) -> all their patches (n, D) float64."""
        frames = network_frames(frames, self.image_size, self.image_channels).flatten(0, -4)
        patches = F.pixel_unshuffle(frames.to(self.mean.device, torch.float64), self.patch_size)
        return patches.permute(0, 2, 3, 1).flatten(0, 2)

    def _encode(self, frames: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(frames.float(), self.patch_size) - self.mean[:, None, None]
        return torch.einsum("cd,ndhw->nchw", self.basis / self.scale, patches)

    def _decode(self, latents: Tensor) -> Tensor:
        patches = torch.einsum("cd,nchw->ndhw", self.basis * self.scale, latents.float())
        return F.pixel_shuffle(patches + self.mean[:, None, None], self.patch_size)


class PixelPatches(PixelCodec):
    """Pixels as they are, those of a patch stacked as channels: nothing is lost and nothing is learnt.

    `fit` may set the mean and the scale of all pixels together; without it latents are the pixels, in [-1, 1].

    Args:
        image_size: side of the frames in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels; C = image_channels * patch_size ** 2.
        image_channels: 3, or 1 for grey frames; `encode` takes and `decode` gives three in either case.
    """

    @register_to_config
    def __init__(self, *, image_size: int, patch_size: int = 1, image_channels: int = 3) -> None:
        super().__init__()
        side = patch_grid(image_size, patch_size, image_channels)
        self.image_size, self.patch_size, self.image_channels = image_size, patch_size, image_channels
        self.latent_shape: Shape = (image_channels * patch_size**2, side, side)
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    @torch.no_grad()
    def fit(self, frames: Tensor | Iterable[Tensor]) -> "PixelPatches":
        """Set mean and scale so that the latents of frames (..., 3, S, S) in [-1, 1] have mean 0 and variance 1."""
        mean, covariance = moments(self._pixels(part) for part in parts_of(frames))
        if covariance <= 1e-12:
            raise SettingError("all pixels are alike: nothing can be learnt from these frames")
        self.mean.copy_(mean)
        self.scale.copy_(covariance.sqrt()[0])
        return self

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (..., 3, S, S) in [-1, 1] (one channel will do for a grey codec) -> latents (..., C, H, W) float32."""
        frames = network_frames(frames, self.image_size, self.image_channels).to(self.mean.device).float()
        return F.pixel_unshuffle((frames - self.mean) / self.scale, self.patch_size)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., C, H, W) -> frames (..., 3, S, S) float32, clamped to [-1, 1]."""
        check_latents(latents, self.latent_shape)
        return pixels_of(
            F.pixel_shuffle(latents.to(self.mean.device).float(), self.patch_size) * self.scale + self.mean
        )

    def _pixels(self, frames: Tensor) -> Tensor:
        """Frames -> all their values (n, 1) float64."""
        frames = network_frames(frames, self.image_size, self.image_channels)
        return frames.to(self.mean.device, torch.float64).reshape(-1, 1)


class Normalizer(KeepFloat32):
    """Mean and standard deviation of every channel, which stay float32 when the network around them is cast."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, latents: Tensor) -> Tensor:
        """(..., C, H, W) -> mean 0 and variance 1 in every channel."""
        return (latents - self.mean[:, None, None]) / self.std[:, None, None]

    def inverse(self, latents: Tensor) -> Tensor:
        """What `forward` was given."""
        return latents * self.std[:, None, None] + self.mean[:, None, None]


class VQLatents(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The continuous latents of an image tokenizer, before it quantises them, at mean 0 and variance 1 per channel.

    Args:
        family: kind of the tokenizer, a key of IMAGE_TOKENIZERS.
        model: its configuration.
    """

    @register_to_config
    def __init__(self, *, family: str, model: dict[str, Any]) -> None:
        super().__init__()
        if family not in IMAGE_TOKENIZERS:
            raise SettingError(f"unknown family {family!r}: use one of {', '.join(IMAGE_TOKENIZERS)}")
        plain = {name: value for name, value in model.items() if name[0] != "_"}
        self.tokenizer = IMAGE_TOKENIZERS[family](**plain)
        self.image_size = self.tokenizer.image_size
        self.image_channels = self.tokenizer.config["image_channels"]
        side = self.tokenizer.side if family == "vqgan" else self.tokenizer.scales[-1]
        self.latent_shape: Shape = (self.tokenizer.config["code_dim"], side, side)
        self.normalizer = Normalizer(self.latent_shape[0])

    @classmethod
    def of(cls, tokenizer: MultiScaleVQ | VQGAN) -> "VQLatents":
        """The codec of a tokenizer, which it copies; to be fitted."""
        family = {kind: name for name, kind in IMAGE_TOKENIZERS.items()}.get(type(tokenizer))
        if family is None:
            raise SettingError(f"{type(tokenizer).__name__} has no such latents: use {', '.join(IMAGE_TOKENIZERS)}")
        codec = cls(family=family, model={k: v for k, v in tokenizer.config.items() if k[0] != "_"})
        codec.tokenizer.load_state_dict(tokenizer.state_dict())
        return codec.eval()

    @torch.no_grad()
    def fit(self, images: Tensor | Iterable[Tensor]) -> "VQLatents":
        """Take mean and deviation of every channel from images (..., 3, S, S) in [-1, 1], in float64."""
        mean, covariance = moments(self._vectors(part) for part in parts_of(images))
        variance = covariance.diagonal()
        if variance.min() <= 1e-12:
            raise SettingError(f"channel {int(variance.argmin())} of the latents never changes: give other images")
        self.normalizer.mean.copy_(mean)
        self.normalizer.std.copy_(variance.sqrt())
        return self

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (..., 3, S, S) in [-1, 1] (one channel will do for a grey codec) -> latents (..., C, H, W) float32."""
        return self.normalizer(self._raw(frames))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., C, H, W) -> frames (..., 3, S, S) float32, clamped to [-1, 1]."""
        check_latents(latents, self.latent_shape)
        latents = self.normalizer.inverse(latents.to(self.device).float())
        return pixels_of(in_parts(self.tokenizer.reconstruct, latents, self.image_size))

    def _raw(self, frames: Tensor) -> Tensor:
        frames = network_frames(frames, self.image_size, self.image_channels).to(self.device)
        return in_parts(self.tokenizer.encode_latent, frames, self.image_size)

    def _vectors(self, images: Tensor) -> Tensor:
        """Images -> the latents of all their cells (n, C) float64."""
        return self._raw(images).flatten(0, -4).permute(0, 2, 3, 1).flatten(0, 2).double()


class DCAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The deep-compression autoencoder of the published FAR (2410.10733); the network is diffusers' AutoencoderDC.

    Args:
        network: AutoencoderDC's configuration; `scaling_factor` is 0.2889, the published one, where it has none.
        side: of the latent grid, H = W, which the weights leave open; every published model has 8.
    """

    @register_to_config
    def __init__(self, network: dict[str, Any], side: int = 8) -> None:
        super().__init__()
        if side < 1:
            raise SettingError(f"side is {side}: it must be at least 1")
        plain = {name: value for name, value in network.items() if name[0] != "_"}
        self.autoencoder = AutoencoderDC(**({"scaling_factor": DCAE_SCALE} | plain))
        self.image_size = side * self.autoencoder.spatial_compression_ratio
        self.image_channels = self.autoencoder.config["in_channels"]
        self.latent_shape: Shape = (self.autoencoder.config["latent_channels"], side, side)
        self.scaling_factor = float(self.autoencoder.config["scaling_factor"])

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (..., 3, S, S) in [-1, 1] -> latents (..., C, H, W) float32, scaled."""
        frames = network_frames(frames, self.image_size, self.image_channels)
        return in_parts(self._encode, frames.to(self.device), self.image_size) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., C, H, W) -> frames (..., 3, S, S) float32, clamped to [-1, 1]."""
        check_latents(latents, self.latent_shape)
        latents = latents.to(self.device) / self.scaling_factor
        return pixels_of(in_parts(self._decode, latents, self.image_size))

    def _encode(self, frames: Tensor) -> Tensor:
        return self.autoencoder.encode(frames.to(self.dtype)).latent.float()

    def _decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents.to(self.dtype)).sample.float()


# ---- fitting


def patch_grid(image_size: int, patch_size: int, image_channels: int) -> int:
    """Patches along a side of a frame. Raises SettingError where frames are not made of whole patches."""
    if image_channels not in (1, 3):
        raise SettingError(f"image_channels is {image_channels}: use 3, or 1 for grey frames")
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        raise SettingError(f"image_size {image_size} is no multiple of patch_size {patch_size}: change one")
    return image_size // patch_size


def parts_of(frames: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """One tensor, or several, as several."""
    return [frames] if isinstance(frames, Tensor) else frames


def moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of all rows of the given (n, D) float64 tensors. Raises SettingError for none.

    Each part's sums are taken about the mean of the first, so that no digits are lost where the mean is large.
    """
    count, origin = 0, None
    for part in parts:
        if origin is None:
            origin = part.mean(0)
            total, products = torch.zeros_like(origin), origin.new_zeros(len(origin), len(origin))
        centred = part - origin
        count, total, products = count + len(part), total + centred.sum(0), products + centred.T @ centred
    if origin is None:
        raise SettingError("there are no frames to learn from")
    shift = total / count
    return origin + shift, products / count - torch.outer(shift, shift)
