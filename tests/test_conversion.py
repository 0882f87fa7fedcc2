"""Published checkpoints: what is inferred from names and shapes, and what is refused, by name."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import State, golden_layout, published_state
from published_layouts import BUFFERS, SCALES_256, SCALES_512, Layout, on_meta, tokenizer_layout, var_layout
from tiny_models import random_images

import vgen
from vgen.conversion import save
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.types import CheckpointError, SettingError

SMALL_SCALES = (1, 2, 4)
SMALL_VAR: dict[str, Any] = {
    "scales": SMALL_SCALES,
    "width": 64,
    "depth": 2,
    "heads": 2,
    "code_dim": 4,
    "vocab_size": 24,
    "classes": 5,
}
SMALL_VQ: dict[str, Any] = {
    "num_scales": 3,
    "base": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "code_dim": 4,
    "vocab_size": 24,
}


def filled(layout: Layout, scales: Sequence[int] = SMALL_SCALES) -> State:
    return published_state({name: list(shape) for name, shape in layout.items()}, list(scales))


def small_var(**changes: Any) -> State:
    """A transformer of 64 x 2 in the published layout."""
    config = SMALL_VAR | changes
    return filled(var_layout(**config), config["scales"])


def small_vq(**changes: Any) -> State:
    """A tokenizer of two resolutions for `small_var`."""
    return filled(tokenizer_layout(**(SMALL_VQ | changes)))


def convert(transformer: Any = None, tokenizer: Any = None, **overrides: Any) -> NextScalePipeline:
    return vgen.convert("var", transformer=transformer or small_var(), tokenizer=tokenizer, **overrides)


def refused(**sources: Any) -> str:
    """The one line that a conversion fails with."""
    with pytest.raises(CheckpointError) as caught:
        convert(**sources)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- the released sizes, on the meta device


@pytest.fixture
def finite_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values that could be checked."""
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(()))


RELEASED = {
    16: (SCALES_256, False, 310.28),
    20: (SCALES_256, False, 600.92),
    24: (SCALES_256, False, 1033.40),
    30: (SCALES_256, False, 2010.02),
    36: (SCALES_512, True, 2353.89),
}


@pytest.mark.usefixtures("finite_meta")
@pytest.mark.parametrize("depth", RELEASED)
def test_released_transformers_are_recognised(depth: int) -> None:
    scales, shared, millions = RELEASED[depth]
    table = var_layout(scales=scales, width=64 * depth, depth=depth, heads=depth, shared=shared)
    parameters = sum(math.prod(shape) for name, shape in table.items() if not name.endswith(BUFFERS))
    assert round(parameters / 1e6, 2) == millions

    model = convert(on_meta(table, scales)).generator
    wanted = {
        "scales": list(scales),
        "vocab_size": 4096,
        "code_dim": 32,
        "num_classes": 1000,
        "width": 64 * depth,
        "depth": depth,
        "heads": depth,
        "qk_norm": True,
        "shared_adaln": shared,
    }
    assert {name: model.config[name] for name in wanted} == wanted
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.usefixtures("finite_meta")
@pytest.mark.parametrize(("depth", "image_size"), [(16, 256), (36, 512)])
def test_the_released_tokenizer_is_recognised(depth: int, image_size: int) -> None:
    """One file serves both resolutions."""
    table = tokenizer_layout(num_scales=10)
    assert len(table) == 324
    assert sum(math.prod(shape) for shape in table.values()) == 108_989_315

    scales, shared, _ = RELEASED[depth]
    transformer = on_meta(var_layout(scales=scales, width=64 * depth, depth=depth, heads=depth, shared=shared), scales)
    tokenizer = convert(transformer, on_meta(table, scales)).tokenizer
    wanted = {
        "scales": list(scales),
        "vocab_size": 4096,
        "code_dim": 32,
        "image_channels": 3,
        "base_channels": 160,
        "channel_multipliers": [1, 1, 2, 2, 4],
        "blocks": 2,
        "attention_levels": [4],
        "num_phi": 4,
        "phi_ratio": 0.5,
    }
    assert {name: tokenizer.config[name] for name in wanted} == wanted
    assert tokenizer.image_size == image_size
    assert sum(tensor.numel() for tensor in tokenizer.state_dict().values()) == 108_989_315


def test_our_tables_are_those_of_the_golden_models() -> None:
    golden = golden_layout("var")
    common = {"scales": (1, 2, 4), "width": 192, "depth": 3, "heads": 3, "code_dim": 4, "vocab_size": 48, "classes": 6}
    ours = {
        "var": var_layout(**common),
        "var_shared_aln": var_layout(**common, shared=True),
        "tokenizer": tokenizer_layout(num_scales=3, base=32, code_dim=4, vocab_size=48),
    }
    for name, table in ours.items():
        assert table == {key: tuple(shape) for key, shape in golden[name].items()}


# ---- other sizes: infer, never assume


VARS = {
    "plain attention": {"qk_norm": False},
    "heads that are not 64 wide": {"heads": 4},
    "shared adaLN": {"shared": True},
    "other scales": {"scales": (1, 3, 4, 7)},
    "a first scale of four tokens": {"scales": (2, 3, 4)},
    "one class, more codes": {"classes": 1, "vocab_size": 70, "code_dim": 9},
    "twelve blocks": {"depth": 12, "width": 32},
}


@pytest.mark.parametrize("changes", VARS.values(), ids=VARS.keys())
def test_any_transformer_is_recognised_and_keeps_its_weights(changes: dict[str, Any]) -> None:
    config, state = SMALL_VAR | changes, small_var(**changes)
    model = convert(state).generator
    assert model.config["scales"] == list(config["scales"])
    assert (model.config["width"], model.config["depth"]) == (config["width"], config["depth"])
    assert (model.config["vocab_size"], model.config["code_dim"]) == (config["vocab_size"], config["code_dim"])
    assert model.config["num_classes"] == model.null_class == config["classes"]
    assert model.config["heads"] == (config["heads"] if model.config["qk_norm"] else 1)
    kept = sorted(float(tensor.double().sum()) for name, tensor in state.items() if not name.endswith(BUFFERS))
    assert sorted(float(p.double().sum()) for p in model.parameters()) == pytest.approx(kept)


VQS = {
    "grey": {"channels": 1},
    "three resolutions": {"multipliers": (1, 2, 2), "blocks": 2},
    "one resolution": {"multipliers": (1,)},
    "one phi for all": {"phi": ["qresi"]},
    "a phi per scale": {"phi": ["0", "1", "2"]},
    "two shared phi": {"phi": ["qresi_ls.0", "qresi_ls.1"]},
}


@pytest.mark.parametrize("changes", VQS.values(), ids=VQS.keys())
def test_any_tokenizer_is_recognised_and_works(changes: dict[str, Any]) -> None:
    config, state = SMALL_VQ | changes, small_vq(**changes)
    tokenizer = convert(tokenizer=state).tokenizer
    assert tokenizer.config["channel_multipliers"] == list(config["multipliers"])
    assert tokenizer.config["attention_levels"] == [len(config["multipliers"]) - 1]
    assert tokenizer.config["image_channels"] == config.get("channels", 3)
    assert tokenizer.config["num_phi"] == len(config.get("phi", range(4)))
    for i, name in enumerate(config.get("phi", [f"qresi_ls.{i}" for i in range(4)])):
        assert torch.equal(tokenizer.phi[i].weight, state[f"quantize.quant_resi.{name}.weight"])
    tokens = tokenizer.encode(random_images(tokenizer, 2))
    assert tokenizer.decode(tokens).shape == (2, 3, tokenizer.image_size, tokenizer.image_size)


def test_buffers_may_be_left_out_and_scales_given() -> None:
    full, state = small_var(), small_var()
    for name in list(state):
        if name.endswith(BUFFERS):
            del state[name]
    wanted = convert(full).generator.state_dict()
    given = convert(state, scales=list(SMALL_SCALES)).generator
    assert given.config["scales"] == list(SMALL_SCALES)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in given.state_dict().items())
    assert "scales=[1, 2, ...]" in refused(transformer=state)


def test_heads_of_plain_attention_can_be_told() -> None:
    state = small_var(qk_norm=False)
    assert convert(state).generator.config["heads"] == 1, "64 wide, as published"
    assert convert(state, heads=4).generator.config["heads"] == 4


def test_plain_attention_narrower_than_one_published_head() -> None:
    assert convert(small_var(qk_norm=False, width=32)).generator.config["heads"] == 1


def test_an_override_that_contradicts_the_checkpoint_is_refused() -> None:
    with pytest.raises((SettingError, CheckpointError)):
        convert(small_var(), heads=4)


def test_phi_ratio_and_class_names_are_taken_from_the_caller() -> None:
    pipe = convert(tokenizer=small_vq(), phi_ratio=0.25, class_names=list("abcde"))
    assert pipe.tokenizer.phi_ratio == 0.25
    assert pipe.class_names == list("abcde")


def test_usage_statistics_of_other_scales_are_dropped() -> None:
    """They are no weights: a tokenizer for other scales starts counting anew."""
    tokenizer = convert(small_var(scales=(1, 2, 3, 5)), small_vq()).tokenizer
    assert tokenizer.codebook.usage.shape == (4, 24) and tokenizer.codebook.usage.sum() == 0
    state = small_vq()
    del state["quantize.ema_vocab_hit_SV"]
    assert convert(tokenizer=state).tokenizer.codebook.usage.shape == (3, 24)


def test_hit_counts_become_shares() -> None:
    """A code at the published threshold, 0.03 of an equal share, would otherwise never count as dead."""
    state = small_vq()
    state["quantize.ema_vocab_hit_SV"] = torch.randint(0, 1000, (3, 24)).float()
    usage = convert(tokenizer=state).tokenizer.codebook.usage
    assert usage.sum(1).tolist() == pytest.approx([1, 1, 1], rel=1e-4)


def test_a_converted_pipeline_runs_and_survives_saving(tmp_path: Path) -> None:
    pipe = convert(tokenizer=small_vq(), class_names=["cat", "dog", "bird", "fish", "frog"])
    save(pipe, tmp_path / "model")
    loaded = vgen.load(tmp_path / "model", device="cpu")
    ours, theirs = (p(["dog"], seeds=[0], output_type="pt") for p in (pipe, loaded))
    assert all(torch.equal(a, b) for a, b in zip(ours.tokens, theirs.tokens, strict=True))
    assert torch.equal(ours.images, theirs.images)


def test_without_a_tokenizer_there_is_a_generator_all_the_same() -> None:
    pipe = convert()
    assert pipe.tokenizer is None
    assert pipe.generator(torch.zeros(1, 20, 4), torch.tensor([0])).shape == (1, 21, 24)


def test_the_callers_state_dict_is_left_alone() -> None:
    state = small_var()
    before = {name: tensor.clone() for name, tensor in state.items()}
    convert(state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_half_precision_checkpoints_become_float32() -> None:
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in small_var().items()}
    model = convert(state).generator
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, state["head.weight"].float())


@pytest.mark.parametrize("kind", ["pth", "safetensors", "nested pth"])
def test_files_convert_like_dictionaries(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    state, path = small_var(), tmp_path / "weights.bin"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"trainer": {"var_wo_ddp": state}, "epoch": 3} if kind == "nested pth" else state, path)
    model, wanted = convert(path).generator, convert(state).generator
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_common_wrappers_are_opened(key: str) -> None:
    assert convert({key: small_var()}).generator.config["width"] == 64


# ---- mistakes


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(SettingError, match=r"unknown family 'gan': use one of .*var"):
        vgen.convert("gan", transformer=small_var())


def test_an_unknown_override_is_named() -> None:
    with pytest.raises(SettingError, match="unknown override 'num_layers' for var: use one of scales, heads"):
        convert(num_layers=3)


TENSORS = [
    ("transformer", "head.weight"),
    ("transformer", "blocks.1.attn.mat_qkv.weight"),
    ("transformer", "blocks.0.ffn.fc2.bias"),
    ("transformer", "word_embed.weight"),
    ("tokenizer", "encoder.conv_in.weight"),
    ("tokenizer", "decoder.up.1.block.0.conv1.weight"),
    ("tokenizer", "post_quant_conv.bias"),
    ("tokenizer", "quant_conv.weight"),
]


def sources(role: str, change: Any) -> dict[str, State]:
    """Both state dicts, that of `role` changed."""
    states = {"transformer": small_var(), "tokenizer": small_vq()}
    change(states[role])
    return states


@pytest.mark.parametrize(("role", "name"), TENSORS)
def test_a_missing_tensor_is_named(role: str, name: str) -> None:
    message = refused(**sources(role, lambda state: state.pop(name)))
    assert name in message and ("missing" in message or "lacks" in message)


@pytest.mark.parametrize("role", ["transformer", "tokenizer"])
def test_an_unexpected_tensor_is_named(role: str) -> None:
    message = refused(**sources(role, lambda state: state.update({"ema.decay": torch.zeros(3)})))
    assert "unexpected ema.decay" in message


# These two decide the configuration; other shapes make it another model, or none.
DECISIVE = ("word_embed.weight", "encoder.conv_in.weight")


@pytest.mark.parametrize(("role", "name"), [item for item in TENSORS if item[1] not in DECISIVE])
def test_a_tensor_of_the_wrong_shape_is_named(role: str, name: str) -> None:
    def shrink(state: State) -> None:
        state[name] = state[name][:-1] if state[name].ndim == 1 else state[name][:, :-1]

    message = refused(**sources(role, shrink))
    assert "instead of" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("role", "name"), TENSORS)
def test_values_that_are_not_numbers_are_refused_by_name(role: str, name: str, value: float) -> None:
    message = refused(**sources(role, lambda state: state[name].flatten()[-1:].fill_(value)))
    assert name in message and "not numbers" in message


@pytest.mark.parametrize("role", ["transformer", "tokenizer"])
def test_many_problems_are_counted(role: str) -> None:
    def spoil(state: State) -> None:
        for name in [name for name in state if ".mid." in name or ".ffn." in name]:
            state[f"{name}.old"] = state.pop(name)

    count = sum(".mid." in name or ".ffn." in name for name in (small_vq() if role == "tokenizer" else small_var()))
    assert refused(**sources(role, spoil)).count(f"and {count - 3} more") == 2


def test_an_mvar_checkpoint_is_recognised() -> None:
    state = small_var()
    state["blocks.0.mamba.A_log"] = torch.zeros(2)
    assert "M-VAR" in refused(transformer=state)
    assert "M-VAR" in refused(transformer={"trainer": {"mvar_wo_ddp": state}})


def test_the_two_files_exchanged() -> None:
    assert "this is no VAR transformer: it lacks word_embed.weight" in refused(transformer=small_vq())
    assert "this is no VAR tokenizer: it lacks quantize.embedding.weight" in refused(tokenizer=small_var())


@pytest.mark.parametrize("strange", [{"epoch": 3}, {"head.weight": [1.0, 2.0]}, {}, {"trainer": 5}], ids=str)
def test_what_is_no_dictionary_of_tensors_is_refused(strange: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the transformer is not a dictionary of tensors"):
        vgen.convert("var", transformer=strange)


def test_a_stranger_among_the_tensors_is_named() -> None:
    assert "'epoch' is not a tensor" in refused(transformer=small_var() | {"epoch": 3})


@pytest.mark.parametrize("scales", [[1, 2, 3], [1, 2, 4, 5]])
def test_scales_that_do_not_add_up(scales: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"scales \[1, 2, .*\] do not add up to the 21 positions"):
        convert(scales=scales)


def test_scales_that_are_no_squares() -> None:
    state = small_var()
    state["lvl_1L"] = torch.tensor([[0] + [1] * 5 + [2] * 15])
    assert "not squares" in refused(transformer=state)


def test_parts_of_different_models_are_refused() -> None:
    with pytest.raises(SettingError, match="do not fit: vocab_size"):
        convert(tokenizer=small_vq(vocab_size=30))


# ---- no damage whatever ends in anything but one line


def damaged(role: str, damage: Any) -> Iterator[tuple[str, str]]:
    """Every tensor in turn, with how the conversion took the damage to it."""
    whole = {"transformer": small_var(), "tokenizer": small_vq()}
    for name in whole[role]:
        state = dict(whole[role])
        damage(state, name)
        try:
            convert(**(whole | {role: state}))
        except (CheckpointError, SettingError) as error:
            yield name, "refused" if "\n" not in str(error) else "many lines"
        except Exception as error:
            yield name, type(error).__name__
        else:
            yield name, "converted"


def drop(state: State, name: str) -> None:
    del state[name]


def flatten(state: State, name: str) -> None:
    state[name] = state[name].flatten()


def lengthen(state: State, name: str) -> None:
    state[name] = torch.cat([state[name], state[name][-1:]])


def to_integers(state: State, name: str) -> None:
    state[name] = state[name].clamp(-9, 9).long()


@pytest.mark.parametrize(
    ("role", "damage"),
    [
        ("transformer", drop),
        ("tokenizer", drop),
        ("transformer", flatten),
        ("tokenizer", flatten),
        ("transformer", lengthen),
        ("tokenizer", lengthen),
        ("transformer", to_integers),
    ],
    ids=lambda item: item if isinstance(item, str) else item.__name__,
)
def test_damage_to_any_tensor_is_one_line(role: str, damage: Any) -> None:
    outcomes = dict(damaged(role, damage))
    assert {name: how for name, how in outcomes.items() if how not in ("refused", "converted")} == {}
    if damage is drop:
        # What only follows from the configuration, or is statistics, may be absent.
        optional = {name for name, how in outcomes.items() if how == "converted"}
        assert all(name.endswith((*BUFFERS[1:], "ema_vocab_hit_SV")) for name in optional)
