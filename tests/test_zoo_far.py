"""moving-far: small, documented, and what a trained model shows that random ones cannot."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vgen
from vgen.hub import ZOO
from vgen.pipelines.clips import CONTEXT_FILE
from vgen.pipelines.next_frame import NextFramePipeline
from vgen.training.config import load_config

FOLDER = ZOO / "moving-far"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="moving-far is not bundled yet")


@pytest.fixture(scope="module")
def pipeline() -> NextFramePipeline:
    return vgen.load("moving-far")


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """The bundled clips (B, F, S, S) in [0, 1]: of test digits, which training never saw."""
    with np.load(FOLDER / CONTEXT_FILE) as arrays:
        (name,) = arrays.files
        return torch.from_numpy(arrays[name])[..., 0].float() / 255


@pytest.fixture(scope="module")
def videos(pipeline: NextFramePipeline) -> Tensor:
    """Twenty frames from each of the bundled clips, (B, F, S, S) in [0, 1]."""
    return pipeline(seeds=list(range(16)), output_type="pt").frames.mean(2)


def test_it_is_small_and_half_precision() -> None:
    files = sorted(FOLDER.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["generator", "tokenizer"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 5e6
    for file in files:
        for name, tensor in load_file(file).items():
            assert tensor.dtype in (torch.float16, torch.float32) and torch.isfinite(tensor).all(), name
    assert all(tensor.dtype == torch.float16 for tensor in load_file(files[0]).values())


def test_it_fits_the_committed_preset(pipeline: NextFramePipeline) -> None:
    preset = load_config("moving-far")
    for name, value in preset.model.items():
        if name != "init_gate":  # serves the first step only
            found = pipeline.generator.config[name]
            assert (list(found) if isinstance(value, list) else found) == value, name
    assert json.loads((FOLDER / "model_index.json").read_text())["settings"] == preset.sample_settings
    assert pipeline.tokenizer.image_size == preset.video["size"]


def test_the_card_says_how_it_was_made() -> None:
    text = (FOLDER / "README.md").read_text()
    for part in ("license:", "moving-mnist", "--preset moving-far", "CPU-minutes", "code revision", "test_mse"):
        assert part in text, part
    assert "-dirty" not in text  # a revision anybody can check out


def test_a_video_begins_with_the_clip_of_its_seed(videos: Tensor, clips: Tensor) -> None:
    assert videos.shape == (16, 20, 64, 64) and clips.shape == (16, 10, 64, 64)
    assert float((videos[:, :5] - clips[:, :5]).square().mean()) < 2e-3  # as the codec gives it back


def test_the_next_frame_is_predicted(videos: Tensor, clips: Tensor) -> None:
    """Far better than by repeating the last one, and still better after five frames."""
    truth, found = clips[:, 5:], videos[:, 5:10]
    copied = (clips[:, 4:5] - truth).square().mean((0, 2, 3))
    errors = (found - truth).square().mean((0, 2, 3))
    assert float(errors[0] / copied[0]) < 0.3, errors / copied
    assert float(errors.mean() / copied.mean()) < 0.35, errors / copied


def test_digits_stay_and_go_on_moving(videos: Tensor) -> None:
    """After fifteen predicted frames there is about as much ink as at first, and it is elsewhere in every frame."""
    ink = videos.mean((2, 3))
    kept = ink[:, -1] / ink[:, 4]
    assert float(((kept > 0.6) & (kept < 1.5)).float().mean()) >= 0.9, kept
    moved = (videos[:, 1:] - videos[:, :-1]).square().mean((2, 3))
    assert float((moved[:, 5:] / moved[:, :4].mean(1, keepdim=True)).median()) > 0.4


def test_a_longer_video_begins_with_the_shorter_one(pipeline: NextFramePipeline, videos: Tensor) -> None:
    short = pipeline(seeds=[0, 1], frames=9, output_type="pt").frames.mean(2)
    assert float((short - videos[:2, :9]).abs().max()) < 1e-3


def test_other_seeds_of_a_clip_are_other_futures(pipeline: NextFramePipeline, videos: Tensor) -> None:
    again = pipeline(seeds=[16, 17], output_type="pt").frames.mean(2)
    assert torch.allclose(again[:, :5], videos[:2, :5], atol=1e-3)
    assert float((again[:, -1] - videos[:2, -1]).abs().max()) > 0.05
