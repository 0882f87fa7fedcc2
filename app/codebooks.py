"""What a tokenizer does with images: how often it uses its codes, what they decode to, round trips, bands.

Tensors in and out; knows neither jobs nor pages.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgen.app.pictures import read_picture
from vgen.data import BUILT_IN, open_source, spread, to_model_range, to_uint8, to_unit_range
from vgen.spectrum import band_of_frequency, keep_bands
from vgen.tokenizers.backbone import grey
from vgen.types import SettingError

BATCH = 32  # images that are encoded at a time


# ---- codes


@dataclass(frozen=True)
class Usage:
    """How often each code was used."""

    counts: Tensor  # (V,) int64

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def dead(self) -> int:
        """Codes that were not used at all."""
        return int((self.counts == 0).sum())

    @property
    def perplexity(self) -> float:
        """e to the entropy of the codes' shares: their number where all are used equally."""
        return float(torch.special.entr(self.counts.double() / max(self.total, 1)).sum().exp())


def count_codes(scales: Sequence[Tensor], vocab_size: int) -> list[Usage]:
    """Of tokens (B, n_k), scale by scale; what is no code (masked, unknown) is left out."""
    found = []
    for tokens in scales:
        codes = tokens[(tokens >= 0) & (tokens < vocab_size)]
        found.append(Usage(torch.bincount(codes.flatten().cpu(), minlength=vocab_size)))
    return found


def together(usages: Sequence[Usage]) -> Usage:
    """Of all scales."""
    return Usage(torch.stack([usage.counts for usage in usages]).sum(0))


def codebook_of(tokenizer: Any) -> Tensor:
    """All code vectors (V, C) float32. Raises SettingError where there is no codebook."""
    codebook = getattr(tokenizer, "codebook", None)
    if codebook is None:
        raise SettingError("this model has no codebook: choose one with codes, such as fashion-var")
    return codebook.weight.detach().float().cpu()


def nearest_codes(vectors: Tensor, code: int, count: int) -> list[tuple[int, float]]:
    """The codes whose vectors (V, C) lie nearest to one's, and their Euclidean distances; itself left out."""
    distance = (vectors - vectors[code]).square().sum(1).sqrt()
    distance[code] = torch.inf
    near = distance.topk(min(count, len(vectors) - 1), largest=False)
    return list(zip(near.indices.tolist(), near.values.tolist(), strict=True))


@torch.no_grad()
def decode_codes(tokenizer: Any, codes: Sequence[int], scale: int = 0) -> Tensor:
    """What an image of one code alone decodes to, (n, 3, S, S) uint8: every token of the grid is it, or every token
    of one scale, nothing else being added."""
    ids = torch.tensor(list(codes), device=codebook_device(tokenizer))
    if not hasattr(tokenizer, "scales"):
        latent = tokenizer.latent(ids[:, None].expand(-1, tokenizer.num_tokens))
    else:
        tokens = ids[:, None].expand(-1, tokenizer.scales[scale] ** 2)
        latent = tokenizer.add_scale(tokenizer.new_latent(len(ids)), tokenizer.embed(tokens), scale)
    return to_uint8(to_unit_range(tokenizer.decode_latent(latent))).cpu()


def codebook_device(tokenizer: Any) -> torch.device:
    return tokenizer.codebook.weight.device


def encode_scales(tokenizer: Any, images: Tensor) -> list[Tensor]:
    """Tokens of images (B, 3, S, S) uint8, (B, n_k) for every scale, on the CPU."""
    parts = [_encode(tokenizer, images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return [torch.cat(scale) for scale in zip(*parts, strict=True)]


def _encode(tokenizer: Any, images: Tensor) -> list[Tensor]:
    tokens = tokenizer.encode(to_model_range(images).to(codebook_device(tokenizer)))
    return [part.cpu() for part in (tokens if isinstance(tokens, list) else [tokens])]


def held_out_images(pipeline: Any, count: int) -> Tensor | None:
    """Test images of the data set that has the model's classes, (n, 3, S, S) uint8; None where it is not on this
    machine: nothing is downloaded."""
    for name, known in BUILT_IN.items():
        if pipeline.class_names == known.class_names:
            with contextlib.suppress(SettingError):
                source = open_source(name, "test", pipeline.tokenizer.image_size, 3, download=False)
                return source.images(spread(len(source.labels), count))
    return None


# ---- pictures that are handed in


def open_picture(path: str | Path, size: int) -> Tensor:
    """A picture file, its middle square resized to (3, size, size) uint8. Raises SettingError for what is none, and
    for more pixels than are taken."""
    picture = read_picture(path)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


# ---- round trips


@dataclass(frozen=True)
class RoundTrip:
    """An image, what came back of it, and what came back after each scale."""

    original: Tensor  # (3, S, S) uint8, in the colours that the model knows
    prefixes: Tensor  # (K, 3, S, S) uint8; the last one is the whole reconstruction
    psnr: list[float]  # dB of each, against the original
    tokens: list[Tensor]  # (n_k,) each; none where the tokenizer has no codes


@torch.no_grad()
def round_trip(tokenizer: Any, image: Tensor) -> RoundTrip:
    """Encode and decode an image (3, S, S) uint8."""
    if tokenizer.config.get("image_channels") == 1:
        image = grey(image[None].float()).round().to(torch.uint8)[0].expand(3, -1, -1)
    device = next(tokenizer.parameters()).device
    tokens = tokenizer.encode(to_model_range(image)[None].to(device))
    known = tokens if isinstance(tokens, list) else [tokens]
    whole = [known[: k + 1] for k in range(len(known))] if isinstance(tokens, list) else [tokens]
    prefixes = torch.cat([to_uint8(to_unit_range(tokenizer.decode(part))).cpu() for part in whole])
    coded = not known[0].is_floating_point()
    return RoundTrip(image, prefixes, psnr(prefixes, image), [part[0].cpu() for part in known] if coded else [])


def psnr(images: Tensor, original: Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of images (B, 3, S, S) uint8 against one (3, S, S); inf where equal."""
    error = (images.double() - original.double()).square().flatten(1).mean(1) / 255**2
    return (-10 * error.log10()).tolist()


# ---- bands


def band_count(tokenizer: Any) -> int:
    """Scales, each of which adds a band; 0 where there are none."""
    return len(getattr(tokenizer, "scales", ()))


def frequency_bands(tokenizer: Any) -> Tensor:
    """The band of each frequency of a latent, (H, W): the tokenizer's own, or NFIG's default where it has none."""
    side, schedule = tokenizer.scales[-1], tokenizer.config.get("band_schedule", "none")
    return band_of_frequency(side, side, tokenizer.scales, "nyquist" if schedule == "none" else schedule)


@torch.no_grad()
def decode_bands(tokenizer: Any, tokens: Sequence[Tensor], kept: Sequence[int], by_frequency: bool) -> Tensor:
    """Images (B, 3, S, S) uint8 of the chosen bands alone: what these scales added, or these frequencies of the sum.

    Tokens are those of the first scales, (B, n_k) each.
    """
    device = codebook_device(tokenizer)
    given = [part.to(device) for part in tokens]
    if by_frequency:
        band = frequency_bands(tokenizer)
        latent = keep_bands(tokenizer.latent(given), torch.isin(band, torch.tensor(list(kept), dtype=band.dtype)))
    else:
        zero = tokenizer.new_latent(len(given[0]))
        parts = [tokenizer.add_scale(zero, tokenizer.embed(given[k]), k) for k in kept if k < len(given)]
        latent = torch.stack(parts).sum(0) if parts else zero
    return to_uint8(to_unit_range(tokenizer.decode_latent(latent))).cpu()
