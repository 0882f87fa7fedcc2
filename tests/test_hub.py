"""Finding and loading models: folders first, the Hub only for ids, and damage always named."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import NAMES, WEIGHTS, tiny_pipeline

import vgen
from vgen import hub
from vgen.inspection import describe
from vgen.types import CheckpointError, SettingError


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads asked for; none is carried out."""
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


# ---- loading


def test_a_saved_pipeline_comes_back_the_same(saved: Path) -> None:
    ours, theirs = tiny_pipeline(), vgen.load(saved)
    for role in hub.ROLES:
        state, loaded = getattr(ours, role).state_dict(), getattr(theirs, role).state_dict()
        assert state.keys() == loaded.keys()
        assert all(torch.equal(state[name], loaded[name]) for name in state)
    assert theirs.class_names == list(NAMES.values())
    first, second = (pipe(class_labels=["bee"], seeds=[1], output_type="pt").images for pipe in (ours, theirs))
    assert torch.equal(first, second)


def test_a_loaded_pipeline_knows_where_it_came_from(saved: Path) -> None:
    pipeline = vgen.load(str(saved))
    assert (pipeline.source, pipeline.folder) == (str(saved), saved)
    assert not pipeline.generator.training and not pipeline.tokenizer.training
    assert pipeline.checkpoint() == vgen.load(saved).checkpoint() != tiny_pipeline(seed=9).checkpoint()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_the_network_takes_the_dtype(saved: Path, dtype: Any) -> None:
    pipeline = vgen.load(saved, dtype=dtype)
    assert {p.dtype for p in pipeline.generator.parameters()} == {hub.parse_dtype(dtype)}
    assert pipeline.tokenizer.quant_conv.weight.dtype == hub.parse_dtype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_codes_stay_exact_in_half_precision(saved: Path, dtype: Any) -> None:
    pipeline = vgen.load(saved, dtype=dtype)
    assert pipeline.tokenizer.codebook.weight.dtype == torch.float32
    assert torch.equal(pipeline.tokenizer.codebook.weight, tiny_pipeline().tokenizer.codebook.weight)


def test_a_model_without_tokenizer_loads(tmp_path: Path) -> None:
    whole = tiny_pipeline()
    type(whole)(None, whole.generator).save_pretrained(tmp_path / "m")
    pipeline = vgen.load(tmp_path / "m")
    assert pipeline.tokenizer is None
    with pytest.raises(SettingError, match="no tokenizer"):
        pipeline(class_labels=[0], seeds=[0])


# ---- names


def test_bundled_names_are_the_folders_of_the_zoo(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(saved, tmp_path / "zoo" / "b-model")
    shutil.copytree(saved, tmp_path / "zoo" / "a-model")
    (tmp_path / "zoo" / "unfinished").mkdir()
    monkeypatch.setattr(hub, "ZOO", tmp_path / "zoo")
    assert vgen.list_models() == ["a-model", "b-model"]
    assert vgen.load("a-model").folder == tmp_path / "zoo" / "a-model"
    with pytest.raises(SettingError, match="unknown model 'c-model': use a-model, b-model"):
        vgen.load("c-model")


@pytest.fixture
def borrowed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled model without a tokenizer folder of its own, which uses that of the bundled model "owner"."""
    for name in ("owner", "borrower"):
        shutil.copytree(saved, tmp_path / "zoo" / name)
    folder = tmp_path / "zoo" / "borrower"
    shutil.rmtree(folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_tokenizer_of": "owner"}))
    monkeypatch.setattr(hub, "ZOO", tmp_path / "zoo")
    return folder


def test_a_bundled_model_may_use_the_tokenizer_of_another(borrowed: Path, tmp_path: Path) -> None:
    whole, borrower = vgen.load("owner"), vgen.load("borrower")
    assert borrower.checkpoint() == whole.checkpoint()  # the same weights, wherever they lie
    first, second = (pipe(class_labels=["bee"], seeds=[1], output_type="pt").images for pipe in (whole, borrower))
    assert torch.equal(first, second)
    assert hub.load_tokenizer("borrower")[1] == borrowed.parent / "owner" / "tokenizer"
    assert describe("borrower") == describe("owner")
    borrower.save_pretrained(tmp_path / "copy")  # elsewhere it is whole
    assert (tmp_path / "copy" / "tokenizer" / WEIGHTS).is_file()
    assert vgen.load(tmp_path / "copy").checkpoint() == whole.checkpoint()


@pytest.mark.parametrize("owner", ["nobody", "../owner", "/etc", 3])
def test_only_a_bundled_models_tokenizer_is_borrowed(borrowed: Path, owner: Any) -> None:
    index = json.loads((borrowed / "model_index.json").read_text())
    (borrowed / "model_index.json").write_text(json.dumps(index | {"_tokenizer_of": owner}))
    with pytest.raises(CheckpointError, match="no bundled model"):
        vgen.load("borrower")


@pytest.mark.parametrize("name", ["nothing", "./a/b", "../a", "/a/b", "~/b", "a/b/c"])
def test_only_a_hub_id_reaches_the_network(name: str, no_network: list[str]) -> None:
    with pytest.raises(SettingError, match="unknown model"):
        vgen.load(name)
    assert no_network == []


def test_a_folder_goes_before_a_hub_id(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    shutil.copytree(saved, tmp_path / "user" / "model")
    monkeypatch.chdir(tmp_path)
    assert vgen.load("user/model").source == "user/model"
    assert no_network == []


def test_a_hub_id_is_downloaded_without_code(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipeline = vgen.load("user/model")
    assert (pipeline.source, pipeline.folder) == ("user/model", saved)
    assert not any(pattern.endswith((".py", ".bin", ".pth", "*")) for pattern in asked["user/model"])


def test_a_failed_download_says_so(no_network: list[str]) -> None:
    with pytest.raises(SettingError, match=r"'user/model'.*Hub did not give it.*network"):
        vgen.load("user/model")
    assert no_network == ["user/model"]


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"model_index\.json"):
        vgen.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float8", "int64", "", 3])
def test_an_unknown_dtype_names_the_choices(saved: Path, dtype: Any) -> None:
    with pytest.raises(SettingError, match="use one of float32"):
        vgen.load(saved, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_missing_gpu_is_named(saved: Path) -> None:
    with pytest.raises(SettingError, match="no GPU is visible"):
        vgen.load(saved, device="cuda")


def test_an_unknown_device_is_a_wrong_setting(saved: Path) -> None:
    with pytest.raises(SettingError, match="gpu"):
        vgen.load(saved, device="gpu")


# ---- damage


def edit_json(path: Path, change: Callable[[dict], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict], Any]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize("role", hub.ROLES)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop(sorted(state)[3]), "1 missing tensors"),
        (lambda state: state.update(stray=torch.ones(2)), "1 unexpected tensors, such as stray"),
        (lambda state: state.update({sorted(state)[3]: torch.ones(7, 7)}), r"7, 7|mismatched|size"),
        (lambda state: [state.pop(name) for name in sorted(state)[:5]], "5 missing tensors"),
    ],
    ids=["missing", "unexpected", "shape", "many"],
)
def test_wrong_tensors_are_named(model: Path, role: str, change: Callable[[dict], Any], says: str) -> None:
    edit_tensors(model / role / WEIGHTS, change)
    with pytest.raises(CheckpointError, match=says) as caught:
        vgen.load(model)
    assert str(model / role) in str(caught.value) and "again" in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights_are_named(model: Path, keep: float) -> None:
    data = (model / "generator" / WEIGHTS).read_bytes()
    (model / "generator" / WEIGHTS).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"generator.*get the model again"):
        vgen.load(model)


def test_missing_weights_are_named(model: Path) -> None:
    (model / "tokenizer" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.*get the model again"):
        vgen.load(model)


def test_a_pickle_in_place_of_the_weights_is_never_run(model: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "victim"), "w"))

    (model / "generator" / WEIGHTS).unlink()
    torch.save({"head.weight": Trap()}, model / "generator" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError):
        vgen.load(model)
    (model / "generator" / WEIGHTS).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError):
        vgen.load(model)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("_class_name"),
        lambda values: values.update(_class_name="StableDiffusionPipeline"),
        lambda values: values.update(generator=["os", "system"]),
        lambda values: values.update(generator=["vgen.generators.var", "Attention"]),
        lambda values: values.update(tokenizer=5),
        lambda values: values.update(tokenizer=["vgen.generators.var", "VAR"]),
    ],
)
def test_an_index_of_something_else_is_refused(model: Path, change: Callable[[dict], Any]) -> None:
    edit_json(model / "model_index.json", change)
    with pytest.raises(CheckpointError):
        vgen.load(model)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null"])
def test_a_damaged_index_is_named(model: Path, content: str) -> None:
    (model / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model_index\.json is damaged"):
        vgen.load(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("generator"),
        lambda values: values.update(invented="setting"),
        lambda values: values.update(id2label=["ant", "bee"]),
        lambda values: values.update(generator=[["list"], "VAR"]),
    ],
    ids=["no generator", "unknown setting", "labels of another type", "names of another type"],
)
def test_an_odd_index_is_named(model: Path, change: Callable[[dict], Any]) -> None:
    edit_json(model / "model_index.json", change)
    with pytest.raises(CheckpointError):
        vgen.load(model)


@pytest.mark.parametrize("content", ["", "{", '{"scales": 5}', '{"width": "wide"}'])
def test_a_damaged_configuration_is_named(model: Path, content: str) -> None:
    (model / "generator" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="generator"):
        vgen.load(model)


def test_parts_that_do_not_fit_are_refused(model: Path) -> None:
    other = tiny_pipeline(vocab_size=20)
    shutil.rmtree(model / "tokenizer")
    other.tokenizer.save_pretrained(model / "tokenizer")
    with pytest.raises(SettingError, match="vocab_size is 20 against 16"):
        vgen.load(model)
