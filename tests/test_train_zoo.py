"""The bundled models from their presets: what each stands on, runs that go on, and what a zoo takes in."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from test_training import fresh_accelerate  # noqa: F401
from tiny import WEIGHTS, generator_config, tokenizer_config, write_mnist

import vgen
from vgen.hub import ZOO
from vgen.training import config as presets
from vgen.training.trainer import checkpoints


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("train_zoo")


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("fashion-classifier", []),
        ("fashion-var", ["fashion-vq"]),
        ("fashion-mvar", ["fashion-vq"]),
        ("fashion-nfig", ["fashion-nfig-vq"]),
        ("fashion-maskgit", ["fashion-vqgan"]),
        ("fashion-maskgit-decoder", ["fashion-vqgan", "fashion-maskgit"]),
        ("emoji-var", ["emoji-vq"]),
        ("fashion-recurrent", ["fashion-recurrent-base"]),  # and on a bundled model's tokenizer
        ("moving-far", ["moving-far-base"]),
    ],
)
def test_every_model_comes_after_what_it_stands_on(script: Any, name: str, needed: list[str]) -> None:
    assert script.chain(name) == [*needed, name]


def test_a_model_is_finished_by_its_decoder_where_that_is_trained_further(script: Any) -> None:
    assert script.finished_by("fashion-maskgit") == "fashion-maskgit-decoder"
    assert script.finished_by("emoji-var") == "emoji-var"


def test_every_bundled_model_has_a_preset() -> None:
    assert {path.name for path in ZOO.iterdir() if path.is_dir()} <= set(presets.list_presets())


@pytest.fixture
def tiny_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Presets of a tokenizer and a generator on it, and a folder to train in."""
    data = write_mnist(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "PRESETS", tmp_path / "presets")
    (tmp_path / "presets").mkdir()
    vq = tokenizer_config(data)
    made = [vq, generator_config(data, Path("runs") / vq.name / "model", name="tiny-var")]
    for config in made:
        (tmp_path / "presets" / f"{config.name}.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return tmp_path


def test_a_chain_is_trained_goes_on_and_is_installed_once(script: Any, tiny_presets: Path) -> None:
    zoo = tiny_presets / "zoo"
    script.main(["tiny-var"], install=True, data_root=None, zoo=zoo)
    runs = [Path("runs") / name for name in ("tiny-vq", "tiny-var")]
    assert all((run / "model" / "README.md").is_file() and checkpoints(run) for run in runs)
    installed = vgen.load(zoo / "tiny-var")
    assert installed(class_labels=[1], seeds=[0], output_type="pt").images.shape[0] == 1
    times = [(run / "model").stat().st_mtime_ns for run in runs]
    shutil.rmtree(runs[1] / "model")  # as if it had been stopped after its last checkpoint
    script.main(["tiny-var"], install=False, data_root=None, zoo=zoo)
    assert (runs[0] / "model").stat().st_mtime_ns == times[0]
    again = load_file(runs[1] / "model" / "generator" / WEIGHTS)
    kept = load_file(zoo / "tiny-var" / "generator" / WEIGHTS)
    assert all((again[name] == kept[name]).all() for name in kept)


def model_folder(folder: Path, tokenizer: float, generator: float = 0.0, **config: Any) -> Path:
    """What looks like a trained model, of 8 numbers each."""
    for part, value in (("tokenizer", tokenizer), ("generator", generator)):
        (folder / part).mkdir(parents=True)
        save_file({"weight": torch.full((8,), value)}, folder / part / WEIGHTS)
        (folder / part / "config.json").write_text(json.dumps({"_name_or_path": str(folder), **config}))
    (folder / "model_index.json").write_text('{"_class_name": "NextScalePipeline"}')
    return folder


def test_a_tokenizer_that_is_there_is_not_stored_again(script: Any, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    script.put(model_folder(tmp_path / "a", 1.0), zoo / "a")
    for name, tokenizer, settings, owner in (("b", 1.0, {}, "a"), ("c", 2.0, {}, None), ("d", 1.0, {"x": 1}, None)):
        script.put(model_folder(tmp_path / name, tokenizer, **settings), zoo / name)
        index = json.loads((zoo / name / "model_index.json").read_text())
        assert index.get("_tokenizer_of") == owner and (zoo / name / "tokenizer").exists() == (owner is None)
    script.put(tmp_path / "a", zoo / "a")  # the owner itself, anew
    assert (zoo / "a" / "tokenizer" / WEIGHTS).is_file()


def test_a_tokenizer_whose_decoder_alone_is_another_is_shared(script: Any, tmp_path: Path) -> None:
    """M-VAR is trained on the tokens of VAR's tokenizer, and has its decoder from then on."""
    zoo = tmp_path / "zoo"
    for name, decoder, encoder, owner in (("a", 1.0, 0.0, None), ("b", 2.0, 0.0, "a"), ("c", 1.0, 5.0, None)):
        folder = model_folder(tmp_path / name, 1.0)
        tensors = {"decoder.w": torch.full((8,), decoder), "encoder.w": torch.full((8,), encoder)}
        save_file(tensors, folder / "tokenizer" / WEIGHTS)
        script.put(folder, zoo / name)
        assert json.loads((zoo / name / "model_index.json").read_text()).get("_tokenizer_of") == owner


def test_a_zoo_stays_as_it_was_where_a_model_is_too_large(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = tmp_path / "zoo"
    script.put(model_folder(tmp_path / "a", 1.0), zoo / "a")
    size = sum(file.stat().st_size for file in zoo.rglob("*") if file.is_file())
    monkeypatch.setattr(script, "LIMIT", size + 100)
    script.put(model_folder(tmp_path / "other", 3.0), zoo / "a")  # about as large, in its place
    with pytest.raises(vgen.types.SettingError, match=r"with b the zoo has 0.00 MB: 0 at most"):
        script.put(model_folder(tmp_path / "b", 2.0), zoo / "b")
    assert [path.name for path in zoo.iterdir()] == ["a"]


def test_an_unknown_model_is_one_line(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.BadParameter, match="no preset 'fashion-verr'"):
        script.main(["fashion-verr"], install=False, data_root=None, zoo=tmp_path)
    assert not list(tmp_path.iterdir())
