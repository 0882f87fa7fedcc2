"""The slow loop that FAR's benchmark measures against gives FAR's own numbers: it differs in cost alone."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import randomise

from vgen.generators.far import FAR
from vgen.rng import SampleStreams
from vgen.samplers.next_frame import NextFrameSettings, next_frame


@pytest.fixture
def model() -> FAR:
    torch.manual_seed(0)
    size: dict[str, Any] = {"in_channels": 3, "side": 4, "patch_size": 2, "width": 32, "depth": 3, "heads": 2}
    return randomise(FAR(**size, rope_axes=(4, 6, 6), num_classes=3)).double().eval()


@pytest.fixture
def slow(model: FAR, load_script: Callable[[str], ModuleType]) -> Any:
    """The published loop around the same model."""
    return load_script("published_far").PublishedFAR(model)


@pytest.mark.parametrize("cached", [True, False])
def test_the_published_loop_samples_the_same_frames(model: FAR, slow: Any, cached: bool) -> None:
    context = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = NextFrameSettings(frames=6, steps=3, guidance_scale=1.5, cached=cached)
    runs = []
    for generator in (model, slow):
        rng = SampleStreams([5, 6])
        with torch.no_grad():
            steps = list(next_frame(generator, context, torch.tensor([0, 2]), None, 3, rng, settings))
        runs.append(torch.stack([step.tokens for step in steps]))
    assert torch.allclose(*runs, atol=1e-10, rtol=0)
    assert not torch.allclose(runs[0][-1, 0, 3:], runs[0][-1, 0, 2:3].expand(3, -1, -1, -1), atol=1e-3)
