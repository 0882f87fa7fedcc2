"""Shared fixtures: tiny models with random weights (see tiny_models.py), fresh for every test."""

from pathlib import Path

import pytest
import tiny
import tiny_models
import torch

from vgen import cli
from vgen.generators.var import VAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.tokenizers.multiscale import MultiScaleVQ

torch.set_num_threads(1)


@pytest.fixture
def tiny_tokenizer() -> MultiScaleVQ:
    return tiny_models.tiny_tokenizer()


@pytest.fixture
def tiny_generator() -> VAR:
    return tiny_models.tiny_generator()


@pytest.fixture
def tiny_pipeline() -> NextScalePipeline:
    """Images of 8 x 8, scales (1, 2, 3, 4), 16 codes, classes "ankle boot", "bag" and "sneaker"."""
    return tiny_models.tiny_pipeline()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved pipeline (tiny.tiny_pipeline), for a whole module: copy it before damaging it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny.Run:
    """Run a command in an empty folder; gives its exit code and what it printed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def command(*arguments: object) -> tiny.Result:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return tiny.Result(code, *capsys.readouterr())

    return command
