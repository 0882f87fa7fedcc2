"""FAR's published checkpoints: what is inferred from names and shapes, what must be told, and what is refused."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from golden_weights import State
from test_conversion import finite_meta  # noqa: F401
from test_golden_far import far_layout, golden_input, golden_state, golden_weight
from torch import Tensor

import vgen
from vgen import cli
from vgen.conversion import save
from vgen.converters.far import convert_far
from vgen.generators.far import FAR
from vgen.tokenizers.frames import DCAutoencoder
from vgen.types import CheckpointError, SettingError


def refused(transformer: Any, tokenizer: Any = None, **overrides: Any) -> str:
    """The one line that a conversion fails with."""
    with pytest.raises(CheckpointError) as caught:
        vgen.convert("far", transformer=transformer, tokenizer=tokenizer, **overrides)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def on_meta(layout: dict[str, Any]) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in layout.items()}


# ---- the released sizes, on the meta device: width, depth, tensors and parameters without conditions

RELEASED: dict[str, tuple[int, int, dict[str, Any], int, int]] = {
    "FAR_B": (768, 12, {}, 226, 129_560_864),
    "FAR_M": (1024, 12, {}, 226, 230_156_832),
    "FAR_L": (1024, 24, {}, 442, 456_835_104),
    "FAR_L classes": (1024, 24, {"classes": 101}, 443, 456_939_552),
    "FAR_XL": (1152, 28, {}, 514, 673_703_584),
    "FAR_XL classes": (1152, 28, {"classes": 101}, 515, 673_821_088),
    "FAR_B_Long": (768, 12, {"actions": 4, "context_patch": 4}, 349, 158_111_776),
    "FAR_M_Long": (1024, 12, {"actions": 4, "context_patch": 4}, 349, 280_544_800),
}


@pytest.mark.usefixtures("finite_meta")
@pytest.mark.parametrize(("width", "depth", "kind", "tensors", "parameters"), RELEASED.values(), ids=RELEASED.keys())
def test_released_transformers_are_recognised(
    width: int, depth: int, kind: dict[str, Any], tensors: int, parameters: int
) -> None:
    layout = far_layout(width, depth, **kind)
    assert len(layout) == tensors
    assert sum(math.prod(shape) for shape in layout.values()) == parameters
    pipeline = convert_far(on_meta(layout))
    wanted = {
        "in_channels": 32,
        "side": 8,
        "patch_size": 1,
        "width": width,
        "depth": depth,
        "heads": width // 64,
        "rope_axes": [16, 24, 24],
        "num_classes": kind.get("classes", 0),
        "num_actions": kind.get("actions", 0),
        "context_patch_size": kind.get("context_patch"),
        "window": 16,
        "slope": 0.0,
        "prediction": "velocity",
        "spatial_embedding": False,
    }
    model = pipeline.generator
    assert isinstance(model, FAR)
    assert {name: model.config[name] for name in wanted} == wanted
    assert sum(p.numel() for p in model.parameters()) == parameters
    guidance = 2.0 if "classes" in kind else 1.5 if "actions" in kind else 1.0
    assert pipeline.config["settings"] == {"steps": 50, "guidance_scale": guidance}


def dcae_config(stages: int) -> dict[str, Any]:
    """The released autoencoders' configuration: 4 stages reduce 8 times, 5 stages 16, 6 stages 32."""
    channels, rest = [128, 256, 512, 512, 1024, 1024][:stages], stages - 3
    return {
        "in_channels": 3,
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * rest,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * rest,
        "encoder_block_out_channels": channels,
        "decoder_block_out_channels": channels,
        "encoder_layers_per_block": [0, 4, 8, 2, 2, 2][:stages],
        "decoder_layers_per_block": [0, 5, 10, 2, 2, 2][:stages],
        "encoder_qkv_multiscales": [[]] * stages,
        "decoder_qkv_multiscales": [[]] * stages,
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * rest,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * rest,
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
    }


@pytest.mark.usefixtures("finite_meta")
@pytest.mark.parametrize(
    ("stages", "tensors", "parameters"), [(4, 250, 127_920_940), (5, 306, 215_758_380), (6, 362, 323_356_460)]
)
def test_released_autoencoders_are_recognised(stages: int, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        state = AutoencoderDC(**dcae_config(stages)).state_dict()
    assert len(state) == tensors
    codec = convert_far(on_meta(far_layout(768, 1)), state).tokenizer
    assert isinstance(codec, DCAutoencoder)
    assert codec.config["network"] == dcae_config(stages)
    assert sum(p.numel() for p in codec.parameters()) == parameters
    assert codec.latent_shape == (32, 8, 8) and codec.image_size == 8 * 2 ** (stages - 1)
    assert codec.scaling_factor == 0.2889


# ---- other sizes: infer, never assume

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "patches": ({"patch": 2}, {"patch_size": 2}, {"in_channels": 4, "patch_size": 2}),
    "one channel": ({"channels": 1}, {}, {"in_channels": 1}),
    "classes": ({"classes": 7}, {}, {"num_classes": 7, "num_actions": 0}),
    "actions": ({"actions": 3}, {}, {"num_actions": 3, "num_classes": 0}),
    "long": ({"context_patch": 2}, {}, {"context_patch_size": 2}),
    "long, classes": ({"context_patch": 4, "classes": 2}, {"window": 4}, {"context_patch_size": 4, "window": 4}),
    "long, patches": ({"context_patch": 4, "patch": 2}, {"patch_size": 2}, {"context_patch_size": 4, "patch_size": 2}),
    "heads of 32": ({"head": 32}, {}, {"heads": 1, "rope_axes": [8, 12, 12]}),
    "told axes": ({}, {"rope_axes": [8, 4, 4]}, {"rope_axes": [8, 4, 4]}),
    "decay": ({}, {"slope": 0.25}, {"slope": 0.25}),
    "a larger grid": ({}, {"side": 16}, {"side": 16}),
}


@pytest.mark.parametrize(("published", "told", "wanted"), SIZES.values(), ids=SIZES.keys())
def test_any_transformer_is_recognised_and_keeps_its_weights(
    published: dict[str, Any], told: dict[str, Any], wanted: dict[str, Any]
) -> None:
    state = golden_state(**published)
    model = convert_far(state, **told).generator
    found = {name: model.config[name] for name in wanted}
    assert found == wanted
    assert (model.config["width"], model.config["depth"]) == (32, 2)
    kept = sorted(round(float(piece.double().sum()), 6) for name, piece in pieces(model).items())
    assert kept == pytest.approx(sorted(round(float(tensor.double().sum()), 6) for tensor in state.values()), abs=1e-5)
    count = model.config["window"] + 1
    latents = torch.zeros(1, count, model.config["in_channels"], model.config["side"], model.config["side"])
    assert model(latents, torch.full((1,), 500.0)).isfinite().all()


def pieces(model: FAR) -> State:
    """The model's tensors, those that hold several published layers cut into them."""
    cut = {"qkv": 3, "adaln": 2}
    found = {}
    for name, tensor in model.state_dict().items():
        parts = cut.get(name.split(".")[-2], 1) if name.startswith("blocks.") else 1
        found |= {f"{name}/{i}": piece for i, piece in enumerate(tensor.chunk(parts))}
    return found


def test_tensors_go_where_they_belong() -> None:
    state = golden_state(context_patch=2)
    found = pieces(convert_far(state).generator)
    block, ours = "transformer_blocks.0", "blocks.0"
    places = {
        f"{block}.norm1.linear": f"{ours}.adaln.*/0",
        f"{block}.norm2.linear": f"{ours}.adaln.*/1",
        f"{block}.attn.to_q": f"{ours}.attn.qkv.*/0",
        f"{block}.attn.to_k": f"{ours}.attn.qkv.*/1",
        f"{block}.attn.to_v": f"{ours}.attn.qkv.*/2",
        f"{block}.attn.add_q_proj": f"{ours}.context_attn.qkv.*/0",
        f"{block}.attn.add_k_proj": f"{ours}.context_attn.qkv.*/1",
        f"{block}.attn.add_v_proj": f"{ours}.context_attn.qkv.*/2",
        f"{block}.attn.to_add_out": f"{ours}.context_attn.proj.*/0",
        f"{block}.mlp.net.0.proj": f"{ours}.fc1.*/0",
        "norm_out.linear": "head_adaln.*/0",
        "context_proj_out": "context_head.*/0",
    }
    for published, place in places.items():
        for kind in ("weight", "bias"):
            assert torch.equal(state[f"{published}.{kind}"], found[place.replace("*", kind)]), published
    for published, place in (("norm_added_q", "context_attn.norm_q"), ("norm_k", "attn.norm_k")):
        assert torch.equal(state[f"{block}.attn.{published}.weight"], found[f"{ours}.{place}/0"])


@pytest.mark.parametrize("wrapped", ["state_dict", "module"])
def test_files_and_wrapped_checkpoints_are_opened(tmp_path: Path, wrapped: str) -> None:
    state = golden_state()
    wanted = convert_far(state).generator.state_dict()
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(prefixed if wrapped == "module" else {wrapped: state}, tmp_path / "far.pth")
    found = vgen.convert("far", transformer=tmp_path / "far.pth").generator.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# ---- the autoencoder

TINY_DCAE: dict[str, Any] = dcae_config(4) | {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_out_channels": [8, 16, 16, 32],
    "decoder_block_out_channels": [8, 16, 16, 32],
    "encoder_layers_per_block": [0, 1, 1, 1],
    "decoder_layers_per_block": [0, 1, 1, 1],
}


def golden_dcae(**changes: Any) -> State:
    """A published autoencoder by the rule of the golden figures; counts stay 0."""
    state = AutoencoderDC(**TINY_DCAE | changes).state_dict()
    filled = {}
    for name, tensor in state.items():
        value = golden_weight(name, tuple(tensor.shape)) if tensor.ndim else tensor
        filled[name] = value + 1 if name.endswith("running_var") else value  # 1 + 0.2 r
    return filled


D1 = [0.70063, 0.95142, 0.6859, 0.46779, 2.84117, -0.39332, 1.55652, 0.09934]
D2 = [0.74077, -0.03395, 0.67203, 0.91601, 0.40997, 0.95022, -0.05327, 0.49577]


def test_a_converted_autoencoder_gives_the_published_figures() -> None:
    codec = convert_far(golden_state(), golden_dcae(), side=4, attention_head_dim=4).tokenizer
    latents = codec.encode(golden_input("img", 1, 3, 32, 32) / 3)
    values = latents.flatten() / 0.2889
    assert [float(values.mean()), float(values.norm())] == pytest.approx([0.159731, 18.88791], abs=1e-4)
    assert values[:8].tolist() == pytest.approx(D1, abs=1e-4)
    assert values[-4:].tolist() == pytest.approx([0.12508, -4.48925, -2.80005, -0.8763], abs=1e-4)
    pixels = codec.decode(latents).flatten()
    assert pixels[:8].tolist() == pytest.approx(D2, abs=1e-4)
    assert pixels[-4:].tolist() == pytest.approx([-0.22061, -1.0, 0.75576, -0.8165], abs=1e-4)
    counts = [t for name, t in codec.state_dict().items() if name.endswith("num_batches_tracked")]
    assert len(counts) == 2 and all(count.dtype == torch.int64 for count in counts)


AUTOENCODERS: dict[str, dict[str, Any]] = {
    "attention at two scales": {
        "encoder_qkv_multiscales": [[], [], [], [5]],
        "decoder_qkv_multiscales": [[], [], [], [3]],
    },
    "a first stage with blocks": {"encoder_layers_per_block": [1, 1, 2, 1], "decoder_layers_per_block": [2, 1, 1, 3]},
    "no attention": {"encoder_block_types": ["ResBlock"] * 4, "decoder_block_types": ["ResBlock"] * 4},
    "one norm": {"decoder_norm_types": ["rms_norm"] * 4, "decoder_act_fns": ["silu"] * 4},
    "other sampling": {"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
}


@pytest.mark.parametrize("changes", AUTOENCODERS.values(), ids=AUTOENCODERS.keys())
def test_any_autoencoder_is_recognised_and_computes_the_same(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = AutoencoderDC(**TINY_DCAE | changes).eval().requires_grad_(False)
    codec = convert_far(golden_state(), network.state_dict(), side=4, attention_head_dim=4).tokenizer
    assert codec.config["network"] == TINY_DCAE | changes
    frames = torch.rand(2, 3, 32, 32) * 2 - 1
    wanted = network.encode(frames).latent
    torch.testing.assert_close(codec.encode(frames) / 0.2889, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(wanted * 0.2889), network.decode(wanted).sample.clamp(-1, 1))


# ---- refusals


def drop(name: str) -> State:
    return {key: tensor for key, tensor in golden_state(context_patch=2).items() if key != name}


def reshape(name: str, *shape: int) -> State:
    return golden_state(context_patch=2) | {name: torch.zeros(shape)}


BLOCK = "transformer_blocks.1"
BROKEN: dict[str, tuple[State, str]] = {
    "no embedding": (drop("x_embedder.weight"), "this is no FAR transformer: it lacks x_embedder.weight"),
    "no key": (drop(f"{BLOCK}.attn.to_k.weight"), f"missing {BLOCK}.attn.to_k.weight"),
    "no query": (drop(f"{BLOCK}.attn.to_q.bias"), f"missing {BLOCK}.attn.to_q.bias"),
    "no coarse value": (drop(f"{BLOCK}.attn.add_v_proj.bias"), f"missing {BLOCK}.attn.add_v_proj.bias"),
    "no second modulation": (drop(f"{BLOCK}.norm2.linear.bias"), f"missing {BLOCK}.norm2.linear.bias"),
    "no norm": (drop(f"{BLOCK}.attn.norm_added_k.weight"), f"missing {BLOCK}.attn.norm_added_k.weight"),
    "no way back": (drop("transformer_blocks.0.attn.to_add_out.bias"), "missing transformer_blocks.0.attn.to_add_out"),
    "no head": (drop("norm_out.linear.weight"), "missing norm_out.linear.weight"),
    "one too many": (reshape(f"{BLOCK}.attn.to_add_out.bias", 32), f"unexpected {BLOCK}.attn.to_add_out.bias"),
    "stranger": (reshape("text_embedder.weight", 32, 8), "unexpected text_embedder.weight"),
    "a wide value": (
        reshape(f"{BLOCK}.attn.to_v.weight", 33, 32),
        rf"{BLOCK}.attn.to_v.weight is \(33, 32\), but {BLOCK}.attn.to_q.weight is \(32, 32\)",
    ),
    "wrong modulations": (
        golden_state(context_patch=2) | {f"{BLOCK}.{norm}.linear.bias": torch.zeros(64) for norm in ("norm1", "norm2")},
        rf"{BLOCK}.norm1.linear.bias is \(128,\) instead of \(192,\)",
    ),
    "a narrow MLP": (reshape(f"{BLOCK}.mlp.net.2.weight", 32, 96), r"mlp.net.2.weight is \(32, 96\) instead of"),
    "a vector": (reshape("x_embedder.weight", 32), "unexpected names or shapes"),
    "VAR": ({"word_embed.weight": torch.zeros(4, 4)}, "a VAR or M-VAR checkpoint, not a FAR one: convert it as var"),
    "MAR": ({"z_proj.weight": torch.zeros(4, 4)}, "an MAR checkpoint, not a FAR one: convert it as mar"),
    "MaskGIT": ({"token_emb.word_embeddings.weight": torch.zeros(4, 4)}, "a MaskGIT or MAGE checkpoint"),
    "autoencoder": (golden_dcae(), "an autoencoder, not a FAR transformer: give it as the tokenizer"),
    "not numbers": (
        golden_state() | {"proj_out.bias": torch.full((4,), torch.nan)},
        "values that are not numbers, in proj_out.bias",
    ),
}


@pytest.mark.parametrize(("state", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_transformers_that_do_not_fit_are_refused_by_name(state: State, message: str) -> None:
    assert re.search(message, found := refused(state, side=4)), found


BROKEN_DCAE: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no output": ({"encoder.conv_out.weight": None}, "this is no FAR autoencoder: it lacks encoder.conv_out.weight"),
    "no bias": ({"decoder.up_blocks.2.1.conv1.bias": None}, "missing decoder.up_blocks.2.1.conv1.bias"),
    "no statistics": ({"decoder.up_blocks.1.1.norm.running_var": None}, "missing decoder.up_blocks.1.1.norm.running"),
    "stranger": ({"decoder.extra": torch.zeros(2)}, "unexpected decoder.extra"),
    "discriminator": ({"disc.weight": torch.zeros(2)}, "unexpected disc.weight"),
    "shape": ({"encoder.conv_out.bias": torch.zeros(5)}, r"encoder.conv_out.bias is \(5,\) instead of \(4,\)"),
    "transformer": ({"x_embedder.weight": torch.zeros(2, 2)}, "this is a FAR transformer, not its autoencoder"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN_DCAE.values(), ids=BROKEN_DCAE.keys())
def test_autoencoders_that_do_not_fit_are_refused_by_name(changes: dict[str, Tensor | None], message: str) -> None:
    state = {name: tensor for name, tensor in (golden_dcae() | changes).items() if tensor is not None}
    found = refused(golden_state(), state, side=4, attention_head_dim=4)
    assert re.search(message, found), found


def test_other_families_refuse_far() -> None:
    for family in ("var", "mvar", "mar", "maskgit", "mage"):
        with pytest.raises(CheckpointError, match=r"^this is no .* it lacks"):
            vgen.convert(family, transformer=golden_state())


TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "patches": ({"patch_size": 3}, "patch_size is 3, but tokens hold 4 values"),
    "axes": ({"rope_axes": [4, 4, 4]}, r"rope_axes are \[4, 4, 4\], whose sum is not 16"),
    "side": ({"side": 3, "patch_size": 2}, "side 3 is not a multiple of patch_size 2"),
    "window": ({"window": 0}, "window is 0"),
    "names": ({"class_names": ["a", "b"]}, "2 class names for 0 classes"),
    "stranger": ({"heads": 3}, "unknown override 'heads' for far: use one of side, patch_size"),
}


@pytest.mark.parametrize(("overrides", "message"), TOLD.values(), ids=TOLD.keys())
def test_overrides_that_do_not_fit_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        vgen.convert("far", transformer=golden_state(), **overrides)
    assert "\n" not in str(caught.value)


def test_heads_of_unusual_width_need_their_axes() -> None:
    with pytest.raises(SettingError, match=r"rope_axes \(2, 3, 3\) must be three even numbers whose sum is 8"):
        convert_far(golden_state(head=8))
    assert convert_far(golden_state(head=8), rope_axes=[4, 2, 2]).generator.config["heads"] == 4


def test_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(SettingError, match="latent is 4x4x4 against 1x4x4"):
        convert_far(golden_state(channels=1), golden_dcae(), side=4, attention_head_dim=4)


# ---- the converted model


def test_a_converted_model_is_saved_loaded_and_samples_the_same(tmp_path: Path) -> None:
    pipeline = convert_far(golden_state(classes=2), golden_dcae(), side=4, attention_head_dim=4, class_names=["a", "b"])
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"seeds": [3], "frames": 2, "steps": 2, "output_type": "pt"}
    wanted = pipeline("b", **settings).frames
    save(pipeline, tmp_path / "far")
    loaded = vgen.load(tmp_path / "far", device="cpu")
    assert wanted.shape == (1, 2, 3, 32, 32) and torch.equal(loaded("b", **settings).frames, wanted)
    assert not torch.equal(loaded("a", **settings).frames, wanted)
    counts = [m.num_batches_tracked for m in loaded.tokenizer.modules() if hasattr(m, "num_batches_tracked")]
    assert len(counts) == 2


def test_the_command_line_converts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(golden_state(context_patch=2, actions=3), tmp_path / "far.pth")
    flags = ["--window", "2", "--slope", "0.5", "--side", "4", "--rope-axes", "8,4,4", "--patch-size", "1"]
    given = ["convert", "far", "--transformer", str(tmp_path / "far.pth"), "--out", str(tmp_path / "m"), *flags]
    assert cli.main(given) == 0
    config = vgen.load(tmp_path / "m", device="cpu").generator.config
    assert (config["window"], config["slope"], config["side"], config["rope_axes"]) == (2, 0.5, 4, [8, 4, 4])
    assert str(tmp_path / "m") in capsys.readouterr().out
