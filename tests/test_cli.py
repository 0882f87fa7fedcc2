"""The command line: what each command does, and one line with the value and the remedy for each mistake."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from tiny import (
    GENERATOR,
    TOKENIZER,
    WEIGHTS,
    Result,
    Run,
    generator_config,
    published_files,
    python,
    tiny_pipeline,
    tokenizer_config,
    write_folder,
    write_mnist,
)

import vgen
from vgen.media import read_request
from vgen.types import Request, SettingError


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A published transformer and tokenizer, tiny."""
    return published_files(tmp_path_factory.mktemp("published"))


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def refused(result: Result, code: int, *says: str) -> None:
    """One line on stderr that says all of this, nothing on stdout."""
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vgen: "), result.err
    for pattern in says:
        assert re.search(pattern, lines[0]), f"{pattern!r} is not in {lines[0]!r}"
    assert result.code == code, lines[0]
    assert "Traceback" not in lines[0] and "--debug" not in lines[0]


def files(folder: Path = Path()) -> list[str]:
    """Every file under a folder, hidden and temporary ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- sample


def test_sample_prints_the_paths_of_its_pictures(run: Run, saved: Path) -> None:
    done = run("sample", saved, "--classes", "cat,0", "--per-class", 2, "--seed", 7, "--out", "pictures", "--sheet")
    names = ["000000_c0002_s7.png", "000001_c0002_s8.png", "000002_c0000_s9.png", "000003_c0000_s10.png"]
    assert done.code == 0
    assert done.out.splitlines() == [str(Path("pictures") / name) for name in names]
    records = ["manifest.jsonl", "run.json", "sheet.png"]
    assert files() == sorted(f"pictures/{name}" for name in [*names, *records])
    direct = tiny_pipeline()(class_labels=[2, 2, 0, 0], seeds=[7, 8, 9, 10]).images
    for path, image in zip(done.out.splitlines(), direct, strict=True):
        assert np.array_equal(np.array(Image.open(path)), np.array(image))


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("ant,bee", [0, 1]),
        ("0-2", [0, 1, 2]),
        ("cat, 0-1 ,ant", [2, 0, 1, 0]),
        (" BEE ", [1]),
        ("1,1", [1, 1]),
        ("none", [None]),
        (None, [0, 1, 2]),
    ],
)
def test_classes_are_names_ids_and_ranges(run: Run, saved: Path, classes: str | None, labels: list) -> None:
    done = run("sample", saved, *([] if classes is None else ["--classes", classes]))
    found = [read_request(Path(path)).class_labels for path in done.out.splitlines()]
    assert found == [label if label is None else [label] for label in labels]


def test_settings_reach_the_picture_and_its_request(run: Run, saved: Path) -> None:
    flags = ["--guidance-scale", 3.5, "--guidance-schedule", "constant", "--top-k", 5, "--top-p", 0.9]
    flags += ["--temperature", 0.7, "--more-smooth", "--dtype", "bfloat16", "--sampler", "next-scale"]
    done = run("sample", saved, "--classes", "bee", "--seed", 3, *flags)
    request = read_request(Path(done.out.strip()))
    assert request.settings == {
        "guidance_scale": 3.5,
        "guidance_schedule": "constant",
        "top_k": 5,
        "top_p": 0.9,
        "temperature": 0.7,
        "temperature_schedule": "constant",
        "more_smooth": True,
    }
    assert (request.dtype, request.sampler, request.seeds) == ("bfloat16", "next-scale", [3])
    assert (request.model, request.vgen, request.device) == (str(saved), vgen.__version__, "cpu")
    assert re.fullmatch("[0-9a-f]{64}", request.checkpoint)


def test_a_picture_repeats_itself(run: Run, saved: Path) -> None:
    made = run("sample", saved, "--per-class", 2, "--seed", 5, "--top-k", 6, "--guidance-scale", 1.5, "--out", "a")
    for path in map(Path, made.out.splitlines()):
        again = run("sample", "--from", path, "--out", "b")
        assert again.code == 0 and "may differ" not in again.err
        (copy,) = map(Path, again.out.splitlines())
        assert copy.read_bytes() == path.read_bytes()  # pixels, request and all


def test_flags_override_the_request_of_a_picture(run: Run, saved: Path) -> None:
    path = run("sample", saved, "--classes", "cat", "--top-k", 6, "--out", "a").out.strip()
    other = Path(run("sample", "--from", path, "--seed", 9, "--temperature", 0.5, "--out", "b").out.strip())
    assert other.name == "000000_c0002_s9.png"
    settings = read_request(other).settings
    assert (settings["top_k"], settings["temperature"]) == (6, 0.5)


def test_other_weights_than_a_picture_was_made_with_are_pointed_out(run: Run, saved: Path, tmp_path: Path) -> None:
    path = run("sample", saved, "--classes", "cat").out.strip()
    tiny_pipeline(seed=5).save_pretrained(tmp_path / "other")
    done = run("sample", tmp_path / "other", "--from", path, "--out", "b")
    assert done.code == 0 and "made with weights" in done.err and "pixels may differ" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--classes", "3"], ["class 3 is outside 0..2"]),
        (["--classes", "-1"], ["class -1 is outside 0..2"]),
        (["--classes", "0-99999999999"], ["class 99999999999 is outside 0..2"]),
        (["--classes", "be"], ["unknown class 'be'", "did you mean bee"]),
        (["--classes", "zebra"], ["unknown class 'zebra'", "ant, bee, cat"]),
        (["--classes", ","], ["','", "names no class"]),
        (["--per-class", "0"], ["per-class is 0", "at least 1"]),
        (["--batch-size", "0"], ["batch-size is 0", "at least 1"]),
        (["--seed", "-5"], ["seed -5", r"0\.\.9223372036854775807"]),
        (["--seed", "99999999999999999999"], ["99999999999999999999"]),
        (["--top-k", "-1"], ["top_k is -1", r"0\.\.16"]),
        (["--top-k", "17"], ["top_k is 17", r"0\.\.16"]),
        (["--top-p", "1.5"], ["top_p is 1.5", r"0.0\.\.1.0"]),
        (["--temperature", "nan"], ["temperature is nan"]),
        (["--guidance-scale", "inf"], ["guidance_scale is inf"]),
        (["--guidance-schedule", "cosine"], ["'cosine'", "use 'linear', 'constant', or 2 to 64"]),
        (["--sampler", "euler"], ["unknown sampler 'euler'", "next-scale"]),
        (["--dtype", "float8"], ["'float8'", "bfloat16"]),
        (["--per-class", "x"], ["--per-class", "integer", "--help"]),
        (["--stepz", "5"], ["--stepz", "--help"]),
    ],
)
def test_a_wrong_flag_is_named_with_the_remedy(run: Run, saved: Path, arguments: list[str], says: list[str]) -> None:
    refused(run("sample", saved, *arguments), 2, *says)
    assert files() == []


@pytest.mark.parametrize("classes", ["--5", "²"])
def test_a_class_that_only_looks_like_a_number_is_named(run: Run, saved: Path, classes: str) -> None:
    refused(run("sample", saved, "--classes", classes), 2, "class", re.escape(classes))


def test_an_unknown_device_is_a_wrong_flag(run: Run, saved: Path) -> None:
    refused(run("sample", saved, "--device", "gpu"), 2, "gpu")


def test_a_refused_run_leaves_no_folder(run: Run, saved: Path) -> None:
    run("sample", saved, "--seed", -5)
    assert not Path("samples").exists()


def test_sample_says_what_it_needs(run: Run, tmp_path: Path) -> None:
    refused(run("sample"), 2, "name a model", "--from")
    refused(run("sample", "fashion-vra"), 2, "unknown model 'fashion-vra'", "a folder")
    refused(run("sample", tmp_path), 2, r"model_index\.json", "vgen convert")
    refused(run("sample", "--from", "x.png", "--classes", "1"), 2, "leave out --classes")
    refused(run("sample", "--from", "none.png"), 1, r"no such file: none\.png")


# ---- requests in files of strangers


def forge(request: dict[str, Any] | str, path: Path = Path("forged.png")) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("vgen", request if isinstance(request, str) else json.dumps(request))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_seeds_that_do_not_match_are_refused(run: Run, saved: Path) -> None:
    path = forge({"model": str(saved), "class_labels": [1, 2], "seeds": [0]})
    refused(run("sample", "--from", path), 2, "2 class labels but 1 seeds", "one seed per image")
    with pytest.raises(SettingError, match="2 class labels but 3 seeds: give one seed per image"):
        tiny_pipeline()(class_labels=[0, 1], seeds=[1, 2, 3])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"class_labels": [7]}, "class 7 is outside 0..2"),
        ({"seeds": [-1]}, "seed -1"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"settings": {"invented": 1}}, "unknown setting 'invented'"),
        ({"settings": {"top_k": "all"}}, "top_k is 'all'"),
        ({"settings": {"temperature": None}}, "temperature is None"),
        ({"dtype": "float8"}, "'float8'"),
        ({"model": "elsewhere"}, "made with 'elsewhere', which is not here: name it before --from"),
        ({"model": "user/model"}, "made with 'user/model', which is not here"),  # no stranger starts a download
        ({"settings": {"output_type": "latent"}}, "output_type"),
    ],
)
def test_a_forged_request_is_checked_like_flags(run: Run, saved: Path, changes: dict[str, Any], says: str) -> None:
    known = {"vgen": vgen.__version__, "checkpoint": vgen.load(saved).checkpoint()}
    path = forge({"model": str(saved), "class_labels": [1], "seeds": [0], **known} | changes)
    refused(run("sample", "--from", path), 2, says)
    assert files() == ["forged.png"]


@pytest.mark.parametrize(
    "settings",
    [{"seeds": [1]}, {"class_labels": [1]}, {"sampler": "x"}, {"dictation": 1}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_forged_setting_is_no_other_argument(run: Run, saved: Path, settings: dict[str, Any]) -> None:
    known = {"vgen": vgen.__version__, "checkpoint": vgen.load(saved).checkpoint()}
    path = forge({"model": str(saved), "class_labels": [1], "seeds": [0], "settings": settings, **known})
    refused(run("sample", "--from", path), 2, next(iter(settings)))


def test_a_file_without_request_is_refused(run: Run) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    refused(run("sample", "--from", "plain.png"), 2, "plain.png carries no vgen request")
    data = forge({"model": "m", "seeds": [0]}).read_bytes()
    Path("cut.png").write_bytes(data[: len(data) // 2])
    refused(run("sample", "--from", "cut.png"), 2, "cut.png")


# ---- editing has no command of its own; these are what the studio's errors will say


@pytest.mark.parametrize(
    ("size", "says"), [((8, 6), "8x6"), ((1, 1), "1x1"), ((16, 16), "16x16")], ids=["oblong", "tiny", "large"]
)
def test_an_image_to_edit_of_another_shape_is_named(size: tuple[int, int], says: str) -> None:
    with pytest.raises(SettingError, match=f"the image is {says}, this model edits 8x8: resize or crop"):
        tiny_pipeline().edit(Image.new("RGB", size), np.ones((8, 8)), class_labels=[0], seeds=[0])


# ---- damaged models


def change_tensors(path: Path, change: Callable[[dict], Any]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_missing_and_unexpected_tensors_of_a_model_are_named(run: Run, model: Path) -> None:
    change_tensors(model / "generator" / WEIGHTS, lambda state: state.pop("head.weight"))
    refused(run("sample", model), 1, "generator has 1 missing tensors, such as head.weight", "again")
    change_tensors(model / "generator" / WEIGHTS, lambda state: state.update({"head.weight": torch.ones(16, 16)}))
    change_tensors(model / "tokenizer" / WEIGHTS, lambda state: state.update(stray=torch.ones(1)))
    refused(run("sample", model), 1, "tokenizer has 1 unexpected tensors, such as stray", "again")
    assert files() == []


def test_a_truncated_model_is_named(run: Run, model: Path) -> None:
    data = (model / "tokenizer" / WEIGHTS).read_bytes()
    (model / "tokenizer" / WEIGHTS).write_bytes(data[: len(data) // 2])
    refused(run("sample", model), 1, "cannot load .*tokenizer", "get the model again")
    (model / "tokenizer" / WEIGHTS).write_bytes(data[:50])
    refused(run("info", model), 1, "tokenizer.*damaged or truncated", "again")
    (model / "model_index.json").write_text("{")
    refused(run("sample", model), 1, r"model_index\.json is damaged")
    refused(run("info", model), 1, "damaged", "again")


# Libraries warn on a stderr of their own, which capsys does not see, and a limit on file sizes, which stands for a full
# disk, would bind pytest too: these commands run in one process of their own.

TRAIN = ["train", "tokenizer", "--preset", "p.yaml", "--out"]
BOTH = ["--transformer", "var.pth", "--tokenizer", "vae.pth"]
BAD_COMMANDS: dict[str, tuple[list[str], int, str]] = {
    "missing": (["sample", "missing"], 1, "1 missing tensors, such as head.weight"),
    "unexpected": (["sample", "unexpected"], 1, "1 unexpected tensors, such as stray"),
    "shape": (["sample", "shape"], 1, "generator"),
    "truncated": (["sample", "truncated"], 1, "cannot load truncated/generator"),
    "class": (["sample", "whole", "--classes", "bea"], 2, "did you mean bee"),
    "convert truncated": (["convert", "var", "--transformer", "cut.pth", "--out", "o"], 1, "cut.pth is damaged"),
    "convert cut header": (["convert", "var", "--transformer", "cut.safetensors", "--out", "o"], 1, "cut.safetensors"),
    "convert trap": (["convert", "var", "--transformer", "trap.pth", "--out", "o"], 1, "pickled objects, .*never run"),
    "resume": ([*TRAIN, "cutrun", "--resume"], 1, "cutrun"),
}
FULL_DISKS: dict[str, tuple[int, list[str]]] = {  # bytes that a file may have
    "sample": (300, ["sample", "whole", "--out", "full/sample"]),
    "convert": (20_000, ["convert", "var", *BOTH, "--out", "full/convert"]),
    "replace": (20_000, ["convert", "var", *BOTH, "--out", "kept"]),
    "checkpoint": (20_000, [*TRAIN, "full/checkpoint"]),
    "tokens": (3_000, ["train", "generator", "--preset", "g.yaml", "--out", "full/tokens"]),
}
NO_LIMIT = -1
DRIVER = """
import json, os, resource, sys
from vgen import cli
results = {}
for name, (limit, arguments) in json.loads(sys.argv[1]).items():
    keep = os.dup(1), os.dup(2)
    with open("stdout", "wb") as out, open("stderr", "wb") as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    code = cli.main(arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(keep[0], 1), os.dup2(keep[1], 2)
    results[name] = [code, open("stdout").read(), open("stderr").read()]
print(json.dumps(results))
"""


class Trap:
    """Pickles into a call that would create a file if it were ever unpickled."""

    def __reduce__(self) -> tuple:
        return (open, ("victim", "w"))


@pytest.fixture(scope="module")
def driven(
    saved: Path, pth: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Result], Path]:
    """What came of every command above, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("whole", "missing", "unexpected", "shape", "truncated", "kept"):
        shutil.copytree(saved, folder / name)
    weights = {name: folder / name / "generator" / WEIGHTS for name in ("missing", "unexpected", "shape", "truncated")}
    change_tensors(weights["missing"], lambda state: state.pop("head.weight"))
    change_tensors(weights["unexpected"], lambda state: state.update(stray=torch.ones(1)))
    change_tensors(weights["shape"], lambda state: state.update({"head.weight": torch.ones(7, 7)}))
    weights["truncated"].write_bytes(weights["truncated"].read_bytes()[:-100])
    (folder / "cut.pth").write_bytes(pth[0].read_bytes()[:-2000])
    (folder / "cut.safetensors").write_bytes((saved / "generator" / WEIGHTS).read_bytes()[:500])
    torch.save({"head.weight": Trap()}, folder / "trap.pth")
    for path in pth:
        shutil.copy(path, folder)
    data = write_mnist(folder / "data", train=300)
    (folder / "p.yaml").write_text(yaml.safe_dump(vars(tokenizer_config(data, steps=2, save_every=1))))
    (folder / "g.yaml").write_text(yaml.safe_dump(vars(generator_config(data, folder / "whole"))))
    commands = {name: (limit, arguments) for name, (limit, arguments) in FULL_DISKS.items()}
    # before them a run, whose only checkpoint is then damaged
    commands = {"run": (NO_LIMIT, [*TRAIN, "cutrun", "--set", "steps=1"])} | commands
    first = python("-c", DRIVER, json.dumps(commands), cwd=folder, HOME=str(folder / "home"))
    assert first.returncode == 0, first.stderr
    results = json.loads(first.stdout.splitlines()[-1])
    assert results.pop("run")[0] == 0
    state = folder / "cutrun" / "checkpoints" / "step-00000001" / "model.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    commands = {name: (NO_LIMIT, arguments) for name, (arguments, _, _) in BAD_COMMANDS.items()}
    second = python("-c", DRIVER, json.dumps(commands), cwd=folder, HOME=str(folder / "home"))
    assert second.returncode == 0, second.stderr
    results |= json.loads(second.stdout.splitlines()[-1])
    return {name: Result(*result) for name, result in results.items()}, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_bad_command_prints_one_line_on_the_real_stderr(driven: tuple[dict[str, Result], Path], name: str) -> None:
    _, code, says = BAD_COMMANDS[name]
    results, folder = driven
    assert not (folder / "o").exists() and not (folder / "samples").exists() and not (folder / "victim").exists()
    refused(results[name], code, says)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_DISKS)
def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    driven: tuple[dict[str, Result], Path], saved: Path, name: str
) -> None:
    results, folder = driven
    code, printed, errors = results[name]
    assert (code, printed) == (1, "")
    assert re.fullmatch("vgen: the disk is full: .*free space.*", errors.splitlines()[-1]), errors
    plain = (
        r"metrics\.jsonl|config\.yaml|curves\.png|.*tfevents.*|samples/step-\d+\.png"  # of a run, whole or appended to
    )
    left = [path for path in files(folder / "full" / name) if not re.fullmatch(plain, path.replace("tensorboard/", ""))]
    assert left == []
    assert {path: (folder / "kept" / path).read_bytes() for path in files(folder / "kept")} == {
        path: (saved / path).read_bytes() for path in files(saved)
    }
    assert files(folder / "data" / "tokens") == []
    assert [path for path in files(folder) if path.endswith((".tmp", ".old"))] == []


# ---- convert


def test_convert_writes_a_model_to_load(run: Run, pth: tuple[Path, Path]) -> None:
    Path("names.txt").write_text("ant\nbee\ncat\n")
    flags = ["--transformer", pth[0], "--tokenizer", pth[1], "--class-names", "names.txt", "--out", "models/var"]
    done = run("convert", "var", *flags)
    assert (done.code, done.out) == (0, "models/var\n")
    wide = {"base_channels": 32, "channel_multipliers": [1, 1], "norm_groups": 32, "image_channels": 3}
    ours, theirs = tiny_pipeline(**wide), vgen.load("models/var")
    first, second = (pipe(class_labels=["bee"], seeds=[3], output_type="pt") for pipe in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(first.tokens, second.tokens, strict=True))
    assert torch.equal(first.images, second.images)


def test_a_second_transformer_shares_the_tokenizers_file(run: Run, pth: tuple[Path, Path], tmp_path: Path) -> None:
    second = published_files(tmp_path / "second", seed=20)[0]
    for name, transformer in (("first", pth[0]), ("second", second)):
        flags = ["--transformer", transformer, "--tokenizer", pth[1], "--out", f"models/{name}"]
        assert run("convert", "var", *flags).code == 0
    one, two = (Path("models") / name / "tokenizer" / WEIGHTS for name in ("first", "second"))
    assert one.stat().st_ino == two.stat().st_ino and one.stat().st_nlink == 2
    assert vgen.load("models/first").checkpoint() != vgen.load("models/second").checkpoint()
    # converting again breaks no link of the other, and a changed tokenizer is not shared
    other = published_files(tmp_path / "other", seed=40)[1]
    assert run("convert", "var", "--transformer", second, "--tokenizer", other, "--out", "models/second").code == 0
    assert one.stat().st_ino != two.stat().st_ino and one.stat().st_nlink == 1
    assert [path.name for path in Path("models").iterdir() if path.name[0] == "."] == []


def test_without_hard_links_each_model_has_its_copy(
    run: Run, pth: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def impossible(source: object, target: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", impossible)
    for name in ("first", "second"):
        flags = ["--transformer", pth[0], "--tokenizer", pth[1], "--out", f"models/{name}"]
        assert run("convert", "var", *flags).code == 0
    one, two = (Path("models") / name / "tokenizer" / WEIGHTS for name in ("first", "second"))
    assert one.stat().st_ino != two.stat().st_ino and one.read_bytes() == two.read_bytes()
    assert files(Path("models/first")) == files(Path("models/second"))
    vgen.load("models/second")


def test_convert_without_tokenizer_gives_latents_only(run: Run, pth: tuple[Path, Path]) -> None:
    assert run("convert", "var", "--transformer", pth[0], "--out", "m").code == 0
    refused(run("sample", "m"), 2, "no tokenizer", "convert it again")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("head.bias"), "missing head.bias"),
        (lambda state: state.update(stray=torch.ones(1)), "unexpected stray"),
        (lambda state: state.update({"head.bias": torch.ones(3)}), r"head.bias is \(3,\) instead of \(16,\)"),
        (lambda state: state.pop("word_embed.weight"), "this is no VAR transformer: it lacks word_embed.weight"),
        (lambda state: state.pop("lvl_1L"), "lvl_1L"),
        (lambda state: state["head.bias"].fill_(torch.nan), "not numbers, in head.bias"),
        (lambda state: state.clear(), "empty"),
        (lambda state: state.update(note="text"), "'note' is not a tensor"),
    ],
    ids=["missing", "unexpected", "shape", "no transformer", "no scales", "nan", "empty", "text"],
)
def test_a_checkpoint_with_wrong_tensors_is_not_converted(
    run: Run, pth: tuple[Path, Path], change: Callable[[dict], Any], says: str
) -> None:
    state = torch.load(pth[0])
    change(state)
    torch.save(state, "bad.pth")
    done = run("convert", "var", "--transformer", "bad.pth", "--out", "models/m")
    lines = [line for line in done.err.splitlines() if line.startswith("vgen: ")]
    refused(done._replace(err=lines[-1]), 1, says)
    assert files() == ["bad.pth"]


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.95])
def test_a_truncated_checkpoint_is_not_converted(run: Run, pth: tuple[Path, Path], keep: float) -> None:
    data = pth[0].read_bytes()
    Path("cut.pth").write_bytes(data[: int(keep if keep >= 1 else len(data) * keep)])
    refused(run("convert", "var", "--transformer", "cut.pth", "--out", "m"), 1, r"cut\.pth")
    assert files() == ["cut.pth"]


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_pickle_of_code_is_never_run(run: Run, form: str) -> None:
    if form == "pickle":
        Path("trap.pth").write_bytes(pickle.dumps({"head.weight": Trap()}, protocol=2))
    else:
        torch.save({"head.weight": Trap()}, "trap.pth", _use_new_zipfile_serialization=form == "zip")
    refused(run("convert", "var", "--transformer", "trap.pth", "--out", "m"), 1, r"trap\.pth", "tensors")
    assert files() == ["trap.pth"]  # and no victim
    pickle.loads(pickle.dumps(Trap()))
    assert Path("victim").exists()  # the trap is a real one


def test_wrong_flags_of_convert(run: Run, pth: tuple[Path, Path]) -> None:
    refused(run("convert", "vra", "--transformer", pth[0], "--out", "m"), 2, "unknown family 'vra': use one of var")
    refused(run("convert", "var", "--transformer", "none.pth", "--out", "m"), 1, r"no such file: none\.pth")
    refused(run("convert", "var", "--transformer", pth[0], "--out", "m", "--dtype", "int8"), 2, "'int8'", "bfloat16")
    refused(run("convert", "var", "--out", "m"), 2, "--transformer", "--help")
    refused(run("convert", "var", "--transformer", pth[0], "--out", "m", "--scales", "1,2,3"), 1, "21 positions")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("years of work")
    done = run("convert", "var", "--transformer", pth[0], "--out", "full")
    refused(done._replace(err=done.err.splitlines()[-1]), 2, "full is not empty and holds no model", "another --out")
    assert files() == ["full/thesis.tex"]


def test_scales_that_are_no_numbers_are_named(run: Run, pth: tuple[Path, Path]) -> None:
    refused(run("convert", "var", "--transformer", pth[0], "--out", "m", "--scales", "1,two"), 2, "scales.*1,two")


@pytest.mark.parametrize("number", [2, 4])
def test_class_names_that_do_not_match_the_classes_are_refused(run: Run, pth: tuple[Path, Path], number: int) -> None:
    Path("names.txt").write_text("name\n" * number)
    done = run("convert", "var", "--transformer", pth[0], "--out", "m", "--class-names", "names.txt")
    assert done.code == 2 and str(number) in done.err


# ---- info and models


def test_info_is_json(run: Run, saved: Path) -> None:
    picture = run("sample", saved, "--classes", "bee").out.strip()
    found = json.loads(run("info", picture).out)
    assert found.pop("kind") == "image"
    assert Request(**found) == read_request(Path(picture))

    found = json.loads(run("info", saved).out)
    assert (found["kind"], found["pipeline"], found["classes"]) == ("model", "NextScalePipeline", ["ant", "bee", "cat"])
    assert found["components"]["generator"]["width"] == GENERATOR["width"]
    assert found["components"]["tokenizer"]["scales"] == TOKENIZER["scales"]
    pipeline = vgen.load(saved)
    assert found["checkpoint"] == pipeline.checkpoint()
    state = [*pipeline.tokenizer.state_dict().values(), *pipeline.generator.state_dict().values()]
    assert found["parameters"] == sum(tensor.numel() for tensor in state)

    save_file({"a": torch.ones(2, 3)}, "x.safetensors", metadata={"who": "me"})
    found = json.loads(run("info", "x.safetensors").out)
    assert (found["kind"], found["tensors"], found["parameters"]) == ("safetensors", {"a": [2, 3]}, 6)
    assert found["metadata"] == {"who": "me"} and found["bytes"] == Path("x.safetensors").stat().st_size


def test_info_refuses_everything_else(run: Run) -> None:
    Path("x.txt").write_text("text")
    refused(run("info", "x.txt"), 2, r"x\.txt is not a readable picture")
    refused(run("info", "nothing"), 2, "nothing is no picture, model folder")
    refused(run("info", "."), 2, "no picture, model folder")
    Image.new("RGB", (8, 8)).save("x.png")
    refused(run("info", "x.png"), 2, r"x\.png carries no vgen request")


@pytest.mark.parametrize("header", [b'{"a": 3}', b'{"a": {"shape": 5}}', b'{"a": {}}', b'{"__metadata__": 3, "a": []}'])
def test_info_refuses_a_malformed_header(run: Run, header: bytes) -> None:
    Path("x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(run("info", "x.safetensors"), 1, r"x\.safetensors")


def test_models_lists_the_zoo(run: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgen import hub

    shutil.copytree(saved, tmp_path / "zoo" / "tiny")
    monkeypatch.setattr(hub, "ZOO", tmp_path / "zoo")
    assert run("models").out == "tiny\t0.0M parameters\t3 classes\n"
    assert json.loads(run("info", "tiny").out)["kind"] == "model"
    assert run("sample", "tiny", "--classes", "bee").code == 0


# ---- train


def write_preset(config: Any) -> str:
    Path("preset.yaml").write_text(yaml.safe_dump(vars(config)))
    return "preset.yaml"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return write_mnist(tmp_path / "data")


def test_two_commands_train_a_model_to_sample_from(run: Run, data: Path) -> None:
    preset = write_preset(tokenizer_config(Path("elsewhere"), name="vq"))
    done = run("train", "tokenizer", "--preset", preset, "--data-root", data, "--set", "steps=2")
    assert (done.code, done.out) == (0, "runs/vq/model\n")
    preset = write_preset(generator_config(data, Path("unset"), name="var"))
    chosen = ["--set", "tokenizer=runs/vq/model", "--set", "steps=2", "--set", "model.depth=1"]
    done = run("train", "generator", "--preset", preset, *chosen, "--out", "mine")
    assert (done.code, done.out) == (0, "mine/model\n")
    card = Path("mine/model/README.md").read_text()
    assert "`vgen train generator --preset preset.yaml --set tokenizer=runs/vq/model --set steps=2" in card
    assert json.loads(run("info", "mine/model").out)["components"]["generator"]["depth"] == 1
    done = run("sample", "mine/model", "--classes", "sneaker")
    assert done.code == 0 and Path(done.out.strip()).is_file()


def test_wrong_training_commands_are_named_with_the_remedy(run: Run, data: Path) -> None:
    preset = write_preset(tokenizer_config(data))
    train = ("train", "tokenizer", "--preset", preset)
    refused(run("train", "tokenizer", "--preset", "fashion-vg"), 2, "no preset 'fashion-vg'", "fashion-vq")
    refused(run("train", "generator", "--preset", "fashion-vq"), 2, "vgen train tokenizer --preset fashion-vq")
    refused(run(*train, "--set", "stps=5"), 2, "unknown setting 'stps'", "did you mean 'steps'")
    refused(run(*train, "--set", "lr=fast"), 2, "lr is 'fast'", "float")
    refused(run(*train, "--set", "model.scale=[1]"), 2, "model settings", "scale")
    refused(run(*train, "--resume"), 2, "nothing to resume", "without --resume")
    refused(run(*train, "--set", "data=nowhere"), 2, "'nowhere'", "fashion-mnist, mnist")
    Path("empty").mkdir()
    refused(run(*train, "--set", "data=empty"), 2, "no images in empty", "one folder per class")
    refused(run("train", "generator", "--preset", "fashion-var", "--set", "tokenizer=none"), 2, "no tokenizer in none")
    assert files() == ["preset.yaml"]


def test_a_damaged_picture_stops_training_with_its_name(run: Run, data: Path) -> None:
    write_folder(Path("pictures"))
    Path("pictures/bee/2.png").write_bytes(b"\x89PNG not")
    preset = write_preset(tokenizer_config(data, data="pictures"))
    done = run("train", "tokenizer", "--preset", preset, "--out", "run")
    last = done.err.splitlines()[-1]
    assert done.code == 2 and re.search(r"pictures/bee/2\.png.*mend or remove it", last), done.err


def test_a_loss_that_is_no_number_is_a_failure(run: Run, data: Path) -> None:
    preset = write_preset(tokenizer_config(data, lr=1e30, warmup=0, clip=1e30, steps=20))
    done = run("train", "tokenizer", "--preset", preset, "--out", "run")
    last = done.err.splitlines()[-1]
    assert done.code == 1 and re.match(r"vgen: step \d+: loss nan|vgen: step \d+: loss inf|vgen: step \d+: ", last)
    assert "--set lr=" in last and not Path("run/model").exists()


# ---- the program


def test_help_needs_no_command(run: Run) -> None:
    for arguments in ([], ["--help"], ["train"], ["train", "--help"]):
        done = run(*arguments)
        assert done.code == 0 and "Usage" in done.out and done.err == ""
    for command in ("sample", "convert", "info", "models"):
        assert "Example: vgen " in run(command, "--help").out


def test_unknown_commands_are_wrong_usage(run: Run) -> None:
    refused(run("smaple"), 2, "smaple", "--help")
    refused(run("train", "pipeline"), 2, "pipeline")
    refused(run("info", ""), 2, "bundled model")


def test_info_without_a_file_describes_the_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run("info").out)
    assert found["kind"] == "machine" and found["torch"] == torch.__version__ and found["device"][:3] in ("cpu", "cud")
    monkeypatch.setenv("VGEN_SCAN", "sequential")
    assert json.loads(run("info").out)["scan"] | {"mamba_ssm": ""} == {
        "method": "sequential",
        "chosen_by": "VGEN_SCAN=sequential",
        "mamba_ssm": "",
    }
    monkeypatch.setenv("VGEN_SCAN", "parallel")
    refused(run("info"), 2, "VGEN_SCAN=parallel", "sequential, chunked, mamba-ssm")


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError("nobody\nforesaw this")

    monkeypatch.setattr("vgen.inspection.describe", broken)
    done = run("info", "x")
    assert done.err == "vgen: ZeroDivisionError: nobody foresaw this (run again with --debug for the traceback)\n"
    assert done.code == 1
    with pytest.raises(ZeroDivisionError):
        run("--debug", "info", "x")


def test_ctrl_c_is_code_130(run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vgen.outputs.save_png", interrupted)
    done = run("sample", saved)
    assert (done.code, done.out, files()) == (130, "", ["samples/run.json"])
