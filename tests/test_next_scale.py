"""Next-scale sampling through the pipeline: oracles, seeds, batches, guidance, steps, settings."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SCALES, random_images, random_tokens, tiny_generator, tiny_pipeline, tiny_tokenizer
from torch import Tensor

from vgen.data import to_uint8, to_unit_range
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.rng import SampleStreams
from vgen.samplers.logits import draw, guide, temper, truncate
from vgen.samplers.next_scale import NextScaleSettings, next_scale
from vgen.types import NextScaleTokenizer, SettingError, Step

Pipeline = NextScalePipeline
LENGTHS = [side * side for side in SCALES]
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "constant guidance": {"guidance_scale": 4.0, "guidance_schedule": "constant"},
    "unguided": {"guidance_scale": 1.0},
    "truncated": {"top_k": 5, "top_p": 0.8, "temperature": 1.3},
    "cooling": {"temperature": 0.6, "temperature_schedule": "linear"},
    "smooth": {"more_smooth": True, "top_k": 9},
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def sample(pipe: Pipeline, labels: Any, seeds: Any, **settings: Any) -> Step:
    """The last step."""
    *_, last = pipe.stream(labels, seeds=seeds, **settings)
    return last


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def rows(tokens: Sequence[Tensor], index: list[int]) -> list[Tensor]:
    return [item[index] for item in tokens]


# ---- an oracle must be decoded exactly


class Oracle:
    """A generator that knows the sample, and notes what it was given to read."""

    def __init__(self, target: list[Tensor], vocab_size: int) -> None:
        self.target, self.vocab_size = target, vocab_size
        self.contexts: list[Tensor] = []

    def condition(self, class_labels: Tensor) -> Tensor:
        return class_labels

    def new_cache(self, batch: int) -> int:
        return batch

    def __call__(self, context: Tensor, condition: Tensor, cache: int) -> Tensor:
        known = self.target[len(self.contexts)]
        self.contexts.append(context)
        branches = len(condition) // len(known)
        return torch.nn.functional.one_hot(known, self.vocab_size).float().mul(200).repeat(branches, 1, 1)


def test_an_oracle_is_decoded_exactly_and_reads_the_context(settings: dict[str, Any]) -> None:
    """Whatever the noise; what it reads while sampling is what training would have shown it."""
    tokenizer = tiny_tokenizer()
    target = random_tokens(tokenizer, 2)
    oracle = Oracle(target, 16)
    chosen = NextScaleSettings(**settings)
    *_, last = next_scale(oracle, tokenizer, torch.tensor([0, 1]), 3, SampleStreams([0, 1]), chosen)
    assert same(last.tokens, target)
    read = torch.cat([context[:2] for context in oracle.contexts[1:]], dim=1)
    torch.testing.assert_close(read, tokenizer.context(target), rtol=0, atol=1e-4)
    torch.testing.assert_close(last.latent, tokenizer.latent(target), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "heats"),
    [("constant", [1.3] * 4), ("linear", [1.0, 1.1, 1.2, 1.3]), ("sqrt", [1.0, 1.17321, 1.24495, 1.3])],
)
def test_tokens_are_the_race_over_teacher_forced_logits(
    tiny_pipeline: Pipeline, schedule: str, heats: list[float]
) -> None:
    """The whole loop against the slow way: logits of the full pass, guided, truncated, drawn scale by scale."""
    chosen = {"guidance_scale": 3.0, "top_k": 9, "top_p": 0.9, "temperature": 1.3, "temperature_schedule": schedule}
    labels, seeds = [2, 0], [4, 5]
    tokens = sample(tiny_pipeline, labels, seeds, **chosen).tokens
    cond, uncond = tiny_pipeline.logits(tokens, labels), tiny_pipeline.logits(tokens, None)
    noise = SampleStreams(seeds)
    for k, (c, u) in enumerate(zip(cond.split(LENGTHS, 1), uncond.split(LENGTHS, 1), strict=True)):
        guided = guide(c, u, 1 + 2.0 * k / (len(SCALES) - 1))
        drawn = draw(truncate(temper(guided, heats[k]), 9, 0.9), noise.exponential((LENGTHS[k], 16), key=2 * k))
        assert torch.equal(drawn, tokens[k])


# ---- randomness belongs to the sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_of_a_batch_is_its_solo_run(settings: dict[str, Any], dtype: torch.dtype) -> None:
    pipe = tiny_pipeline(generator=tiny_generator().to(dtype))
    labels, seeds = [2, 0, 1, 0], [3, 4, 5, 2**40]
    together = sample(pipe, labels, seeds, **settings)
    for row in range(4):
        alone = sample(pipe, labels[row], seeds[row], **settings)
        assert same(rows(together.tokens, [row]), alone.tokens)
        torch.testing.assert_close(together.latent[row], alone.latent[0], rtol=0, atol=1e-4)


def test_the_order_of_a_batch_does_not_matter(tiny_pipeline: Pipeline, settings: dict[str, Any]) -> None:
    labels, seeds, order = [0, 1, 2, 1], [7, 8, 9, 10], [2, 0, 3, 1]
    tokens = sample(tiny_pipeline, labels, seeds, **settings).tokens
    shuffled = sample(tiny_pipeline, [labels[i] for i in order], [seeds[i] for i in order], **settings).tokens
    assert same(rows(tokens, order), shuffled)


def test_seeds_and_labels_make_a_difference(tiny_pipeline: Pipeline) -> None:
    tokens = torch.cat(sample(tiny_pipeline, [0, 0, 1, 0], [1, 2, 1, 1]).tokens, dim=1)
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[0], tokens[3])


def test_the_global_generator_is_neither_read_nor_touched(tiny_pipeline: Pipeline, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sample(tiny_pipeline, [0, 1], [0, 1], **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert same(sample(tiny_pipeline, [0, 1], [0, 1], **settings).tokens, first.tokens)


def test_random_seeds_are_told_and_repeat_the_run(tiny_pipeline: Pipeline) -> None:
    first, other = (tiny_pipeline([0, 1, 2], output_type="pt") for _ in range(2))
    assert len(set(first.seeds)) == 3 and first.seeds != other.seeds
    again = tiny_pipeline([0, 1, 2], seeds=first.seeds, output_type="pt")
    assert same(again.tokens, first.tokens) and torch.equal(again.images, first.images)


def test_one_label_serves_all_seeds(tiny_pipeline: Pipeline) -> None:
    assert same(sample(tiny_pipeline, 1, [0, 1]).tokens, sample(tiny_pipeline, [1, 1], [0, 1]).tokens)
    assert same(sample(tiny_pipeline, "bag", [0, 1]).tokens, sample(tiny_pipeline, [1, 1], [0, 1]).tokens)


def test_one_generator_draws_for_the_whole_batch(tiny_pipeline: Pipeline) -> None:
    """In sequence, so that two calls with one generator differ and a fresh one repeats them."""
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        outputs = [tiny_pipeline([0, 0], generator=generator, output_type="latent") for _ in range(2)]
        assert outputs[0].seeds is None
        runs.append([output.tokens for output in outputs])
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1])
    assert not same(runs[0][0], runs[0][1])


# ---- guidance and its limits


def rows_seen(pipe: Pipeline, labels: Any, **settings: Any) -> list[int]:
    """How many rows the generator evaluated at each scale."""
    seen: list[int] = []
    hook = pipe.generator.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    sample(pipe, labels, [0, 1], **settings)
    hook.remove()
    return seen


def test_guidance_costs_a_second_branch_only_where_it_is_on(tiny_pipeline: Pipeline) -> None:
    assert rows_seen(tiny_pipeline, [0, 1], guidance_scale=2.0) == [4] * 4
    assert rows_seen(tiny_pipeline, [0, 1], guidance_scale=1.0) == [2] * 4
    assert rows_seen(tiny_pipeline, None, guidance_scale=2.0) == [2] * 4


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guidance_near_one_approaches_no_guidance(tiny_pipeline: Pipeline, schedule: str) -> None:
    off = sample(tiny_pipeline, [0, 1], [0, 1], guidance_scale=1.0)
    near = sample(tiny_pipeline, [0, 1], [0, 1], guidance_scale=1 + 1e-6, guidance_schedule=schedule)
    far = sample(tiny_pipeline, [0, 1], [0, 1], guidance_scale=9.0, guidance_schedule=schedule)
    assert same(off.tokens, near.tokens) and not same(off.tokens, far.tokens)


def test_a_curve_of_guidance_is_read_at_every_scale(tiny_pipeline: Pipeline) -> None:
    def guided(schedule: Any) -> Any:
        return sample(tiny_pipeline, [0, 1], [0, 1], guidance_scale=9.0, guidance_schedule=schedule).tokens

    assert same(guided([0, 1]), guided("linear")) and same(guided("1:1"), guided("constant"))
    last = len(tiny_pipeline.tokenizer.scales) - 1
    late, never = guided([0.0] * last + [1.0]), guided([0, 0])
    assert same(late[:-1], never[:-1]) and not same(late[-1:], never[-1:])


def test_no_guidance_at_all_is_unconditional(tiny_pipeline: Pipeline) -> None:
    zero = sample(tiny_pipeline, [0, 1], [0, 1], guidance_scale=0.0, guidance_schedule="constant")
    assert same(zero.tokens, sample(tiny_pipeline, None, [0, 1]).tokens)


def test_unconditional_sampling_ignores_guidance(tiny_pipeline: Pipeline) -> None:
    """Both branches would be the same one."""
    wanted = sample(tiny_pipeline, None, [0, 1], guidance_scale=1.0)
    assert same(sample(tiny_pipeline, None, [0, 1], guidance_scale=5.0).tokens, wanted.tokens)


def test_three_ways_to_be_greedy(tiny_pipeline: Pipeline) -> None:
    greedy = sample(tiny_pipeline, [0, 1, 2], [0, 1, 2], temperature=0)
    for settings in ({"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-9}):
        assert same(sample(tiny_pipeline, [0, 1, 2], [0, 1, 2], **settings).tokens, greedy.tokens)
    assert same(sample(tiny_pipeline, [0, 1, 2], [5, 6, 7], temperature=0).tokens, greedy.tokens)
    assert not same(sample(tiny_pipeline, [0, 1, 2], [0, 1, 2]).tokens, greedy.tokens)


def test_more_smooth_feeds_back_a_mixture_of_codes(tiny_pipeline: Pipeline) -> None:
    """The first scale draws the same token; what is fed back lies between codes, inside their hull."""
    plain = next(iter(tiny_pipeline.stream([0, 1], seeds=[0, 1])))
    smooth = next(iter(tiny_pipeline.stream([0, 1], seeds=[0, 1], more_smooth=True)))
    assert same(plain.tokens, smooth.tokens)
    assert not torch.allclose(plain.latent, smooth.latent)
    phi_ratio_zero = tiny_tokenizer(phi_ratio=0.0)
    step = next(iter(tiny_pipeline_of(phi_ratio_zero).stream([0, 1], seeds=[0, 1], more_smooth=True)))
    fed, codes = step.latent[:, :, 0, 0], phi_ratio_zero.code_vectors
    assert (torch.cdist(fed, codes).amin(1) > 1e-4).all()
    assert (fed >= codes.amin(0) - 1e-5).all() and (fed <= codes.amax(0) + 1e-5).all()


def tiny_pipeline_of(tokenizer: NextScaleTokenizer) -> Pipeline:
    return tiny_pipeline(tokenizer=tokenizer)


# ---- steps


def test_every_step_tells_what_is_known_and_can_be_decoded(tiny_pipeline: Pipeline, settings: dict[str, Any]) -> None:
    steps = list(tiny_pipeline.stream([0, 1], seeds=[0, 1], **settings))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.evaluations for step in steps] == [1, 2, 3, 4]
    assert {step.total for step in steps} == {4}
    for k, step in enumerate(steps):
        assert [tuple(item.shape) for item in step.tokens] == [(2, n) for n in LENGTHS[: k + 1]]
        assert same(step.tokens, steps[-1].tokens[: k + 1])
        known = torch.arange(30) < sum(LENGTHS[: k + 1])
        assert step.known.dtype == torch.bool and torch.equal(step.known, known.expand(2, -1))
        image = tiny_pipeline.decode(step)
        assert image.dtype == torch.uint8 and image.shape == (2, 3, 8, 8)
        if not settings.get("more_smooth"):
            assert torch.equal(image, tiny_pipeline.decode(step.tokens)), "tokens alone determine the picture"


def test_one_evaluation_per_scale(tiny_pipeline: Pipeline) -> None:
    assert len(rows_seen(tiny_pipeline, [0, 1])) == len(SCALES)


def test_modulation_and_cache_are_made_once_per_call(tiny_pipeline: Pipeline) -> None:
    made: list[str] = []
    generator, new_cache = tiny_pipeline.generator, tiny_pipeline.generator.new_cache
    for block in generator.blocks:
        block.adaln.register_forward_pre_hook(lambda module, given: made.append("modulation"))
    generator.new_cache = lambda batch: made.append("cache") or new_cache(batch)
    sample(tiny_pipeline, [0, 1], [0, 1])
    assert sorted(made) == ["cache", "modulation", "modulation"]


def test_nothing_is_computed_before_the_first_step_is_asked_for(tiny_pipeline: Pipeline) -> None:
    seen: list[int] = []
    tiny_pipeline.generator.register_forward_pre_hook(lambda module, given: seen.append(1))
    steps = tiny_pipeline.stream([0], seeds=[0])
    assert not seen
    next(steps)
    assert seen == [1]


@pytest.mark.parametrize("end", ["closed", "drained", "dropped"])
def test_a_run_that_ends_frees_its_cache(tiny_pipeline: Pipeline, end: str) -> None:
    caches: list[weakref.ref] = []
    new_cache = tiny_pipeline.generator.new_cache

    def watched(batch: int) -> Any:
        cache = new_cache(batch)
        caches.append(weakref.ref(cache))
        return cache

    tiny_pipeline.generator.new_cache = watched
    steps = tiny_pipeline.stream([0, 1], seeds=[0, 1])
    kept = [next(steps), next(steps)]
    assert caches[0]() is not None
    if end == "closed":
        steps.close()
    elif end == "drained":
        kept.extend(steps)
    del steps
    gc.collect()
    assert caches[0]() is None, "steps that are kept must not keep the cache"
    assert tiny_pipeline.decode(kept[0]).shape == (2, 3, 8, 8)


def test_two_streams_side_by_side_do_not_meet(tiny_pipeline: Pipeline) -> None:
    pairs = list(zip(tiny_pipeline.stream([0], seeds=[0]), tiny_pipeline.stream([1], seeds=[1]), strict=True))
    for side, (label, seed) in enumerate([(0, 0), (1, 1)]):
        assert same(pairs[-1][side].tokens, sample(tiny_pipeline, [label], [seed]).tokens)


def test_gradients_are_off_inside_and_as_they_were_outside(tiny_pipeline: Pipeline) -> None:
    for module in (tiny_pipeline.generator, tiny_pipeline.tokenizer):
        module.requires_grad_(True)
    for step in tiny_pipeline.stream([0], seeds=[0]):
        assert torch.is_grad_enabled()
        assert not step.latent.requires_grad


# ---- outputs


def test_the_output_types_show_the_same_picture(tiny_pipeline: Pipeline) -> None:
    call = {"class_labels": [0, 1], "seeds": [0, 1]}
    outputs = {kind: tiny_pipeline(**call, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    pixels = tiny_pipeline.decode(sample(tiny_pipeline, [0, 1], [0, 1]))
    images = {kind: output.images for kind, output in outputs.items()}
    assert images["pt"].shape == (2, 3, 8, 8) and images["np"].shape == (2, 8, 8, 3)
    for row in range(2):
        assert np.array_equal(np.asarray(images["pil"][row]), pixels[row].permute(1, 2, 0).numpy())
    assert torch.equal(images["pt"].mul(255).round().to(torch.uint8), pixels)
    assert np.array_equal(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    assert torch.equal(to_uint8(to_unit_range(tiny_pipeline.tokenizer.decode_latent(images["latent"]))), pixels)
    for output in outputs.values():
        assert output.evaluations == 4 and output.seeds == [0, 1] and output.seconds > 0
        assert same(output.tokens, outputs["pil"].tokens)


def test_teacher_forced_logits_have_one_row_per_token(tiny_pipeline: Pipeline) -> None:
    tokens = tiny_pipeline.tokenizer.encode(random_images(tiny_pipeline.tokenizer, 2))
    logits = tiny_pipeline.logits(tokens, ["bag", 0])
    assert logits.shape == (2, 30, 16) and logits.dtype == torch.float32
    context = tiny_pipeline.tokenizer.context(tokens)
    wanted = tiny_pipeline.generator(context, torch.tensor([1, 0]))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    unconditional = tiny_pipeline.generator(context, torch.tensor([3, 3]))
    torch.testing.assert_close(tiny_pipeline.logits(tokens), unconditional, rtol=0, atol=1e-5)
    with pytest.raises(SettingError, match="1 class labels for 2 rows"):
        tiny_pipeline.logits(tokens, 0)


def test_one_scale_is_enough_to_sample() -> None:
    pipe = tiny_pipeline(tiny_tokenizer(scales=(4,)), tiny_generator(scales=(4,)))
    steps = list(pipe.stream([0, 1], seeds=[0, 1], guidance_schedule="constant", guidance_scale=3.0))
    assert len(steps) == 1 and steps[0].known.all()
    assert same(rows(steps[0].tokens, [1]), sample(pipe, 1, 1, guidance_schedule="constant", guidance_scale=3.0).tokens)


# ---- class labels


def test_labels_by_id_name_and_part_of_a_name() -> None:
    names = {0: "tench, Tinca tinca", 1: "goldfish", 2: "Crane"}
    pipe = NextScalePipeline(tiny_tokenizer(), tiny_generator(), id2label=names)
    assert pipe.class_names == list(names.values())
    assert pipe.label_ids(["tench", "Tinca Tinca", " goldfish ", "crane", "2", 0]) == [0, 0, 1, 2, 2, 0]
    assert pipe.label_ids("goldfish") == [1] and pipe.label_ids(2) == [2] and pipe.label_ids(None) is None
    assert pipe.label_ids(torch.tensor([2, 0])) == [2, 0] and pipe.label_ids(np.array([2, 0])) == [2, 0]


def test_the_first_of_two_classes_with_one_name_is_meant() -> None:
    names = {0: "bird, crane", 1: "crane, machine", 2: "machine"}
    pipe = NextScalePipeline(tiny_tokenizer(), tiny_generator(), id2label=names)
    assert pipe.label_ids(["crane", "machine", "bird"]) == [0, 2, 0], "a full name comes before parts of others"


def test_models_without_names_answer_to_numbers() -> None:
    pipe = NextScalePipeline(tiny_tokenizer(), tiny_generator())
    assert pipe.class_names == ["0", "1", "2"]
    assert pipe.label_ids("2") == [2]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, r"class 3 is outside 0\.\.2"),
        (-1, r"class -1 is outside 0\.\.2"),
        ("7", r"class 7 is outside 0\.\.2"),
        (True, r"class True is outside 0\.\.2"),
        ("sneeker", "unknown class 'sneeker': did you mean sneaker"),
        ("boot", "unknown class 'boot': did you mean ankle boot"),
        ("xyz", "unknown class 'xyz': classes: ankle boot, bag, sneaker"),
    ],
)
def test_a_wrong_label_names_the_range_or_the_nearest_names(tiny_pipeline: Pipeline, label: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        tiny_pipeline.stream([0, label], seeds=[0, 1])
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(label, seeds=0)


@pytest.mark.parametrize("label", [1.5, float("nan"), "--1", "²", [None]], ids=str)
def test_strange_labels_are_refused_too(tiny_pipeline: Pipeline, label: Any) -> None:
    with pytest.raises(SettingError):
        tiny_pipeline.stream(label if isinstance(label, list) else [label], seeds=[0])


# ---- arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -0.1}, r"guidance_scale is -0\.1.*0\.0\.\.1000\.0"),
        ({"guidance_scale": float("nan")}, r"guidance_scale is nan.*0\.0\.\.1000\.0"),
        ({"guidance_scale": "2"}, r"guidance_scale is '2'"),
        ({"top_k": -1}, r"top_k is -1.*0\.\.16"),
        ({"top_k": 17}, r"top_k is 17.*0\.\.16"),
        ({"top_k": 2.0}, r"top_k is 2\.0.*whole number"),
        ({"top_k": True}, r"top_k is True"),
        ({"top_p": 1.01}, r"top_p is 1\.01.*0\.0\.\.1\.0"),
        ({"top_p": -0.5}, r"top_p is -0\.5.*0\.0\.\.1\.0"),
        ({"top_p": None}, r"top_p is None"),
        ({"temperature_schedule": "log"}, "temperature_schedule is 'log': use 'constant' or 'linear' or 'sqrt'"),
        ({"temperature": -1}, r"temperature is -1.*0\.0\.\.1000\.0"),
        ({"temperature": float("inf")}, r"temperature is inf.*0\.0\.\.1000\.0"),
        (
            {"guidance_schedule": "cosine"},
            r"guidance_schedule is 'cosine': use 'linear', 'constant', or 2 to 64",
        ),
        ({"cfg": 1.5}, r"unknown setting 'cfg': use guidance_scale, "),
        ({"sampler": "ddim"}, r"unknown sampler 'ddim': use one of next-scale"),
        ({"seeds": [0, 1, 2]}, r"2 class labels but 3 seeds"),
        ({"seeds": [0]}, r"2 class labels but 1 seeds"),
        ({"seeds": []}, r"2 class labels but 0 seeds"),
        ({"seeds": [0, -1]}, r"seed -1 is not a whole number in 0\.\."),
        ({"seeds": [0, 2**63]}, r"is not a whole number in 0\.\."),
        pytest.param(
            {"seeds": [0, 1], "generator": torch.Generator()}, "seeds and generator were both given", id="both"
        ),
        ({"generator": 42}, "generator"),
        ({"more_smooth": "no"}, "more_smooth"),
        ({"seeds": 1.5}, "seed"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_the_first_step(
    tiny_pipeline: Pipeline, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        tiny_pipeline.stream([0, 1], **settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingError, match=message):
        tiny_pipeline([0, 1], **settings)


@pytest.mark.parametrize(
    ("labels", "seeds"),
    [
        (np.array([0, 1]), np.arange(2)),
        (torch.tensor([0, 1]), torch.arange(2)),
        ((0, 1), range(2)),
        ([np.int64(0), np.int64(1)], [np.int64(0), np.int64(1)]),
    ],
    ids=["arrays", "tensors", "tuples", "lists of numpy numbers"],
)
def test_labels_and_seeds_may_be_any_sequence(tiny_pipeline: Pipeline, labels: Any, seeds: Any) -> None:
    assert same(sample(tiny_pipeline, labels, seeds).tokens, sample(tiny_pipeline, [0, 1], [0, 1]).tokens)


def test_numpy_scalars_are_numbers(tiny_pipeline: Pipeline) -> None:
    wanted = sample(tiny_pipeline, 1, 5).tokens
    assert same(sample(tiny_pipeline, np.int64(1), np.int64(5)).tokens, wanted)
    assert same(sample(tiny_pipeline, torch.tensor(1), torch.tensor(5)).tokens, wanted)


def test_bounds_themselves_are_allowed(tiny_pipeline: Pipeline) -> None:
    for settings in ({"top_k": 16}, {"top_p": 0.0}, {"top_p": 1}, {"guidance_scale": 0}, {"temperature": 1000}):
        sample(tiny_pipeline, [0], [0], **settings)


def test_nothing_to_sample_is_an_error(tiny_pipeline: Pipeline) -> None:
    with pytest.raises(SettingError, match="nothing to sample"):
        tiny_pipeline.stream([], seeds=[])


def test_output_type_is_checked_before_sampling(tiny_pipeline: Pipeline) -> None:
    tiny_pipeline.generator.register_forward_pre_hook(lambda module, given: pytest.fail("sampled"))
    with pytest.raises(SettingError, match="'gif': use one of pil, np, pt, latent"):
        tiny_pipeline([0], seeds=[0], output_type="gif")


def test_settings_resolve_to_all_of_them_with_defaults(tiny_pipeline: Pipeline) -> None:
    assert tiny_pipeline.resolve_settings({"top_k": 3}) == {
        "guidance_scale": 2.0,
        "guidance_schedule": "linear",
        "top_k": 3,
        "top_p": 1.0,
        "temperature": 1.0,
        "temperature_schedule": "constant",
        "more_smooth": False,
    }


def test_without_a_tokenizer_the_remedy_is_named() -> None:
    pipe = NextScalePipeline(None, tiny_generator())
    for use in (
        lambda: pipe([0], seeds=[0]),
        lambda: pipe.stream([0]),
        lambda: pipe.decode([torch.zeros(1, 1).long()]),
    ):
        with pytest.raises(SettingError, match=r"no tokenizer.*tokenizer="):
            use()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (1, 2, 4)}, "scales is .* against"),
        ({"vocab_size": 17}, "vocab_size is 16 against 17"),
        ({"code_dim": 5}, "code_dim is 4 against 5"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        tiny_pipeline(generator=tiny_generator(**changes))
