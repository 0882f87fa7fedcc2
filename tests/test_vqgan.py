"""The single-scale tokenizer: published figures, inverse pairs, and what it refuses."""

from typing import Any

import pytest
import torch
from golden_weights import fill, golden_figures, golden_layout
from tiny_models import randomise
from torch import Tensor

from vgen.tokenizers.vqgan import VQGAN, ResBlock
from vgen.types import SettingError

GOLDEN: dict[str, Any] = {"vocab_size": 24, "code_dim": 12, "base_channels": 32, "channel_multipliers": (1, 1, 2)}


@pytest.fixture(scope="module")
def golden() -> tuple[VQGAN, dict[str, Tensor]]:
    figures = golden_figures("vqgan")
    model = VQGAN(side=figures["latent"].shape[-1], **GOLDEN)
    layout = golden_layout("vqgan")["tokenizer"]
    state = {name.replace("quantize.embedding", "codebook"): fill(name, shape) for name, shape in layout.items()}
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["codebook.usage"] and not missing.unexpected_keys
    return model.eval(), figures


def tiny(**changes: Any) -> VQGAN:
    config: dict[str, Any] = {"side": 4, "vocab_size": 16, "code_dim": 4, "base_channels": 8, "norm_groups": 4}
    return randomise(VQGAN(**config | {"channel_multipliers": (1, 2), "blocks": 1} | changes))  # type: ignore[return-value]


@torch.no_grad()
def test_latents_tokens_and_reconstructions_are_the_published_ones(golden: tuple[VQGAN, dict[str, Tensor]]) -> None:
    model, figures = golden
    images = figures["image01"] * 2 - 1
    assert torch.allclose(model.encode_latent(images), figures["latent"], atol=1e-4)
    tokens = model.encode(images)
    assert torch.equal(tokens, figures["tokens"].flatten(1).long())
    rebuilt = model.reconstruct(model.latent(tokens))
    assert torch.allclose((rebuilt + 1) / 2, figures["reconstruction01"], atol=1e-4)
    assert torch.equal(model.decode(tokens), rebuilt.clamp(-1, 1))


def test_the_published_size_has_the_published_number_of_tensors() -> None:
    """Spec: 168 tensors and 54,515,587 parameters; the usage counter is ours."""
    with torch.device("meta"):
        state = VQGAN(side=16, vocab_size=1024, code_dim=256).state_dict()
    del state["codebook.usage"]
    assert len(state) == 168 and sum(tensor.numel() for tensor in state.values()) == 54_515_587


@torch.no_grad()
def test_where_the_width_changes_the_shortcut_drops_the_input() -> None:
    block = randomise(ResBlock(4, 8, 2))
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    h = block.conv2(torch.nn.functional.silu(block.norm2(block.conv1(torch.nn.functional.silu(block.norm1(x))))))
    assert torch.allclose(block(x), h + block.nin_shortcut(h), atol=1e-6)
    same = randomise(ResBlock(4, 4, 2))
    for parameter in same.conv2.parameters():
        parameter.zero_()
    assert torch.equal(same(x), x)


def test_grey_images_come_as_one_channel_or_three() -> None:
    model = tiny(image_channels=1)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(model.encode(images), model.encode(images.expand(-1, 3, -1, -1)))
    rebuilt = model.decode(model.encode(images))
    assert rebuilt.shape == (2, 3, 8, 8) and torch.equal(rebuilt[:, 0], rebuilt[:, 2])


def test_tokens_lie_on_a_grid_in_raster_order() -> None:
    model = tiny()
    tokens = torch.arange(16)[None]
    latent = model.latent(tokens)
    assert latent.shape == (1, 4, 4, 4)
    for row in range(4):
        for column in range(4):
            assert torch.equal(latent[0, :, row, column], model.codebook.weight[4 * row + column])
    assert torch.equal(model.codebook.nearest(latent.flatten(2).transpose(1, 2)), tokens)


def test_a_row_of_a_batch_equals_its_solo_run() -> None:
    model = tiny()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = model.encode(images)
    assert torch.equal(tokens[1:2], model.encode(images[1:2]))
    assert torch.allclose(model.decode(tokens)[1:2], model.decode(tokens[1:2]), atol=1e-5)


def test_gradients_pass_straight_through_the_quantiser() -> None:
    model = tiny().requires_grad_(True)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    rebuilt, losses, ((vectors, tokens),) = model(images)
    assert torch.allclose(rebuilt, model.reconstruct(model.latent(tokens)), atol=1e-5)
    codes = model.codebook.lookup(tokens)
    assert torch.allclose(losses, (codes - vectors).square().mean().expand(2), atol=1e-6)
    (rebuilt.square().mean()).backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0 and model.codebook.weight.grad is None


def test_saving_and_loading_gives_the_same_tokens(tmp_path: Any) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert torch.equal(VQGAN.from_pretrained(tmp_path).encode(images), model.encode(images))


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (2, 2, 8, 8), (3, 8, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=r"takes \(B, 3, 8, 8\)"):
        tiny().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 15, dtype=torch.int64), r"expected \(B, 16\)"),
        (torch.full((1, 16), 16), r"0\.\.15, found 16"),
        (torch.full((1, 16), -1), "found -1"),
    ],
)
def test_tokens_out_of_bounds_are_refused(tokens: Tensor, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        tiny().decode(tokens)
