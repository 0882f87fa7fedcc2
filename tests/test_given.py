"""Given tokens of every family: what is given stays, what is not is drawn as it is in any run of the seed."""

from typing import Any

import pytest
import torch
from tiny_masked import tiny_pipeline as tiny_masked_pipeline
from tiny_masked import tiny_tokenizer as tiny_vqgan
from tiny_models import SCALES, random_tokens, tiny_pipeline, tiny_recurrent
from torch import Tensor

from vgen.pipelines.next_scale import NextScalePipeline
from vgen.pipelines.raster import RasterPipeline
from vgen.types import Request, SettingError, Step

K = len(SCALES)


@pytest.fixture
def pipe() -> NextScalePipeline:
    return tiny_pipeline()


def last(pipe: Any, **settings: Any) -> Step:
    *_, step = pipe.stream(**({"class_labels": [1, 2], "seeds": [3, 4]} | settings))
    return step


def everything(tokens: list[Tensor], known: bool = True) -> list[Tensor]:
    return [torch.full_like(scale, known, dtype=torch.bool) for scale in tokens]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- next scale


@pytest.mark.parametrize("count", range(1, K))
def test_a_run_given_its_own_first_scales_is_that_run(pipe: NextScalePipeline, count: int) -> None:
    run = last(pipe)
    again = last(pipe, tokens=run.tokens[:count], known=everything(run.tokens[:count]))
    assert same(again.tokens, run.tokens) and torch.equal(again.latent, run.latent)


def test_another_seed_changes_what_follows_the_given_scales_and_nothing_else(pipe: NextScalePipeline) -> None:
    run = last(pipe)
    other = last(pipe, seeds=[5, 6], tokens=run.tokens[:2], known=everything(run.tokens[:2]))
    assert same(other.tokens[:2], run.tokens[:2])
    assert not same(other.tokens[2:], run.tokens[2:])


@pytest.mark.parametrize("free", range(K))
def test_with_one_scale_left_its_tokens_are_drawn_given_those_before(pipe: NextScalePipeline, free: int) -> None:
    """Greedy, unguided: the scale that is left is the teacher-forced argmax under whatever was given."""
    tokens = random_tokens(pipe.tokenizer, 2)
    known = everything(tokens)
    known[free] = torch.zeros_like(known[free])
    made = last(pipe, tokens=tokens, known=known, temperature=0, guidance_scale=1.0).tokens
    assert same(made[:free] + made[free + 1 :], tokens[:free] + tokens[free + 1 :])
    logits = pipe.logits(tokens, [1, 2]).split([side * side for side in SCALES], dim=1)
    assert torch.equal(made[free], logits[free].argmax(-1))


def test_some_tokens_of_a_scale_may_be_given(pipe: NextScalePipeline) -> None:
    tokens = random_tokens(pipe.tokenizer, 2)
    known = [torch.rand(scale.shape, generator=torch.Generator().manual_seed(0)) < 0.5 for scale in tokens]
    made, free = last(pipe, tokens=tokens, known=known).tokens, last(pipe).tokens
    for given, kept, ours in zip(tokens, known, made, strict=True):
        assert torch.equal(ours[kept], given[kept])
    assert torch.equal(made[0][~known[0]], free[0][~known[0]])  # with nothing before it, as in a free run
    unread = [torch.where(kept, given, 99) for given, kept in zip(tokens, known, strict=True)]
    assert same(last(pipe, tokens=unread, known=known).tokens, made)


def test_one_row_of_tokens_serves_all_seeds(pipe: NextScalePipeline) -> None:
    run = last(pipe, class_labels=[1], seeds=[3])
    row = [scale[0] for scale in run.tokens[:2]]
    both = last(pipe, tokens=row, known=everything(row))
    assert all(torch.equal(ours, given.expand(2, -1)) for ours, given in zip(both.tokens[:2], row, strict=True))


ROW = [torch.zeros(side * side, dtype=torch.long) for side in SCALES]
ALL = everything(ROW)


@pytest.mark.parametrize(
    ("tokens", "known", "message"),
    [
        (ROW, None, "belong together"),
        (None, ALL, "belong together"),
        (ROW[:2], ALL[:1], "tokens of 2 scales but known of 1"),
        (ROW, ALL, "every token of an image is known"),
        (ROW[0], ALL[0], "tokens must be a list of 1..4 scales"),
        ([], [], "tokens must be a list of 1..4 scales"),
        ([*ROW, ROW[0]], [*ALL, ALL[0]], "tokens must be a list of 1..4 scales"),
        (ROW[1:2], ALL[1:2], r"tokens have shape \(4,\): give \(1,\) or \(2, 1\)"),
        (ROW[:1], [[1]], "known has dtype torch.int64"),
        ([[16]], [[True]], r"whole numbers in 0\.\.15"),
        ([[-1]], [[True]], r"whole numbers in 0\.\.15"),
        ([[0.5]], [[True]], r"whole numbers in 0\.\.15"),
        ([["<b>"]], [[True]], "tokens is no tensor"),
    ],
)
def test_tokens_that_cannot_be_given_are_refused(
    pipe: NextScalePipeline, tokens: Any, known: Any, message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        pipe.stream([1, 2], seeds=[3, 4], tokens=tokens, known=known)


def test_an_edit_takes_no_given_tokens(pipe: NextScalePipeline) -> None:
    image, mask = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(8, 8)
    with pytest.raises(SettingError, match="an edit dictates its own"):
        pipe.stream_edit(image, mask, 1, seeds=[0], tokens=ROW[:1], known=ALL[:1])


# ---- raster order


@pytest.mark.parametrize("sampler", ["raster", "wave-exact", "jacobi"])
def test_a_raster_run_given_what_it_knew_at_any_step_is_that_run(sampler: str) -> None:
    pipe = RasterPipeline(tiny_vqgan(vocab_size=11), tiny_recurrent(recurrences=2))
    steps = list(pipe.stream([1], seeds=[3], sampler=sampler))
    partly = [step for step in steps if bool(step.known.any()) and not bool(step.known.all())]
    for step in (partly[0], partly[-1]):
        again = last(pipe, class_labels=[1], seeds=[3], sampler=sampler, tokens=step.tokens, known=step.known)
        assert torch.equal(again.tokens, steps[-1].tokens)


# ---- requests


def next_scale_given() -> tuple[Any, Any, Any]:
    pipe = tiny_pipeline()
    row = [scale[0] for scale in random_tokens(pipe.tokenizer, 1)[:2]]
    return pipe, row, everything(row)


def masked_given() -> tuple[Any, Any, Any]:
    return tiny_masked_pipeline(), torch.arange(16) % 12, torch.arange(16) < 5


@pytest.mark.parametrize("family", [next_scale_given, masked_given])
def test_a_request_holds_given_tokens_and_repeats_their_run(family: Any) -> None:
    pipe, tokens, known = family()
    settings = {"tokens": tokens, "known": known, "guidance_scale": 1.5}
    text = pipe.request([1, 2], [3, 4], None, settings).to_json()
    request = Request.from_json(text)
    assert request.settings["guidance_scale"] == 1.5
    again = last(pipe, **request.settings).tokens
    wanted = last(pipe, **settings).tokens
    assert same(again, wanted) if isinstance(again, list) else torch.equal(again, wanted)
    assert pipe.request([1, 2], [3, 4], None, request.settings).to_json() == text


def test_a_request_of_an_edit_is_not_repeated_as_if_it_were_none(pipe: NextScalePipeline) -> None:
    with pytest.raises(SettingError, match="the image and the mask are not part of it"):
        pipe.stream([1], seeds=[0], edit={"image": "sha256:0", "mask": "sha256:0"})


def test_the_origin_of_a_request_is_kept_and_absent_from_the_others() -> None:
    plain, told = Request(model="m", seeds=[1]), Request(model="m", seeds=[1], origin="a branch")
    assert Request.from_json(told.to_json()) == told
    assert "origin" not in plain.to_json() and Request.from_json(plain.to_json()) == plain
    with pytest.raises(SettingError, match="origin must be a string"):
        Request.from_json('{"model": "m", "seeds": [1], "origin": ["x"]}')
