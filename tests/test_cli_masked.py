"""The command line with a masked model: its settings by flag and by --set, repeats from a picture, conversion."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import fill, golden_layout
from PIL import Image
from tiny_masked import tiny_pipeline

from vgen import cli
from vgen.media import read_request


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("masked") / "model"
    pipeline = tiny_pipeline(steps=6)
    torch.nn.Module.float(pipeline.generator)
    pipeline.save_pretrained(folder)
    return str(folder)


def pixels(name: str) -> np.ndarray:
    return np.array(Image.open(name))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    found = capsys.readouterr()
    assert found.out == "" and len(found.err.splitlines()) == 1
    return found.err


def test_settings_by_flag_and_by_set_reach_the_picture(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--steps", "5", "--set", "partial-steps=1", "--set", "mask_schedule=linear", "--sampler", "halton"]
    assert cli.main(["sample", saved, "--classes", "1", "--seed", "4", *flags]) == 0
    name = capsys.readouterr().out.strip()
    request = read_request(Path(name))
    wanted = {"steps": 5, "partial_steps": 1, "mask_schedule": "linear"}
    assert request.sampler == "halton" and wanted.items() <= request.settings.items()
    direct = tiny_pipeline(steps=6)
    torch.nn.Module.float(direct.generator)
    image = direct(class_labels=[1], seeds=[4], sampler="halton", **wanted).images[0]
    assert np.array_equal(pixels(name), np.array(image))
    assert cli.main(["sample", "--from", name, "--out", "again"]) == 0
    assert np.array_equal(pixels(capsys.readouterr().out.strip()), pixels(name))
    assert cli.main(["info", name]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["partial_steps"] == 1


def test_wrong_settings_are_one_line(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (["--steps", "17"], "steps is 17, but an image has 16 tokens"),
        (["--set", "partial_steps"], "has no value"),
        (["--set", "partial_steps=6"], "partial_steps is 6: it must lie in 0..5"),
        (["--set", "full_steps=7"], "full_steps is 7: it must lie in 0..6"),
        (["--set", "steps=3", "--steps", "3"], "steps is given twice"),
        (["--set", "heat=1"], "unknown setting 'heat'"),
        (["--sampler", "halton", "--set", "choice_temperature=2"], "of no effect with sampler 'halton'"),
        (["--sampler", "next-scale"], "unknown sampler 'next-scale'"),
        (["--more-smooth"], "unknown setting 'more_smooth'"),
    ):
        assert says in refused(capsys, "sample", saved, "--classes", "1", *arguments), arguments
    assert not list(Path().iterdir())


def test_maskgit_is_converted_and_sampled_without_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    layout = golden_layout("maskgit")
    torch.save({name: fill(name, shape) for name, shape in layout["transformer"].items()}, "maskgit.pth")
    command = ["convert", "maskgit", "--transformer", "maskgit.pth", "--heads", str(layout["num_heads"])]
    assert cli.main([*command, "--out", "model"]) == 0
    capsys.readouterr()
    assert "no tokenizer" in refused(capsys, "sample", "model", "--classes", "1")
    said = refused(capsys, "convert", "maskgit", "--transformer", "maskgit.pth", "--heads", "5", "--out", "other")
    assert "heads is 5" in said and not Path("other").exists()
