"""The script that judges predictions: its figures are what their names say."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_mnist
from torch import Tensor, nn

from vgen.moving import MovingDigits


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("video_prediction")


def clips(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_errors_are_those_of_openstl(script: ModuleType) -> None:
    """Summed over pixels, means over clips; by frame."""
    found, truth = clips(0, 3, 2, 16, 16), clips(1, 3, 2, 16, 16)
    errors = script.errors(found, truth)
    for frame in range(2):
        pairs = [(found[k, frame].double().numpy(), truth[k, frame].double().numpy()) for k in range(3)]
        squares = [((a - b) ** 2) for a, b in pairs]
        assert errors["mse"][frame] == pytest.approx(np.mean([s.sum() for s in squares]), rel=1e-5)
        assert errors["mae"][frame] == pytest.approx(np.mean([np.abs(a - b).sum() for a, b in pairs]), rel=1e-5)
        assert errors["psnr"][frame] == pytest.approx(np.mean([-10 * np.log10(s.mean()) for s in squares]), rel=1e-5)
        assert errors["ssim"][frame] == pytest.approx(np.mean([ssim(a, b) for a, b in pairs]), abs=1e-5)
    perfect = script.errors(truth, truth)
    assert perfect["mse"] == [0, 0] and perfect["ssim"] == pytest.approx([1, 1])


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 over windows of 7 x 7, sample covariances, for a range of 2."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    wa, wb = (np.lib.stride_tricks.sliding_window_view(x, (7, 7)).reshape(-1, 49) for x in (a, b))
    ma, mb = wa.mean(1), wb.mean(1)
    va, vb = wa.var(1, ddof=1), wb.var(1, ddof=1)
    cov = ((wa - ma[:, None]) * (wb - mb[:, None])).sum(1) / 48
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_the_best_sample_is_chosen_for_each_clip(script: ModuleType) -> None:
    truth = clips(0, 2, 3, 4, 4)
    near, far = truth + 0.1, truth + 0.5
    samples = torch.stack([torch.stack([near[0], far[1]]), torch.stack([far[0], near[1]])])
    assert torch.equal(script.best(samples, truth), near)


def test_baselines_are_made_of_given_frames_alone(script: ModuleType) -> None:
    given = clips(0, 2, 5, 4, 4)
    found = script.baselines(given, 3)
    assert tuple(found) == script.BASELINES and all(x.shape == (2, 2, 4, 4) for x in found.values())
    last, mean, black = found.values()
    assert torch.equal(last[:, 1], given[:, 2]) and not black.any()
    assert torch.allclose(mean[:, 0], given[:, :3].mean(1))
    changed = given.clone()
    changed[:, 3:] = 0
    assert all(torch.equal(a, b) for a, b in zip(script.baselines(changed, 3).values(), found.values(), strict=True))


class Corner(nn.Module):
    """Sees digit 7 where the middle of a cut is bright."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (1, 28, 28) and float(images.min()) >= -1
        bright = images[:, 0, 12:16, 12:16].mean((1, 2)) > 0.9
        return nn.functional.one_hot(torch.where(bright, 7, 0), 10).float()


def test_digits_are_judged_where_they_are(script: ModuleType) -> None:
    """A bright square is in the middle of its cut wherever it stands, at the edge too."""
    frames = torch.zeros(1, 4, 64, 64)
    for number, (top, left) in enumerate(((0, 0), (30, 11), (58, 58), (5, 40))):
        frames[0, number, top : top + 6, left : left + 6] = 1
    assert script.agreement(Corner(), frames, torch.tensor([7])) == [1, 1, 1, 1]
    assert script.agreement(Corner(), frames, torch.tensor([3])) == [0, 0, 0, 0]
    assert script.agreement(Corner(), torch.zeros(1, 1, 64, 64), torch.tensor([7])) == [0]


class Echo:
    """Repeats the last frame given, a little brighter for odd seeds."""

    config: dict[str, Any] = {"settings": {}}  # noqa: RUF012

    def __call__(self, context: Any, context_frames: int, frames: int, seeds: list[int], **others: Any) -> Any:
        assert context.shape[1] == context_frames and context.dtype == np.uint8
        given = torch.from_numpy(context).movedim(-1, 2).float() / 255
        more = given[:, -1:].expand(-1, frames - context_frames, -1, -1, -1)
        odd = torch.tensor([seed % 2 for seed in seeds])[:, None, None, None, None]
        return type("Out", (), {"frames": torch.cat([given, more + 0.1 * odd], 1)})


def test_rollouts_are_of_the_clips_asked_for(script: ModuleType, tmp_path: Path) -> None:
    write_mnist(tmp_path, name="MNIST")
    kind = script.Kind("one", 1, 3, 4)
    truth, labels = kind.clips(str(tmp_path), 5)
    source = MovingDigits(tmp_path, "test", 64, digits=1, frames=7, seed=script.SEED)
    assert torch.equal(truth, source.clips(range(5))[0][:, :, 0] / 255) and labels.shape == (5, 1)
    found = script.rollouts(Echo(), truth, kind, samples=2)
    assert found.shape == (2, 5, 4, 64, 64)
    assert torch.allclose(found[0, :, 2], truth[:, 2], atol=1e-6)  # seeds 0, 2, ...
    assert torch.allclose(found[1], found[0] + 0.1, atol=1e-6)  # and 1, 3, ...
