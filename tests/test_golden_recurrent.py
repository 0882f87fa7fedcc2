"""Parity with the published recurrent-depth code, through `vgen.convert` (golden/README: float32, CPU, atol 1e-4)."""

import pytest
import torch
from golden_weights import State, fill, golden_figures, golden_layout

import vgen
from vgen.pipelines.raster import RasterPipeline
from vgen.types import CheckpointError, SettingError

LAYOUT = golden_layout("recurrent")
FIGURES = golden_figures("recurrent")


def state() -> State:
    """What the published code would have saved: the head tied, the rotations computed."""
    made = {name: fill(name, shape) for name, shape in LAYOUT["model"].items()}
    made["lm_head.weight"] = made["transformer.wte.weight"].clone()
    return made


@pytest.fixture(scope="module")
def pipeline() -> RasterPipeline:
    return vgen.convert("recurrent", transformer=state(), recurrences=4)


@pytest.mark.parametrize("recurrences", [1, 4])
def test_logits_are_the_published_ones(pipeline: RasterPipeline, recurrences: int) -> None:
    with torch.no_grad():
        found = pipeline.generator(FIGURES["tokens"], FIGURES["state"], recurrences).logits
    torch.testing.assert_close(found, FIGURES[f"logits_{recurrences}_steps"], rtol=0, atol=1e-4)


def test_sizes_are_read_off_the_tensors(pipeline: RasterPipeline) -> None:
    config = pipeline.generator.config
    for name in ("prelude", "core", "coda"):
        assert config[name] == LAYOUT[name]
    wanted = {"heads": 2, "width": 64, "mlp_width": 96, "vocab_size": 40, "num_tokens": 32, "num_classes": None}
    assert {name: config[name] for name in wanted} == wanted


def test_a_language_model_goes_on_from_its_first_words(pipeline: RasterPipeline) -> None:
    tokens, known = torch.zeros(32, dtype=torch.int64), torch.arange(32) < 5
    tokens[:5] = FIGURES["tokens"][0, :5]
    given = {"tokens": tokens, "known": known, "seeds": [3], "output_type": "latent"}
    made = [pipeline(sampler=sampler, **given).tokens for sampler in ("raster", "wave-exact")]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0][0, :5], tokens[:5])
    with pytest.raises(SettingError, match="begins with a known one"):
        pipeline(seeds=[3], output_type="latent")
    with pytest.raises(SettingError, match="reads words: use 'raster'"):
        pipeline(sampler="zipar", **given)


def test_a_folder_of_it_loads_again(pipeline: RasterPipeline, tmp_path) -> None:
    vgen.conversion.save(pipeline, tmp_path / "model")
    loaded = vgen.load(tmp_path / "model")
    assert isinstance(loaded, RasterPipeline) and loaded.tokenizer is None
    for name, tensor in pipeline.generator.state_dict().items():
        assert torch.equal(loaded.generator.state_dict()[name], tensor)


def test_the_head_may_be_absent_and_must_be_the_embedding() -> None:
    given = state()
    del given["lm_head.weight"], given["freqs_cis"]
    assert vgen.convert("recurrent", transformer=given).generator.config["num_tokens"] == 4096
    given["lm_head.weight"] = given["transformer.wte.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        vgen.convert("recurrent", transformer=given)


def without(given: State, part: str) -> State:
    return {name: tensor for name, tensor in given.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda s: without(s, "adapter"), CheckpointError, "lacks transformer.adapter.weight"),
        (lambda s: without(s, "norm_3"), CheckpointError, r"missing transformer\.\w+\.\d\.norm_3"),
        (lambda s: s | {"extra": torch.zeros(1)}, CheckpointError, "unexpected extra"),
        (lambda s: s | {"transformer.ln_f.weight": torch.zeros(3)}, CheckpointError, r"transformer\.ln_f\.weight is"),
        (lambda s: s | {"transformer.ln_f.weight": torch.full((64,), torch.nan)}, CheckpointError, "not numbers"),
        (lambda s: without(s, "qk_bias"), SettingError, "give heads="),
        (lambda s: without(s, "core_block"), CheckpointError, "no recurrent-depth transformer"),
    ],
)
def test_other_weights_are_refused(change, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        vgen.convert("recurrent", transformer=change(state()))


def test_a_tokenizer_is_refused() -> None:
    with pytest.raises(SettingError, match="leave the tokenizer out"):
        vgen.convert("recurrent", transformer=state(), tokenizer={"a": torch.zeros(1)})


def test_without_biases_heads_are_given() -> None:
    given = without(state(), "qk_bias")
    model = vgen.convert("recurrent", transformer=given, heads=4).generator
    assert model.config["heads"] == 4 and not model.config["qk_bias"]
