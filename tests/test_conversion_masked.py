"""MaskGIT's and MAGE's published checkpoints: what is inferred from names and shapes, and what is refused, by name."""

import functools
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import State, fill, golden_figures, golden_layout
from test_mage import CLASSES, FAKE, Layout, mage_layout, mage_state, published_logits

import vgen
from vgen.converters.maskgit import MAGE_SETTINGS, MASKGIT_SETTINGS, convert_mage, convert_maskgit
from vgen.generators.mage import MAGE
from vgen.hub import COMPONENTS
from vgen.tokenizers.vqgan import VQGAN
from vgen.types import CheckpointError, SettingError

# ---- the published layouts, for any size (spec 1.1 and 1.2)


def maskgit_layout(
    *, num_tokens: int = 16, vocab_size: int = 24, classes: int = 5, width: int = 192, half: int = 1, mlp_ratio: int = 4
) -> Layout:
    """The U-ViT: `half` in blocks, one between, `half` out blocks."""

    def embedding(name: str, rows: int, places: int) -> Layout:
        table = {"word_embeddings.weight": (rows, width), "position_embeddings.weight": (places, width)}
        table |= {"LayerNorm.weight": (width,), "LayerNorm.bias": (width,)}
        return {f"{name}.{key}": shape for key, shape in table.items()}

    def layer(name: str, *shape: int, bias: bool = True) -> Layout:
        return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})

    table = embedding("token_emb", vocab_size + 1, num_tokens) | embedding("context_embed", classes + 1, 1)
    names = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    for name in names:
        table |= layer(f"{name}.norm1", width) | layer(f"{name}.norm2", width)
        table |= layer(f"{name}.attn.qkv", 3 * width, width, bias=False) | layer(f"{name}.attn.proj", width, width)
        table |= layer(f"{name}.mlp.fc1", mlp_ratio * width, width) | layer(f"{name}.mlp.fc2", width, mlp_ratio * width)
        table |= layer(f"{name}.skip_linear", width, 2 * width) if name.startswith("out") else {}
    head = layer("mlm_layer.fc", width, width) | layer("mlm_layer.ln", width)
    return table | layer("norm", width) | head | {"mlm_layer.bias": (1, 1, vocab_size + 1)}


def vqgan_layout(
    *,
    vocab_size: int = 24,
    code_dim: int = 4,
    channels: int = 3,
    base: int = 32,
    multipliers: Sequence[int] = (1, 2),
    blocks: int = 1,
) -> Layout:
    """The tokenizer: no biases within residual blocks, shortcuts as wide as their output."""
    table: Layout = {"quantize.embedding.weight": (vocab_size, code_dim)}
    widths = [base * multiplier for multiplier in multipliers]

    def conv(name: str, rows: int, columns: int, side: int = 3, bias: bool = True) -> None:
        table[f"{name}.weight"] = (rows, columns, side, side)
        table.update({f"{name}.bias": (rows,)} if bias else {})

    def norm(name: str, size: int) -> None:
        table[f"{name}.weight"] = table[f"{name}.bias"] = (size,)

    def residual(name: str, width_in: int, width_out: int) -> None:
        norm(f"{name}.norm1", width_in)
        conv(f"{name}.conv1", width_out, width_in, bias=False)
        norm(f"{name}.norm2", width_out)
        conv(f"{name}.conv2", width_out, width_out, bias=False)
        if width_in != width_out:
            conv(f"{name}.nin_shortcut", width_out, width_out, 1, bias=False)

    for half, level, before in (("encoder", "down", [base, *widths]), ("decoder", "up", [*widths[1:], widths[-1]])):
        for i, width in enumerate(widths):
            for j in range(blocks):
                residual(f"{half}.{level}.{i}.block.{j}", width if j else before[i], width)
        for j in (1, 2):
            residual(f"{half}.mid.block_{j}", widths[-1], widths[-1])
    conv("encoder.conv_in", base, channels, bias=False)
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", code_dim, widths[-1], 1)
    conv("decoder.conv_in", widths[-1], code_dim)
    for i in range(1, len(widths)):
        conv(f"decoder.up.{i}.upsample.conv", widths[i], widths[i])
    norm("decoder.norm_out", base)
    conv("decoder.conv_out", channels, base)
    return table


def filled(table: Layout) -> State:
    return {name: fill(name, list(shape)) for name, shape in table.items()}


@functools.cache
def _whole(family: str) -> tuple[State, State]:
    """A small transformer and its tokenizer."""
    if family == "maskgit":
        return filled(maskgit_layout()), filled(vqgan_layout())
    return mage_state(num_tokens=16, vocab_size=24, decoder_width=64), filled(vqgan_layout())


def small(family: str, role: str = "transformer") -> State:
    """Dictionaries that may be changed, of tensors that may not."""
    return dict(_whole(family)[role == "tokenizer"])


def convert(family: str, transformer: Any = None, tokenizer: Any = None, **overrides: Any) -> Any:
    converter: Callable[..., Any] = convert_maskgit if family == "maskgit" else convert_mage
    return converter(small(family) if transformer is None else transformer, tokenizer, **overrides)


def refused(family: str, kind: type[Exception] = CheckpointError, **sources: Any) -> str:
    """The one line that a conversion fails with."""
    with pytest.raises(kind) as caught:
        convert(family, **sources)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def chosen(config: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in wanted}


def parameters(table: Layout) -> int:
    return sum(math.prod(shape) for name, shape in table.items() if not name.endswith("position_ids"))


# ---- the released sizes, on the meta device


@pytest.fixture
def finite_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values that could be checked."""
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(()))


def on_meta(table: Layout) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


RELEASED_VQGAN = vqgan_layout(vocab_size=1024, code_dim=256, base=128, multipliers=(1, 1, 2, 2, 4), blocks=2)
VQGAN_CONFIG = {
    "side": 16,
    "vocab_size": 1024,
    "code_dim": 256,
    "image_channels": 3,
    "base_channels": 128,
    "channel_multipliers": [1, 1, 2, 2, 4],
    "blocks": 2,
    "norm_groups": 32,
}


@pytest.mark.usefixtures("finite_meta")
def test_the_released_maskgit_is_recognised() -> None:
    table = maskgit_layout(num_tokens=256, vocab_size=1024, classes=1000, width=768, half=12)
    assert (len(table), parameters(table)) == (314, 193_655_297)
    assert (len(RELEASED_VQGAN), parameters(RELEASED_VQGAN)) == (168, 54_515_587)

    pipeline = convert("maskgit", on_meta(table), on_meta(RELEASED_VQGAN))
    wanted = {"num_tokens": 256, "vocab_size": 1024, "num_classes": 1000, "width": 768, "depth": 25, "heads": 8}
    wanted |= {"mlp_ratio": 4, "train_tied_head": False}
    assert chosen(pipeline.generator.config, wanted) == wanted
    assert sum(p.numel() for p in pipeline.generator.parameters()) == 193_655_297
    assert chosen(pipeline.tokenizer.config, VQGAN_CONFIG) == VQGAN_CONFIG
    assert sum(p.numel() for p in pipeline.tokenizer.parameters()) == 54_515_587
    assert pipeline.config["settings"] == MASKGIT_SETTINGS
    released = pipeline.resolve_settings({"full_steps": 8, "partial_steps": 1})
    assert (released["steps"], released["temperature"], released["choice_temperature"]) == (16, 0.65, 5.5)


# With what the path of tokens does not use; spec 3.1 gives these figures rounded.
RELEASED_MAGE = {"base": (768, 12, 12, 146.5), "large": (1024, 24, 16, 409.9)}


@pytest.mark.usefixtures("finite_meta")
@pytest.mark.parametrize("size", RELEASED_MAGE)
def test_the_released_mages_are_recognised(size: str) -> None:
    width, depth, heads, millions = RELEASED_MAGE[size]
    table = mage_layout(num_tokens=256, vocab_size=1024, width=width, decoder_width=width, depth=depth, decoder_depth=8)
    assert round(parameters(table) / 1e6, 1) == millions
    state = on_meta(table) | {f"vqgan.{name}": tensor for name, tensor in on_meta(RELEASED_VQGAN).items()}

    pipeline = convert("mage", {"model": state, "epoch": 1599})
    wanted = {"num_tokens": 256, "vocab_size": 1024, "width": width, "decoder_width": width, "encoder_depth": depth}
    wanted |= {"encoder_heads": heads, "decoder_depth": 8, "decoder_heads": 16, "mlp_ratio": 4}
    assert chosen(pipeline.generator.config, wanted) == wanted
    unused = 1000 * (width + 1)  # of 1001 more rows and biases the mask's and the start token's rows are used
    unused += 1 - width
    unused += 3 * 16 * 16 * width + width + 768 * width + 768  # pixels in and out
    unused += 2 * 257 * width + 2 * width  # sine positions, and the tokens of MAE
    assert sum(p.numel() for p in pipeline.generator.parameters()) == parameters(table) - unused
    assert chosen(pipeline.tokenizer.config, VQGAN_CONFIG) == VQGAN_CONFIG
    assert pipeline.config["settings"] == MAGE_SETTINGS


def test_our_tables_are_those_of_the_golden_models() -> None:
    golden = {key: tuple(shape) for key, shape in golden_layout("maskgit")["transformer"].items()}
    assert maskgit_layout(num_tokens=25, vocab_size=20, classes=6, width=96) == golden
    golden = {key: tuple(shape) for key, shape in golden_layout("vqgan")["tokenizer"].items()}
    assert vqgan_layout(code_dim=12, multipliers=(1, 1, 2), blocks=2) == golden


# ---- the same figures


def test_a_converted_maskgit_gives_the_published_logits() -> None:
    layout, figures = golden_layout("maskgit"), golden_figures("maskgit")
    state = {f"module.{name}": fill(name, shape) for name, shape in layout["transformer"].items()}
    model = convert("maskgit", state, heads=layout["num_heads"]).generator
    assert torch.allclose(model(figures["tokens"], figures["label"]), figures["logits"], atol=1e-4)


def test_a_converted_vqgan_gives_the_published_tokens_and_images() -> None:
    figures = golden_figures("vqgan")
    state = {name: fill(name, shape) for name, shape in golden_layout("vqgan")["tokenizer"].items()}
    side = figures["latent"].shape[-1]
    transformer = filled(maskgit_layout(num_tokens=side * side))
    tokenizer = convert("maskgit", transformer, {"state_dict": state}).tokenizer
    tokens = tokenizer.encode(figures["image01"] * 2 - 1)
    assert torch.equal(tokens, figures["tokens"].flatten(1).long())
    rebuilt = tokenizer.decode(tokens)
    assert torch.allclose((rebuilt + 1) / 2, figures["reconstruction01"].clamp(0, 1), atol=1e-4)
    assert not tokenizer.codebook.usage.any()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_tokens": 25, "vocab_size": 300, "width": 64, "decoder_width": 96, "depth": 1, "decoder_depth": 3},
    ],
    ids=["small", "other"],
)
def test_a_converted_mage_gives_the_logits_of_the_rewrite(sizes: dict[str, int]) -> None:
    state = mage_state(**sizes)
    model = convert("mage", {"model": {f"module.{name}": tensor for name, tensor in state.items()}}).generator
    heads = (state["norm.weight"].numel() // 64, 16)
    double = {name: tensor.double() for name, tensor in state.items()}
    rng = torch.Generator().manual_seed(0)
    number, mask = model.config["num_tokens"], model.mask_token_id
    tokens = torch.randint(mask, (2, number), generator=rng)
    tokens = tokens.masked_fill(torch.rand(2, number, generator=rng) < 0.5, mask)
    wanted, _ = published_logits(double, tokens, heads)
    assert wanted.std() > 0.3
    found = torch.nn.Module.to(model, torch.float64)(tokens, torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(found.double(), wanted, atol=1e-6)


def test_the_rows_that_mage_uses_are_gathered() -> None:
    state = small("mage")
    model, words = convert("mage").generator, state["token_emb.word_embeddings.weight"]
    assert (24 + CLASSES + 1, words.shape[0]) == (1025, 1025)
    assert torch.equal(model.token_embed.weight, torch.cat([words[:24], words[1024:]]))
    assert torch.equal(model.start_embed, words[24 + FAKE]) and FAKE == 1100 - 1024
    assert torch.equal(model.head_bias, state["mlm_layer.bias"][0, 0, :24])


# ---- other sizes: infer, never assume


def test_configurations_follow_from_shapes() -> None:
    table = maskgit_layout(num_tokens=9, vocab_size=40, classes=3, width=288, half=2, mlp_ratio=2)
    vqgan = vqgan_layout(vocab_size=40, code_dim=6, channels=1, base=32, multipliers=(1, 3, 3), blocks=3)
    pipeline = convert("maskgit", filled(table), filled(vqgan), class_names=["ant", "bee", "cat"])
    wanted: dict[str, Any] = {"num_tokens": 9, "vocab_size": 40, "num_classes": 3, "width": 288, "depth": 5}
    wanted |= {"heads": 3, "mlp_ratio": 2}
    assert chosen(pipeline.generator.config, wanted) == wanted
    wanted = {"side": 3, "vocab_size": 40, "code_dim": 6, "image_channels": 1, "base_channels": 32, "blocks": 3}
    wanted |= {"channel_multipliers": [1, 3, 3]}
    assert chosen(pipeline.tokenizer.config, wanted) == wanted
    assert pipeline.class_names == ["ant", "bee", "cat"] and pipeline.config["settings"]["steps"] == 4
    assert pipeline(["cat"], seeds=[0], output_type="pt").images.shape == (1, 3, 12, 12)


def test_the_tokenizer_may_be_left_out() -> None:
    for family in ("maskgit", "mage"):
        pipeline = convert(family)
        assert pipeline.tokenizer is None
        assert pipeline(seeds=[0], output_type="latent").tokens.shape == (1, 16)


def test_heads_are_taken_from_the_rule_or_as_given() -> None:
    assert convert("maskgit").generator.config["heads"] == 2  # 96 wide
    assert convert("maskgit", heads=6).generator.config["heads"] == 6
    config = convert("mage").generator.config
    assert (config["encoder_heads"], config["decoder_heads"]) == (2, 16)  # 64 wide, and always 16
    config = convert("mage", heads=4, decoder_heads=2).generator.config
    assert (config["encoder_heads"], config["decoder_heads"]) == (4, 2)
    assert convert("maskgit", filled(maskgit_layout(width=64))).generator.config["heads"] == 1


@pytest.mark.parametrize("number", [1, 4, 9, 16, 25, 36])
def test_default_settings_suit_any_number_of_tokens(number: int) -> None:
    """Fewer steps where the published ones would leave some without a token."""
    state = filled(maskgit_layout(num_tokens=number, width=96))
    for pipeline in (convert("maskgit", state), convert("mage", mage_state(num_tokens=number))):
        *_, last = pipeline.stream(seeds=[0])
        assert last.index == last.total - 1 and bool(last.known.all()) and int(last.tokens.max()) < 24


def test_mage_brings_its_tokenizer_unless_another_is_given() -> None:
    held, other = small("mage", "tokenizer"), small("mage", "tokenizer")
    other["quantize.embedding.weight"] = other["quantize.embedding.weight"] + 1
    state = small("mage") | {f"vqgan.{name}": tensor for name, tensor in held.items()}
    own, given = convert("mage", state), convert("mage", state, other)
    assert torch.equal(own.tokenizer.codebook.weight, held["quantize.embedding.weight"])
    assert torch.equal(given.tokenizer.codebook.weight, other["quantize.embedding.weight"])
    assert own.generator.config == given.generator.config
    assert "unexpected decoder.mid.attn_1.q.weight" in refused(
        "mage", transformer=state | {"vqgan.decoder.mid.attn_1.q.weight": torch.zeros(1)}
    )


UNUSED = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "decoder_pos_embed", "mask_token")
UNUSED += ("cls_token", "decoder_pred.weight", "decoder_pred.bias", "token_emb.position_ids")


def test_what_mage_does_not_use_may_be_absent_and_nothing_else() -> None:
    state = small("mage")
    whole = convert("mage", state).generator.state_dict()
    less = {name: tensor for name, tensor in state.items() if name not in UNUSED}
    assert len(state) - len(less) == len(UNUSED) == 9
    for name, tensor in convert("mage", less).generator.state_dict().items():
        assert torch.equal(tensor, whole[name])


# ---- what is refused


FILES = [("maskgit", "transformer"), ("mage", "transformer"), ("mage", "tokenizer")]


@pytest.mark.parametrize(("family", "role"), FILES)
def test_every_missing_tensor_is_named(family: str, role: str) -> None:
    for name in small(family, role):
        if family == "mage" and name in UNUSED:
            continue
        state = small(family, role)
        del state[name]
        message = refused(family, **{role: state})
        assert name in message, message


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # on the way to an error
@pytest.mark.parametrize(("family", "role"), FILES)
def test_every_tensor_of_a_wrong_shape_is_refused_in_one_line(family: str, role: str) -> None:
    """Longer, flatter, or with an axis too many: sizes cannot be told from such tensors, or do not fit the others."""
    damages: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "longer": lambda tensor: torch.cat([tensor, tensor[-1:]]),
        "flatter": lambda tensor: tensor.flatten() if tensor.ndim > 1 else tensor[:, None],
        "deeper": lambda tensor: tensor[None],
    }
    tokenizer, accepted = small(family, "tokenizer"), []
    for name, tensor in small(family, role).items():
        for kind, damage in damages.items():
            sources = {"tokenizer": tokenizer} | {role: small(family, role) | {name: damage(tensor)}}
            try:
                convert(family, **sources)
            except (CheckpointError, SettingError) as error:
                assert str(error) and "\n" not in str(error)
            else:
                accepted.append((name, kind))
    # One class more is another model that is as good; the shapes of what is dropped are nobody's business.
    other = [("context_embed.word_embeddings.weight", "longer")] if family == "maskgit" else []
    dropped = [(name, kind) for name in UNUSED for kind in damages] if family == "mage" else []
    assert sorted(accepted) == (sorted(other + dropped) if role == "transformer" else [])


@pytest.mark.parametrize("family", ["maskgit", "mage"])
def test_errors_name_tensors_as_the_file_does(family: str) -> None:
    layer = "mid_block.attn.proj.weight" if family == "maskgit" else "decoder_blocks.1.attn.proj.weight"
    state = small(family)
    state[layer] = state[layer][:, :-1]
    width = 192 if family == "maskgit" else 64
    assert f"{layer} is ({width}, {width - 1}) instead of ({width}, {width})" in refused(family, transformer=state)


@pytest.mark.parametrize("family", ["maskgit", "mage"])
def test_left_over_tensors_are_named(family: str) -> None:
    """Also those that a careless rule would drop: names close to the unused ones, or our own."""
    for stranger in ("fc_norm.weight", "pos_embed_2", "patch_embed.norm.weight", "decoder_pred.scale", "cls_tokens"):
        assert f"unexpected {stranger}" in refused(family, transformer=small(family) | {stranger: torch.zeros(2)})
    twice = small(family) | {"head_bias": torch.zeros(25 if family == "maskgit" else 1025)}
    assert "holds head_bias twice" in refused(family, transformer=twice)
    for unused in ("patch_embed.proj.weight", "pos_embed") if family == "maskgit" else ():
        assert f"unexpected {unused}" in refused(family, transformer=small(family) | {unused: torch.zeros(2)})
    assert "unexpected quant_conv.bias" in refused(
        family, tokenizer=small(family, "tokenizer") | {"quant_conv.bias": torch.zeros(2)}
    )


def test_other_families_and_exchanged_files_are_refused() -> None:
    assert "this is a MAGE checkpoint" in refused("maskgit", transformer=small("mage"))
    assert "this is a MaskGIT checkpoint" in refused("mage", transformer=small("maskgit"))
    for family, name in (("maskgit", "MaskGIT"), ("mage", "MAGE")):
        exchanged = refused(family, transformer=small(family, "tokenizer"))
        assert f"this is no {name} transformer: it lacks token_emb.word_embeddings.weight" in exchanged
        assert "this is no VQGAN: it lacks quantize.embedding.weight" in refused(family, tokenizer=small(family))
        assert "not a dictionary of tensors" in refused(family, transformer={"model": {"epoch": 3}})


def test_heads_that_do_not_divide_are_refused() -> None:
    for heads in (7, 0, -1, 2.0):
        message = refused("maskgit", SettingError, heads=heads)
        assert f"heads is {heads}, which does not divide the width 192" in message
    assert "heads is 3, which does not divide the width 128" in refused("mage", SettingError, heads=3)
    assert "decoder_heads is 5, which does not divide the width 64" in refused("mage", SettingError, decoder_heads=5)
    odd = mage_state(decoder_width=40)
    message = refused("mage", SettingError, transformer=odd)
    assert "decoder_heads is taken to be 16" in message and "give decoder_heads=" in message


@pytest.mark.parametrize("family", ["maskgit", "mage"])
def test_tokenizers_of_other_transformers_are_refused(family: str) -> None:
    message = refused(family, SettingError, tokenizer=filled(vqgan_layout(vocab_size=30)))
    assert "vocab_size is 30 against 24" in message


def test_tokens_that_form_no_square_need_no_tokenizer_but_get_none() -> None:
    for family, state in (
        ("maskgit", filled(maskgit_layout(num_tokens=12))),
        ("mage", mage_state(num_tokens=12, vocab_size=24)),
    ):
        assert convert(family, state).tokenizer is None
        assert "12 tokens, which form no square" in refused(
            family, transformer=state, tokenizer=small(family, "tokenizer")
        )


def test_a_table_of_words_too_short_for_classes_is_refused() -> None:
    state = small("mage")
    state["token_emb.word_embeddings.weight"] = state["token_emb.word_embeddings.weight"][: CLASSES + 1]
    assert "word_embeddings.weight has 1001 rows" in refused("mage", transformer=state)
    state = small("mage")
    state["mlm_layer.bias"] = state["mlm_layer.bias"][..., :-1]
    assert "mlm_layer.bias is (1024,), but token_emb.word_embeddings.weight has 1025 rows" in refused(
        "mage", transformer=state
    )


@pytest.mark.parametrize("family", ["maskgit", "mage"])
def test_axes_of_length_one_are_dropped_only_where_they_lead(family: str) -> None:
    table = "context_embed.position_embeddings.weight" if family == "maskgit" else "decoder_pos_embed_learned"
    for name in (table, "mlm_layer.bias"):
        state = small(family)
        state[name] = state[name].movedim(-1, 0).contiguous()
        assert f"{name} is {tuple(state[name].shape)}: it must begin with" in refused(family, transformer=state)


def test_values_that_are_no_numbers_are_refused() -> None:
    for family, name in (("maskgit", "in_blocks.0.mlp.fc1.weight"), ("mage", "decoder_pos_embed_learned")):
        state = small(family)
        state[name] = state[name] * torch.nan
        assert f"not numbers, in {name}" in refused(family, transformer=state)


def test_class_names_are_counted() -> None:
    assert "2 class names for 5 classes" in refused("maskgit", SettingError, class_names=["a", "b"])


class Harmful:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize("family", ["maskgit", "mage"])
def test_files_are_read_but_pickled_objects_are_not(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": small(family)}, tmp_path / "good.pth")
    torch.save({"state_dict": small(family, "tokenizer")}, tmp_path / "vqgan.ckpt")
    pipeline = convert(family, tmp_path / "good.pth", str(tmp_path / "vqgan.ckpt"))
    wanted = convert(family).generator.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in pipeline.generator.state_dict().items())

    torch.save({"model": small(family), "args": Harmful()}, tmp_path / "bad.pth")
    assert "pickled objects, which are never run" in refused(family, transformer=tmp_path / "bad.pth")
    (tmp_path / "worse.pth").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError):
        convert(family, tmp_path / "worse.pth")
    assert not (tmp_path / "harmed").exists()


# ---- round trips


@pytest.mark.parametrize("family", ["maskgit", "mage"])
def test_a_converted_pipeline_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    pipeline = convert(family, tokenizer=small(family, "tokenizer"))
    if type(pipeline.generator) not in COMPONENTS:
        pytest.skip(f"{type(pipeline.generator).__name__} is not registered")
    pipeline.save_pretrained(tmp_path)
    loaded = vgen.load(tmp_path, device="cpu")
    assert isinstance(loaded.tokenizer, VQGAN) and isinstance(loaded.generator, MAGE) == (family == "mage")
    assert loaded.resolve_settings({}) == pipeline.resolve_settings({})
    labels = None if family == "mage" else [1, 4]
    runs = [p(labels, seeds=[5, 6], steps=4, output_type="pt") for p in (pipeline, loaded)]
    assert torch.equal(runs[0].tokens, runs[1].tokens) and torch.equal(runs[0].images, runs[1].images)
