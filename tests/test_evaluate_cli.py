"""`vgen evaluate`: figures with their protocols on stdout and as JSON, one line and a code for every mistake."""

import json
import re
import runpy
import shutil
import stat
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import PartialState
from PIL import Image
from tiny_evaluation import (
    NAMES,
    Result,
    command,
    isolate,
    judge,
    pictures,
    plant_inception,
    refused,
    tensor,
    write_classifier,
    write_npz,
    write_pngs,
)
from torch import nn

import vgen
from vgen import cli
from vgen.evaluation import metrics as math
from vgen.evaluation.classifier import ImageClassifier
from vgen.evaluation.inception import NAME
from vgen.files import sha256, weight_files
from vgen.pipelines.next_scale import NextScalePipeline

FAKE, REAL = pictures(12, seed=1), pictures(14, seed=2)
PIXELS = "frechet@pixels,mmd@pixels,prc@pixels"
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, cut off from the user's caches and the network."""
    isolate(tmp_path, monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: command(capsys, *arguments)


@pytest.fixture
def sets(here: Path) -> tuple[str, str, str]:
    """Two sets of coloured pictures, and how to compare them: the start of many commands."""
    write_npz(here / "fake.npz", FAKE, [i % 3 for i in range(12)])
    write_npz(here / "real.npz", REAL)
    return "fake.npz", "--reference", "real.npz"


@pytest.fixture
def grey(here: Path) -> tuple[str, str]:
    """A reference for the tiny model, whose pictures are grey."""
    return "--reference", write_npz(here / "grey.npz", pictures(10, seed=3, channels=1))


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 x 16 coloured pictures: SSIM needs at least 11."""
    folder = tmp_path_factory.mktemp("models") / "coloured"
    tiny.tiny_pipeline(scales=[1, 2, 4, 8], image_channels=3).save_pretrained(folder)
    return folder


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tiny.write_mnist(tmp_path / "data", test=30)
    monkeypatch.setenv("VGEN_DATA", str(root))
    return root


def files(folder: Path = Path()) -> list[str]:
    """Every file under a folder, hidden and temporary ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_json(path: str) -> Any:
    return json.loads(Path(path).read_text())


def break_one(folder: Path) -> Path:
    """A folder of class folders with one file that is no picture."""
    tiny.write_folder(folder, side=8)
    (folder / "bee" / "9.png").write_bytes(b"\x89PNG not")
    return folder


# ---- figures


def test_figures_are_lines_of_name_value_and_protocol(run: Run, sets: tuple[str, str, str]) -> None:
    done = run(*sets, "--metrics", PIXELS)
    expected = judge("fake.npz", PIXELS, "real.npz")
    assert (done.code, done.err) == (0, "")
    assert done.figures == pytest.approx(expected.metrics, rel=1e-5)
    assert list(done.figures) == [
        *("frechet@pixels", "mmd@pixels", "mmd_std@pixels", "mmd_se@pixels"),
        *("precision@pixels", "recall@pixels"),
    ]
    assert [line.split("\t")[2] for line in done.out.splitlines()] == [
        expected.protocol_line(name) for name in expected.metrics
    ]


def test_json_is_complete(run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure says of what, against what, by which network it is: walked for one metric of each kind."""
    network = plant_inception(monkeypatch)
    classifier = write_classifier(Path("clf"))
    metrics = "fid,sfid,kid,is,prc,frechet@clf,mmd@pixels,accuracy@clf,memorization@clf"
    done = run(*sets, "--metrics", metrics, "--train", "real.npz", "--json", "new/report.json", "--splits", 2)
    found = read_json("new/report.json")
    assert done.code == 0 and done.figures == pytest.approx(found["metrics"], rel=1e-5)
    assert list(found["metrics"]) == [
        *("fid", "sfid", "kid", "kid_std", "kid_se", "is", "is_std", "precision", "recall", "frechet@clf"),
        *("mmd@pixels", "mmd_std@pixels", "mmd_se@pixels", "accuracy@clf"),
        *("nearest_train@clf", "nearest_train_reference@clf", "nearer_than_reference@clf"),
    ]
    assert found["metrics"].keys() == found["protocol"].keys() == found["lines"].keys()
    assert all(isinstance(value, float) for value in found["metrics"].values())
    assert found["images"] == {
        "name": "fake.npz",
        "n": 12,
        "sha256": found["images"]["sha256"],
        "files": "npz",
        "size": "8x8",
        "per_class": {"0": 4, "1": 4, "2": 4},
        "vgen": vgen.__version__,
    }
    content = judge("real.npz", "mmd@pixels", "fake.npz").images["sha256"]
    digests = {NAME: network.digest, "clf": sha256(*weight_files(classifier), classifier / "config.json")}
    for name, line in found["lines"].items():
        protocol = found["protocol"][name]
        assert re.fullmatch("[0-9a-f]{64}", protocol["extractor_sha256"])
        assert protocol["extractor_sha256"] == digests.get(protocol["extractor"], protocol["extractor_sha256"])
        parts = line.split("  ")
        assert parts[0] == "N=12 (4/class)" and parts[-1] == f"vgen={vgen.__version__}"
        assert f"images=fake.npz sha256:{found['images']['sha256'][:12]}" in parts
        assert f"extractor={protocol['extractor']} sha256:{protocol['extractor_sha256'][:12]}" in parts
        if protocol["extractor"] == NAME:
            assert {"resize=legacy", "dtype=float32"} <= set(parts)
        compared = name.partition("@")[0] not in ("is", "is_std", "accuracy")
        assert ("reference" in protocol) == compared
        if compared:
            assert protocol["reference"] == {"name": "real.npz", "n": 14, "sha256": content}
            assert f"reference=real.npz N=14 sha256:{content[:12]}" in parts
        if name.startswith("near"):
            assert f"train=real.npz N=14 sha256:{content[:12]}" in parts
        assert line in done.out
    assert set(found["details"]) == {"accuracy_per_class@clf", "nearest"} and found["vgen"] == vgen.__version__
    assert found["warnings"] == done.warnings and len(found["warnings"]) == 2


def test_the_defaults_are_fid_kid_and_precision(
    run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_inception(monkeypatch)
    assert list(run(*sets).figures) == ["fid", "kid", "kid_std", "kid_se", "precision", "recall"]


def test_numbers_of_the_metrics_are_settings(
    run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = plant_inception(monkeypatch)
    flags = ["--kid-subsets", 3, "--kid-subset-size", 6, "--splits", 4, "--neighbours", 2]
    found = run(*sets, "--metrics", "kid,is,prc", *flags, "--json", "r.json").figures
    ours, theirs = (network(tensor(pixels), ["features", "logits"]) for pixels in (FAKE, REAL))
    kernel = math.kernel_distance(ours["features"], theirs["features"], 3, 6)
    precision, recall = math.precision_recall(ours["features"], theirs["features"], 2)
    assert found == pytest.approx(
        {
            **{"kid": kernel.mean, "kid_std": kernel.std, "kid_se": kernel.error},
            **dict(zip(("is", "is_std"), math.inception_score(ours["logits"], 4), strict=True)),
            **{"precision": precision, "recall": recall},
        },
        rel=1e-5,
    )
    protocol = read_json("r.json")["protocol"]
    assert (protocol["kid"]["subsets"], protocol["is"]["splits"], protocol["recall"]["k"]) == ("3x6", 4, 2)


def test_the_bundled_classifier_judges_by_default(run: Run, fashion: Path) -> None:
    """Its figures go by names of their own, never by FID's."""
    metrics = "frechet,mmd,accuracy,memorization"
    flags = ["--train", "fashion-mnist:train", "--json", "r.json"]
    done = run("fashion-mnist:test", "--reference", "fashion-mnist:train", "--metrics", metrics, *flags)
    assert done.code == 0 and list(done.figures) == [
        *("frechet", "mmd", "mmd_std", "mmd_se", "accuracy"),
        *("nearest_train", "nearest_train_reference", "nearer_than_reference"),
    ]
    found = read_json("r.json")
    folder = Path(vgen.__file__).parent / "zoo" / "fashion-classifier"
    for protocol in found["protocol"].values():
        assert protocol["extractor"] == "fashion-classifier"
        assert protocol["extractor_sha256"] == sha256(*weight_files(folder), folder / "config.json")
    assert (found["images"]["n"], found["protocol"]["frechet"]["reference"]["n"]) == (30, 64)
    names = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    assert list(found["details"]["accuracy_per_class"]) == names
    assert found["metrics"]["nearest_train"] == 0  # the tiny data set's pictures repeat


def test_data_root_names_where_data_sets_lie(run: Run, tmp_path: Path) -> None:
    root = tiny.write_mnist(tmp_path / "elsewhere")
    metrics = ["--metrics", "frechet@pixels", "--data-root", root]
    done = run("fashion-mnist:test", "--reference", "fashion-mnist:test", *metrics)
    assert done.figures == {"frechet@pixels": 0}


def test_folder_npz_and_tar_of_the_same_pictures_agree(run: Run, sets: tuple[str, str, str]) -> None:
    write_pngs(Path("pngs"), FAKE)
    with tarfile.open("pictures.tar", "w") as archive:
        for path in sorted(Path("pngs").iterdir()):
            archive.add(path, path.name)
    found = {}
    for images in ("fake.npz", "pngs", "pictures.tar"):
        done = run(images, "--reference", "real.npz", "--metrics", PIXELS, "--json", "r.json")
        report = read_json("r.json")
        assert report["images"]["files"] == ("npz" if images == "fake.npz" else "png")
        found[images] = done.figures, report["images"]["sha256"]
    assert found["fake.npz"] == found["pngs"] == found["pictures.tar"]
    for reference in ("pngs", "pictures.tar"):
        done = run("fake.npz", "--reference", reference, "--metrics", "frechet@pixels")
        assert done.figures == {"frechet@pixels": 0}


@pytest.mark.parametrize("name", ["two\tparts", "two\nlines"])
def test_odd_names_keep_lines_and_columns_apart(run: Run, sets: tuple[str, str, str], name: str) -> None:
    write_pngs(Path(name), FAKE)
    lines = run(name, *sets[1:], "--metrics", "frechet@pixels").out.splitlines()
    assert [len(line.split("\t")) for line in lines] == [3]


def test_a_network_of_ones_own(run: Run, sets: tuple[str, str, str], here: Path) -> None:
    """A module in the current folder; a change to it is another extractor."""
    source = "import torch\n\ndef build():\n    return lambda x: x.float().mean((2, 3))\n"
    (here / "my_network_of_tests.py").write_text(source)
    done = run(*sets, "--metrics", "frechet@my_network_of_tests:build", "--json", "r.json")
    ours, theirs = (tensor(pixels).float().mean((2, 3)).double() for pixels in (FAKE, REAL))
    expected = math.frechet_distance(ours.mean(0), torch.cov(ours.T), theirs.mean(0), torch.cov(theirs.T))
    assert done.figures == {"frechet@my_network_of_tests:build": pytest.approx(expected, rel=1e-4)}
    assert read_json("r.json")["protocol"]["frechet@my_network_of_tests:build"]["dtype"] == "float32"


def test_the_cache_lies_where_it_is_told_to(run: Run, sets: tuple[str, str, str], tmp_path: Path) -> None:
    run(*sets, "--metrics", "mmd@pixels", "--cache", "features")
    assert files(Path("features")) and not (tmp_path / "cache").exists()
    run(*sets, "--metrics", "mmd@pixels")
    assert files(tmp_path / "cache" / "features") == files(Path("features"))


# ---- samples of a model


SAMPLING = ["--guidance-scale", 3.5, "--guidance-schedule", "constant", "--top-k", 5, "--top-p", 0.9]
SAMPLING += ["--temperature", 0.7, "--more-smooth", "--sampler", "next-scale", "--dtype", "bfloat16"]


@pytest.mark.parametrize("flags", [[], SAMPLING], ids=["defaults", "all settings"])
def test_sampling_while_evaluating_equals_sampling_to_files_first(
    run: Run, saved: Path, grey: tuple[str, str], flags: list
) -> None:
    classifier = write_classifier(Path("clf"))
    shared = ["--classes", "cat,0", "--per-class", 3, "--seed", 7, *flags]
    metrics = [*grey, "--metrics", f"{PIXELS},accuracy@{classifier},memorization@pixels", "--train", "grey.npz"]
    at_once = run(saved, *shared, *metrics, "--json", "a.json", "--batch-size", 4)
    assert cli.main(["sample", *map(str, [saved, *shared, "--out", "pictures"])]) == 0
    by_files = run("pictures", *metrics, "--json", "b.json")
    assert at_once.code == by_files.code == 0
    first, second = read_json("a.json"), read_json("b.json")
    costs = {name: first["metrics"].pop(name) for name in ("seconds_per_image", "evaluations_per_image")}
    assert first["metrics"] == pytest.approx(second["metrics"], rel=1e-9) and costs["evaluations_per_image"] == 3
    for name in ("n", "sha256", "per_class", "sampling", "size", "vgen"):
        assert first["images"][name] == second["images"][name], name
    assert first["images"]["per_class"] == {"0": 3, "2": 3} and first["images"]["seeds"] == "7..12"
    assert first["details"] == second["details"]


def test_the_protocol_says_how_classes_were_matched(run: Run, saved: Path) -> None:
    """A model's samples by name; files of ours know their classes' numbers alone."""
    classifier = write_classifier(Path("clf"), ["cat", "ant", "bee"])
    assert cli.main(["sample", str(saved), "--per-class", "20", "--out", "pictures"]) == 0
    for images, how in (([saved, "--per-class", 20], "by name"), (["pictures"], "by number")):
        done = run(*images, "--metrics", f"accuracy@{classifier}")
        assert f"  classes={how}  " in done.out.splitlines()[0]


def test_settings_reach_the_samples_and_the_protocol(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    done = [run(saved, *grey, "--per-class", 2, "--metrics", "frechet@pixels", *flags) for flags in ([], SAMPLING)]
    assert done[0].figures["frechet@pixels"] != done[1].figures["frechet@pixels"]
    line = done[1].out.splitlines()[0]
    for part in ("guidance_scale=3.5", "guidance_schedule=constant", "top_k=5", "top_p=0.9", "temperature=0.7"):
        assert part in line
    for part in ("more_smooth=True", "sampler=next-scale", "dtype=bfloat16", f"model={saved}", "seeds=0..5"):
        assert part in line
    checkpoint = vgen.load(saved).checkpoint()
    assert f"checkpoint={checkpoint[:16]} " in line and "N=6 (2/class)" in line
    assert "guidance_scale=2.0" in done[0].out and "dtype=float32" in done[0].out


def test_fifty_images_a_class_from_seed_zero_are_the_default(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    assert "N=150 (50/class)" in (out := run(saved, *grey, "--metrics", "frechet@pixels").out) and "seeds=0..149" in out


def test_samples_without_a_class(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    done = run(saved, *grey, "--classes", "none", "--per-class", 4, "--metrics", "frechet@pixels")
    assert done.code == 0 and done.out.splitlines()[0].split("\t")[2].startswith("N=4  images=")


def test_samples_are_kept_for_the_next_metric(
    run: Run, saved: Path, grey: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(saved, *grey, "--per-class", 2, "--metrics", "frechet@pixels")

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(NextScalePipeline, "__call__", never)
    second = run(saved, *grey, "--per-class", 2, "--metrics", "prc@pixels,frechet@pixels")
    assert second.code == 0 and second.figures["frechet@pixels"] == first.figures["frechet@pixels"]


def test_a_grid_is_evaluated_to_a_table_and_a_plot(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    flags = ["--grid", "guidance-scale=1,3", "--grid", "top_k=4", "--per-class", 2, "--temperature", 0.8]
    done = run(saved, *grey, "--metrics", "frechet@pixels", *flags, "--out", "tables/c")
    assert done.code == 0 and files(Path("tables")) == ["c/curve.csv", "c/curve.json", "c/curve.png"]
    *lines, last = done.out.splitlines()
    assert last == str(Path("tables/c/curve.png"))
    assert {line.split("\t")[0] for line in lines} == {"guidance_scale=1 top_k=4", "guidance_scale=3 top_k=4"}
    points = read_json("tables/c/curve.json")
    assert [entry["point"] for entry in points] == [{"guidance_scale": scale, "top_k": 4} for scale in (1, 3)]
    assert all(entry["images"]["sampling"]["temperature"] == 0.8 for entry in points)
    one = run(saved, *grey, "--metrics", "frechet@pixels", *flags[4:], "--guidance-scale", 3, "--top-k", 4)
    assert one.figures["frechet@pixels"] == pytest.approx(points[1]["metrics"]["frechet@pixels"], rel=1e-5)


def test_without_out_a_grid_writes_into_curve(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    run(saved, *grey, "--metrics", "frechet@pixels", "--grid", "top_k=4", "--per-class", 1)
    assert files(Path("curve")) == ["curve.csv", "curve.json", "curve.png"]


def test_impossible_grids_are_refused(run: Run, saved: Path, sets: tuple[str, str, str], grey: tuple[str, str]) -> None:
    flags = (saved, *grey, "--metrics", "frechet@pixels", "--per-class", 1)
    refused(run(*flags, "--grid", "top_k=1,99"), 2, r"top_k is 99: it must lie in 0\.\.16")
    refused(run(*flags, "--grid", "topk=1"), 2, "unknown setting 'topk'", "top_k")
    refused(run(*flags, "--grid", "top_k"), 2, "no values", "guidance_scale=1,2")
    refused(run(*flags, "--grid", "top_k=1", "--grid", "top-k=2"), 2, "top_k twice")
    refused(run(*sets, "--metrics", "frechet@pixels", "--grid", "top_k=1"), 2, "--grid samples from a model")
    assert not Path("curve").exists()


def test_a_grid_that_cannot_be_read_is_refused(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    flags = (saved, *grey, "--metrics", "frechet@pixels", "--per-class", 1)
    refused(run(*flags, "--grid", "top_k=[1"), 2, "top_k")


def test_a_wrong_grid_is_refused_before_the_reference_is_extracted(
    run: Run, saved: Path, grey: tuple[str, str], tmp_path: Path
) -> None:
    """Inception's features of a large reference take hours."""
    refused(run(saved, *grey, "--metrics", "frechet@pixels", "--grid", "top_k=1,99"), 2, "top_k is 99")
    assert not (tmp_path / "cache").exists()


def test_json_of_a_grid_is_written_or_refused(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    done = run(saved, *grey, "--metrics", "frechet@pixels", "--grid", "top_k=4", "--per-class", 1, "--json", "r.json")
    assert done.code == 2 or Path("r.json").exists()


# ---- reconstructions


def test_a_tokenizers_reconstructions(run: Run, coloured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_inception(monkeypatch)
    pixels = pictures(9, side=16)
    reference = write_npz(Path("originals.npz"), pixels)
    done = run("--tokenizer", coloured, "--reference", reference, "--json", "r.json")
    assert done.code == 0 and list(done.figures) == ["rfid", "psnr", "ssim"]  # the default
    tokenizer = vgen.load(coloured).tokenizer
    with torch.no_grad():
        rebuilt = tokenizer.decode(tokenizer.encode(tensor(pixels).float() / 127.5 - 1))
    rebuilt = ((rebuilt + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    error = math.per_image_error(rebuilt, tensor(pixels))
    for name in ("psnr", "ssim"):
        assert done.figures[name] == pytest.approx(float(error[name].mean()), rel=1e-3)
    found = read_json("r.json")
    assert found["images"]["sampling"] == {
        "tokenizer": str(coloured),
        "checkpoint": sha256(*weight_files(coloured / "tokenizer"))[:16],
        "dtype": "float32",
        "device": "cpu",
    }
    alone = run("--tokenizer", coloured / "tokenizer", "--reference", reference, "--metrics", "fid,mse,psnr")
    assert list(alone.figures) == ["rfid", "mse", "psnr"] and alone.figures["rfid"] == done.figures["rfid"]


def test_wrong_commands_for_tokenizers(run: Run, saved: Path, coloured: Path, sets: tuple[str, str, str]) -> None:
    judged = ("--tokenizer", saved, "--metrics", "mse")
    refused(run(*judged), 2, "--tokenizer reconstructs images", "--reference")
    refused(run("fake.npz", *judged, "--reference", "real.npz"), 2, "--tokenizer, and not both")
    refused(run(*sets, "--metrics", "mse"), 2, "mse compares reconstructions", "--tokenizer")
    refused(run(*sets, "--metrics", "rfid"), 2, "--tokenizer")
    other = ("--tokenizer", coloured, "--metrics", "mse", "--reference", "real.npz")
    refused(run(*other), 2, "16x16", "real.npz has 8x8")
    refused(run("--tokenizer", "none", *other[2:]), 2, "unknown model 'none'")
    Path("file").mkdir()
    refused(run("--tokenizer", "file", *other[2:]), 2, "file holds no model_index.json")
    refused(run(*other, "--guidance-scale", 2), 2, "guidance_scale is for sampling")
    run("real.npz", "--metrics", "frechet@pixels", "--save-statistics", "s.npz")
    refused(run(*other[:-1], "s.npz"), 2, "--tokenizer reconstructs images")


def test_small_reconstructions_have_an_mse(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    assert run("--tokenizer", saved, *grey, "--metrics", "mse,psnr").code == 0


def test_statistics_of_reconstructions_are_refused_in_words(run: Run, saved: Path) -> None:
    done = run("--tokenizer", saved, "--metrics", "frechet@pixels", "--save-statistics", "s.npz")
    refused(done, 2)
    assert "None" not in done.err


# ---- statistics


def test_saved_statistics_are_a_reference(run: Run, sets: tuple[str, str, str]) -> None:
    done = run("real.npz", "--metrics", "frechet@pixels", "--save-statistics", "new/s.npz")
    assert (done.code, done.out, done.err) == (0, "new/s.npz\n", "")
    by_file = run("fake.npz", "--reference", "new/s.npz", "--metrics", "frechet@pixels", "--json", "a.json")
    run(*sets, "--metrics", "frechet@pixels", "--json", "b.json")
    assert read_json("a.json")["metrics"] == pytest.approx(read_json("b.json")["metrics"], rel=1e-9)
    assert f"reference=new/s.npz N=14 sha256:{sha256(Path('new/s.npz'))[:12]}" in by_file.out
    refused(run("fake.npz", "--reference", "new/s.npz", "--metrics", "mmd@pixels"), 2, "needs images", "new/s.npz")
    refused(run("fake.npz", "--reference", "new/s.npz", "--metrics", "prc@pixels"), 2, "needs images", "new/s.npz")


def test_statistics_of_a_models_samples(run: Run, saved: Path) -> None:
    """A reference that is sampled once."""
    run(saved, "--per-class", 3, "--metrics", "frechet@pixels", "--save-statistics", "s.npz")
    done = run(saved, "--per-class", 3, "--reference", "s.npz", "--metrics", "frechet@pixels")
    assert done.figures["frechet@pixels"] == 0


def test_statistics_by_the_default_metrics_are_inceptions(
    run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_inception(monkeypatch)
    assert run("real.npz", "--save-statistics", "s.npz").code == 0
    assert set(np.load("s.npz").files) == {"protocol", "mu", "sigma", "mu_s", "sigma_s"}
    done = run("fake.npz", "--reference", "s.npz", "--metrics", "fid,sfid")
    assert done.figures == run(*sets, "--metrics", "fid,sfid").figures


def test_another_resize_or_precision_is_refused_with_both_values(
    run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_inception(monkeypatch)
    run("real.npz", "--save-statistics", "s.npz", "--metrics", "fid")
    plant_inception(monkeypatch, resize="clean")
    refused(run("fake.npz", "--reference", "s.npz", "--metrics", "fid"), 2, "resize legacy", "uses clean", "s.npz")
    plant_inception(monkeypatch, dtype="bfloat16")
    refused(run("fake.npz", "--reference", "s.npz", "--metrics", "fid"), 2, "dtype float32", "uses bfloat16")


def test_broken_statistics_are_one_line(run: Run, sets: tuple[str, str, str]) -> None:
    np.savez("nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    np.savez("objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(4))
    Path("cut.npz").write_bytes(Path("real.npz").read_bytes()[:200])
    for name, says in (("nan", "not finite"), ("objects", "mu of"), ("cut", "get it again")):
        refused(run("fake.npz", "--reference", f"{name}.npz", "--metrics", "frechet@pixels"), 2, f"{name}.npz", says)


def test_statistics_are_written_or_refused_beside_a_reference(run: Run, sets: tuple[str, str, str]) -> None:
    done = run(*sets, "--metrics", "frechet@pixels", "--save-statistics", "s.npz")
    assert done.code == 2 or Path("s.npz").exists()


def test_json_beside_statistics_is_written_or_refused(run: Run, sets: tuple[str, str, str]) -> None:
    done = run("real.npz", "--metrics", "frechet@pixels", "--save-statistics", "s.npz", "--json", "r.json")
    assert done.code == 2 or Path("r.json").exists()


# ---- memorization


def test_the_sheet_shows_copies_beside_their_originals(run: Run, here: Path) -> None:
    fake, train = FAKE.copy(), pictures(20, seed=5)
    fake[3], fake[7] = train[11], train[2]
    write_npz(here / "fake.npz", fake)
    write_npz(here / "train.npz", train)
    flags = ["--metrics", "memorization@pixels", "--train", "train.npz", "--json", "r.json"]
    done = run("fake.npz", *flags, "--nearest-sheet", "new/sheet.png")
    assert done.code == 0
    pairs = read_json("r.json")["details"]["nearest"]
    assert {(pair["image"], pair["train"]) for pair in pairs[:2]} == {(3, 11), (7, 2)} and len(pairs) == 12
    sheet = np.array(Image.open("new/sheet.png"))
    zoom = 10
    side = 8 * zoom + 2
    assert sheet.shape == (3 * side + 2, 8 * side + 2, 3)  # twelve pairs, eight pictures a row
    for i, pair in enumerate(pairs):
        for j, picture in enumerate((fake[pair["image"]], train[pair["train"]])):
            row, column = divmod(2 * i + j, 8)
            top, left = row * side + 2, column * side + 2
            tile = sheet[top : top + 8 * zoom : zoom, left : left + 8 * zoom : zoom]
            assert np.array_equal(tile, picture), (i, j)


@pytest.mark.parametrize("flags", [["--nearest-sheet", "s.png"], ["--train", "real.npz"]])
def test_flags_of_memorization_mean_nothing_without_it(run: Run, sets: tuple[str, str, str], flags: list[str]) -> None:
    refused(run(*sets, "--metrics", "frechet@pixels", *flags), 2, "memorization")


def test_memorization_beside_statistics(run: Run, sets: tuple[str, str, str]) -> None:
    run("real.npz", "--metrics", "frechet@pixels", "--save-statistics", "s.npz")
    flags = ["--metrics", "frechet@pixels,memorization@pixels", "--train", "real.npz", "--json", "r.json"]
    assert run("fake.npz", "--reference", "s.npz", *flags).code == 0


# ---- broken files


def test_broken_files_stop_the_run_or_are_left_out_with_code_three(run: Run, here: Path) -> None:
    break_one(here / "pictures")
    whole = tiny.write_folder(here / "whole", side=8)
    metrics = ("--metrics", "mmd@pixels")
    says = ("1 of 13 files in pictures cannot be read", r"bee/9\.png", "--skip-broken")
    refused(run("pictures", "--reference", whole, *metrics), 2, *says)
    refused(run(whole, "--reference", "pictures", *metrics), 2, *says)
    done = run("pictures", "--reference", whole, *metrics, "--skip-broken", "--json", "r.json")
    assert done.code == 3 and "N=12 (4/class)" in done.out
    assert any(re.search(r"broken files left out of pictures: 1, first bee/9\.png", line) for line in done.warnings)
    assert read_json("r.json")["images"]["broken"] == ["bee/9.png"]
    assert run(whole, "--reference", "pictures", *metrics, "--skip-broken").code == 3
    assert run(whole, "--reference", whole, *metrics, "--skip-broken").code == 0
    assert run(whole, "--train", "pictures", "--metrics", "memorization@pixels", "--skip-broken").code == 3


def test_nothing_but_broken_files_is_an_error(run: Run, here: Path, sets: tuple[str, str, str]) -> None:
    (here / "all").mkdir()
    (here / "all" / "a.png").write_bytes(b"no")
    done = run("all", "--reference", "real.npz", "--metrics", "mmd@pixels", "--skip-broken")
    refused(done, 2, "1 of 1 files in all cannot be read")
    assert "--skip-broken" not in done.err  # which would not help


def test_broken_training_images_are_named(run: Run, here: Path, sets: tuple[str, str, str]) -> None:
    break_one(here / "pictures")
    done = run("fake.npz", "--train", "pictures", "--metrics", "memorization@pixels", "--skip-broken")
    assert done.code == 3 and "broken" in done.err


@pytest.mark.parametrize("kind", ["statistics", "grid"])
def test_broken_files_are_code_three_for_every_kind_of_run(run: Run, here: Path, saved: Path, kind: str) -> None:
    break_one(here / "pictures")
    if kind == "statistics":
        done = run("pictures", "--metrics", "frechet@pixels", "--skip-broken", "--save-statistics", "s.npz")
    else:
        flags = ["--metrics", "frechet@pixels", "--per-class", 1, "--grid", "top_k=2"]
        done = run(saved, "--reference", "pictures", *flags, "--skip-broken")
    assert done.code == 3 and "broken" in done.err


# ---- mistakes


def test_wrong_usage_is_one_line_and_code_two(run: Run, saved: Path, sets: tuple[str, str, str]) -> None:
    pixels = ("--metrics", "mmd@pixels", "--json", "r.json")
    refused(run(), 2, "name the images or a model")
    refused(run("fake.npz", *pixels), 2, "mmd compares with a reference: name one with --reference")
    refused(run("none", *sets[1:], *pixels), 2, "no images at 'none'", "fashion-mnist:test")
    refused(run("fake.npz", "--reference", "none", *pixels), 2, "no images at 'none'")
    refused(run("user/model", *sets[1:], *pixels), 2, "no images at 'user/model'")
    refused(run("fashion-mnist", *sets[1:], *pixels), 2, "names no split", "fashion-mnist:test")
    refused(run(*sets, "--metrics", "fidd"), 2, "unknown metric 'fidd': use fid, ")
    refused(run(*sets, "--metrics", "fid@pixels"), 2, "fid means the features of inception", "frechet@pixels")
    refused(run(*sets, "--metrics", "mmd@pixel"), 2, "unknown extractor 'pixel': use inception", "pixels")
    refused(run(*sets, "--metrics", "mmd@none:make"), 2, "extractor 'none:make' cannot be built", "No module named")
    refused(run(*sets, "--metrics", "mmd@json:nothing"), 2, "extractor 'json:nothing' cannot be built")
    refused(run(*sets, "--metrics", "accuracy@pixels"), 2, "needs logits; pixels gives features")
    refused(run("real.npz", "--metrics", "accuracy"), 2, "accuracy needs the class of every image", "real.npz")
    refused(run("fake.npz", "--metrics", "memorization@pixels"), 2, "--train")
    refused(run(*sets, *pixels, "--kid-subset-size", 1), 2, "kid-subset-size is 1: it must be at least 2")
    refused(run(*sets, *pixels, "--kid-subsets", 0), 2, "subsets is 0: it must be at least 1")
    refused(run(*sets, *pixels, "--neighbours", -1), 2, "neighbours is -1")
    refused(run(*sets, *pixels, "--splits", 0), 2, "splits is 0")
    refused(run(*sets, *pixels, "--batch-size", 0), 2, "batch-size is 0")
    refused(run(*sets, *pixels, "--neighbours", "two"), 2, "--neighbours", "--help")
    refused(run(*sets, *pixels, "--extractor-dtype", "int8"), 2, "'int8'", "bfloat16")
    refused(run(*sets, *pixels, "--refrence", "x"), 2, "--refrence")
    refused(run(*sets, "extra", *pixels), 2, "extra")
    refused(run(*sets, "--metrics", "prc@pixels", "--neighbours", 12), 2, "at least 13 images", "fake.npz has 12")
    refused(run(saved, *sets[1:], *pixels, "--classes", "dog"), 2, "unknown class 'dog': classes: ant, bee, cat")
    refused(run(saved, *sets[1:], *pixels, "--classes", "3"), 2, r"class 3 is outside 0\.\.2")
    refused(run(saved, *sets[1:], *pixels, "--per-class", 0), 2, "per-class is 0")
    refused(run(saved, *sets[1:], *pixels, "--guidance-scale", -1), 2, r"guidance_scale is -1.0: it must lie in 0\.0")
    refused(run(saved, *sets[1:], *pixels, "--dtype", "int8"), 2, "'int8'")
    refused(run(saved, *sets[1:], *pixels, "--sampler", "halton"), 2, "unknown sampler 'halton': use one of next-scale")
    assert [name for name in files() if name not in ("fake.npz", "real.npz")] == []


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--guidance-scale", 2], "guidance_scale"),
        (["--guidance-schedule", "linear"], "guidance_schedule"),
        (["--top-k", 0], "top_k"),
        (["--top-p", 1], "top_p"),
        (["--temperature", 1], "temperature"),
        (["--more-smooth"], "more_smooth"),
        (["--sampler", "next-scale"], "sampler"),
    ],
)
def test_sampling_settings_beside_images_are_refused(
    run: Run, sets: tuple[str, str, str], flags: list, name: str
) -> None:
    refused(run(*sets, "--metrics", "mmd@pixels", *flags), 2, f"{name} is for sampling: name a model, not images")


@pytest.mark.parametrize("flags", [["--classes", "bee"], ["--per-class", 2], ["--seed", 4]])
def test_what_to_sample_beside_images_is_refused(run: Run, sets: tuple[str, str, str], flags: list) -> None:
    refused(run(*sets, "--metrics", "mmd@pixels", *flags), 2, "sampling")


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
@pytest.mark.parametrize("metrics", ["mmd@pixels", "frechet@pixels"])
def test_a_wrong_device_is_refused(run: Run, sets: tuple[str, str, str], device: str, metrics: str) -> None:
    refused(run(*sets, "--metrics", metrics, "--device", device), 2, "device", "'cpu'")


@pytest.mark.parametrize("metrics", ["mmd@pixels", "prc@pixels"])
def test_sizes_that_pixels_cannot_compare_are_refused(run: Run, sets: tuple[str, str, str], metrics: str) -> None:
    write_npz(Path("small.npz"), pictures(9, side=6))
    refused(run("fake.npz", "--reference", "small.npz", "--metrics", metrics), 2)


def test_a_misspelt_metric_of_videos_is_told_all_names(run: Run, sets: tuple[str, str, str]) -> None:
    refused(run(*sets, "--metrics", "video_pnsr"), 2, "unknown metric 'video_pnsr'.*video_psnr")


def test_missing_inception_weights_are_told_how_to_get(run: Run, sets: tuple[str, str, str]) -> None:
    refused(run(*sets), 2, "weights are not here", r"scripts/inception_weights\.py", "--weights")
    refused(run(*sets, "--weights", "none.pth"), 2, r"no such file: none\.pth")
    refused(run(*sets, "--weights", "real.npz"), 1, r"real\.npz")


def test_a_damaged_model_is_a_failure(run: Run, saved: Path, grey: tuple[str, str]) -> None:
    broken = shutil.copytree(saved, Path("broken"))
    weights = broken / "generator" / tiny.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:500])
    refused(run(broken, *grey, "--metrics", "frechet@pixels"), 1, "cannot load .*generator", "get the model again")


def test_a_model_without_tokenizer_makes_no_samples(run: Run, grey: tuple[str, str]) -> None:
    NextScalePipeline(None, tiny.tiny_pipeline().generator).save_pretrained("blind")
    for flags in ([], ["--grid", "top_k=1,2"]):
        refused(run("blind", *grey, "--metrics", "frechet@pixels", *flags), 2, "has no tokenizer", "convert it again")


def test_a_cache_that_cannot_be_written_is_a_failure(run: Run, sets: tuple[str, str, str]) -> None:
    refused(run(*sets, "--metrics", "mmd@pixels", "--cache", "real.npz"), 1, r"Not a directory: .*real\.npz")


def test_an_interruption_is_code_130_and_keeps_the_work(
    run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = plant_inception(monkeypatch)
    call = type(network).__call__

    def interrupted(self: Any, images: torch.Tensor, layers: Any) -> dict[str, torch.Tensor]:
        if self.calls == 5:
            raise KeyboardInterrupt
        return call(self, images, layers)

    monkeypatch.setattr(type(network), "__call__", interrupted)
    flags = [*sets, "--metrics", "fid", "--batch-size", 4, "--json", "r.json"]
    done = run(*flags)
    assert (done.code, done.out, done.err) == (130, "", "vgen: interrupted\n") and not Path("r.json").exists()
    monkeypatch.setattr(type(network), "__call__", call)
    assert run(*flags).code == 0 and network.calls == 4 + 3


def test_debug_shows_the_traceback(sets: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        cli.main(["--debug", "evaluate", *sets, "--metrics", "fidd"])


def test_nobody_foresaw_this(run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> float:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("vgen.evaluation.metrics.frechet_distance", broken)
    done = run(*sets, "--metrics", "frechet@pixels")
    assert done.code == 1 and done.err.count("\n") == 1 and "ZeroDivisionError: two lines" in done.err


# ---- files


def test_json_is_replaced_whole_or_not_at_all(
    run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("r.json").write_text("before")
    refused(run(*sets, "--metrics", "fidd", "--json", "r.json"), 2, "fidd")
    write_text = Path.write_text

    def full(self: Path, text: str) -> int:
        write_text(self, text[:10])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    done = run(*sets, "--metrics", "mmd@pixels", "--json", "r.json")
    monkeypatch.setattr(Path, "write_text", write_text)
    assert done.code == 1 and "the disk is full" in done.err
    assert Path("r.json").read_text() == "before" and files() == ["fake.npz", "r.json", "real.npz"]
    assert run(*sets, "--metrics", "mmd@pixels", "--json", "r.json").code == 0
    assert read_json("r.json")["images"]["n"] == 12 and files() == ["fake.npz", "r.json", "real.npz"]
    assert stat.S_IMODE(Path("r.json").stat().st_mode) & 0o400


def test_other_processes_print_and_write_nothing(
    run: Run, sets: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    done = run(*sets, "--metrics", "mmd@pixels", "--json", "r.json")
    assert (done.code, done.out, done.err) == (0, "", "")
    done = run("real.npz", "--metrics", "frechet@pixels", "--save-statistics", "s.npz")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert files() == ["fake.npz", "real.npz"]


# ---- the program


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = command(capsys, "--help")
    assert done.code == 0 and done.err == ""
    assert "Example: vgen evaluate samples/ --reference fashion-mnist:test" in done.out
    flags = "--reference --metrics --tokenizer --train --json --save-statistics --nearest-sheet --grid --out --weights"
    flags += " --fvd-weights --resize --extractor-dtype --neighbours --kid-subsets --kid-subset-size --splits --seed"
    flags += " --skip-broken --cache --batch-size --classes --per-class --sampler --guidance-scale --data-root --device"
    assert [flag for flag in flags.split() if not re.search(rf"{flag}\b", done.out)] == []
    unwrapped = "".join(done.out.split())
    for metrics in ("fid,sfid,kid,is,prc,frechet,mmd,accuracy,spectrum,memorization", "rfid,psnr,ssim,mse", "fvd"):
        assert metrics in unwrapped
    assert "exitcode3" in unwrapped and "default50" in unwrapped


def test_the_script_is_the_command(
    run: Run, sets: tuple[str, str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(tiny.ROOT / "scripts" / "evaluate.py"), run_name="__main__")
        return Result(stop.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    flags = (*sets, "--metrics", PIXELS)
    assert script(*flags, "--json", "a.json") == run(*flags, "--json", "b.json")
    assert read_json("a.json") == read_json("b.json")
    refused(script(*sets, "--metrics", "fidd"), 2, "unknown metric 'fidd'")


def test_a_process_of_its_own(sets: tuple[str, str, str], tmp_path: Path, here: Path) -> None:
    """Nothing but figures on stdout, nothing on stderr: no library may warn there."""
    places = {"VGEN_CACHE": str(tmp_path / "cache"), "TORCH_HOME": str(tmp_path / "torch")}
    done = tiny.python("-m", "vgen.cli", "evaluate", *sets, "--metrics", "frechet@pixels", cwd=here, **places)
    said = [line for line in done.stderr.splitlines() if not line.startswith("features of ")]  # of a slow machine
    assert done.returncode == 0 and said == []
    expected = judge("fake.npz", "frechet@pixels", "real.npz")
    assert done.stdout == "".join(f"{line}\n" for line in expected.lines())


# ---- Inception


def write_inception(path: Path, classifies: bool) -> Path:
    """Random weights of torch-fidelity's network, of a size that lets signals through."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    class Unloaded(Network):
        def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
            return None

    torch.save({}, path)
    network = Unloaded("random", ["2048"], feature_extractor_weights_path=str(path))
    rng = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.data
            weight.copy_(torch.randn(weight.shape, generator=rng) * (2 / weight[0].numel()) ** 0.5)
    state = {name: value for name, value in network.state_dict().items() if classifies or name[:3] != "fc."}
    torch.save(state, path)
    return path


@pytest.mark.slow
def test_inception_of_random_weights(run: Run, here: Path) -> None:
    """The whole way with the real network: its weights, name, resize and precision; no score without fc."""
    write_npz(here / "fake.npz", pictures(5, seed=1, side=24))
    write_npz(here / "real.npz", pictures(6, seed=2, side=24))
    sets = ("fake.npz", "--reference", "real.npz")
    whole, trunk = write_inception(here / "whole.pth", True), write_inception(here / "trunk.pth", False)
    flags = ["--weights", whole, "--splits", 2, "--metrics", "fid,sfid,kid,is,prc", "--json", "a.json"]
    done = run(*sets, *flags)
    assert done.code == 0
    assert len(done.warnings) == 3 and "not those of FID" in done.warnings[2] and "2049" in done.warnings[0]
    found = read_json("a.json")
    assert found["metrics"]["fid"] > 0 and found["metrics"]["sfid"] > 0 and found["metrics"]["is"] >= 1
    assert found["protocol"]["fid"]["extractor"] == "inception-unknown"
    assert (found["protocol"]["fid"]["resize"], found["protocol"]["fid"]["dtype"]) == ("legacy", "float32")
    without = run(*sets, "--weights", trunk, "--metrics", "fid,sfid,kid,prc")
    assert without.code == 0 and all(
        found["metrics"][name] == pytest.approx(v, rel=1e-4) for name, v in without.figures.items()
    )
    refused(run(*sets, "--weights", trunk, "--metrics", "fid,is"), 2, "classification layer", "leave 'is' out")
    refused(run(*sets, "--weights", trunk, "--resize", "bicubic"), 2, "resize is 'bicubic': use one of legacy, clean")
    run("real.npz", "--weights", trunk, "--metrics", "fid", "--save-statistics", "s.npz")
    by_file = ("fake.npz", "--reference", "s.npz", "--metrics", "fid")
    assert run(*by_file, "--weights", trunk).figures == {"fid": without.figures["fid"]}
    refused(run(*by_file, "--weights", trunk, "--resize", "clean"), 2, "resize legacy", "clean")
    refused(run(*by_file, "--weights", trunk, "--extractor-dtype", "bfloat16"), 2, "dtype float32", "bfloat16")
    assert run(*by_file, "--weights", whole).figures["fid"] == pytest.approx(without.figures["fid"])  # one network
    state = torch.load(trunk)
    state["Mixed_7c.branch1x1.bn.bias"] += 1
    torch.save(state, here / "other.pth")
    refused(run(*by_file, "--weights", here / "other.pth"), 2, "extractor_sha256")


# ---- several processes


def torchrun(here: Path, *arguments: object) -> Any:
    places = {"VGEN_CACHE": str(here / "cache-of-two"), "TORCH_HOME": str(here / "torch"), "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return tiny.python(*launcher, "-m", "vgen.cli", "evaluate", *map(str, arguments), cwd=here, **places)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(run: Run, here: Path, saved: Path) -> None:
    """Seven chunks of four for two processes: neither the number nor the last chunk divides."""
    torch.manual_seed(0)
    ImageClassifier(NAMES, 8, 1, (4, 6), 2).save_pretrained("clf")
    reference = write_npz(here / "grey.npz", pictures(26, seed=3, channels=1))
    metrics = "frechet@clf,mmd@clf,prc@pixels,accuracy@clf,memorization@pixels"
    flags = [saved, "--per-class", 9, "--reference", "grey.npz", "--train", "grey.npz", "--metrics", metrics]
    flags += ["--batch-size", 4]
    done = torchrun(here, *flags, "--json", "two.json")
    assert done.returncode == 0, done.stderr
    one = run(*flags, "--json", "one.json")
    first, second = read_json("one.json"), read_json("two.json")
    for report in (first, second):
        report["metrics"].pop("seconds_per_image")
    assert second.pop("metrics") == pytest.approx(first.pop("metrics"), rel=1e-9, abs=1e-12)
    assert second == first and Path(reference).exists()
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == list(one.figures)  # each line once


@pytest.mark.slow
def test_the_failure_of_one_process_ends_the_run(here: Path) -> None:
    """Process 1 meets the broken features; process 0 must not wait for it."""
    write_npz(here / "fake.npz", FAKE)
    write_npz(here / "real.npz", REAL)
    source = "import os\n\ndef build():\n    rank = int(os.environ['RANK'])\n"
    source += "    return lambda x: x.float().mean((2, 3)) * (float('nan') if rank else 1)\n"
    (here / "half_broken.py").write_text(source)
    flags = ["--metrics", "frechet@half_broken:build", "--batch-size", 4, "--json", "r.json"]
    done = torchrun(here, "fake.npz", "--reference", "real.npz", *flags)
    assert done.returncode != 0 and done.stdout == "" and not Path("r.json").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("vgen: half_broken:build gave features that")]
    assert len(said) == 1 and "first image 4 of real.npz" in said[0] and "features extracted so far are kept" in said[0]
    ours = done.stderr.partition("torch/distributed")[0]
    assert "Traceback" not in ours  # torchrun's own comes behind
