"""Videos end to end: clips and actions in every form, outputs, the real generator's cache, requests, files, errors."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_video import clips, tiny_far, tiny_pipeline
from torch import Tensor

import vgen
from vgen.data import to_model_range
from vgen.pipelines.next_frame import NextFramePipeline
from vgen.rng import SampleStreams
from vgen.samplers.next_frame import NextFrameSettings, next_frame
from vgen.types import CheckpointError, Request, SettingError, Step

FAST: dict[str, Any] = {"frames": 5, "steps": 3}
CLIP = clips(1, 2)[0]
ACTIONS = [[0, 1, 2, 1, 0], [2, 2, 1, 0, 1]]


@pytest.fixture(scope="module")
def pipeline() -> NextFramePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def classes() -> NextFramePipeline:
    return tiny_pipeline(tiny_far(num_classes=3), id2label={0: "walk", 1: "run", 2: "jump"})


@pytest.fixture(scope="module")
def player() -> NextFramePipeline:
    return tiny_pipeline(tiny_far(num_actions=3))


def steps_of(pipeline: NextFramePipeline, labels: Any = None, seeds: Any = (5, 6), **settings: Any) -> list[Step]:
    return list(pipeline.stream(labels, seeds=list(seeds), **(FAST | settings)))


def latents_of(*args: Any, **named: Any) -> Tensor:
    return steps_of(*args, **named)[-1].tokens


def near(found: Tensor, wanted: Tensor, bound: float = 1e-5) -> bool:
    return found.shape == wanted.shape and float((found - wanted).abs().max()) < bound


# ---- what comes out


def test_the_call_gives_videos_in_every_form(pipeline: NextFramePipeline) -> None:
    out = {kind: pipeline(seeds=[1, 2], output_type=kind, **FAST) for kind in ("pil", "np", "pt", "latent")}
    assert all(output.images is None and output.seeds == [1, 2] for output in out.values())
    assert {output.evaluations for output in out.values()} == {15} and out["pt"].seconds > 0
    floats = out["pt"].frames
    assert floats.shape == (2, 5, 3, 8, 8) and floats.dtype == torch.float32
    assert 0 <= floats.min() < floats.max() <= 1
    assert out["np"].frames.shape == (2, 5, 8, 8, 3)
    assert np.array_equal(out["np"].frames, floats.permute(0, 1, 3, 4, 2).numpy())
    assert out["latent"].frames.shape == (2, 5, 4, 4, 4)
    assert all(torch.equal(output.tokens, out["latent"].frames) for output in out.values())
    assert torch.equal(pipeline.decode_floats(out["latent"].frames), floats)
    videos = out["pil"].frames
    assert [len(video) for video in videos] == [5, 5] and videos[0][0].size == (8, 8)
    pixels = np.stack([np.stack([np.asarray(frame) for frame in video]) for video in videos])
    assert np.array_equal(pixels, pipeline.decode(out["pt"].tokens).permute(0, 1, 3, 4, 2).numpy())


def test_every_step_can_be_seen(pipeline: NextFramePipeline) -> None:
    for schedule in ("autoregressive", "pyramid", "full-sequence"):
        steps = steps_of(pipeline, schedule=schedule)
        for step in (steps[0], steps[len(steps) // 2], steps[-1]):
            preview = pipeline.decode(step)
            assert preview.shape == (2, 5, 3, 8, 8) and preview.dtype == torch.uint8
        assert bool(steps[-1].known.all()) and not bool(steps[0].known.all())


def test_without_a_tokenizer_there_are_latents_only() -> None:
    bare = tiny_pipeline(tokenizer=False)
    assert bare(seeds=[1], output_type="latent", **FAST).frames.shape == (1, 5, 4, 4, 4)
    for kind in ("pil", "np", "pt"):
        with pytest.raises(SettingError, match="no tokenizer"):
            bare(seeds=[1], output_type=kind, **FAST)
    with pytest.raises(SettingError, match="no tokenizer"):
        bare(seeds=[1], output_type="latent", context=CLIP, **FAST)
    with pytest.raises(SettingError, match="output_type is 'mp4'"):
        bare(seeds=[1], output_type="mp4", **FAST)


def test_a_model_of_half_precision_keeps_its_latents_in_single() -> None:
    half = tiny_pipeline(tiny_far().to(torch.bfloat16))
    found = half(seeds=[1], output_type="pt", context=CLIP, **FAST)
    assert found.tokens.dtype == torch.float32 and bool(found.tokens.isfinite().all())
    assert torch.equal(found.tokens[:, :2], half.tokenizer.encode(to_model_range(CLIP))[None])


def test_no_gradients_are_recorded(pipeline: NextFramePipeline) -> None:
    with torch.enable_grad():
        assert not steps_of(pipeline, context=CLIP)[-1].tokens.requires_grad


# ---- noise and seeds


def test_each_video_equals_its_solo_run(classes: NextFramePipeline) -> None:
    settings: dict[str, Any] = {"context": clips(2, 2), "guidance_scale": 2.0, "history_guidance": 1.5}
    together = latents_of(classes, ["walk", "jump"], **settings)
    alone = latents_of(classes, ["jump"], (6,), **(settings | {"context": clips(2, 2)[1]}))
    assert near(together[1:], alone)
    assert torch.equal(together, latents_of(classes, ["walk", "jump"], **settings))
    assert not near(latents_of(classes, ["jump"], (7,), **(settings | {"context": clips(2, 2)[1]})), alone, 1e-2)
    assert not near(latents_of(classes, ["run"], (6,), **(settings | {"context": clips(2, 2)[1]})), alone, 1e-3)


def test_a_longer_video_begins_with_the_shorter_one(pipeline: NextFramePipeline) -> None:
    assert near(latents_of(pipeline, frames=8)[:, :5], latents_of(pipeline))


def test_the_noise_of_a_torch_generator_is_drawn_as_published(pipeline: NextFramePipeline) -> None:
    """All frames of all videos at once, in float32: (B, F - c, C, H, W)."""
    generator = torch.Generator().manual_seed(4)
    wanted = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    steps = list(pipeline.stream(generator=generator, context=CLIP, frames=5, steps=2))
    assert torch.equal(steps[0].tokens[:, 3:], wanted[:, 1:])  # frames that have not begun
    output = pipeline(generator=torch.Generator().manual_seed(4), output_type="latent", context=CLIP, frames=5, steps=2)
    assert output.seeds is None and torch.equal(output.tokens, steps[-1].tokens)


def test_random_seeds_are_reported(pipeline: NextFramePipeline) -> None:
    first, second = (pipeline(output_type="latent", **FAST) for _ in range(2))
    assert first.seeds and first.seeds != second.seeds
    assert torch.equal(pipeline(seeds=first.seeds, output_type="latent", **FAST).tokens, first.tokens)


# ---- the real generator, its cache and its window


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 2.0},
        {"context_window": 2},
        {"slope": 0.5},
        {"schedule": "pyramid", "uncertainty": 1},
        {"schedule": "pyramid", "uncertainty": 2, "context_window": 2},
        {"stabilization": 0.05},
        {"history_guidance": 1.5, "history_noise": 0.3},
    ],
)
@pytest.mark.parametrize("given", [0, 3])
def test_cached_and_uncached_videos_are_the_same(
    classes: NextFramePipeline, given: int, settings: dict[str, Any]
) -> None:
    context = {"context": clips(2, given)} if given else {}
    found, wanted = (
        latents_of(classes, ["walk", "run"], **(context | settings | {"frames": 7, "cached": cached}))
        for cached in (True, False)
    )
    assert near(found, wanted)


def test_schedules_have_the_other_two_as_limits(pipeline: NextFramePipeline) -> None:
    one_by_one, together = latents_of(pipeline), latents_of(pipeline, schedule="full-sequence")
    assert near(latents_of(pipeline, schedule="pyramid", uncertainty=3), one_by_one)
    assert near(latents_of(pipeline, schedule="pyramid", uncertainty=0), together)
    assert not near(one_by_one, together, 1e-3)


def test_a_constant_timestep_may_be_given_once(pipeline: NextFramePipeline) -> None:
    x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    single, each = (pipeline.generator(x, torch.full(shape, 500.0)) for shape in ((2,), (2, 3)))
    assert torch.equal(single, each)


@pytest.mark.parametrize("given", [0, 2, 5])
def test_a_window_of_full_resolution_is_crossed_cached_as_uncached(given: int) -> None:
    long = tiny_pipeline(tiny_far(context_patch_size=2, window=3, num_actions=3))
    actions = torch.randint(3, (2, 8), generator=torch.Generator().manual_seed(0))
    context = {"context": clips(2, given)} if given else {}
    settings: dict[str, Any] = context | {"frames": 8, "actions": actions, "guidance_scale": 1.5}
    found, wanted = (latents_of(long, **settings, cached=cached) for cached in (True, False))
    assert near(found, wanted)
    pyramid: dict[str, Any] = settings | {"schedule": "pyramid", "uncertainty": 1}
    assert bool(latents_of(long, **pyramid).isfinite().all())


def test_a_long_run_through_a_window_stays_finite(pipeline: NextFramePipeline) -> None:
    """Four times the window; the cache holds no more than it, the frame just finished and the one at work."""
    caches: list[Any] = []
    new_cache = pipeline.generator.new_cache
    pipeline.generator.new_cache = lambda *args: caches.append(new_cache(*args)) or caches[-1]
    try:
        found = latents_of(pipeline, frames=16, context_window=4)
    finally:
        del pipeline.generator.new_cache
    assert bool(found.isfinite().all()) and caches[0].keys.shape[3] <= 6 * 16
    assert near(found, latents_of(pipeline, frames=16, context_window=4, cached=False))


# ---- clips


def test_clips_come_back_as_the_tokenizer_gives_them(pipeline: NextFramePipeline) -> None:
    output = pipeline(seeds=[1], context=CLIP, output_type="pt", **FAST)
    assert near(output.frames[0, :2], CLIP / 255, 1e-6)
    assert output.evaluations == 9


def test_clips_are_taken_in_every_form(pipeline: NextFramePipeline) -> None:
    two = clips(2, 2)
    last = two.permute(0, 1, 3, 4, 2)
    pictures = [[Image.fromarray(frame.numpy()) for frame in clip] for clip in last]
    wanted = latents_of(pipeline, context=two)
    for form in (last, last.numpy(), two.numpy()[:, :, ::1], two / 255, (two / 255).double().numpy(), pictures):
        assert torch.equal(latents_of(pipeline, context=form), wanted)
    for form in (two[:, :, :1], last[..., :1].numpy(), [two[0], last[1].numpy()], [two[0].numpy(), pictures[1]]):
        assert torch.equal(latents_of(pipeline, context=form), wanted)
    assert torch.equal(latents_of(pipeline, context=last.numpy()[..., ::-1]), wanted)  # grey, with negative strides
    single = latents_of(pipeline, context=two[0])
    for form in (last[0], last[0].numpy(), pictures[0], two[:1], [two[0]]):
        assert torch.equal(latents_of(pipeline, context=form), single)
    assert torch.equal(single[0], wanted[0]) and not near(single[1], wanted[1], 1e-2)


def test_clips_without_seeds_make_as_many_videos(pipeline: NextFramePipeline, player: NextFramePipeline) -> None:
    output = pipeline(context=clips(3, 2), output_type="latent", **FAST)
    assert output.frames.shape[0] == 3 and output.seeds and len(set(output.seeds)) == 3
    seeded = pipeline(generator=torch.Generator().manual_seed(1), context=clips(3, 2), output_type="latent", **FAST)
    assert seeded.frames.shape[0] == 3
    assert player(actions=ACTIONS, output_type="latent", **FAST).frames.shape[0] == 2


def test_context_frames_takes_the_first_of_a_clip(pipeline: NextFramePipeline) -> None:
    four = clips(2, 4)
    assert torch.equal(latents_of(pipeline, context=four, context_frames=2), latents_of(pipeline, context=four[:, :2]))
    assert torch.equal(latents_of(pipeline, context=four, context_frames=0), latents_of(pipeline))


# ---- a model's own clips


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model with three clips of three frames, two of which it starts from."""
    place = tmp_path / "model"
    tiny_pipeline(settings={"context_frames": 2, "frames": 5, "steps": 3}).save_pretrained(place)
    np.savez(place / "context.npz", clips(3, 3)[:, :, :1].permute(0, 1, 3, 4, 2).numpy())
    return place


def test_a_models_own_clip_follows_from_the_seed(folder: Path) -> None:
    loaded = vgen.load(folder)
    assert isinstance(loaded, NextFramePipeline) and type(loaded.generator).__name__ == "FAR"
    found = loaded(seeds=[4, 0, 5], output_type="latent").tokens
    wanted = loaded.tokenizer.encode(to_model_range(clips(3, 3)[[1, 0, 2], :2]))
    assert torch.equal(found[:, :2], wanted)
    assert near(loaded(seeds=[5], output_type="latent").tokens, found[2:])
    given = loaded(seeds=[4], output_type="latent", context=clips(3, 3)[1], context_frames=2).tokens
    assert near(given, found[:1])
    assert loaded(seeds=[4], output_type="latent", context=clips(1, 4)[0]).tokens.shape[1] == 5  # all four of it
    nothing = loaded(seeds=[4], output_type="latent", context_frames=0).tokens
    assert near(nothing, tiny_pipeline()(seeds=[4], output_type="latent", **FAST).tokens)
    rows = loaded(generator=torch.Generator().manual_seed(0), output_type="latent").tokens
    assert torch.equal(rows[0, :2], loaded.tokenizer.encode(to_model_range(clips(3, 3)[0, :2])))
    with pytest.raises(SettingError, match="the model's clips have 3 frames"):
        loaded.stream(seeds=[4], context_frames=4)


def test_a_saved_model_keeps_its_clips(folder: Path, tmp_path: Path) -> None:
    loaded = vgen.load(folder)
    loaded.save_pretrained(tmp_path / "copy")
    loaded.save_pretrained(folder)  # over itself
    again = vgen.load(tmp_path / "copy")
    assert torch.equal(again(seeds=[4], output_type="latent").tokens, loaded(seeds=[4], output_type="latent").tokens)


def test_a_model_without_clips_asks_for_one() -> None:
    with pytest.raises(SettingError, match=r"context_frames is 2, and this model has no clips of its own"):
        tiny_pipeline(settings={"context_frames": 2}).stream(seeds=[1])


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": np.zeros((3, 3, 8, 8, 3))},
        {"arr_0": np.zeros((3, 8, 8, 3), np.uint8)},
        {"arr_0": np.zeros((3, 3, 9, 8, 3), np.uint8)},
        {"clips": np.zeros((3, 3, 8, 8, 3), np.uint8)},
        {"arr_0": np.array([{}], dtype=object)},
        None,
    ],
)
def test_damaged_clips_are_named(folder: Path, arrays: dict[str, Any] | None) -> None:
    if arrays is None:
        (folder / "context.npz").write_bytes(b"PK\x03\x04 and nothing more")
    else:
        np.savez(folder / "context.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"context\.npz holds no clips for this model") as caught:
        vgen.load(folder).stream(seeds=[1])
    assert "\n" not in str(caught.value)


# ---- actions and classes


def test_actions_reach_their_frames(player: NextFramePipeline) -> None:
    """Those of a frame change it and what comes after, and nothing before."""
    base = latents_of(player, actions=ACTIONS)
    other = [[*row[:3], (row[3] + 1) % 3, row[4]] for row in ACTIONS]
    changed = latents_of(player, actions=other)
    assert torch.equal(changed[:, :3], base[:, :3]) and not near(changed[:, 3], base[:, 3], 1e-3)
    shared = latents_of(player, actions=ACTIONS[0])
    assert torch.equal(shared[0], base[0]) and not near(shared[1], base[1], 1e-3)
    for form in (np.array(ACTIONS), torch.tensor(ACTIONS, dtype=torch.uint8)):
        assert torch.equal(latents_of(player, actions=form), base)
    guided = latents_of(player, actions=ACTIONS, guidance_scale=0.0)
    assert near(guided, latents_of(player))  # without actions: the null action


def test_actions_are_no_classes(player: NextFramePipeline) -> None:
    assert player.class_names == [] and player.null_class == 0
    for call in (lambda: player.stream([0], seeds=[1]), lambda: player.request([0], [1], None, {})):
        with pytest.raises(SettingError, match="it has no class 0"):
            call()


def test_guidance_of_classes(classes: NextFramePipeline) -> None:
    rows: list[int] = []
    hook = classes.generator.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    plain = latents_of(classes, ["walk", 2])
    assert set(rows) == {2}
    nearly = latents_of(classes, ["walk", 2], guidance_scale=1 + 1e-7)
    hook.remove()
    assert rows[-1] == 4 and near(nearly, plain)
    assert near(latents_of(classes, ["walk", 2], guidance_scale=0.0), latents_of(classes))
    assert not near(latents_of(classes), plain, 1e-3)


# ---- settings and requests


def test_defaults_are_the_models(pipeline: NextFramePipeline) -> None:
    assert pipeline.resolve_settings({}) == vars(NextFrameSettings()) | {"context_frames": 0}
    tuned = tiny_pipeline(settings={"frames": 9, "steps": 4, "stabilization": 0.02})
    found = tuned.resolve_settings({"steps": 2, "frames": None, "context_frames": None}, "next-frame")
    assert (found["frames"], found["steps"], found["stabilization"]) == (9, 2, 0.02)
    with pytest.raises(SettingError, match="frames is 0"):
        tiny_pipeline(settings={"frames": 0})


def test_a_request_repeats_the_run(classes: NextFramePipeline, player: NextFramePipeline) -> None:
    given: list[tuple[NextFramePipeline, Any, dict[str, Any]]] = [
        (classes, ["run", "jump"], {"guidance_scale": 2.0, "schedule": "pyramid", "uncertainty": 1.5}),
        (player, None, {"actions": ACTIONS}),
        (player, None, {"actions": np.array(ACTIONS[0])}),
    ]
    for pipeline, labels, settings in given:
        wanted = latents_of(pipeline, labels, **settings)
        request = Request.from_json(pipeline.request(labels, [5, 6], None, FAST | settings).to_json())
        assert request.sampler == "next-frame"
        for repeated, expected in ((request, wanted), (request.row(1), wanted[1:])):
            found = pipeline(
                repeated.class_labels,
                seeds=repeated.seeds,
                sampler=repeated.sampler,
                output_type="latent",
                **repeated.settings,
            )
            assert near(found.tokens, expected)


def test_a_request_says_which_clip_it_continues_but_does_not_hold_it(pipeline: NextFramePipeline) -> None:
    request = pipeline.request(None, [5], None, FAST | {"context": CLIP})
    assert json.loads(request.to_json())["settings"]["context_frames"] == 2
    assert request.settings["context"].startswith("sha256:") and len(request.settings["context"]) == 71
    other = pipeline.request(None, [5], None, FAST | {"context": clips(1, 2, seed=1)})
    assert other.settings["context"] != request.settings["context"]
    with pytest.raises(SettingError, match="give it again, as --context or context="):
        pipeline.stream(seeds=[5], **request.settings)
    found = list(pipeline.stream(seeds=[5], **(request.settings | {"context": CLIP})))[-1].tokens
    assert torch.equal(found, latents_of(pipeline, seeds=(5,), context=CLIP))


def test_settings_of_the_sampler_reach_it(pipeline: NextFramePipeline) -> None:
    """The pipeline adds nothing to the sampler's own loop."""
    context = pipeline.tokenizer.encode(to_model_range(CLIP))[None]
    chosen = NextFrameSettings(**FAST, schedule="pyramid", uncertainty=1.0, stabilization=0.1, slope=0.2)
    with torch.no_grad():
        *_, last = next_frame(pipeline.generator, context, None, None, 0, SampleStreams([5]), chosen)
    settings = {"schedule": "pyramid", "uncertainty": 1.0, "stabilization": 0.1, "slope": 0.2}
    assert torch.equal(latents_of(pipeline, None, (5,), context=CLIP, **settings), last.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, r"frames is 0: it must lie in 1\.\.100000"),
        ({"frames": 2.5}, "frames is 2.5: it must be a whole number"),
        ({"steps": 0}, r"steps is 0: it must lie in 1\.\.1000"),
        ({"schedule": "raster"}, "'autoregressive' or 'pyramid' or 'full-sequence'"),
        ({"schedule": "pyramid", "uncertainty": 4}, r"uncertainty is 4: it must lie in 0\.\.3, the number of steps"),
        ({"uncertainty": -1}, "uncertainty is -1"),
        ({"stabilization": 1.5}, "stabilization is 1.5"),
        ({"history_noise": math.nan}, "history_noise is nan"),
        ({"history_guidance": -1}, "history_guidance is -1"),
        ({"context_window": 0}, r"context_window is 0: it must lie in 1\.\.100000"),
        ({"slope": -0.1}, "slope is -0.1"),
        ({"cached": 1}, "cached is 1: it must be True or False"),
        ({"top_k": 3}, "unknown setting 'top_k'"),
        ({"sampler": "raster"}, "unknown sampler 'raster'"),
        ({"context": clips(1, 5)[0]}, "frames is 5, of which 5 are given: at least one must be left"),
        ({"context": clips(1, 7)[0]}, "frames is 5, of which 7 are given"),
        ({"context": CLIP, "context_frames": 3}, "context_frames is 3, but the clip has 2 frames"),
        ({"context_frames": -1}, "context_frames is -1"),
        ({"context": clips(3, 2)}, "there are 3 context clips for 2 videos"),
        ({"context": [CLIP, clips(1, 3)[0]]}, "clips of 2 and 3 frames"),
        ({"context": torch.zeros(2, 3, 9, 8)}, "this model takes"),
        ({"context": torch.zeros(3, 8, 8)}, r"a context clip has shape \(3, 8, 8\)"),
        ({"context": torch.zeros(2, 3, 8, 8).long()}, "context is torch.int64"),
        ({"context": torch.full((2, 3, 8, 8), 1.5)}, r"must lie in \[0, 1\]"),
        ({"context": torch.full((2, 3, 8, 8), torch.nan)}, r"must lie in \[0, 1\]"),
        ({"context": torch.zeros(0, 3, 8, 8)}, "there is no frame in it"),
        ({"context": []}, "context is a list"),
        ({"context": "clip.mp4"}, "context is a str"),
        ({"context": np.array([[[["a"]]]])}, "context is no tensor"),
        ({"context": [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]}, "a context frame is 8x9"),
        ({"actions": [0] * 5}, "this model knows no actions"),
        ({"class_labels": [0, 1]}, "unconditional, it has no class 0"),
        ({"seeds": [1], "generator": torch.Generator()}, "seeds and generator were both given"),
        ({"seeds": [-1]}, "seed -1"),
    ],
)
def test_what_cannot_be_is_refused_at_once(pipeline: NextFramePipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        pipeline.stream(**({"seeds": [1, 2]} | FAST | settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0] * 4, "there are 4 actions for 5 frames: give one for every frame"),
        ([[0] * 6] * 2, "there are 6 actions for 5 frames"),
        ([[0] * 5] * 3, "there are 3 rows of actions for 2 videos"),
        ([0, 1, 2, 3, 0], r"actions go from 0 to 3: they must lie in 0\.\.2"),
        ([0, 1, 2, -1, 0], "actions go from -1 to 2"),
        ([0.5] * 5, "give whole numbers, one per frame"),
        ([True] * 5, "give whole numbers, one per frame"),
        ([[[0] * 5]], "give whole numbers, one per frame"),
        ([[0, 1], [2]], "actions is no tensor|actions are no tensor"),
    ],
)
def test_wrong_actions_are_refused_at_once(player: NextFramePipeline, actions: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        player.stream(seeds=[1, 2], actions=actions, **FAST)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_window": 2}, "sees old frames coarsely"),
        ({"schedule": "full-sequence"}, "works on 5 frames at a time, of 5, and this model on 3 at most"),
        ({"schedule": "pyramid", "uncertainty": 0.5, "steps": 2}, "works on 4 frames at a time"),
        ({"schedule": "pyramid", "uncertainty": 2, "steps": 7}, "works on 4 frames at a time"),
        ({"stabilization": 0.02}, "beyond 3 frames this model knows clean ones only"),
        ({"history_guidance": 1.5}, "beyond 3 frames this model knows clean ones only"),
    ],
)
def test_what_a_window_forbids_is_refused_beyond_it_alone(settings: dict[str, Any], message: str) -> None:
    long = tiny_pipeline(tiny_far(context_patch_size=2, window=3), settings={"frames": 3})
    with pytest.raises(SettingError, match=message):
        long.stream(seeds=[1, 2], **(FAST | settings))
    if "context_window" not in settings:
        assert latents_of(long, **(settings | {"frames": 3})).shape[1] == 3


def test_more_than_memory_holds_is_refused_with_the_estimate(
    pipeline: NextFramePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = pipeline.chosen_settings({"frames": 10})
    parts = pipeline.needed_bytes(2, chosen)
    cache = pipeline.generator.new_cache(2, 10)
    assert parts["attention"] == 2 * cache.keys.nbytes  # keys and values
    assert pipeline.needed_bytes(2, chosen)["latents"] == 3 * 2 * 10 * 64 * 4
    windowed = pipeline.chosen_settings({"frames": 10, "context_window": 4})
    assert pipeline.needed_bytes(2, windowed)["attention"] == parts["attention"] * 6 // 10
    guided = pipeline.chosen_settings({"frames": 10, "guidance_scale": 2.0})
    assert pipeline.needed_bytes(2, guided, conditional=True)["attention"] == 2 * parts["attention"]
    assert pipeline.needed_bytes(2, guided)["attention"] == parts["attention"]
    long = tiny_pipeline(tiny_far(context_patch_size=2, window=3))
    assert long.needed_bytes(2, chosen)["attention"] == parts["attention"] * (3 * 16 + 7 * 4) // 160
    with pytest.raises(SettingError, match=r"2 videos of 100000 frames need about \d+\.\d GiB \(attention"):
        monkeypatch.setattr(NextFramePipeline, "_free_bytes", lambda self: 1 << 30)
        pipeline.stream(seeds=[1, 2], frames=100_000)
    monkeypatch.setattr(NextFramePipeline, "_free_bytes", lambda self: sum(parts.values()))
    pipeline.stream(seeds=[1, 2], frames=10)
    monkeypatch.setattr(NextFramePipeline, "_free_bytes", lambda self: sum(parts.values()) - 1)
    with pytest.raises(SettingError, match="take fewer frames or videos, or a context_window"):
        pipeline.stream(seeds=[1, 2], frames=10)


def test_guidance_needs_memory_for_both_branches(classes: NextFramePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = FAST | {"guidance_scale": 2.0}
    enough = sum(classes.needed_bytes(1, classes.chosen_settings(settings)).values())
    monkeypatch.setattr(NextFramePipeline, "_free_bytes", lambda self: enough)
    classes.stream(seeds=[1], **settings)
    with pytest.raises(SettingError, match="1 videos of 5 frames need about"):
        classes.stream(["run"], seeds=[1], **settings)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingError, match="latent is 4x4x4 against 2x4x4"):
        tiny_pipeline(tiny_far(in_channels=2))


def test_a_video_cannot_be_repainted(pipeline: NextFramePipeline) -> None:
    with pytest.raises(SettingError, match="makes videos, which cannot be repainted"):
        pipeline.edit(Image.new("RGB", (8, 8)), torch.ones(8, 8))
