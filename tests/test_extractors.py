"""Extractors: a trained classifier, the pixels, a network of one's own, and messages for what is none."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WEIGHTS, randomize, tiny_pipeline
from torch import Tensor

from vgen.data import FASHION, to_model_range
from vgen.evaluation import extractors
from vgen.evaluation.classifier import ImageClassifier
from vgen.evaluation.extractors import ClassifierFeatures, Custom, ExtractorOptions, Pixels, build_extractor
from vgen.evaluation.features import FeatureStore, extract, space_of
from vgen.evaluation.images import Batch
from vgen.types import CheckpointError, SettingError

OPTIONS = ExtractorOptions()


def noise(number: int = 5, side: int = 8, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, 3, side, side), generator=rng, dtype=torch.uint8)


def grey(images: Tensor) -> Tensor:
    return images[:, :1].expand(-1, 3, -1, -1)


class Pictures:
    """Images in memory."""

    name, labels, cheap = "pictures", None, True

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.facts: dict[str, Any] = {}
        self.warnings: list[str] = []

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, start: int, stop: int) -> Batch:
        return Batch(self.pixels[start:stop])

    def identity(self, start: int, stop: int) -> str | None:
        return None

    def describe(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize("name", ["Inception", "", "fashion-var", "some/folder", "."])
def test_an_unknown_extractor_names_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=rf"unknown extractor '{name}': use inception, fashion-classifier, pixels"):
        build_extractor(name, OPTIONS)


def test_inception_is_built_as_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def build(weights: Path, **options: Any) -> SimpleNamespace:
        asked.append((weights, options))
        return SimpleNamespace()

    monkeypatch.setattr(extractors, "find_weights", lambda path: path)
    monkeypatch.setattr(extractors, "Inception", build)
    build_extractor("inception", ExtractorOptions(tmp_path, "clean", "cpu", torch.bfloat16))
    assert asked == [(tmp_path, {"resize": "clean", "device": "cpu", "dtype": torch.bfloat16})]


# ---- classifiers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random classifier of 8x8 grey images, three classes."""
    folder = tmp_path_factory.mktemp("models") / "tiny-classifier"
    model = ImageClassifier(["ant", "bee", "cat"], image_size=8, widths=(4, 8), norm_groups=2)
    randomize(model, 3)
    model.save_pretrained(folder)
    return folder


def test_a_trained_classifier_gives_features_and_logits(classifier: Path) -> None:
    extractor, images = build_extractor(str(classifier), OPTIONS), noise()
    assert isinstance(extractor, ClassifierFeatures)
    assert extractor.name == "tiny-classifier" and extractor.layers == ("features", "logits")
    assert extractor.class_names == ["ant", "bee", "cat"] and extractor.protocol == {"dtype": "float32"}
    model = ImageClassifier.from_pretrained(classifier)
    found = extractor(images, ("features", "logits"))
    with torch.no_grad():
        assert torch.allclose(found["features"], model.features(to_model_range(images)), atol=1e-6)
        assert torch.allclose(found["logits"], model(to_model_range(images)), atol=1e-6)
    assert found["features"].shape == (5, 8) and found["logits"].shape == (5, 3)
    assert not found["features"].requires_grad and found["features"].dtype == torch.float32
    assert "logits" not in extractor(images, ("features",))


def test_its_weights_decide_its_digest_and_its_name_does_not(classifier: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(classifier, tmp_path / "copy")
    first, second = (build_extractor(str(folder), OPTIONS) for folder in (classifier, copy))
    assert first.digest == second.digest and second.name == "copy"
    state = load_file(copy / WEIGHTS)
    state["head.bias"] += 1
    save_file(state, copy / WEIGHTS)
    assert build_extractor(str(copy), OPTIONS).digest != first.digest


def test_its_configuration_decides_its_digest_too(classifier: Path, tmp_path: Path) -> None:
    """Two extractors share cached features only where they compute the same."""
    copy = shutil.copytree(classifier, tmp_path / classifier.name)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"norm_groups": 2', '"norm_groups": 4'))
    first, second = (build_extractor(str(folder), OPTIONS) for folder in (classifier, copy))
    assert not torch.equal(first(noise(), ("features",))["features"], second(noise(), ("features",))["features"])
    assert space_of(first, "features") != space_of(second, "features")


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_pipeline().tokenizer.save_pretrained(tmp_path / "vq")
    with pytest.raises(CheckpointError, match="vq"):
        build_extractor(str(tmp_path / "vq"), OPTIONS)


def test_a_tilde_is_the_home_folder(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(classifier, tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_extractor("~/mine", OPTIONS).name == "mine"


def test_the_bundled_classifier_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extractor = build_extractor("fashion-classifier", OPTIONS)
    assert isinstance(extractor, ClassifierFeatures)
    assert extractor.name == "fashion-classifier" and extractor.class_names == FASHION
    found = extractor(noise(2, side=28), ("features", "logits"))
    assert found["features"].shape == (2, 128) and found["logits"].shape == (2, 10)


# ---- pixels


def test_pixels_are_the_images_in_unit_range(tmp_path: Path) -> None:
    extractor, images = build_extractor("pixels", OPTIONS), noise()
    assert isinstance(extractor, Pixels) and extractor.layers == ("features",)
    found = extractor(images, ("features",))["features"]
    assert found.dtype == torch.float32 and torch.equal(found, images.flatten(1).float() / 255)


def test_pixels_of_large_images_are_refused() -> None:
    assert Pixels()(noise(1, 36), ("features",))["features"].shape == (1, 3 * 36**2)
    says = r"images of 37x37 have 4107 values, over the limit of 4096 .*'pixels': use another one"
    with pytest.raises(SettingError, match=says):
        Pixels()(noise(1, 37), ("features",))


@pytest.mark.parametrize("preferred", [1024, 2])
def test_pixels_of_grey_and_coloured_images_have_one_width(tmp_path: Path, preferred: int) -> None:
    """A chunk of grey images may stand beside one of coloured ones."""
    extractor, images = Pixels(), torch.cat([grey(noise(4)), noise(4, seed=1)])
    extractor.preferred_batch = preferred
    chunk = 4 if preferred == 1024 else 8  # in chunks of the cache, and in batches of the extractor
    found = extract(Pictures(images), {"pixels": (extractor, ("features",))}, FeatureStore(tmp_path), chunk)
    assert found.all(extractor, "features").shape == (8, 3 * 64)


# ---- networks of one's own

NETWORKS = """
import torch


class Network(torch.nn.Module):
    def __init__(self, weight=2.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((3,), weight))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        assert images.dtype == torch.uint8
        return self.dropout(images.float().mean((2, 3)) * self.scale)


def heavier():
    return Network(3.0)


def half():
    return Network().bfloat16()


def function():
    return lambda images: images.sum((2, 3))


def other():
    return lambda images: images.sum((2, 3))


def misshapen():
    return lambda images: images.float()


def one_short():
    return lambda images: images[1:].flatten(1)


def a_list():
    return lambda images: [[0.0]] * len(images)


def forgets_the_factory(images):
    return images.flatten(1)


def nothing():
    return None


number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of networks that is on no path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != ""])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("my_", "pack")):
            del sys.modules[name]


def test_a_module_with_weights_is_found_beside_the_user(here: Path) -> None:
    extractor, images = build_extractor("my_networks:Network", OPTIONS), noise()
    assert isinstance(extractor, Custom) and extractor.name == "my_networks:Network"
    assert extractor.layers == ("features",)
    found = extractor(images, ("features",))["features"]
    assert torch.equal(found, images.float().mean((2, 3)) * 2)  # no dropout: it is evaluated, not trained
    assert found.dtype == torch.float32 and not found.requires_grad


def test_a_plain_function_is_enough(here: Path) -> None:
    found = build_extractor("my_networks:function", OPTIONS)(noise(), ("features",))["features"]
    assert found.dtype == torch.float32 and torch.equal(found, noise().sum((2, 3)).float())


def test_networks_lie_in_packages_too(here: Path) -> None:
    (here / "package_of_mine").mkdir()
    (here / "package_of_mine" / "inner.py").write_text(NETWORKS)
    assert build_extractor("package_of_mine.inner:Network", OPTIONS)(noise(), ())["features"].shape == (5, 3)


def test_weights_code_and_name_decide_the_digest(here: Path) -> None:
    """Or features of an older network would be taken from the cache."""
    first = build_extractor("my_networks:Network", OPTIONS).digest
    assert build_extractor("my_networks:Network", OPTIONS).digest == first
    names = ("Network", "heavier", "function", "other")
    digests = {build_extractor(f"my_networks:{name}", OPTIONS).digest for name in names}
    assert len(digests) == 4
    del sys.modules["my_networks"]
    (here / "my_networks.py").write_text(NETWORKS.replace("full((3,), weight)", "full((3,), weight + 1)"))
    digests.add(build_extractor("my_networks:Network", OPTIONS).digest)
    del sys.modules["my_networks"]
    (here / "my_networks.py").write_text(NETWORKS.replace(".mean(", ".sum("))
    digests.add(build_extractor("my_networks:Network", OPTIONS).digest)
    assert len(digests) == 6


def test_changed_weights_alone_change_the_digest(here: Path) -> None:
    """A checkpoint that the factory reads is no part of its source."""
    source = NETWORKS.replace("torch.full((3,), weight)", 'torch.load("w.pt")')
    (here / "my_networks.py").write_text(source)
    digests = set()
    for value in (1.0, 2.0):
        torch.save(torch.full((3,), value), here / "w.pt")
        digests.add(build_extractor("my_networks:Network", OPTIONS).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("no.such.module:f", "No module named 'no'"),
        ("my_networks:missing", "no attribute 'missing'"),
        ("my_networks:", "no attribute ''"),
        ("my_networks:number", "not callable"),
        ("my_networks:forgets_the_factory", "missing 1 required positional argument"),
        ("./my_networks:Network", "relative import"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(here: Path, name: str, says: str) -> None:
    with pytest.raises(SettingError, match=r"cannot be built \(.*\): write package\.module:factory") as caught:
        build_extractor(name, OPTIONS)
    assert name in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"), [("misshapen", r"\[5, 3, 8, 8\]"), ("one_short", r"\[4, 192\]"), ("a_list", "list")]
)
def test_features_of_another_shape_are_refused(here: Path, name: str, shape: str) -> None:
    extractor = build_extractor(f"my_networks:{name}", OPTIONS)
    says = rf"extractor my_networks:{name} gave {shape} for 5 images: expected \(B, D\)"
    with pytest.raises(SettingError, match=says):
        extractor(noise(), ("features",))


def test_weights_in_bfloat16_have_a_digest(here: Path) -> None:
    assert build_extractor("my_networks:half", OPTIONS)(noise(), ())["features"].dtype == torch.float32


def test_a_factory_of_nothing_is_refused(here: Path) -> None:
    with pytest.raises(SettingError, match=r"'my_networks:nothing' returned NoneType: it must give a callable"):
        build_extractor("my_networks:nothing", OPTIONS)


@pytest.mark.parametrize("name", [":factory", "builtins:dict"])
def test_a_path_without_a_module_of_its_own_is_refused(here: Path, name: str) -> None:
    with pytest.raises(SettingError, match="cannot be built"):
        build_extractor(name, OPTIONS)
