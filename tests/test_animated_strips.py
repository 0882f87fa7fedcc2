"""The animation of how each family makes its pictures."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import vgen


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("animated_strips")


@pytest.mark.parametrize("steps", [1, 5, 12, 49])
def test_rows_of_any_length_take_the_same_time(script: ModuleType, steps: int) -> None:
    row = [torch.tensor(i) for i in range(steps)]
    shown = [int(script.at(row, tick)) for tick in range(script.TICKS + script.REST)]
    assert shown[0] == 0 and shown == sorted(shown)
    assert set(shown[script.TICKS :]) == {steps - 1}
    if steps <= script.TICKS:
        assert set(shown) == set(range(steps))  # every step is seen


def test_the_animation_ends_with_what_the_model_makes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "ROWS", {"fashion-var": "next scale"})
    script.main(seed=3, out=tmp_path / "strips.gif")
    pipe = vgen.load("fashion-var")
    wanted = pipe(list(range(10)), seeds=list(range(3, 13))).images
    strip = script.strip(pipe, 3)
    assert len(strip) == 5 and strip[0].shape == (10, 3, 64, 64)
    assert torch.equal(strip[-1][:, :, 4:60:2, 4:60:2], torch.stack([_pixels(image) for image in wanted]))
    with Image.open(tmp_path / "strips.gif") as animation:
        assert animation.n_frames == 5 and animation.info["loop"] == 0
        animation.seek(4)
        last = _pixels(animation.convert("RGB")).float()
    assert (last - _pixels(script.frame({"fashion-var": strip[-1]})).float()).abs().mean() < 8  # of few colours


def _pixels(image: Image.Image) -> torch.Tensor:
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(height, width, 3).permute(2, 0, 1)
