"""MAR's transformer and diffusion head: published figures, partial evaluations, and the sampler of tokens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from golden_weights import fill, golden_figures, golden_layout
from tiny_models import randomise
from torch import Tensor

from vgen.converters.mar import convert_mar
from vgen.generators.diffusion_head import DiffusionHead, retained_times, schedule, time_features
from vgen.generators.mar import MAR, MARCache
from vgen.types import SettingError

TINY: dict[str, Any] = {
    "num_tokens": 9,
    "token_dim": 3,
    "num_classes": 3,
    "width": 16,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "heads": 2,
    "buffer_tokens": 4,
    "diffusion_width": 8,
    "diffusion_depth": 2,
}
LABELS = torch.tensor([0, 2])


def tiny(**changes: Any) -> MAR:
    """Nine tokens of three channels, three classes, in double precision."""
    return randomise(MAR(**(TINY | changes))).double()  # type: ignore[return-value]


def known_at(*rows: list[int]) -> Tensor:
    """(B, 9) bool, True at the columns given for each row."""
    known = torch.zeros(len(rows), 9, dtype=torch.bool)
    return known.scatter(1, torch.tensor(rows, dtype=torch.int64), True)


KNOWN = known_at([0, 3, 5, 8], [1, 2, 3, 7])


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(values: Tensor, places: Tensor) -> Tensor:
    """Columns (B, n) of (B, N) or (B, N, C)."""
    return values.gather(1, places if values.ndim == 2 else places[..., None].expand(-1, -1, values.shape[-1]))


def filled_cache(model: MAR, tokens: Tensor, known: Tensor) -> MARCache:
    cache = model.new_cache(len(tokens))
    model(tokens, known, LABELS, cache=cache)
    return cache


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def differs(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) > 1e-6


# ---- published figures


@pytest.fixture(scope="module")
def golden() -> MAR:
    layout = golden_layout("mar")
    state = {name: fill(name, shape) for name, shape in layout["transformer"].items()}
    return convert_mar(state, heads=layout["num_heads"]).generator


def test_conditions_are_the_published_ones(golden: MAR) -> None:
    figures = golden_figures("mar")
    found = golden(figures["latents"], figures["mask"] == 0, figures["label"])
    torch.testing.assert_close(found, figures["condition"], rtol=0, atol=1e-4)


def test_the_diffusion_head_computes_what_the_published_one_does(golden: MAR) -> None:
    figures = golden_figures("mar")
    found = golden.head(figures["noisy"], figures["t"], figures["diffloss_condition"])
    torch.testing.assert_close(found, figures["diffloss_output"], rtol=0, atol=1e-4)


# ---- whole evaluations


def test_what_masked_tokens_hold_makes_no_difference() -> None:
    model, tokens = tiny(), latents()
    other = tokens.where(KNOWN[..., None], torch.nan)
    assert torch.equal(model(tokens, KNOWN, LABELS), model(other, KNOWN, LABELS))
    changed = tokens.clone()
    changed[0, 0] += 1  # a known one
    assert differs(model(tokens, KNOWN, LABELS)[0], model(changed, KNOWN, LABELS)[0])


@pytest.mark.parametrize("known", [known_at([], []), KNOWN, torch.ones(2, 9, dtype=torch.bool)])
def test_a_row_of_a_batch_equals_its_solo_run(known: Tensor) -> None:
    model, tokens = tiny(), latents()
    assert_same(model(tokens, known, LABELS)[1:], model(tokens[1:], known[1:], LABELS[1:]))


def test_classes_and_the_null_class_give_conditions_of_their_own() -> None:
    model, tokens = tiny(), latents()
    assert model.null_class == 3
    found = [model(tokens, KNOWN, torch.full((2,), label)) for label in range(4)]
    assert all(differs(a, b) for i, a in enumerate(found) for b in found[:i])


def test_saving_and_loading_gives_the_same_conditions(tmp_path: Path) -> None:
    model = tiny().float()
    model.save_pretrained(tmp_path)
    loaded = MAR.from_pretrained(tmp_path).eval()
    tokens = latents().float()
    assert torch.equal(loaded(tokens, KNOWN, LABELS), model(tokens, KNOWN, LABELS))


def test_whole_evaluations_in_other_precisions() -> None:
    wanted = tiny()(latents(), KNOWN, LABELS)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        found = tiny().to(dtype)(latents(), KNOWN, LABELS)
        assert found.dtype == dtype and float((found - wanted).abs().max()) < bound


# ---- partial evaluations

PLACES = torch.tensor([[1, 4, 8], [7, 0, 3]])  # known are the last of row 0, the first and last of row 1
EVEN = torch.tensor([[1, 4, 8], [5, 0, 3]])  # one known token in each row


@pytest.mark.parametrize("cache_buffer", [False, True])
@pytest.mark.parametrize("depths", [(1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("places", [EVEN, torch.tensor([[1, 4], [0, 8]]), torch.tensor([[5, 0, 3], [1, 7, 2]])])
def test_where_nothing_changed_a_partial_evaluation_equals_the_whole(
    depths: tuple[int, int], cache_buffer: bool, places: Tensor
) -> None:
    """Groups with some, no and only known tokens."""
    model, tokens = tiny(encoder_depth=depths[0], decoder_depth=depths[1]), latents()
    cache = model.new_cache(2)
    whole = model(tokens, KNOWN, LABELS, cache=cache)
    assert_same(whole, model(tokens, KNOWN, LABELS))
    partial = model(at(tokens, places), at(KNOWN, places), LABELS, places, cache, cache_buffer)
    assert_same(partial, at(whole, places))


def test_a_partial_evaluation_of_everything_equals_a_whole_one() -> None:
    """Whatever the cache held: another class, other latents, more known tokens."""
    model, tokens = tiny(), latents()
    cache = model.new_cache(2)
    model(latents(1), ~KNOWN, LABELS.flip(0), cache=cache)
    places = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    partial = model(at(tokens, places), at(KNOWN, places), LABELS, places, cache)
    assert_same(partial, at(model(tokens, KNOWN, LABELS), places))


@pytest.mark.parametrize(
    ("depths", "context", "cache_buffer", "equal"),
    [
        ((1, 1), False, False, True),
        ((3, 1), False, False, True),  # all that is encoded is evaluated again, however deep the encoder
        ((1, 1), True, False, False),  # what the encoder makes of known tokens outside the group goes stale
        ((1, 2), False, False, False),  # so do masked tokens, behind the decoder's first block
        ((2, 1), False, True, False),  # and the buffer
    ],
)
def test_after_tokens_are_revealed_only_what_lies_outside_the_group_is_stale(
    depths: tuple[int, int], context: bool, cache_buffer: bool, equal: bool
) -> None:
    model, tokens = tiny(encoder_depth=depths[0], decoder_depth=depths[1]), latents()
    known = KNOWN if context else known_at([], [])
    cache = filled_cache(model, tokens, known)
    places = torch.tensor([[1, 4, 6], [0, 5, 8]])
    revealed = known.scatter(1, places[:, :2], True)
    partial = model(at(tokens, places), at(revealed, places), LABELS, places, cache, cache_buffer)
    wanted = at(model(tokens, revealed, LABELS), places)
    assert equal != differs(partial, wanted)


def test_later_partial_evaluations_see_what_earlier_ones_wrote() -> None:
    model, tokens = tiny(encoder_depth=1, decoder_depth=1), latents()
    cache = filled_cache(model, tokens, known_at([], []))
    first = torch.tensor([[0, 1], [5, 6]])
    model(at(tokens, first), torch.ones(2, 2, dtype=torch.bool), LABELS, first, cache)
    second = torch.tensor([[2], [4]])
    partial = model(at(tokens, second), torch.zeros(2, 1, dtype=torch.bool), LABELS, second, cache)
    revealed = known_at([0, 1], [5, 6])
    assert_same(partial, at(model(tokens, revealed, LABELS), second))


def test_a_token_masked_again_leaves_the_encoder() -> None:
    model, tokens = tiny(encoder_depth=1, decoder_depth=1), latents()
    places = torch.tensor([[0, 1], [5, 6]])
    cache = filled_cache(model, tokens, known_at([0, 1], [5, 6]))
    partial = model(at(tokens, places), torch.zeros(2, 2, dtype=torch.bool), LABELS, places, cache)
    assert_same(partial, at(model(tokens, known_at([], []), LABELS), places))


def test_the_buffer_is_evaluated_again_unless_told_otherwise() -> None:
    model, tokens = tiny(), latents()
    found = {}
    for cache_buffer in (False, True):
        cache = filled_cache(model, tokens, KNOWN)
        given = at(tokens, EVEN), at(KNOWN, EVEN)
        found[cache_buffer] = model(*given, LABELS.flip(0), EVEN, cache, cache_buffer)
    whole = at(model(tokens, KNOWN, LABELS), EVEN)
    assert differs(found[False], whole)  # another class is another buffer
    assert_same(found[True], whole)


def test_a_partial_evaluation_leaves_the_features_of_others_alone() -> None:
    model, tokens = tiny(), latents()
    cache = filled_cache(model, tokens, KNOWN)
    before = cache.decoder.keys.clone(), cache.encoder.values.clone()
    model(at(latents(1), EVEN), at(KNOWN, EVEN), LABELS, EVEN, cache, True)
    changed = (cache.decoder.keys != before[0]).any(-1).any(2).any(0), (cache.encoder.values != before[1])
    slots = torch.zeros(2, 13, dtype=torch.bool).scatter(1, EVEN + 4, True)
    assert torch.equal(changed[0] | slots, slots) and changed[0].any()
    assert torch.equal(changed[1].any(-1).any(2).any(0), slots & torch.cat([known_at([], [])[:, :4], KNOWN], 1))


# ---- bounds


@pytest.mark.parametrize(
    ("changes", "message"), [({"heads": 3}, "not a multiple"), ({"buffer_tokens": 0}, "buffer_tokens is 0")]
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MAR(**(TINY | changes))


def test_calls_that_do_not_fit_are_refused() -> None:
    model, tokens = tiny(), latents()

    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(SettingError, match=message):
            model(*arguments)

    refused("8 tokens were given, the model takes 9", tokens[:, :8], KNOWN[:, :8], LABELS)
    refused("tokens have shape", tokens[..., :2], KNOWN, LABELS)
    refused("known has shape", tokens, KNOWN[:, :8], LABELS)
    refused("1 and 2 known tokens", tokens, known_at([0, 0], [0, 1]), LABELS)
    part = at(tokens, EVEN), at(KNOWN, EVEN), LABELS
    for cache in (None, model.new_cache(2)):
        refused("needs the cache of a whole one", *part, EVEN, cache)
    cache = filled_cache(model, tokens, KNOWN)
    refused("positions have shape", *part, EVEN[:, :2], cache)
    refused("1 and 2 known tokens", at(tokens, PLACES), at(KNOWN, PLACES), LABELS, PLACES, cache)


# ---- the diffusion head


def head_of(dtype: torch.dtype = torch.float64) -> DiffusionHead:
    return randomise(DiffusionHead(3, 5, 8, 2)).to(dtype)  # type: ignore[return-value]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_retained_times_are_the_published_ones() -> None:
    times = retained_times(100)
    assert (times[0], times[-1], len(times)) == (0, 999, 100)
    assert times[:4] == [0, 10, 20, 30] and times[50:52] == [505, 515]
    assert retained_times(3) == [0, 500, 999]  # 499.5 goes to the even neighbour
    assert retained_times(1000) == list(range(1000))
    for steps in range(2, 1001):
        times = retained_times(steps)
        assert len(set(times)) == steps and times == sorted(times) and (times[0], times[-1]) == (0, 999)


@pytest.mark.parametrize("steps", [1, 1001, 2.0, True, "100"])
def test_impossible_numbers_of_diffusion_steps_are_refused(steps: Any) -> None:
    with pytest.raises(SettingError, match=r"2\.\.1000"):
        schedule(steps)


def test_the_schedule_keeps_the_variance_of_unit_gaussian_tokens() -> None:
    """With the exact noise prediction for tokens ~ N(0, 1), e = x sqrt(1 - alpha-bar), every state is N(0, 1): the
    posterior's mean shrinks the state by just what its variance makes up for."""
    for steps in (2, 10, 1000):
        plan = schedule(steps)
        for i in range(steps - 1):
            noise_share = (1 - plan.from_state[i] ** -2) ** 0.5
            mean = plan.to_start[i] * (plan.from_state[i] - plan.from_noise[i] * noise_share) + plan.to_state[i]
            alpha_bar = plan.from_state[i] ** -2
            before = plan.from_state[i + 1] ** -2
            beta = 1 - alpha_bar / before
            assert mean**2 + beta == pytest.approx(1, abs=1e-9)
            assert plan.high[i] == pytest.approx(math.log(beta), abs=1e-9)
        assert plan.to_start[-1] == pytest.approx(1) and plan.to_state[-1] == pytest.approx(0)
        assert plan.low[-1] == plan.low[-2]


def test_time_features_are_cosines_then_sines() -> None:
    found = time_features(torch.tensor([0, 7]))
    assert torch.equal(found[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert found[1, 0].item() == pytest.approx(math.cos(7), abs=1e-6)
    assert found[1, 128 + 64].item() == pytest.approx(math.sin(7 / 100), abs=1e-6)


def by_diffusers(
    head: DiffusionHead, cond: Tensor, uncond: Tensor, scale: float, start: Tensor, times: list[int]
) -> Tensor:
    """Ancestral sampling from a start (M, C) by diffusers' DDPM scheduler; step i draws its noise with seed i."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(timesteps=times[::-1])
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    x = start
    for i, time in enumerate(times[::-1]):
        now = torch.full((len(x),), time)
        output, other = head(x, now, cond), head(x, now, uncond)[:, :3]
        output = torch.cat([other + scale * (output[:, :3] - other), output[:, 3:]], 1)
        x = scheduler.step(output, time, x, generator=torch.Generator().manual_seed(i)).prev_sample
    return x


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_sampling_is_that_of_diffusers_scheduler(scale: float) -> None:
    head, cond, uncond = head_of(), normal(6, 5), normal(6, 5, seed=1)
    for steps in (2, 7, 50):
        start = normal(6, 3, seed=99)
        noise = torch.stack([start, *(normal(6, 3, seed=i) for i in range(steps))], 1)
        wanted = by_diffusers(head, cond, uncond, scale, start, retained_times(steps))
        found = head.sample(cond, noise, steps, uncond=uncond, scale=scale)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_is_no_guidance() -> None:
    head, cond, uncond, noise = head_of(), normal(6, 5), normal(6, 5, seed=1), normal(6, 11, 3, seed=2)
    plain = head.sample(cond, noise, 10)
    assert torch.equal(head.sample(cond, noise, 10, uncond=uncond), plain)
    each = torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    found = head.sample(cond, noise, 10, uncond=uncond, scale=each)
    assert_same(found[:3], plain[:3])
    assert_same(found[3:], head.sample(cond[3:], noise[3:], 10, uncond=uncond[3:], scale=3.0))
    assert differs(found[3:], plain[3:])


def test_a_temperature_of_zero_leaves_the_start_alone_to_chance() -> None:
    head, cond, noise = head_of(), normal(6, 5), normal(6, 11, 3)
    same_start = torch.cat([noise[:, :1], normal(6, 10, 3, seed=3)], 1)
    cold = [head.sample(cond, given, 10, temperature=0.0) for given in (noise, same_start)]
    warm = [head.sample(cond, given, 10, temperature=1.0) for given in (noise, same_start)]
    half = head.sample(cond, noise, 10, temperature=0.5)
    assert torch.equal(*cold) and differs(*warm)
    assert differs(half, cold[0]) and differs(half, warm[0])


def test_the_last_step_adds_no_noise() -> None:
    head, cond, noise = head_of(), normal(6, 5), normal(6, 11, 3)
    for column, matters in ((0, True), (1, True), (9, True), (10, False)):
        changed = noise.clone()
        changed[:, column] += 1
        assert differs(head.sample(cond, changed, 10), head.sample(cond, noise, 10)) == matters


def test_tokens_are_drawn_independently_and_in_float32_at_least() -> None:
    head, cond, noise = head_of(), normal(6, 5), normal(6, 11, 3)
    assert_same(head.sample(cond, noise, 10)[4:], head.sample(cond[4:], noise[4:], 10))
    assert head_of(torch.bfloat16).sample(cond, noise, 10).dtype == torch.float32
    assert head.sample(cond[:0], noise[:0], 10).shape == (0, 3)


def test_noise_that_does_not_fit_is_refused() -> None:
    head, cond = head_of(), normal(6, 5)
    with pytest.raises(SettingError, match=r"noise has shape \(6, 10, 3\): 10 steps"):
        head.sample(cond, normal(6, 10, 3), 10)
