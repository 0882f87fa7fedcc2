"""Image sets: the pixels that were written, whatever holds them; what files tell of themselves; damage named first."""

import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from tiny import pattern, tiny_pipeline, write_folder, write_mnist

from vgen import __version__
from vgen.batch import plan, sample_to_files
from vgen.data import folder_files
from vgen.evaluation import images as module
from vgen.evaluation.images import ArrayImages, FileImages, ImageSet, SplitImages, chunks, open_images
from vgen.types import SettingError


def noise(number: int = 6, height: int = 9, width: int = 7, seed: int = 0) -> np.ndarray:
    """Pictures (N, H, W, 3) that are not square, so that no axis can be taken for another."""
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def encode(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pngs(number: int = 6, **options: Any) -> dict[str, bytes]:
    return {f"{i:03}.png": encode(picture) for i, picture in enumerate(noise(number, **options))}


def opened(folder: Path, files: dict[str, bytes], **options: Any) -> ImageSet:
    return open_images(str(write_files(folder, files)), **options)


def first(folder: Path, content: bytes, name: str = "x.png") -> np.ndarray:
    """The only image of a folder, (H, W, 3)."""
    return opened(folder, {name: content}).read(0, 1).pixels[0].permute(1, 2, 0).numpy()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG of what Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# ---- the same pixels from anywhere


def as_folder(root: Path, pictures: np.ndarray) -> Path:
    return write_files(root / "folder", {f"{i:03}.png": encode(picture) for i, picture in enumerate(pictures)})


def as_tar(root: Path, pictures: np.ndarray) -> Path:
    return write_tar(root / "set.tar", {f"{i:03}.png": encode(picture) for i, picture in enumerate(pictures)})


def as_shards(root: Path, pictures: np.ndarray) -> Path:
    (root / "shards").mkdir()
    half = len(pictures) // 2
    for name, begin, part in (("0.tar", 0, pictures[:half]), ("1.tar", half, pictures[half:])):
        members = {f"{begin + i:03}.png": encode(picture) for i, picture in enumerate(part)}
        write_tar(root / "shards" / name, members)
    return root / "shards"


def as_npz(root: Path, pictures: np.ndarray) -> Path:
    np.savez(root / "set.npz", pictures)  # ADM's name for it is numpy's own: arr_0
    return root / "set.npz"


def as_compressed(root: Path, pictures: np.ndarray) -> Path:
    np.savez_compressed(root / "packed.npz", pictures)
    return root / "packed.npz"


@pytest.mark.parametrize("write", [as_folder, as_tar, as_shards, as_npz, as_compressed])
def test_every_source_gives_the_pixels_that_were_written(
    tmp_path: Path, write: Callable[[Path, np.ndarray], Path]
) -> None:
    pictures = noise(7)
    wanted = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    images = open_images(str(write(tmp_path, pictures)))
    assert len(images) == 7 and images.facts["size"] == "7x9" and images.warnings == [] and images.labels is None
    everything = images.read(0, 7)
    assert everything.pixels.dtype == torch.uint8 and torch.equal(everything.pixels, wanted)
    assert everything.columns == {}
    for start, stop in ((2, 5), (6, 7), (0, 1), (3, 7)):  # backwards too
        assert torch.equal(images.read(start, stop).pixels, wanted[start:stop])
    assert images.identity(0, 7) is None and images.cheap and "grey" not in images.facts


@pytest.mark.parametrize("kind", ["folder", "tar", "npz"])
def test_images_are_named_in_messages(tmp_path: Path, kind: str) -> None:
    write = {"folder": as_folder, "tar": as_tar, "npz": as_npz}[kind]
    images = open_images(str(write(tmp_path, noise())))
    assert images.describe(4) == ("004.png" if kind != "npz" else f"image 4 of {tmp_path / 'set.npz'}")


def test_files_are_taken_in_the_order_of_their_names(tmp_path: Path) -> None:
    pictures = noise(4)
    names = ["b/1.png", "a.png", "b/0.png", "c.PNG"]
    images = opened(tmp_path, {name: encode(picture) for name, picture in zip(names, pictures, strict=True)})
    assert [images.describe(i) for i in range(4)] == ["a.png", "b/0.png", "b/1.png", "c.PNG"]
    assert np.array_equal(images.read(0, 4).pixels.permute(0, 2, 3, 1), pictures[[1, 2, 0, 3]])


def test_hidden_files_and_the_contact_sheet_are_no_images(tmp_path: Path) -> None:
    files = pngs(2) | {".hidden.png": b"x", ".cache/0.png": b"x", "notes.txt": b"x", "sheet.png": encode(noise(1)[0])}
    files |= {"a/.0.png": b"x", "b/sheet.png": encode(noise(1)[0])}  # of a class that is called so, perhaps
    (tmp_path / "folder.png").mkdir()
    images = opened(tmp_path, files)
    assert [images.describe(i) for i in range(len(images))] == ["000.png", "001.png", "b/sheet.png"]


# ---- colours


def test_grey_files_become_three_equal_channels(tmp_path: Path) -> None:
    picture = pattern(1, 0, 12)
    assert np.array_equal(first(tmp_path, encode(picture)), np.stack([picture] * 3, axis=-1))
    assert open_images(str(tmp_path)).facts == {"files": "png", "size": "12x12", "grey": "as RGB"}


def test_one_coloured_image_makes_a_set_coloured(tmp_path: Path) -> None:
    images = opened(tmp_path, {"0.png": encode(pattern(0, 0, 8)), "1.png": encode(noise(1, 8, 8)[0])})
    assert "grey" not in images.facts


def test_black_and_white_files_are_0_and_255(tmp_path: Path) -> None:
    bits = noise(1)[0, :, :, 0] > 127
    assert np.array_equal(first(tmp_path, encode(Image.fromarray(bits)))[..., 1], bits * 255)
    assert open_images(str(tmp_path)).facts["grey"] == "as RGB"


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (3, 2))
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.putpixel((2, 1), 1)
    found = first(tmp_path, encode(image))
    assert found[0, 0].tolist() == [9, 8, 7] and found[1, 2].tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_and_said(tmp_path: Path, mode: str) -> None:
    """Blending with some background would be a choice that nobody made."""
    picture = noise(1)[0]
    channels = picture if mode == "RGBA" else picture[..., :1]
    alpha = np.full((9, 7, 1), 3, dtype=np.uint8)
    image = Image.fromarray(np.concatenate([channels, alpha], axis=-1))
    assert image.mode == mode
    assert np.array_equal(first(tmp_path, encode(image)), np.broadcast_to(channels, picture.shape))
    (warning,) = open_images(str(tmp_path)).warnings
    assert "transparency, which is dropped" in warning and str(tmp_path) in warning


@pytest.mark.parametrize("picture", [np.full((4, 4), 40_000, np.uint16), np.full((4, 4), 0.5, np.float32)])
def test_more_than_8_bits_are_refused(tmp_path: Path, picture: np.ndarray) -> None:
    """Pillow would clip them all to white."""
    kind = "PNG" if picture.dtype == np.uint16 else "TIFF"
    name = f"deep.{kind.lower()}"
    with pytest.raises(SettingError, match=rf"1 of 1 files .* first {name} \(more than 8 bits a channel"):
        opened(tmp_path, {name: encode(picture, kind)})


def test_16_bit_colours_are_refused(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", *[1000] * 6)
    with pytest.raises(SettingError, match="more than 8 bits"):
        opened(tmp_path, {"deep.png": raw_png(2, 2, 16, 2, row * 2)})


# ---- classes


def labels_of(folder: Path, names: Sequence[str]) -> list[int] | None:
    content = encode(noise(1)[0])
    return opened(folder, dict.fromkeys(names, content)).labels


def test_classes_are_read_from_the_names_that_vgen_gives(tmp_path: Path) -> None:
    assert labels_of(tmp_path, ["000000_c0007_s5.png", "000001_c0007_s6.png", "000002_c0012_s7.png"]) == [7, 7, 12]


def test_names_of_ours_go_before_folders(tmp_path: Path) -> None:
    assert labels_of(tmp_path, ["a/000000_c0007_s5.png", "b/000001_c0003_s6.png"]) == [7, 3]


@pytest.mark.parametrize(
    "names",
    [
        ["000000_cnone_s5.png", "000001_cnone_s6.png"],
        ["000000_c0007_s5.png", "000001.png"],  # one is unknown
        ["000000_c0007_s5_copy.png", "000001_c0007_s5x.png"],
        ["only/0.png", "only/1.png"],
        ["top.png", "a/0.png", "b/0.png"],
    ],
)
def test_classes_that_are_not_known_for_every_image_are_not_known(tmp_path: Path, names: list[str]) -> None:
    assert labels_of(tmp_path, names) is None


def test_folders_of_names_are_numbered_in_order(tmp_path: Path) -> None:
    assert labels_of(tmp_path, ["cat/0.png", "ant/1.png", "ant/0.png", "bee/deep/0.png", "12/0.png"]) == [0, 1, 1, 2, 3]


def test_folders_of_numbers_are_the_ids_themselves(tmp_path: Path) -> None:
    assert labels_of(tmp_path, ["10/0.png", "9/0.png", "9/1.png", "207/0.png"]) == [10, 207, 9, 9]


def test_classes_have_names_where_folders_give_them(tmp_path: Path) -> None:
    """Numbers of folders mean something to no classifier, unless their names tell."""
    content = encode(noise(1)[0])
    named = opened(tmp_path / "a", {"cat/0.png": content, "ant/0.png": content, "12/0.png": content})
    assert named.label_names == ["12", "ant", "cat"] and named.labels == [0, 1, 2]
    for i, names in enumerate((["1/0.png", "2/0.png"], ["0.png", "1.png"], ["a/0_c0001_s0.png", "b/1_c0002_s1.png"])):
        assert opened(tmp_path / f"none{i}", dict.fromkeys(names, content)).label_names is None
    np.savez(tmp_path / "a.npz", noise(2), np.array([0, 1]))
    assert open_images(str(tmp_path / "a.npz")).label_names is None
    assert open_images("mnist:test", data_root=write_mnist(tmp_path, "MNIST")).label_names == list("0123456789")


def test_class_files_of_a_tar_are_read(tmp_path: Path) -> None:
    """A sample of a WebDataset is the files of one stem, in whatever order."""
    picture = encode(noise(1)[0])
    files = {"d/0.png": picture, "d/0.cls": b"7", "d/1.cls": b" 3\n", "d/1.png": picture, "0.png": picture}
    files |= {"0.json": json.dumps({"cls": 5, "caption": "a cat"}).encode()}
    images = open_images(str(write_tar(tmp_path / "a.tar", files)))
    assert images.labels == [7, 3, 5] and [images.describe(i) for i in range(3)] == ["d/0.png", "d/1.png", "0.png"]


def test_a_label_goes_before_a_cls_in_json(tmp_path: Path) -> None:
    files = {"0.png": encode(noise(1)[0]), "0.json": b'{"label": 4, "cls": 5}'}
    assert open_images(str(write_tar(tmp_path / "a.tar", files))).labels == [4]


def test_json_with_a_label_alone_tells_the_class(tmp_path: Path) -> None:
    files = {"0.png": encode(noise(1)[0]), "0.json": b'{"label": 4}'}
    assert open_images(str(write_tar(tmp_path / "a.tar", files))).labels == [4]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0.cls", b"cat"),
        ("0.cls", b""),
        ("0.cls", b"[1]"),
        ("0.cls", b"\xff\xfe"),
        ("0.json", b'{"caption": "a cat"}'),
        ("0.json", b'{"label": null, "cls": null}'),
        ("0.json", b"[" * 100_000),
        ("0.json", b"[4]"),
        ("0.cls", b"1e999"),
    ],
)
def test_odd_class_files_tell_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    images = open_images(str(write_tar(tmp_path / "a.tar", {"0.png": encode(noise(1)[0]), name: content})))
    assert len(images) == 1 and images.labels is None


def test_a_tar_of_ours_tells_classes_by_its_names(tmp_path: Path) -> None:
    files = {f"run/{i:06}_c000{i}_s9.png": encode(noise(1)[0]) for i in (3, 1)}
    assert open_images(str(write_tar(tmp_path / "a.tar", files))).labels == [3, 1]


def test_classes_of_an_npz_are_its_second_array(tmp_path: Path) -> None:
    pictures = noise(3)
    for i, labels in enumerate((np.array([5, 0, 999]), np.array([5, 0, 999], dtype=">i4"), np.uint8([5, 0, 200]))):
        np.savez_compressed(tmp_path / f"{i}.npz", pictures, labels)
        assert open_images(str(tmp_path / f"{i}.npz")).labels == labels.tolist()
    for i, other in enumerate((np.zeros(3), np.zeros(4, dtype=int), np.zeros((3, 1), dtype=int), np.array([{}] * 3))):
        np.savez(tmp_path / f"none{i}.npz", pictures, other)
        assert open_images(str(tmp_path / f"none{i}.npz")).labels is None


# ---- what files tell of themselves


def test_lossy_files_are_warned_of(tmp_path: Path) -> None:
    files = pngs(3) | {"a.jpg": encode(noise(1)[0], "JPEG"), "b.jpeg": encode(noise(1)[0], "JPEG")}
    images = opened(tmp_path, files)
    assert images.warnings == [f"2 files of {tmp_path} may be compressed with loss, which changes FID: save PNG"]
    assert images.facts["files"] == "jpeg+png"


def test_a_jpeg_called_png_is_still_a_jpeg(tmp_path: Path) -> None:
    images = opened(tmp_path, {"a.png": encode(noise(1)[0], "JPEG")})
    assert images.facts["files"] == "jpeg" and "1 files of" in images.warnings[0]


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_other_lossless_files_are_as_good_as_png(tmp_path: Path, kind: str) -> None:
    picture = noise(1)[0]
    assert np.array_equal(first(tmp_path, encode(picture, kind), f"x.{kind.lower()}"), picture)
    assert open_images(str(tmp_path)).warnings == []


def samples(folder: Path, seed: int = 0, sheet: int = 0, **settings: Any) -> Path:
    sample_to_files(
        tiny_pipeline(), plan([2, 0], 2, seed), folder, settings=settings, sheet_columns=sheet, overwrite=True
    )
    return folder


def test_samples_of_ours_tell_how_they_were_made(tmp_path: Path) -> None:
    """What decides the figures belongs into the protocol; seeds and classes differ from image to image and do not."""
    images = open_images(str(samples(tmp_path, sheet=2, top_k=3)))
    assert len(images) == 4 and images.labels == [2, 2, 0, 0] and images.warnings == []
    sampling = images.facts["sampling"]
    pipeline = tiny_pipeline()
    assert sampling == {
        "model": "",
        "checkpoint": pipeline.checkpoint()[:16],
        "sampler": "next-scale",
        **pipeline.resolve_settings({"top_k": 3}),
        "dtype": "float32",
        "device": "cpu",
        "vgen": __version__,
    }
    assert sampling["top_k"] == 3


def test_samples_in_a_tar_tell_it_too(tmp_path: Path) -> None:
    folder = samples(tmp_path / "run")
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    images = open_images(str(write_tar(tmp_path / "run.tar", files)))
    assert images.facts["sampling"] == open_images(str(folder)).facts["sampling"]


def test_samples_of_different_requests_are_warned_of(tmp_path: Path) -> None:
    samples(tmp_path, seed=0)
    samples(tmp_path, seed=10, top_k=3)
    images = open_images(str(tmp_path))
    assert "sampling" not in images.facts
    assert [w for w in images.warnings if "mixes images of 2 different requests" in w] == images.warnings != []


def test_samples_among_images_of_unknown_origin_are_warned_of(tmp_path: Path) -> None:
    samples(tmp_path)
    images = opened(tmp_path, {"stranger.png": encode(noise(1, 8, 8)[0])})
    assert "sampling" not in images.facts
    assert len(images.warnings) == 1 and "or with images of unknown origin" in images.warnings[0]


@pytest.mark.parametrize("text", ["no json", '{"model": 3}', "[" * 100_000, '{"model": "m", "seeds": []}'])
def test_requests_that_anybody_wrote_do_no_harm(tmp_path: Path, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("vgen", text)
    images = opened(tmp_path, {"0.png": encode(noise(1)[0], pnginfo=info)})
    assert images.facts["sampling"] == {"request": "unreadable"}


# ---- sets that cannot be judged


def test_mixed_sizes_name_an_odd_one(tmp_path: Path) -> None:
    files = pngs(4) | {"odd.png": encode(noise(1, 9, 8)[0])}
    message = r"mixes sizes: 4 images of 7x9 and 1 of 8x9, such as odd\.png; evaluate images of one size"
    with pytest.raises(SettingError, match=message):
        opened(tmp_path, files)


def test_a_truncated_png_is_counted_and_named_before_any_work(tmp_path: Path) -> None:
    files = pngs(5)
    for name, keep in (("001.png", 100), ("004.png", -20), ("003.png", 0)):
        files[name] = files[name][:keep]
    message = r"3 of 5 files in .* cannot be read, first 001\.png \(.+\): mend or remove them, or .* --skip-broken$"
    with pytest.raises(SettingError, match=message) as caught:
        opened(tmp_path, files)
    assert "\n" not in str(caught.value)


def test_a_text_file_called_png_is_broken(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"1 of 3 files .* first notes\.png"):
        opened(tmp_path, pngs(2) | {"notes.png": b"remember the milk"})


def test_broken_files_can_be_left_out(tmp_path: Path) -> None:
    """The rest is read, and nobody can miss that something is missing."""
    pictures = noise(4)
    files = pngs(4) | {"001.png": b"text", "zzz.png": b""}
    images = opened(tmp_path, files, skip_broken=True)
    assert len(images) == 3 and images.facts["broken"] == ["001.png", "zzz.png"]
    assert images.warnings == [f"broken files left out of {tmp_path}: 2, first 001.png"]
    assert np.array_equal(images.read(0, 3).pixels.permute(0, 2, 3, 1), pictures[[0, 2, 3]])
    assert images.describe(1) == "002.png"


def test_classes_of_what_is_left_stay_right(tmp_path: Path) -> None:
    content = encode(noise(1)[0])
    files = {"a/0.png": content, "b/0.png": b"", "c/0.png": content, "c/1.png": b""}
    assert opened(tmp_path, files, skip_broken=True).labels == [0, 1]


def test_whole_sets_have_no_broken_files(tmp_path: Path) -> None:
    images = opened(tmp_path, pngs(2), skip_broken=True)
    assert "broken" not in images.facts and images.warnings == []


def test_nothing_but_broken_files_is_an_error_anyway(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"2 of 2 files") as caught:
        opened(tmp_path, {"0.png": b"", "1.png": b""}, skip_broken=True)
    assert "--skip-broken" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_damaged_files_are_read_or_named(tmp_path: Path, kind: str) -> None:
    """Every byte overwritten in turn, and the file cut short: an image, or one line that says which file."""
    name = f"x.{kind.lower()}"
    data, refused = encode(noise(1, 4, 4)[0], kind), 0
    damaged = [data[:i] + bytes([255 - data[i]]) + data[i + 1 :] for i in range(len(data))]
    for content in [*damaged, *(data[:i] for i in range(0, len(data), 9))]:
        try:
            first(tmp_path, content, name)
        except SettingError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > len(data) // 9  # at least what was cut short
    if kind == "PNG":
        assert refused > len(data)  # and all that its checksums cover


def test_pixels_that_end_early_are_named_when_they_are_read(tmp_path: Path) -> None:
    """All checksums of this file are right; only decoding shows that pixels are missing."""
    images = opened(tmp_path, pngs(2) | {"short.png": raw_png(7, 9, 8, 2, bytes(30))})
    with pytest.raises(SettingError, match=r"cannot read short\.png \(.*\): mend or remove it"):
        images.read(0, 3)


def test_a_file_that_breaks_later_is_named(tmp_path: Path) -> None:
    images = opened(tmp_path, pngs(3))
    (tmp_path / "001.png").write_bytes(b"gone")
    with pytest.raises(SettingError, match=r"cannot read 001\.png \(.*\): mend or remove it"):
        images.read(0, 3)
    (tmp_path / "001.png").unlink()
    with pytest.raises(SettingError, match=r"cannot read 001\.png"):
        images.read(0, 3)


@pytest.mark.parametrize("archived", [True, False])
def test_enormous_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archived: bool) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    files = pngs(2) | {"big.png": encode(noise(1, 40, 40)[0])}
    path = write_tar(tmp_path / "a.tar", files) if archived else write_files(tmp_path / "a", files)
    with pytest.raises(SettingError, match=r"1 of 3 files .* first big\.png \(\d+ bytes, over the limit of 1000\)"):
        open_images(str(path))


def test_images_of_absurd_sizes_are_not_decoded(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"first bomb\.png \(.*decompression bomb"):
        opened(tmp_path, {"bomb.png": raw_png(100_000, 100_000, 8, 2, bytes(100))})


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"x"}, {".0.png": b"x"}, {"sheet.png": b"x"}])
def test_an_empty_folder_says_what_is_expected(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(SettingError, match=r"no images in .*: expected files like 000000\.png"):
        opened(tmp_path, files)


# ---- tars


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused(tmp_path: Path, mode: str) -> None:
    """Its members cannot be read by place."""
    path = write_tar(tmp_path / "a.tar", pngs(2), mode)
    with pytest.raises(SettingError, match=r"a\.tar is a damaged or compressed tar \(.*\): get it again, or unpack it"):
        open_images(str(path))


def test_only_images_of_a_tar_are_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {"a.txt": b"x", "b.png": encode(noise(1)[0]), "c.PNG": encode(noise(1)[0])})
    with tarfile.open(path, "a") as archive:
        for name, kind in (("folder.png", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "b.png"
            archive.addfile(info)
    images = open_images(str(path))
    assert [images.describe(i) for i in range(len(images))] == ["b.png", "c.PNG"]


def test_an_empty_tar_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no images in .*a\.tar"):
        open_images(str(write_tar(tmp_path / "a.tar", {})))


def test_a_broken_member_of_a_tar_is_named(tmp_path: Path) -> None:
    files = pngs(3)
    path = write_tar(tmp_path / "a.tar", files | {"001.png": files["001.png"][:-20]})
    with pytest.raises(SettingError, match=r"1 of 3 files .* first 001\.png"):
        open_images(str(path))
    assert len(open_images(str(path), skip_broken=True)) == 2


@pytest.mark.parametrize("where", ["inside a member", "inside a header", "between members", "header overwritten"])
def test_a_damaged_tar_is_never_a_smaller_one(tmp_path: Path, where: str) -> None:
    """Figures of fewer images than there were would look like any others."""
    path = write_tar(tmp_path / "a.tar", pngs(5))
    with tarfile.open(path) as archive:
        begin = archive.getmembers()[3].offset
    data = path.read_bytes()
    cut = {"inside a member": begin + 512 + 20, "inside a header": begin + 200, "between members": begin}
    path.write_bytes(data[: cut[where]] if where in cut else data[:begin] + b"\xff" * 200 + data[begin + 200 :])
    with pytest.raises(SettingError, match=r"a\.tar"):
        open_images(str(path))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = as_shards(tmp_path, noise(6))
    (folder / "1.tar").write_bytes((folder / "1.tar").read_bytes()[:700])
    with pytest.raises(SettingError, match=r"1\.tar is a damaged"):
        open_images(str(folder))


# ---- arrays


@pytest.mark.parametrize("shape", [(5, 9, 7), (5, 9, 7, 1)])
def test_grey_arrays_become_three_equal_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pictures = noise(5)[..., 0].reshape(shape)
    np.savez(tmp_path / "a.npz", pictures)
    images = open_images(str(tmp_path / "a.npz"))
    assert images.facts == {"files": "npz", "size": "7x9", "grey": "as RGB"}
    wanted = torch.from_numpy(pictures.reshape(5, 1, 9, 7)).expand(5, 3, 9, 7)
    assert torch.equal(images.read(0, 5).pixels, wanted) and torch.equal(images.read(1, 2).pixels, wanted[1:2])


def test_an_npz_without_the_key_says_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises(SettingError, match=r"a\.npz has no array arr_0: it holds mu, sigma$"):
        open_images(str(tmp_path / "a.npz"))
    with zipfile.ZipFile(tmp_path / "b.npz", "w"):
        pass
    with pytest.raises(SettingError, match=r"b\.npz has no array arr_0: it holds no arrays"):
        open_images(str(tmp_path / "b.npz"))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (noise(2).astype(np.float32), r"float32 \(2, 9, 7, 3\): expected uint8 \(N, H, W, 3\)"),
        (noise(2).astype(np.int8), "int8"),
        (noise(2).transpose(0, 3, 1, 2).copy(), r"uint8 \(2, 3, 9, 7\): expected uint8 \(N, H, W, 3\)"),
        (noise(2)[..., :2].copy(), r"\(2, 9, 7, 2\)"),
        (noise(2)[0, 0].copy(), r"\(7, 3\)"),
        (noise(2)[:0], "holds no images"),
        (np.uint8(3), r"uint8 \(\)"),
        (np.asfortranarray(noise(2)), "not a C-ordered array"),
    ],
    ids=["float", "signed", "channels first", "two channels", "one image", "none", "scalar", "fortran"],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, array: np.ndarray, says: str) -> None:
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(SettingError, match=says) as caught:
        open_images(str(tmp_path / "a.npz"))
    assert "arr_0" in str(caught.value) and "a.npz" in str(caught.value)


class Trap:
    """Pickles into a call that would create a file if it were ever unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple:
        return (open, (str(self.victim), "w"))


@pytest.mark.parametrize("name", ["arr_0", "arr_1"])
def test_pickled_objects_are_never_run(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    arrays = {"arr_0": noise(1), name: np.array([Trap(victim)], dtype=object)}
    np.savez(tmp_path / "a.npz", **arrays)
    if name == "arr_0":
        with pytest.raises(SettingError, match=r"arr_0 of .* is not a C-ordered array of numbers"):
            open_images(str(tmp_path / "a.npz"))
    else:
        assert open_images(str(tmp_path / "a.npz")).labels is None
    assert not victim.exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)[name]  # the trap is a real one
    assert victim.exists()


def array_header(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_shorter_than_it_says_is_truncated(tmp_path: Path, compression: int) -> None:
    content = array_header((4, 2, 2, 3), bytes(3 * 12 + 5))
    images = open_images(write_zip(tmp_path / "a.npz", {"arr_0.npy": content}, compression))
    assert images.read(0, 3).pixels.shape == (3, 3, 2, 2)
    with pytest.raises(SettingError, match=r"a\.npz is truncated: arr_0 ends before row 4 of 4"):
        images.read(2, 4)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_npz_is_named(tmp_path: Path, keep: float) -> None:
    path = as_npz(tmp_path, noise(6))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(SettingError, match=r"set\.npz"):
        open_images(str(path))


def test_damaged_pixels_of_an_npz_are_never_taken_for_others(tmp_path: Path) -> None:
    """Its checksum is that of the whole array: damage is found by the time all of it was read."""
    pictures = noise(3, 40, 40)
    path = as_npz(tmp_path, pictures)
    data = path.read_bytes()
    begin = data.index(pictures.tobytes())
    for place in range(begin, begin + pictures.size, 997):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(SettingError, match=r"set\.npz is damaged or truncated \(.*CRC.*\): get it again"):
            [images.read(i, i + 1) for images in [open_images(str(path))] for i in range(3)]


def test_a_damaged_compressed_npz_is_read_or_named(tmp_path: Path) -> None:
    pictures = np.repeat(noise(1, 4, 4), 20, axis=0)
    path = as_compressed(tmp_path, pictures)
    data, wrong = path.read_bytes(), []
    start = data.index(b"arr_0.npy") + 9
    for place in range(start, data.index(b"PK\x01\x02")):
        path.write_bytes(data[:place] + bytes([255 - data[place]]) + data[place + 1 :])
        try:
            images = open_images(str(path))
            assert np.array_equal(images.read(0, 20).pixels.permute(0, 2, 3, 1), pictures)
        except SettingError:
            pass
        except Exception as error:
            wrong.append(f"{place}: {type(error).__name__}: {error}")
    assert wrong == []


@pytest.mark.parametrize("content", [b"", b"abc", b"\x93NUMPY", b"\x93NUMPY\x09\x00\x10\x00", b"\x93NUMPY\x01\x00\xff"])
def test_a_member_that_is_no_array_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SettingError, match=r"arr_0 of .*a\.npz is no plain array"):
        open_images(write_zip(tmp_path / "a.npz", {"arr_0.npy": content}))


def test_a_damaged_header_is_read_or_named(tmp_path: Path) -> None:
    """Of an array so large that its checksum is not compared before its header is believed."""
    content = array_header((2, 40, 40, 3), bytes(2 * 40 * 40 * 3))
    for place in range(128):
        for byte in (b" ", b"9", b"\xff"):
            damaged = content[:place] + byte + content[place + 1 :]
            try:
                open_images(write_zip(tmp_path / "a.npz", {"arr_0.npy": damaged})).read(0, 1)
            except SettingError as error:
                assert "arr_0" in str(error) or "a.npz" in str(error)


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_later_versions_of_numpys_format_are_read(tmp_path: Path, version: tuple[int, int]) -> None:
    pictures, file = noise(2), io.BytesIO()
    np.lib.format.write_array(file, pictures, version=version)
    images = open_images(write_zip(tmp_path / "a.npz", {"arr_0.npy": file.getvalue()}))
    assert np.array_equal(images.read(0, 2).pixels.permute(0, 2, 3, 1), pictures)


def test_an_array_without_its_suffix_is_missing_or_read(tmp_path: Path) -> None:
    content = array_header((1, 2, 2, 3), bytes(12))
    try:
        assert len(open_images(write_zip(tmp_path / "a.npz", {"arr_0": content}))) == 1
    except SettingError as error:
        assert "arr_0" in str(error)


@pytest.mark.parametrize("shape", [(-5, 2, 2, 3), (5, 0, 2, 3)])
def test_impossible_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError):
        open_images(write_zip(tmp_path / "a.npz", {"arr_0.npy": array_header(shape)}))


def test_a_large_npz_is_never_loaded_whole(tmp_path: Path) -> None:
    """100 MB of zeros, compressed; the first chunk, one far behind it, and back again."""
    number, row = 8192, 64 * 64 * 3
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        file.write(array_header((number, 64, 64, 3)))
        for _ in range(number // 256):
            file.write(bytes(256 * row))
    tracemalloc.start()
    try:
        images = open_images(str(tmp_path / "a.npz"))
        assert len(images) == number
        for start in (0, 8, 16):
            assert images.read(start, start + 8).pixels.shape == (8, 3, 64, 64)
        in_order = tracemalloc.get_traced_memory()[1]
        images.read(7000, 7008)
        images.read(8, 16)
        jumping = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert in_order < 2_000_000
    assert jumping < 50_000_000  # zipfile skips in steps of 16 MB


# ---- opening


@pytest.mark.parametrize("name", ["nothing", "some/folder", "fashion-minst:test"])
def test_what_is_not_there_names_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    says = rf"no images at '{name}': give a folder, an \.npz, a \.tar, or .* fashion-mnist:test, mnist:test"
    with pytest.raises(SettingError, match=says):
        open_images(name)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 40])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(SettingError, match=r"a\.npz is neither an \.npz nor an uncompressed \.tar"):
        open_images(str(tmp_path / "a.npz"))


def test_sources_are_known_by_their_content(tmp_path: Path) -> None:
    as_npz(tmp_path, noise()).rename(tmp_path / "a.tar")
    as_tar(tmp_path, noise()).rename(tmp_path / "b.npz")
    assert isinstance(open_images(str(tmp_path / "a.tar")), ArrayImages)
    assert isinstance(open_images(str(tmp_path / "b.npz")), FileImages)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    as_folder(tmp_path, noise(2))
    assert len(open_images("~/folder")) == 2


# ---- splits of data sets


@pytest.mark.parametrize(("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("mnist", "MNIST")])
@pytest.mark.parametrize(("split", "number"), [("train", 30), ("test", 20)])
def test_a_split_is_read_in_order(tmp_path: Path, name: str, folder: str, split: str, number: int) -> None:
    write_mnist(tmp_path, folder, train=30, test=20)
    images = open_images(f"{name}:{split}", data_root=tmp_path)
    assert isinstance(images, SplitImages)
    assert len(images) == number and images.labels == [i % 10 for i in range(number)]
    assert images.facts == {"files": "data set", "size": "28x28", "grey": "as RGB"} and images.warnings == []
    pixels = images.read(12, 15).pixels
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, 28, 28)
    for i in range(3):
        assert np.array_equal(pixels[i], np.stack([pattern((12 + i) % 10, 1, 28)] * 3))
    assert images.describe(3) == f"image 3 of {name}:{split}" and images.identity(0, 2) is None and images.cheap


@pytest.mark.parametrize("text", ["fashion-mnist", "fashion-mnist:", "fashion-mnist:validation"])
def test_a_data_set_without_a_split_names_them(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingError, match=r"names no split: write fashion-mnist:test or fashion-mnist:train"):
        open_images(text, data_root=tmp_path)


@pytest.mark.parametrize("divided", [False, True])
def test_a_folder_has_the_splits_that_training_makes_of_it(tmp_path: Path, divided: bool) -> None:
    folder = tmp_path / "photos"
    for part in ("train", "test") if divided else ("",):
        write_folder(folder / part, each=15 if part != "test" else 3)
    held_out = open_images(f"{folder}:test")
    learnt = open_images(f"{folder}:train")
    assert (len(held_out), len(learnt)) == ((9, 45) if divided else (2, 43))
    for images, split in ((held_out, "test"), (learnt, "train")):
        assert sorted(entry.name for entry in images.entries) == sorted(  # type: ignore[attr-defined]
            str(path.relative_to(folder)) for path, _ in folder_files(folder, split)[0]
        )
    (tmp_path / "photos:test").mkdir()  # what is really there comes first
    with pytest.raises(SettingError, match="no images in"):
        open_images(f"{folder}:test")


def test_the_data_root_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGEN_DATA", str(write_mnist(tmp_path, "MNIST", test=5)))
    assert len(open_images("mnist:test")) == 5


# ---- chunks


@pytest.mark.parametrize(("number", "size"), [(10, 4), (8, 4), (3, 4), (1, 1), (0, 5)])
def test_chunks_cover_everything_once(number: int, size: int) -> None:
    bounds = list(chunks(number, size))
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(number))
    assert all(stop - start == size for start, stop in bounds[:-1])


# ---- what people do to folders and tars


def test_two_tars_joined_are_refused(tmp_path: Path) -> None:
    """Readers stop at the first one's end: the figures would be of half the images."""
    one, two = (write_tar(tmp_path / name, pngs(3)) for name in ("a.tar", "b.tar"))
    (tmp_path / "c.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(SettingError, match=r"c\.tar .*appended"):
        open_images(str(tmp_path / "c.tar"))


def test_images_beside_tars_are_refused(tmp_path: Path) -> None:
    folder = as_shards(tmp_path, noise(4))
    (folder / "0.png").write_bytes(encode(noise(1)[0]))
    with pytest.raises(SettingError, match="both images and"):
        open_images(str(folder))


def test_hidden_files_in_tars_are_left_out(tmp_path: Path) -> None:
    folder = as_shards(tmp_path, noise(4))
    (folder / "._0.tar").write_bytes(b"resource fork")
    assert len(open_images(str(folder))) == 4
    assert len(open_images(str(write_tar(tmp_path / "a.tar", pngs(2) | {"._000.png": b"resource fork"})))) == 2


def test_what_is_no_picture_is_said_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pngs(2) | {"002.png": b"hello"})
    with pytest.raises(SettingError, match=r"first 002\.png \(no picture\)"):
        open_images(str(path))


@pytest.mark.parametrize("content", [b"1.7", b"true"])
def test_classes_are_whole_numbers(tmp_path: Path, content: bytes) -> None:
    files = {"0.png": encode(noise(1)[0]), "0.cls": content}
    assert open_images(str(write_tar(tmp_path / "a.tar", files))).labels is None
