"""Pictures that visitors hand in: read within bounds, placed on a model's canvas, and what was painted over them.

Knows neither models nor Gradio.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vgen.types import SettingError

MAX_SIDE = 8192  # pixels of a picture that is handed in
MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
WORKING = 2048  # pixels a side that a larger picture is reduced to
EDITOR = 448  # pixels a side of the painting surface, about
OPAQUE = 127  # alpha above which a stroke counts
HALF = 127.5  # between black and white
FITS = ("crop", "pad", "stretch")


def read_picture(path: str | Path) -> Image.Image:
    """A picture file in RGB, upright, transparency on white. Its size is checked before it is decoded.

    Raises SettingError for what is none, and for more pixels than are taken.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if max(image.size) > MAX_SIDE:
                raise SettingError(
                    f"the picture is {width}x{height} pixels, the limit is {MAX_SIDE} a side: make it smaller first"
                )
            if width * height > MAX_PIXELS:
                raise SettingError(
                    f"the picture has {width * height / 1e6:.0f} megapixels, the limit is {MAX_PIXELS / 1e6:.0f}: "
                    "make it smaller first"
                )
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except SettingError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SettingError(
            f"the picture has far too many pixels, the limit is {MAX_SIDE} a side and {MAX_PIXELS / 1e6:.0f} "
            "megapixels: make it smaller first"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise SettingError("the file is no picture that can be read: give a PNG, JPEG, WebP, BMP or GIF") from error


def read_working(path: Path) -> Image.Image:
    """The same, reduced where it is very large; the last few are remembered while their files stay as they are."""
    return _read_working(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_working(path: Path, changed: int) -> Image.Image:
    picture = read_picture(path)
    picture.thumbnail((WORKING, WORKING), Image.Resampling.LANCZOS)
    return picture


# ---- placing


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a picture comes to lie on a square canvas."""

    fit: str = "crop"  # one of FITS: fill the canvas, lie within it whole, or become square
    percent: int = 100  # of that size
    right: int = 0  # canvas pixels that it is moved from the middle
    down: int = 0


@dataclass(frozen=True)
class Canvas:
    """What a model is to edit: pixels (3, S, S) uint8, and where nothing of the picture lies, (S, S) bool."""

    pixels: Tensor
    outside: Tensor


def place(picture: Image.Image, size: int, placement: Placement) -> Canvas:
    """A picture on a canvas of `size`. Around it its edge goes on, which is what a model sees there at first."""
    width, height = _placed_size(picture.size, size, placement)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    columns = np.arange(size) - ((size - width) // 2 + placement.right)
    rows = np.arange(size) - ((size - height) // 2 + placement.down)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    if not inside.any():
        raise SettingError("the picture lies beside the canvas: move it less")
    placed = pixels[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    return Canvas(torch.from_numpy(placed.copy()).permute(2, 0, 1), torch.from_numpy(~inside))


def place_with_mask(picture: Image.Image, mask: Image.Image, size: int) -> tuple[Canvas, Tensor]:
    """The middle of a picture on a canvas of `size`, and where the mask beside it is white there, (S, S) bool.

    Raises SettingError where the two differ in size.
    """
    if mask.size != picture.size:
        (width, height), (wide, high) = mask.size, picture.size
        raise SettingError(f"the mask is {width}x{height} pixels, the picture {wide}x{high}: make them the same")
    placed = place(mask, size, Placement()).pixels
    return place(picture, size, Placement()), placed.float().mean(0) > HALF


def _placed_size(picture: tuple[int, int], size: int, placement: Placement) -> tuple[int, int]:
    if placement.fit == "stretch":
        sides = (float(size), float(size))
    else:
        scale = size / (min(picture) if placement.fit == "crop" else max(picture))
        sides = (picture[0] * scale, picture[1] * scale)
    # A very long picture is cut at what the canvas could ever show of it.
    width, height = (max(1, round(side * placement.percent / 100)) for side in sides)
    if max(width, height) > WORKING * 8:
        raise SettingError(f"the picture would be {width}x{height} pixels: use a less narrow one, or 'pad'")
    return width, height


# ---- painting


def zoom_of(size: int) -> int:
    """How many times a canvas is enlarged for painting: whole pixels stay whole."""
    return max(1, round(EDITOR / size))


def enlarge(pixels: Tensor) -> Image.Image:
    """A canvas (3, S, S) uint8 for painting on."""
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
    zoom = zoom_of(image.width)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def read_paint(value: Any, size: int) -> Tensor:
    """What an image editor's layers cover, of a canvas of `size`: (S, S) bool, a pixel that is touched being covered.

    The background and the composite are not looked at: the paint's colour is nobody's pixel. Raises SettingError for
    layers of another size.
    """
    painted = torch.zeros(size, size, dtype=torch.bool)
    layers = value.get("layers") if isinstance(value, dict) else None
    side = size * zoom_of(size)
    for layer in layers or []:
        pixels = np.asarray(layer)
        if pixels.shape != (side, side, 4):
            shape = "x".join(str(n) for n in pixels.shape)
            raise SettingError(f"the painting is {shape}, this model's is {side}x{side}x4: open the image again")
        covered = torch.from_numpy(pixels[..., 3] > OPAQUE)
        painted |= covered.view(size, side // size, size, side // size).any(3).any(1)
    return painted
