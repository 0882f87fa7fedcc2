"""Many samples to files: the plan, the names, and images that depend on their own seed and class alone."""

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from vgen import batch
from vgen.batch import Item, from_request, plan
from vgen.ledger import MANIFEST, RUN_FILE
from vgen.media import read_request
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.types import Request, SettingError


@pytest.fixture(scope="module")
def pipeline() -> NextScalePipeline:
    return tiny_pipeline()


def sample_to_files(*given: Any, **named: Any) -> list[Path]:
    return batch.sample_to_files(*given, **named).paths


def pixels(paths: Sequence[Path]) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in paths]


# ---- the plan


def test_seed_and_class_follow_from_the_index() -> None:
    items = plan([7, 3, 7], per_class=2, seed=100)
    assert [item.index for item in items] == list(range(6))
    assert [item.seed for item in items] == [100, 101, 102, 103, 104, 105]
    assert [item.class_label for item in items] == [7, 7, 3, 3, 7, 7]
    assert plan([7, 3, 7], per_class=2, seed=100)[2:4] == items[2:4]
    assert [item.class_label for item in plan(None, 3, 0)] == [None] * 3


def test_names_sort_and_show_class_and_seed() -> None:
    assert Item(12, 7, 99).name == "000012_c0007_s99.png"
    assert Item(0, None, 5).name == "000000_cnone_s5.png"
    names = [item.name for item in plan(range(12), per_class=10, seed=0)]
    assert names == sorted(names) and len(set(names)) == 120


@pytest.mark.parametrize("per_class", [0, -1])
def test_no_images_per_class_is_refused(per_class: int) -> None:
    with pytest.raises(SettingError, match=f"per-class is {per_class}"):
        plan([0], per_class, 0)


def test_a_request_of_several_images_is_planned_again() -> None:
    request = Request(model="m", class_labels=[2, 0], seeds=[50, 9])
    assert from_request(request) == [Item(0, 2, 50), Item(1, 0, 9)]
    assert from_request(request, seed=7) == [Item(0, 2, 7), Item(1, 0, 8)]
    assert from_request(Request(model="m", seeds=[4])) == [Item(0, None, 4)]


# ---- files


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0, "top_k": 4}, {"more_smooth": True}])
def test_images_do_not_depend_on_the_batch_size(
    pipeline: NextScalePipeline, tmp_path: Path, settings: dict[str, Any]
) -> None:
    items = plan([2, 0, 1], per_class=3, seed=5)
    runs = [
        sample_to_files(pipeline, items, tmp_path / str(size), settings=settings, batch_size=size)
        for size in (1, 4, 9, 64)
    ]
    for run in runs:
        assert [path.name for path in run] == [item.name for item in items]
    alone = pixels(runs[0])
    assert len({picture.tobytes() for picture in alone}) == 9
    for run in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(alone, pixels(run), strict=True))
    assert runs[0][4].read_bytes() == runs[3][4].read_bytes()  # the metadata too: no trace of the batch


def test_a_file_equals_the_pipelines_own_image(pipeline: NextScalePipeline, tmp_path: Path) -> None:
    paths = sample_to_files(pipeline, plan([1, 2], 2, 10), tmp_path, settings={"temperature": 0.8})
    direct = pipeline(class_labels=[1, 1, 2, 2], seeds=[10, 11, 12, 13], temperature=0.8).images
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(pixels(paths), direct, strict=True))


def test_each_file_carries_its_own_request(pipeline: NextScalePipeline, tmp_path: Path) -> None:
    paths = sample_to_files(pipeline, plan([1, 2], 2, 10), tmp_path, settings={"top_k": 3}, batch_size=3)
    for i, path in enumerate(paths):
        request = read_request(path)
        assert (request.class_labels, request.seeds) == ([1 + i // 2], [10 + i])
        assert request.settings["top_k"] == 3 and request.settings["guidance_scale"] == 2.0  # defaults spelt out
        assert request.sampler == "next-scale" and request.checkpoint == pipeline.checkpoint()


def test_unconditional_images_have_no_class(pipeline: NextScalePipeline, tmp_path: Path) -> None:
    (path,) = sample_to_files(pipeline, plan(None, 1, 3), tmp_path, settings={})
    assert path.name == "000000_cnone_s3.png"
    assert read_request(path).class_labels is None
    assert np.array_equal(np.array(Image.open(path)), np.array(pipeline(seeds=[3]).images[0]))


def test_the_sheet_has_a_row_per_class(pipeline: NextScalePipeline, tmp_path: Path) -> None:
    paths = sample_to_files(pipeline, plan([0, 1], 3, 0), tmp_path, settings={}, sheet_columns=3)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    side = 8 * 10
    assert sheet.shape == (2 * (side + 2) + 2, 3 * (side + 2) + 2, 3)
    assert tmp_path / "sheet.png" not in paths
    tile = sheet[2 + side + 2 : 2 + side + 2 + side : 10, 2 + side + 2 : 2 + side + 2 + side : 10]
    assert np.array_equal(tile, pixels(paths)[4])


class Camera:
    """A pipeline that is quick and counts."""

    config: dict = {}  # noqa: RUF012
    makes_videos = False

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, class_labels: Any, seeds: list[int], **settings: Any) -> SimpleNamespace:
        self.batches.append(len(seeds))
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for seed in seeds], evaluations=3)

    def request(self, labels: Any, seeds: list[int], sampler: Any, settings: dict) -> Request:
        return Request(model="camera", class_labels=labels, seeds=seeds)


def test_batches_are_full_but_for_the_last(tmp_path: Path) -> None:
    camera = Camera()
    sample_to_files(camera, plan([0], 10, 0), tmp_path, settings={}, batch_size=4)
    assert camera.batches == [4, 4, 2]


@pytest.mark.parametrize("size", [0, -3])
def test_an_impossible_batch_size_is_refused_before_anything_is_made(tmp_path: Path, size: int) -> None:
    with pytest.raises(SettingError, match=f"batch-size is {size}"):
        sample_to_files(Camera(), plan([0], 1, 0), tmp_path / "out", settings={}, batch_size=size)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Image.Image.save, []

    def save(self: Image.Image, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"\x89PNG")
            raise OSError(28, "No space left on device")
        real(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space"):
        sample_to_files(Camera(), plan([0], 9, 0), tmp_path, settings={}, batch_size=2)
    names = [item.name for item in plan([0], 3, 0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, MANIFEST, RUN_FILE]
    assert all(read_request(tmp_path / name).seeds == [i] for i, name in enumerate(names))


def test_a_sheet_of_many_pictures_needs_few_open_files(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        sample_to_files(Camera(), plan([0], 150, 0), tmp_path, settings={}, batch_size=50, sheet_columns=15)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (tmp_path / "sheet.png").is_file()


def test_progress_goes_to_stderr_as_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vgen.progress.SPACING", 0)
    sample_to_files(Camera(), plan([0], 10, 0), tmp_path, settings={}, batch_size=5)
    shown = capsys.readouterr()
    assert shown.out == "" and "\r" not in shown.err
    assert shown.err.splitlines()[-1].startswith("sample: 10/10 images, ")
    assert "images/s" in shown.err.splitlines()[0] and "left" in shown.err.splitlines()[0]


def test_the_request_in_a_file_is_plain_json(tmp_path: Path) -> None:
    (path,) = sample_to_files(Camera(), plan([0], 1, 0), tmp_path, settings={})
    with Image.open(path) as image:
        assert json.loads(image.text["vgen"])["model"] == "camera"
