"""Shared fixtures: tiny models with random weights (see tiny_models.py), fresh for every test."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of scripts/ by its name; those it imports from there are found too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module


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


# ---- of tests in a browser: Gradio is imported for these alone


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A studio of the bundled models, and its address."""
    from studio_browser import serving

    with serving(tmp_path_factory.mktemp("studio")) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from studio_browser import browsing

    with browsing() as found:
        yield found


@pytest.fixture
def visitor(browser: Any, served: Any) -> Iterator[Any]:
    from studio_browser import visiting

    with visiting(browser, served[1]) as found:
        yield found
