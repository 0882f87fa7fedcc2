"""What the evaluator's tests share: pictures in an .npz, a tiny classifier, an Inception's stand-in, a shut network."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from vgen import cli
from vgen.data import to_model_range
from vgen.evaluation import extractors as networks
from vgen.evaluation.classifier import ImageClassifier
from vgen.evaluation.evaluate import Evaluator, Reference, build_extractors, open_reference
from vgen.evaluation.extractors import Extractor, ExtractorOptions
from vgen.evaluation.images import ImageSet, open_images
from vgen.evaluation.inception import NAME
from vgen.evaluation.judges import Options, parse_metrics
from vgen.evaluation.report import Report
from vgen.progress import Progress

NAMES = ["ant", "bee", "cat"]


def isolate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of our own, no user's weights or data sets, no network, and no progress that a slow machine would show."""

    def download(url: str, *arguments: Any, **options: Any) -> None:
        raise AssertionError(f"a test tried to download {url}")

    for name, place in {"VGEN_CACHE": "cache", "TORCH_HOME": "torch", "VGEN_DATA": "no-data"}.items():
        monkeypatch.setenv(name, str(folder / place))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(Progress, "advance", lambda self, count=1, note="": None)


# ---- pictures


def pictures(number: int, seed: int = 0, side: int = 8, channels: int = 3) -> np.ndarray:
    """(N, side, side, channels) uint8, every one of its own brightness, so that sets differ in mean and covariance."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 100, (number, side, side, channels))
    return (noise + rng.integers(0, 156, (number, 1, 1, channels))).astype(np.uint8)


def write_npz(path: Path, pixels: np.ndarray, labels: Sequence[int] | None = None, **others: Any) -> str:
    """An .npz of ADM's form; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {} if labels is None else {"arr_1": np.array(labels)}
    np.savez(path, arr_0=pixels, **extra, **others)
    return str(path)


def write_pngs(folder: Path, pixels: np.ndarray, suffix: str = "png") -> str:
    """The same pictures as files; returns the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:04}.{suffix}")
    return str(folder)


def tensor(pixels: np.ndarray) -> Tensor:
    """(N, 3, H, W) uint8 of `pictures`."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


# ---- networks


class TinyInception:
    """In place of Inception: random projections of an image's mean colours and corners, under its name."""

    def __init__(
        self, name: str = NAME, classifies: bool = True, resize: str = "legacy", dtype: str = "float32"
    ) -> None:
        self.name, self.preferred_batch, self.calls = name, 64, 0
        self.layers = ("features", "spatial", "logits")[: 3 if classifies else 2]
        self.digest = hashlib.sha256(f"{name} {classifies}".encode()).hexdigest()
        self.protocol = {"resize": resize, "dtype": dtype}

    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        self.calls += 1
        x = images.double() / 255  # in float64, so that a figure does not depend on the batch
        x = torch.cat([x.mean((2, 3)), x[:, :, 0, 0], x[:, :, -1, -1]], 1)
        widths = {"features": 5, "spatial": 3, "logits": 4}
        rng = torch.Generator().manual_seed(7)
        weights = {layer: torch.randn(9, width, generator=rng, dtype=x.dtype) for layer, width in widths.items()}
        return {layer: torch.tanh(x @ weights[layer]).mul(3).float() for layer in layers}


def plant_inception(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> TinyInception:
    """Let "inception" be a stand-in wherever the evaluator builds it."""
    network = TinyInception(**changes)

    def build(name: str, options: ExtractorOptions) -> Extractor:
        return network if name == "inception" else networks.build_extractor(name, options)

    monkeypatch.setattr("vgen.evaluation.evaluate.build_extractor", build)
    return network


def write_classifier(folder: Path, names: Sequence[str] = NAMES, side: int = 8, seed: int = 5) -> Path:
    """A random classifier of grey pictures, in its folder."""
    classifier = ImageClassifier(list(names), side, 1, (4, 6), 2)
    tiny.randomize(classifier, seed)
    with torch.no_grad():  # so that it finds every class among random pictures
        classifier.head.weight *= 10
        classifier.head.bias -= classifier(to_model_range(tensor(pictures(64, 99, side)))).mean(0)
    classifier.save_pretrained(folder)
    return folder


# ---- evaluations


def evaluator_of(
    metrics: str,
    reference: str | Reference | None = None,
    train: str | None = None,
    reconstructed: bool = False,
    **options: Any,
) -> Evaluator:
    """An Evaluator from what the command line takes; its cache lies where VGEN_CACHE says."""
    asked = parse_metrics(metrics, reconstructed)
    settings = Options(**options)
    opened = open_reference(reference) if isinstance(reference, str) else reference
    networks_by_name = build_extractors(asked, settings.extractors)
    return Evaluator(asked, networks_by_name, opened, open_images(train) if train else None, settings)


def judge(images: str | ImageSet, metrics: str, reference: str | Reference | None = None, **options: Any) -> Report:
    """The report of one set of images."""
    opened = open_images(images) if isinstance(images, str) else images
    report = evaluator_of(metrics, reference, **options).run(opened)
    assert report is not None
    return report


# ---- the command


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def figures(self) -> dict[str, float]:
        """What the lines on stdout say; each must be name, value and protocol."""
        lines = [line.split("\t") for line in self.out.splitlines()]
        assert {len(line) for line in lines} <= {3}, self.out
        return {name: float(value) for name, value, _ in lines}

    @property
    def warnings(self) -> list[str]:
        lines = self.err.splitlines()
        assert all(line.startswith("vgen: ") for line in lines), self.err
        return [line.removeprefix("vgen: ") for line in lines]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run `vgen evaluate` in this process."""
    capsys.readouterr()
    code = cli.main(["evaluate", *map(str, arguments)])
    return Result(code, *capsys.readouterr())


def refused(result: Result, code: int, *says: str) -> None:
    """One line on stderr that says all of this in words of ours, nothing on stdout."""
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vgen: "), result.err
    assert "--debug" not in lines[0] and "Traceback" not in lines[0], lines[0]
    for pattern in says:
        assert re.search(pattern, lines[0]), f"{pattern!r} is not in {lines[0]!r}"
    assert result.code == code, lines[0]
