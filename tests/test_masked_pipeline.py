"""The masked pipeline: seeds, batches, guidance and limits for every sampler, in-painting, settings, bad input."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_masked import (
    CODES,
    KS_BOUND,
    SAMPLERS,
    TOKENS,
    Evaluated,
    known_masks,
    kolmogorov_smirnov,
    random_tokens,
    sample,
    table_pipeline,
    tiny_generator,
    tiny_pipeline,
    tiny_tokenizer,
)

import vgen
from vgen.data import to_model_range
from vgen.pipelines.masked import MaskedPipeline
from vgen.rng import BatchStream, SampleStreams
from vgen.samplers.logits import guide
from vgen.samplers.masked import MaskedSettings
from vgen.types import SettingError

RUNS: dict[str, dict[str, Any]] = {name: {"sampler": name} for name in SAMPLERS}
RUNS |= {
    "many times": {"sampler": "ancestral-categorical", "steps": 40},
    "kept draws": {"resample_singletons": False, "temperature": 0.8, "temperature_schedule": "linear"},
    "published": {"mask_schedule": "recap", "temperature": 0.6, "temperature_schedule": "sqrt", "top_k": 5},
    "coarse": {"sampler": "ancestral-categorical", "gumbel_bits": 2, "noise_schedule": "cosine", "top_p": 0.8},
    "in parallel": {"sampler": "first-hitting", "steps": 5, "guidance_scale": 1.0},
}
POLICIES = ({}, {"partial_steps": 1}, {"full_steps": 1, "partial_steps": 2})


@pytest.fixture(params=RUNS.values(), ids=RUNS.keys())
def run(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"steps": 8, **request.param}


@pytest.fixture
def pipe() -> MaskedPipeline:
    return tiny_pipeline()


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.tokens, b.tokens)


# ---- randomness belongs to the sample


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_row_of_a_batch_is_its_solo_run(pipe: MaskedPipeline, run: dict[str, Any], policy: dict) -> None:
    labels, seeds = [2, 0, 1, 0], [3, 4, 5, 2**40]
    together = sample(pipe, labels, seeds, **run, **policy)
    for row in range(4):
        alone = sample(pipe, labels[row], seeds[row], **run, **policy)
        assert torch.equal(together.tokens[row : row + 1], alone.tokens)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_so_it_is_where_rows_have_different_tokens_given(pipe: MaskedPipeline, run: dict, policy: dict) -> None:
    labels, seeds, known, tokens = [2, 0, 1, 0], [3, 4, 5, 6], known_masks(0, 13, 9, 15), random_tokens(4)
    together = sample(pipe, labels, seeds, tokens=tokens, known=known, **run, **policy)
    assert torch.equal(together.tokens[known], tokens[known])
    assert together.known.all() and together.tokens.max() < CODES
    for row in range(4):
        given = {"tokens": tokens[row], "known": known[row]}
        alone = sample(pipe, labels[row], seeds[row], **given, **run, **policy)
        assert torch.equal(together.tokens[row : row + 1], alone.tokens)


def test_seeds_repeat_a_run_and_others_change_it(pipe: MaskedPipeline, run: dict[str, Any]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sample(pipe, [0, 0, 1, 0], [1, 2, 1, 1], **run).tokens
    assert torch.equal(torch.get_rng_state(), before), "the global generator is neither read nor touched"
    assert torch.equal(first, sample(pipe, [0, 0, 1, 0], [1, 2, 1, 1], **run).tokens)
    assert torch.equal(first[0], first[3])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_generator_draws_for_the_whole_batch(pipe: MaskedPipeline, sampler: str) -> None:
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        outputs = [pipe([0, 0], generator=generator, sampler=sampler, partial_steps=1) for _ in range(2)]
        assert outputs[0].seeds is None and outputs[0].tokens.max() < CODES
        runs.append(outputs)
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1]) and not same(runs[0][0], runs[0][1])


def test_normal_noise_belongs_to_the_sample() -> None:
    together = SampleStreams([5, 8]).normal((20_000, 2), key=3)
    assert torch.equal(together[1:], SampleStreams([8]).normal((20_000, 2), key=3))
    assert torch.equal(together[:, :50], SampleStreams([5, 8]).normal((50, 2), key=3)), "longer draws begin the same"
    assert together.dtype == torch.float32
    assert kolmogorov_smirnov(torch.special.ndtr(together)) < KS_BOUND
    assert kolmogorov_smirnov(torch.special.ndtr(together * 1.05)) > KS_BOUND
    assert not torch.equal(together, SampleStreams([5, 8]).normal((20_000, 2), key=4))
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    rng = BatchStream(ours, batch=2)
    for shape in [(3, 5), (4, 5)]:
        assert torch.equal(rng.normal(shape, key=0), torch.randn(2, *shape, generator=theirs))


# ---- limits


def test_an_oracle_is_decoded_exactly(run: dict[str, Any]) -> None:
    target = random_tokens(1)[0]
    settings = {**run, "top_k": 0}
    for policy in POLICIES:
        pipe = table_pipeline(torch.nn.functional.one_hot(target, CODES)[None].double())
        assert torch.equal(sample(pipe, [0, 0], [0, 1], **settings, **policy).tokens, target.expand(2, -1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ways_to_be_greedy(pipe: MaskedPipeline, sampler: str) -> None:
    """Every token is the likeliest given all that was known before; which come first is the sampler's."""
    settings = {"sampler": sampler, "steps": 6, "guidance_scale": 1.0}
    greedy = list(pipe.stream([0, 1], seeds=[0, 1], **settings, temperature=0))
    before, known = torch.full((2, TOKENS), CODES), torch.zeros(2, TOKENS, dtype=torch.bool)
    for step in greedy:
        now = step.known & ~known
        assert torch.equal(step.tokens[now], pipe.logits(before, [0, 1]).argmax(-1)[now])
        before, known = step.tokens, step.known
    others = [{"top_p": 0.0}, {"top_k": 1}, {"temperature": 1e-9}]
    if sampler == "maskgit":  # truncation also changes what decides its order
        others = [{"temperature": 1e-9}]
    for other in others:
        assert same(sample(pipe, [0, 1], [0, 1], **settings, **other), greedy[-1])
    assert not same(sample(pipe, [0, 1], [0, 1], **settings), greedy[-1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_draws_everything_from_one_evaluation(pipe: MaskedPipeline, sampler: str) -> None:
    step = sample(pipe, [0, 1], [0, 1], sampler=sampler, steps=1, temperature=0, guidance_scale=3.0)
    masks = torch.full((2, TOKENS), CODES)
    # Guidance goes by the share known after the step; the slow form cannot know that, and takes the share before.
    scale = 1.0 if sampler == "ancestral-categorical" else 3.0
    wanted = guide(pipe.logits(masks, [0, 1]), pipe.logits(masks), scale).argmax(-1)
    assert torch.equal(step.tokens, wanted) and (step.index, step.total, step.evaluations) == (0, 1, 1)


def test_guidance_costs_a_second_branch_only_where_it_is_on(pipe: MaskedPipeline, run: dict[str, Any]) -> None:
    for labels, scale, rows in (([0, 1], 2.0, 4), ([0, 1], 1.0, 2), (None, 2.0, 2)):
        seen = Evaluated(pipe.generator)
        sample(pipe, labels, [0, 1], **{**run, "guidance_scale": scale}, partial_steps=1)
        seen.hook.remove()
        assert {call[0] for call in seen.calls} == {rows}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_and_its_limits(pipe: MaskedPipeline, sampler: str) -> None:
    settings = {"sampler": sampler, "steps": 8, "partial_steps": 1}

    def guided(labels: Any, scale: float, schedule: Any = "linear") -> Any:
        return sample(pipe, labels, [0, 1], guidance_scale=scale, guidance_schedule=schedule, **settings)

    off, unconditional = guided([0, 1], 1.0), guided(None, 1.0)
    for schedule in ("linear", "constant"):
        assert same(guided([0, 1], 1 + 1e-6, schedule), off)
        assert same(guided(None, 5.0, schedule), unconditional)
        assert not same(guided([0, 1], 9.0, schedule), off)
    assert same(guided([0, 1], 0.0, "constant"), unconditional) and not same(off, unconditional)
    assert not same(guided([0, 1], 9.0, "linear"), guided([0, 1], 9.0, "constant"))
    assert same(guided([0, 1], 9.0, [0, 1]), guided([0, 1], 9.0, "linear"))
    assert same(guided([0, 1], 9.0, "1:1:1"), guided([0, 1], 9.0, "constant"))
    assert same(guided([0, 1], 9.0, [0, 0]), off)


# ---- steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_closed_stream_stops_evaluating_and_frees_its_cache(pipe: MaskedPipeline, sampler: str) -> None:
    made: list[weakref.ref] = []
    new_cache = pipe.generator.new_cache

    def spy(batch: int) -> Any:
        cache = new_cache(batch)
        made.append(weakref.ref(cache))
        return cache

    pipe.generator.new_cache = spy
    seen = Evaluated(pipe.generator)
    stream = pipe.stream([0, 1], seeds=[0, 1], sampler=sampler, steps=8, partial_steps=1)
    assert not seen.calls, "nothing is evaluated before the first step is asked for"
    next(stream)
    assert len(seen.calls) == 1 and len(made) == 1 and made[0]() is not None
    stream.close()  # type: ignore[attr-defined]
    del stream
    gc.collect()
    assert len(seen.calls) == 1 and made[0]() is None


def test_a_cache_is_made_once_and_only_for_partial_evaluations(pipe: MaskedPipeline, run: dict[str, Any]) -> None:
    made: list[int] = []
    new_cache = pipe.generator.new_cache
    pipe.generator.new_cache = lambda batch: made.append(batch) or new_cache(batch)
    sample(pipe, None, [0, 1], **run)
    assert made == []
    sample(pipe, None, [0, 1], **run, partial_steps=1)
    assert made == [2]


def test_every_step_can_be_decoded(pipe: MaskedPipeline, run: dict[str, Any]) -> None:
    """Masked tokens show as the mean of all codes."""
    codes = pipe.tokenizer.codebook.weight
    for step in pipe.stream([0, 1], seeds=[0, 1], **run, partial_steps=1):
        image = pipe.decode(step)
        assert image.dtype == torch.uint8 and image.shape == (2, 3, 8, 8)
        assert torch.equal(image, pipe.decode(step.tokens))
        vectors = pipe.latent(step).flatten(2).transpose(1, 2)
        wanted = torch.cat([codes, codes.mean(0, keepdim=True)])[step.tokens]
        assert torch.allclose(vectors, wanted, atol=1e-6)
        assert not step.tokens.requires_grad and step.known.dtype == torch.bool


def test_output_types_agree(pipe: MaskedPipeline) -> None:
    outputs = {
        kind: pipe(["bag", 0], seeds=[0, 1], steps=5, output_type=kind) for kind in ("pil", "np", "pt", "latent")
    }
    images = {kind: output.images for kind, output in outputs.items()}
    pixels = pipe.decode(outputs["pt"].tokens)
    assert torch.equal(images["pt"].mul(255).round().to(torch.uint8), pixels)
    assert np.array_equal(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(images["pil"][1]), pixels[1].permute(1, 2, 0).numpy())
    assert torch.equal(images["latent"], pipe.tokenizer.latent(outputs["pt"].tokens))
    for output in outputs.values():
        assert output.evaluations == 5 and output.seeds == [0, 1] and output.seconds > 0
        assert same(output, outputs["pil"])


def test_teacher_forced_logits(pipe: MaskedPipeline) -> None:
    tokens = random_tokens(2).masked_fill(known_masks(5, 9), CODES)
    logits = pipe.logits(tokens, ["bag", 0])
    assert logits.shape == (2, TOKENS, CODES) and logits.dtype == torch.float32
    assert torch.equal(logits, pipe.generator(tokens, torch.tensor([1, 0])))
    assert torch.equal(pipe.logits(tokens), pipe.generator(tokens, torch.tensor([3, 3])))
    with pytest.raises(SettingError, match="1 class labels for 2 rows"):
        pipe.logits(tokens, 0)


def test_without_a_tokenizer_there_are_tokens() -> None:
    pipe = MaskedPipeline(None, tiny_generator())
    output = pipe([0, 1], seeds=[0, 1], output_type="latent")
    assert torch.equal(output.images, output.tokens) and output.tokens.shape == (2, TOKENS)
    for use in (lambda: pipe([0], seeds=[0]), lambda: pipe.decode(output.tokens), lambda: pipe.decode_floats(output)):
        with pytest.raises(SettingError, match=r"no tokenizer.*tokenizer="):
            use()


def test_a_saved_pipeline_samples_the_same(tmp_path: Path) -> None:
    pipe = tiny_pipeline(generator=tiny_generator(), steps=6, temperature=0.7)
    pipe.save_pretrained(tmp_path / "model")
    loaded = vgen.load(tmp_path / "model", dtype="float32", device="cpu")
    assert loaded.resolve_settings({}) == pipe.resolve_settings({}) and loaded.class_names == pipe.class_names
    ours, theirs = (p(["bag", 0], seeds=[0, 1], partial_steps=1, output_type="pt") for p in (pipe, loaded))
    assert same(ours, theirs) and torch.allclose(ours.images, theirs.images, atol=1e-6)


# ---- in-painting


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_given_tokens_stay_and_the_others_are_revealed(pipe: MaskedPipeline, run: dict, policy: dict) -> None:
    """What is given where nothing is known is of no importance."""
    known, tokens = known_masks(9)[0], random_tokens(1)[0]
    steps = list(pipe.stream([0, 1], seeds=[0, 1], tokens=tokens, known=known, **run, **policy))
    for step in steps:
        assert torch.equal(step.tokens[:, known], tokens[known].expand(2, -1)) and step.known[:, known].all()
        assert torch.equal(step.tokens == CODES, ~step.known)
    assert steps[-1].known.all()
    if run.get("sampler") != "ancestral-categorical":
        assert int(steps[0].known[0].sum()) > 9 and len(steps) <= 7
    rubbish = torch.where(known, tokens, 999)
    given = {"tokens": rubbish.tolist(), "known": known.tolist()}
    assert same(sample(pipe, [0, 1], [0, 1], **given, **run, **policy), steps[-1])
    other = sample(pipe, [0, 1], [0, 1], tokens=(tokens + 1) % CODES, known=known, **run, **policy)
    assert not torch.equal(other.tokens[:, ~known], steps[-1].tokens[:, ~known])


def test_forms_of_given_tokens(pipe: MaskedPipeline) -> None:
    tokens, known = random_tokens(1), known_masks(9)
    forms: list[Any] = [(tokens, known), (tokens[0], known), (tokens.expand(2, -1), known[0])]
    forms += [(tokens.numpy().astype(kind), known.numpy()) for kind in (np.uint16, np.int32, np.uint8)]
    wanted = sample(pipe, [0, 1], [0, 1], tokens=tokens[0], known=known[0])
    assert all(same(sample(pipe, [0, 1], [0, 1], tokens=a, known=b), wanted) for a, b in forms)
    nothing = sample(pipe, [0, 1], [0, 1], tokens=tokens[0], known=torch.zeros(TOKENS, dtype=torch.bool))
    assert same(nothing, sample(pipe, [0, 1], [0, 1]))


def picture(batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_an_edit_repaints_every_token_with_a_painted_pixel(pipe: MaskedPipeline) -> None:
    mask = torch.zeros(8, 8)
    mask[3:5, 5] = 1  # across two tokens
    steps = list(pipe.stream_edit(picture(), mask, 1, seeds=[3], steps=8))
    given = pipe.tokenizer.encode(to_model_range(picture()))
    assert len(steps) == 2 and (steps[-1].tokens != given).nonzero()[:, 1].tolist() in ([6, 10], [6], [10])
    assert int(steps[0].known.sum()) == 15
    edited = pipe.edit(picture(), mask, 1, seeds=[3], steps=8, output_type="pt").images.mul(255).round()
    assert torch.equal(edited[..., mask == 0], picture()[..., mask == 0].float())
    whole = list(pipe.stream_edit(picture(), torch.ones(8, 8), 1, seeds=[3], steps=8))
    assert same(whole[-1], sample(pipe, 1, 3, steps=8))


def test_edits_of_several_images_and_versions(pipe: MaskedPipeline) -> None:
    mask = torch.zeros(8, 8)
    mask[2:6, 2:6] = 1
    together = pipe.edit(picture(2), mask, [0, 1], seeds=[5, 6], output_type="pt").images
    alone = pipe.edit(picture(2)[1], mask, 1, seeds=[6], output_type="pt").images
    assert torch.allclose(together[1:], alone, atol=1 / 254)
    versions = pipe.edit(picture(), mask, [0, 1, 2], seeds=[5, 6, 7], output_type="pt").images
    assert versions.shape == (3, 3, 8, 8)
    with pytest.raises(SettingError, match=r"tokens have shape \(2, 16\): give \(16,\) or \(3, 16\)"):
        pipe.edit(picture(2), mask, [0, 1, 2], seeds=[5, 6, 7])


# ---- settings


def test_resolved_settings_repeat_the_run(run: dict[str, Any]) -> None:
    """Every setting with its default; given back, for the same sampler, they change nothing."""
    pipe = tiny_pipeline(choice_temperature=2.0, steps=10, full_steps=3, partial_steps=1)
    given = {name: value for name, value in run.items() if name != "sampler"}
    sampler = run.get("sampler")
    resolved = pipe.resolve_settings(given, sampler)
    assert list(resolved) == list(MaskedSettings.__dataclass_fields__) and resolved.items() >= given.items()
    again = sample(pipe, [0, 1], [0, 1], sampler=sampler, **resolved)
    assert same(again, sample(pipe, [0, 1], [0, 1], **run))
    assert same(again, sample(tiny_pipeline(), [0, 1], [0, 1], sampler=sampler, **resolved))
    request = pipe.request([0, 1], [0, 1], sampler, given)
    assert request.sampler == (sampler or "maskgit") and request.settings == resolved


def test_a_models_defaults_are_its_own() -> None:
    """Of other samplers it takes what they read, less the numbers of steps."""
    own = {"steps": 10, "full_steps": 9, "partial_steps": 1, "choice_temperature": 2.0, "mask_schedule": "arccos"}
    pipe, plain = tiny_pipeline(**own, temperature=0.5), tiny_pipeline()
    assert pipe.resolve_settings({}) == plain.resolve_settings({**own, "temperature": 0.5})
    assert pipe.resolve_settings({"temperature": 2.0})["temperature"] == 2.0
    for sampler in SAMPLERS[1:]:
        reads = {"mask_schedule": "arccos"} if sampler in ("halton", "random") else {}
        wanted = plain.resolve_settings({"temperature": 0.5, **reads}, sampler)
        assert pipe.resolve_settings({}, sampler) == wanted
        assert sample(pipe, [0], [0], sampler=sampler).known.all()
    assert same(sample(pipe, [0], [0]), sample(plain, [0], [0], **own, temperature=0.5))


ALL = torch.ones(TOKENS, dtype=torch.bool)
HALF = torch.arange(TOKENS) < 8
ZEROS = torch.zeros(TOKENS, dtype=torch.int64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 17}, r"steps is 17, but an image has 16 tokens: take 1\.\.16"),
        ({"steps": 17, "sampler": "first-hitting"}, "steps is 17, but an image has 16 tokens"),
        ({"steps": 0}, r"steps is 0: it must lie in 1\.\."),
        ({"steps": 2.5}, "steps is 2.5: it must be a whole number"),
        ({"steps": 100_001, "sampler": "ancestral"}, "steps is 100001"),
        ({"mask_schedule": "recap", "steps": 16}, r"no token for the last of 16 steps.*take fewer"),
        ({"mask_schedule": "cosin"}, "mask_schedule is 'cosin': use 'cosine' or"),
        ({"steps": 8, "full_steps": 9}, r"full_steps is 9: it must lie in 0\.\.8"),
        ({"full_steps": 13}, r"full_steps is 13: it must lie in 0\.\.12"),
        ({"full_steps": -1}, r"full_steps is -1: it must lie in 0\.\."),
        ({"full_steps": 65, "sampler": "ancestral"}, r"full_steps is 65: it must lie in 0\.\.64"),
        ({"partial_steps": -1}, r"partial_steps is -1: it must lie in 0\.\."),
        ({"steps": 8, "partial_steps": 8}, r"partial_steps is 8: it must lie in 0\.\.7"),
        ({"partial_steps": 64, "sampler": "ancestral-categorical"}, r"partial_steps is 64: it must lie in 0\.\.63"),
        ({"partial_steps": True}, "partial_steps is True"),
        ({"sampler": "ddim"}, "unknown sampler 'ddim': use one of maskgit, halton, random, first-hitting, "),
        ({"sampler": "halton", "choice_temperature": 1.0}, "choice_temperature is of no effect .*'halton'.* maskgit"),
        ({"sampler": "random", "resample_singletons": False}, "resample_singletons is of no effect with .*'random'"),
        ({"sampler": "ancestral", "mask_schedule": "cosine"}, "mask_schedule is of no effect with .*'ancestral'"),
        ({"noise_schedule": "cosine"}, "noise_schedule is of no effect with .*'maskgit': it is read by first-hitting"),
        ({"sampler": "ancestral", "gumbel_bits": 24}, "gumbel_bits is of no effect with .*'ancestral'"),
        ({"sampler": "ancestral-categorical", "temperature_schedule": "sqrt"}, "temperature_schedule is of no effect"),
        ({"sampler": "ancestral-categorical", "gumbel_bits": 54}, r"gumbel_bits is 54: it must lie in 0\.\.53"),
        ({"sampler": "ancestral", "noise_schedule": "log"}, "noise_schedule is 'log': use 'linear' or"),
        ({"choice_temperature": -1}, "choice_temperature is -1"),
        ({"resample_singletons": 1}, "resample_singletons is 1: it must be True or False"),
        ({"temperature_schedule": "root"}, "temperature_schedule is 'root'"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule is 'cosine'"),
        ({"top_k": 13}, r"top_k is 13.*0\.\.12"),
        ({"cfg": 1.5}, "unknown setting 'cfg'"),
        ({"known": HALF}, "tokens and known belong together"),
        ({"tokens": ZEROS}, "tokens and known belong together"),
        ({"tokens": ZEROS, "known": HALF[:15]}, r"known have shape \(15,\): give \(16,\) or \(2, 16\)"),
        ({"tokens": ZEROS.expand(3, -1), "known": HALF}, r"tokens have shape \(3, 16\): give \(16,\) or \(2, 16\)"),
        ({"tokens": ZEROS.view(4, 4), "known": HALF}, r"tokens have shape \(4, 4\)"),
        ({"tokens": ZEROS, "known": HALF.long()}, "known has dtype torch.int64: give booleans"),
        ({"tokens": ZEROS, "known": HALF.float().tolist()}, "known has dtype torch.float32"),
        ({"tokens": ZEROS, "known": ALL}, "every token of an image is known"),
        ({"tokens": ZEROS, "known": torch.stack([HALF, ALL])}, "every token of an image is known"),
        ({"tokens": ZEROS + CODES, "known": HALF}, r"known tokens must be whole numbers in 0\.\.11"),
        ({"tokens": ZEROS - 1, "known": HALF}, r"known tokens must be whole numbers in 0\.\.11"),
        ({"tokens": ZEROS + 0.5, "known": HALF}, r"known tokens must be whole numbers in 0\.\.11"),
        ({"tokens": "abc", "known": HALF}, "tokens"),
        ({"tokens": [[1, 2], [3]], "known": HALF}, "tokens"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(pipe: MaskedPipeline, settings: dict[str, Any], message: str) -> None:
    """Before anything is evaluated."""
    seen = Evaluated(pipe.generator)
    for use in (pipe.stream, pipe):
        with pytest.raises(SettingError, match=message) as caught:
            use([0, 1], seeds=[0, 1], **settings)
        assert "\n" not in str(caught.value)
    assert not seen.calls


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny_pipeline(tiny_tokenizer(vocab_size=13)), "do not fit: vocab_size is 13 against 12"),
        (lambda: tiny_pipeline(tiny_tokenizer(side=3)), "do not fit: number of tokens is 9 against 16"),
        (lambda: tiny_pipeline(steps=17), "steps is 17, but an image has 16 tokens"),
        (lambda: tiny_pipeline(mask_schedule="recap"), "no token for the last of 12 steps"),
        (lambda: tiny_pipeline(heat=2), "unknown setting 'heat'"),
    ],
)
def test_impossible_pipelines_are_refused(build: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build()


def test_halton_needs_a_square() -> None:
    pipe = MaskedPipeline(None, tiny_generator(num_tokens=12))
    with pytest.raises(SettingError, match="'halton' needs a square grid of tokens, 12 is no square: use 'random'"):
        pipe.stream([0], seeds=[0], sampler="halton")
    assert sample(pipe, [0], [0], sampler="random").known.all()


def test_a_run_shorter_than_the_models_own_keeps_what_fits_of_its_recap() -> None:
    pipe = tiny_pipeline(steps=10, full_steps=9, partial_steps=1)
    assert pipe.resolve_settings({"steps": 8})["full_steps"] == 8
    assert sample(pipe, [0], [0], steps=1).known.all()
