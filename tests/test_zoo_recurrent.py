"""fashion-recurrent: small, documented, at rest after its usual depth, and decoded the same by samplers that lose
nothing."""

import json
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vgen
from vgen.data import FASHION, to_uint8
from vgen.evaluation.extractors import ExtractorOptions, build_extractor
from vgen.hub import ZOO
from vgen.pipelines.raster import GATES, RasterPipeline
from vgen.training.config import load_config

FOLDER = ZOO / "fashion-recurrent"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="fashion-recurrent is not bundled yet")
SETTINGS: list[dict[str, Any]] = [
    {"inner_recurrences": 1},
    {"inner_recurrences": 2, "guidance_scale": 1.0, "top_k": 100},
    {"inner_recurrences": 4, "temperature": 0.8, "wavefront": 6},
]


@pytest.fixture(scope="module")
def pipeline() -> RasterPipeline:
    return vgen.load("fashion-recurrent")


def test_it_is_small_and_half_precision(pipeline: RasterPipeline) -> None:
    (file,) = FOLDER.rglob("*.safetensors")
    assert file.parent.name == "generator" and file.stat().st_size <= 5e6
    assert pipeline.files[1] == ZOO / "fashion-maskgit" / "tokenizer" / file.name  # which it shares
    for name, tensor in load_file(file).items():
        assert tensor.dtype == torch.float16 and torch.isfinite(tensor).all(), name


def test_it_fits_the_committed_preset(pipeline: RasterPipeline) -> None:
    preset = load_config("fashion-recurrent")
    for name, value in preset.model.items():
        assert pipeline.generator.config[name] == value, name
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["id2label"] == {str(i): name for i, name in enumerate(FASHION)}
    assert set(index["gates"]) == set(GATES)


def test_the_card_says_how_it_was_made() -> None:
    text = (FOLDER / "README.md").read_text()
    for part in (
        "license:",
        "fashion-mnist",
        "--preset fashion-recurrent",
        "CPU-minutes",
        "test_loss",
        "test_residual",
    ):
        assert part in text, part
    assert "-dirty" not in text  # a revision anybody can check out


def test_the_bundled_classifier_takes_samples_for_what_they_are(pipeline: RasterPipeline) -> None:
    judge = build_extractor("fashion-classifier", ExtractorOptions())
    labels = torch.arange(10).repeat_interleave(12)
    images = pipeline(class_labels=labels, seeds=list(range(120)), output_type="pt").images
    found = judge(to_uint8(images), ("logits",))["logits"].argmax(1)
    assert (found == labels).double().mean() > 0.8
    assert len({image.numpy().tobytes() for image in images}) == 120


def test_its_loop_holds_all_gates(pipeline: RasterPipeline) -> None:
    """So that parallel samplers have nothing to warn of."""
    for name, (bound, above, _) in GATES.items():
        figure = pipeline.config["gates"][name]
        assert figure >= bound if above else figure <= bound, name
    with warnings.catch_warnings():
        warnings.simplefilter("error", vgen.types.ModelWarning)
        next(pipeline.stream(class_labels=[0], seeds=[0], sampler="wave-exact"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_waves_decode_what_raster_decodes(settings: dict[str, Any]) -> None:
    """In float64 token for token over 100 seeds; in float32 in 99 of 100 images."""
    shared = {key: value for key, value in settings.items() if key not in ("inner_recurrences", "wavefront")}
    labels, seeds = [i % 10 for i in range(100)], list(range(100))
    for dtype, least in ((torch.float64, 100), (torch.float32, 99)):
        pipeline = vgen.load("fashion-recurrent", dtype=dtype)
        raster = pipeline(labels, seeds=seeds, sampler="raster", output_type="latent", **shared).tokens
        wave = pipeline(labels, seeds=seeds, sampler="wave-exact", output_type="latent", **settings).tokens
        assert int((raster == wave).all(1).sum()) >= least, dtype
