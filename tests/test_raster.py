"""Samplers of a looped generator: those that lose nothing draw raster's tokens (spec's invariants E1-E7, F1-F6)."""

import warnings
from itertools import cycle
from typing import Any

import pytest
import torch
from tiny_models import tiny_recurrent
from torch import Tensor

from vgen.pipelines.raster import GATES, RasterPipeline
from vgen.samplers import wavefront
from vgen.samplers.raster import RasterSettings, Run, raster
from vgen.types import ModelWarning, SettingError, Step

LABELS, SEEDS = [0, 1, 2], [5, 6, 7]
WAVES: list[dict[str, Any]] = [
    {"inner_recurrences": inner, "wavefront": most, "headway": headway}
    for inner in (1, 2, 3, 6)
    for most, headway in ((1, 1), (3, 1), (8, 1), (16, 3))
]


DRAWS: list[dict[str, Any]] = [{}, {"top_k": 1}, {"guidance_scale": 1.0, "top_p": 0.8}]


@pytest.fixture(scope="module")
def resting() -> RasterPipeline:
    """A loop whose states come to rest."""
    model = tiny_recurrent().double()
    model.adapter.weight[:, :32] *= 0.5
    return RasterPipeline(None, model)


@pytest.fixture(scope="module")
def pipeline() -> RasterPipeline:
    return RasterPipeline(None, tiny_recurrent().double())


def last(pipeline: RasterPipeline, sampler: str, labels: Any = LABELS, seeds: Any = SEEDS, **settings: Any) -> Step:
    *_, step = pipeline.stream(labels, seeds=seeds, sampler=sampler, **settings)
    return step


# ---- raster


def test_noise_belongs_to_seed_and_position(pipeline: RasterPipeline) -> None:
    """A sample is the same alone and in any batch."""
    whole = last(pipeline, "raster").tokens
    for row, (label, seed) in enumerate(zip(LABELS, SEEDS, strict=True)):
        assert torch.equal(last(pipeline, "raster", [label], [seed]).tokens[0], whole[row])
    other = last(pipeline, "raster", LABELS, [5, 6, 8]).tokens
    assert torch.equal(other[:2], whole[:2]) and not torch.equal(other[2], whole[2])


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_tokens_are_those_of_one_whole_evaluation(pipeline: RasterPipeline, scale: float) -> None:
    """Given all of a row, every position draws its own token again: teacher forcing (E3)."""
    guided = {"guidance_scale": scale, "guidance_schedule": "constant"}
    model, tokens = pipeline.generator, last(pipeline, "raster", **guided).tokens
    rng = pipeline.inputs(LABELS, SEEDS, None)[1]
    labels = torch.tensor(LABELS)
    states = torch.stack(
        [model.scaled_state(-torch.expm1(-rng.exponential((32,), key=(1 << 41) + k))) for k in range(16)], 1
    )
    streams = [model(model.inputs(tokens, ids), states).logits for ids in (labels, torch.full_like(labels, 3))]
    logits = scale * streams[0] + (1 - scale) * streams[1]
    noise = torch.stack([rng.exponential((11,), key=k) for k in range(16)], 1)
    assert torch.equal((logits.softmax(-1) / noise).argmax(-1), tokens)


def test_every_evaluation_yields_and_tells_what_it_cost(pipeline: RasterPipeline) -> None:
    steps = list(pipeline.stream(LABELS, seeds=SEEDS, sampler="raster", recurrences=4))
    assert [step.index for step in steps] == list(range(16)) and {step.total for step in steps} == {16}
    for count, step in enumerate(steps, 1):
        assert step.wave is not None and step.evaluations == count
        assert (step.wave.passes, step.wave.work) == (4 * count, 12 * count)
        assert step.known[:, :count].all() and not step.known[:, count:].any()
        assert bool((step.tokens[:, count:] == pipeline.generator.mask_token_id).all())
        assert bool((step.wave.depths[:, :count] == 4).all()) and not step.wave.depths[:, count:].any()


def test_a_state_that_rests_is_left(pipeline: RasterPipeline, resting: RasterPipeline) -> None:
    whole = last(resting, "raster", recurrences=24)
    early = last(resting, "raster", recurrences=24, exit_threshold=1e-3)
    assert whole.wave and early.wave
    assert int(early.wave.depths.min()) > 0 and int(early.wave.depths.max()) <= 24
    assert early.wave.work == int(early.wave.depths.sum()) < whole.wave.work
    assert early.wave.passes < whole.wave.passes
    assert float((early.tokens == whole.tokens).float().mean()) > 0.95
    at_once = last(pipeline, "raster", exit_threshold=1000.0)
    assert at_once.wave and bool((at_once.wave.depths == 1).all())
    assert torch.equal(at_once.tokens, last(pipeline, "raster", recurrences=1).tokens)


def test_an_early_exit_does_not_depend_on_the_batch(pipeline: RasterPipeline) -> None:
    whole = last(pipeline, "raster", exit_threshold=0.02).tokens
    for row in range(3):
        assert torch.equal(
            last(pipeline, "raster", LABELS[row], [SEEDS[row]], exit_threshold=0.02).tokens[0], whole[row]
        )


# ---- wave-exact


@pytest.mark.parametrize(("wave", "drawn"), zip(WAVES, cycle(DRAWS), strict=False), ids=str)
def test_waves_draw_the_tokens_of_raster(pipeline: RasterPipeline, wave: dict[str, Any], drawn: dict[str, Any]) -> None:
    """Whatever is guessed on the way; also with weights that were never trained, whose guesses are mostly wrong."""
    want, found = last(pipeline, "raster", **drawn), last(pipeline, "wave-exact", **wave, **drawn)
    assert torch.equal(found.tokens, want.tokens)
    assert found.wave and want.wave
    assert found.wave.passes <= want.wave.passes  # never more in a row than one after the other
    assert found.evaluations <= 16 * 6 // wave["inner_recurrences"]
    if wave["headway"] == 1:
        assert found.evaluations >= 16
    if wave["wavefront"] == 1:
        assert found.wave.restarts == 0 and found.wave.work == 3 * 16 * 6


def test_alone_and_whole_a_wave_is_raster_bit_by_bit(pipeline: RasterPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    read = Run.read

    def note(self: Run, state: Tensor, *others: Any) -> Tensor:
        seen[name].append(state)
        return read(self, state, *others)

    monkeypatch.setattr(Run, "read", note)
    for name, settings in (("raster", {}), ("wave-exact", {"inner_recurrences": 6, "wavefront": 1})):
        seen[name] = []
        last(pipeline, name, **settings)
    assert len(seen["raster"]) == len(seen["wave-exact"]) == 16
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_a_wave_emits_every_token_once_in_order(pipeline: RasterPipeline) -> None:
    before = torch.zeros(3, 16, dtype=torch.bool)
    tokens = torch.full((3, 16), 11)
    for step in pipeline.stream(LABELS, seeds=SEEDS, inner_recurrences=1, wavefront=8):
        assert torch.equal(step.tokens[before], tokens[before]) and bool((step.known | ~before).all())
        counts = step.known.sum(1)
        assert torch.equal(step.known, torch.arange(16) < counts[:, None])
        assert step.wave is not None
        depths = step.wave.depths.masked_fill(step.known, 6)
        assert bool((depths[:, 1:] <= depths[:, :-1]).all())  # those before are never less far (E6)
        assert bool((step.wave.drafts[step.known] == -1).all())
        tokens, before = step.tokens, step.known
    assert bool(before.all()) and step.total == step.index + 1


def test_without_wrong_guesses_no_work_is_lost(pipeline: RasterPipeline) -> None:
    """Given tokens are certain: of a row of which all but the last is known, every position is worked on once (E4)."""
    tokens = last(pipeline, "raster").tokens
    known = torch.arange(16) < 15
    found = last(pipeline, "wave-exact", tokens=tokens, known=known.expand(3, -1), inner_recurrences=2, wavefront=16)
    assert torch.equal(found.tokens, tokens) and found.wave
    assert found.wave.restarts == 0 and found.wave.work == 3 * 16 * 6 and found.evaluations == 3
    lost = last(pipeline, "wave-exact", inner_recurrences=1, wavefront=8)
    assert lost.wave and lost.wave.restarts > 0 and lost.wave.work > 3 * 16 * 6


def test_what_is_committed_is_never_written_again(pipeline: RasterPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []
    begin = Run.__init__

    def note(self: Run, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        runs.append(self)

    monkeypatch.setattr(Run, "__init__", note)
    kept: list[tuple[int, int, Tensor]] = []
    for step in pipeline.stream(LABELS, seeds=SEEDS, guidance_scale=1.0, inner_recurrences=1, wavefront=8):
        keys = runs[0].cache.keys
        assert all(torch.equal(keys[:, row, :, place], held) for row, place, held in kept)
        counts = step.known.sum(1).tolist()
        done = {(row, place) for row, place, _ in kept}
        kept += [
            (row, place, keys[:, row, :, place].clone())
            for row in range(3)
            for place in range(counts[row])
            if (row, place) not in done
        ]
    assert len(kept) == 48


@pytest.mark.parametrize("most", [1, 4, 16])
def test_jacobi_draws_the_tokens_of_raster(pipeline: RasterPipeline, most: int) -> None:
    want, found = last(pipeline, "raster"), last(pipeline, "jacobi", wavefront=most)
    assert torch.equal(found.tokens, want.tokens)
    assert found.evaluations <= 16 and found.wave and found.wave.passes == 6 * found.evaluations


def test_one_generator_for_all_draws_the_same_in_every_lossless_sampler(pipeline: RasterPipeline) -> None:
    found = []
    for sampler, settings in (("raster", {}), ("wave-exact", {"inner_recurrences": 1, "wavefront": 8}), ("jacobi", {})):
        generator = torch.Generator().manual_seed(4)
        *_, step = pipeline.stream(LABELS, generator=generator, sampler=sampler, **settings)
        found.append(step.tokens)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_known_tokens_stay_and_the_rest_follows_from_them(pipeline: RasterPipeline) -> None:
    rng = torch.Generator().manual_seed(0)
    known, tokens = torch.rand(3, 16, generator=rng) < 0.5, torch.randint(11, (3, 16), generator=rng)
    given = {"tokens": tokens, "known": known}
    want = last(pipeline, "raster", **given)
    assert torch.equal(want.tokens[known], tokens[known])
    for sampler, settings in (
        ("wave-exact", {"inner_recurrences": 1, "wavefront": 8}),
        ("wave-exact", {"inner_recurrences": 3, "wavefront": 4, "headway": 2}),
        ("jacobi", {}),
    ):
        assert torch.equal(last(pipeline, sampler, **given, **settings).tokens, want.tokens)
    for sampler in ("wave-df", "zipar"):
        found = last(pipeline, sampler, **given).tokens
        assert torch.equal(found[known], tokens[known]) and bool((found < 11).all())


def test_single_precision_waves_nearly_always_agree() -> None:
    pipe = RasterPipeline(None, tiny_recurrent())
    labels, seeds = [k % 3 for k in range(64)], list(range(64))
    want = last(pipe, "raster", labels, seeds).tokens
    found = last(pipe, "wave-exact", labels, seeds, inner_recurrences=2).tokens
    assert float((want == found).all(1).float().mean()) >= 0.98


# ---- wave-df


def shared_raster(pipeline: RasterPipeline, **settings: Any) -> Tensor:
    """Raster with keys and values shared by all recurrences."""
    chosen = pipeline.chosen_settings(settings, "raster")
    labels, rng = pipeline.inputs(LABELS, SEEDS, None)
    given, kept = pipeline.given_tokens(None, None, 3)
    run = Run(pipeline.generator, labels, 3, rng, chosen, given, kept, 1)
    *_, step = pipeline.without_gradients(raster(run))
    return step.tokens


def test_alone_and_patient_wave_df_is_raster_with_a_shared_cache(pipeline: RasterPipeline) -> None:
    found = last(pipeline, "wave-df", exit_threshold=0.0, inner_recurrences=6, wavefront=1, momentum=0.0)
    assert torch.equal(found.tokens, shared_raster(pipeline)) and found.wave and found.wave.passes == 96


def test_impatient_wave_df_commits_at_every_readout(pipeline: RasterPipeline) -> None:
    """With no threshold to speak of it is a model of as many recurrences as lie between readouts."""
    found = last(pipeline, "wave-df", exit_threshold=1000.0, inner_recurrences=2, wavefront=1, momentum=0.0)
    assert found.evaluations == 16 and found.wave and bool((found.wave.depths == 2).all())
    assert torch.equal(found.tokens, shared_raster(pipeline, recurrences=2))


def test_wave_df_repeats_itself_and_draws_noise_only_for_states_that_want_it(
    pipeline: RasterPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = last(pipeline, "wave-df")
    assert torch.equal(first.tokens, last(pipeline, "wave-df").tokens)
    noisy = last(pipeline, "wave-df", state_noise=0.9)
    assert torch.equal(noisy.tokens, last(pipeline, "wave-df", state_noise=0.9).tokens)
    assert not torch.equal(noisy.tokens, first.tokens)

    def never(*given: Any) -> Tensor:
        raise AssertionError("noise was drawn")

    monkeypatch.setattr(wavefront, "_mix", never)
    last(pipeline, "wave-df")
    with pytest.raises(AssertionError, match="noise was drawn"):
        last(pipeline, "wave-df", state_noise=0.1)


@pytest.mark.parametrize("settings", [{}, {"freeze_rule": "rightmost"}, {"restart": False}], ids=str)
def test_a_loop_that_contracts_to_a_constant_makes_wave_df_raster(settings: dict[str, Any]) -> None:
    """With no way in for its input the loop gives the same state for all, and tokens are the noise's alone (F4)."""
    model = tiny_recurrent().double()
    model.adapter.weight.zero_()
    pipe = RasterPipeline(None, model)
    want = last(pipe, "raster", guidance_scale=1.0).tokens
    for most in (1, 3, 16):
        found = last(pipe, "wave-df", guidance_scale=1.0, wavefront=most, **settings)
        assert torch.equal(found.tokens, want)


def test_wave_df_of_a_loop_that_rests_is_its_raster(resting: RasterPipeline) -> None:
    want = shared_raster(resting, recurrences=16)
    found = last(resting, "wave-df", recurrences=16, exit_threshold=1e-4, wavefront=8, momentum=0.0)
    assert float((found.tokens == want).float().mean()) >= 0.995


@pytest.mark.parametrize("settings", [{}, {"freeze_rule": "rightmost"}, {"state_noise": 0.9}], ids=str)
@pytest.mark.parametrize("most", [1, 3])
def test_wave_df_ends_and_keeps_to_its_front(pipeline: RasterPipeline, most: int, settings: dict[str, Any]) -> None:
    steps = list(pipeline.stream(LABELS, seeds=SEEDS, sampler="wave-df", wavefront=most, **settings))
    assert len(steps) <= 16 * 3 and bool(steps[-1].known.all())
    for step in steps:
        assert step.wave and int(((step.wave.depths > 0) & ~step.known).sum(1).max()) <= most


# ---- zipar


@pytest.mark.parametrize("lead", [1, 2, 3, 4])
def test_rows_of_zipar_go_side_by_side(pipeline: RasterPipeline, lead: int) -> None:
    steps = list(pipeline.stream(LABELS, seeds=SEEDS, sampler="zipar", row_lead=lead))
    assert len(steps) == 4 + 3 * lead == steps[0].total
    before = torch.zeros(3, 16, dtype=torch.bool)
    for step in steps:
        counts = step.known.view(3, 4, 4).sum(2)
        assert bool((step.known | ~before).all()) and int((counts[:, :-1] - counts[:, 1:]).min()) >= 0
        started = counts[:, 1:] > 0
        assert bool((((counts[:, :-1] - counts[:, 1:]) >= lead - 1) | (counts[:, :-1] == 4))[started].all())
        before = step.known


def test_zipar_that_waits_for_whole_rows_is_raster(pipeline: RasterPipeline) -> None:
    assert torch.equal(last(pipeline, "zipar", row_lead=4).tokens, last(pipeline, "raster").tokens)


@torch.no_grad()
def test_zipar_sees_what_is_there_and_nothing_else(pipeline: RasterPipeline) -> None:
    """Tokens below that are made before, or along with, the third of the first row do not depend on it."""
    tokens = last(pipeline, "zipar", row_lead=1).tokens
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, 2] = True
    given = tokens.clone()
    given[:, 2] = (given[:, 2] + 1) % 11
    found = last(pipeline, "zipar", row_lead=1, tokens=given, known=known).tokens
    assert torch.equal(found[:, [0, 1, 4, 5, 8]], tokens[:, [0, 1, 4, 5, 8]])
    assert not torch.equal(found, given)


# ---- settings


@pytest.mark.parametrize(
    ("sampler", "settings", "says"),
    [
        ("wave-exact", {"inner_recurrences": 4}, "4, which does not divide recurrences 6: use 1, 2, 3, 6"),
        ("wave-exact", {"inner_recurrences": 12}, "does not divide recurrences 6"),
        ("wave-exact", {"wavefront": 0}, "wavefront is 0: it must lie in 1..16"),
        ("wave-exact", {"headway": 3, "wavefront": 2}, "headway is 3, but only wavefront 2 tokens are at work"),
        ("wave-exact", {"exit_threshold": 0.1}, "exit_threshold is of no effect with sampler 'wave-exact'"),
        ("wave-exact", {"momentum": 0.5}, "momentum is of no effect with sampler 'wave-exact': it is read by wave-df"),
        ("raster", {"inner_recurrences": 3}, "inner_recurrences is of no effect with sampler 'raster'"),
        ("zipar", {"row_lead": 5}, "row_lead is 5: it must lie in 1..4"),
        ("raster", {"recurrences": 0}, "recurrences is 0"),
        ("raster", {"recurrences": 2.5}, "recurrences is 2.5"),
        ("wave-df", {"freeze_rule": "left"}, "freeze_rule is 'left': use 'prefix' or 'rightmost'"),
        ("wave-df", {"restart": 1}, "restart is 1: it must be True or False"),
        ("wave", {}, "unknown sampler 'wave': use one of wave-exact, raster, wave-df, jacobi, zipar"),
        ("raster", {"wavefrnt": 1}, "unknown setting 'wavefrnt': did you mean 'wavefront'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    pipeline: RasterPipeline, sampler: str, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingError, match=says):
        pipeline.stream(LABELS, seeds=SEEDS, sampler=sampler, **settings)


def test_all_settings_of_a_request_are_spelt_out(pipeline: RasterPipeline) -> None:
    request = pipeline.request([1], [3], None, {"inner_recurrences": 3})
    assert request.sampler == "wave-exact" and request.settings["inner_recurrences"] == 3
    assert set(request.settings) == set(RasterSettings.__dataclass_fields__)


GOOD = {"residual": 0.01, "deeper": 0.0, "agreement": 0.999, "shallow": 0.01}


@pytest.mark.parametrize(("gate", "value"), [("residual", 0.2), ("deeper", 0.1), ("agreement", 0.5), ("shallow", 0.5)])
def test_a_loop_that_does_not_rest_is_warned_of(gate: str, value: float) -> None:
    pipe = RasterPipeline(None, tiny_recurrent(), gates=GOOD | {gate: value})
    for sampler in ("wave-exact", "wave-df", "jacobi", "zipar"):
        with pytest.warns(
            ModelWarning, match=rf"gate '{gate}' is {value}, and should be at (most|least) {GATES[gate][0]}"
        ):
            pipe.stream([0], seeds=[0], sampler=sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.stream([0], seeds=[0], sampler="raster")
        RasterPipeline(None, tiny_recurrent(), gates=GOOD).stream([0], seeds=[0])
