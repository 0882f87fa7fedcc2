"""fashion-maskgit: small, whole, documented, and what a trained model shows that random ones cannot."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vgen
from vgen.data import FASHION, to_uint8
from vgen.evaluation.extractors import ExtractorOptions, build_extractor
from vgen.hub import ZOO
from vgen.pipelines.masked import MaskedPipeline
from vgen.training.config import load_config

FOLDER = ZOO / "fashion-maskgit"


@pytest.fixture(scope="module")
def pipeline() -> MaskedPipeline:
    return vgen.load("fashion-maskgit")


def test_it_is_small_and_half_precision() -> None:
    files = sorted(FOLDER.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["generator", "tokenizer"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12e6
    for file in files:
        for name, tensor in load_file(file).items():
            assert tensor.dtype == (torch.float32 if "codebook." in name else torch.float16), name
            assert torch.isfinite(tensor).all(), name


def test_it_fits_the_committed_presets(pipeline: MaskedPipeline) -> None:
    tokenizer, generator = load_config("fashion-vqgan"), load_config("fashion-maskgit")
    for part, config in ((pipeline.tokenizer, tokenizer), (pipeline.generator, generator)):
        for name, value in config.model.items():
            assert part.config[name] == value, name
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["settings"] == generator.sample_settings
    assert index["id2label"] == {str(i): name for i, name in enumerate(FASHION)}
    assert pipeline.resolve_settings({})["guidance_scale"] == generator.sample_guidance


@pytest.mark.parametrize("card", [FOLDER / "README.md", FOLDER / "tokenizer" / "README.md"], ids=["maskgit", "vqgan"])
def test_the_card_says_how_it_was_made(card: Path) -> None:
    text = card.read_text()
    preset = "fashion-maskgit-decoder" if card.parent.name == "tokenizer" else "fashion-maskgit"
    for part in ("license:", "fashion-mnist", f"--preset {preset}", "CPU-minutes", "code revision", "parameters"):
        assert part in text, part
    assert ("test_psnr" if card.parent.name == "tokenizer" else "test_loss") in text
    assert "-dirty" not in text  # a revision anybody can check out


@pytest.mark.parametrize("settings", [{}, {"partial_steps": 1}, {"sampler": "halton", "steps": 8}])
def test_the_bundled_classifier_takes_samples_for_what_they_are(pipeline: MaskedPipeline, settings: dict) -> None:
    judge = build_extractor("fashion-classifier", ExtractorOptions())
    labels = torch.arange(10).repeat_interleave(12)
    images = pipeline(class_labels=labels, seeds=list(range(120)), output_type="pt", **settings).images
    found = judge(to_uint8(images), ("logits",))["logits"].argmax(1)
    assert (found == labels).double().mean() > 0.85
    assert len({image.numpy().tobytes() for image in images}) == 120
    ink = images.mean(dim=(1, 2, 3))
    assert ((ink > 0.02) & (ink < 0.85)).all()  # neither blank nor full


def test_what_is_masked_is_predicted_from_what_is_known(pipeline: MaskedPipeline) -> None:
    """The more of an image is given, the likelier the rest: its own samples, scored with shares of them hidden."""
    labels = torch.arange(10).repeat(4)
    tokens = pipeline(class_labels=labels, seeds=list(range(40)), output_type="latent").tokens
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    losses = []
    for known in (0, 12, 24, 36, 48):
        hidden = order[:, known:]
        masked = tokens.scatter(1, hidden, pipeline.generator.mask_token_id)
        scores = pipeline.logits(masked, labels).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        losses.append(float(-scores.gather(1, hidden).mean()))
    assert losses[0] - 0.3 > losses[1] > max(losses[2:]), losses


def partial_error(pipeline: MaskedPipeline, tokens: Tensor, labels: Tensor, known: int, group: int) -> float:
    """Mean KL between whole and partial evaluation after half a group was revealed, on its other half."""
    generator = pipeline.generator
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    places, half = order[:, known : known + group], group // 2
    before = tokens.scatter(1, order[:, known:], generator.mask_token_id)
    cache = generator.new_cache(len(tokens))
    generator(before, labels, cache=cache)
    after = before.scatter(1, places[:, :half], tokens.gather(1, places[:, :half]))
    partial = generator(after.gather(1, places), labels, positions=places, cache=cache)[:, half:].log_softmax(-1)
    index = places[:, half:, None].expand(-1, -1, partial.shape[-1])
    whole = generator(after, labels).gather(1, index).log_softmax(-1)
    return float((whole.exp() * (whole - partial)).sum(-1).mean())


@torch.no_grad()
def test_the_error_of_partial_evaluations_grows_with_the_group(pipeline: MaskedPipeline) -> None:
    """Relative to what is known: the larger the group and the less known, the staler the features of the rest."""
    labels = torch.arange(10).repeat(4)
    tokens = pipeline(class_labels=labels, seeds=list(range(40)), output_type="latent").tokens
    by_group = [partial_error(pipeline, tokens, labels, 12, group) for group in (2, 8, 24)]
    assert 0 < by_group[0] < by_group[1] < by_group[2], by_group
    by_known = [partial_error(pipeline, tokens, labels, known, 12) for known in (36, 20, 4)]
    assert 0 < by_known[0] < by_known[2], by_known
