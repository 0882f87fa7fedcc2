"""M-VAR's published checkpoints: what is inferred from names and shapes, and what is refused, by name."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import State, golden_layout, published_state
from published_layouts import BUFFERS, SCALES_256, mvar_layout, on_meta
from test_conversion import (
    SMALL_VAR,
    TENSORS,
    drop,
    filled,
    finite_meta,  # noqa: F401
    flatten,
    lengthen,
    small_var,
    small_vq,
)
from tiny_models import random_images

import vgen
from vgen import cli
from vgen.conversion import save
from vgen.generators.mvar import MVAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.types import CheckpointError, SettingError

SMALL: dict[str, Any] = {**SMALL_VAR, "head_width": 16, "state_size": 8}


def small_mvar(**changes: Any) -> State:
    """A transformer of 64 x 2 in the published layout."""
    config = SMALL | changes
    return filled(mvar_layout(**config), config["scales"])


def convert(transformer: Any = None, tokenizer: Any = None, **overrides: Any) -> NextScalePipeline:
    return vgen.convert("mvar", transformer=transformer or small_mvar(), tokenizer=tokenizer, **overrides)


def refused(transformer: Any, family: str = "mvar") -> str:
    """The one line that a conversion fails with."""
    with pytest.raises(CheckpointError) as caught:
        vgen.convert(family, transformer=transformer)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- the released sizes, on the meta device

RELEASED = {12: 198.44, 16: 464.16, 20: 900.53, 24: 1550.07, 30: 3017.07}  # millions; 30 is the paper's "d32"


@pytest.mark.usefixtures("finite_meta")
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("depth", RELEASED)
def test_released_transformers_are_recognised(depth: int, qk_norm: bool) -> None:
    """With the q/k norm or, as README says of d16 and d20, without: the file tells."""
    table = mvar_layout(scales=SCALES_256, width=64 * depth, depth=depth, heads=depth, qk_norm=qk_norm)
    parameters = sum(math.prod(shape) for name, shape in table.items() if not name.endswith(BUFFERS))
    temperatures = 0 if qk_norm else depth * depth  # which the published totals count in
    assert round((parameters + temperatures) / 1e6, 2) == RELEASED[depth]

    model = convert(on_meta(table, SCALES_256)).generator
    wanted = {
        "scales": list(SCALES_256),
        "vocab_size": 4096,
        "code_dim": 32,
        "num_classes": 1000,
        "width": 64 * depth,
        "depth": depth,
        "heads": depth,
        "qk_norm": qk_norm,
        "shared_adaln": False,
        "expand": 2,
        "mamba_head_width": 64,
        "state_size": 64,
        "conv_width": 4,
    }
    assert isinstance(model, MVAR)
    assert {name: model.config[name] for name in wanted} == wanted
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.blocks[0].mamba.heads == 2 * depth


def test_our_table_is_that_of_the_golden_models() -> None:
    golden = golden_layout("mvar")
    common = {"scales": (1, 2, 4), "width": 192, "depth": 3, "heads": 3, "code_dim": 4, "vocab_size": 48, "classes": 6}
    for name, qk_norm in (("mvar", True), ("mvar_plain_attention", False)):
        assert mvar_layout(**common, qk_norm=qk_norm) == {key: tuple(shape) for key, shape in golden[name].items()}


def test_buffers_have_the_values_of_published_files() -> None:
    """The mask is block-diagonal and `patch_nums` holds squares, unlike VAR's."""
    state = small_mvar()
    numbers = state["lvl_1L"][0]
    assert torch.equal(state["attn_bias_for_masking"][0, 0] == 0, numbers[:, None] == numbers)
    assert state["blocks.1.attn.patch_nums"].tolist() == [1, 4, 16]
    golden = published_state(golden_layout("mvar")["mvar"], [1, 2, 4])
    assert (golden["blocks.0.mamba.A_log"] >= 0.1).all()


# ---- other sizes: infer, never assume

SIZES: dict[str, dict[str, Any]] = {
    "small heads and states": {},
    "published heads and states": {"head_width": 64, "state_size": 64},
    "heads wider than the state": {"head_width": 32, "state_size": 4},
    "inner width of the stream": {"expand": 1},
    "inner width thrice the stream": {"expand": 3},
    "a shorter convolution": {"conv_width": 2},
    "plain attention": {"qk_norm": False},
    "shared adaLN": {"shared": True},
    "a first scale of four tokens": {"scales": (2, 3, 4)},
    "twelve blocks": {"depth": 12, "width": 32},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES.keys())
def test_any_transformer_is_recognised_and_keeps_its_weights(changes: dict[str, Any]) -> None:
    config, state = {"expand": 2, "conv_width": 4, "qk_norm": True} | SMALL | changes, small_mvar(**changes)
    model = convert(state).generator
    told = ("width", "depth", "expand", "state_size", "conv_width", "qk_norm")
    assert {name: model.config[name] for name in told} == {name: config[name] for name in told}
    assert model.config["mamba_head_width"] == config["head_width"]
    assert model.config["scales"] == list(config["scales"])
    assert model.config["shared_adaln"] == config.get("shared", False)
    kept = sorted(float(tensor.double().sum()) for name, tensor in state.items() if not name.endswith(BUFFERS))
    assert sorted(float(p.double().sum()) for p in model.parameters()) == pytest.approx(kept)
    context = torch.zeros(1, model.num_tokens - model.lengths[0], 4)
    assert model(context, torch.tensor([0])).isfinite().all()


def test_tensors_of_mamba_go_where_they_belong() -> None:
    state = small_mvar()
    mamba = convert(state).generator.blocks[1].mamba
    for name, tensor in mamba.state_dict().items():
        published = f"blocks.1.mamba.{name.replace('conv.', 'conv1d.')}"
        assert torch.equal(tensor, state[published]), name


def test_buffers_may_be_left_out_and_scales_given() -> None:
    full = small_mvar()
    bare = {name: tensor for name, tensor in full.items() if not name.endswith(BUFFERS)}
    wanted, given = convert(full).generator.state_dict(), convert(bare, scales=[1, 2, 4]).generator
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in given.state_dict().items())
    assert "scales=[1, 2, ...]" in refused(bare)


def test_heads_of_plain_attention_can_be_told() -> None:
    state = small_mvar(qk_norm=False)
    assert convert(state).generator.config["heads"] == 1, "64 wide, as published"
    assert convert(state, heads=4).generator.config["heads"] == 4
    with pytest.raises(SettingError, match="heads is 4, but the checkpoint has 2"):
        convert(small_mvar(), heads=4)


@pytest.mark.parametrize("key", ["mvar_wo_ddp", "var_wo_ddp"])
def test_training_checkpoints_are_opened(tmp_path: Path, key: str) -> None:
    """From memory or from a file, and as distributed training names them."""
    state = small_mvar()
    wanted = convert(state).generator.state_dict()
    trainer = {key: state, "vae_local": small_vq(), "var_opt": {"state": {}}, "config": {"lr": 1e-4}}
    checkpoint = {"epoch": 3, "iter": 100, "trainer": trainer, "args": {"seed": 0}}
    torch.save(checkpoint, tmp_path / "ar-ckpt-last.pth")
    for source in (checkpoint, tmp_path / "ar-ckpt-last.pth"):
        pipe = convert(source, source)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in pipe.generator.state_dict().items())
        assert pipe.tokenizer is not None
    distributed = {f"module.{name}": tensor for name, tensor in state.items()}
    assert torch.equal(convert({"trainer": {key: distributed}}).generator.head.weight, wanted["head.weight"])


def test_a_converted_pipeline_runs_and_survives_saving(tmp_path: Path) -> None:
    pipe = convert(tokenizer=small_vq(), class_names=["cat", "dog", "bird", "fish", "frog"])
    save(pipe, tmp_path / "model")
    loaded = vgen.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded.generator, MVAR)
    ours, theirs = (p(["dog"], seeds=[0], output_type="pt") for p in (pipe, loaded))
    assert all(torch.equal(a, b) for a, b in zip(ours.tokens, theirs.tokens, strict=True))
    assert torch.equal(ours.images, theirs.images)
    torch.testing.assert_close(
        loaded.logits(ours.tokens, ["dog"]), pipe.logits(ours.tokens, ["dog"]), rtol=0, atol=1e-5
    )


# ---- the command line


def test_the_command_line_converts_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"trainer": {"mvar_wo_ddp": small_mvar()}}, "mvar.pth")
    torch.save(small_vq(), "vae.pth")
    flags = ["--transformer", "mvar.pth", "--tokenizer", "vae.pth", "--out", "model"]
    assert cli.main(["convert", "mvar", *flags]) == 0
    assert capsys.readouterr().out == "model\n"
    loaded, wanted = vgen.load("model", device="cpu"), convert(tokenizer=small_vq())
    for role in ("generator", "tokenizer"):
        found = getattr(loaded, role).state_dict()
        assert all(torch.equal(found[name], kept) for name, kept in getattr(wanted, role).state_dict().items())
    tokens = wanted.tokenizer.encode(random_images(wanted.tokenizer, 1))
    torch.testing.assert_close(loaded.logits(tokens, [3]), wanted.logits(tokens, [3]), rtol=0, atol=1e-5)
    assert cli.main(["sample", "model", "--classes", "3", "--seed", "1", "--out", "pictures"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_the_command_line_names_the_other_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(small_var(), "var.pth")
    assert cli.main(["convert", "mvar", "--transformer", "var.pth", "--out", "model"]) == 1
    assert "convert it as var" in capsys.readouterr().err and not Path("model").exists()


# ---- mistakes


@pytest.mark.parametrize("wrap", [dict, lambda state: {"trainer": {"var_wo_ddp": state}}], ids=["flat", "nested"])
def test_a_var_checkpoint_is_no_mvar_and_the_reverse(wrap: Any) -> None:
    message = refused(wrap(small_var()), "mvar")
    assert "this is a VAR checkpoint" in message and "convert it as var" in message
    message = refused(wrap(small_mvar()), "var")
    assert "this is an M-VAR checkpoint" in message and "convert it as mvar" in message


def test_a_tokenizer_given_as_transformer_is_told() -> None:
    assert "M-VAR transformer: it lacks word_embed.weight" in refused(small_vq())


MAMBA = [
    f"blocks.1.mamba.{name}"
    for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight")
]
NAMED = [name for role, name in TENSORS if role == "transformer" and name != "word_embed.weight"] + MAMBA
NAMED += ["blocks.0.mamba.out_proj.weight", "blocks.1.ada_lin.1.weight", "blocks.1.attn.scale_mul_1H11"]


@pytest.mark.parametrize("name", NAMED)
def test_a_missing_tensor_is_named_as_the_file_names_it(name: str) -> None:
    state = small_mvar()
    del state[name]
    message = refused(state)
    assert name in message and ("missing" in message or "lacks" in message)


@pytest.mark.parametrize("name", ["norm.weight", "dt_bias", "conv1d.weight"])
def test_what_the_sizes_are_read_off_is_asked_for_by_name(name: str) -> None:
    state = small_mvar()
    del state[f"blocks.0.mamba.{name}"]
    assert f"it lacks blocks.0.mamba.{name}" in refused(state)


@pytest.mark.parametrize("extra", ["ema.decay", "blocks.0.mamba.conv1d.scale", "blocks.1.attn.q_norm"])
def test_an_extra_tensor_is_named_as_the_file_names_it(extra: str) -> None:
    assert f"unexpected {extra}" in refused(small_mvar() | {extra: torch.zeros(3)})


@pytest.mark.parametrize("name", NAMED)
def test_a_tensor_of_the_wrong_shape_is_named_as_the_file_names_it(name: str) -> None:
    state = small_mvar()
    state[name] = torch.cat([state[name], state[name][..., -1:]], dim=-1) if name in MAMBA else state[name][..., :-1]
    message = refused(state)
    # The number of classes and codes is read off these; then it is another tensor that does not fit.
    assert "instead of" in message and (name in message or name == "head.weight")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMED)
def test_values_that_are_not_numbers_are_refused_by_name(name: str, value: float) -> None:
    state = small_mvar()
    state[name].flatten()[-1:].fill_(value)
    message = refused(state)
    assert name in message and "not numbers" in message


def test_damage_to_any_tensor_is_one_line() -> None:
    """Or none, where it does no harm: to buffers, to the number of classes, and where there is nothing to flatten."""
    whole = small_mvar()
    buffers = {name for name in whole if name.endswith(BUFFERS[1:])}
    harmless = {
        drop: buffers,
        flatten: buffers | {"lvl_1L"} | {name for name in whole if whole[name].ndim == 1},
        lengthen: buffers | {"class_emb.weight"},
    }
    for damage, expected in harmless.items():
        survived = set()
        for name in whole:
            state = dict(whole)
            damage(state, name)
            try:
                convert(state)
            except (CheckpointError, SettingError) as error:
                assert "\n" not in str(error)
            else:
                survived.add(name)
        assert survived == expected
