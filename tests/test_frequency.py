"""NFIG's tokenizer: the paper's recursion, VAR as its limit, exact identities, losses, dropout, sampling with it."""

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_editing import (  # noqa: F401
    box,
    edit_steps,
    mask,
    picture,
    test_pixels_deep_inside_the_mask_are_the_generated_ones,
    test_pixels_outside_the_mask_come_back_exactly,
)
from test_multiscale import (  # noqa: F401
    slow_scale,
    test_context_of_a_prefix_is_a_prefix_of_the_context,
    test_encode_of_a_batch_is_encode_of_its_rows,
    test_forward_reconstructs_what_decode_does,
    test_later_tokens_do_not_change_earlier_context,
    test_straight_through_gradient_is_the_decoders_own,
)
from test_next_scale import (  # noqa: F401
    rows_seen,
    same,
    sample,
    settings,
    test_every_step_tells_what_is_known_and_can_be_decoded,
    test_no_guidance_at_all_is_unconditional,
    test_three_ways_to_be_greedy,
    test_tokens_are_the_race_over_teacher_forced_logits,
)
from test_spectrum import falling_fields
from tiny_models import (
    SCALES,
    TRANSFORMER,
    random_images,
    random_tokens,
    tiny_frequency,
    tiny_generator,
    tiny_tokenizer,
)
from tiny_models import tiny_pipeline as pipeline_of
from torch import Tensor, nn

from vgen.data import to_model_range
from vgen.generators.var import VAR
from vgen.hub import load
from vgen.pipelines.editing import keep_masks
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.spectrum import SCHEDULES, band_of_frequency
from vgen.tokenizers.frequency import FrequencyVQ, fourier_resize
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.types import SettingError

PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
EIGHT = {"scales": (1, 2, 3, 4, 6, 8)}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{schedule} on 4x4": {"band_schedule": schedule} for schedule in SCHEDULES},
    **{f"{schedule} on 8x8": {"band_schedule": schedule} | EIGHT for schedule in SCHEDULES},
    "odd side, one phi": {"scales": (1, 2, 3, 5, 7), "num_phi": 1},
    "full comparison, other codes": {"compare": "full", "vocab_size": 33, "code_dim": 6},
}
LIMITED: dict[str, dict[str, Any]] = {
    "limited": {"limit_bands": True},
    "limited on 8x8": {"limit_bands": True, "band_schedule": "inscribed"} | EIGHT,
}
FOURIER: dict[str, dict[str, Any]] = {
    "fourier": {"resize": "fourier"},
    "fourier, limited, without phi": {"resize": "fourier", "limit_bands": True, "num_phi": 0} | EIGHT,
}
ALL = VARIANTS | LIMITED | FOURIER
PIPELINES = {"published": {}, "limited": {"limit_bands": True}, "fourier": {"resize": "fourier"}}


@pytest.fixture(params=ALL.values(), ids=ALL.keys())
def tokenizer(request: pytest.FixtureRequest) -> FrequencyVQ:
    return tiny_frequency(**request.param)


several_scales = tokenizer  # for the tests of contexts


@pytest.fixture(params=PIPELINES.values(), ids=PIPELINES.keys())
def tiny_pipeline(request: pytest.FixtureRequest) -> NextScalePipeline:
    return pipeline_of(tiny_frequency(**request.param))


@pytest.fixture(params=PIPELINES.values(), ids=PIPELINES.keys())
def pipe(request: pytest.FixtureRequest) -> NextScalePipeline:
    """For editing: images of 16 x 16 with tokens of 4 x 4 pixels, and codes so many that bands decide among them."""
    tokenizer = tiny_frequency(
        channel_multipliers=(1, 2, 2), vocab_size=256, band_schedule="paper_linear", **request.param
    )
    return pipeline_of(tokenizer, tiny_generator(vocab_size=256))


def trainable(**changes: Any) -> FrequencyVQ:
    return tiny_frequency(**changes).requires_grad_(True).train()


def low_passed(grid: Tensor, tokenizer: FrequencyVQ, first: int, last: int) -> Tensor:
    """Bands `first` to `last` by a complex transform in float64."""
    band = band_of_frequency(*grid.shape[-2:], tokenizer.scales, tokenizer.config["band_schedule"])
    return torch.fft.ifft2(torch.fft.fft2(grid.double()) * ((band >= first) & (band <= last))).real


def latents(batch: int, side: int, channels: int = 4) -> Tensor:
    """Random latents of unit variance whose power falls with the square of the frequency."""
    fields = falling_fields(batch * channels, side).float()
    return (fields / fields.std()).unflatten(0, (batch, channels))


def on_latents(tokenizer: Any, target: Tensor) -> Any:
    """A tokenizer whose encoder finds these latents and whose decoder hands latents back."""
    tokenizer.encode_latent = lambda images: target
    tokenizer.reconstruct = lambda latent: latent
    return tokenizer


# ---- the paper's recursion, and VAR's


def paper_encode(tokenizer: FrequencyVQ, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What is left over gains a band and loses a scale, stage by stage: tokens, and what is left after each."""
    left, tokens, rests = torch.zeros_like(features), [], []
    for k, side in enumerate(tokenizer.scales):
        left = left + low_passed(features, tokenizer, k, k).float()
        cells = F.interpolate(left, (side, side), mode="area").flatten(2).transpose(1, 2)
        tokens.append(torch.cdist(cells.double(), tokenizer.codebook.weight.double()).argmin(-1))
        left = left - slow_scale(tokenizer, tokens[-1], k)
        rests.append(left)
    return tokens, rests


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_encode_is_the_papers_recursion(changes: dict[str, Any]) -> None:
    tokenizer = tiny_frequency(**changes)
    images = random_images(tokenizer, 3)
    features = tokenizer.encode_latent(images)
    tokens, rests = paper_encode(tokenizer, features)
    found = tokenizer.encode(images)
    assert all(item.dtype == torch.int64 for item in found) and same(found, tokens)
    for k, rest in enumerate(rests):
        left = low_passed(features, tokenizer, 0, k).float() - tokenizer.latent(found[: k + 1])
        torch.testing.assert_close(rest, left, rtol=0, atol=1e-5)
    torch.testing.assert_close(rests[-1], features - tokenizer.latent(found), rtol=0, atol=1e-5)


@pytest.mark.parametrize("compare", ["lowpass", "full"])
@pytest.mark.parametrize("changes", [{}, EIGHT, {"num_phi": 0}, {"image_channels": 1}], ids=str)
def test_without_bands_it_is_vars_tokenizer_bit_for_bit(changes: dict[str, Any], compare: str) -> None:
    ours, theirs = trainable(band_schedule="none", compare=compare, **changes), tiny_tokenizer(**changes)
    theirs.requires_grad_(True).train()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    images = random_images(ours, 3, channels=changes.get("image_channels", 3))
    tokens = theirs.encode(images)
    assert same(ours.encode(images), tokens)
    assert torch.equal(ours.latent(tokens), theirs.latent(tokens))
    assert torch.equal(ours.context(tokens), theirs.context(tokens))
    assert torch.equal(ours.decode(tokens), theirs.decode(tokens))
    (rebuilt, losses, _), (wanted, wanted_losses, _) = ours(images), theirs(images)
    assert torch.equal(rebuilt, wanted) and torch.equal(losses, wanted_losses)
    for loss in ((rebuilt.sum() + losses.sum()), (wanted.sum() + wanted_losses.sum())):
        loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_bands_change_the_tokens(schedule: str) -> None:
    """But not the first scale's, which sees the mean alone: no low-pass touches that."""
    images = random_images(tiny_tokenizer(**EIGHT), 4)
    plain = tiny_tokenizer(**EIGHT).encode(images)
    tokens = tiny_frequency(band_schedule=schedule, **EIGHT).encode(images)
    assert torch.equal(tokens[0], plain[0])
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(tokens[2:], plain[2:], strict=True))


@pytest.mark.parametrize("changes", (VARIANTS | LIMITED).values(), ids=(VARIANTS | LIMITED).keys())
def test_every_prefix_decodes_to_the_sum_of_its_scales(changes: dict[str, Any]) -> None:
    """Each limited to its bands and those below, where that is asked for."""
    tokenizer = tiny_frequency(**changes)
    tokens, latent = random_tokens(tokenizer, 2), tokenizer.new_latent(2)
    for k in range(len(tokens)):
        added = slow_scale(tokenizer, tokens[k], k)
        latent = latent + (low_passed(added, tokenizer, 0, k).float() if tokenizer.limit_bands else added)
        torch.testing.assert_close(tokenizer.latent(tokens[: k + 1]), latent, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            tokenizer.decode(tokens[: k + 1]), tokenizer.decode_latent(latent), rtol=0, atol=1e-5
        )


def test_encoding_twice_gives_the_same_tokens_and_training_uses_them(tokenizer: FrequencyVQ) -> None:
    images = random_images(tokenizer, 2)
    tokens = tokenizer.encode(images)
    assert same(tokenizer.encode(images), tokens)
    reconstruction, _, quantized = tokenizer(images)
    assert same([item for _, item in quantized], tokens)
    torch.testing.assert_close(reconstruction.clamp(-1, 1), tokenizer.decode(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_tokenizer, tiny_frequency])
def test_without_phi_a_scale_is_its_codes_enlarged(build: Callable[..., MultiScaleVQ]) -> None:
    tokenizer = build(num_phi=0)
    assert not any("phi" in name for name in tokenizer.state_dict())
    tokens = random_tokens(tokenizer, 2)
    latent = tokenizer.new_latent(2)
    for k, side in enumerate(SCALES):
        grid = tokenizer.embed(tokens[k]).transpose(1, 2).unflatten(2, (side, side))
        latent = latent + (grid if side == 4 else F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False))
        torch.testing.assert_close(tokenizer.latent(tokens[: k + 1]), latent, rtol=0, atol=1e-6)


# ---- resampling by spectra


def trigonometric(side: int, highest: int) -> Tensor:
    """A sum of random waves of up to `highest` cycles either way, sampled on side x side points, (1, 1, side, side)."""
    rng = torch.Generator().manual_seed(0)
    points = torch.arange(side, dtype=torch.float64) / side
    grid = torch.zeros(side, side, dtype=torch.float64)
    for y in range(-highest, highest + 1):
        for x in range(highest + 1):
            height, phase = torch.rand(2, generator=rng, dtype=torch.float64)
            grid += height * torch.cos(2 * math.pi * (y * points[:, None] + x * points[None] + phase))
    return grid[None, None]


@pytest.mark.parametrize(("old", "new"), [(16, 13), (13, 16), (16, 8), (8, 16), (7, 3), (3, 7), (5, 4), (4, 7), (6, 1)])
def test_resizing_is_exact_for_waves_that_both_grids_hold(old: int, new: int) -> None:
    highest = (min(old, new) - 1) // 2
    resized = fourier_resize(trigonometric(old, highest), new)
    torch.testing.assert_close(resized, trigonometric(new, highest), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [1, 3, 5, 7, 13])
def test_enlarging_an_odd_grid_is_undone_by_reducing_it(side: int) -> None:
    grid = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fourier_resize(fourier_resize(grid, 16), side), grid, rtol=0, atol=1e-12)
    assert torch.equal(fourier_resize(grid, side).round(decimals=10), grid.round(decimals=10))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8])
def test_enlarging_passes_through_the_given_points(side: int) -> None:
    """Of even sides too, whose highest wave is kept as a cosine; coming back halves that one."""
    grid = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    large = fourier_resize(grid, 3 * side)
    torch.testing.assert_close(large[..., ::3, ::3], grid, rtol=0, atol=1e-12)
    if side % 2 == 0:
        spectrum = torch.fft.fft2(grid)
        halved = torch.ones(side, side, dtype=torch.float64)
        halved[side // 2], halved[:, side // 2] = 0.5, 0.5
        torch.testing.assert_close(torch.fft.fft2(fourier_resize(large, side)), spectrum * halved, rtol=0, atol=1e-12)


# ---- a quantiser that changes nothing, or rounds


class PassThrough(nn.Module):
    """A codebook that holds every vector, or every multiple of `step`."""

    def __init__(self, step: float = 0.0) -> None:
        super().__init__()
        self.step = step

    def nearest(self, vectors: Tensor) -> Tensor:
        self.chosen = (vectors / self.step).round() * self.step if self.step else vectors
        return torch.zeros(vectors.shape[:-1], dtype=torch.int64)

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.chosen


def partial_sums(tokenizer: FrequencyVQ, target: Tensor) -> list[Tensor]:
    """The latent after each scale, by the steps that sampling and editing take."""
    latent, sums = torch.zeros_like(target), []
    for k in range(len(tokenizer.scales)):
        codes = tokenizer.embed(tokenizer.quantize_scale(tokenizer.aim(target, k) - latent, k))
        latent = tokenizer.add_scale(latent, codes, k)
        sums.append(latent)
    return sums


def without_network(step: float = 0.0, **changes: Any) -> FrequencyVQ:
    """16 x 16 latents or others, without phi, with a codebook that rounds."""
    small = {"scales": PUBLISHED, "channel_multipliers": (1,), "attention_levels": (), "num_phi": 0}
    tokenizer = tiny_frequency(**(small | changes))
    tokenizer.codebook = PassThrough(step)
    return tokenizer


@pytest.mark.parametrize("limit_bands", [False, True])
@pytest.mark.parametrize("scales", [(1, 3, 5, 7), (1, 3, 5, 9, 15), (1, 3, 7, 16)], ids=str)
def test_a_perfect_quantiser_leaves_exactly_the_bands_to_come(scales: tuple[int, ...], limit_bands: bool) -> None:
    """With odd sides, cut-offs inside the token grids and exact resampling: A_i is the low-pass, error the tail."""
    tokenizer = without_network(
        scales=scales, band_schedule="inscribed", resize="fourier", compare="full", limit_bands=limit_bands
    )
    target = latents(2, scales[-1]) + 1
    tails = []
    for k, latent in enumerate(partial_sums(tokenizer, target)):
        torch.testing.assert_close(latent, low_passed(target, tokenizer, 0, k).float(), rtol=0, atol=1e-5)
        tails.append(low_passed(target, tokenizer, k + 1, len(scales)).square().mean().item())
        assert (target - latent).square().mean().item() == pytest.approx(tails[-1], abs=1e-6)
    assert tails == sorted(tails, reverse=True) and tails[0] > 0.5 and tails[-1] == 0

    losses = on_latents(tokenizer, target)(target)[1]
    assert losses.tolist() == pytest.approx([sum(tails) / len(scales)] * 2, rel=1e-5)
    tokenizer.compare = "lowpass"
    assert tokenizer(target)[1].tolist() == pytest.approx([0, 0], abs=1e-10)


@pytest.mark.parametrize(
    ("schedule", "peak"), [("nyquist", 0.24), ("paper_linear", 0.1), ("area", 0.21), ("inscribed", 0.23)]
)
def test_leakage_above_the_cutoff_is_bounded_and_none_where_limited(schedule: str, peak: float) -> None:
    """Share of the latent's energy above its band, with area down, bicubic up, steps of 0.8 and no mean.

    Measured on these fields: at most 0.236, 0.097, 0.202 and 0.222, and under 0.04 from the seventh scale on save
    0.054 of "paper_linear", whose first bands are empty.
    """
    target = latents(200, 16)
    plain, limited = (without_network(0.8, band_schedule=schedule, limit_bands=limit) for limit in (False, True))

    def leakage(tokenizer: FrequencyVQ) -> list[float]:
        sums = partial_sums(tokenizer, target)
        above = [low_passed(latent, tokenizer, k + 1, 10).square().sum() for k, latent in enumerate(sums)]
        return [float(a / latent.square().sum().clamp_min(1e-9)) for a, latent in zip(above, sums, strict=True)]

    found = leakage(plain)
    assert peak / 2 < max(found) < peak and max(found[6:]) < 0.06 and found[-1] == 0
    assert max(leakage(limited)) < 1e-6


def test_empty_bands_repeat_one_token() -> None:
    """The paper's cut-offs leave stages 2 to 5 nothing but what the first left of the mean: 50 tokens of no use."""
    target = latents(8, 16) + torch.linspace(-1, 1, 8)[:, None, None, None]
    network = {"scales": PUBLISHED, "channel_multipliers": (1,), "attention_levels": (), "num_phi": 0, "vocab_size": 64}
    used = {}
    for schedule in ("paper_linear", "nyquist"):
        tokenizer = tiny_frequency(band_schedule=schedule, **network)
        tokens = on_latents(tokenizer, target).encode(target)
        used[schedule] = [[len(row.unique()) for row in item] for item in tokens]
    assert used["paper_linear"][:5] == [[1] * 8] * 5
    assert min(used["paper_linear"][5]) > 1 and min(map(min, used["nyquist"][1:5])) > 1


# ---- losses and gradients


@pytest.mark.parametrize("compare", ["lowpass", "full"])
@pytest.mark.parametrize("changes", ALL.values(), ids=ALL.keys())
def test_losses_and_their_gradient_are_those_of_the_formula(changes: dict[str, Any], compare: str) -> None:
    """The mean over scales of |L_i - A_i|^2; "full" has the whole latent in place of its low-pass L_i."""
    tokenizer = trainable(**(changes | {"compare": compare}))
    count, side = len(tokenizer.scales), tokenizer.scales[-1]
    target = latents(2, side, tokenizer.config["code_dim"]).requires_grad_(True)
    tokens = on_latents(tokenizer, target).encode(target)
    losses = tokenizer(target)[1]
    aims = [low_passed(target.detach(), tokenizer, 0, count if compare == "full" else k) for k in range(count)]
    gaps = [aim - tokenizer.latent(tokens[: k + 1]).detach() for k, aim in enumerate(aims)]
    wanted = sum(gap.square().mean().item() for gap in gaps) / count
    assert losses.tolist() == pytest.approx([wanted] * 2, rel=1e-5)

    (gradient,) = torch.autograd.grad(losses[1], target)
    lowered = [gap if compare == "full" else low_passed(gap, tokenizer, 0, k) for k, gap in enumerate(gaps)]
    torch.testing.assert_close(gradient, (2 / target.numel() / count * sum(lowered)).float(), rtol=1e-4, atol=1e-7)


def test_what_comes_back_goes_straight_through_to_the_latent(tokenizer: FrequencyVQ) -> None:
    """In value the quantised latent, in gradient the identity; the codebook learns from its own loss alone."""
    tokenizer.requires_grad_(True).train()
    target = latents(2, tokenizer.scales[-1], tokenizer.config["code_dim"]).requires_grad_(True)
    rebuilt, losses, _ = on_latents(tokenizer, target)(target)
    torch.testing.assert_close(rebuilt, tokenizer.latent(tokenizer.encode(target)), rtol=0, atol=1e-5)
    back = torch.randn(rebuilt.shape, generator=torch.Generator().manual_seed(0))
    rebuilt.backward(back)
    assert torch.equal(target.grad, back) and tokenizer.codebook.weight.grad is None
    target.grad = None
    losses[1].backward(retain_graph=True)
    assert target.grad.abs().sum() > 0 and not tokenizer.codebook.weight.grad.any()
    target.grad = None
    losses[0].backward()
    assert not target.grad.any()
    learned = [name for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[0] for name in learned} == {"codebook"} | ({"phi"} if len(tokenizer.phi) else set())


# ---- images that keep their first scales only

DROPPING = pytest.mark.parametrize("build", [tiny_tokenizer, tiny_frequency])
Build = Callable[..., MultiScaleVQ]


def kept_scales(tokenizer: MultiScaleVQ, target: Tensor) -> tuple[Tensor, Tensor]:
    """The last scale of every image after a forward pass, found from what came out, and the losses."""
    with torch.no_grad():
        rebuilt, losses, _ = on_latents(tokenizer, target)(target)
        tokens = tokenizer.encode(target)
        sums = [tokenizer.latent(tokens[: k + 1]) for k in range(len(tokens))]
    far = torch.stack([(rebuilt - latent).abs().amax((1, 2, 3)) for latent in sums])
    assert (far.amin(0) < 1e-5).all(), "every image is a prefix of its scales"
    return far.argmin(0), losses


@DROPPING
def test_a_share_of_training_images_keeps_three_scales_or_more(build: Build) -> None:
    """All numbers of scales from three on alike: of 0.6 of the images a quarter each keep 3, 4, 5 and all 6."""
    torch.manual_seed(0)
    total, share = 1200, 0.6
    last, _ = kept_scales(build(scale_dropout=share, **EIGHT).train(), latents(total, 8))
    counts = torch.bincount(last, minlength=6)
    assert counts[:2].sum() == 0 and counts.sum() == total
    for found, chance in zip(counts[2:].tolist(), [0.15, 0.15, 0.15, 0.55], strict=True):
        assert abs(found - total * chance) < 4 * math.sqrt(total * chance * (1 - chance))


@DROPPING
def test_dropped_scales_do_not_count_in_the_losses(build: Build) -> None:
    torch.manual_seed(1)
    tokenizer, target = build(scale_dropout=0.8, **EIGHT).train(), latents(12, 8)
    last, losses = kept_scales(tokenizer, target)
    assert len(last.unique()) == 4
    tokens, wanted = tokenizer.encode(target), 0.0
    for k in range(6):
        gap = tokenizer.aim(target, k) - tokenizer.latent(tokens[: k + 1])
        wanted += gap[last >= k].square().sum().item() / target.numel() / 6
    assert losses.tolist() == pytest.approx([wanted] * 2, rel=1e-5)


@DROPPING
def test_codes_of_dropped_scales_do_not_learn(build: Build) -> None:
    tokenizer, target = build(scale_dropout=1.0).requires_grad_(True).train(), latents(2, 4)
    tokenizer._last_scales = lambda target: torch.tensor([2, 2])
    _, losses, quantized = on_latents(tokenizer, target)(target)
    losses[0].backward()
    moved = tokenizer.codebook.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    kept, dropped = (torch.cat([ids.flatten() for _, ids in part]).tolist() for part in (quantized[:3], quantized[3:]))
    assert moved == sorted(set(kept)) and set(dropped) - set(kept)


@DROPPING
def test_nothing_is_dropped_outside_training(build: Build) -> None:
    tokenizer, plain, target = build(scale_dropout=1.0, **EIGHT), build(**EIGHT), latents(20, 8)
    last, losses = kept_scales(tokenizer.eval(), target)
    assert (last == 5).all() and torch.equal(losses, kept_scales(plain.eval(), target)[1])
    before = torch.get_rng_state()
    assert (kept_scales(plain.train(), target)[0] == 5).all()
    assert torch.equal(torch.get_rng_state(), before), "a training without dropout draws nothing"
    torch.manual_seed(0)
    assert (kept_scales(tokenizer.train(), target)[0] < 5).any()


@pytest.mark.parametrize("scales", [(4,), (2, 4), (1, 2, 4)], ids=str)
def test_up_to_three_scales_are_never_dropped(scales: tuple[int, ...]) -> None:
    tokenizer = tiny_frequency(scales=scales, scale_dropout=1.0).train()
    assert (kept_scales(tokenizer, latents(20, 4))[0] == len(scales) - 1).all()


# ---- saving, devices, transforms


@pytest.mark.parametrize("changes", [{}, {"resize": "fourier", "limit_bands": True, "band_schedule": "area"}], ids=str)
def test_a_saved_tokenizer_comes_back_with_all_its_fields(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = tiny_frequency(compare="full", scale_dropout=0.1, num_phi=2, **changes)
    tokenizer.save_pretrained(tmp_path)
    found = FrequencyVQ.from_pretrained(tmp_path)
    fields = set(inspect.signature(FrequencyVQ.__init__).parameters) - {"self"}
    assert fields == set(inspect.signature(MultiScaleVQ.__init__).parameters) - {"self"} | {
        "band_schedule",
        "compare",
        "resize",
        "limit_bands",
    }
    for name in fields:
        ours, theirs = tokenizer.config[name], found.config[name]
        assert (list(ours) == list(theirs)) if isinstance(ours, (tuple, list)) else ours == theirs, name
    assert (found.compare, found.scale_dropout, found.resize) == ("full", 0.1, changes.get("resize", "area"))
    images = random_images(tokenizer, 2)
    assert torch.equal(found.band, tokenizer.band) and same(found.encode(images), tokenizer.encode(images))
    assert torch.equal(found.decode(found.encode(images)), tokenizer.decode(tokenizer.encode(images)))


def test_a_saved_pipeline_comes_back_with_its_tokenizer(tmp_path: Path, tiny_pipeline: NextScalePipeline) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    found = load(tmp_path / "model")
    assert type(found.tokenizer) is FrequencyVQ
    ours, theirs = (sample(each, [0, 1], [0, 1]) for each in (tiny_pipeline, found))
    assert same(ours.tokens, theirs.tokens) and torch.equal(ours.latent, theirs.latent)


def test_bands_are_known_even_of_a_model_without_memory() -> None:
    with torch.device("meta"):
        tokenizer = FrequencyVQ(scales=PUBLISHED, vocab_size=4096, code_dim=32)
    assert tokenizer.image_size == 256 and sum(side * side for side in tokenizer.scales) == 680
    assert torch.bincount(tokenizer.band.flatten()).tolist() == [1, 8, 4, 12, 12, 24, 40, 60, 70, 25]


@pytest.fixture
def no_fourier(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> Tensor:
        raise AssertionError("a Fourier transform")

    for name in [name for name in dir(torch.fft) if name.endswith(("fft", "fft2", "fftn"))]:
        monkeypatch.setattr(torch.fft, name, refuse)


@pytest.mark.usefixtures("no_fourier")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decoding_and_sampling_need_no_fourier_transform(schedule: str) -> None:
    """Encoding does, unless there is a single band; so does decoding that limits bands or resizes by spectra."""
    tokenizer = tiny_frequency(band_schedule=schedule)
    tokens = random_tokens(tokenizer, 2)
    tokenizer.decode(tokens), tokenizer.context(tokens)
    sample(pipeline_of(tokenizer), [0, 1], [0, 1])
    needing = [lambda: tiny_frequency(resize="fourier", band_schedule=schedule).decode(tokens)]
    if schedule != "none":
        needing += [lambda: tokenizer.encode(random_images(tokenizer, 1))]
        needing += [lambda: tiny_frequency(limit_bands=True, band_schedule=schedule).decode(tokens)]
    for use in needing:
        with pytest.raises(AssertionError, match="a Fourier transform"):
            use()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("changes", [{}, FOURIER["fourier, limited, without phi"]], ids=["published", "fourier"])
def test_sums_of_scales_keep_every_bit_whatever_the_dtype(changes: dict[str, Any], dtype: torch.dtype) -> None:
    tokenizer = tiny_frequency(**changes)
    tokens = random_tokens(tokenizer, 2)
    wanted = tokenizer.latent(tokens)
    tokenizer.to(dtype)
    assert torch.equal(tokenizer.latent(tokens), wanted)
    assert tokenizer.decode(tokenizer.encode(random_images(tokenizer, 2))).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"band_schedule": "octave"}, "unknown band schedule 'octave': use one of none, nyquist, paper_linear, area"),
        ({"compare": "half"}, "unknown compare 'half': use one of lowpass, full"),
        ({"resize": "bicubic"}, "unknown resize 'bicubic': use one of area, fourier"),
        ({"scales": (1, 3, 2)}, "strictly increasing"),
    ],
    ids=str,
)
def test_unknown_settings_are_refused_with_the_known_ones(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        tiny_frequency(**changes)


# ---- sampling and editing with it


def test_what_sampling_feeds_and_predicts_is_what_training_sees(tiny_pipeline: NextScalePipeline) -> None:
    contexts: list[Tensor] = []
    logits: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        contexts.append(given[0])
        logits.append(out)

    hook = tiny_pipeline.generator.register_forward_hook(note)
    tokens = sample(tiny_pipeline, [2, 0], [0, 1], guidance_scale=1.0).tokens
    hook.remove()
    context = tiny_pipeline.tokenizer.context(tokens)
    torch.testing.assert_close(torch.cat(contexts[1:], 1), context, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(logits, 1), tiny_pipeline.logits(tokens, [2, 0]), rtol=0, atol=1e-4)


def test_tokens_of_a_band_reach_the_logits_of_later_bands_only(tiny_pipeline: NextScalePipeline) -> None:
    """Not even those of their own band, whose tokens are drawn together."""
    tokens = random_tokens(tiny_pipeline.tokenizer, 2)
    logits = tiny_pipeline.logits(tokens, [0, 1])
    for k in range(len(SCALES)):
        changed = [(item + 1) % 16 if j == k else item for j, item in enumerate(tokens)]
        end = sum(side * side for side in SCALES[: k + 1])
        other = tiny_pipeline.logits(changed, [0, 1])
        assert torch.equal(other[:, :end], logits[:, :end])
        assert (other[:, end:] != logits[:, end:]).any(-1).all()


def test_kept_cells_hold_the_codes_that_their_band_needs(pipe: NextScalePipeline, mask: Tensor) -> None:  # noqa: F811
    image = picture()
    tokenizer = pipe.tokenizer
    source = tokenizer.encode_latent(to_model_range(image))
    steps = edit_steps(pipe, image, mask)
    before = [tokenizer.new_latent(1)] + [step.latent for step in steps]
    for k, kept in enumerate(keep_masks(mask.bool(), SCALES)):
        given = tokenizer.quantize_scale(low_passed(source, tokenizer, 0, k).float() - before[k], k)
        assert torch.equal(steps[-1].tokens[k][:, kept], given[:, kept])


def test_an_edit_of_nothing_is_encoding(pipe: NextScalePipeline) -> None:
    image = picture(2)
    *_, last = pipe.begin_edit(image, torch.zeros(16, 16, dtype=torch.bool), [0, 1], seeds=[0, 1])[0]
    assert same(last.tokens, pipe.tokenizer.encode(to_model_range(image)))


def test_an_image_takes_ten_evaluations_and_680_tokens() -> None:
    small = {"scales": PUBLISHED, "channel_multipliers": (1,), "attention_levels": ()}
    pipe = pipeline_of(tiny_frequency(**small), tiny_generator(scales=PUBLISHED))
    assert rows_seen(pipe, [0, 1], guidance_scale=1.0) == [2] * 10
    last = sample(pipe, [0], [0])
    assert last.evaluations == 10 and last.known.shape == (1, 680)


@pytest.mark.parametrize(("depth", "millions"), [(16, 310.0), (20, 600.5)])
def test_the_published_generators_have_the_published_size(depth: int, millions: float) -> None:
    with torch.device("meta"):
        model = VAR(
            scales=PUBLISHED, vocab_size=4096, code_dim=32, num_classes=1000, width=64 * depth, depth=depth, heads=depth
        )
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


# ---- learning


def test_a_little_training_fills_the_codebook_and_every_scale_helps() -> None:
    """Measured: ten decibels from the first scale to the last, and a perplexity of 53 of 64; far less is asked for."""
    torch.manual_seed(0)
    tokenizer = trainable(vocab_size=64, attention_levels=(), num_phi=0, image_channels=1)
    images = fourier_resize(latents(256, 3, channels=1), 8).mul(0.4).clamp(-1, 1)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=5e-3)
    for step in range(80):
        batch = images[torch.randint(256, (32,))]
        rebuilt, losses, quantized = tokenizer(batch)
        loss = F.mse_loss(rebuilt, batch) + losses[0] + 0.25 * losses[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for scale, (_, ids) in enumerate(quantized):
            tokenizer.codebook.count(ids, scale, decay=0.9)
        if step % 20 == 0:
            vectors = torch.cat([found.flatten(0, 1) for found, _ in quantized])
            tokenizer.codebook.restart(vectors, 0.03 if step else math.inf)
    tokens = tokenizer.eval().encode(images)
    decibels = [-10 * math.log10(F.mse_loss(tokenizer.decode(tokens[: k + 1])[:, :1], images)) for k in range(4)]
    assert all(later > earlier - 0.1 for earlier, later in pairwise(decibels)), decibels
    assert decibels[-1] > decibels[0] + 3, decibels
    share = torch.bincount(tokens[-1].flatten(), minlength=64) / tokens[-1].numel()
    assert math.exp(torch.special.entr(share).sum()) > 6.4, "a tenth of the codes"


def test_eight_images_are_learned_by_heart() -> None:
    """From the entropy of a guess, ln V, to nothing; then greedy sampling gives each image's own reconstruction."""
    torch.manual_seed(0)
    tokenizer = tiny_frequency()
    images = random_images(tokenizer, 8)
    tokens, labels = tokenizer.encode(images), torch.arange(8)
    generator = VAR(**(TRANSFORMER | {"num_classes": 8, "width": 64}))
    generator.init_weights(gate=1e-3)
    context, wanted = tokenizer.context(tokens), torch.cat(tokens, 1)
    optimizer = torch.optim.Adam(generator.parameters(), lr=5e-3)
    history = []
    for _ in range(100):
        loss = F.cross_entropy(generator(context, labels).transpose(1, 2), wanted)
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[0] == pytest.approx(math.log(16), abs=0.02) and history[-1] < 0.05, (history[0], history[-1])
    pipe = NextScalePipeline(tokenizer, generator.eval())
    last = sample(pipe, list(range(8)), list(range(8)), temperature=0, guidance_scale=1.0)
    assert same(last.tokens, tokens)
    torch.testing.assert_close(tokenizer.decode_latent(last.latent), tokenizer.decode(tokens), rtol=0, atol=1e-5)
