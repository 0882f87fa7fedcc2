"""Parity with the published VAR code, through `vgen.convert` (golden/README: float32, CPU, atol 1e-4)."""

from typing import Any

import pytest
import torch
from golden_weights import State, golden_figures, golden_layout, published_state
from torch import Tensor

import vgen
from vgen.pipelines.next_scale import NextScalePipeline

LAYOUT = golden_layout("var")
FIGURES = golden_figures("var")
LABELS = [0, 5]
MODELS = ["var", "var_shared_aln"]
# The published cfg = 2 is guidance_scale = 3.
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"guidance_scale": 3.0, "top_k": 1},
    "seeded": {"guidance_scale": 3.0, "top_k": 12, "top_p": 0.9},
    "smooth": {"guidance_scale": 3.0, "top_k": 12, "top_p": 0.9, "more_smooth": True},
}


def state(part: str) -> State:
    return published_state(LAYOUT[part], LAYOUT["scales"])


@pytest.fixture(scope="module", params=MODELS)
def converted(request: pytest.FixtureRequest) -> tuple[str, NextScalePipeline]:
    """Each golden model and its name."""
    name = request.param
    return name, vgen.convert("var", transformer=state(name), tokenizer=state("tokenizer"))


@pytest.fixture(scope="module")
def pipeline() -> NextScalePipeline:
    return vgen.convert("var", transformer=state("var"), tokenizer=state("tokenizer"))


def golden_tokens() -> list[Tensor]:
    return [FIGURES[f"tokens.{k}"] for k in range(len(LAYOUT["scales"]))]


def assert_near(ours: Tensor, published: Tensor) -> None:
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-4)


def converted_for(draw: str, name: str) -> NextScalePipeline:
    """The golden model; in double for "smooth".

    Its mixture of codes has a temperature of 0.0135 at the last scale, which multiplies the rounding of logits by 148:
    from one processor to another float32 moves pixels by up to 2e-4, whoever computes it. In double only the figures'
    own rounding is left, 6.4e-5.
    """
    pipeline = vgen.convert("var", transformer=state(name), tokenizer=state("tokenizer"))
    if draw == "smooth":
        pipeline.generator.double()
        pipeline.tokenizer.double()
    return pipeline


def last_image(pipeline: NextScalePipeline, **settings: Any) -> Tensor:
    """The finished images in [0, 1], before they are rounded to 8 bits."""
    *_, step = pipeline.stream(LABELS, generator=torch.Generator().manual_seed(3), **settings)
    return (pipeline.tokenizer.decode_latent(step.latent) + 1) / 2


def test_encode_gives_the_published_tokens(pipeline: NextScalePipeline) -> None:
    for ours, published in zip(pipeline.tokenizer.encode(FIGURES["image"]), golden_tokens(), strict=True):
        assert torch.equal(ours, published)


def test_context_is_the_published_one(pipeline: NextScalePipeline) -> None:
    assert_near(pipeline.tokenizer.context(golden_tokens()), FIGURES["context"])


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_prefixes_decode_to_the_published_reconstructions(pipeline: NextScalePipeline, scales: int) -> None:
    assert_near(pipeline.tokenizer.decode(golden_tokens()[:scales]), FIGURES[f"reconstruction.{scales - 1}"])


def test_teacher_forced_logits(converted: tuple[str, NextScalePipeline]) -> None:
    name, pipeline = converted
    assert_near(pipeline.logits(golden_tokens(), LABELS), FIGURES[f"{name}.logits"])


GOLDEN_IMAGES = [key.split(".") for key in FIGURES if key.split(".")[-1] in SETTINGS]


@pytest.mark.parametrize(("name", "draw"), GOLDEN_IMAGES)
def test_sampling_with_one_generator_gives_the_published_images(name: str, draw: str) -> None:
    image = last_image(converted_for(draw, name), **SETTINGS[draw])
    assert_near(image.float(), FIGURES[f"{name}.{draw}"])


@pytest.mark.parametrize("draw", SETTINGS)
def test_tensor_output_is_the_published_image_too(draw: str) -> None:
    generator = torch.Generator().manual_seed(3)
    images = converted_for(draw, "var")(LABELS, generator=generator, output_type="pt", **SETTINGS[draw]).images
    assert_near(images.float(), FIGURES[f"var.{draw}"])


def test_the_settings_are_told_apart(pipeline: NextScalePipeline) -> None:
    """The figures differ by far more than the tolerance, so that a setting that was ignored would be noticed."""
    images = {draw: FIGURES[f"var.{draw}"] for draw in SETTINGS}
    assert (images["greedy"] - images["seeded"]).abs().max() > 0.01
    assert (images["smooth"] - images["seeded"]).abs().max() > 0.01
    assert (
        last_image(pipeline, **(SETTINGS["seeded"] | {"guidance_scale": 2.0})) - images["seeded"]
    ).abs().max() > 0.01


def test_training_checkpoint_converts_to_the_same_model(pipeline: NextScalePipeline) -> None:
    checkpoint = {
        "epoch": 3,
        "iter": 100,
        "trainer": {"config": {"lr": 1e-4}, "var_wo_ddp": state("var"), "vae_local": state("tokenizer"), "var_opt": {}},
        "args": {"seed": 0},
    }
    nested = vgen.convert("var", transformer=checkpoint, tokenizer=checkpoint)
    for role in ("generator", "tokenizer"):
        ours, wanted = getattr(nested, role).state_dict(), getattr(pipeline, role).state_dict()
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert_near(nested.logits(golden_tokens(), LABELS), FIGURES["var.logits"])
