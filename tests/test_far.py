"""FAR and FAR-Long: what sees what, the cache against the whole, two copies against both, and sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import randomise
from torch import Tensor

from vgen import layers
from vgen.generators import frame_attention, frame_blocks
from vgen.generators.far import FAR
from vgen.generators.frame_attention import FrameRuns, causal_spans, two_copies_mask
from vgen.types import SettingError

TINY: dict[str, Any] = {
    "in_channels": 3,
    "side": 4,
    "patch_size": 2,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "rope_axes": (4, 6, 6),
}
LONG: dict[str, Any] = {"context_patch_size": 4, "window": 3}
CLASSES, ACTIONS = torch.tensor([2, 0]), torch.tensor([[0, 1, 2, 1, 0, 2, 1, 0], [2, 2, 1, 3, 0, 1, 3, 2]])


def tiny_far(**changes: Any) -> FAR:
    """Two blocks of width 32 on latents of 3 x 4 x 4: frames of four tokens, or of a single coarse one."""
    model = randomise(FAR(**(TINY | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q", "norm_k")):
            parameter.add_(1.5)  # attention that is far from uniform
    return model


@pytest.fixture(params=["short", "long"])
def model(request: pytest.FixtureRequest) -> FAR:
    return tiny_far(**(LONG if request.param == "long" else {})).double()


@pytest.fixture(params=["one mask", "frame by frame"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of attending to many frames."""
    if request.param == "frame by frame":
        monkeypatch.setattr(frame_attention, "DENSE", 0)
    return request.param


def video(frames: int, seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, frames, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(frames: int, seed: int = 0) -> Tensor:
    """A timestep of every frame, (2, frames), -1 for some."""
    drawn = torch.rand(2, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(drawn < 0.3, -1.0, 1000 * drawn)


def near(found: Tensor, wanted: Tensor, bound: float = 1e-11) -> bool:
    return found.shape == wanted.shape and float((found - wanted).abs().max()) < bound


# ---- what sees what


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("changed", ["content", "timestep", "action"])
@pytest.mark.parametrize("kind", ["short", "long"])
def test_a_frame_reaches_itself_and_all_later_ones_but_none_before(kind: str, changed: str) -> None:
    """To the last bit; FAR-Long across its window too."""
    model = tiny_far(num_actions=3, **(LONG if kind == "long" else {}))
    latents, timesteps, actions = video(6, dtype=torch.float32), times(6).float(), ACTIONS[:, :6]
    before = model(latents, timesteps, actions=actions)
    for k in range(6):
        given = {"content": latents.clone(), "timestep": timesteps.clone(), "action": actions.clone()}
        given[changed][:, k] = (given[changed][:, k] + 1) % 3 if changed == "action" else given[changed][:, k] + 1.5
        after = model(given["content"], given["timestep"], actions=given["action"])
        assert [bool((before[:, i] != after[:, i]).any()) for i in range(6)] == [i >= k for i in range(6)]


def test_tokens_of_a_frame_see_one_another(model: FAR) -> None:
    latents, timesteps = video(2), times(2)
    before = model(latents, timesteps)
    latents[:, 1, :, 3, 3] += 1  # of the last token
    assert (before != model(latents, timesteps))[:, 1].flatten(2).any(1).all(), "every place of the frame"


@pytest.mark.usefixtures("way")
def test_the_window_of_attention_is_as_long_as_asked_for() -> None:
    """A block looks so many frames back, two blocks twice as many."""
    latents, timesteps = video(8), times(8)
    for depth, reach in ((1, 2), (2, 2), (2, 1), (2, 0)):
        model = tiny_far(depth=depth).double()
        before = model(latents, timesteps, attend_last=reach)
        for k in range(8):
            changed = latents.clone()
            changed[:, k] += 1
            after = model(changed, timesteps, attend_last=reach)
            wanted = [k <= i <= k + depth * reach for i in range(8)]
            assert [bool((before[:, i] != after[:, i]).any()) for i in range(8)] == wanted


@pytest.mark.usefixtures("way")
def test_one_block_sees_of_a_window_what_it_sees_of_those_frames_alone() -> None:
    model, latents, timesteps = tiny_far(depth=1).double(), video(6), times(6)
    found = model(latents, timesteps, attend_last=2)
    for k in range(2, 6):
        alone = model(latents[:, k - 2 : k + 1], timesteps[:, k - 2 : k + 1], start=k - 2)
        assert near(found[:, k], alone[:, -1])


def test_a_window_of_all_frames_is_none() -> None:
    model, latents, timesteps = tiny_far(), video(5, dtype=torch.float32), times(5).float()
    assert torch.equal(model(latents, timesteps, attend_last=4), model(latents, timesteps))
    assert not torch.equal(model(latents, timesteps, attend_last=3), model(latents, timesteps))


@pytest.mark.parametrize(("reach", "slope"), [(None, 0.0), (2, 0.0), (None, 0.4), (1, 0.4)])
def test_one_mask_and_frame_by_frame_give_the_same(
    model: FAR, reach: int | None, slope: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach = None if model.is_long else reach  # FAR-Long has no such window
    latents, timesteps = video(6), times(6)
    masked = model(latents, timesteps, attend_last=reach, slope=slope)
    monkeypatch.setattr(frame_attention, "DENSE", 0)
    assert near(model(latents, timesteps, attend_last=reach, slope=slope), masked)


def test_a_single_frame_is_attended_to_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """And many frames in pieces, where a mask of them all would be large."""
    seen: list[Any] = []
    real = frame_attention.attention
    monkeypatch.setattr(
        frame_attention, "attention", lambda q, k, v, mask: seen.append((q, k, mask)) or real(q, k, v, mask)
    )
    for model in (tiny_far(), tiny_far(**LONG)):
        cache = model.new_cache(2, 5)
        latents, timesteps = video(5, dtype=torch.float32), torch.full((2, 5), -1.0)
        model(latents, timesteps, cache=cache, keep=4)
        assert all(mask is not None for _, _, mask in seen[:1])
        seen.clear()
        model(latents[:, 4:], timesteps[:, 4:], cache=cache, start=4)
        assert [mask for _, _, mask in seen] == [None, None]
        seen.clear()
    monkeypatch.setattr(frame_attention, "DENSE", 0)
    tiny_far()(latents, timesteps)
    assert [(q.shape[2], k.shape[2], mask) for q, k, mask in seen] == 2 * [(4, 4 * n, None) for n in range(1, 6)]


# ---- the cache against the whole


def context_and_noisy(frames: Tensor, noisy: Tensor, k: int, time: float) -> tuple[Tensor, Tensor]:
    """Frames 0..k - 1 clean, frame k noisy, and their timesteps."""
    timesteps = torch.full((len(frames), k + 1), -1.0, dtype=frames.dtype)
    timesteps[:, k] = time
    return torch.cat([frames[:, :k], noisy[:, k : k + 1]], 1), timesteps


def roll(model: FAR, frames: Tensor, noisy: Tensor, first: int, **given: Any) -> list[Tensor]:
    """Velocities of frames first.. at two noise levels each, by the cache; what is not given is computed once."""
    reach, actions = given.pop("attend_last", None), given.pop("actions", None)
    cache = model.new_cache(len(frames), frames.shape[1], reach)
    found = []
    for k in range(first, frames.shape[1]):
        for time in (800.0, 300.0):
            start = cache.first_needed(k)
            latents, timesteps = context_and_noisy(frames, noisy, k, time)
            more = {} if actions is None else {"actions": actions[:, start : k + 1]}
            keep = k - start
            call = {"cache": cache, "start": start, "keep": keep, **more, **given}
            velocity = model(latents[:, start:], timesteps[:, start:], **call)
            assert not velocity[:, :keep].any() and (time == 800.0 or keep == 0)
            found.append(velocity[:, -1])
    return found


def wholes(model: FAR, frames: Tensor, noisy: Tensor, first: int, **given: Any) -> list[Tensor]:
    """The same by whole evaluations."""
    actions, found = given.pop("actions", None), []
    for k in range(first, frames.shape[1]):
        for time in (800.0, 300.0):
            more = {} if actions is None else {"actions": actions[:, : k + 1]}
            found.append(model(*context_and_noisy(frames, noisy, k, time), **more, **given)[:, -1])
    return found


ROLLS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "from nothing": ({}, 0, {}),
    "from a clip": ({}, 4, {}),
    "classes": ({"num_classes": 3}, 0, {"class_labels": CLASSES}),
    "actions": ({"num_actions": 3}, 2, {"actions": ACTIONS}),
    "decay": ({"slope": 0.5}, 3, {}),
    "decay of the call": ({}, 0, {"slope": 0.3}),
    "a window of two": ({}, 0, {"attend_last": 2}),
    "a window of two from a longer clip": ({}, 5, {"attend_last": 2}),
    "a window of none": ({}, 0, {"attend_last": 0}),
    "a window and decay": ({}, 3, {"attend_last": 3, "slope": 0.3}),
    "samples": ({"prediction": "sample", "spatial_embedding": True}, 1, {}),
    "long, crossing its window": (LONG, 0, {}),
    "long, from within its window": (LONG, 2, {"slope": 0.5}),
    "long, from beyond its window": (LONG, 6, {}),
    "long, a window of one": (LONG | {"window": 1}, 0, {}),
    "long, all in the window": (LONG | {"window": 8}, 0, {}),
    "long, actions": (LONG | {"num_actions": 3, "spatial_embedding": True}, 2, {"actions": ACTIONS}),
    "long, classes": (LONG | {"num_classes": 3}, 0, {"class_labels": CLASSES}),
    "long, samples": (LONG | {"prediction": "sample"}, 1, {}),
    "shared modulation": ({"shared_adaln": True}, 2, {}),
    "long, shared modulation": (LONG | {"shared_adaln": True, "num_classes": 3}, 2, {"class_labels": CLASSES}),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("changes", "first", "given"), ROLLS.values(), ids=ROLLS.keys())
def test_with_the_cache_frames_are_what_they_are_without(
    changes: dict[str, Any], first: int, given: dict[str, Any]
) -> None:
    model, frames, noisy = tiny_far(**changes).double(), video(8), video(8, seed=1)
    found, wanted = roll(model, frames, noisy, first, **given), wholes(model, frames, noisy, first, **given)
    assert all(near(ours, whole) for ours, whole in zip(found, wanted, strict=True))
    model, frames, noisy = model.float(), frames.float(), noisy.float()
    found, wanted = roll(model, frames, noisy, first, **given), wholes(model, frames, noisy, first, **given)
    assert all(near(ours, whole, 2e-5) for ours, whole in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reach", [None, 3, 1])
def test_several_frames_at_work_see_what_they_see_in_the_whole(reach: int | None) -> None:
    """As in a pyramid: frames of several noise levels at a time, of which the finished ones are stored."""
    model, latents, timesteps = tiny_far().double(), video(8), times(8)
    whole = model(latents, timesteps, attend_last=reach)
    cache = model.new_cache(2, 8, reach)
    for start, stop, keep in ((0, 3, 0), (0, 4, 2), (2, 6, 1), (3, 7, 4), (7, 8, 1)):
        given = {"cache": cache, "start": start, "keep": keep}
        found = model(latents[:, start:stop], timesteps[:, start:stop], **given)
        assert not found[:, :keep].any()
        assert near(found[:, keep:], whole[:, start + keep : stop]) if stop - start > keep else found.numel()
        assert cache.length == start + keep
    assert cache.first_needed(8) == 8


def test_a_call_may_look_less_far_back_than_the_cache_but_not_further() -> None:
    model, latents, timesteps = tiny_far(depth=1).double(), video(6), torch.full((2, 6), -1.0).double()
    cache = model.new_cache(2, 6)
    model(latents[:, :5], timesteps[:, :5], cache=cache, keep=5)
    found = model(latents[:, 5:], timesteps[:, 5:], cache=cache, start=5, attend_last=2)
    assert near(found[:, 0], model(latents, timesteps, attend_last=2)[:, 5])
    cache = model.new_cache(2, 6, attend_last=2)
    model(latents[:, :5], timesteps[:, :5], cache=cache, keep=5)
    with pytest.raises(SettingError, match="attend_last is 3, but the cache holds 2 frames"):
        model(latents[:, 5:], timesteps[:, 5:], cache=cache, start=5, attend_last=3)


def test_the_cache_is_allocated_once_and_counts_frames() -> None:
    model, frames = tiny_far(), video(8, dtype=torch.float32)
    cache = model.new_cache(2, 8)
    assert cache.keys.shape == cache.values.shape == (2, 2, 2, 8 * 4, 16)
    place = cache.keys.data_ptr()
    for k in range(8):
        assert (cache.length, cache.first_needed(k)) == (max(0, k - 1), max(0, k - 1))
        start = cache.first_needed(k)
        model(frames[:, start : k + 1], torch.full((2,), -1.0), cache=cache, start=start, keep=k - start)
        assert (cache.length, cache.first_needed(k)) == (k, k)
        assert len(cache.held.numbers) == k and cache.held.tokens == 4 * k
    assert cache.keys.data_ptr() == place


def test_far_long_begins_anew_where_its_window_is_passed_and_keeps_old_frames_coarsely() -> None:
    """Window 3: with the third frame all are fine; with the fourth the first becomes coarse, at once to be kept."""
    model, frames = tiny_far(**LONG), video(8, dtype=torch.float32)
    cache = model.new_cache(2, 8)
    assert cache.keys.shape[3] == 5 * 1 + 3 * 4
    place, needed, held = cache.keys.data_ptr(), [], []
    for k in range(8):
        start = cache.first_needed(k)
        needed.append(start)
        model(frames[:, start : k + 1], torch.full((2,), -1.0), cache=cache, start=start, keep=k - start)
        held.append(cache.held.sizes)
        assert (cache.length, cache.first_needed(k)) == (k, k)
    assert needed == [0, 0, 1, 0, 1, 2, 3, 4]
    assert held[:4] == [[], [4], [4, 4], [1, 4, 4]] and held[7] == [1, 1, 1, 1, 1, 4, 4]
    assert cache.keys.data_ptr() == place


def test_a_window_of_frames_is_all_that_is_held() -> None:
    """Also where a longer clip is given at once, for which there is room only as long as it takes."""
    model, frames = tiny_far(), video(30, dtype=torch.float32)
    cache = model.new_cache(2, 1000, attend_last=3)
    assert cache.keys.shape[3] == (3 + 1) * 4
    for start, stop in ((0, 20), (20, 21), (21, 30)):
        model(frames[:, start:stop], torch.full((2,), -1.0), cache=cache, start=start, keep=stop - start)
        assert cache.held.numbers == [stop - 3, stop - 2, stop - 1] and cache.length == stop
        assert cache.keys.shape[3] <= 2 * (3 + 1) * 4
    assert model.new_cache(2, 2, attend_last=3).keys.shape[3] == 2 * 4


def test_steps_on_one_frame_leave_what_is_stored_alone(model: FAR) -> None:
    latents, timesteps = video(5), torch.full((2, 5), -1.0).double()
    cache = model.new_cache(2, 5)
    model(latents, timesteps, cache=cache, keep=4)
    stored, kept = cache.held.tokens, (cache.keys.clone(), cache.values.clone())
    first = model(latents[:, 4:], timesteps[:, 4:] + 501, cache=cache, start=4)
    model(latents[:, 4:] + 1, timesteps[:, 4:] + 1, cache=cache, start=4)
    for now, before in zip((cache.keys, cache.values), kept, strict=True):
        assert torch.equal(now[:, :, :, :stored], before[:, :, :, :stored])
    assert torch.equal(model(latents[:, 4:], timesteps[:, 4:] + 501, cache=cache, start=4), first)


def test_nothing_that_is_given_is_changed_and_the_model_keeps_no_state(model: FAR) -> None:
    given = {"latents": video(5), "timesteps": torch.full((2, 5), -1.0).double()}
    copies = {name: tensor.clone() for name, tensor in given.items()}
    attributes = {name: list(vars(module)) for name, module in model.named_modules()}
    for cache in (None, model.new_cache(2, 5)):
        found = model(**given, cache=cache, keep=4)
        assert all(torch.equal(given[name], copy) for name, copy in copies.items())
        assert {name: list(vars(module)) for name, module in model.named_modules()} == attributes
        again = model(**given, cache=None if cache is None else model.new_cache(2, 5), keep=4)
        assert torch.equal(found, again)


def test_a_row_of_a_batch_is_its_solo_run(model: FAR) -> None:
    frames, noisy = video(5).float(), video(5, seed=1).float()
    model = model.float()
    together, whole = roll(model, frames, noisy, 1), model(frames, times(5).float())
    for row in range(2):
        alone = roll(model, frames[row : row + 1], noisy[row : row + 1], 1)
        assert all(near(a, t[row : row + 1], 1e-5) for a, t in zip(alone, together, strict=True))
        assert near(model(frames[row : row + 1], times(5)[row : row + 1].float()), whole[row : row + 1], 1e-5)


# ---- positions


@pytest.mark.parametrize("start", [50, 100_000])
def test_only_distances_in_time_matter(model: FAR, start: int) -> None:
    """Frame 100,000 is as exact as frame 0: angles of 100,000 radians would be wrong by 0.004 in float32."""
    latents, timesteps = video(5), times(5)
    wanted = model(latents, timesteps)
    assert near(model(latents, timesteps, start=start), wanted, 1e-9)
    model = model.float()
    there, here = (model(latents.float(), timesteps.float(), start=frame) - wanted for frame in (start, 0))
    assert there.abs().max() < min(3 * float(here.abs().max()), 2e-4)


def test_time_and_place_matter(model: FAR) -> None:
    """A frame with the same content elsewhere in time, or at exchanged places, is seen differently."""
    latents, timesteps = video(3), torch.full((2, 3), -1.0).double()
    swapped, moved = latents[:, [1, 0, 2]], latents.clone()
    moved[:, :2] = moved[:, :2].flip(3)
    before = model(latents, timesteps)[:, 2]
    assert not near(model(swapped, timesteps)[:, 2], before, 1e-3)
    assert not near(model(moved, timesteps)[:, 2], before, 1e-3)
    turned = model(latents.transpose(3, 4), timesteps)[:, 2].transpose(2, 3)
    assert not near(turned, before, 1e-3), "rows are no columns"


def test_coarse_tokens_stand_at_the_first_place_they_cover() -> None:
    model = tiny_far(side=8, patch_size=1, context_patch_size=4, window=1)
    cos, sin = model._rotation([7, 9], 1)
    places = [(7, row, column) for row in (0, 4) for column in (0, 4)]
    places += [(9, row, column) for row in range(8) for column in range(8)]
    frequencies = [10_000 ** (-2 * j / axis) for axis in (4, 6, 6) for j in range(axis // 2)]
    axes = [0] * 2 + [1] * 3 + [2] * 3
    angles = torch.tensor([[place[a] * f for a, f in zip(axes, frequencies, strict=True)] for place in places])
    assert cos.shape == sin.shape == (68, 1, 1, 8)
    assert near(cos[:, 0, 0], angles.cos(), 1e-5) and near(sin[:, 0, 0], angles.sin(), 1e-5)


def test_rotation_turns_neighbouring_channels() -> None:
    x, angle = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0.3, 0.5])
    wanted = torch.stack([angle[0].cos(), angle[0].sin(), -angle[1].sin(), angle[1].cos()])
    assert near(layers.rotate(x, angle.cos(), angle.sin()), wanted, 1e-7)


def test_tokens_are_patches_in_raster_order_channels_first() -> None:
    latents = torch.arange(2 * 2 * 3 * 4 * 4).view(2, 2, 3, 4, 4)
    tokens = frame_blocks.patches(latents, 2)
    assert tokens.shape == (2, 2, 4, 12)
    assert torch.equal(tokens[1, 0, 1], latents[1, 0, :, :2, 2:].flatten())
    assert torch.equal(frame_blocks.whole(tokens, 2, 4), latents)


def test_a_learned_embedding_of_places_is_added_to_tokens() -> None:
    """A zero one makes no difference, and a row of it as much as what it adds to that token's embedding."""
    latents, timesteps = video(4), times(4)
    for changes in ({}, LONG):
        plain, placed = (tiny_far(**changes, spatial_embedding=placed).double() for placed in (False, True))
        names = ["position", "context_position"] if changes else ["position"]
        assert [name for name, _ in placed.named_parameters() if "position" in name] == names
        kept = {name: getattr(placed, name).clone() for name in names}
        for name in names:
            getattr(placed, name).zero_()
        assert torch.equal(placed(latents, timesteps), plain(latents, timesteps))
        for name in names:
            getattr(placed, name).copy_(kept[name])
            embedding = placed.token_embed if name == "position" else placed.context_embed
            assert not near(placed(latents, timesteps), plain(latents, timesteps), 1e-3)
            getattr(placed, name).copy_(embedding.bias.expand(len(kept[name]), -1))
            bias = embedding.bias.clone()
            embedding.bias.zero_()
            assert near(placed(latents, timesteps), plain(latents, timesteps)), "as the bias it replaces"
            embedding.bias.copy_(bias)
            getattr(placed, name).zero_()


# ---- conditions


def test_without_labels_the_null_class_is_meant() -> None:
    latents, timesteps = video(3), times(3)
    model = tiny_far(num_classes=3).double()
    null = torch.tensor([3, 3])
    assert model.null_class == 3 and model.class_embed.weight.shape == (4, 32)
    assert torch.equal(model(latents, timesteps), model(latents, timesteps, null))
    assert not near(model(latents, timesteps), model(latents, timesteps, CLASSES), 1e-3)
    model = tiny_far(num_actions=3).double()
    assert model.null_class == 3
    assert torch.equal(model(latents, timesteps), model(latents, timesteps, actions=null[:, None].expand(-1, 3)))
    model = tiny_far().double()
    assert model.null_class == 0
    assert torch.equal(model(latents, timesteps), model(latents, timesteps, torch.tensor([0, 0])))


def test_one_timestep_serves_all_frames(model: FAR) -> None:
    latents = video(5)
    assert torch.equal(
        model(latents, torch.tensor([700.0, -1.0])), model(latents, torch.tensor([[700.0], [-1]]).expand(2, 5))
    )


def test_old_frames_have_a_timestep_of_their_own() -> None:
    """Coarse clean context has -2: the same as FAR-Long's embedding of fine frames at -2."""
    features = frame_blocks.time_features(torch.tensor([-2.0, 0.0, 1000.0]))
    assert features.shape == (3, 256)
    frequencies = torch.exp(-torch.arange(128) * torch.tensor(10_000.0).log() / 127)
    assert near(features[0], torch.cat([(-2 * frequencies).cos(), (-2 * frequencies).sin()]), 1e-6)
    assert frequencies[-1] == pytest.approx(1e-4) and features[1].tolist() == [1.0] * 128 + [0.0] * 128


def test_decay_lowers_what_is_further_back_and_in_the_limit_hides_it() -> None:
    model, latents, timesteps = tiny_far().double(), video(5), times(5)
    plain = model(latents, timesteps)
    assert torch.equal(model(latents, timesteps, slope=0.0), plain)
    assert near(model(latents, timesteps, slope=1e6), model(latents, timesteps, attend_last=0))
    runs = FrameRuns([3, 4, 5], [1, 1, 2])
    (_, _, mask), *none = causal_spans(runs.after(1), runs, None, 0.5, torch.device("cpu"))
    inf = float("inf")
    assert not none and mask is not None
    assert mask.tolist() == [[-0.5, 0, -inf, -inf], [-1, -0.5, 0, 0], [-1, -0.5, 0, 0]]


def test_modes_of_the_module_make_no_difference(model: FAR) -> None:
    latents, timesteps = video(5), times(5)
    assert torch.equal(model.train()(latents, timesteps), model.eval()(latents, timesteps))


# ---- FAR-Long and FAR


def test_far_long_is_far_as_long_as_all_frames_are_in_its_window() -> None:
    long, short = tiny_far(**LONG | {"num_actions": 3}), tiny_far(num_actions=3)
    weights = long.state_dict()
    short.load_state_dict({name: weights[name] for name in short.state_dict()})
    for count in (1, 3):
        given = video(count, dtype=torch.float32), times(count).float(), None, ACTIONS[:, :count]
        assert torch.equal(long(*given), short(*given))
    given = video(4, dtype=torch.float32), times(4).float(), None, ACTIONS[:, :4]
    assert not near(long(*given)[:, -1], short(*given)[:, -1], 1e-3)


def test_published_loss_leaves_far_longs_coarse_outputs_untrained() -> None:
    """It takes the frames in the window alone: what only coarse outputs come from gets no gradient, all else does."""
    model = tiny_far(**LONG).requires_grad_(True).train()
    model(video(6, dtype=torch.float32), times(6).float())[:, 3:].square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    query = model.blocks[1].context_attn.qkv.weight.grad[:32]
    assert idle == {"context_head.weight", "context_head.bias", "blocks.1.context_attn.norm_q"}
    assert not query.any() and model.blocks[0].context_attn.qkv.weight.grad[:32].any()


@pytest.mark.parametrize("changes", [{}, LONG, {"num_actions": 3}])
def test_shared_modulation_is_one_layer_in_all_blocks_and_a_table_in_each(changes: dict[str, Any]) -> None:
    """Equal to blocks that each hold the shared layer, their own table added to its bias."""
    shared, plain = tiny_far(**changes, shared_adaln=True).double(), tiny_far(**changes).double()
    state = shared.state_dict()
    weight, bias = state.pop("adaln.weight"), state.pop("adaln.bias")
    for i in range(len(shared.blocks)):
        state[f"blocks.{i}.adaln.weight"] = weight
        state[f"blocks.{i}.adaln.bias"] = bias + state.pop(f"blocks.{i}.adaln_table").flatten()
    plain.load_state_dict(state)
    latents, timesteps = video(4), times(4)
    assert near(shared(latents, timesteps), plain(latents, timesteps))


# ---- two copies


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, {}),
        ({"prediction": "sample", "spatial_embedding": True, "slope": 0.4}, {}),
        ({"num_classes": 3}, {"class_labels": CLASSES}),
        ({"num_actions": 3}, {"actions": ACTIONS[:, :5]}),
    ],
)
def test_two_copies_give_what_sampling_sees(changes: dict[str, Any], given: dict[str, Any]) -> None:
    """Equal to whole evaluations, and so to the cache."""
    model, clean, noisy = tiny_far(**changes).double(), video(5), video(5, seed=1)
    levels = 1000 * torch.rand(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1
    found = model.two_copies(clean, noisy, levels, **given)
    for k in range(5):
        latents, timesteps = context_and_noisy(clean, noisy, k, 0)
        timesteps[:, k] = levels[:, k]
        more = {name: ids[:, : k + 1] if ids.ndim == 2 else ids for name, ids in given.items()}
        assert near(found[:, k], model.predict(latents, timesteps, **more)[:, k])
        cache = model.new_cache(2, 5)
        assert near(found[:, k], model.predict(latents, timesteps, cache=cache, keep=k, **more)[:, k])


def test_two_copies_take_noise_levels_of_the_context_and_one_timestep_for_all() -> None:
    model, clean, noisy = tiny_far().double(), video(4), video(4, seed=1)
    levels = torch.tensor([900.0, 20.0])
    found = model.two_copies(clean, noisy, levels, clean_timesteps=times(4))
    latents, timesteps = context_and_noisy(clean, noisy, 3, 0)
    timesteps[:, :3], timesteps[:, 3] = times(4)[:, :3], levels
    assert near(found[:, 3], model.predict(latents, timesteps)[:, 3])
    assert torch.equal(
        model.two_copies(clean, noisy, levels), model.two_copies(clean, noisy, levels[:, None].expand(-1, 4))
    )


def test_noisy_copies_see_no_other_and_not_their_own_clean_one() -> None:
    """To the last bit: frame k's prediction depends on its own noisy copy and on clean frames before it."""
    model, clean, noisy, levels = (
        tiny_far(),
        *(video(4, seed, dtype=torch.float32) for seed in (0, 1)),
        times(4).float(),
    )
    before = model.two_copies(clean, noisy, levels)
    for k in range(4):
        changed = [clean.clone(), noisy.clone()]
        for copy in changed:
            copy[:, k] += 1
        by_clean = before != model.two_copies(changed[0], noisy, levels)
        by_noisy = before != model.two_copies(clean, changed[1], levels)
        assert by_clean.flatten(2).any(2).any(0).tolist() == [i > k for i in range(4)]
        assert by_noisy.flatten(2).any(2).any(0).tolist() == [i == k for i in range(4)]


def test_what_copies_see_is_written_out() -> None:
    mask = two_copies_mask(torch.tensor([0, 1, 1]), 0.0)  # a frame of one token, and one of two
    wanted = ["100000", "111000", "111000", "000100", "100011", "100011"]
    assert ["".join(str(int(x)) for x in row) for row in mask.tolist()] == wanted


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_two_copies_reach_every_parameter(shared: bool) -> None:
    model = tiny_far(num_classes=3, spatial_embedding=True, shared_adaln=shared).requires_grad_(True).train()
    clean, noisy = video(3, dtype=torch.float32), video(3, 1, dtype=torch.float32)
    model.two_copies(clean, noisy, times(3).float(), CLASSES).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- what is predicted


def test_samples_become_velocities() -> None:
    """v = (z - x0) / sigma; clean frames have none."""
    model, latents = tiny_far(prediction="sample").double(), video(4)
    timesteps = torch.tensor([[-1, 1000, 500, 1], [0, -1, 250, 2]]).double()
    raw, velocity = model.predict(latents, timesteps), model(latents, timesteps)
    for row in range(2):
        for k in range(4):
            sigma = float(timesteps[row, k]) / 1000
            wanted = (latents[row, k] - raw[row, k]) / sigma if sigma > 0 else torch.zeros(3, 4, 4)
            assert near(velocity[row, k], wanted.double(), 1e-9)
    plain = tiny_far().double()
    assert torch.equal(plain.predict(latents, timesteps), plain(latents, timesteps))
    assert torch.equal(plain(latents, timesteps), raw), "the network is the same"


def test_kept_frames_have_no_velocity_whatever_their_timestep() -> None:
    model = tiny_far(prediction="sample")
    found = model(video(3, dtype=torch.float32), torch.full((2, 3), 30.0), cache=model.new_cache(2, 3), keep=2)
    assert not found[:, :2].any() and found[:, 2].all()


@pytest.mark.parametrize("changes", [{}, LONG])
def test_in_half_precision_the_stream_stays_in_float32(changes: dict[str, Any]) -> None:
    model, latents, timesteps = tiny_far(**changes), video(5, dtype=torch.float32), times(5).float()
    wanted = model(latents, timesteps)
    model = model.bfloat16()
    cache = model.new_cache(2, 5)
    assert cache.keys.dtype == torch.bfloat16
    for found in (model(latents, timesteps), model(latents, timesteps, cache=cache, keep=4)):
        assert found.dtype == torch.float32
        assert (found - wanted)[:, 4].norm() < 0.05 * wanted[:, 4].norm()


# ---- initialisation


@pytest.mark.parametrize("changes", [{}, LONG])
def test_at_the_beginning_the_output_is_zero_and_the_weights_are_the_published_ones(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    width = 128
    model = FAR(**TINY | {"width": width, "rope_axes": (16, 24, 24), "num_classes": 20} | changes)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    model.init_weights()
    assert not model(video(5, dtype=torch.float32), times(5).float()).any()
    zero = {"head.weight", "head_adaln.weight", "context_head.weight", "context_position", "position"}
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q", "norm_k")):
            assert (parameter == 1).all()
        elif name.endswith("bias") or "adaln" in name or name in zero:
            assert not parameter.any(), name
        elif name.startswith("time_") or name == "class_embed.weight":
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1)
        else:
            rows, columns = width if "qkv" in name else parameter.shape[0], parameter.shape[1]
            bound = (6 / (rows + columns)) ** 0.5
            assert float(parameter.detach().abs().max()) == pytest.approx(bound, rel=0.05), name
            assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1), name


def test_gates_may_begin_open() -> None:
    model = FAR(**TINY)
    model.init_weights(gate=0.5)
    for block in model.blocks:
        assert block.adaln.bias.view(6, 32)[:, 0].tolist() == [0, 0, 0.5, 0, 0, 0.5] and not block.adaln.weight.any()
        assert block.adaln.bias.view(6, 32).std(1).max() == 0
    assert not model(video(3, dtype=torch.float32), times(3).float()).any()
    torch.nn.init.ones_(model.head.weight)
    latents = video(3, dtype=torch.float32)
    moved = latents.clone()
    moved[:, 0] += 1
    after = [model(given, times(3).float())[:, 2] for given in (latents, moved)]
    assert not torch.equal(*after), "attention contributes at once"


# ---- sizes


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "FAR_B": ({"width": 768, "depth": 12}, 129_560_864),
    "FAR_M": ({"width": 1024, "depth": 12}, 230_156_832),
    "FAR_L": ({"width": 1024, "depth": 24}, 456_835_104),
    "FAR_XL": ({"width": 1152, "depth": 28}, 673_703_584),
    "FAR_B classes": ({"width": 768, "depth": 12, "num_classes": 101}, 129_639_200),
    "FAR_M classes": ({"width": 1024, "depth": 12, "num_classes": 101}, 230_261_280),
    "FAR_L classes": ({"width": 1024, "depth": 24, "num_classes": 101}, 456_939_552),
    "FAR_XL classes": ({"width": 1152, "depth": 28, "num_classes": 101}, 673_821_088),
    "FAR_B_Long": ({"width": 768, "depth": 12, "num_actions": 4, "context_patch_size": 4}, 158_111_776),
    "FAR_M_Long": ({"width": 1024, "depth": 12, "num_actions": 4, "context_patch_size": 4}, 280_544_800),
}


@pytest.mark.parametrize(("changes", "parameters"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_sizes(changes: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = FAR(in_channels=32, side=8, heads=changes["width"] // 64, **changes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not list(model.buffers())
    assert model.frame_tokens == 64 and model.coarse_tokens == (4 if "context_patch_size" in changes else 0)


def test_a_saved_model_comes_back_with_its_settings_and_velocities(model: FAR, tmp_path: Path) -> None:
    model = model.float()
    model.save_pretrained(tmp_path)
    loaded = FAR.from_pretrained(tmp_path).eval().requires_grad_(False)
    ours, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (model, loaded))
    assert theirs == ours | {"rope_axes": [4, 6, 6]}
    given = video(5, dtype=torch.float32), times(5).float()
    assert torch.equal(loaded(*given), model(*given))


# ---- mistakes

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no head": ({"heads": 0}, "heads is 0: it must be at least 1"),
    "heads": ({"heads": 3}, "width 32 is not a multiple of heads 3"),
    "axes": ({"rope_axes": (4, 6, 4)}, r"rope_axes \(4, 6, 4\) must be three even numbers whose sum is 16"),
    "odd axes": ({"rope_axes": (4, 5, 7)}, "three even numbers"),
    "patches": ({"patch_size": 3}, "side 4 is not a multiple of patch_size 3"),
    "coarse patches": ({"context_patch_size": 2}, "context_patch_size 2 must divide side 4 and be a multiple"),
    "two conditions": ({"num_classes": 2, "num_actions": 3}, "num_classes 2 and num_actions 3 were both given"),
    "window": (LONG | {"window": 0}, "window is 0"),
    "slope": ({"slope": -0.1}, "slope is -0.1"),
    "prediction": ({"prediction": "noise"}, "unknown prediction 'noise': use one of velocity, sample"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        FAR(**TINY | changes)
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit_are_named() -> None:
    model, long, latents, t = tiny_far(), tiny_far(**LONG), video(4, dtype=torch.float32), torch.full((2, 4), -1.0)
    short_cache, long_cache = model.new_cache(2, 8), long.new_cache(2, 8)
    cases = [
        (lambda: model(latents[:, 0], t[:, 0]), "latents have shape"),
        (lambda: model(latents[..., :3], t), "latents have shape"),
        (lambda: model(latents[:, :0], t[:, :0]), "latents have shape"),
        (lambda: model(latents, t[:, :3]), "timesteps have shape"),
        (lambda: model(latents, t, actions=ACTIONS[:, :4]), "this model knows no actions"),
        (lambda: tiny_far(num_actions=3)(latents, t, actions=ACTIONS[:, :3]), "actions have shape"),
        (lambda: model(latents, t, attend_last=-1), "attend_last is -1"),
        (lambda: long(latents, t, attend_last=2), "FAR-Long sees old frames coarsely"),
        (lambda: long.new_cache(2, 8, attend_last=2), "FAR-Long sees old frames coarsely"),
        (lambda: model(latents, t, cache=model.new_cache(3, 8)), "the cache is for 3 rows, the latents have 2"),
        (lambda: model(latents, t, cache=short_cache, start=2), r"frames 2..5 were given, the cache needs them from 0"),
        (lambda: model(latents, t, cache=short_cache, keep=5), "keep is 5 of 4 frames: it must be 0..4"),
        (lambda: long(latents, t, cache=long_cache, keep=2), "keep is 2 of 4 frames: it must be 3, all but the last"),
        (lambda: long.two_copies(latents, latents, t), "two copies need one resolution"),
        (lambda: model.two_copies(latents, latents[:, :3], t), "clean latents are"),
    ]
    for call, message in cases:
        with pytest.raises(SettingError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert short_cache.length == long_cache.length == 0, "nothing was stored"
