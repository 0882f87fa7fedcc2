"""Pictures on disk: the Request inside a PNG, files that carry none, contact sheets."""

import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from vgen.media import KEY, contact_sheet, read_request, save_png, sheet_zoom, to_pil
from vgen.types import MAX_REQUEST_CHARACTERS, Request, SettingError

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def random_request(seed: int) -> Request:
    """Any request a run could have, with awkward names and extreme numbers."""
    draw = random.Random(seed)
    number = draw.randint(1, 5)
    alphabet = "aé本🐙 '\"\\\n\t/<>&\u2028"
    values: dict[str, Any] = {
        "guidance_scale": draw.uniform(0, 10),
        "top_p": draw.random(),
        "temperature": draw.choice([0.0, 1e-300, 1 / 3]),
        "top_k": draw.randint(0, 10**6),
        "more_smooth": draw.random() < 0.5,
        "guidance_schedule": draw.choice(["linear", "constant"]),
        "".join(draw.choices(alphabet, k=4)): None,
    }
    return Request(
        model="".join(draw.choices(alphabet, k=draw.randint(1, 30))),
        class_labels=draw.choice([None, [draw.randrange(1000) for _ in range(number)]]),
        seeds=[draw.choice([0, 2**63 - 1, draw.randrange(2**63)]) for _ in range(number)],
        sampler=draw.choice([None, "next-scale"]),
        settings={key: values[key] for key in draw.sample(sorted(values), k=draw.randint(0, len(values)))},
        vgen="0.1.0",
        checkpoint=f"{draw.getrandbits(256):064x}",
        dtype=draw.choice(["float32", "bfloat16"]),
        device=draw.choice(["cpu", "cuda"]),
    )


def write_text(path: Path, text: str | bytes, keyword: str = KEY) -> Path:
    """A PNG with one text chunk of our keyword, whatever it says."""
    info = PngImagePlugin.PngInfo()
    if isinstance(text, bytes):
        info.add(b"iTXt", keyword.encode() + b"\0\0\0\0\0" + text)
    else:
        info.add_itxt(keyword, text)
    PICTURE.save(path, pnginfo=info)
    return path


# ---- requests


@pytest.mark.parametrize("seed", range(25))
def test_a_request_survives_its_png(tmp_path: Path, seed: int) -> None:
    request = random_request(seed)
    save_png(PICTURE, tmp_path / "x.png", request)
    assert read_request(tmp_path / "x.png") == request
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.array(image), np.array(PICTURE))


@pytest.mark.parametrize("seed", range(5))
def test_a_row_of_a_request_keeps_all_but_the_others(seed: int) -> None:
    request = random_request(seed)
    for i in range(len(request.seeds)):
        row = request.row(i)
        assert row.seeds == [request.seeds[i]]
        assert row.class_labels == (request.class_labels and [request.class_labels[i]])
        assert (row.model, row.settings, row.checkpoint) == (request.model, request.settings, request.checkpoint)


def test_text_chunks_behind_the_pixels_are_found(tmp_path: Path) -> None:
    """Some programs append metadata when they save."""
    request = random_request(1)
    PICTURE.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    body = b"iTXt" + KEY.encode() + b"\0\0\0\0\0" + request.to_json().encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "x.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert read_request(tmp_path / "x.png") == request


def test_keys_of_later_versions_are_ignored(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.png", '{"model": "m", "seeds": [3], "invented": {"later": 1}}')
    assert read_request(path) == Request(model="m", seeds=[3])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no vgen request"),
        ("{", "not a vgen request"),
        ("[1, 2]", "JSON object"),
        ('"text"', "JSON object"),
        ("{}", "model is missing"),
        ('{"model": "m"}', "seeds is missing"),
        ('{"model": 1, "seeds": [0]}', "model must be a string"),
        ('{"model": "m", "seeds": "0"}', "seeds must be a list of integers"),
        ('{"model": "m", "seeds": [0.5]}', "seeds must be a list of integers"),
        ('{"model": "m", "seeds": [true]}', "seeds must be a list of integers"),
        ('{"model": "m", "seeds": [0], "settings": []}', "settings must be an object"),
        ('{"model": "m", "seeds": [0], "dtype": null}', "dtype must be a string"),
        ('{"model": "m", "seeds": [0, 1], "class_labels": [1]}', "1 class labels but 2 seeds"),
        ("[" * 100_000, "not a vgen request"),
        (b"\xff\xfe\x00", "request"),
    ],
)
def test_garbage_metadata_is_refused(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        read_request(write_text(tmp_path / "x.png", text))


def test_an_endless_number_is_refused() -> None:
    with pytest.raises(SettingError):
        Request.from_json('{"model": "m", "seeds": [' + "9" * 5000 + "]}")


def test_oversized_metadata_is_refused(tmp_path: Path) -> None:
    padding = " " * MAX_REQUEST_CHARACTERS
    path = write_text(tmp_path / "x.png", '{"model": "m", "seeds": [0]}' + padding)
    with pytest.raises(SettingError, match=str(MAX_REQUEST_CHARACTERS)):
        read_request(path)
    with pytest.raises(SettingError, match=str(MAX_REQUEST_CHARACTERS)):
        Request.from_json('{"model": "m", "seeds": [0]}' + padding)


def test_a_compressed_bomb_of_metadata_is_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, " " * 80_000_000, zip=True)
    PICTURE.save(tmp_path / "x.png", pnginfo=info)
    assert (tmp_path / "x.png").stat().st_size < 200_000
    with pytest.raises(SettingError):
        read_request(tmp_path / "x.png")


def test_pictures_of_others_carry_no_request(tmp_path: Path) -> None:
    write_text(tmp_path / "webui.png", "a cat, Steps: 20", keyword="parameters")
    with pytest.raises(SettingError, match="not made by vgen"):
        read_request(tmp_path / "webui.png")
    PICTURE.save(tmp_path / "x.jpg")
    with pytest.raises(SettingError, match="JPEG"):
        read_request(tmp_path / "x.jpg")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(SettingError, match="not a readable picture"):
        read_request(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError, match="none"):
        read_request(tmp_path / "none.png")


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9])
def test_a_truncated_png_is_refused(tmp_path: Path, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    save_png(Image.fromarray(noise), tmp_path / "x.png", random_request(0))
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(SettingError, match=r"x\.png"):
        read_request(tmp_path / "x.png")


def test_damaged_bytes_never_give_another_error(tmp_path: Path) -> None:
    """Every byte of a small file, overwritten in turn: a request, or a SettingError."""
    path = tmp_path / "x.png"
    save_png(PICTURE, path, Request(model="m", seeds=[3]))
    data = bytearray(path.read_bytes())
    refused = 0
    for place in range(len(data)):
        for value in (0, 0x80, 0xFF):
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                assert isinstance(read_request(path), Request)
            except SettingError:
                refused += 1
    assert refused > len(data)  # the test did damage something


def test_an_enormous_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(PICTURE, tmp_path / "x.png", random_request(0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(SettingError, match=r"x\.png"):
        read_request(tmp_path / "x.png")


# ---- writing


def test_a_failed_save_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(PICTURE, tmp_path / "x.png", random_request(0))
    before = (tmp_path / "x.png").read_bytes()

    def half(self: Image.Image, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"\x89PNG half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space"):
        save_png(PICTURE, tmp_path / "x.png", random_request(1))
    assert (tmp_path / "x.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_tensors_become_pictures_pixel_by_pixel() -> None:
    pixels = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = to_pil(pixels)
    assert [image.size for image in images] == [(5, 4)] * 3
    for row, image in zip(pixels, images, strict=True):
        assert np.array_equal(np.array(image), row.permute(1, 2, 0).numpy())


def test_a_contact_sheet_shows_every_picture_unchanged_in_its_place() -> None:
    tiles = [Image.new("RGB", (3, 2), (40 * i, 255 - 40 * i, 7)) for i in range(5)]
    sheet = np.array(contact_sheet(tiles, columns=2, zoom=2, gap=1))
    assert sheet.shape == (3 * (4 + 1) + 1, 2 * (6 + 1) + 1, 3)
    for i in range(5):
        top, left = 1 + 5 * (i // 2), 1 + 7 * (i % 2)
        assert (sheet[top : top + 4, left : left + 6] == [40 * i, 255 - 40 * i, 7]).all()
    assert (sheet[11:15, 8:] == 255).all()  # the sixth place is empty


@pytest.mark.parametrize(("side", "zoom"), [(8, 10), (28, 3), (84, 1), (256, 1)])
def test_small_pictures_are_enlarged(side: int, zoom: int) -> None:
    assert sheet_zoom(side) == zoom
