"""Parity with the published FAR sampler: videos from synthetic weights (float32, CPU), cached and not."""

from typing import Any

import pytest
import torch
from test_golden_far import LONG, assert_figures, golden_input, golden_model
from torch import Tensor

from vgen.samplers.next_frame import NextFrameSettings, next_frame

NOISE = golden_input("noise", 2, 4, 4, 4, 4)
SIX = [[0, 1, 2, 1, 0, 2], [2, 2, 1, 2, 0, 1]]
SEVEN = [[0, 1, 2, 1, 0, 2, 1], [2, 2, 1, 2, 0, 1, 0]]


class Given:
    """Noise that is not drawn: frame k of the run has slice k."""

    def __init__(self, first: int) -> None:
        self.first = first

    def normal(self, shape: Any, key: int) -> Tensor:
        return NOISE[:, key - self.first]

    exponential = normal


@torch.no_grad()
def sampled(
    published: dict[str, Any],
    context: Tensor,
    labels: list[int] | None = None,
    actions: list[list[int]] | None = None,
    frames: int | None = None,
    **settings: Any,
) -> Tensor:
    """Latents (2, F, 4, 4, 4) in four steps a frame."""
    model = golden_model(published, **({"window": 2} if published == LONG else {}))
    given = context.shape[1]
    chosen = NextFrameSettings(frames=frames or given + 4, steps=4, **settings)
    ids = [None if values is None else torch.tensor(values) for values in (labels, actions)]
    actions_of = None if ids[1] is None else ids[1][:, : chosen.frames]
    *_, last = next_frame(model, context, ids[0], actions_of, model.null_class, Given(given), chosen)
    return last.tokens


NOTHING = torch.zeros(2, 0, 4, 4, 4)
TWO, THREE = golden_input("ctx", 2, 2, 4, 4, 4), golden_input("ctx3", 2, 3, 4, 4, 4)
S1 = [-2.90915, -4.31824, 2.26197, -0.76918, -2.56169, -3.55571, -2.59982, 2.63779]
S2 = [0.75101, 0.03894, -0.65166, -1.3208, 1.49562, 0.8694, 0.26465, -0.31865]
S3 = [-3.87255, -5.60317, 1.73235, -1.87585, -3.82405, -5.00217, -4.43538, 1.84671]
S5 = [1.15464, 0.44258, -0.24803, -0.91717, -1.56485, 1.27303, 0.66828, 0.08498]
S6 = [-3.22573, -4.54067, 2.47863, -0.06115, -2.23007, -3.47037, -2.66952, 2.66914]
both = pytest.mark.parametrize("cached", [True, False])


@both
def test_from_nothing(cached: bool) -> None:
    found = sampled({}, NOTHING, cached=cached)
    assert_figures(found, [-0.211362, 1.758015, 47.56668], S1, [0.00319, 0.1043, 0.51936, -0.44159])


@both
def test_on_from_a_clip(cached: bool) -> None:
    found = sampled({}, TWO, cached=cached)
    assert torch.equal(found[:, :2], TWO)
    assert_figures(found, [-0.145789, 1.465822, 50.1972], S2, [-0.00962, 0.06523, 0.51114, -0.42233])


@both
def test_of_classes_with_guidance(cached: bool) -> None:
    found = sampled({"classes": 5}, NOTHING, labels=[2, 4], guidance_scale=2.0, cached=cached)
    assert_figures(found, [-0.727711, 2.62765, 68.74683], S3, [-1.33365, 0.12661, 0.44324, -1.47177])


@both
def test_far_long_crossing_its_window(cached: bool) -> None:
    found = sampled(LONG, TWO, actions=SIX, guidance_scale=1.5, cached=cached)
    assert_figures(found, [-0.099241, 1.362208, 46.29293], S2, [0.89059, -0.18717, -0.06185, -0.25845])


@both
def test_far_long_from_beyond_its_window(cached: bool) -> None:
    found = sampled(LONG, THREE, actions=SEVEN, guidance_scale=1.5, cached=cached)
    assert_figures(found, [-0.150208, 1.330235, 49.55354], S5, [1.83165, 0.46857, -0.35017, -0.81526])


@both
def test_far_long_from_nothing(cached: bool) -> None:
    found = sampled(LONG, NOTHING, actions=SEVEN, cached=cached)
    assert_figures(found, [-0.065629, 1.6616, 43.89303], S6, [-0.37889, -0.29128, 0.0843, -0.85278])
