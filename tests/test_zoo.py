"""The bundled models: small, whole, documented, and worth looking at."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vgen
from vgen.data import FASHION, to_uint8
from vgen.evaluation.extractors import ExtractorOptions, build_extractor
from vgen.hub import ZOO
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.training.card import cpu_minutes, model_card
from vgen.training.config import load_config

FOLDER = ZOO / "fashion-var"
NEXT_SCALE = ["fashion-var", "fashion-mvar", "fashion-nfig"]
TOKENIZERS = {"fashion-var": "fashion-vq", "fashion-mvar": "fashion-vq", "fashion-nfig": "fashion-nfig-vq"}  # presets


@pytest.fixture(scope="module", params=NEXT_SCALE)
def pipeline(request: pytest.FixtureRequest) -> NextScalePipeline:
    return vgen.load(request.param)


def test_every_folder_of_the_zoo_is_a_model_that_loads() -> None:
    assert "fashion-var" in vgen.list_models()
    classifiers = {path.name for path in ZOO.iterdir() if (path / "config.json").is_file()}
    assert classifiers == {"fashion-classifier"}  # which the evaluator loads
    assert {path.name for path in ZOO.iterdir() if path.is_dir()} == classifiers | set(vgen.list_models())
    for name in vgen.list_models():
        assert vgen.load(name).source == name


def test_all_bundled_models_together_are_small() -> None:
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) <= 40e6


def test_next_scale_models_can_be_compared() -> None:
    """As many parameters each; M-VAR on VAR's own tokenizer, NFIG's of the same size with other aims."""
    var, mvar, nfig = (vgen.load(name) for name in NEXT_SCALE)
    assert mvar.files[1] == FOLDER / "tokenizer" / "diffusion_pytorch_model.safetensors"
    sizes = [sum(p.numel() for p in pipe.generator.parameters()) for pipe in (var, mvar, nfig)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.01 and sizes[0] == sizes[2]
    shapes = [{k: v.shape for k, v in pipe.tokenizer.state_dict().items()} for pipe in (var, nfig)]
    assert shapes[0] == shapes[1] and nfig.tokenizer.config["band_schedule"] == "nyquist"


@pytest.mark.parametrize("name", NEXT_SCALE)
def test_next_scale_models_are_half_precision(name: str) -> None:
    files = sorted((ZOO / name).rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["generator", "tokenizer"][: 1 if name == "fashion-mvar" else 2]
    for file in files:
        for name, tensor in load_file(file).items():
            exact = "codebook." in name or "phi." in name  # codes stay float32
            assert tensor.dtype == (torch.float32 if exact else torch.float16), name
            assert torch.isfinite(tensor).all(), name


def test_class_names_are_in_the_configuration(pipeline: NextScalePipeline) -> None:
    index = json.loads((pipeline.folder / "model_index.json").read_text())
    assert index["id2label"] == {str(i): name for i, name in enumerate(FASHION)}
    assert pipeline.label_ids(["sneaker", "ankle boot", 0]) == [7, 9, 0]
    assert pipeline.tokenizer.image_size == 28


def test_the_weights_fit_the_committed_presets(pipeline: NextScalePipeline) -> None:
    name = pipeline.folder.name
    tokenizer, generator = load_config(TOKENIZERS[name]).model, load_config(name).model
    for part, settings in ((pipeline.tokenizer, tokenizer), (pipeline.generator, generator)):
        for name, value in settings.items():
            if name != "init_gate":  # serves the first step only
                assert part.config[name] == value, name


@pytest.mark.parametrize("name", [*NEXT_SCALE, "fashion-var/tokenizer", "fashion-nfig/tokenizer"])
def test_the_card_says_how_it_was_made(name: str) -> None:
    finished = {"fashion-var": "fashion-var-decoder", "fashion-nfig": "fashion-nfig-vq"}  # what tokenizers end with
    card = ZOO / name / "README.md"
    text = card.read_text()
    preset = finished.get(card.parents[1].name) if card.parent.name == "tokenizer" else name
    for part in ("license:", "fashion-mnist", f"--preset {preset}", "CPU-minutes", "code revision", "parameters"):
        assert part in text, part
    assert ("test_psnr" if card.parent.name == "tokenizer" else "test_loss") in text
    assert "-dirty" not in text  # a revision anybody can check out


def test_each_class_varies_and_differs_from_the_others(pipeline: NextScalePipeline) -> None:
    labels = [label for label in range(10) for _ in range(6)]
    images = pipeline(class_labels=labels, seeds=list(range(60)), output_type="pt").images.mean(1)
    classes = images.view(10, 6, 28, 28)
    assert len({image.numpy().tobytes() for image in images}) == 60
    spread = classes.std(dim=1).mean(dim=(1, 2))
    assert (spread > 0.03).all(), spread  # no class has collapsed to one picture
    means = classes.mean(dim=1).flatten(1)
    between = torch.cdist(means, means) / 28
    assert (between + torch.eye(10) > 0.08).all(), between  # no two classes are drawn alike
    ink = images.mean(dim=(1, 2))
    assert ((ink > 0.02) & (ink < 0.8)).all()  # neither blank nor full


# Mean training image of each class, 7 x 7 cells of grey. The nearest mean is right for 65% of Fashion-MNIST's own test
# images, and one of the three nearest for 90%.
MEANS = [
    "012e75867c3901087b9392928110106f989394741804219897972e06031a9c9b9a2a03021f9f9f9d3302011e90978f3001",
    "00026eaf890400000487bf9f0800000583a299080000057a798d0700000574608a060000056b5c8a060000045451740600",
    "002476917c2b00026f9a97977803058a9e9898920909929a9b9797100d8f9a9f9a92160f84979b9787190b624a4e4a6214",
    "0006617f690b00001381a6861c00001674ab7a1f0000167fb0871d0100118ab3941701000c8db6981200000a7aa8861000",
    "00085eae6b0b00004badb3ab59000176b2acab8502048ab1aeab99070790aeb1ab9b0d0a86a3aba48d11085b5a695e5b0e",
    "00000104070b03000002111b241200010b304046330725373d586548275558545f5f551733352d1521240812160d02080b",
    "011b5a865f2101035d898a8867050770918c8c7b0b096a8f8f8c740e0b678c918d6d110a5f8c928d6611064068786d450b",
    "00000000000000000000020d050300000b4c703c3b1d407a9caeac88466c7d807d7a5f0711161614140e00000100000000",
    "01061021170703122d453745311c316b806f7f72484595a49da39d5e499fb0adafa65f378ca19d9b8e4411485e58534415",
    "000001101d1a0b000002387c733d00000463bdbf690104279fc2c1812e4a87b7bfb98f4f8098976d876e0e242f220a1e19",
]


def test_classes_are_recognisable(pipeline: NextScalePipeline) -> None:
    """As often as real pictures are, to somebody who knows the mean picture of each class."""
    labels = torch.arange(10).repeat_interleave(12)
    images = pipeline(class_labels=labels, seeds=list(range(200, 320)), output_type="pt").images
    cells = F.avg_pool2d(images[:, :1] * 255, 4).flatten(1)
    means = torch.tensor([list(bytes.fromhex(row)) for row in MEANS]).float()
    nearest = torch.cdist(cells, means).argsort(1)
    assert (nearest[:, 0] == labels).float().mean() > 0.5
    among_three = (nearest[:, :3] == labels[:, None]).any(1).float().view(10, 12).mean(1)
    assert among_three.mean() > 0.8 and (among_three >= 0.5).all(), among_three


def test_silhouettes_are_those_of_the_classes(pipeline: NextScalePipeline) -> None:
    """Trousers are tall and narrow, sneakers low and wide; both are what Fashion-MNIST shows."""
    labels = ["trouser"] * 8 + ["sneaker"] * 8
    images = pipeline(class_labels=labels, seeds=list(range(16)), output_type="np").images.mean(-1)
    filled = images > 0.2

    def extent(axis: int) -> np.ndarray:
        return filled.any(axis=axis).sum(axis=1)

    heights, widths = extent(2), extent(1)
    assert np.median(heights[:8]) > 24 and np.median(widths[:8]) < 20
    assert np.median(heights[8:]) < 18 and np.median(widths[8:]) > 24


def test_the_bundled_classifier_takes_samples_for_what_they_are(pipeline: NextScalePipeline) -> None:
    """It is right about 93% of real test images, and about as many samples."""
    judge = build_extractor("fashion-classifier", ExtractorOptions())
    labels = torch.arange(10).repeat_interleave(20)
    images = pipeline(class_labels=labels, seeds=list(range(500, 700)), output_type="pt").images
    found = judge(to_uint8(images), ("logits",))["logits"].argmax(1)
    assert (found == labels).double().mean() > 0.87


@pytest.mark.parametrize(("preset", "card"), [("fashion-vq", "tokenizer/README.md"), ("fashion-var", "README.md")])
def test_a_card_tells_what_the_part_that_it_began_with_took(preset: str, card: str) -> None:
    """Of a pipeline the tokenizer has a card of its own."""
    config = load_config(preset, ["init_from=fashion-var"])
    minutes = cpu_minutes((ZOO / "fashion-var" / card).read_text())
    text = model_card(config, torch.nn.Linear(1, 1), {}, (60.0, 60.0), "vgen train")
    assert f"| begun with | `fashion-var` ({minutes} CPU-minutes) |" in text
