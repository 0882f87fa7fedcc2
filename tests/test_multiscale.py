"""The multi-scale tokenizer: residual scales, prefixes, contexts, grey images, training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_images, random_tokens, tiny_tokenizer
from torch import Tensor

from vgen.tokenizers.backbone import grey
from vgen.tokenizers.multiscale import MultiScaleVQ, phi_index
from vgen.types import SettingError

SHAPES = {
    "colour": {},
    "grey": {"image_channels": 1},
    "first scale of four": {"scales": (2, 3, 6)},
    "one phi": {"num_phi": 1},
    "a phi per scale": {"num_phi": 4, "scales": (1, 3, 4, 8)},
    "no attention, three levels": {"attention_levels": (), "channel_multipliers": (1, 2, 2)},
    "other ratio, codes and blocks": {"phi_ratio": 0.25, "vocab_size": 33, "code_dim": 6, "blocks": 2},
}


ONE_SCALE = {"one scale": {"scales": (4,)}}


@pytest.fixture(params=(SHAPES | ONE_SCALE).values(), ids=(SHAPES | ONE_SCALE).keys())
def tokenizer(request: pytest.FixtureRequest) -> MultiScaleVQ:
    return tiny_tokenizer(**request.param)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def several_scales(request: pytest.FixtureRequest) -> MultiScaleVQ:
    return tiny_tokenizer(**request.param)


# ---- which residual convolution serves which scale


@pytest.mark.parametrize(
    ("scales", "expected"),
    [(10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]), (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3])],
)
def test_phi_table_of_the_published_models(scales: int, expected: list[int]) -> None:
    assert [phi_index(k, scales, 4) for k in range(scales)] == expected


@pytest.mark.parametrize("num_phi", [1, 2, 3, 5])
def test_other_numbers_of_phi_divide_the_scales_evenly(num_phi: int) -> None:
    """Ticks at the middles of `num_phi` equal parts, so every part of a fine division is served by its own phi."""
    scales = 10 * num_phi + 1
    indices = [phi_index(k, scales, num_phi) for k in range(scales)]
    assert indices == sorted(indices)
    assert set(np.bincount(indices)) <= {10, 11}


# ---- encoding and decoding


def slow_scale(tokenizer: MultiScaleVQ, tokens: Tensor, k: int) -> Tensor:
    """What scale k adds to the latent, formula by formula (spec 1.3)."""
    side, full, config = tokenizer.scales[k], tokenizer.scales[-1], tokenizer.config
    codes = tokenizer.codebook.weight[tokens].transpose(1, 2).unflatten(2, (side, side))
    up = codes if side == full else F.interpolate(codes, (full, full), mode="bicubic", align_corners=False)
    phi = tokenizer.phi[phi_index(k, len(tokenizer.scales), config["num_phi"])]
    return (1 - config["phi_ratio"]) * up + config["phi_ratio"] * phi(up)


def slow_encode(tokenizer: MultiScaleVQ, features: Tensor) -> list[Tensor]:
    """The published loop: what is left of the features shrinks scale by scale."""
    rest, tokens = features, []
    for k, side in enumerate(tokenizer.scales):
        cells = F.interpolate(rest, (side, side), mode="area").flatten(2).transpose(1, 2)
        tokens.append(torch.cdist(cells.double(), tokenizer.codebook.weight.double()).argmin(-1))
        rest = rest - slow_scale(tokenizer, tokens[-1], k)
    return tokens


def test_encode_is_the_published_loop(tokenizer: MultiScaleVQ) -> None:
    images = random_images(tokenizer, 2)
    tokens = tokenizer.encode(images)
    wanted = slow_encode(tokenizer, tokenizer.encode_latent(images))
    assert [item.shape for item in tokens] == [(2, side * side) for side in tokenizer.scales]
    assert all(item.dtype == torch.int64 for item in tokens)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tokens, wanted, strict=True))


def test_every_prefix_decodes_to_the_sum_of_its_scales(tokenizer: MultiScaleVQ) -> None:
    tokens = random_tokens(tokenizer, 2)
    latent = torch.zeros_like(tokenizer.new_latent(2))
    for k in range(len(tokens)):
        latent = latent + slow_scale(tokenizer, tokens[k], k)
        torch.testing.assert_close(tokenizer.latent(tokens[: k + 1]), latent, rtol=0, atol=1e-5)
        images = tokenizer.decode(tokens[: k + 1])
        assert images.shape == (2, 3, tokenizer.image_size, tokenizer.image_size)
        assert images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
        torch.testing.assert_close(images, tokenizer.decode_latent(latent), rtol=0, atol=1e-5)


def test_each_scale_quantises_what_the_scales_before_it_left() -> None:
    """Features built from tokens alone come back as those tokens, if the scales do not disturb one another."""
    tokenizer = tiny_tokenizer(phi_ratio=0.0, vocab_size=17)
    weight = tokenizer.codebook.weight
    weight[0] = 0
    for k in range(len(tokenizer.scales)):
        tokens = [torch.zeros(1, side * side, dtype=torch.int64) for side in tokenizer.scales]
        # The same code in all cells is a constant picture: scale k takes it whole, later scales see nothing.
        tokens[k] += 5
        latent = tokenizer.latent(tokens)
        torch.testing.assert_close(latent, weight[5].view(1, -1, 1, 1).expand_as(latent), rtol=0, atol=1e-5)
        assert tokenizer.quantize_scale(latent, 0).item() == 5
        left = latent - tokenizer.latent(tokens[: k + 1])
        assert all(tokenizer.quantize_scale(left, j).eq(0).all() for j in range(k + 1, len(tokens)))


def test_encode_of_a_batch_is_encode_of_its_rows(tokenizer: MultiScaleVQ) -> None:
    images = random_images(tokenizer, 3)
    together = tokenizer.encode(images)
    for row in range(3):
        alone = tokenizer.encode(images[row : row + 1])
        assert all(torch.equal(both[row : row + 1], one) for both, one in zip(together, alone, strict=True))


# ---- what the generator reads


def test_context_rows_are_what_sampling_reads(several_scales: MultiScaleVQ) -> None:
    tokens = random_tokens(several_scales, 2)
    context = several_scales.context(tokens)
    latent, start = several_scales.new_latent(2), 0
    for k, side in enumerate(several_scales.scales[1:], 1):
        latent = several_scales.add_scale(latent, several_scales.embed(tokens[k - 1]), k - 1)
        rows = context[:, start : start + side * side]
        assert torch.equal(rows, several_scales.read_scale(latent, k))
        area = F.interpolate(latent, (side, side), mode="area").flatten(2).transpose(1, 2)
        torch.testing.assert_close(rows, area, rtol=0, atol=1e-6)
        start += side * side
    assert start == context.shape[1]


def test_context_of_a_prefix_is_a_prefix_of_the_context(several_scales: MultiScaleVQ) -> None:
    tokens = random_tokens(several_scales, 2)
    context, ends = several_scales.context(tokens), np.cumsum([side * side for side in several_scales.scales[1:]])
    for given, end in enumerate(ends, 1):
        assert torch.equal(several_scales.context(tokens[:given]), context[:, :end])


def test_later_tokens_do_not_change_earlier_context(several_scales: MultiScaleVQ) -> None:
    tokens = random_tokens(several_scales, 2)
    context = several_scales.context(tokens)
    end = 0
    for k, side in enumerate(several_scales.scales):
        changed = [
            (item + 1) % several_scales.config["vocab_size"] if j == k else item for j, item in enumerate(tokens)
        ]
        end += side * side if k else 0
        other = several_scales.context(changed)
        assert torch.equal(other[:, :end], context[:, :end])
        assert k == len(tokens) - 1 or not torch.equal(other[:, end:], context[:, end:])


def test_a_single_scale_has_an_empty_context() -> None:
    tokenizer = tiny_tokenizer(scales=(4,))
    assert tokenizer.context(random_tokens(tokenizer, 2)).shape == (2, 0, 4)


# ---- grey images


def test_a_grey_tokenizer_takes_one_channel_or_three() -> None:
    tokenizer = tiny_tokenizer(image_channels=1)
    one = random_images(tokenizer, 2, channels=1)
    tokens = tokenizer.encode(one)
    assert all(torch.equal(a, b) for a, b in zip(tokens, tokenizer.encode(one.expand(-1, 3, -1, -1)), strict=True))
    images = tokenizer.decode(tokens)
    assert images.shape[1] == 3
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


def test_grey_is_luma() -> None:
    red, green, blue = torch.eye(3).view(3, 3, 1, 1)
    values = [grey(colour[None]).item() for colour in (red, green, blue)]
    assert values == pytest.approx([0.299, 0.587, 0.114], abs=1e-6)


# ---- mistakes


@pytest.mark.parametrize("shape", [(1, 3, 8, 7), (1, 3, 16, 16), (3, 8, 8), (1, 2, 8, 8), (1, 1, 8, 8)])
def test_images_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=r"\(B, 3, 8, 8\)"):
        tiny_tokenizer().encode(torch.zeros(shape))


def test_tokens_of_the_wrong_shape_or_range_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokens = random_tokens(tokenizer, 2)
    with pytest.raises(SettingError, match="tokens have shapes"):
        tokenizer.decode(tokens[1:])
    with pytest.raises(SettingError, match="tokens have shapes"):
        tokenizer.decode([*tokens, tokens[-1]])
    with pytest.raises(SettingError, match="tokens have shapes"):
        tokenizer.decode([])
    for strange in (16, -1):
        with pytest.raises(SettingError, match=rf"0\.\.15, found.*{strange}"):
            tokenizer.decode([*tokens[:3], tokens[3].index_fill(1, torch.tensor([4]), strange)])


@pytest.mark.parametrize("scales", [(), (0, 1), (1, 1, 2), (4, 2), (-1, 2)])
def test_scales_must_increase(scales: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="strictly increasing"):
        tiny_tokenizer(scales=scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_quantiser_works_whatever_the_dtype_of_the_network(dtype: torch.dtype) -> None:
    """Casting the model casts the network; codes, and the sums over scales, keep every bit."""
    whole, tokenizer = tiny_tokenizer(), tiny_tokenizer().to(dtype)
    tokens = tokenizer.encode(random_images(tokenizer, 2))
    assert tokenizer.encoder.conv_in.weight.dtype == dtype
    assert tokenizer.decode(tokens).dtype == torch.float32
    assert torch.equal(tokenizer.latent(tokens), whole.latent(tokens))
    agree = [(a == b).float().mean() for a, b in zip(tokens, whole.encode(random_images(whole, 2)), strict=True)]
    assert min(agree) > 0.5


# ---- training


def trainable() -> MultiScaleVQ:
    return tiny_tokenizer().requires_grad_(True).train()


def test_forward_reconstructs_what_decode_does() -> None:
    """In value; training only adds the straight-through gradient."""
    tokenizer = trainable().eval()
    images = random_images(tokenizer, 2)
    reconstruction = tokenizer(images)[0].clamp(-1, 1)
    torch.testing.assert_close(reconstruction, tokenizer.decode(tokenizer.encode(images)), rtol=0, atol=1e-5)


def test_quantiser_losses_are_the_mean_squared_distances_over_scales() -> None:
    tokenizer = trainable()
    images = random_images(tokenizer, 2)
    features = tokenizer.encode_latent(images).detach()
    tokens = tokenizer.encode(images)
    distances = [F.mse_loss(tokenizer.latent(tokens[: k + 1]), features) for k in range(len(tokens))]
    _, losses, quantized = tokenizer(images)
    assert losses.tolist() == pytest.approx([torch.stack(distances).mean().item()] * 2, rel=1e-5)
    assert [tuple(vectors.shape) for vectors, _ in quantized] == [(2, side * side, 4) for side in tokenizer.scales]
    assert all(torch.equal(chosen, wanted) for (_, chosen), wanted in zip(quantized, tokens, strict=True))
    torch.testing.assert_close(quantized[0][0][:, 0], features.mean((2, 3)), rtol=0, atol=1e-5)


def test_gradients_go_where_each_loss_belongs() -> None:
    tokenizer = trainable()
    images = random_images(tokenizer, 2)

    def moved(loss: Tensor) -> set[str]:
        tokenizer.zero_grad()
        loss.backward()
        found = {name for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        return {name.split(".")[0] for name in found}

    reconstruction = tokenizer(images)[0]
    assert moved(F.mse_loss(reconstruction, images)) == {"encoder", "quant_conv", "post_quant_conv", "decoder"}
    assert moved(tokenizer(images)[1][0]) == {"codebook", "phi"}
    assert moved(tokenizer(images)[1][1]) == {"encoder", "quant_conv"}


def test_straight_through_gradient_is_the_decoders_own() -> None:
    """The encoder's gradient is what the decoder would give a latent that was never quantised."""
    tokenizer = trainable()
    images = random_images(tokenizer, 2)
    latent = tokenizer.latent(tokenizer.encode(images)).detach().requires_grad_(True)
    F.mse_loss(tokenizer.reconstruct(latent), images).backward()

    features = []
    tokenizer.quant_conv.register_forward_hook(lambda module, given, out: features.append(out) or out.retain_grad())
    F.mse_loss(tokenizer(images)[0], images).backward()
    torch.testing.assert_close(features[0].grad, latent.grad, rtol=1e-3, atol=1e-6)


def test_a_forward_pass_changes_nothing() -> None:
    """Usage is counted by the trainer once a step has been applied."""
    tokenizer = trainable().train()
    tokenizer(random_images(tokenizer, 2))
    assert tokenizer.codebook.usage.sum() == 0
