"""The Inspect tab: what it shows equals what the library computes; nobody sees another's run."""

import asyncio
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from studio_helpers import MAKERS, OWNER, REQUEST, VISITOR, drain, make_studio, sample
from tiny_models import tiny_frequency, tiny_generator, tiny_recurrent
from tiny_models import tiny_pipeline as next_scale_pipeline
from torch import Tensor

from vgen.app import drawing
from vgen.app.codebooks import (
    band_count,
    codebook_of,
    count_codes,
    decode_bands,
    decode_codes,
    nearest_codes,
    open_picture,
    psnr,
    round_trip,
    together,
)
from vgen.app.core import Studio
from vgen.app.inspect_spectrum import spectrum_lines
from vgen.app.inspect_tab import PANELS, InspectTab
from vgen.app.inspect_traces import wave_html
from vgen.app.inspecting import (
    Question,
    likeliest,
    log_probabilities,
    measure,
    patch_box,
    read_tokens,
    record_image,
    substitute,
)
from vgen.app.recording import Recording
from vgen.app.traces import (
    cache_errors,
    cache_trace,
    distance,
    draw_shares,
    grid_costs,
    noise_levels,
    order_law,
    recorded_hits,
    wave_trace,
)
from vgen.data import to_model_range
from vgen.pipelines.raster import RasterPipeline
from vgen.rng import SampleStreams
from vgen.samplers.first_hitting import ancestral
from vgen.samplers.logits import guide
from vgen.spectrum import keep_bands, radial_power
from vgen.types import SettingError

PARTIAL = {"steps": 8, "full_steps": 2, "partial_steps": 2}


def finished(work: Any) -> Any:
    """What a piece of model work returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def record(pipeline: Any, labels: Any, seeds: list[int], sampler: str | None = None, **settings: Any) -> Recording:
    recording = Recording(pipeline, pipeline.request(labels, seeds, sampler, settings))
    for step in pipeline.stream(labels, seeds=seeds, sampler=sampler, **settings):
        recording.add(step)
    return recording


@pytest.fixture(scope="module")
def scales() -> Recording:
    return record(next_scale_pipeline(), [2, 0], [5, 6], guidance_scale=3.0)


@pytest.fixture(scope="module")
def masked() -> Recording:
    return record(MAKERS["masked"](), [1, 2], [3, 4], "maskgit", steps=6, guidance_scale=2.5)


@pytest.fixture(scope="module")
def partial() -> Recording:
    return record(MAKERS["masked"](), [1, 2], [3, 4], "random", **PARTIAL)


# ---- tokens


def test_probabilities_are_those_of_teacher_forcing(scales: Recording) -> None:
    pipeline = scales.pipeline
    found = torch.cat(finished(log_probabilities(scales, Question(1))))
    want = pipeline.logits(scales.steps[-1].tokens, [2, 0]).log_softmax(-1)[1]
    assert torch.allclose(found, want, atol=1e-5)
    guided = torch.cat(finished(log_probabilities(scales, Question(1, guided=True))))
    weights = torch.tensor([1 + 2 * k / 3 for k in range(4)]).repeat_interleave(torch.tensor([1, 4, 9, 16]))
    cond, uncond = (pipeline.logits(scales.steps[-1].tokens, labels)[1] for labels in ([2, 0], None))
    assert torch.allclose(guided, guide(cond, uncond, weights[:, None]).log_softmax(-1), atol=1e-5)
    assert float((guided - found).abs().max()) > 0.1


def test_a_run_that_was_stopped_is_looked_at_as_far_as_it_got(scales: Recording) -> None:
    short = Recording(scales.pipeline, scales.request)
    for step in scales.steps[:2]:
        short.add(step)
    assert read_tokens(short, 0).sides == [1, 2]
    whole = finished(log_probabilities(scales, Question(0)))
    for ours, theirs in zip(finished(log_probabilities(short, Question(0))), whole[:2], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    changed = substitute(short, 0, 1, 3, [int(short.steps[-1].tokens[1][0, 3])])
    assert torch.equal(changed[0], short.pixels(-1)[0])


@pytest.mark.parametrize("guided", [False, True])
def test_a_masked_token_is_judged_by_what_was_known_when_it_was_fixed(masked: Recording, guided: bool) -> None:
    pipeline, row = masked.pipeline, 1
    tokens = read_tokens(masked, row)
    found = finished(log_probabilities(masked, Question(row, guided=guided)))[0]
    mask = pipeline.generator.mask_token_id
    before = torch.full_like(masked.steps[0].tokens[row], mask)
    for number, step in enumerate(masked.steps, 1):
        new = tokens.fixed[0] == number
        assert torch.equal(new, (before == mask) & (step.tokens[row] != mask))
        logits = pipeline.logits(before[None], [2])[0]
        if guided:
            scale = 1 + 1.5 * float(step.known[row].float().mean())
            logits = guide(logits, pipeline.logits(before[None], None)[0], scale)
        assert torch.allclose(found[new], logits.float().log_softmax(-1)[new], atol=1e-5)
        before = step.tokens[row]
    assert bool(found.isfinite().all())


def test_a_masked_token_is_judged_by_all_others(masked: Recording) -> None:
    final, mask = masked.steps[-1].tokens[0], masked.pipeline.generator.mask_token_id
    found = finished(log_probabilities(masked, Question(0, others=True)))[0]
    for place in (0, 7, 15):
        alone = final.clone()
        alone[place] = mask
        want = masked.pipeline.logits(alone[None], [1])[0, place].float().log_softmax(-1)
        assert torch.allclose(found[place], want, atol=1e-5)


def test_given_tokens_were_fixed_at_no_step() -> None:
    pipeline = MAKERS["masked"]()
    tokens, known = torch.arange(16) % 12, torch.arange(16) < 5
    recording = record(pipeline, [1], [3], "random", steps=4, tokens=tokens.tolist(), known=known.tolist())
    fixed = read_tokens(recording, 0).fixed[0]
    assert torch.equal(fixed == 0, known) and set(fixed[5:].tolist()) == {1, 2, 3, 4}
    found = finished(log_probabilities(recording, Question(0)))[0]
    assert torch.equal(found.isnan().any(1), known)


def test_probability_entropy_and_alternatives() -> None:
    log_probability = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25] * 4]).log()
    found = measure(log_probability, torch.tensor([1, -1]))
    assert math.isclose(float(found.probability[0]), 0.25, rel_tol=1e-6)
    assert math.isclose(float(found.entropy[0]), 1.75, rel_tol=1e-6) and found.most == 2
    assert math.isnan(found.probability[1]) and math.isnan(found.entropy[1])
    (first, p), (second, q) = likeliest(log_probability[0], 2)
    assert (first, second) == (0, 1) and math.isclose(p, 0.5, rel_tol=1e-6) and math.isclose(q, 0.25, rel_tol=1e-6)


def test_a_substituted_token_is_the_only_change(scales: Recording, masked: Recording) -> None:
    tokens = [part[:1].clone() for part in scales.steps[-1].tokens]
    images = substitute(scales, 0, 2, 4, [7, int(tokens[2][0, 4])])
    assert torch.equal(images[1], scales.pixels(-1)[0])
    tokens[2][0, 4] = 7
    assert torch.equal(images[0], scales.pipeline.decode(tokens)[0])
    grid = masked.steps[-1].tokens[1].clone()
    grid[9] = (grid[9] + 1) % 12
    assert torch.equal(substitute(masked, 1, 0, 9, [int(grid[9])])[0], masked.pipeline.decode(grid[None])[0])


def test_a_patch_holds_its_token_and_stays_inside() -> None:
    assert patch_box(28, 7, 0) == (0, 0, 6, 6)
    assert patch_box(28, 7, 24) == (10, 10, 18, 18)
    assert patch_box(28, 1, 0) == (0, 0, 28, 28)
    for token in range(9):
        left, upper, right, lower = patch_box(28, 3, token)
        row, column = divmod(token, 3)
        assert 0 <= left <= column * 28 / 3 < (column + 1) * 28 / 3 <= right <= 28
        assert 0 <= upper <= row * 28 / 3 < (row + 1) * 28 / 3 <= lower <= 28


# ---- codes, round trips, bands


def test_usage_counts_every_code_once() -> None:
    usages = count_codes([torch.tensor([[0, 0, 3]]), torch.tensor([[3, 5, -1]])], 5)  # 5: a mask
    assert [usage.counts.tolist() for usage in usages] == [[2, 0, 0, 1, 0], [0, 0, 0, 1, 0]]
    usage = together(usages)
    assert (usage.total, usage.dead) == (4, 3)
    assert math.isclose(usage.perplexity, 2.0)


def test_nearest_codes_are_nearest() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, -2.0]])
    assert nearest_codes(vectors, 0, 2) == [(2, 1.0), (3, 2.0)]
    assert nearest_codes(vectors, 0, 99)[-1] == (1, 5.0)


def test_a_code_alone_fills_its_scale(scales: Recording, masked: Recording) -> None:
    tokenizer = scales.pipeline.tokenizer
    assert torch.equal(decode_codes(tokenizer, [3])[0], scales.pipeline.decode([torch.tensor([[3]])])[0])
    assert not torch.equal(decode_codes(tokenizer, [3], 3), decode_codes(tokenizer, [3], 0))
    flat = masked.pipeline.decode(torch.full((1, 16), 5))
    assert torch.equal(decode_codes(masked.pipeline.tokenizer, [5]), flat)


def test_a_round_trip_is_encode_and_decode(scales: Recording) -> None:
    tokenizer = scales.pipeline.tokenizer
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    trip = round_trip(tokenizer, image)
    tokens = tokenizer.encode(to_model_range(image)[None])
    assert [part.tolist() for part in trip.tokens] == [part[0].tolist() for part in tokens]
    for k in range(4):
        assert torch.equal(trip.prefixes[k], scales.pipeline.decode(tokens[: k + 1])[0])
        wrong = (trip.prefixes[k].double() - image.double()).square().mean()
        assert math.isclose(trip.psnr[k], 10 * math.log10(255**2 / float(wrong)), rel_tol=1e-9)
    assert psnr(image[None], image) == [math.inf]


def test_bands_add_up_and_are_muted_alone() -> None:
    pipeline = next_scale_pipeline(tiny_frequency(), tiny_generator())
    recording = record(pipeline, [0, 1], [1, 2])
    tokenizer, tokens = pipeline.tokenizer, recording.steps[-1].tokens
    for by_frequency in (False, True):
        every = decode_bands(tokenizer, tokens, range(band_count(tokenizer)), by_frequency)
        assert int((every.short() - recording.pixels(-1).short()).abs().max()) <= 1
    latent = tokenizer.latent(tokens)
    low = pipeline.decode_floats(
        dataclasses.replace(recording.steps[-1], latent=keep_bands(latent, tokenizer.band == 0))
    )
    assert torch.equal(decode_bands(tokenizer, tokens, [0], True), low.mul(255).round().to(torch.uint8))
    assert torch.equal(decode_bands(tokenizer, tokens, [0], False), pipeline.decode(tokens[:1]))
    nothing = decode_bands(tokenizer, tokens, [], False)
    assert torch.equal(nothing[0], nothing[1])


def test_a_spectrum_is_of_the_pictures_shown(scales: Recording) -> None:
    lines = spectrum_lines(scales)
    assert len(lines) == 4 and [line.strong for line in lines] == [False, False, False, True]
    power = radial_power(to_model_range(scales.pixels(1))).mean(0)[1:]
    assert np.allclose(lines[1].y, power.log10(), atol=1e-9)


# ---- traces


def test_the_law_of_a_revelation_is_exact() -> None:
    x = torch.tensor([0.0, 0.2, 0.7, 1.0])
    assert torch.allclose(order_law(x, 3, 1), x.double() ** 3)  # the first: all three are hit later
    assert torch.allclose(order_law(x, 3, 3), 1 - (1 - x.double()) ** 3)
    drawn = draw_shares(range(4000), 9)
    for order in (1, 4, 9):
        ranked = drawn[:, order - 1].sort().values
        law = order_law(ranked, 9, order)
        assert distance(ranked, law) * math.sqrt(len(ranked)) < 1.95  # exceeded once in a thousand
        assert distance(ranked, order_law(ranked, 9, order % 9 + 1)) > 0.1  # the next one's law is not it


def test_the_largest_distance_looks_at_both_sides_of_a_step() -> None:
    assert math.isclose(distance(torch.tensor([0.5]), torch.tensor([0.5], dtype=torch.float64)), 0.5)
    for law in ([0.9, 1.0], [0.0, 0.1]):
        assert math.isclose(distance(torch.tensor([0.1, 0.2]), torch.tensor(law, dtype=torch.float64)), 0.9)


def test_the_cost_of_a_grid_is_its_expectation() -> None:
    one, many = grid_costs(16, "linear", [1, 100_000])
    assert (one.evaluations, one.together) == (1, 16)
    assert math.isclose(many.evaluations, 16, abs_tol=0.01) and many.together < 0.01
    plan = ancestral(SampleStreams(range(2000)), torch.zeros(2000, 16, dtype=torch.bool), 8, "cosine")
    cost = grid_costs(16, "cosine", [8])[0]
    together = torch.where(plan.counts > 1, plan.counts, 0).sum(1)
    for drawn, expected in ((plan.row_steps.double(), cost.evaluations), (together.double(), cost.together)):
        assert abs(float(drawn.mean()) - expected) < 4 * float(drawn.std()) / math.sqrt(2000)


def test_hits_are_those_that_the_run_recorded() -> None:
    recording = record(MAKERS["masked"](), [1, 2], [3, 4], "first-hitting")
    hits = recorded_hits(recording, 1)
    assert [known for known, _ in hits] == list(range(1, 17))
    assert np.allclose([time for _, time in hits], draw_shares([4], 16)[0])  # linear noise: time is the share


def test_cached_and_evaluated_tokens_are_told_apart(partial: Recording) -> None:
    trace = cache_trace(partial, 0)
    assert trace.whole.tolist() == [step.evaluated is None for step in partial.steps]
    assert not bool(trace.whole.all()) and bool(trace.evaluated[:, trace.whole].all())
    assert bool((trace.fixed.sum(1) == 1).all()) and not bool((trace.fixed & ~trace.evaluated).any())
    for number, step in enumerate(partial.steps):
        if step.evaluated is not None:
            assert torch.equal(trace.evaluated[:, number], step.evaluated[0])


def test_replayed_partial_evaluations_are_the_runs_own(partial: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from with the run's noise they give its tokens; against themselves they have no error."""
    errors = finished(cache_errors(partial, 1))
    trace = cache_trace(partial, 1)
    assert [error.step for error in errors] == [i + 1 for i, whole in enumerate(trace.whole.tolist()) if not whole]
    assert [error.tokens for error in errors] == trace.fixed[:, ~trace.whole].sum(0).tolist()
    assert all(error.divergence > 1e-6 and 0 < error.apart < 1 for error in errors)
    seen: list[Tensor] = []
    own = type(partial.pipeline.generator).forward

    def forward(self: Any, tokens: Tensor, labels: Tensor, positions: Any = None, cache: Any = None) -> Tensor:
        seen.append(own(self, tokens, labels, positions, cache))
        return seen[-1]

    monkeypatch.setattr(type(partial.pipeline.generator), "forward", forward)
    finished(cache_errors(partial, 0))
    replayed = [logits for logits in seen if logits.shape[1] < 16]
    seen.clear()
    list(partial.pipeline.stream([1], seeds=[3], sampler="random", **PARTIAL))
    ran = [logits for logits in seen if logits.shape[1] < 16]
    assert len(replayed) == len(ran) > 0
    for ours, theirs in zip(replayed, ran, strict=True):  # in the order of positions against that of revelation
        assert torch.allclose(ours.sum(1), theirs.sum(1), atol=1e-8)


def test_whole_evaluations_alone_have_no_error(masked: Recording) -> None:
    assert finished(cache_errors(masked, 0)) == []
    edited = Recording(masked.pipeline, dataclasses.replace(masked.request, settings={"edit": "x"}))
    with pytest.raises(SettingError, match="not at hand"):
        finished(cache_errors(edited, 0))


def test_a_wave_is_traced_as_its_steps_have_it() -> None:
    pipeline = RasterPipeline(None, tiny_recurrent())
    recording = record(pipeline, [0, 1], [5, 6], "wave-exact", inner_recurrences=2)
    trace = wave_trace(recording, 1)
    last = recording.steps[-1].wave
    assert last is not None and trace.depths.shape == (16, len(recording.steps))
    assert (trace.passes[-1], trace.work, trace.restarts) == (last.passes, last.work, last.restarts)
    for number, step in enumerate(recording.steps):
        assert step.wave is not None
        assert torch.equal(trace.depths[:, number], step.wave.depths[1])
        assert torch.equal(trace.final[:, number], step.known[1])
        assert int(trace.drafts[number]) == int((step.wave.drafts[1] >= 0).sum())
    told = wave_html(recording, 1)
    assert f"16 tokens in {len(recording)} evaluations, {last.passes} passes" in told
    assert f"{last.restarts} restarts" in told and "would take 96 passes" in told
    with pytest.raises(SettingError, match="no frames"):
        noise_levels(recording, 0)


# ---- the tab


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    built = make_studio(tmp_path_factory.mktemp("studio"), "tiny", "masked", "video")
    yield built
    built.close()


@pytest.fixture(scope="module")
def panels(studio: Studio) -> dict[str, Any]:
    with gr.Blocks() as page:
        visitor, current = gr.BrowserState(), gr.BrowserState()
        with gr.Tabs(), gr.Tab("Inspect"):
            tab = InspectTab(studio, visitor, current)
        tab.wire(page)
    assert all(fn.api_visibility == "private" for fn in page.fns.values())
    return {panel.name: panel for panel in tab.panels}


def opened(panel: Any, job: Any, *values: Any, visitor: str = VISITOR) -> list[Any]:
    given = values or [part.value for part in panel.inputs]
    return drain(panel.open(visitor, job.id, REQUEST, *given))[-1]


def shown(panel: Any, job: Any, *values: Any) -> list[Any]:
    return drain(panel.show(VISITOR, job.id, REQUEST, *values))[-1]


def test_a_token_is_shown_with_its_numbers_and_alternatives(studio: Studio, panels: dict[str, Any]) -> None:
    job = sample(studio, settings={"guidance_scale": 2.0})
    panel, recording = panels["Tokens"], job.view.recording
    assert "Last run: tiny" in opened(panel, job)[0]
    values = shown(panel, job, 2, 3, 6, "Entropy", "When it was fixed", False)
    grid, detail = values[7], values[8]
    tokens = recording.steps[-1].tokens[2][1]
    distribution = recording.pipeline.logits(recording.steps[-1].tokens, [0, 0]).softmax(-1)[1, 5 + 5]
    code = int(tokens[5])
    p = drawing.per_cent(float(distribution[code]))
    assert f"row 2, column 2, code {code}, probability {p}" in grid and grid.count("data-token=") == 2 * 16
    assert f"Token 6 of scale 3, row 2, column 2: code {code}, fixed at step 3 of 3." in detail and p in detail
    for other in distribution.topk(5).indices.tolist():
        assert f'data-code="{other}"' in detail
    assert "for the class ant" in detail and "without guidance" in detail
    assert "with guidance 2" in shown(panel, job, 2, 3, 6, "Probability", "When it was fixed", True)[8]


def test_a_token_is_substituted_and_decoded(studio: Studio, panels: dict[str, Any]) -> None:
    job = sample(studio)
    panel, recording = panels["Tokens"], job.view.recording
    html = drain(panel.put(VISITOR, job.id, 1, 3, 1, 9, REQUEST))[-1][1]
    after = substitute(recording, 0, 2, 0, [9])[0]
    assert drawing.figure_html(after, "The picture with the other code", "With code 9", 340) in html
    for image, scale, token, code in ((3, 3, 1, 9), (1, 4, 1, 9), (1, 3, 17, 9), (1, 3, 1, 16), (1, 3, 1, "<b>")):
        line = drain(panel.put(VISITOR, job.id, image, scale, token, code, REQUEST))[-1]
        assert isinstance(line[0], str) and "must be a whole number in" in line[0] and "<b>" not in line[0]


def test_controls_of_another_run_are_fitted_and_wrong_ones_refused(studio: Studio, panels: dict[str, Any]) -> None:
    job = sample(studio, "masked", settings={"steps": 4})
    panel = panels["Tokens"]
    assert "Last run: masked" in opened(panel, job, 99, 7, -3, "Entropy", "When it was fixed", False)[0]
    for image, scale, token in ((0, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 17), (1, 1, 1.5), ("x", 1, 1), (1, None, 1)):
        found = shown(panel, job, image, scale, token, "Entropy", "When it was fixed", False)
        assert "Not done" in found[0] and "must be a whole number in" in found[0]
    assert "Given all" not in shown(panel, job, 1, 1, 1, "Junk", "Junk", False)[0]


def test_nobody_sees_another_visitors_run(studio: Studio, panels: dict[str, Any]) -> None:
    job = sample(studio)
    for panel in panels.values():
        found = opened(panel, job, visitor="somebody else's secret token")
        assert "Last run" not in found[0] and not any("<svg" in str(item) or "<img" in str(item) for item in found)
    for junk in (None, 7, ["x"], {"a": 1}, "nothing"):
        assert "Nothing to look at yet" in opened(panels["Tokens"], SimpleNamespace(id=junk))[0]


def test_inspecting_leaves_no_jobs_behind(studio: Studio, panels: dict[str, Any]) -> None:
    job = sample(studio)
    for _ in range(10):
        opened(panels["Tokens"], job)
    assert studio.jobs.get(OWNER, job.id) is job
    assert studio.jobs.latest(OWNER, "inspect") is None


def test_codes_are_counted_and_paged(studio: Studio, panels: dict[str, Any]) -> None:
    job = sample(studio)
    panel, recording = panels["Codebook"], job.view.recording
    usage = together(count_codes(recording.steps[-1].tokens, 16))
    values = opened(panel, job)
    assert f"{16 - usage.dead} of 16 codes" in values[4] and f"<b>{usage.perplexity:.0f}</b>" in values[4]
    assert values[6].count("data-code=") == 16
    encoded = shown(panel, job, "The run's images, encoded", 200, 0, "By number", 1)
    assert "the 2 images, encoded" in encoded[4]
    for count, scale, page in ((0, 0, 1), (5000, 0, 1), (10, 4, 1), (10, 0, 2), (10, 0, "a")):
        assert "must be a whole number" in shown(panel, job, "Tokens of the run", count, scale, "By number", page)[0]
    near = drain(panel.nearest(VISITOR, job.id, 0, 3, REQUEST))[-1][1]
    vectors = codebook_of(recording.pipeline.tokenizer)
    assert f"{nearest_codes(vectors, 3, 1)[0][0]}: " in near and near.count("<figure") == 9
    assert "must be a whole number in 0..15" in drain(panel.nearest(VISITOR, job.id, 0, 16, REQUEST))[-1][0]


def test_a_picture_makes_a_round_trip_and_becomes_the_last_run(
    studio: Studio, panels: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 31, 3), dtype=np.uint8)).save(path)
    html = drain(panels["Round trip"].convert(VISITOR, "tiny", str(path), REQUEST))[-1][1]
    assert html.count("PSNR") == 3 and "21 tokens of 4.0 bits: 10 bytes" in html
    job_id = drain(panels["Round trip"].adopt(VISITOR, "tiny", str(path), "bee", REQUEST))[-1][0]
    job = studio.jobs.get(OWNER, job_id)
    assert job is not None
    recording, pipeline = job.view.recording, studio.models.get("tiny")
    image = round_trip(pipeline.tokenizer, open_picture(path, 8)).prefixes[-1]
    assert torch.equal(recording.pixels(-1)[0], image)
    assert "for the class bee" in opened(panels["Tokens"], job)[8]
    masked = Recording(studio.models.get("masked"), studio.models.get("masked").request(None, [0], None, {}))
    record_image(masked, to_model_range(open_picture(path, 8)))
    assert bool((masked.steps[-1].tokens >= 0).all()) and len(masked) == 1


def test_what_is_no_picture_is_refused(studio: Studio, panels: dict[str, Any], tmp_path: Path) -> None:
    panel, path = panels["Round trip"], tmp_path / "picture.png"
    path.write_bytes(b"\x80\x02}q\x00.")
    assert "no picture that can be read" in drain(panel.convert(VISITOR, "tiny", str(path), REQUEST))[-1][0]
    Image.new("1", (20_000, 2)).save(path)
    assert "20000x2 pixels, the limit is" in drain(panel.convert(VISITOR, "tiny", str(path), REQUEST))[-1][0]
    Image.new("RGB", (9, 9)).save(path)
    assert "there is no model" in drain(panel.convert(VISITOR, "../tiny", str(path), REQUEST))[-1][0]
    assert "encodes no single pictures" in drain(panel.convert(VISITOR, "video", str(path), REQUEST))[-1][0]
    with pytest.raises(gr.Error, match="unknown class"):
        drain(panel.adopt(VISITOR, "tiny", str(path), "<script>", REQUEST))
    with pytest.raises(gr.Error, match="hand one in"):
        drain(panel.convert(VISITOR, "tiny", None, REQUEST))


def test_a_bomb_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (40, 40)).save(tmp_path / "bomb.png")
    with pytest.raises(SettingError, match="pixels, the limit is"):
        open_picture(tmp_path / "bomb.png", 8)


def test_spectrum_shows_the_bands_that_are_on(studio: Studio, panels: dict[str, Any]) -> None:
    job = sample(studio)
    panel, recording = panels["Spectrum"], job.view.recording
    assert opened(panel, job, "What each scale added", [])[5].value == [0, 1, 2]
    values = shown(panel, job, "What each scale added", [1])
    images = decode_bands(recording.pipeline.tokenizer, recording.steps[-1].tokens, [1], False)
    assert drawing.figure_html(torch.cat(list(images), -1), "On: 2", "On: 2", 448) in values[6]
    assert "must be a whole number in 0..2" in shown(panel, job, "What each scale added", [3])[0]


def test_panels_say_what_to_run(studio: Studio, panels: dict[str, Any]) -> None:
    images, videos = sample(studio), sample(studio, "video", settings={"frames": 3, "steps": 2})
    for name, words in (("First hitting", "first-hitting"), ("Wavefront", "recurrent-depth"), ("ReCAP", "partial")):
        assert words in opened(panels[name], images)[0]
    for name in ("Tokens", "Codebook", "Spectrum"):
        assert "run" in opened(panels[name], videos)[0] and "Last run" not in opened(panels[name], videos)[0]
    found = opened(panels["Wavefront"], videos)
    assert "3 frames in" in found[4] and "Last run: video" in found[0]
    levels = noise_levels(videos.view.recording, 0)
    assert levels.shape == (3, len(videos.view.recording)) and not bool(levels[:, -1].any())


def test_first_hitting_and_recap_have_their_panels(studio: Studio, panels: dict[str, Any]) -> None:
    hitting = sample(studio, "masked", sampler="first-hitting")
    values = opened(panels["First hitting"], hitting, 5, 200, 1)
    assert "Time of revelation 5 of 16" in values[5] and "200 seeds drawn" in values[5]
    for order, seeds in ((0, 100), (17, 100), (1, 10**9), (1, 0)):
        assert "must be a whole number" in shown(panels["First hitting"], hitting, order, seeds, 1)[0]
    job = sample(studio, "masked", settings=PARTIAL)
    assert "evaluations whole, the others partial" in opened(panels["ReCAP"], job)[4]
    errors = drain(panels["ReCAP"].compare(VISITOR, job.id, 2, REQUEST))[-1][1]
    assert "nats a token" in errors
    with pytest.raises(gr.Error, match=r"whole number in 1\.\.2"):
        drain(panels["ReCAP"].compare(VISITOR, job.id, 3, REQUEST))


def test_examples_are_runs_that_their_panels_show(
    studio: Studio, panels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(panels) == len(PANELS)
    for name, model in (("Tokens", "tiny"), ("ReCAP", "masked"), ("Wavefront", "video")):
        panel = panels[name]
        ask = dataclasses.replace(panel.example_ask(), model=model)
        if model != "video":
            ask = dataclasses.replace(ask, classes=[0])
        else:
            ask = dataclasses.replace(ask, settings={"frames": 3, "steps": 2})
        monkeypatch.setattr(panel, "example_ask", lambda ask=ask: ask)
        job_id, status = drain(panel.run_example(VISITOR, REQUEST))[-1]
        assert "Done" in status
        assert "Last run" in opened(panel, SimpleNamespace(id=job_id))[0]


def test_a_click_names_a_token_and_junk_names_none(studio: Studio, panels: dict[str, Any]) -> None:
    panel = panels["Tokens"]
    assert panel.pick(3, SimpleNamespace(token=7, code=-1)) == 8  # type: ignore[arg-type]
    for junk in (-1, "x", None, 1.5):
        assert panel.pick(3, SimpleNamespace(token=junk)) == 3  # type: ignore[arg-type]
        assert panel.choose(3, SimpleNamespace(code=junk)) == 3  # type: ignore[arg-type]


def test_drawings_escape_what_they_are_told() -> None:
    bad = "<script>alert(1)</script>"
    drawn = [
        drawing.token_grid([drawing.Tile(bad, bad)], 1, bad, 0),
        drawing.table_html([bad], [[bad]], bad),
        drawing.lines_svg([drawing.Line(bad, [0, 1], [0, 1])], bad, bad),
        drawing.bars_svg([1, 2], bad, bad),
        drawing.matrix_html(np.zeros((2, 2, 3), dtype=np.uint8), bad, bad, bad),
        drawing.figure_html(torch.zeros(3, 2, 2, dtype=torch.uint8), bad, bad),
        drawing.scale_legend(bad, bad, bad) + drawing.key_legend([((0, 0, 0), bad)]),
    ]
    assert not any("<script" in item for item in drawn)


def test_a_visitor_who_leaves_ends_the_work(studio: Studio, panels: dict[str, Any]) -> None:
    panel, job = panels["Tokens"], sample(studio)

    async def leave() -> None:
        answer = panel.open(VISITOR, job.id, REQUEST, 1, 3, 1, "Entropy", "When it was fixed", False)
        await answer.__anext__()
        await answer.aclose()

    asyncio.run(leave())
    assert studio.jobs.latest(OWNER, "inspect") is None
