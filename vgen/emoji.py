"""The Noto colour emoji as a data set: pictures rendered from the font (OFL), by Unicode group.

Neither font nor list comes with vgen: Debian's fonts-noto-color-emoji and unicode-data have them. Variants of one
emoji, by skin tone or by gender, are near copies: they are all in the same split, and of skin tones the font's yellow
and one more are taken, or people would be most of the data.
"""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from vgen.types import SettingError

GROUPS = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
NAMES = list(GROUPS.values())
READABLE = ("symbols", "flags")  # mirrored, these would be wrong
FONT, LIST = "NotoColorEmoji.ttf", "emoji-test.txt"
PLACES = {
    FONT: ("/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto", "/usr/share/fonts/google-noto-emoji-color-fonts"),
    LIST: ("/usr/share/unicode/emoji",),
}
PIXELS = 109  # the size of the font's bitmaps, 136x128 with their margins
SIDE = 136
SMALLEST = 0.8  # of its size a picture is where it is placed at random
HELD_OUT_EVERY = 20  # subjects, with all their variants
TONES = range(0x1F3FB, 0x1F400)
PLAIN = {0xFE0F, 0x2640, 0x2642, 0x200D, *TONES}  # what tells variants apart, and binds them
PERSONS = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2}  # man, woman; boy, girl


@dataclass(frozen=True)
class Emoji:
    """A fully qualified emoji: its code points, and the group it belongs to as a class id."""

    codes: tuple[int, ...]
    group: int

    @property
    def text(self) -> str:
        """The emoji itself."""
        return "".join(map(chr, self.codes))

    @property
    def tones(self) -> frozenset[int]:
        """Code points of the skin tones in it."""
        return frozenset(code for code in self.codes if code in TONES)

    @property
    def subject(self) -> tuple[int, ...]:
        """What it shows, whoever it is: the same for all variants."""
        return tuple(PERSONS.get(code, code) for code in self.codes if code not in PLAIN)

    @property
    def number(self) -> int:
        """A number that belongs to the subject, as good as random."""
        return int.from_bytes(hashlib.sha256(repr(self.subject).encode()).digest()[:8], "big")

    @property
    def split(self) -> str:
        return "test" if self.number % HELD_OUT_EVERY == 0 else "train"


def read_list(lines: Iterable[str]) -> list[Emoji]:
    """The emoji of Unicode's emoji-test.txt, fully qualified, in their order; without components such as bare tones."""
    found, group = [], None
    for line in lines:
        if line.startswith("# group:"):
            group = GROUPS.get(line.partition(":")[2].strip())
        codes, separator, rest = line.partition(";")
        if separator and group and rest.split("#")[0].strip() == "fully-qualified":
            found.append(Emoji(tuple(int(code, 16) for code in codes.split()), NAMES.index(group)))
    return found


def without_most_tones(emoji: Iterable[Emoji]) -> list[Emoji]:
    """Those without a skin tone, and of each subject those with one more, the same tone for all of its people."""
    found = list(emoji)
    return [item for item in found if not item.tones or item.tones == {TONES[item.number // HELD_OUT_EVERY % 5]}]


def find(name: str, root: Path) -> Path:
    """A file of the data set: in its folder under `root`, or where distributions put it. Raises SettingError."""
    places = [root / "noto-emoji", *map(Path, PLACES[name])]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise SettingError(
        f"noto-emoji needs {name}, which is in none of {', '.join(map(str, places))}: install Debian's "
        "fonts-noto-color-emoji and unicode-data, or put the file into the first of them"
    )


def render(font: ImageFont.FreeTypeFont, emoji: Emoji) -> Image.Image | None:
    """A square RGB picture on white; None where the font has no picture of it."""
    left, top, right, bottom = (round(side) for side in font.getbbox(emoji.text))
    if right - left > SIDE:  # the parts of a sequence side by side, since the font does not know it
        return None
    layer = Image.new("RGBA", (SIDE, SIDE))
    place = ((SIDE - (right - left)) // 2 - left, (SIDE - (bottom - top)) // 2 - top)
    ImageDraw.Draw(layer).text(place, emoji.text, font=font, embedded_color=True)
    if layer.getbbox() is None:
        return None
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    return Image.alpha_composite(canvas, layer).convert("RGB")


def pictures(split: str, size: int, root: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pictures (N, size, size, 3) uint8, the same twice as large, and class ids.

    Training ones also mirrored, but for what could be read.

    Raises SettingError where the font, the list, or what renders sequences of code points is missing.
    """
    if not features.check("raqm"):
        raise SettingError("noto-emoji needs Pillow with raqm, as pip installs it: this one has none")
    path = find(FONT, root)
    try:
        font = ImageFont.truetype(io.BytesIO(path.read_bytes()), PIXELS)  # by a path that fails, Pillow looks elsewhere
    except OSError as error:
        raise SettingError(f"{path} holds no bitmaps of {PIXELS} pixels: take Debian's {FONT}") from error
    images: list[np.ndarray] = []
    large: list[np.ndarray] = []
    labels: list[int] = []
    seen: set[bytes] = set()
    for item in without_most_tones(read_list(find(LIST, root).read_text("utf-8").splitlines())):
        if (picture := render(font, item)) is None:
            continue
        sizes = [np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)) for side in (size, 2 * size)]
        readable = NAMES[item.group] in READABLE
        copies, wide = ([found] if readable else [found, found[:, ::-1]] for found in sizes)
        found = {copy.tobytes() for copy in copies}
        if found & seen:  # some territories share a flag, and a left hand mirrored is a right one
            continue
        seen |= found
        if item.split == split:
            kept = len(copies) if split == "train" else 1
            images += copies[:kept]
            large += wide[:kept]
            labels += [item.group] * kept
    if not images:
        raise SettingError(f"{path} has none of the emoji of {find(LIST, root)}: take Debian's {FONT}")
    return np.stack(images), np.stack(large), labels


def place_at_random(large: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A picture (2 size, 2 size, 3) uint8 on white, made a little smaller and put anywhere -> (size, size, 3)."""
    side = int(rng.integers(round(SMALLEST * size), size + 1))
    left, top = rng.integers(size - side + 1, size=2)
    canvas = np.full((size, size, 3), 255, np.uint8)
    picture = Image.fromarray(large).resize((side, side), Image.Resampling.LANCZOS)
    canvas[top : top + side, left : left + side] = np.asarray(picture)
    return canvas
