"""Parity with the published M-VAR code, through `vgen.convert` (golden/README: float32, CPU, atol 1e-4)."""

from typing import Any

import pytest
import torch
from golden_weights import State, golden_figures, golden_layout, published_state
from test_golden_var import SETTINGS, assert_near, golden_tokens, last_image
from test_golden_var import state as var_state
from torch import Tensor

import vgen
from vgen.generators.mvar import MVAR
from vgen.pipelines.next_scale import NextScalePipeline

LAYOUT = golden_layout("mvar")
FIGURES = golden_figures("mvar")
CONTEXT = golden_figures("var")["context"]
LABELS = torch.tensor([0, 5])
MODELS = ["mvar", "mvar_plain_attention"]
LENGTHS = [side * side for side in LAYOUT["scales"]]


def state(name: str) -> State:
    return published_state(LAYOUT[name], LAYOUT["scales"])


def convert(name: str, method: str = "auto", **changes: Tensor) -> NextScalePipeline:
    pipeline = vgen.convert("mvar", transformer=state(name) | changes, tokenizer=var_state("tokenizer"))
    pipeline.generator.scan_method = method
    return pipeline


@pytest.fixture(params=["sequential", "chunked"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def mvar() -> NextScalePipeline:
    return convert("mvar")


@pytest.mark.parametrize("name", MODELS)
def test_teacher_forced_logits(name: str, method: str) -> None:
    pipeline = convert(name, method)
    assert_near(pipeline.logits(golden_tokens(), LABELS), FIGURES[f"{name}.logits"])


@pytest.mark.parametrize("name", MODELS)
def test_scale_by_scale_the_logits_are_the_same(name: str, method: str) -> None:
    """The published code computes the whole prefix anew at every scale; the state carries it exactly."""
    model = convert(name, method).generator
    assert_near(scale_by_scale(model), FIGURES[f"{name}.logits"])
    model = model.to(torch.float64)  # in float32 they differ by up to 2e-5
    torch.testing.assert_close(scale_by_scale(model), model(CONTEXT, LABELS), rtol=0, atol=1e-12)


def scale_by_scale(model: MVAR) -> Tensor:
    cache, condition = model.new_cache(2), model.condition(LABELS)
    return torch.cat([model(part, condition, cache) for part in CONTEXT.split([0, *LENGTHS[1:]], dim=1)], dim=1)


DRAWN = [key.split(".") for key in FIGURES if key.split(".")[-1] in SETTINGS]


def test_there_are_figures_to_draw() -> None:
    assert {name for name, _ in DRAWN} == set(MODELS) and {draw for _, draw in DRAWN} >= {"greedy", "seeded"}


@pytest.mark.parametrize(("name", "draw"), DRAWN)
def test_sampling_with_one_generator_gives_the_published_images(name: str, draw: str, method: str) -> None:
    assert_near(last_image(convert(name, method), **SETTINGS[draw]), FIGURES[f"{name}.{draw}"])


def test_the_figures_are_told_apart() -> None:
    """They differ by far more than the tolerance, so that a setting that was ignored would be noticed."""
    assert (FIGURES["mvar.logits"] - FIGURES["mvar_plain_attention.logits"]).abs().max() > 0.01
    for name in MODELS:
        assert (FIGURES[f"{name}.greedy"] - FIGURES[f"{name}.seeded"]).abs().max() > 0.01


@pytest.mark.parametrize("pair", [(i, j) for j in range(9) for i in range(j)], ids=str)
def test_modulations_in_any_other_order_miss_the_figures(mvar: NextScalePipeline, pair: tuple[int, int]) -> None:
    """Gates, scales, shifts; attention, Mamba, feed-forward: each of the nine where the file has it."""
    order = list(range(9))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    layer = mvar.generator.blocks[0].adaln
    kept = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict({name: t.unflatten(0, (9, -1))[order].flatten(0, 1) for name, t in kept.items()})
    missed = (mvar.generator(CONTEXT, LABELS) - FIGURES["mvar.logits"]).abs().max()
    layer.load_state_dict(kept)
    assert missed > 0.01


@pytest.mark.parametrize(
    "name",
    ["dt_bias", "A_log", "D", "conv1d.weight", "conv1d.bias", "norm.weight", "in_proj.weight", "out_proj.weight"],
)
def test_every_tensor_of_mamba_is_in_its_place(mvar: NextScalePipeline, name: str) -> None:
    """With its first rows exchanged for the following ones the logits leave the figures."""
    full = f"blocks.0.mamba.{name}"
    half = LAYOUT["mvar"][full][0] // 2
    moved: Any = convert("mvar", **{full: state("mvar")[full].roll(half, 0)})
    assert (moved.generator(CONTEXT, LABELS) - FIGURES["mvar.logits"]).abs().max() > 1e-3


def test_training_checkpoint_converts_to_the_same_model(mvar: NextScalePipeline) -> None:
    trainer = {"config": {"lr": 1e-4}, "mvar_wo_ddp": state("mvar"), "vae_local": var_state("tokenizer"), "var_opt": {}}
    checkpoint = {"epoch": 3, "iter": 100, "trainer": trainer, "args": {"seed": 0}}
    nested = vgen.convert("mvar", transformer=checkpoint, tokenizer=checkpoint)
    for role in ("generator", "tokenizer"):
        ours, wanted = getattr(nested, role).state_dict(), getattr(mvar, role).state_dict()
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert_near(nested.logits(golden_tokens(), LABELS), FIGURES["mvar.logits"])
