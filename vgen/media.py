"""Picture files: PNG with the Request inside, contact sheets, and reading the Request back, also out of videos."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from vgen.files import atomic_file
from vgen.types import MAX_REQUEST_CHARACTERS, Request, SettingError

KEY = "vgen"  # keyword of the iTXt chunk that carries a Request
FIRST_FRAME = "000000.png"  # of a video that is a folder of frames
UNREADABLE = (  # what Pillow and NumPy raise for damaged files
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    NotImplementedError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) uint8 -> B images."""
    return [Image.fromarray(np.ascontiguousarray(item)) for item in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def save_png(image: Image.Image, path: Path, request: Request | None = None) -> None:
    """Write a PNG, whole or not at all, with the request that repeats it."""
    with atomic_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=_chunks(request))


def png_bytes(image: Image.Image, request: Request | None = None) -> bytes:
    """What `save_png` writes."""
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=_chunks(request))
    return file.getvalue()


def _chunks(request: Request | None) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if request is not None:
        info.add_itxt(KEY, request.to_json(), zip=False)
    return info


def read_request(path: Path) -> Request:
    """The Request inside a PNG, GIF, MP4 or npz file, by its suffix (any other is taken for a PNG), or inside the first
    frame of a video's folder.

    Raises FileNotFoundError, or SettingError where the file carries none.
    """
    if (first := path / FIRST_FRAME).is_file():
        path = first
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    readers = {".gif": _gif_text, ".npz": _npz_text, ".mp4": _mp4_text}
    try:
        text = readers.get(path.suffix.lower(), _png_text)(path)
    except UNREADABLE as error:
        if isinstance(error, SettingError):
            raise
        kind = "video" if path.suffix.lower() in readers else "picture"
        raise SettingError(f"{path} is not a readable {kind}: {error}") from error
    if not text:
        raise SettingError(f"{path} carries no vgen request: it was not made by vgen, or its metadata was stripped")
    try:
        return Request.from_json(text)
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error


def _png_text(path: Path) -> str | None:
    with Image.open(path) as image:
        if image.format != "PNG":
            raise SettingError(f"{path} is {image.format}, and only PNG files made by vgen carry a request")
        image.load()  # text chunks may stand behind the pixels
        return getattr(image, "text", {}).get(KEY)


def _gif_text(path: Path) -> str | None:
    with Image.open(path, formats=["GIF"]) as image:
        comment = image.info.get("comment", b"")
    return comment.decode() if isinstance(comment, bytes) else comment


def _npz_text(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        if "request.npy" not in archive.namelist():
            return None
        if archive.getinfo("request.npy").file_size > 5 * MAX_REQUEST_CHARACTERS:  # four bytes a character
            raise SettingError(f"{path}: its request is over the limit of {MAX_REQUEST_CHARACTERS} characters")
    with np.load(path) as arrays:
        return str(arrays["request"])


def _mp4_text(path: Path) -> str | None:
    """The comment tag: moov/udta/meta/ilst/(c)cmt/data in the tree of boxes (ISO 14496-12, and iTunes's list)."""
    with path.open("rb") as file:
        span = (0, path.stat().st_size)
        # A `meta` box has four bytes before its children, `data` eight before its text.
        for kind, skip in ((b"moov", 0), (b"udta", 0), (b"meta", 4), (b"ilst", 0), (b"\xa9cmt", 0), (b"data", 8)):
            found = next((inside for name, inside in _boxes(file, *span) if name == kind), None)
            if found is None:
                return None
            span = (found[0] + skip, found[1])
        if span[1] - span[0] > 4 * MAX_REQUEST_CHARACTERS:
            raise SettingError(f"{path}: its request is over the limit of {MAX_REQUEST_CHARACTERS} characters")
        file.seek(span[0])
        return file.read(span[1] - span[0]).decode()


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Name and span of the content of the boxes that lie between two places of a file."""
    while start + 8 <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1 and start + 16 <= end:  # a long box
            (size,), head = struct.unpack(">Q", file.read(8)), 16
        size = end - start if size == 0 else size  # the last box may leave its size open
        if not head <= size <= end - start:
            raise ValueError(f"the box at byte {start} has {size} bytes, which do not fit: the file is cut short")
        yield name, (start + head, start + size)
        start += size


def contact_sheet(images: Sequence[Image.Image], columns: int, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Images of one size in rows of `columns` on white, each enlarged `zoom` times without smoothing."""
    width, height = (side * zoom for side in images[0].size)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def sheet_zoom(side: int) -> int:
    """Enlargement that makes small pictures about 84 pixels wide."""
    return max(1, 84 // side)
