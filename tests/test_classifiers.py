"""The small classifier: its network, its training, and the bundled one that samples are judged by."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_training import checkpoint, forget, fresh_accelerate, metrics, run_until, same, trainer_for, weights  # noqa: F401
from tiny import WEIGHTS, randomize, write_folder, write_mnist

import vgen
from vgen import hub
from vgen.batch import plan
from vgen.data import FASHION, open_source, to_model_range, to_uint8, to_unit_range
from vgen.evaluation.classifier import ImageClassifier
from vgen.evaluation.extractors import ExtractorOptions, build_extractor
from vgen.evaluation.sampled import SampledImages
from vgen.training.classifiers import MAX_SHIFT, ClassifierTask
from vgen.training.config import TrainingConfig, load_config
from vgen.training.run import build_task, start
from vgen.types import SettingError


def classifier(channels: int = 1, seed: int = 3, **changes: Any) -> ImageClassifier:
    settings: dict[str, Any] = {"image_size": 9, "image_channels": channels, "widths": (4, 8, 6), "norm_groups": 2}
    model = ImageClassifier(["ant", "bee", "cat", "dog"], **settings | changes)
    randomize(model, seed)
    return model.eval()


def config_of(root: Path, **changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "kind": "classifier",
        "name": "tiny-classifier",
        "data": "fashion-mnist",
        "data_root": str(root),
        "family": "convnet",
        "model": {"widths": [8, 16], "norm_groups": 4},
        "image_size": 28,
        "steps": 6,
        "batch_size": 8,
        "lr": 3e-3,
        "warmup": 2,
        "precision": "no",
        "log_every": 1,
        "eval_every": 3,
        "sample_every": 1000,
        "save_every": 1000,
    }
    return TrainingConfig(**values | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of images; class i % 3."""
    return write_mnist(tmp_path_factory.mktemp("data"), classes=3)


def task_of(config: TrainingConfig) -> ClassifierTask:
    task = build_task(config)
    assert isinstance(task, ClassifierTask)
    return task


# ---- the network


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_logits_are_a_linear_map_of_the_features(channels: int) -> None:
    model, images = classifier(channels), torch.rand(5, channels, 9, 9) * 2 - 1
    features, logits = model.features(images), model(images)
    assert features.shape == (5, 6) and logits.shape == (5, 4)
    assert features.dtype == logits.dtype == torch.float32
    wanted = features @ model.head.weight.T + model.head.bias
    assert torch.allclose(logits, wanted, atol=1e-6) and torch.allclose(model.classify(features), wanted, atol=1e-6)
    assert torch.allclose(model.features(images[2:3]), features[2:3], atol=1e-6)  # whatever else is in the batch
    assert len(features.round(decimals=4).unique(dim=0)) == 5


@torch.no_grad()
def test_every_part_of_the_network_counts() -> None:
    """Each block, layer and normalisation changes what comes out; resolutions are halved between widths only."""
    images = torch.rand(2, 1, 9, 9) * 2 - 1
    before = classifier()(images)
    names = [name for name, _ in classifier().named_parameters()]
    assert len(names) == 3 * 2 * 3 + 2  # widths, layers, convolution and norm; the head
    for name in names:
        model = classifier()
        model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape) * 0.3)
        assert not torch.allclose(model(images), before, atol=1e-5), name
    sizes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block[1].register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(images)
    assert sizes == [(4, 9, 9), (8, 4, 4), (6, 2, 2)]


@torch.no_grad()
def test_grey_images_may_come_as_three_equal_channels() -> None:
    model, grey = classifier(1), torch.rand(3, 1, 9, 9) * 2 - 1
    assert torch.allclose(model(grey.expand(-1, 3, -1, -1)), model(grey), atol=1e-5)
    colour = torch.rand(3, 3, 9, 9) * 2 - 1
    assert torch.allclose(model(colour), model(colour.mean(1, keepdim=True)), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 1, 9, 8), (2, 1, 8, 9), (2, 3, 18, 18)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    says = rf"images of {shape[3]}x{shape[2]}: the classifier was trained on 9x9"
    with pytest.raises(SettingError, match=says):
        classifier().features(torch.zeros(shape))


@torch.no_grad()
def test_half_precision_gives_float32_figures() -> None:
    model, images = classifier(), torch.rand(2, 1, 9, 9)
    before = model(images)
    half = torch.nn.Module.to(model, torch.bfloat16)
    assert half(images).dtype == half.features(images).dtype == torch.float32
    assert torch.allclose(half(images), before, atol=0.05)


# ---- batches to learn from


def originals(task: ClassifierTask, indices: list[int]) -> torch.Tensor:
    return to_model_range(task.source.images(indices))


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """An image (C, S, S) moved, black where nothing was."""
    found = torch.full_like(image, -1)
    size = image.shape[-1]
    for y in range(max(0, down), min(size, size + down)):
        for x in range(max(0, right), min(size, size + right)):
            found[:, y, x] = image[:, y - down, x - right]
    return found


def test_a_batch_is_a_function_of_its_indices_and_seed(data: Path) -> None:
    task = task_of(config_of(data, flip=True))
    indices = np.array([3, 17, 8, 8, 40])
    images, labels = task.batch(indices, seed=5)
    assert images.shape == (5, 1, 28, 28) and images.dtype == torch.float32
    assert labels.tolist() == [0, 2, 2, 2, 1] and labels.dtype == torch.int64
    torch.rand(7), np.random.rand(7)  # whatever else has drawn
    task.batch(indices, seed=6)
    other = task_of(config_of(data, flip=True, seed=9))
    for again in (task, other):
        assert all(torch.equal(a, b) for a, b in zip(again.batch(indices, seed=5), (images, labels), strict=True))
    assert not torch.equal(task.batch(indices, seed=6)[0], images)


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_shifted_and_flipped_and_nothing_else(data: Path, flip: bool) -> None:
    """Every shift of up to two pixels and both sides come up, and nothing besides."""
    task = task_of(config_of(data, flip=flip))
    (image,) = originals(task, [4])  # its bar begins one pixel from the left: no flip looks like no other
    reach = range(-MAX_SHIFT, MAX_SHIFT + 1)
    sides = (image, image.flip(-1)) if flip else (image,)
    allowed = {shifted(side, y, x).numpy().tobytes() for side in sides for y in reach for x in reach}
    assert len(allowed) == 25 * len(sides) and MAX_SHIFT == 2
    drawn = torch.cat([task.batch(np.array([4] * 10), seed)[0] for seed in range(60)])
    assert {image.numpy().tobytes() for image in drawn} == allowed


def test_folders_in_colour_are_shifted_too(tmp_path: Path) -> None:
    write_folder(tmp_path, each=3, side=20)
    model = {"widths": [4], "norm_groups": 2, "image_channels": 3}
    task = task_of(config_of(tmp_path, data=str(tmp_path), image_size=12, model=model))
    assert task.model.config["class_names"] == ["ant", "bee", "cat"] and task.num_examples == 9
    images, labels = task.batch(np.array([0, 4, 8]), seed=1)
    assert images.shape == (3, 3, 12, 12) and labels.tolist() == [0, 1, 2]
    assert torch.equal(task.batch(np.array([0, 4, 8]), seed=1)[0], images)
    assert float(images.min()) >= -1 and float(images.max()) <= 1


def test_crops_of_folders_follow_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, each=1, side=32)
    task = task_of(config_of(tmp_path, data=str(tmp_path), image_size=16))
    monkeypatch.setattr("vgen.training.classifiers.MAX_SHIFT", 0)  # which would hide it
    images = {seed: task.batch(np.array([1]), seed)[0] for seed in range(10)}
    assert len({image.numpy().tobytes() for image in images.values()}) == 3  # heights of its bar
    for seed, image in images.items():
        assert torch.equal(image, to_model_range(task.source.images([1], crop_seed=seed)))


def test_the_loss_is_the_cross_entropy(data: Path) -> None:
    task = task_of(config_of(data))
    images, labels = task.batch(np.arange(6), seed=0)
    loss, figures = task.loss(task.model, (images, labels), torch.Generator())
    logits = task.model(images).log_softmax(1)
    assert torch.allclose(loss, -logits[torch.arange(6), labels].mean()) and loss.requires_grad and figures == {}


# ---- held-out images


class Constant(torch.nn.Module):
    """Takes everything for one class."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.logits = F.one_hot(torch.tensor(label), 10).float() * 3
        self.device = torch.device("cpu")
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        return self.logits.expand(len(images), 10)


def test_the_accuracy_is_over_all_held_out_images(tmp_path: Path) -> None:
    write_mnist(tmp_path, train=4, test=1003, classes=3)
    task = task_of(config_of(tmp_path))
    task.model = model = Constant(0)  # type: ignore[assignment]
    figures = task.evaluate()
    assert model.sizes == [500, 500, 3]
    assert figures["test_accuracy"] == pytest.approx(335 / 1003)
    right = -float(model.logits.log_softmax(0)[0])
    wrong = -float(model.logits.log_softmax(0)[1])
    assert figures["test_loss"] == pytest.approx((335 * right + 668 * wrong) / 1003, rel=1e-5)


def test_held_out_images_follow_the_model_to_its_device(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", which computes nothing, in place of a GPU; the logits are brought back by hand."""
    monkeypatch.setattr(ImageClassifier, "classify", lambda self, features: torch.zeros(len(features), 10))
    task = task_of(config_of(data))
    task.model.to("meta")
    with torch.no_grad():
        task.evaluate()


def test_the_picture_shows_what_is_taken_for_another_class(data: Path) -> None:
    task = task_of(config_of(data))
    task.model = Constant(1)  # type: ignore[assignment]
    wrong = [i for i, label in enumerate(task.held_out.labels.tolist()) if label != 1]
    sheet = np.array(task.picture().convert("L"))
    zoom, gap = 3, 2
    step = 28 * zoom + gap
    assert sheet.shape == (gap + step, gap + 16 * step)  # 16 test images, of which 11 are wrong
    tiles = [sheet[gap : gap + 28 * zoom : zoom, gap + i * step : gap + i * step + 28 * zoom : zoom] for i in range(16)]
    for tile, index in zip(tiles, wrong, strict=False):
        assert np.array_equal(tile, task.held_out.images([index])[0, 0])
    assert len(wrong) == 11 and all((tile == 255).all() for tile in tiles[11:])


def test_the_picture_of_a_perfect_classifier_is_a_picture(tmp_path: Path) -> None:
    write_mnist(tmp_path, test=4, classes=1)
    task = task_of(config_of(tmp_path))
    task.model = Constant(0)  # type: ignore[assignment]
    assert isinstance(task.picture(), Image.Image)


# ---- training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run on three classes of bars, and its data."""
    forget()
    root = write_mnist(tmp_path_factory.mktemp("data"), train=120, test=60, classes=3)
    changes = {"model": {"widths": [8, 16, 16], "norm_groups": 4}, "steps": 60, "eval_every": 20, "license": "mit"}
    config = config_of(root, batch_size=30, lr=1e-2, ema=0.9, flip=True, **changes)
    return start(config, tmp_path_factory.mktemp("runs") / "run", command="vgen train classifier"), root


def test_a_classifier_learns(trained: tuple[Path, Path]) -> None:
    """Three classes, of which chance finds one in three."""
    lines = [line for line in metrics(trained[0].parent) if "test_accuracy" in line]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[-1]["test_accuracy"] > 0.9 and lines[-1]["test_loss"] < 0.5


def test_a_trained_classifier_is_an_extractor(trained: tuple[Path, Path]) -> None:
    folder, root = trained
    extractor = build_extractor(str(folder), ExtractorOptions())
    assert extractor.class_names == FASHION
    source = open_source("fashion-mnist", "test", 28, 1, root)
    found = extractor(source.images(range(60)).expand(-1, 3, -1, -1), ("features", "logits"))
    assert found["features"].shape == (60, 16)
    accuracy = float((found["logits"].argmax(1) == source.labels).float().mean())
    stated = [line["test_accuracy"] for line in metrics(folder.parent) if "test_accuracy" in line][-1]
    assert accuracy == pytest.approx(stated, abs=0.02)  # what was exported is what was measured, but for half precision


def test_a_trained_classifier_is_small_and_says_what_it_is(trained: tuple[Path, Path]) -> None:
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {"config.json", WEIGHTS, "README.md"}
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.float16}
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "| test_accuracy | " in card and "`vgen train classifier`" in card


def test_a_resumed_run_equals_an_unbroken_one(data: Path, tmp_path: Path) -> None:
    config = config_of(data, steps=7, flip=True)
    start(config, tmp_path / "whole")
    run_until(config, tmp_path / "broken", 2)
    run_until(config, tmp_path / "broken", 5, resume=True)
    start(config, tmp_path / "broken", resume=True)
    assert same(checkpoint(tmp_path / "whole", 7), checkpoint(tmp_path / "broken", 7))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model"))


def test_training_goes_on_in_full_precision_after_the_export(data: Path, tmp_path: Path) -> None:
    trainer = trainer_for(config_of(data, steps=2), tmp_path / "run")
    trainer.run()
    assert {parameter.dtype for parameter in trainer.task.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "resnet"}, "unknown classifier family 'resnet': use one of convnet"),
        ({"model": {"depth": 3}}, r"model settings of tiny-classifier: .*depth"),
        ({"model": {"image_size": 8}}, r"model settings of tiny-classifier: .*image_size"),
        ({"data": "nowhere"}, "neither a folder nor one of"),
    ],
)
def test_settings_that_make_no_classifier_are_named(data: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        build_task(config_of(data, **changes))


def test_a_classifier_needs_an_image_size(data: Path) -> None:
    with pytest.raises(SettingError, match="image_size is 0: a classifier needs at least 8"):
        config_of(data, image_size=0)


def test_the_seed_decides_the_first_weights(data: Path) -> None:
    first, second, third = (task_of(config_of(data, seed=seed)).model.state_dict() for seed in (1, 1, 2))
    assert same(dict(first), dict(second)) and not same(dict(first), dict(third))


# ---- the bundled one


def test_the_preset_is_that_of_the_bundled_classifier(data: Path) -> None:
    config = load_config("fashion-classifier", [f"data_root={data}"], kind="classifier")
    model = task_of(config).model
    folder = hub.ZOO / "fashion-classifier"
    bundled = hub.load_component(ImageClassifier, folder, torch.float32)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in bundled.state_dict().items()
    }
    card = (folder / "README.md").read_text()
    assert f"| steps | {config.steps}, batch {config.batch_size} |" in card and config.notes.strip() in card
    yaml.safe_dump(dataclasses.asdict(config))  # what a run writes beside its results


def test_the_bundled_classifier_is_small_and_states_its_accuracy() -> None:
    folder = hub.ZOO / "fashion-classifier"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    stated = re.search(r"\| test_accuracy \| (0\.\d+) \|", (folder / "README.md").read_text())
    assert stated and 0.9 < float(stated[1]) < 1
    assert "fashion-classifier" not in vgen.list_models()  # which can be sampled from


def test_the_bundled_classifier_knows_what_the_bundled_model_draws() -> None:
    """Both learnt the same clothes; by chance one sample in ten would be right."""
    pipeline = vgen.load("fashion-var", device="cpu")
    images = SampledImages(pipeline, plan(range(10), 3, seed=0), {"guidance_scale": 3.0})
    logits = build_extractor("fashion-classifier", ExtractorOptions())(images.read(0, 30).pixels, ("logits",))["logits"]
    right = logits.argmax(1) == torch.tensor(images.labels)
    assert float(right.float().mean()) > 0.75


def test_pixels_of_the_evaluator_are_those_of_training(data: Path) -> None:
    """The extractor's range is the task's: or accuracy would drop without a word."""
    source = open_source("fashion-mnist", "test", 28, 1, data)
    extractor = build_extractor("fashion-classifier", ExtractorOptions())
    found = extractor(source.images([0, 1]).expand(-1, 3, -1, -1), ("features",))["features"]
    bundled = hub.load_component(ImageClassifier, hub.ZOO / "fashion-classifier", torch.float32)
    with torch.no_grad():
        wanted = bundled.features(to_model_range(source.images([0, 1])))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(to_uint8(to_unit_range(to_model_range(source.images([0])))), source.images([0]))
