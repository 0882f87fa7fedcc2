"""emoji-var: small, whole, documented, in colour, and new pictures rather than stored ones."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_emoji import installed

import vgen
from vgen.data import open_source
from vgen.emoji import NAMES
from vgen.hub import ZOO
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.training.config import load_config

FOLDER = ZOO / "emoji-var"


@pytest.fixture(scope="module")
def pipeline() -> NextScalePipeline:
    return vgen.load("emoji-var")


@pytest.fixture(scope="module")
def samples(pipeline: NextScalePipeline) -> torch.Tensor:
    """Twelve of each group (108, 3, 32, 32)."""
    labels = [label for label in range(9) for _ in range(12)]
    return pipeline(class_labels=labels, seeds=list(range(108)), output_type="pt").images


def test_it_is_small_and_half_precision() -> None:
    files = sorted(FOLDER.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["generator", "tokenizer"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 6e6
    for file in files:
        for name, tensor in load_file(file).items():
            exact = "codebook." in name or "phi." in name  # codes stay float32
            assert tensor.dtype == (torch.float32 if exact else torch.float16), name
            assert torch.isfinite(tensor).all(), name


def test_it_fits_the_committed_presets(pipeline: NextScalePipeline) -> None:
    for part, name in ((pipeline.tokenizer, "emoji-vq"), (pipeline.generator, "emoji-var")):
        for key, value in load_config(name).model.items():
            if key != "init_gate":  # serves the first step only
                assert part.config[key] == value, key
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    assert pipeline.label_ids(["animals", "flags"]) == [2, 8]


@pytest.mark.parametrize(("part", "preset"), [("", "emoji-var"), ("tokenizer", "emoji-vq")])
def test_the_card_says_how_it_was_made(part: str, preset: str) -> None:
    text = (FOLDER / part / "README.md").read_text()
    for word in ("license:", "noto-emoji", "Open Font License", f"--preset {preset}", "CPU-minutes", "code revision"):
        assert word in text, word
    assert "-dirty" not in text  # a revision anybody can check out


def test_pictures_are_in_colour_on_white_and_differ(samples: torch.Tensor) -> None:
    assert len({image.numpy().tobytes() for image in samples}) == 108
    assert (samples.max(1).values - samples.min(1).values).flatten(1).quantile(0.9, 1).median() > 0.2  # saturated
    corners = samples[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    assert corners.median() > 0.97
    ink = (samples.mean(1) < 0.9).float().mean((1, 2))
    assert ((ink > 0.05) & (ink < 0.98)).float().mean() > 0.95  # neither blank nor full
    assert samples.reshape(9, 12, -1).std(1).mean(1).min() > 0.05  # no group is one picture


def nearest_group(images: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """To somebody who knows each group's mean picture in 4x4 cells of colour; images in 0..255."""
    return torch.cdist(F.avg_pool2d(images.float(), 8).flatten(1), means).argmin(1)


@installed
def test_groups_look_like_those_of_the_font(samples: torch.Tensor) -> None:
    """They are told apart nearly as often as the font's own pictures are."""
    source = open_source("noto-emoji", "train", 32, 3, None)
    pictures, labels = source.images(range(len(source.labels))), source.labels
    means = torch.stack([F.avg_pool2d(pictures[labels == group].float(), 8).mean(0).flatten() for group in range(9)])
    real = (nearest_group(pictures, means) == labels).float().mean()
    made = (nearest_group(255 * samples, means) == torch.arange(9).repeat_interleave(12)).float().mean()
    assert real > 0.3 and made > 0.8 * real, (made, real)
