"""The training steps that comparisons time: those of the presets behind a model, as the trainer takes them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from test_training import fresh_accelerate  # noqa: F401
from tiny import write_mnist

from vgen.hub import ZOO


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmark_training")


def test_the_presets_behind_a_model_are_its_generators_and_its_tokenizers(script: ModuleType) -> None:
    expected = {
        "fashion-mvar": (["fashion-mvar"], ["fashion-vq", "fashion-var-decoder"]),
        "fashion-recurrent": (
            ["fashion-recurrent-base", "fashion-recurrent"],
            ["fashion-vqgan", "fashion-maskgit-decoder"],
        ),
    }
    for model, (generator, tokenizer) in expected.items():
        assert script.presets_of(model) == {"generator": generator, "tokenizer": tokenizer}


@pytest.mark.parametrize(
    ("model", "preset", "figure"),
    [
        ("fashion-mvar", "fashion-mvar", "gradient"),
        ("fashion-mvar", "fashion-vq", "commitment"),
        ("fashion-recurrent", "fashion-maskgit-decoder", "adversarial"),
        ("fashion-recurrent", "fashion-recurrent", "depth"),
    ],
)
def test_a_step_is_the_trainers_and_the_zoo_stays(
    script: ModuleType, tmp_path: Path, model: str, preset: str, figure: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in ZOO.rglob("*") if path.is_file()}
    step = script.step_of(model, preset, str(write_mnist(tmp_path)))
    first, second = step(), step()
    assert figure in first and 0 < float(second["loss"]) != float(first["loss"])
    assert {path: path.stat().st_mtime_ns for path in ZOO.rglob("*") if path.is_file()} == before
