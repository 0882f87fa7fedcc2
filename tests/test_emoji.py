"""Noto's emoji as a data set: what is read from Unicode's list, splits that no variant crosses, and pictures."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from vgen.data import BUILT_IN, open_source
from vgen.emoji import (
    FONT,
    LIST,
    NAMES,
    PLACES,
    TONES,
    Emoji,
    find,
    pictures,
    place_at_random,
    read_list,
    render,
    without_most_tones,
)
from vgen.evaluation.images import open_images
from vgen.types import SettingError

LINES = """
# group: Smileys & Emotion
# subgroup: face-smiling
1F600      ; fully-qualified     # x E1.0 grinning face
263A FE0F  ; fully-qualified     # x E0.6 smiling face
263A       ; unqualified         # x E0.6 smiling face
# group: Component
1F3FB      ; component           # x E1.0 light skin tone
# group: Flags
1F1E9 1F1EA ; fully-qualified    # x E0.6 flag: Germany
""".splitlines()
RUNNER, MAN, SIGN = 0x1F3C3, 0x1F468, (0x200D, 0x2642, 0xFE0F)
HERE = all(any((Path(place) / name).is_file() for place in PLACES[name]) for name in (FONT, LIST))
installed = pytest.mark.skipif(not HERE, reason="Debian's fonts-noto-color-emoji and unicode-data are not installed")


def test_fully_qualified_emoji_are_read_with_their_group() -> None:
    found = read_list(LINES)
    assert [item.codes for item in found] == [(0x1F600,), (0x263A, 0xFE0F), (0x1F1E9, 0x1F1EA)]
    assert [NAMES[item.group] for item in found] == ["smileys", "smileys", "flags"]
    assert found[0].text == "\N{GRINNING FACE}"


def test_variants_of_a_subject_are_in_one_split() -> None:
    variants = [(RUNNER,), (RUNNER, 0x1F3FD), (RUNNER, *SIGN), (RUNNER, 0x1F3FF, 0x200D, 0x2640, 0xFE0F)]
    assert len({Emoji(codes, 1).subject for codes in variants}) == 1
    assert len({Emoji(codes, 1).split for codes in variants}) == 1
    farmers = [(person, *tone, 0x200D, 0x1F33E) for person in (MAN, 0x1F469, 0x1F9D1) for tone in ((), (0x1F3FB,))]
    assert len({Emoji(codes, 1).subject for codes in farmers}) == 1
    assert Emoji(farmers[0], 1).subject != Emoji((MAN, 0x200D, 0x1F373), 1).subject  # a cook
    splits = Counter(Emoji((code,), 0).split for code in range(0x1F000, 0x1F000 + 4000))
    assert 150 < splits["test"] < 250  # a twentieth, three standard deviations


def test_of_skin_tones_one_is_kept_beside_none() -> None:
    runners = [Emoji((RUNNER,), 1), *(Emoji((RUNNER, tone), 1) for tone in TONES)]
    couple = [Emoji((MAN, a, 0x200D, 0x1F91D, 0x200D, MAN, b), 1) for a in TONES for b in TONES]
    kept = without_most_tones([*runners, *couple])
    assert kept[0] == runners[0] and len([item for item in kept if item.subject == (RUNNER,)]) == 2
    pairs = [item for item in kept if len(item.codes) == 7]
    assert len(pairs) == 1 and len(pairs[0].tones) == 1  # both of one tone
    tones = Counter(next(iter(item.tones)) for code in range(500) for item in _kept(code))
    assert len(tones) == 5 and min(tones.values()) > 60  # 100 each, over four standard deviations


def _kept(code: int) -> list[Emoji]:
    return without_most_tones([Emoji((code, tone), 1) for tone in TONES])


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLACES, FONT, ())
    with pytest.raises(SettingError, match=r"needs NotoColorEmoji\.ttf.*install Debian's fonts-noto-color-emoji"):
        open_source("noto-emoji", "train", 32, 3, tmp_path)
    (tmp_path / "noto-emoji").mkdir()
    (tmp_path / "noto-emoji" / FONT).write_bytes(b"no font")
    assert find(FONT, tmp_path).parent.name == "noto-emoji"
    with pytest.raises(SettingError, match="holds no bitmaps of 109 pixels"):
        open_source("noto-emoji", "train", 32, 3, tmp_path)
    with pytest.raises(SettingError, match=r"in colour, but one channel was asked for: --set model.image_channels=3"):
        open_source("noto-emoji", "train", 32, 1, tmp_path)


@installed
def test_pictures_are_what_the_font_shows(tmp_path: Path) -> None:
    from PIL import ImageFont

    font = ImageFont.truetype(find(FONT, tmp_path), 109)
    assert render(font, Emoji((ord("\N{FIRE}"), 0x1F9EF, 0x1F9EF), 0)) is None  # three pictures, not one
    assert render(font, Emoji((0x10FFFD,), 0)) is None
    heart = render(font, Emoji((0x2764, 0xFE0F), 0))
    assert heart is not None and heart.size == (136, 136)
    middle, corner = heart.getpixel((68, 60)), heart.getpixel((1, 1))
    assert middle[0] > 180 > 2 * middle[2] and corner == (255, 255, 255)  # type: ignore[index]


@installed
def test_splits_are_whole_mirrored_where_nothing_is_read_and_share_no_picture(tmp_path: Path) -> None:
    train, _, labels = pictures("train", 32, tmp_path)
    test, _, test_labels = pictures("test", 32, tmp_path)
    assert train.shape[1:] == (32, 32, 3) and len(train) == len(labels) > 3000 and len(test) > 60
    assert set(labels) == set(test_labels) == set(range(9))
    flags = train[np.array(labels) == NAMES.index("flags")]
    animals = train[np.array(labels) == NAMES.index("animals")]
    assert np.array_equal(animals[0][:, ::-1], animals[1]) and not np.array_equal(flags[0][:, ::-1], flags[1])
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in test)
    source = open_source("noto-emoji", "test", 32, 3, tmp_path)
    assert torch.equal(source.images([0])[0].permute(1, 2, 0), torch.from_numpy(test[0]))
    assert source.class_names == NAMES == BUILT_IN["noto-emoji"].class_names
    assert len(open_images("noto-emoji:test", data_root=tmp_path)) == len(test)


@installed
def test_placed_at_random_they_are_smaller_whole_and_elsewhere(tmp_path: Path) -> None:
    source = open_source("noto-emoji", "test", 32, 3, tmp_path)
    plain, placed, again = source.images(range(8)), source.images(range(8), 1), source.images(range(8), 1)
    assert placed.shape == plain.shape and placed.dtype == torch.uint8
    assert torch.equal(placed, again) and not torch.equal(placed, source.images(range(8), 2))
    assert torch.equal(source.images([3], 1)[0], placed[3])  # whatever stands beside it

    def extent(images: torch.Tensor) -> torch.Tensor:
        ink = (images.min(1).values < 200).flatten(0, 0)
        return torch.stack([ink.any(1).sum(1), ink.any(2).sum(1)])

    share = extent(placed) / extent(plain)
    assert (share > 0.7).all() and (share < 1.1).all() and share.std() > 0.01


def test_a_picture_is_placed_anywhere_and_never_cut() -> None:
    large = np.zeros((16, 16, 3), np.uint8)
    sides, corners = set(), set()
    for seed in range(60):
        ink = place_at_random(large, 8, np.random.default_rng(seed))[..., 0] < 128
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        assert len(rows) == len(columns) == rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1
        sides.add(len(rows))
        corners.add((rows[0], columns[0]))
    assert sides == {6, 7, 8} and len(corners) == 9
