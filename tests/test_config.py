"""Training presets: they load, every key can be overridden, and a wrong one says what was meant."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from vgen.training.config import TrainingConfig, list_presets, load_config
from vgen.types import SettingError

MINIMAL: dict[str, Any] = {
    "kind": "tokenizer",
    "name": "x",
    "data": "mnist",
    "family": "multiscale",
    "model": {"vocab_size": 8},
    "steps": 10,
    "batch_size": 4,
    "lr": 0.1,
}


@pytest.fixture
def preset(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINIMAL))
    return str(tmp_path / "mine.yaml")


# ---- presets


def test_the_bundled_models_have_presets() -> None:
    assert {"fashion-var", "fashion-vq"} <= set(list_presets())


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_loads_and_carries_its_name(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    fitted = config.family == "far" and not config.init_from  # it may fit its codec itself
    assert bool(config.tokenizer) == (config.kind == "generator" and not fitted)
    assert load_config(name, kind=config.kind) == config


def test_a_preset_of_ones_own_is_a_yaml_file(preset: str) -> None:
    config = load_config(preset)
    assert (config.steps, config.lr, config.model) == (10, 0.1, {"vocab_size": 8})
    assert config.schedule == "cosine"  # what the file leaves out has its default


@pytest.mark.parametrize("wrong", ["fashion-vr", "no/such/file.yaml", "", "."])
def test_an_unknown_preset_names_the_known_ones(wrong: str) -> None:
    with pytest.raises(SettingError, match=f"{wrong!r}.*fashion-var, fashion-var-decoder, fashion-vq"):
        load_config(wrong)


@pytest.mark.parametrize("content", ["steps: [1", "\t- x", "just words", "", "- 1\n- 2"])
def test_a_file_without_settings_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(SettingError, match=r"x\.yaml (is not YAML|holds no settings)"):
        load_config(str(tmp_path / "x.yaml"))


def test_a_preset_that_lacks_settings_names_them_all(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("kind: tokenizer\nname: x\nsteps: 1\n")
    with pytest.raises(SettingError, match="lacks data, family, model, batch_size, lr"):
        load_config(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(("name", "other"), [("fashion-var", "tokenizer"), ("fashion-vq", "generator")])
def test_a_preset_of_the_other_kind_names_the_right_command(name: str, other: str) -> None:
    with pytest.raises(SettingError, match=f"vgen train (generator|tokenizer) --preset {name}") as caught:
        load_config(name, kind=other)
    assert f"train {other} " not in str(caught.value)


# ---- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=2000", "steps", 2000),
        ("steps=2e3", "steps", 2000),  # YAML reads 2e3 as text
        ("steps=2000.0", "steps", 2000),
        ("lr=1e-3", "lr", 0.001),
        ("lr=1", "lr", 1.0),
        ("data=photos/=x", "data", "photos/=x"),
        ("data=2024", "data", "2024"),
        ("flip=true", "flip", True),
        ("betas=[0.8, 1e-1]", "betas", [0.8, 0.1]),
        ("data_root=null", "data_root", None),
        ("data_root=/tmp/x", "data_root", "/tmp/x"),
        ("model={vocab_size: 9}", "model", {"vocab_size": 9}),
        ("model.scales=[1, 2]", "model", {"vocab_size": 8, "scales": [1, 2]}),
        ("schedule=linear", "schedule", "linear"),
        ("precision=no", "precision", "no"),
    ],
)
def test_an_override_has_the_type_of_its_setting(preset: str, override: str, key: str, value: Any) -> None:
    found = getattr(load_config(preset, [override]), key)
    assert found == value and type(found) is type(value)


def test_the_last_override_wins(preset: str) -> None:
    assert load_config(preset, ["steps=1", "steps=2"]).steps == 2
    config = load_config(preset, ["model.vocab_size=3", "model.vocab_size=4", "model.code_dim=2"])
    assert config.model == {"vocab_size": 4, "code_dim": 2}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stps=5", "unknown setting 'stps'.*did you mean 'steps'"),
        ("batchsize=5", "did you mean 'batch_size'"),
        ("qqqq=5", "unknown setting 'qqqq'.*known settings: kind, name"),
        ("steps", "'steps' has no value: write key=value"),
        ("optimizer.lr=5", "unknown setting 'optimizer.lr': only model.*, video"),
        ("model.x=[1", "not YAML"),
        ("steps=many", "steps is 'many': expected a value of type int"),
        ("steps=1.5", "steps is 1.5: expected a value of type int"),
        ("steps=true", "steps is True: expected a value of type int"),
        ("lr=fast", "lr is 'fast': expected a value of type float"),
        ("lr=true", "lr is True"),
        ("flip=1", "flip is 1: expected a value of type bool"),
        ("name=[a]", "name is"),
        ("model=5", "model is 5"),
        ("betas=0.9", "betas is 0.9"),
        ("steps=0", "steps is 0: it must be at least 1"),
        ("keep=0", "keep is 0"),
        ("lr=0", "lr is 0.0: it must be above 0"),
        ("lr=.nan", "lr is nan"),
        ("accumulation=3", "batch_size 4 is not a multiple of accumulation 3"),
        ("schedule=step", "schedule is 'step': use one of cosine, linear"),
        ("optimizer=sgd", "optimizer is 'sgd': use one of adamw, muon"),
        ("precision=fp8", "precision is 'fp8': use one of auto, no, fp16, bf16"),
        ("kind=generator", "a generator needs a tokenizer: --set tokenizer=FOLDER"),
    ],
)
def test_a_wrong_override_is_named_with_the_remedy(preset: str, override: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        load_config(preset, [override])


@pytest.mark.parametrize("override", ["betas=[a]", "betas=[0.9]", "steps=.inf", "steps=.nan", "sample_every=0"])
def test_a_setting_that_fails_later_is_refused_at_once(preset: str, override: str) -> None:
    with pytest.raises(SettingError, match=override.partition("=")[0]):
        load_config(preset, [override])


def test_a_configuration_is_frozen() -> None:
    config = TrainingConfig(**MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 5  # type: ignore[misc]


def test_other_data_do_not_inherit_the_presets_description() -> None:
    own, other = load_config("fashion-vq"), load_config("fashion-vq", ["data=mnist"])
    assert own.notes and not other.notes
    assert (own.license, other.license) == ("apache-2.0", "unknown")
    assert load_config("fashion-vq", ["data=mnist", "notes=Digits."]).notes == "Digits."
