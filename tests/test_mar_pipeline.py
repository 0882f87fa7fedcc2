"""MAR end to end: sampling with and without ReCAP, in-painting, and settings."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import randomise
from torch import Tensor

from vgen.generators.mar import MAR
from vgen.pipelines.mar import MARPipeline
from vgen.rng import SampleStreams
from vgen.samplers.mar import Conditions, MARSettings, mark, unmark
from vgen.samplers.masked import random_order
from vgen.samplers.schedules import reveal_counts
from vgen.tokenizers.kl import KLAutoencoder
from vgen.types import SettingError, Step

N = 16
FAST: dict[str, Any] = {"steps": 8, "diffusion_steps": 6}
RECAP: dict[str, Any] = FAST | {"full_steps": 2, "partial_steps": 2}


def tiny_kl(**changes: Any) -> KLAutoencoder:
    """8 x 8 images, 16 tokens of width 3."""
    config: dict[str, Any] = {
        "side": 4,
        "token_dim": 3,
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "blocks": 1,
        "attention_levels": (1,),
        "norm_groups": 4,
    }
    return randomise(KLAutoencoder(**(config | changes)))  # type: ignore[return-value]


def tiny_mar(**changes: Any) -> MAR:
    """Sixteen tokens of width 3, three classes."""
    config: dict[str, Any] = {
        "num_tokens": N,
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
    return randomise(MAR(**(config | changes)))  # type: ignore[return-value]


def build(tokenizer: KLAutoencoder | None, **changes: Any) -> MARPipeline:
    pipeline = MARPipeline(tokenizer, tiny_mar().double(), id2label={0: "boot", 1: "bag", 2: "sneaker"}, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> MARPipeline:
    """In double precision, so that sums in another order agree closely."""
    return build(tiny_kl())


def steps_of(pipeline: MARPipeline, labels: Any = (0, 2), seeds: Any = (5, 6), **settings: Any) -> list[Step]:
    labels = list(labels) if isinstance(labels, tuple) else labels
    return list(pipeline.stream(labels, seeds=list(seeds), **settings))


def near(found: Tensor, wanted: Tensor, bound: float = 1e-6) -> bool:
    return float((found - wanted).abs().max()) < bound


# ---- sampling


def plain_loop(pipeline: MARPipeline, label: int, seed: int, settings: MARSettings) -> Iterator[Tensor]:
    """MAR's sampling of one image as plainly as it can be written: whole evaluations, one branch after the other."""
    model, rng = pipeline.generator, SampleStreams([seed])
    order = random_order(rng, N)[0]
    tokens, known = torch.zeros(1, N, 3, dtype=torch.float64), torch.zeros(1, N, dtype=torch.bool)
    first = 0
    for step, count in enumerate(reveal_counts(N, settings.steps)):
        where = order[first : first + count]
        first += count
        scale = settings.guidance_scale
        if settings.guidance_schedule == "linear":
            scale = 1 + (scale - 1) * first / N
        elif settings.guidance_schedule == [1, 0.5]:
            scale = 1 + (scale - 1) * (1 - 0.5 * first / N)
        cond = model(tokens, known, torch.tensor([label]))[0, where]
        uncond = model(tokens, known, torch.tensor([model.null_class]))[0, where]
        noise = rng.normal((count, settings.diffusion_steps + 1, 3), key=step)[0]
        steps, heat = settings.diffusion_steps, settings.temperature
        tokens, known = tokens.clone(), known.clone()
        tokens[0, where] = model.head.sample(cond, noise, steps, heat, uncond, scale)
        known[0, where] = True
        yield tokens


@pytest.mark.parametrize("schedule", ["linear", "constant", [1, 0.5]])
def test_sampling_is_the_plain_loop(pipeline: MARPipeline, schedule: Any) -> None:
    settings = FAST | {"guidance_scale": 2.5, "guidance_schedule": schedule, "temperature": 0.9}
    found = steps_of(pipeline, **settings)
    wanted = list(plain_loop(pipeline, 2, 6, MARSettings(**settings)))
    assert len(found) == len(wanted) == 8
    for step, tokens in zip(found, wanted, strict=True):
        assert near(step.tokens[1], tokens[0])
        assert not step.tokens[~step.known].any()
    assert [step.evaluations for step in found] == list(range(1, 9)) and bool(found[-1].known.all())


def test_steps_reveal_what_the_schedule_says_and_never_change_it(pipeline: MARPipeline) -> None:
    for settings in (FAST, RECAP, RECAP | {"group_order": "random"}):
        found = steps_of(pipeline, **settings)
        counts = [step.known.sum(1).tolist() for step in found]
        assert counts == [[total] * 2 for total in torch.tensor(reveal_counts(N, 8)).cumsum(0).tolist()]
        for before, after in pairwise(found):
            assert torch.equal(before.tokens[before.known], after.tokens[before.known])
        assert found[-1].tokens.shape == (2, N, 3) and found[-1].tokens.dtype == torch.float64


def test_without_partial_steps_nothing_of_recap_has_an_effect(pipeline: MARPipeline) -> None:
    base = steps_of(pipeline, **FAST)[-1].tokens
    options: list[dict[str, Any]] = [
        {"full_steps": 3, "partial_diffusion_steps": 4},
        {"cache_buffer": True, "group_order": "random"},
        {"full_steps": 8, "partial_steps": 2},  # all of them whole
    ]
    for changes in options:
        assert torch.equal(steps_of(pipeline, **(FAST | changes))[-1].tokens, base)
    assert not near(steps_of(pipeline, **RECAP)[-1].tokens, base)


def test_groups_are_revealed_in_raster_order_or_in_that_of_the_run(pipeline: MARPipeline) -> None:
    """Two whole steps, then groups of three."""
    base = [step.known for step in steps_of(pipeline, **FAST)]
    random = [step.known for step in steps_of(pipeline, **RECAP, group_order="random")]
    raster = [step.known for step in steps_of(pipeline, **RECAP)]
    assert all(torch.equal(a, b) for a, b in zip(base, random, strict=True))
    assert all(torch.equal(raster[i], base[i]) for i in (0, 1, 4, 7))  # whole steps, and the ends of groups
    assert not all(torch.equal(a, b) for a, b in zip(base, raster, strict=True))
    for start, stop in ((1, 4), (4, 7)):
        for step in range(start + 1, stop + 1):
            new = [set((raster[step] & ~raster[step - 1])[row].nonzero().flatten().tolist()) for row in range(2)]
            later = [set((raster[stop] & ~raster[step])[row].nonzero().flatten().tolist()) for row in range(2)]
            assert all(max(a) < min(b) for a, b in zip(new, later, strict=True) if b)


def test_partial_evaluations_see_the_group_alone(pipeline: MARPipeline) -> None:
    found = steps_of(pipeline, **RECAP)
    partial = [step.evaluated is not None for step in found]
    assert partial == [False, False, False, True, True, False, True, True]
    for index in (3, 4):
        evaluated = found[index].evaluated
        assert evaluated is not None and torch.equal(evaluated, found[4].known & ~found[1].known)


def test_guidance_and_diffusion_steps_of_every_step(pipeline: MARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    sample = pipeline.generator.head.sample

    def spy(condition: Tensor, noise: Tensor, steps: int, temperature: float, uncond: Tensor, scale: Any) -> Tensor:
        assert len(noise) == len(condition) == len(scale) and noise.shape[1] == steps + 1
        seen.append((steps, round(float(scale.min()), 5)))
        return sample(condition, noise, steps, temperature, uncond, scale)

    monkeypatch.setattr(pipeline.generator.head, "sample", spy)
    counts = torch.tensor(reveal_counts(N, 8)).cumsum(0).tolist()
    scales = [round(1 + 1.5 * total / N, 5) for total in counts]
    steps_of(pipeline, **RECAP, guidance_scale=2.5)
    assert seen == list(zip([6, 6, 6, 3, 3, 6, 3, 3], scales, strict=True))
    seen.clear()
    steps_of(pipeline, **RECAP, guidance_scale=2.5, partial_diffusion_steps=4)
    assert [steps for steps, _ in seen] == [6, 6, 6, 4, 4, 6, 4, 4]


def test_branches_keep_features_of_their_own(pipeline: MARPipeline) -> None:
    """The two branches of a guided run are those of two runs without guidance, whole and partial."""
    model, labels, null = pipeline.generator, torch.tensor([0, 2]), torch.tensor([3, 3])
    known = torch.zeros(2, N, dtype=torch.bool)
    known[:, [1, 4, 9]] = True
    tokens = torch.randn(2, N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = torch.tensor([[0, 3, 5], [2, 10, 8]])
    group = mark(tokens[:, :3], torch.tensor([[True, False, False]] * 2))
    found = []
    for branch, guided in ((labels, True), (labels, False), (null, False)):
        conditions = Conditions(model, branch, 3, guided, cache_buffer=False)
        whole = conditions.whole(mark(tokens, known), 2.0, keep=True)
        found.append((whole, conditions.partial(group, places, 2.0)))
    for both, cond, uncond in zip(*found, strict=True):
        assert near(both, torch.cat([cond, uncond], -1), 1e-10) and not near(cond, uncond)


def test_marks_are_undone() -> None:
    latents, known = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.5
    found, kept = unmark(mark(latents, known))
    assert torch.equal(kept, known) and torch.equal(found[known], latents[known]) and not found[~known].any()


def test_guidance_of_one_and_the_null_class_evaluate_one_branch(pipeline: MARPipeline) -> None:
    rows: list[int] = []
    hook = pipeline.generator.register_forward_pre_hook(lambda module, given: rows.append(len(given[2])))
    off = steps_of(pipeline, **RECAP, guidance_scale=1.0)[-1].tokens
    null = steps_of(pipeline, None, **RECAP, guidance_scale=3.0)[-1].tokens
    assert set(rows) == {2}
    steps_of(pipeline, **RECAP, guidance_scale=1.0 + 1e-9)
    hook.remove()
    assert rows[-1] == 4
    assert near(steps_of(pipeline, **RECAP, guidance_scale=1.0 + 1e-9)[-1].tokens, off)
    assert torch.equal(steps_of(pipeline, None, **RECAP, guidance_scale=1.0)[-1].tokens, null)


def test_each_row_equals_its_solo_run(pipeline: MARPipeline) -> None:
    together = steps_of(pipeline, **RECAP)[-1].tokens
    alone = steps_of(pipeline, (2,), (6,), **RECAP)[-1].tokens
    assert near(together[1:], alone)
    assert torch.equal(together, steps_of(pipeline, **RECAP)[-1].tokens)
    assert not near(steps_of(pipeline, (2,), (7,), **RECAP)[-1].tokens, alone)
    assert not near(steps_of(pipeline, (1,), (6,), **RECAP)[-1].tokens, alone)


def test_limits(pipeline: MARPipeline) -> None:
    assert len(steps_of(pipeline, steps=1, diffusion_steps=2)) == 1
    found = steps_of(pipeline, steps=N, diffusion_steps=2, partial_steps=N - 1)  # one whole evaluation
    assert [step.evaluated is None for step in found] == [True] + [False] * (N - 1)
    assert near(found[-1].tokens, steps_of(pipeline, steps=N, diffusion_steps=2, partial_steps=N - 1)[-1].tokens)


def test_the_call_gives_images_and_tokens(pipeline: MARPipeline) -> None:
    output = pipeline(["bag", "sneaker"], seeds=[1, 2], output_type="pt", **FAST)
    assert output.images.shape == (2, 3, 8, 8) and 0 <= output.images.min() <= output.images.max() <= 1
    assert (output.evaluations, output.seeds) == (8, [1, 2])
    assert torch.equal(output.images, pipeline.decode_floats(output.tokens))
    latent = pipeline(["bag", "sneaker"], seeds=[1, 2], output_type="latent", **FAST).images
    assert torch.equal(latent, output.tokens)
    half = steps_of(pipeline, **FAST)[3]
    assert pipeline.decode(half).shape == (2, 3, 8, 8)  # a preview
    generator = torch.Generator().manual_seed(0)
    assert pipeline([0], generator=generator, output_type="latent", **FAST).seeds is None


def test_without_a_tokenizer_there_are_latents_only() -> None:
    pipeline = build(None)
    assert pipeline([0], seeds=[1], output_type="latent", **FAST).images.shape == (1, N, 3)
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(SettingError, match="no tokenizer"):
            pipeline([0], seeds=[1], output_type=output_type, **FAST)


# ---- in-painting


def test_given_tokens_are_kept_exactly_and_read(pipeline: MARPipeline) -> None:
    tokens = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
    known = torch.arange(N) < 6
    for settings in (FAST, RECAP):
        found = steps_of(pipeline, tokens=tokens, known=known, **settings)
        for step in found:
            assert torch.equal(step.tokens[:, known], tokens[known].double().expand(2, -1, -1))
        assert bool(found[-1].known.all()) and len(found) == 8
        other = steps_of(pipeline, tokens=tokens + 1, known=known, **settings)
        assert not near(found[-1].tokens[:, 6:], other[-1].tokens[:, 6:])
    each = torch.stack([known, known.flip(0)])
    found = steps_of(pipeline, tokens=tokens.expand(2, -1, -1), known=each, **FAST)
    assert torch.equal(found[0].known & each, each)
    few = steps_of(pipeline, tokens=tokens, known=torch.arange(N) < N - 2, **FAST)
    assert len(few) == 2  # no more steps than tokens


def test_edits_keep_the_tokens_and_pixels_outside_the_mask(pipeline: MARPipeline) -> None:
    image = torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[3:6, 4:] = True
    cells = torch.zeros(4, 4, dtype=torch.bool)
    cells[1:3, 2:] = True
    given = pipeline.tokenizer.encode(image[None].float() / 127.5 - 1)[0].double()
    steps = list(pipeline.stream_edit(image, mask, [0, 1], seeds=[1, 2], **FAST))
    assert [int(step.known[0].sum()) for step in steps] == [13, 14, 15, 16]
    for step in steps:
        assert torch.equal(step.tokens[:, ~cells.flatten()], given[~cells.flatten()].expand(2, -1, -1))
    edited = pipeline.edit(image, mask, [0, 1], seeds=[1, 2], output_type="pt", **FAST).images
    original = (image.float() / 255)[None].expand(2, -1, -1, -1)
    assert torch.equal(edited[..., ~mask], original[..., ~mask]) and not near(edited, original, 0.01)
    whole = pipeline.edit(image, torch.ones(8, 8), [0], seeds=[1], output_type="pt", **FAST).images
    assert near(whole, pipeline([0], seeds=[1], output_type="pt", **FAST).images, 1 / 255)


# ---- settings


def test_defaults_are_the_models(pipeline: MARPipeline) -> None:
    assert pipeline.resolve_settings({}) == vars(MARSettings(steps=N))
    tuned = build(None, settings={"steps": 5, "guidance_scale": 1.5})
    found = tuned.resolve_settings({"temperature": 0.5}, "mar")
    assert (found["steps"], found["guidance_scale"], found["temperature"]) == (5, 1.5, 0.5)
    with pytest.raises(SettingError, match="steps is 17"):
        build(None, settings={"steps": 17})
    request = pipeline.request([0], [1], None, dict(FAST))
    assert (request.sampler, request.settings["steps"]) == ("mar", 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"steps is 0: it must lie in 1\.\.16"),
        ({"steps": 17}, "steps is 17"),
        ({"diffusion_steps": 1}, r"diffusion_steps is 1: it must lie in 2\.\.1000"),
        ({"partial_diffusion_steps": 1001}, "partial_diffusion_steps is 1001"),
        ({"full_steps": 9, "steps": 8}, r"full_steps is 9: it must lie in 0\.\.8"),
        ({"partial_steps": 8, "steps": 8}, r"partial_steps is 8: it must lie in 0\.\.7"),
        ({"guidance_schedule": "cosine"}, "use 'linear', 'constant', or"),
        ({"group_order": "spiral"}, "'raster' or 'random'"),
        ({"cache_buffer": 1}, "cache_buffer is 1: it must be True or False"),
        ({"temperature": -1}, "temperature is -1"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"top_k": 3}, "unknown setting 'top_k'"),
        ({"sampler": "halton"}, "unknown sampler 'halton'"),
        ({"tokens": torch.zeros(N, 3)}, "tokens and known belong together"),
        ({"tokens": torch.zeros(N, 2), "known": torch.zeros(N) > 0}, "tokens have shape"),
        ({"tokens": torch.zeros(N, 3), "known": torch.zeros(3, N) > 0}, "known have shape"),
        ({"tokens": torch.zeros(N, 3), "known": torch.zeros(N)}, "known has dtype torch.float32"),
        ({"tokens": torch.zeros(N, 3), "known": torch.ones(N) > 0}, "nothing is left to sample"),
        ({"tokens": torch.zeros(N, 3), "known": torch.eye(2, N) > torch.eye(1, N)}, "rows with 0 and 1 known"),
        ({"tokens": torch.full((N, 3), torch.nan), "known": torch.arange(N) < 2}, "finite"),
        ({"tokens": torch.zeros(N, 3).long(), "known": torch.arange(N) < 2}, "floating-point"),
    ],
)
def test_settings_out_of_bounds_are_refused_at_once(
    pipeline: MARPipeline, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        pipeline.stream([0, 1], seeds=[1, 2], **settings)
