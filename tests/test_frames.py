"""Frame codecs: round trips, what fitting promises, the published autoencoder's golden figures."""

import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomize
from tiny_models import random_images, tiny_frequency, tiny_tokenizer
from torch import Tensor, nn

from vgen.tokenizers import frames
from vgen.tokenizers.frames import DCAutoencoder, PatchPCA, PixelPatches, VQLatents
from vgen.tokenizers.vqgan import VQGAN
from vgen.types import SettingError

TYPES = ["ResBlock"] * 3 + ["EfficientViTBlock"]
TINY_DC: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": TYPES,
    "decoder_block_types": TYPES,
    "encoder_block_out_channels": [8, 16, 16, 32],
    "decoder_block_out_channels": [8, 16, 16, 32],
    "encoder_layers_per_block": [0, 1, 1, 1],
    "decoder_layers_per_block": [0, 1, 1, 1],
    "encoder_qkv_multiscales": [[]] * 4,
    "decoder_qkv_multiscales": [[]] * 4,
    "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"],
    "decoder_act_fns": ["relu"] * 3 + ["silu"],
}
TINY_VQGAN: dict[str, Any] = {
    "side": 4,
    "vocab_size": 16,
    "code_dim": 4,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "blocks": 1,
    "norm_groups": 4,
}


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """The golden figures' noise in [-0.5, 0.5), which follows from a tensor's name and shape, float64."""
    i = torch.arange(math.prod(shape))
    return ((31 * i * i + 7919 * i + zlib.crc32(name.encode())) % 10007).view(shape).double() / 10007 - 0.5


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight of the golden figures."""
    noise = wave(name, shape)
    if name.endswith("running_var"):
        return 1 + 0.2 * noise
    if len(shape) >= 2:
        return noise * 2 * math.sqrt(3 / math.prod(shape[1:]))
    return 1 + 0.2 * noise if name.endswith(".weight") else 0.2 * noise


def tiny_dcae(**changes: Any) -> DCAutoencoder:
    """32 x 32 pixels, 4 x 4 x 4 latents, with the golden weights."""
    codec = DCAutoencoder(TINY_DC | changes, side=4).eval()
    state = codec.autoencoder.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    codec.autoencoder.load_state_dict(state | {name: fill(name, tuple(state[name].shape)).float() for name in names})
    return codec


def tiny_vqgan() -> VQGAN:
    model = VQGAN(**TINY_VQGAN)
    randomize(model, 3)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(batch: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """Pictures of a few large blobs in [-1, 1], grey ones in `channels` equal channels where that is 3."""
    coarse = noise(batch, 1, 5, 5, seed=seed)
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear").expand(-1, channels, -1, -1).clone()


def pca(**changes: Any) -> PatchPCA:
    return PatchPCA(**({"image_size": 16, "patch_size": 4, "components": 5, "image_channels": 1} | changes))


def every_codec() -> list[nn.Module]:
    """One of each kind, fitted where it is to be."""
    images = random_images(tiny_tokenizer(), 6)
    return [
        tiny_dcae(),
        VQLatents.of(tiny_tokenizer()).fit(images),
        VQLatents.of(tiny_frequency()).fit(images),
        VQLatents.of(tiny_vqgan()).fit(images),
        pca().fit(smooth(8, 1, 16)),
        pca(image_channels=3).fit(noise(8, 3, 16, 16)),
        PixelPatches(image_size=8, patch_size=2),
        PixelPatches(image_size=8, image_channels=1).fit(noise(8, 1, 8, 8)),
    ]


CODECS = ["dcae", "multiscale", "frequency", "vqgan", "pca", "pca-colour", "pixels", "pixels-grey"]


@pytest.fixture(params=range(len(CODECS)), ids=CODECS)
def codec(request: pytest.FixtureRequest) -> Any:
    return every_codec()[request.param]


# ---- what all of them promise


def test_frames_become_latents_of_the_promised_shape_and_come_back(codec: Any) -> None:
    size = codec.image_size
    clip = noise(2, 3, 3, size, size)
    latents = codec.encode(clip)
    assert latents.shape == (2, 3, *codec.latent_shape) and latents.dtype == torch.float32
    decoded = codec.decode(latents)
    assert decoded.shape == clip.shape and decoded.dtype == torch.float32
    assert not latents.requires_grad and not decoded.requires_grad
    assert codec.decode(latents * 100).abs().max() <= 1


def test_a_frame_is_coded_alike_alone_and_in_parts(codec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = codec.image_size
    clip = noise(2, 5, 3, size, size)
    latents = codec.encode(clip)
    decoded = codec.decode(latents)
    assert torch.allclose(codec.encode(clip[1, 3:4]), latents[1, 3:4], atol=1e-4)
    assert torch.allclose(codec.decode(latents[1, 3:4]), decoded[1, 3:4], atol=1e-4)
    monkeypatch.setattr(frames, "CPU_DECODE_PIXELS", 3 * size**2)
    assert torch.allclose(codec.encode(clip), latents, atol=1e-4)
    assert torch.allclose(codec.decode(latents), decoded, atol=1e-4)


def test_a_codec_survives_its_file(codec: Any, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    again = type(codec).from_pretrained(tmp_path).eval()
    clip = noise(3, 3, codec.image_size, codec.image_size)
    assert torch.equal(again.encode(clip), codec.encode(clip))
    assert (again.image_size, again.latent_shape) == (codec.image_size, codec.latent_shape)


def test_other_shapes_are_refused(codec: Any) -> None:
    size = codec.image_size
    channels, height, width = codec.latent_shape
    for shape in ((3, size, size), (2, 3, size, size + 2), (2, 2, size, size), (2, 0, 3, size, size)):
        with pytest.raises(SettingError, match="frames have shape"):
            codec.encode(torch.zeros(shape))
    with pytest.raises(SettingError, match="floats in"):
        codec.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    for shape in ((channels, height, width), (2, channels + 1, height, width), (0, channels, height, width)):
        with pytest.raises(SettingError, match="latents have shape"):
            codec.decode(torch.zeros(shape))


def test_a_cast_codec_still_gives_float32(codec: Any) -> None:
    clip = noise(2, 3, codec.image_size, codec.image_size)
    before = codec.encode(clip)
    nn.Module.to(codec, torch.bfloat16)
    after = codec.encode(clip)
    assert codec.dtype == torch.bfloat16  # what a pipeline reports
    assert after.dtype == torch.float32 and codec.decode(after).dtype == torch.float32
    assert (after - before).norm() / before.norm() < 0.1
    if isinstance(codec, PatchPCA | PixelPatches):
        assert torch.equal(after, before)
    if isinstance(codec, VQLatents):
        assert codec.normalizer.mean.dtype == codec.normalizer.std.dtype == torch.float32


@pytest.mark.parametrize("size", [8, 64, 300])
def test_networks_see_a_bounded_number_of_pixels(size: int) -> None:
    seen: list[int] = []

    def count(part: Tensor) -> Tensor:
        seen.append(len(part))
        return part

    items = torch.arange(2.0 * 700).view(2, 700, 1, 1, 1)
    assert torch.equal(frames.in_parts(count, items, size), items)
    assert sum(seen) == 1400 and max(seen) == min(1400, max(1, 65536 // size**2))


# ---- principal components


def reference(patches: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Mean and reconstruction by the singular value decomposition of centred patches (n, D), in float64."""
    mean = patches.double().mean(0)
    _, _, rows = torch.linalg.svd(patches.double() - mean, full_matrices=False)
    kept = rows[:components]
    return mean, (patches.double() - mean) @ kept.T @ kept + mean


@pytest.mark.parametrize("channels", [1, 3])
def test_the_basis_is_the_best_linear_one(channels: int) -> None:
    images = smooth(40, channels, 16) * 0.7 + 0.2 * noise(40, channels, 16, 16)
    codec = pca(image_channels=channels).fit(images)
    patches = nn.functional.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).flatten(0, 2)
    mean, best = reference(patches, 5)
    decoded = codec.decode(codec.encode(images))[:, :channels]
    found = nn.functional.pixel_unshuffle(decoded, 4).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(found.double(), best.clamp(-1, 1), atol=1e-5)
    assert torch.allclose(codec.mean.double(), mean, atol=1e-6)
    assert torch.allclose(codec.basis @ codec.basis.T, torch.eye(5), atol=1e-6)


def test_latents_have_unit_deviation_together_and_keep_their_proportions() -> None:
    images = smooth(60, 1, 16) * 0.1 + 0.3  # a small signal on a large mean
    latents = pca().fit(images).encode(images)
    assert latents.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    means, variances = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    assert means.abs().max() < 1e-4
    assert (variances.diff() < 0).all() and variances[0] > 4 * variances[2]  # ordered, and not whitened
    flat = latents.permute(1, 0, 2, 3).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(5)).abs().max() < 1e-3


def test_all_components_lose_nothing() -> None:
    images = noise(30, 3, 16, 16)
    codec = pca(components=48, image_channels=3).fit(images)
    assert torch.allclose(codec.decode(codec.encode(images)), images, atol=1e-5)


def test_fitting_in_parts_is_fitting_at_once() -> None:
    images = smooth(30, 1, 16) * 0.01 + 0.9
    whole, parts = pca().fit(images), pca().fit(images[i : i + 7] for i in range(0, 30, 7))
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name], tensor, atol=1e-5), name
    clips = pca().fit(images.view(5, 6, 1, 16, 16).expand(-1, -1, 3, -1, -1))  # grey in three channels
    assert torch.allclose(clips.basis, whole.basis, atol=1e-5)


def test_the_same_frames_give_the_same_signs() -> None:
    images = smooth(30, 1, 16)
    basis = pca().fit(images).basis
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    assert torch.allclose(pca().fit(images.flip(0)).basis, basis, atol=1e-5)


def test_patches_keep_their_places() -> None:
    """A change of one patch changes one cell of the latents, and the other way round."""
    codec = pca().fit(smooth(30, 1, 16))
    image = smooth(1, 1, 16, seed=5)
    changed = image.clone()
    changed[:, :, 8:12, 4:8] *= -1
    different = (codec.encode(image) != codec.encode(changed)).any(1)[0]
    assert different.nonzero().tolist() == [[2, 1]]


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(SettingError, match="alike"):
        pca().fit(torch.zeros(4, 1, 16, 16))
    with pytest.raises(SettingError, match="no frames"):
        pca().fit([])
    with pytest.raises(SettingError, match="alike"):
        PixelPatches(image_size=4).fit(torch.ones(4, 3, 4, 4))
    tokenizer = tiny_tokenizer()
    tokenizer.quant_conv.weight[2] = 0
    with pytest.raises(SettingError, match="channel 2 of the latents never changes"):
        VQLatents.of(tokenizer).fit(random_images(tokenizer, 3))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_size": 18}, "no multiple"),
        ({"patch_size": 0}, "no multiple"),
        ({"components": 17}, "1..16"),
        ({"components": 0}, "1..16"),
        ({"image_channels": 2}, "image_channels is 2"),
    ],
)
def test_components_out_of_bounds_are_named(changes: dict[str, int], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        pca(**changes)


# ---- pixels


@pytest.mark.parametrize(("channels", "patch_size"), [(3, 1), (1, 1), (3, 4), (1, 2)])
def test_pixels_come_back_exactly(channels: int, patch_size: int) -> None:
    codec = PixelPatches(image_size=8, patch_size=patch_size, image_channels=channels)
    images = noise(2, 5, channels, 8, 8)
    latents = codec.encode(images)
    assert codec.latent_shape == (channels * patch_size**2, 8 // patch_size, 8 // patch_size)
    assert torch.equal(latents.flatten().sort()[0], images.flatten().sort()[0])
    assert torch.equal(codec.decode(latents), images.expand(-1, -1, 3, -1, -1))
    assert torch.equal(latents[:, :, 0, 1, 0], images[:, :, 0, patch_size, 0])  # the patch below


def test_fitted_pixels_have_mean_0_and_variance_1() -> None:
    images = noise(20, 1, 8, 8) * 0.1 + 0.7
    codec = PixelPatches(image_size=8, patch_size=2, image_channels=1).fit(images)
    latents = codec.encode(images)
    assert abs(latents.mean().item()) < 1e-5 and latents.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(codec.decode(latents)[:, :1], images, atol=1e-6)


def test_grey_codecs_take_the_luma_of_colour() -> None:
    codec = PixelPatches(image_size=2, image_channels=1)
    colour = torch.tensor([0.5, -0.5, 1.0]).view(1, 3, 1, 1).expand(-1, -1, 2, 2)
    assert codec.encode(colour)[0, 0, 0, 0].item() == pytest.approx(0.299 * 0.5 - 0.587 * 0.5 + 0.114, abs=1e-6)


# ---- latents of image tokenizers


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_frequency, tiny_vqgan])
def test_normalised_latents_are_those_before_quantising(make: Any) -> None:
    tokenizer = make()
    images = random_images(tokenizer, 12)
    codec = VQLatents.of(tokenizer).fit(images)
    raw = tokenizer.encode_latent(images)
    latents = codec.encode(images)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(latents.var((0, 2, 3), correction=0), torch.ones(4), atol=1e-3)
    std, mean = raw.std((0, 2, 3), correction=0).view(4, 1, 1), raw.mean((0, 2, 3)).view(4, 1, 1)
    assert torch.allclose(latents, (raw - mean) / std, atol=1e-4)
    assert torch.allclose(codec.decode(latents), tokenizer.decode_latent(raw), atol=1e-4)


def test_the_tokenizer_is_copied() -> None:
    tokenizer = tiny_tokenizer()
    codec = VQLatents.of(tokenizer)
    images = random_images(tokenizer, 2)
    before = codec.encode(images)
    with torch.no_grad():
        tokenizer.quant_conv.weight.mul_(2)
    assert torch.equal(codec.encode(images), before)


def test_other_tokenizers_have_no_such_latents() -> None:
    with pytest.raises(SettingError, match="unknown family 'kl'"):
        VQLatents(family="kl", model={})
    with pytest.raises(SettingError, match="Linear has no such latents"):
        VQLatents.of(nn.Linear(2, 2))  # type: ignore[arg-type]


# ---- the published autoencoder


def probe(values: Tensor) -> list[float]:
    """Mean, mean size, norm, the first eight and the last four values."""
    flat = values.double().flatten()
    return [flat.mean().item(), flat.abs().mean().item(), flat.norm().item(), *flat[:8].tolist(), *flat[-4:].tolist()]


def test_the_published_figures_of_the_autoencoder() -> None:
    """Its raw latents and reconstruction, computed by the published code; 16 positions take its linear attention."""
    codec = tiny_dcae()
    assert (codec.image_size, codec.latent_shape, codec.scaling_factor) == (32, (4, 4, 4), 0.2889)
    latents = codec.encode((wave("img", (1, 3, 32, 32)) * math.sqrt(12)).float() / 3)
    encoded = [0.159731, 1.756474, 18.88791, 0.70063, 0.95142, 0.6859, 0.46779, 2.84117, -0.39332, 1.55652, 0.09934]
    encoded += [0.12508, -4.48925, -2.80005, -0.8763]
    assert probe(latents / 0.2889) == pytest.approx(encoded, abs=1e-4)
    decoded = [-0.060467, 0.626141, 43.63228, 0.74077, -0.03395, 0.67203, 0.91601, 0.40997, 0.95022, -0.05327, 0.49577]
    decoded += [-0.22061, -1.76334, 0.75576, -0.8165]
    raw = codec.autoencoder.decode(latents / 0.2889).sample
    assert probe(raw) == pytest.approx(decoded, abs=1e-4)
    assert torch.allclose(codec.decode(latents), raw.clamp(-1, 1), atol=1e-5)


def test_latents_are_scaled_by_the_factor_of_the_configuration() -> None:
    image = noise(1, 3, 32, 32)
    plain, scaled = tiny_dcae(scaling_factor=1.0), tiny_dcae(scaling_factor=0.5)
    assert torch.allclose(scaled.encode(image), plain.encode(image) / 2)
    assert torch.allclose(scaled.decode(plain.encode(image) / 2), plain.decode(plain.encode(image)), atol=1e-6)


@pytest.mark.parametrize(
    ("extra", "down", "parameters", "tensors"),
    [(0, 8, 127_920_940, 250), (1, 16, 215_758_380, 306), (2, 32, 323_356_460, 362)],
)
def test_the_published_sizes(extra: int, down: int, parameters: int, tensors: int) -> None:
    widths, blocks = [128, 256, 512, 512, 1024, 1024], ["ResBlock"] * 3 + ["EfficientViTBlock"] * (1 + extra)
    config = {
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": widths[: 4 + extra],
        "decoder_block_out_channels": widths[: 4 + extra],
        "encoder_layers_per_block": [0, 4, 8, 2, 2, 2][: 4 + extra],
        "decoder_layers_per_block": [0, 5, 10, 2, 2, 2][: 4 + extra],
        "encoder_qkv_multiscales": [[]] * (4 + extra),
        "decoder_qkv_multiscales": [[]] * (4 + extra),
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * (1 + extra),
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * (1 + extra),
    }
    with torch.device("meta"):
        codec = DCAutoencoder(config)
    assert codec.latent_shape == (32, 8, 8) and codec.image_size == 8 * down
    assert sum(parameter.numel() for parameter in codec.parameters()) == parameters
    assert len(codec.autoencoder.state_dict()) == tensors


def test_a_side_of_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="side is 0"):
        DCAutoencoder(TINY_DC, side=0)
