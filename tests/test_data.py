"""Images to train on: torchvision's files without a download, folders of class folders, crops by seed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import pattern, write_folder, write_mnist

from vgen.data import FASHION, FolderSource, data_root, open_source, spread, to_model_range, to_uint8, to_unit_range
from vgen.types import SettingError

# ---- torchvision's data sets


@pytest.mark.parametrize(("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("mnist", "MNIST")])
@pytest.mark.parametrize(("split", "number"), [("train", 30), ("test", 20)])
def test_mnist_files_are_read_as_they_lie(tmp_path: Path, name: str, folder: str, split: str, number: int) -> None:
    write_mnist(tmp_path, folder, train=30, test=20)
    source = open_source(name, split, 28, 1, tmp_path)
    assert source.labels.tolist() == [i % 10 for i in range(number)]
    assert source.class_names == (FASHION if name == "fashion-mnist" else [str(i) for i in range(10)])
    images = source.images([13, 2])
    assert images.shape == (2, 1, 28, 28) and images.dtype == torch.uint8
    assert np.array_equal(images[0, 0].numpy(), pattern(3, 1, 28))
    assert np.array_equal(images[1, 0].numpy(), pattern(2, 0, 28))


def test_mnist_takes_the_size_and_channels_of_the_model(tmp_path: Path) -> None:
    images = open_source("fashion-mnist", "train", 8, 3, write_mnist(tmp_path)).images(range(4))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 2])
    assert int(images.max()) > 200 and int(images.min()) < 40  # still the same pictures


def test_data_that_is_neither_there_nor_on_the_network_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    with pytest.raises(SettingError, match=r"not in .*nowhere.*--data-root"):
        open_source("mnist", "train", 28, 1, tmp_path / "nowhere")


def test_the_data_root_is_the_argument_then_the_environment_then_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGEN_DATA", "/from/environment")
    assert data_root("/given") == Path("/given")
    assert data_root() == Path("/from/environment")
    monkeypatch.delenv("VGEN_DATA")
    assert data_root() == Path.home() / ".cache" / "vgen" / "data"
    assert data_root("~/here") == Path.home() / "here"


# ---- folders


def test_a_folder_of_class_folders_is_labelled_by_sorted_names(tmp_path: Path) -> None:
    write_folder(tmp_path, ["cat", "ant", "bee"], each=3)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "deeper").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cat" / "deeper" / "X.JPG")
    source = open_source(str(tmp_path), "train", 8, 1)
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 4


def test_pictures_of_any_shape_become_centred_squares(tmp_path: Path) -> None:
    """The shorter side is resized, the longer one cropped at both ends alike."""
    (tmp_path / "a").mkdir()
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = [250, 130, 10]  # the middle third is what stays
    Image.fromarray(wide).save(tmp_path / "a" / "0_wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "a" / "1_tall.png")
    Image.new("RGB", (1, 1), (250, 130, 10)).save(tmp_path / "a" / "2_tiny.png")
    Image.new("P", (300, 40), 0).save(tmp_path / "a" / "3_palette.gif")
    images = open_source(str(tmp_path), "train", 8, 3).images(range(4))
    assert images.shape == (4, 3, 8, 8)
    for image in images[:3]:
        assert torch.equal(image, torch.tensor([250, 130, 10], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))


def test_a_crop_depends_on_its_seed_and_its_image_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (4, 40, 40), dtype=np.uint8)
    for i, picture in enumerate(noise):
        Image.fromarray(picture).save(tmp_path / "a" / f"{i}.png")
    source = open_source(str(tmp_path), "train", 32, 1)
    crops = source.images(range(4), crop_seed=5)
    assert torch.equal(source.images([2], crop_seed=5)[0], crops[2])  # whatever else is in the batch
    assert torch.equal(source.images([3, 2], crop_seed=5)[1], crops[2])
    assert not torch.equal(source.images([2], crop_seed=6)[0], crops[2])
    places = {tuple(source.images([2], crop_seed=seed).flatten().tolist()) for seed in range(20)}
    assert len(places) > 10


def test_train_and_test_folders_are_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", each=3)
    write_folder(tmp_path / "test", each=1)
    assert len(open_source(str(tmp_path), "train", 8, 1).labels) == 9
    assert len(open_source(str(tmp_path), "test", 8, 1).labels) == 3


def test_an_undivided_folder_holds_every_20th_image_out(tmp_path: Path) -> None:
    write_folder(tmp_path, each=15)
    train, test = (open_source(str(tmp_path), split, 8, 1) for split in ("train", "test"))
    assert isinstance(train, FolderSource) and isinstance(test, FolderSource)
    assert len(test.paths) == 2 and not set(train.paths) & set(test.paths)
    assert sorted([*train.paths, *test.paths]) == sorted(tmp_path.rglob("*.png"))
    assert train.class_names == test.class_names
    for source in (train, test):
        assert [path.parent.name for path in source.paths] == [source.class_names[i] for i in source.labels]


def test_a_handful_of_images_serves_both_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, each=2)
    assert [len(open_source(str(tmp_path), split, 8, 1).labels) for split in ("train", "test")] == [6, 6]


def test_a_train_folder_without_test_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", each=2)
    with pytest.raises(SettingError, match=r"holds train/ but no test/"):
        open_source(str(tmp_path), "test", 8, 1)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path, ["bus", "train"], each=2)
    assert open_source(str(tmp_path), "train", 8, 1).class_names == ["bus", "train"]


def test_both_splits_number_classes_alike(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ["ant", "bee", "cat"], each=1)
    write_folder(tmp_path / "test", ["ant", "cat"], each=1)
    train, test = (open_source(str(tmp_path), split, 8, 1) for split in ("train", "test"))
    named = [train.class_names[label] for label in test.labels]
    assert named == ["ant", "cat"]


@pytest.mark.parametrize("content", ["nothing", "a file beside", "empty classes", "only text"])
def test_a_folder_without_images_is_refused(tmp_path: Path, content: str) -> None:
    if content == "a file beside":
        Image.new("L", (8, 8)).save(tmp_path / "x.png")
    elif content != "nothing":
        (tmp_path / "ant").mkdir()
        if content == "only text":
            (tmp_path / "ant" / "x.txt").write_text("text")
    with pytest.raises(SettingError, match=r"no images in .*one folder per class"):
        open_source(str(tmp_path), "train", 8, 1)


def test_data_that_does_not_exist_names_the_choices() -> None:
    with pytest.raises(SettingError, match=r"'fashion-minst'.*fashion-mnist, mnist"):
        open_source("fashion-minst", "train", 8, 1)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    """Every byte overwritten in turn, and the file cut short: an image, or an error that says which file."""
    write_folder(tmp_path, ["ant"], each=1)
    path = tmp_path / "ant" / "0.png"
    source = open_source(str(tmp_path), "train", 8, 1)
    data, refused = path.read_bytes(), 0
    damaged = [data[:i] + bytes([255 - data[i]]) + data[i + 1 :] for i in range(len(data))]
    for content in [*damaged, data[: len(data) // 2], b""]:
        path.write_bytes(content)
        try:
            source.images([0])
        except SettingError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(data) // 2


# ---- ranges


def test_bytes_survive_the_model_range() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_model_range(every)
    assert floats.dtype == torch.float32 and float(floats.min()) == -1 and float(floats.max()) == 1
    assert torch.equal(to_uint8(to_unit_range(floats)), every)
    assert torch.equal(to_uint8(torch.tensor([-9.0, 0.5, 9.0])), torch.tensor([0, 128, 255], dtype=torch.uint8))


@pytest.mark.parametrize(("number", "count"), [(10, 4), (3, 5), (1, 1), (2000, 2000), (70_000, 2000)])
def test_spread_indices_reach_from_end_to_end(number: int, count: int) -> None:
    found = spread(number, count)
    assert len(found) == len(set(found)) == min(number, count)
    assert found[0] == 0 and (found[-1] == number - 1 or count == 1) and found == sorted(found)
