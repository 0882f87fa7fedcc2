"""Picture files: PNG with the Request inside, contact sheets, and reading the Request back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from vgen.files import atomic_file
from vgen.types import Request, SettingError

KEY = "vgen"  # keyword of the iTXt chunk that carries a Request


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) uint8 -> B images."""
    return [Image.fromarray(np.ascontiguousarray(item)) for item in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def save_png(image: Image.Image, path: Path, request: Request | None = None) -> None:
    """Write a PNG, whole or not at all, with the request that repeats it."""
    info = PngImagePlugin.PngInfo()
    if request is not None:
        info.add_itxt(KEY, request.to_json(), zip=False)
    with atomic_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def read_request(path: Path) -> Request:
    """The Request inside a PNG. Raises FileNotFoundError, or SettingError where the file carries none."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with Image.open(path) as image:
            if image.format != "PNG":
                raise SettingError(f"{path} is {image.format}, and only PNG files made by vgen carry a request")
            image.load()  # text chunks may stand behind the pixels
            text = getattr(image, "text", {}).get(KEY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{path} is not a readable picture: {error}") from error
    if not text:
        raise SettingError(f"{path} carries no vgen request: it was not made by vgen, or its metadata was stripped")
    try:
        return Request.from_json(text)
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error


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
