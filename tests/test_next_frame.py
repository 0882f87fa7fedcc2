"""Next-frame sampling: the schedule of noise levels, the loop against plain ones, caching, guidance, exact laws."""

import gc
import math
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_video import SHAPE, Autoregression, Straight, Toy, normal
from torch import Tensor

from vgen.rng import BatchStream, SampleStreams
from vgen.samplers.next_frame import HISTORY_KEY, NextFrameSettings, branches, history_terms, next_frame
from vgen.samplers.schedules import flow_sigmas, level_rows, num_passes
from vgen.types import SettingError, Step

SEEDS = (5, 6)
MAKERS = [(1, 4, 1.0), (6, 4, 0), (6, 4, 1), (6, 4, 2.5), (6, 4, 4), (7, 3, 0.4), (5, 1, 1), (5, 1, 0)]


def sample(
    generator: Any,
    context: Tensor | None = None,
    labels: Any = None,
    actions: Any = None,
    seeds: Any = SEEDS,
    **settings: Any,
) -> list[Step]:
    """The steps of a run of six frames in four steps each, in float64."""
    context = torch.zeros(len(seeds), 0, *SHAPE, dtype=torch.float64) if context is None else context
    chosen = NextFrameSettings(**{"frames": 6, "steps": 4} | settings)
    labels, actions = (None if ids is None else torch.tensor(ids) for ids in (labels, actions))
    null = getattr(generator, "null_class", 0)
    return list(next_frame(generator, context, labels, actions, null, SampleStreams(seeds), chosen))


def last(*args: Any, **named: Any) -> Tensor:
    return sample(*args, **named)[-1].tokens


def noise_of(frame: int, seeds: Any = SEEDS, key: int = 0) -> Tensor:
    return SampleStreams(seeds).normal(SHAPE, key + frame).double()


def near(found: Tensor, wanted: Tensor, bound: float = 1e-12) -> bool:
    return found.shape == wanted.shape and float((found - wanted).abs().max()) < bound


# ---- schedules


def test_noise_levels_are_fars() -> None:
    """Evenly from 1000 to 1 on the scale of timesteps, in float64, then to float32; the last step goes to 0."""
    fifty = flow_sigmas(50)
    assert fifty.dtype == torch.float32 and len(fifty) == 51 and fifty[-1] == 0
    timesteps = 1000 * fifty
    assert timesteps[:3].tolist() == pytest.approx([1000, 979.6122, 959.2245], abs=5e-5)
    assert timesteps[48:50].tolist() == pytest.approx([21.3878, 1.0], abs=5e-5)
    exact = torch.tensor([1.0, 0.667, 0.334, 0.001, 0.0])
    assert torch.equal(flow_sigmas(4), exact)
    assert torch.equal(1000 * flow_sigmas(4), 1000 * exact)
    assert flow_sigmas(1).tolist() == [1, 0]
    assert flow_sigmas(4, 0.7).tolist() == pytest.approx([1, 0.9, 0.8, 0.7, 0]) and flow_sigmas(1, 0.7).tolist() == [
        1,
        0,
    ]
    with pytest.raises(SettingError, match="steps is 0"):
        flow_sigmas(0)


@pytest.mark.parametrize(("frames", "steps", "uncertainty"), MAKERS)
def test_every_frame_makes_all_steps_and_no_frame_overtakes(frames: int, steps: int, uncertainty: float) -> None:
    rows = list(level_rows(frames, steps, uncertainty))
    assert rows[0] == [steps] * frames and rows[-1] == [0] * frames
    assert len(rows) == steps + math.floor((frames - 1) * uncertainty) + 1 == num_passes(frames, steps, uncertainty) + 1
    for row in rows:
        assert row == sorted(row)
    made = [0] * frames
    for before, after in pairwise(rows):
        change = [a - b for a, b in zip(before, after, strict=True)]
        assert set(change) <= {0, 1} and any(change)
        made = [total + one for total, one in zip(made, change, strict=True)]
    assert made == [steps] * frames


def test_a_pyramid_by_hand() -> None:
    assert list(level_rows(3, 2, 1)) == [[2, 2, 2], [1, 2, 2], [0, 1, 2], [0, 0, 1], [0, 0, 0]]
    assert list(level_rows(3, 2, 0.5)) == [[2, 2, 2], [1, 1, 2], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(("frames", "steps", "uncertainty"), [(0, 4, 1), (3, 0, 0), (3, 4, 4.5), (3, 4, -1)])
def test_impossible_schedules_are_refused(frames: int, steps: int, uncertainty: float) -> None:
    with pytest.raises(SettingError):
        list(level_rows(frames, steps, uncertainty))


# ---- the loop


def plain_loop(
    generator: Toy, context: Tensor, steps: int, frames: int, sigma_min: float = 0.001, **conditions: Any
) -> Tensor:
    """FAR's sampling as plainly as it can be written: one frame after the other, everything evaluated anew."""
    sigmas = flow_sigmas(steps, sigma_min)
    for k in range(context.shape[1], frames):
        x = noise_of(k)[:, None]
        for now, after in pairwise(sigmas):
            times = torch.full((len(x), k + 1), -1.0)
            times[:, -1] = 1000 * now
            velocity = generator(torch.cat([context, x], 1), times, **conditions)[:, -1:]
            x = x + (after - now).double() * velocity
        context = torch.cat([context, x], 1)
    return context


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("given", [0, 1, 3])
def test_sampling_is_the_plain_loop(given: int, cached: bool) -> None:
    context = normal(2, given, *SHAPE)
    found = last(Toy(), context, cached=cached)
    assert near(found, plain_loop(Toy(), context, 4, 6))
    assert torch.equal(found[:, :given], context)
    assert near(last(Toy(), context, cached=cached, sigma_min=0.6), plain_loop(Toy(), context, 4, 6, sigma_min=0.6))


def test_steps_tell_what_they_did() -> None:
    context = normal(2, 2, *SHAPE)
    for settings in ({}, {"schedule": "pyramid", "uncertainty": 1.5}, {"schedule": "full-sequence"}):
        steps = sample(Toy(), context, **settings)
        spacing = NextFrameSettings(steps=4, **settings).spacing
        rows = [[0, 0, *row] for row in level_rows(4, 4, spacing)]
        assert [step.index for step in steps] == list(range(len(rows) - 1))
        assert {step.total for step in steps} == {len(rows) - 1}
        sigmas = flow_sigmas(4).flip(0)
        before = torch.cat([context, torch.stack([noise_of(k) for k in range(2, 6)], 1)], 1)
        for step, then, row in zip(steps, rows, rows[1:], strict=False):
            assert step.time is not None and torch.equal(step.time, sigmas[row].expand(2, -1))
            assert torch.equal(step.known, (torch.tensor(row) == 0).expand(2, -1))
            assert step.evaluations == step.index + 1
            still = torch.tensor([a == b for a, b in zip(then, row, strict=True)])
            assert torch.equal(step.tokens[:, still], before[:, still])  # bit for bit
            assert (step.tokens[:, ~still] != before[:, ~still]).all(-1).any()
            before = step.tokens
        assert bool(steps[-1].known.all())


def test_steps_are_never_changed_afterwards() -> None:
    context = normal(2, 1, *SHAPE)
    given = context.clone()
    found = []
    settings = NextFrameSettings(frames=4, steps=3, stabilization=0.1, history_guidance=1.5)
    for step in next_frame(Toy(), context, None, None, 0, SampleStreams(SEEDS), settings):
        found.append((step.tokens, step.tokens.clone()))
    assert all(torch.equal(now, then) for now, then in found)
    assert torch.equal(context, given) and torch.equal(found[-1][0][:, :1], given)


# ---- when frames start


@pytest.mark.parametrize("cached", [True, False])
def test_a_pyramids_limits_are_the_other_two_schedules(cached: bool) -> None:
    context = normal(2, 1, *SHAPE)
    one_by_one = last(Toy(), context, cached=cached)
    together = last(Toy(), context, cached=cached, schedule="full-sequence")
    assert near(last(Toy(), context, cached=cached, schedule="pyramid", uncertainty=4), one_by_one)
    assert near(last(Toy(), context, cached=cached, schedule="pyramid", uncertainty=0), together)
    assert not near(one_by_one, together, 1e-3)


def test_the_full_sequence_is_the_joint_sampler() -> None:
    x = torch.stack([noise_of(k) for k in range(6)], 1)
    for now, after in pairwise(flow_sigmas(4)):
        x = x + (after - now).double() * Toy()(x, torch.full((2, 6), 1000 * float(now)))
    assert near(last(Toy(), schedule="full-sequence"), x, 1e-6)  # timesteps here in float64


@pytest.mark.parametrize("uncertainty", [0, 1, 1.5, 3, 4])
def test_nothing_ahead_matters(uncertainty: float) -> None:
    """A shorter video is the beginning of the longer one, whatever the schedule: attention and noise are causal."""
    context = normal(2, 1, *SHAPE)
    for cached in (True, False):
        settings: dict[str, Any] = {"schedule": "pyramid", "uncertainty": uncertainty, "cached": cached}
        longer, shorter = (last(Toy(), context, frames=frames, **settings) for frames in (6, 4))
        assert near(longer[:, :4], shorter)


@pytest.mark.parametrize("uncertainty", [0, 0.5, 1, 2.7, 5])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_straight_path_is_followed_to_its_end(uncertainty: float, steps: int) -> None:
    truth = normal(2, 6, *SHAPE, seed=3)
    settings: dict[str, Any] = {"schedule": "pyramid", "uncertainty": min(uncertainty, steps), "steps": steps}
    assert near(last(Straight(truth), truth[:, :2], **settings), truth, 1e-5)  # float32 levels, divided by 0.001


# ---- caching


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"context_window": 2},
        {"slope": 0.3},
        {"schedule": "full-sequence"},
        {"schedule": "pyramid", "uncertainty": 1},
        {"schedule": "pyramid", "uncertainty": 2.5, "context_window": 1},
        {"stabilization": 0.05},
        {"history_guidance": 1.5},
        {"history_guidance": 2.0, "history_noise": 0.4, "stabilization": 0.02, "guidance_scale": 3.0},
        {"history_guidance": 1.5, "history_noise": 0.4, "schedule": "pyramid", "uncertainty": 1.5},
    ],
)
@pytest.mark.parametrize("given", [0, 2])
def test_cached_and_uncached_sampling_agree(given: int, settings: dict[str, Any]) -> None:
    conditions: dict[str, Any] = {"labels": [0, 2], "actions": [[0, 1, 2, 1, 0, 1], [2, 2, 1, 0, 0, 1]]}
    context = normal(2, given, *SHAPE)
    found, wanted = (
        [step.tokens for step in sample(Toy(3), context, **conditions, **settings, cached=cached)]
        for cached in (True, False)
    )
    assert all(near(a, b) for a, b in zip(found, wanted, strict=True))
    if settings and "schedule" not in settings:
        assert not near(found[-1], last(Toy(3), context, **conditions), 1e-3)  # the setting does something


def test_a_finished_frame_is_evaluated_once_along_with_the_next() -> None:
    toy = Toy()
    sample(toy, normal(2, 2, *SHAPE), frames=5, steps=3)
    calls = [(call["start"], call["count"], call["keep"]) for call in toy.calls]
    assert calls[:3] == [(0, 3, 2), (2, 1, 0), (2, 1, 0)]
    assert calls[3:6] == [(2, 2, 1), (3, 1, 0), (3, 1, 0)]
    assert calls[6:] == [(3, 2, 1), (4, 1, 0), (4, 1, 0)]
    fresh = Toy()
    sample(fresh, frames=3, steps=2)
    assert [(call["start"], call["count"], call["keep"]) for call in fresh.calls] == [
        (0, 1, 0), (0, 1, 0), (0, 2, 1), (1, 1, 0), (1, 2, 1), (2, 1, 0)
    ]  # fmt: skip


def test_a_pyramid_evaluates_the_frames_at_work_alone() -> None:
    toy = Toy()
    steps = sample(toy, normal(2, 1, *SHAPE), frames=5, steps=4, schedule="pyramid", uncertainty=2)
    assert len(steps) == 4 + 6
    assert max(call["count"] - call["keep"] for call in toy.calls) == 2  # 4 / 2
    assert sum(call["count"] - call["keep"] for call in toy.calls) == 4 * 4
    assert sum(call["keep"] for call in toy.calls) == 4  # all but the last two, which end together with the run
    times = [call["times"][0, call["keep"] :].tolist() for call in toy.calls]
    assert times[2] == pytest.approx([334, 1000], abs=1e-3) and all(one == sorted(one) for one in times)


def test_a_generator_with_a_window_is_cached_one_noisy_frame_at_a_time() -> None:
    for settings, cached in (
        ({}, True),
        ({"schedule": "pyramid", "uncertainty": 4}, True),
        ({"schedule": "pyramid", "uncertainty": 3}, False),
        ({"schedule": "full-sequence"}, False),
        ({"cached": False}, False),
    ):
        toy = Toy(context_patch_size=2)
        sample(toy, **settings)  # type: ignore[arg-type]
        assert bool(toy.caches) == cached


def test_a_run_closed_early_frees_its_cache() -> None:
    class Watched(Toy):
        def new_cache(self, *args: Any, **named: Any) -> Any:
            cache = super().new_cache(*args, **named)
            self.caches = [weakref.ref(cache)]
            return cache

    toy = Watched()
    context = torch.zeros(2, 0, *SHAPE, dtype=torch.float64)
    steps = next_frame(toy, context, None, None, 0, SampleStreams(SEEDS), NextFrameSettings(frames=3))
    next(steps)
    assert toy.caches[0]() is not None
    steps.close()
    gc.collect()
    assert toy.caches[0]() is None


# ---- noise


def test_a_row_of_a_batch_is_its_solo_run() -> None:
    together = last(Toy(3), labels=[0, 2], guidance_scale=2.0, history_guidance=1.5)
    alone = last(Toy(3), labels=[2], seeds=(6,), guidance_scale=2.0, history_guidance=1.5)
    assert near(together[1:], alone)
    assert torch.equal(together, last(Toy(3), labels=[0, 2], guidance_scale=2.0, history_guidance=1.5))
    for other in ({"labels": [1], "seeds": (6,)}, {"labels": [2], "seeds": (7,)}):
        assert not near(last(Toy(3), **other, guidance_scale=2.0, history_guidance=1.5), alone, 1e-3)


def test_noise_belongs_to_the_frame() -> None:
    """Frame k starts from the noise of key k, given frames or none."""
    for given in (0, 2):
        toy = Toy()
        sample(toy, normal(2, given, *SHAPE))
        starts = [call["latents"][:, -1] for call in toy.calls[::4]]
        for k, start in zip(range(given, 6), starts, strict=True):
            assert torch.equal(start, noise_of(k))


def test_a_torch_generator_draws_all_frames_at_once() -> None:
    context = normal(2, 2, *SHAPE)
    toy, settings = Toy(), NextFrameSettings(frames=5, steps=1)
    generator = torch.Generator().manual_seed(3)
    list(next_frame(toy, context, None, None, 0, BatchStream(generator, 2), settings))
    wanted = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(3)).double()
    assert all(torch.equal(call["latents"][:, -1], wanted[:, i]) for i, call in enumerate(toy.calls))


# ---- guidance


def test_guidance_of_one_is_the_conditional_run_and_costs_nothing() -> None:
    for conditions in ({"labels": [0, 2]}, {"actions": [[0, 1, 2, 1, 0, 1]] * 2}):
        toy = Toy(3)
        plain = last(toy, **conditions)
        assert {call["rows"] for call in toy.calls} == {2}
        assert near(last(Toy(3), **conditions, guidance_scale=1 + 1e-12), plain, 1e-9)
        assert not near(last(Toy(3), **conditions, guidance_scale=1.5), plain, 1e-3)
        null = {name: torch.full_like(torch.tensor(ids), 3).tolist() for name, ids in conditions.items()}
        assert near(last(Toy(3), **conditions, guidance_scale=0.0), last(Toy(3), **null))
    toy = Toy(3)
    last(toy, guidance_scale=4.0)
    assert {call["rows"] for call in toy.calls} == {2}  # nothing to guide by


def test_guidance_runs_the_null_row_first_over_the_same_frames() -> None:
    toy = Toy(3)
    sample(toy, normal(2, 1, *SHAPE), labels=[0, 2], actions=[[0, 1, 2, 1, 0, 1], [2] * 6], guidance_scale=2.0)
    for call in toy.calls:
        assert call["labels"].tolist() == [3, 3, 0, 2] and (call["actions"][:2] == 3).all()
        assert torch.equal(call["latents"][:2], call["latents"][2:])
        part = slice(call["start"], call["start"] + call["count"])
        assert call["actions"][2].tolist() == [0, 1, 2, 1, 0, 1][part]


def test_guidance_is_uncond_plus_scale_times_the_difference() -> None:
    """In one step from pure noise, by hand."""
    labels = torch.tensor([0, 2])
    noise, times = noise_of(0)[:, None], torch.full((2, 1), 1000.0)
    cond, uncond = Toy(3)(noise, times, labels), Toy(3)(noise, times, torch.tensor([3, 3]))
    found = last(Toy(3), labels=[0, 2], guidance_scale=2.5, steps=1, frames=1)
    assert near(found, noise - (uncond + 2.5 * (cond - uncond)))


# ---- the history


def test_history_terms_merge_and_vanish() -> None:
    assert history_terms((1.0, 0.0)) == {0.0: 1.0}
    assert history_terms((1.0, 0.0), (0.5, 0.0)) == history_terms((1.5, 0.0)) == {1.0: -0.5, 0.0: 1.5}
    assert history_terms((1.0, 0.0), (0.5, 0.3)) == {1.0: -0.5, 0.0: 1.0, 0.3: 0.5}
    assert history_terms((1.0, 0.0), (-1.0, 0.0)) == {1.0: 1.0}
    assert history_terms((1.0, 0.0), (0.5, 1.0)) == {0.0: 1.0}
    for guided in (True, False):
        found = branches(NextFrameSettings(guidance_scale=3.0, history_guidance=1.5, history_noise=0.2), guided)
        assert sum(branch.weight for branch in found) == pytest.approx(1) and len(found) == (6 if guided else 3)


def test_history_guidance_of_one_is_off_and_of_none_forgets() -> None:
    context = normal(2, 2, *SHAPE)
    plain = last(Toy(), context)
    toy = Toy()
    assert torch.equal(last(toy, context, history_guidance=1.0, history_noise=0.5), plain)
    assert {call["rows"] for call in toy.calls} == {2}
    assert near(last(Toy(), context, history_guidance=1 + 1e-12), plain, 1e-9)
    toy = Toy()
    forgot = last(toy, context, history_guidance=0.0, cached=False)
    assert {call["rows"] for call in toy.calls} == {2}
    other = normal(2, 2, *SHAPE, seed=9)
    found = last(Toy(), other, history_guidance=0.0, cached=False)
    assert torch.equal(found[:, 2:], forgot[:, 2:])  # the context does not matter
    for call in toy.calls:
        past = call["times"][0, :-1]
        assert (past == 1000).all()
        for k in range(len(past)):
            assert torch.equal(call["latents"][:, k], noise_of(k, key=HISTORY_KEY))
            assert not near(call["latents"][:, k], noise_of(k), 1)  # which the frame itself started from


def test_history_guidance_by_hand() -> None:
    """One frame in one step: clean history, history at 0.3, and none."""
    context = normal(2, 2, *SHAPE)
    work = noise_of(2)[:, None]
    history_noise = torch.stack([noise_of(k, key=HISTORY_KEY) for k in range(2)], 1)

    def velocity(level: float) -> Tensor:
        past = (1 - level) * context + level * history_noise
        times = torch.tensor([[1000 * level if level else -1.0] * 2 + [1000.0]] * 2)
        return Toy()(torch.cat([past, work], 1), times)[:, -1:]

    settings: dict[str, Any] = {"frames": 3, "steps": 1, "history_guidance": 1.6}
    none, clean, some = velocity(1.0), velocity(0.0), velocity(0.3)
    assert near(last(Toy(), context, **settings)[:, 2:], work - (none + 1.6 * (clean - none)))
    found = last(Toy(), context, **settings, history_noise=0.3)[:, 2:]
    assert near(found, work - (none + (clean - none) + 0.6 * (some - none)), 1e-6)  # timesteps are float32


def test_stabilisation_labels_generated_frames_alone() -> None:
    context = normal(2, 2, *SHAPE)
    toy = Toy()
    found = sample(toy, context, stabilization=0.02, cached=False)
    for step, call in zip(found, toy.calls, strict=True):
        frame = call["count"] - 1
        wanted = [-1.0, -1.0] + [20.0] * (frame - 2)
        assert call["times"][0, :-1].tolist() == pytest.approx(wanted)
        assert torch.equal(call["latents"][:, :2], context)
        assert torch.allclose(call["latents"][:, 2:-1], 0.98 * step.tokens[:, 2:frame], rtol=0, atol=1e-12)
    assert torch.equal(found[-1].tokens[:, :2], context)


# ---- exact laws


@pytest.mark.parametrize("a", [0.0, 0.6])
def test_autoregressive_sampling_has_the_law_of_a_gaussian_process(a: float) -> None:
    """Each pixel of each frame is a chain of its own: 20,000 of them, against the covariance a^|i - j|."""
    context = torch.zeros(1, 0, 1, 100, 200, dtype=torch.float64)
    settings = NextFrameSettings(frames=4, steps=300, cached=False)  # Euler's own error: 0.06 at 60 steps
    steps = list(next_frame(Autoregression(a), context, None, None, 0, SampleStreams([1]), settings))
    found = steps[-1].tokens.reshape(4, -1)
    steps_apart = torch.arange(4.0)
    wanted = a ** (steps_apart[:, None] - steps_apart).abs()
    assert found.mean(1).abs().max() < 0.03  # four standard errors
    assert (torch.cov(found) - wanted).abs().max() < 0.03


def test_a_pyramid_weakens_the_link_between_neighbours_the_less_the_further_apart_frames_start() -> None:
    """Frames are denoised against noisy predecessors: measured 0.31, 0.39, 0.48, 0.57, 0.59 of 0.6 at 300 steps."""
    context = torch.zeros(1, 0, 1, 100, 200, dtype=torch.float64)
    links = []
    for uncertainty in (0, 6, 15, 30, 60):
        settings = NextFrameSettings(frames=4, steps=60, schedule="pyramid", uncertainty=uncertainty, cached=False)
        steps = list(next_frame(Autoregression(0.6), context, None, None, 0, SampleStreams([1]), settings))
        covariance = torch.cov(steps[-1].tokens.reshape(4, -1))
        assert (covariance.diagonal() - 1).abs().max() < 0.2
        links.append(float(covariance.diagonal(1).mean()))
    assert links == sorted(links) and links[0] == pytest.approx(0.3, abs=0.05) and links[-1] > 0.55


def test_a_long_run_through_a_sliding_window_does_not_drift() -> None:
    """Four times as many frames as are seen at once; a frame of this process needs one other."""
    context = torch.zeros(1, 0, 1, 40, 50, dtype=torch.float64)
    settings = NextFrameSettings(frames=16, steps=150, context_window=4, cached=False)
    steps = list(next_frame(Autoregression(0.8), context, None, None, 0, SampleStreams([1]), settings))
    found = steps[-1].tokens.reshape(16, -1)
    assert found.isfinite().all()
    assert (found.var(1) - 1).abs().max() < 0.12
    assert ((found[1:] * found[:-1]).mean(1) - 0.8).abs().max() < 0.08
