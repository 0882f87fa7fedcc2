"""MAR's published checkpoints: its autoencoder against the published layout, and what is inferred and refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_weights import State, fill, golden_layout
from test_mar_pipeline import tiny_kl, tiny_mar
from torch import Tensor

from vgen.converters.mar import convert_mar
from vgen.pipelines.mar import MARPipeline
from vgen.tokenizers.kl import KLAutoencoder
from vgen.types import CheckpointError, SettingError

Layout = dict[str, list[int]]


def near(found: Tensor, wanted: Tensor, bound: float) -> bool:
    return float((found - wanted).abs().max()) < bound


# ---- the autoencoder


def conv(state: State, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def residual(state: State, name: str, x: Tensor) -> Tensor:
    h = conv(state, f"{name}.conv1", F.silu(norm(state, f"{name}.norm1", x)), padding=1)
    h = conv(state, f"{name}.conv2", F.silu(norm(state, f"{name}.norm2", h)), padding=1)
    return h + (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def attend(state: State, name: str, x: Tensor) -> Tensor:
    h = norm(state, f"{name}.norm", x)
    q, k, v = (conv(state, f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, HW)
    weights = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
    return x + conv(state, f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))


def middle(state: State, name: str, x: Tensor) -> Tensor:
    x = attend(state, f"{name}.attn_1", residual(state, f"{name}.block_1", x))
    return residual(state, f"{name}.block_2", x)


def published_encode(state: State, images: Tensor, levels: int, blocks: int) -> Tensor:
    """Section 4.1 of the published autoencoder, by its tensors' names: the posterior's mean, (B, C, h, w)."""
    x = conv(state, "encoder.conv_in", images, padding=1)
    for i in range(levels):
        for j in range(blocks):
            x = residual(state, f"encoder.down.{i}.block.{j}", x)
            if i == levels - 1:
                x = attend(state, f"encoder.down.{i}.attn.{j}", x)
        if i < levels - 1:
            x = conv(state, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = F.silu(norm(state, "encoder.norm_out", middle(state, "encoder.mid", x)))
    return conv(state, "quant_conv", conv(state, "encoder.conv_out", x, padding=1)).chunk(2, 1)[0]


def published_decode(state: State, latent: Tensor, levels: int, blocks: int) -> Tensor:
    x = conv(state, "decoder.conv_in", conv(state, "post_quant_conv", latent), padding=1)
    x = middle(state, "decoder.mid", x)
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            x = residual(state, f"decoder.up.{i}.block.{j}", x)
        if i:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(state, f"decoder.up.{i}.upsample.conv", x, padding=1)
    return conv(state, "decoder.conv_out", F.silu(norm(state, "decoder.norm_out", x)), padding=1)


def kl_layout(widths: tuple[int, ...] = (32, 32, 64), blocks: int = 2, dim: int = 4) -> Layout:
    """Names and shapes of a published autoencoder's tensors."""
    table: Layout = {}

    def put(name: str, *shape: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = list(shape), [shape[0]]

    def residual_block(name: str, a: int, b: int) -> None:
        put(f"{name}.norm1", a)
        put(f"{name}.conv1", b, a, 3, 3)
        put(f"{name}.norm2", b)
        put(f"{name}.conv2", b, b, 3, 3)
        if a != b:
            put(f"{name}.nin_shortcut", b, a, 1, 1)

    def attention_block(name: str, width: int) -> None:
        put(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}.{part}", width, width, 1, 1)

    last = widths[-1]
    for part, columns in (("encoder", 3), ("decoder", dim)):
        put(f"{part}.conv_in", widths[0] if part == "encoder" else last, columns, 3, 3)
        residual_block(f"{part}.mid.block_1", last, last)
        attention_block(f"{part}.mid.attn_1", last)
        residual_block(f"{part}.mid.block_2", last, last)
        put(f"{part}.norm_out", last if part == "encoder" else widths[0])
    put("encoder.conv_out", 2 * dim, last, 3, 3)
    put("decoder.conv_out", 3, widths[0], 3, 3)
    put("quant_conv", 2 * dim, 2 * dim, 1, 1)
    put("post_quant_conv", dim, dim, 1, 1)
    for i, width in enumerate(widths):
        above, below = widths[max(i - 1, 0)], widths[min(i + 1, len(widths) - 1)]
        for j in range(blocks):
            residual_block(f"encoder.down.{i}.block.{j}", width if j else above, width)
            if i == len(widths) - 1:
                attention_block(f"encoder.down.{i}.attn.{j}", width)
        for j in range(blocks + 1):
            residual_block(f"decoder.up.{i}.block.{j}", width if j else below, width)
        if i < len(widths) - 1:
            put(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
        if i:
            put(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
    return table


def filled(layout: Layout) -> State:
    return {name: fill(name, shape) for name, shape in layout.items()}


def test_a_converted_autoencoder_computes_what_the_published_layout_says() -> None:
    state = filled(kl_layout())
    kl = convert_mar(filled(GOLDEN), {"model": state | {"loss.logvar": torch.zeros(())}}).tokenizer
    assert (kl.side, kl.image_size, kl.num_tokens, kl.token_dim) == (4, 16, 16, 4)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = kl.encode(images)
    wanted = published_encode(state, images, 3, 2) * 0.2325
    assert wanted.abs().max() > 0.01
    assert near(tokens, wanted.permute(0, 2, 3, 1).reshape(2, 16, 4), 1e-4)  # raster order
    wanted = published_decode(state, wanted / 0.2325, 3, 2)
    assert wanted.abs().max() > 0.5
    assert near(kl.decode(tokens), wanted.clamp(-1, 1), 1e-4)


def test_the_published_autoencoder_has_the_published_sizes() -> None:
    with torch.device("meta"):
        kl = KLAutoencoder(side=16)
    published = kl_layout((128, 128, 256, 256, 512), dim=16)
    assert (kl.image_size, kl.num_tokens, kl.token_dim) == (256, 256, 16)
    ours = kl.state_dict().values()
    assert len(ours) == len(published)
    assert sum(tensor.numel() for tensor in ours) == sum(math.prod(shape) for shape in published.values())


def test_autoencoders_take_grey_images_and_refuse_others() -> None:
    kl = tiny_kl(image_channels=1)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert near(kl.encode(images.expand(-1, 3, -1, -1)), kl.encode(images), 1e-6)
    assert kl.decode(torch.zeros(2, 16, 3)).shape == (2, 3, 8, 8)
    for call, message in (
        (lambda: kl.encode(images[..., :7]), "images have shape"),
        (lambda: kl.decode(torch.zeros(2, 15, 3)), r"expected \(B, 16, 3\)"),
        (lambda: tiny_kl(attention_levels=(2,)), "attention level 2 is outside 0..1"),
        (lambda: tiny_kl(side=0), "side is 0"),
    ):
        with pytest.raises(SettingError, match=message):
            call()


def test_saving_and_loading_gives_the_same_tokens(tmp_path: Path) -> None:
    kl, images = tiny_kl(), torch.rand(1, 3, 8, 8)
    kl.save_pretrained(tmp_path)
    assert torch.equal(KLAutoencoder.from_pretrained(tmp_path).eval().encode(images), kl.encode(images))


# ---- published transformers

GOLDEN: Layout = golden_layout("mar")["transformer"]


def mar_layout(width: int, depth: int, head_width: int, head_depth: int, **sizes: int) -> Layout:
    """Names and shapes of a published transformer's tensors."""
    tokens, dim = sizes.get("tokens", 256), sizes.get("dim", 16)
    slots, classes = tokens + sizes.get("buffer", 64), sizes.get("classes", 1000)
    table: Layout = {"class_emb.weight": [classes, width], "fake_latent": [1, width], "mask_token": [1, 1, width]}
    for name, length in (("encoder", slots), ("decoder", slots), ("diffusion", tokens)):
        table[f"{name}_pos_embed_learned"] = [1, length, width]

    def put(name: str, rows: int, *columns: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = [rows, *columns], [rows]

    put("z_proj", width, dim)
    put("z_proj_ln", width)
    put("decoder_embed", width, width)
    for stack in ("encoder", "decoder"):
        put(f"{stack}_norm", width)
        for i in range(depth):
            block = f"{stack}_blocks.{i}"
            put(f"{block}.norm1", width)
            put(f"{block}.norm2", width)
            put(f"{block}.attn.qkv", 3 * width, width)
            put(f"{block}.attn.proj", width, width)
            put(f"{block}.mlp.fc1", 4 * width, width)
            put(f"{block}.mlp.fc2", width, 4 * width)
    net = "diffloss.net"
    put(f"{net}.time_embed.mlp.0", head_width, 256)
    put(f"{net}.time_embed.mlp.2", head_width, head_width)
    put(f"{net}.cond_embed", head_width, width)
    put(f"{net}.input_proj", head_width, dim)
    for i in range(head_depth):
        put(f"{net}.res_blocks.{i}.in_ln", head_width)
        put(f"{net}.res_blocks.{i}.mlp.0", head_width, head_width)
        put(f"{net}.res_blocks.{i}.mlp.2", head_width, head_width)
        put(f"{net}.res_blocks.{i}.adaLN_modulation.1", 3 * head_width, head_width)
    put(f"{net}.final_layer.linear", 2 * dim, head_width)
    put(f"{net}.final_layer.adaLN_modulation.1", 2 * head_width, head_width)
    return table


@pytest.mark.parametrize(
    ("sizes", "heads", "parameters"),
    [
        ((768, 12, 1024, 6), 12, 207_924_768),
        ((1024, 16, 1280, 8), 16, 478_326_304),
        ((1280, 20, 1536, 12), 16, 942_403_104),
    ],
)
def test_released_sizes_are_inferred(
    sizes: tuple[int, int, int, int], heads: int, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(()))  # nothing on the meta device has values
    assert mar_layout(64, 2, 48, 2, tokens=16, dim=4, buffer=8, classes=5) == GOLDEN
    state = {name: torch.empty(shape, device="meta") for name, shape in mar_layout(*sizes).items()}
    model = convert_mar(state).generator
    wanted = {
        "heads": heads,
        "num_tokens": 256,
        "token_dim": 16,
        "num_classes": 1000,
        "buffer_tokens": 64,
        "mlp_ratio": 4,
        **dict(zip(("width", "encoder_depth", "diffusion_width", "diffusion_depth"), sizes, strict=True)),
        "decoder_depth": sizes[1],
    }
    assert {key: model.config[key] for key in wanted} == wanted
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters


def test_averaged_weights_are_preferred() -> None:
    averaged = filled(GOLDEN)
    trained = {name: torch.zeros_like(tensor) for name, tensor in averaged.items()}
    checkpoint = {"model": trained, "model_ema": averaged}
    found = convert_mar(checkpoint, heads=2).generator
    assert torch.equal(found.token_embed.weight, averaged["z_proj.weight"])
    assert torch.equal(found.class_embed.weight[5], averaged["fake_latent"][0])
    del checkpoint["model_ema"]
    assert not convert_mar(checkpoint).generator.token_embed.weight.any()
    assert (found.config["heads"], convert_mar(checkpoint).generator.config["heads"]) == (2, 1)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder_blocks.1.mlp.fc1.bias", None, "missing decoder_blocks.1.mlp.fc1.bias"),
        ("diffloss.net.res_blocks.0.mlp.2.weight", None, "missing diffloss.net.res_blocks.0.mlp.2.weight"),
        ("encoder_norm.scale", [64], "unexpected encoder_norm.scale"),
        ("encoder_blocks.0.attn.proj.weight", [64, 60], r"encoder_blocks.0.attn.proj.weight is \(64, 60\) instead"),
        ("decoder_pos_embed_learned", [1, 23, 64], r"decoder_pos_embed_learned is \(23, 64\) instead of \(24, 64\)"),
        ("fake_latent", [1, 60], r"fake_latent is \(1, 60\)"),
        ("fake_latent", None, "lacks fake_latent"),
        ("class_emb.weight", [5], "unexpected names or shapes"),
    ],
)
def test_transformers_that_do_not_fit_are_refused_by_name(name: str, shape: Any, message: str) -> None:
    state = filled(GOLDEN)
    state.pop(name, None)
    with pytest.raises(CheckpointError, match=message):
        convert_mar(state if shape is None else state | {name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.up.2.block.2.conv1.weight", None, "missing decoder.up.2.block.2.conv1.weight"),
        ("encoder.down.2.attn.1.q.bias", None, "missing encoder.down.2.attn.1.q.bias"),
        ("decoder.up.0.attn.0.q.weight", [32, 32, 1, 1], "unexpected decoder.up.0.attn.0.q.weight"),
        ("decoder.up.1.upsample.conv.bias", [31], r"decoder.up.1.upsample.conv.bias is \(31,\) instead of \(32,\)"),
        ("quant_conv.weight", None, "lacks quant_conv.weight"),
    ],
)
def test_autoencoders_that_do_not_fit_are_refused_by_name(name: str, shape: Any, message: str) -> None:
    state = filled(kl_layout())
    state.pop(name, None)
    with pytest.raises(CheckpointError, match=message):
        convert_mar(filled(GOLDEN), state if shape is None else state | {name: torch.zeros(shape)})


def test_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(SettingError, match="token_dim is 6 against 4"):
        convert_mar(filled(GOLDEN), filled(kl_layout(dim=6)))
    with pytest.raises(SettingError, match="number of tokens is 4 against 16"):
        MARPipeline(tiny_kl(side=2), tiny_mar())
    with pytest.raises(SettingError, match="2 class names for 5 classes"):
        convert_mar(filled(GOLDEN), class_names=["a", "b"])
    with pytest.raises(CheckpointError, match="12 tokens, which form no square"):
        layout = mar_layout(64, 1, 8, 1, tokens=12, dim=4, buffer=8, classes=5)
        convert_mar(filled(layout), filled(kl_layout()))
