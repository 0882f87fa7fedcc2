"""The evaluator: figures against direct computation, refusals before hours of work, warnings, references."""

import json
from collections import Counter
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
    TinyInception,
    evaluator_of,
    isolate,
    judge,
    pictures,
    plant_inception,
    tensor,
    write_classifier,
    write_npz,
    write_pngs,
)
from torch import Tensor

import vgen
from vgen.batch import plan
from vgen.data import to_model_range, to_uint8, to_unit_range
from vgen.evaluation import metrics as math
from vgen.evaluation.evaluate import Evaluator, build_extractors, make_statistics, open_reference
from vgen.evaluation.extractors import ClassifierFeatures, ExtractorOptions, Pixels
from vgen.evaluation.images import open_images
from vgen.evaluation.inception import NAME
from vgen.evaluation.judges import METRICS, Asked, Options, parse_metrics
from vgen.evaluation.sampled import ReconstructedImages, SampledImages
from vgen.files import sha256
from vgen.types import SettingError

FAKE, REAL, TRAIN = pictures(31, seed=1), pictures(37, seed=2), pictures(40, seed=3)
FEW = "fewer than 2049"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.fixture
def fake(tmp_path: Path) -> str:
    return write_npz(tmp_path / "fake.npz", FAKE, [i % 3 for i in range(30)] + [0])


@pytest.fixture
def real(tmp_path: Path) -> str:
    return write_npz(tmp_path / "real.npz", REAL)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write_npz(tmp_path / "train.npz", TRAIN)


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> TinyInception:
    return plant_inception(monkeypatch)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "tiny-classifier")


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance by NumPy, another way than the evaluator's."""
    array = rows.double().numpy()
    return torch.from_numpy(array.mean(0)), torch.from_numpy(np.cov(array, rowvar=False))


def frechet(fake: Tensor, real: Tensor) -> float:
    return math.frechet_distance(*moments(fake), *moments(real))


def refused(call: Callable[[], object], *says: str) -> None:
    """A SettingError in one line that says all of this."""
    with pytest.raises(SettingError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for part in says:
        assert part in text


# ---- what is asked for


def test_metrics_are_read_with_their_extractors() -> None:
    asked = parse_metrics(" fid, kid,,prc@pixels,mmd@my.module:build ,accuracy,")
    assert [(item.text, item.name, item.extractor) for item in asked] == [
        ("fid", "fid", "inception"),
        ("kid", "kid", "inception"),
        ("prc@pixels", "prc", "pixels"),
        ("mmd@my.module:build", "mmd", "my.module:build"),
        ("accuracy", "accuracy", "fashion-classifier"),
    ]
    assert [item.metric for item in asked] == [METRICS[name] for name in ("fid", "kid", "prc", "mmd", "accuracy")]


@pytest.mark.parametrize(
    ("text", "parts", "keys"),
    [
        ("fid", [""], ["fid"]),
        ("fid@inception", [""], ["fid"]),
        ("kid", ["", "std", "se"], ["kid", "kid_std", "kid_se"]),
        ("is", ["", "std"], ["is", "is_std"]),
        ("prc", ["precision", "recall"], ["precision", "recall"]),
        ("prc@pixels", ["precision", "recall"], ["precision@pixels", "recall@pixels"]),
        ("frechet", [""], ["frechet"]),
        ("frechet@inception", [""], ["frechet@inception"]),
        ("mmd@pixels", ["", "std"], ["mmd@pixels", "mmd_std@pixels"]),
        ("memorization", ["nearest_train", "nearer_than_reference"], ["nearest_train", "nearer_than_reference"]),
        ("memorization@pixels", ["nearest_train"], ["nearest_train@pixels"]),
    ],
)
def test_figures_go_by_the_metrics_name_and_a_foreign_extractors(text: str, parts: list[str], keys: list[str]) -> None:
    (asked,) = parse_metrics(text)
    assert [asked.key(part) for part in parts] == keys


def test_a_tokenizers_fid_is_its_rfid() -> None:
    asked = parse_metrics("fid,rfid,psnr,kid", reconstructed=True)
    assert [(item.name, item.key(""), item.extractor) for item in asked] == [
        ("rfid", "rfid", "inception"),
        ("rfid", "rfid", "inception"),
        ("psnr", "psnr", ""),
        ("kid", "kid", "inception"),
    ]
    assert asked[0].metric is METRICS["fid"] and asked[2].metric is None


@pytest.mark.parametrize(
    ("text", "reconstructed", "says"),
    [
        ("fid@pixels", False, ["fid means the features of inception", "frechet@pixels"]),
        ("sfid@pixels", False, ["sfid means the features of inception", "frechet@pixels"]),
        ("kid@pixels", False, ["kid means the features of inception", "mmd@pixels"]),
        ("rfid@pixels", True, ["rfid means the features of inception", "frechet@pixels"]),
        (
            "fidd",
            False,
            ["unknown metric 'fidd'", "fid, sfid, kid, is, prc, frechet, mmd, accuracy, spectrum, memorization"],
        ),
        ("fid,@pixels", False, ["unknown metric ''"]),
        ("psnr", False, ["psnr compares reconstructions", "--tokenizer"]),
        ("rfid", False, ["rfid compares reconstructions", "--tokenizer"]),
        ("ssim@pixels", True, ["ssim compares pixels", "no extractor"]),
        (" , ", False, ["no metric to compute", "fid"]),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_the_remedy(text: str, reconstructed: bool, says: list[str]) -> None:
    refused(lambda: parse_metrics(text, reconstructed), *says)


def test_the_inception_score_of_another_network_is_not_called_a_distance() -> None:
    with pytest.raises(SettingError) as caught:
        parse_metrics("is@pixels")
    assert "frechet" not in str(caught.value)


def test_each_network_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(name: str, options: ExtractorOptions) -> TinyInception:
        built.append(name)
        return TinyInception()

    monkeypatch.setattr("vgen.evaluation.evaluate.build_extractor", build)
    found = build_extractors(parse_metrics("fid,kid,prc@a:b,mmd@a:b,psnr", True), ExtractorOptions())
    assert built == ["inception", "a:b"] == list(found)


def test_no_score_without_a_classification_layer(monkeypatch: pytest.MonkeyPatch, fake: str, real: str) -> None:
    """The weights that one gets offline lack it; FID, KID, precision and recall do without."""
    plant_inception(monkeypatch, classifies=False)
    refused(lambda: judge(fake, "fid,is", real), "classification layer", "--weights", "leave 'is' out")
    assert {"fid", "sfid", "kid", "kid_std", "kid_se", "precision", "recall"} == set(
        judge(fake, "fid,sfid,kid,prc", real).metrics
    )


def test_a_network_without_the_layer_is_named_with_what_it_has() -> None:
    refused(
        lambda: build_extractors(parse_metrics("accuracy@pixels"), ExtractorOptions()),
        "accuracy@pixels needs logits; pixels gives features",
    )


@pytest.mark.parametrize("name", ["neighbours", "subsets", "splits", "batch_size"])
def test_numbers_below_one_are_refused(name: str) -> None:
    refused(lambda: Options(**{name: 0}), f"{name.replace('_', '-')} is 0", "at least 1")
    Options(**{name: 1})


def test_kid_needs_subsets_of_two() -> None:
    refused(lambda: Options(subset_size=1), "kid-subset-size is 1", "at least 2")
    Options(subset_size=2)


# ---- figures


def test_inceptions_figures_equal_the_direct_computation(fake: str, real: str, inception: TinyInception) -> None:
    options = {"subsets": 7, "subset_size": 20, "splits": 3, "neighbours": 2, "batch_size": 8}
    found = judge(fake, "fid,sfid,kid,is,prc,frechet@inception,mmd@inception", real, **options).metrics
    layers = ["features", "spatial", "logits"]
    ours, theirs = (inception(tensor(pixels), layers) for pixels in (FAKE, REAL))
    kernel = math.kernel_distance(ours["features"], theirs["features"], 7, 20)
    score, deviation = math.inception_score(ours["logits"], 3)
    precision, recall = math.precision_recall(ours["features"], theirs["features"], 2)
    distance = frechet(ours["features"], theirs["features"])
    assert found == {
        "fid": pytest.approx(distance, rel=1e-8),
        "sfid": pytest.approx(frechet(ours["spatial"], theirs["spatial"]), rel=1e-8),
        "kid": pytest.approx(kernel.mean, rel=1e-9),
        "kid_std": pytest.approx(kernel.std, rel=1e-9),
        "kid_se": pytest.approx(kernel.error, rel=1e-9),
        "is": pytest.approx(score, rel=1e-9),
        "is_std": pytest.approx(deviation, rel=1e-9),
        "precision": precision,
        "recall": recall,
        "frechet@inception": pytest.approx(distance, rel=1e-8),
        "mmd@inception": pytest.approx(kernel.mean, rel=1e-9),
        "mmd_std@inception": pytest.approx(kernel.std, rel=1e-9),
        "mmd_se@inception": pytest.approx(kernel.error, rel=1e-9),
    }
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall  # a swap would show
    assert kernel.std > 0 and abs(score - 1) > 1e-3


def test_the_defaults_are_those_of_the_papers(fake: str, real: str, inception: TinyInception) -> None:
    found = judge(fake, "kid,is,prc", real)
    ours, theirs = (inception(tensor(pixels), ["features", "logits"]) for pixels in (FAKE, REAL))
    assert found.metrics["kid"] == math.kernel_distance(ours["features"], theirs["features"], 100, 1000).mean
    assert found.metrics["is"] == math.inception_score(ours["logits"], 10)[0]
    assert found.metrics["precision"] == math.precision_recall(ours["features"], theirs["features"], 3)[0]
    assert [found.protocols[name].get("k") for name in ("precision", "recall", "kid")] == [3, 3, None]
    assert found.protocols["kid"]["subsets"] == "100x31" == found.protocols["kid_se"]["subsets"]
    assert found.protocols["is"]["splits"] == 10 and "reference" not in found.protocols["is"]


def test_figures_of_other_networks_equal_the_direct_computation(fake: str, real: str, classifier: Path) -> None:
    names = f"frechet@{classifier},mmd@{classifier},prc@{classifier},mmd@pixels,prc@pixels"
    found = judge(fake, names, real, subsets=5, subset_size=9, batch_size=10).metrics
    network = ClassifierFeatures(classifier, ExtractorOptions())
    ours, theirs = (network(tensor(pixels), ["features"])["features"] for pixels in (FAKE, REAL))
    assert found[f"frechet@{classifier}"] == pytest.approx(frechet(ours, theirs), rel=1e-5)
    assert found[f"mmd@{classifier}"] == pytest.approx(math.kernel_distance(ours, theirs, 5, 9).mean, rel=1e-4)
    assert found[f"precision@{classifier}"] == math.precision_recall(ours, theirs, 3)[0]
    ours, theirs = (torch.from_numpy(p).permute(0, 3, 1, 2).flatten(1).float() / 255 for p in (FAKE, REAL))
    kernel = math.kernel_distance(ours, theirs, 5, 9)
    assert found["mmd@pixels"] == pytest.approx(kernel.mean, rel=1e-6)
    assert found["mmd_se@pixels"] == pytest.approx(kernel.error, rel=1e-6)
    assert (found["precision@pixels"], found["recall@pixels"]) == math.precision_recall(ours, theirs, 3)


def test_a_set_against_itself_is_at_distance_zero(fake: str, tmp_path: Path, inception: TinyInception) -> None:
    """Exactly, and under another name too."""
    other = write_pngs(tmp_path / "copy", FAKE)
    for reference in (fake, other):
        found = judge(fake, "fid,sfid,frechet@pixels,prc", reference).metrics
        assert (found["fid"], found["sfid"], found["frechet@pixels"]) == (0, 0, 0)
        assert (found["precision"], found["recall"]) == (1, 1)


def test_the_size_of_chunks_changes_no_figure(fake: str, real: str, inception: TinyInception) -> None:
    metrics = "fid,kid,is,prc,frechet@pixels,memorization@pixels"
    one, two = (judge(fake, metrics, real, train=real, batch_size=size) for size in (5, 64))
    assert one.images == two.images  # the hash of the images is of the images alone
    for name, value in one.metrics.items():
        assert two.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


def test_samples_carry_their_cost(tmp_path: Path, real: str) -> None:
    pipeline = tiny.tiny_pipeline()
    images = SampledImages(pipeline, plan([0, 1, 2], 2, 5), {"top_k": 3})
    pixels = to_uint8(pipeline(class_labels=[0, 0, 1, 1, 2, 2], seeds=range(5, 11), top_k=3, output_type="pt").images)
    grey = write_npz(tmp_path / "grey.npz", pictures(9, channels=1))
    report = judge(images, "mmd@pixels", grey, batch_size=4)
    ours, theirs = pixels[:, 0].flatten(1) / 255, torch.from_numpy(pictures(9, channels=1)).flatten(1) / 255
    assert report.metrics["mmd@pixels"] == pytest.approx(math.kernel_distance(ours, theirs, 100, 1000).mean, rel=1e-5)
    assert report.metrics["evaluations_per_image"] == 3  # one for each scale
    assert 0 < report.metrics["seconds_per_image"] < 10
    again = judge(images, "mmd@pixels", grey, batch_size=4)
    assert again.metrics == report.metrics  # nothing is sampled again: the clocks would differ
    facts = report.images
    assert facts["per_class"] == {"0": 2, "1": 2, "2": 2} and facts["seeds"] == "5..10" and facts["size"] == "8x8"
    assert facts["sampling"]["top_k"] == 3 and facts["sampling"]["sampler"] == "next-scale"
    assert facts["sampling"]["guidance_scale"] == 2.0 and facts["sampling"]["checkpoint"] == pipeline.checkpoint()[:16]


def test_a_reconstructions_figures_equal_the_direct_computation(tmp_path: Path, inception: TinyInception) -> None:
    tokenizer = tiny.tiny_pipeline(scales=[1, 2, 4, 8], image_channels=3).tokenizer
    originals = pictures(11, side=16)
    reference = open_reference(write_npz(tmp_path / "originals.npz", originals))
    assert reference.images is not None
    images = ReconstructedImages(tokenizer, "tok", "ab" * 32, reference.images)
    report = judge(images, "rfid,psnr,ssim,mse", reference, reconstructed=True, batch_size=4)
    with torch.no_grad():
        codes = tokenizer.encode(to_model_range(tensor(originals)))
        rebuilt = to_uint8(to_unit_range(tokenizer.decode(codes)))
    error = math.per_image_error(rebuilt, tensor(originals))
    ours, theirs = (inception(pixels, ["features"])["features"] for pixels in (rebuilt, tensor(originals)))
    assert report.metrics == {
        "rfid": pytest.approx(frechet(ours, theirs), rel=1e-4),
        **{name: pytest.approx(float(error[name].mean()), rel=1e-4) for name in ("psnr", "ssim", "mse")},
    }
    assert report.images["sampling"]["tokenizer"] == "tok" and report.images["n"] == 11
    assert [warning for warning in report.warnings if FEW not in warning] == []


def test_paired_figures_name_the_originals(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_pipeline(scales=[1, 2, 4, 8], image_channels=3).tokenizer
    reference = open_reference(write_npz(tmp_path / "originals.npz", pictures(4, side=16)))
    assert reference.images is not None
    images = ReconstructedImages(tokenizer, "tok", "ab" * 32, reference.images)
    report = judge(images, "psnr", reference, reconstructed=True)
    assert report.protocols["psnr"]["reference"]["n"] == 4
    originals = judge(reference.name, "frechet@pixels", reference).images["sha256"]
    assert report.protocols["psnr"]["reference"]["sha256"] == originals != report.images["sha256"]


def test_paired_figures_need_reconstructions(fake: str) -> None:
    refused(lambda: judge(fake, "mse", reconstructed=True), "mse compares reconstructions", "--tokenizer")


# ---- protocols


def test_the_protocol_says_what_was_compared_by_which_network(fake: str, real: str, inception: TinyInception) -> None:
    report = judge(fake, "fid,is", real)
    assert report.protocols["fid"] == {
        "extractor": NAME,
        "extractor_sha256": inception.digest,
        "resize": "legacy",
        "dtype": "float32",
        "reference": {"name": real, "n": 37, "sha256": judge(real, "is").images["sha256"]},
    }
    assert report.images["name"] == fake and report.images["n"] == 31 and report.images["files"] == "npz"
    assert report.images["per_class"] == {"0": 11, "1": 10, "2": 10} and report.images["vgen"] == vgen.__version__


def test_the_hash_is_of_the_pictures_in_their_order(tmp_path: Path, real: str) -> None:
    def content(name: str, pixels: np.ndarray) -> str:
        return judge(write_npz(tmp_path / name, pixels), "mmd@pixels", real).images["sha256"]

    original = content("a.npz", FAKE)
    changed = FAKE.copy()
    changed[-1, 0, 0, 0] ^= 1
    assert content("b.npz", FAKE) == original
    assert len({original, content("c.npz", changed), content("d.npz", FAKE[::-1]), content("e.npz", FAKE[1:])}) == 4


def test_memorization_names_the_training_images(fake: str, real: str, train: str) -> None:
    report = judge(fake, "memorization@pixels", real, train=train)
    for name in ("nearest_train@pixels", "nearest_train_reference@pixels", "nearer_than_reference@pixels"):
        found = report.protocols[name]
        assert (found["train"]["name"], found["train"]["n"]) == (train, 40)
        assert (found["reference"]["name"], found["reference"]["n"]) == (real, 37)
        assert found["train"]["sha256"] != found["reference"]["sha256"]


# ---- warnings


def warnings_of(*arguments: Any, **options: Any) -> list[str]:
    return judge(*arguments, **options).warnings


def write_many(path: Path, number: int) -> str:
    return write_npz(path, pictures(number, seed=number, side=2))


def test_an_orderly_evaluation_warns_of_nothing(tmp_path: Path, real: str) -> None:
    even = write_npz(tmp_path / "even.npz", FAKE[:30], [i % 3 for i in range(30)])
    assert warnings_of(even, "frechet@pixels,mmd@pixels,prc@pixels,memorization@pixels", real, train=real) == []


@pytest.mark.parametrize(
    ("number", "metrics", "says"),
    [
        (2048, "fid", ["2048 images are fewer than 2049", "singular", "KID"]),
        (2048, "sfid", ["2048 images are fewer than 2049"]),
        (2049, "fid", ["FID of 2049 images is biased upward", "equal N", "read KID too"]),
        (2049, "fid,kid", ["FID of 2049 images is biased upward"]),
        (9999, "fid", ["FID of 9999 images is biased upward"]),
        (10000, "fid", []),
        (2048, "kid", []),
        (2048, "prc,is", []),
        (2048, "frechet@inception", []),
    ],
)
def test_few_images_are_warned_of_where_fid_is_asked_for(
    tmp_path: Path, inception: TinyInception, number: int, metrics: str, says: list[str]
) -> None:
    reference = write_many(tmp_path / "reference.npz", 2049)
    options = {"batch_size": 20000, "subsets": 1, "subset_size": 10}
    found = warnings_of(write_many(tmp_path / "many.npz", number), metrics, reference, **options)
    assert len(found) == bool(says), found
    assert all(part in found[0] for part in says)
    assert not ("kid" in metrics and found and "KID" in found[0])


def test_a_small_reference_is_warned_of(tmp_path: Path, inception: TinyInception) -> None:
    reference = write_many(tmp_path / "reference.npz", 2048)
    options = {"batch_size": 20000}
    (found,) = warnings_of(write_many(tmp_path / "many.npz", 10000), "fid", reference, **options)
    assert "the reference has 2048 images, fewer than 2049" in found


def test_unequal_classes_are_warned_of(tmp_path: Path, real: str) -> None:
    uneven = write_npz(tmp_path / "uneven.npz", FAKE, [0] * 20 + [1] * 9 + [2] * 2)
    assert warnings_of(uneven, "frechet@pixels", real) == ["unequal classes: from 2 to 20 images"]
    nearly = write_npz(tmp_path / "nearly.npz", FAKE, [0] * 16 + [1] * 15)
    assert warnings_of(nearly, "frechet@pixels", real) == ["unequal classes: from 15 to 16 images"]


def test_doubles_are_counted(tmp_path: Path, real: str) -> None:
    """Two copies of one picture and one of another are three pictures too many."""
    doubled = write_npz(tmp_path / "doubled.npz", np.concatenate([FAKE, FAKE[:1], FAKE[:1], FAKE[5:6]]))
    (warning,) = warnings_of(doubled, "frechet@pixels", real, batch_size=8)
    assert warning.startswith("3 of 34 images are exact copies of others") and "seed" in warning


def test_another_size_is_warned_of(tmp_path: Path, fake: str, inception: TinyInception) -> None:
    fake = write_npz(tmp_path / "fake.npz", FAKE)
    other = write_npz(tmp_path / "other.npz", pictures(9, side=6))
    assert warnings_of(fake, "kid", other) == ["images of 8x8 are compared with a reference of 6x6"]
    make(other, "fid", tmp_path / "other-statistics.npz")
    found = warnings_of(fake, "fid", str(tmp_path / "other-statistics.npz"))
    assert [warning for warning in found if FEW not in warning] == [
        "images of 8x8 are compared with a reference of 6x6"
    ]


@pytest.mark.parametrize("lossy", ["images", "reference"])
def test_lossy_files_on_either_side_are_warned_of(tmp_path: Path, lossy: str) -> None:
    suffixes = {"images": "png", "reference": "png", lossy: "jpg"}
    paths = {role: write_pngs(tmp_path / role, pictures(9, len(role)), suffix) for role, suffix in suffixes.items()}
    (warning,) = warnings_of(paths["images"], "frechet@pixels", paths["reference"])
    assert warning.startswith(f"9 files of {paths[lossy]} may be compressed with loss")


def test_lossy_training_images_are_warned_of(tmp_path: Path, real: str) -> None:
    train = write_pngs(tmp_path / "train", TRAIN, "jpg")
    assert len(warnings_of(write_npz(tmp_path / "f.npz", FAKE), "memorization@pixels", real, train=train)) == 1


def test_weights_that_are_not_fids_are_warned_of(tmp_path: Path, real: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = write_npz(tmp_path / "fake.npz", FAKE)
    plant_inception(monkeypatch, name="inception-unknown")
    (warning,) = warnings_of(fake, "kid", real)
    assert "not those of FID" in warning
    assert warnings_of(fake, "frechet@pixels", real) == []  # Inception takes no part


def test_warnings_do_not_pile_up(tmp_path: Path) -> None:
    """One evaluator judges every point of a curve."""
    reference = write_pngs(tmp_path / "reference", REAL, "jpg")
    evaluator = evaluator_of("frechet@pixels", reference)
    doubled = write_npz(tmp_path / "doubled.npz", np.concatenate([FAKE, FAKE]))
    plain = write_npz(tmp_path / "plain.npz", FAKE)
    found = [evaluator.run(open_images(path)) for path in (doubled, plain, doubled)]
    assert [len(report.warnings) for report in found if report] == [2, 1, 2]


# ---- memorization


def test_copied_training_images_are_found(tmp_path: Path, train: str, real: str) -> None:
    copied = {2: 4, 9: 17, 30: 39}
    pixels = FAKE.copy()
    for image, original in copied.items():
        pixels[image] = TRAIN[original]
    fake = write_npz(tmp_path / "copied.npz", pixels)
    report = judge(fake, "memorization@pixels", train=train, batch_size=7)  # copies lie in blocks of their own
    nearest = report.details["nearest"]
    assert {pair["image"]: pair["train"] for pair in nearest[:3]} == copied
    assert [pair["distance"] for pair in nearest[:3]] == [0, 0, 0] and nearest[3]["distance"] > 0
    assert len(nearest) == 16 and nearest == sorted(nearest, key=lambda pair: pair["distance"])
    ours, theirs = (tensor(p).flatten(1).double() / 255 for p in (pixels, TRAIN))
    distance = torch.cdist(ours, theirs).min(1)
    for pair in nearest[3:]:
        assert pair["distance"] == pytest.approx(float(distance.values[pair["image"]]), rel=1e-6)
        assert pair["train"] == int(distance.indices[pair["image"]])
    assert report.metrics == {"nearest_train@pixels": pytest.approx(float(distance.values.median()), rel=1e-6)}


def test_held_out_images_say_how_near_is_suspicious(tmp_path: Path, train: str, real: str) -> None:
    pixels = np.concatenate([TRAIN[:8], FAKE[:24]])
    fake = write_npz(tmp_path / "quarter.npz", pixels)
    found = judge(fake, "memorization@pixels", real, train=train).metrics
    theirs, held_out = (tensor(p).flatten(1).double() / 255 for p in (TRAIN, REAL))
    own = torch.cdist(tensor(pixels).flatten(1).double() / 255, theirs).min(1).values
    other = torch.cdist(held_out, theirs).min(1).values
    assert found["nearest_train@pixels"] == pytest.approx(float(own.median()), rel=1e-6)
    assert found["nearest_train_reference@pixels"] == pytest.approx(float(other.median()), rel=1e-6)
    share = float((own < other.quantile(0.01)).double().mean())
    assert found["nearer_than_reference@pixels"] == share >= 0.25
    assert judge(fake, "memorization@pixels", fake, train=train).metrics["nearer_than_reference@pixels"] == 0


def test_memorization_needs_training_images(fake: str, real: str) -> None:
    refused(lambda: judge(fake, "memorization@pixels", real), "training images", "--train")


def test_memorization_names_the_training_images_without_a_reference_too(fake: str, train: str) -> None:
    report = judge(fake, "memorization@pixels", train=train)
    protocol = report.protocols["nearest_train@pixels"]
    assert protocol["train"]["name"] == train and len(protocol["train"]["sha256"]) == 64
    assert "reference" not in protocol and f"train={train} N=" in report.protocol_line("nearest_train@pixels")


def test_memorization_beside_a_statistics_file(tmp_path: Path, fake: str, real: str, train: str) -> None:
    make(real, "frechet@pixels", tmp_path / "s.npz")
    report = judge(fake, "frechet@pixels,memorization@pixels", str(tmp_path / "s.npz"), train=train)
    assert all(line for line in report.lines()) and "nearest_train@pixels" in report.metrics


# ---- accuracy


def predictions(classifier: Path, pixels: np.ndarray) -> list[int]:
    network = ClassifierFeatures(classifier, ExtractorOptions())
    with torch.no_grad():
        return network.model(to_model_range(tensor(pixels))).argmax(1).tolist()


def test_accuracy_is_the_share_that_shows_its_class(tmp_path: Path, classifier: Path) -> None:
    guessed = predictions(classifier, FAKE)
    assert set(guessed) == {0, 1, 2}
    wanted = [0] * 15 + [1] * 10 + [2] * 6
    fake = write_npz(tmp_path / "labelled.npz", FAKE, wanted)
    report = judge(fake, f"accuracy@{classifier}", batch_size=10)
    right = Counter(label for label, guess in zip(wanted, guessed, strict=True) if label == guess)
    assert report.metrics == {f"accuracy@{classifier}": pytest.approx(sum(right.values()) / 31)}
    assert report.details[f"accuracy_per_class@{classifier}"] == {
        name: pytest.approx(right[label] / wanted.count(label)) for label, name in enumerate(NAMES)
    }
    perfect = write_npz(tmp_path / "perfect.npz", FAKE, guessed)
    assert judge(perfect, f"accuracy@{classifier}").metrics == {f"accuracy@{classifier}": 1}


def test_accuracy_needs_classes(real: str, classifier: Path) -> None:
    refused(lambda: judge(real, f"accuracy@{classifier}"), real, "folder for each class", "vgen sample")


def test_a_class_that_the_classifier_does_not_know_is_refused(tmp_path: Path, classifier: Path) -> None:
    fake = write_npz(tmp_path / "fake.npz", FAKE, [0] * 30 + [3])
    refused(lambda: judge(fake, f"accuracy@{classifier}"), "class 3", fake, "tiny-classifier's 3")


def test_a_negative_class_is_refused(tmp_path: Path, classifier: Path) -> None:
    fake = write_npz(tmp_path / "fake.npz", FAKE, [0] * 30 + [-1])
    with pytest.raises(SettingError, match="-1"):
        judge(fake, f"accuracy@{classifier}")


def test_class_folders_are_matched_by_the_classifiers_names(tmp_path: Path) -> None:
    """Fashion-MNIST's names are in no alphabetical order: accuracy of named folders would be garbage, unseen."""
    names = ["cat", "ant", "bee"]
    classifier = write_classifier(tmp_path / "cat-ant-bee", names)
    for i, guess in enumerate(predictions(classifier, FAKE)):
        (tmp_path / "named" / names[guess]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(FAKE[i]).save(tmp_path / "named" / names[guess] / f"{i}.png")
    assert judge(str(tmp_path / "named"), f"accuracy@{classifier}").metrics == {f"accuracy@{classifier}": 1}


def test_a_folder_of_a_class_that_the_classifier_does_not_know_is_refused(tmp_path: Path, classifier: Path) -> None:
    for name in ("ant", "wolf"):
        write_pngs(tmp_path / "named" / name, FAKE[:2])
    refused(lambda: judge(str(tmp_path / "named"), f"accuracy@{classifier}"), "'wolf'", "tiny-classifier", "ant, bee")


def test_each_classifier_has_its_accuracy_per_class(tmp_path: Path, fake: str) -> None:
    one, two = (write_classifier(tmp_path / f"{seed}", seed=seed) for seed in (5, 6))
    report = judge(fake, f"accuracy@{one},accuracy@{two}")
    alone = [judge(fake, f"accuracy@{folder}").details for folder in (one, two)]
    assert list(alone[0].values()) != list(alone[1].values())
    assert report.details == alone[0] | alone[1]


# ---- references


def make(images: str, metrics: str, path: Path, **options: Any) -> None:
    """Write a statistics file."""
    asked = parse_metrics(metrics)
    settings = Options(**options)
    make_statistics(open_images(images), asked, build_extractors(asked, settings.extractors), path, settings)


def test_a_statistics_file_stands_for_its_images(
    tmp_path: Path, fake: str, real: str, classifier: Path, inception: TinyInception
) -> None:
    for metrics in ("fid,sfid", f"frechet@{classifier}", "frechet@pixels"):
        path = tmp_path / "statistics.npz"
        make(real, metrics, path, batch_size=9)
        by_file, by_images = judge(fake, metrics, str(path)), judge(fake, metrics, real)
        for name, value in by_images.metrics.items():
            assert by_file.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
            reference = by_file.protocols[name]["reference"]
            assert reference == {"name": str(path), "n": 37, "sha256": sha256(path)}
        own, covariance = (np.load(path)[name] for name in ("mu", "sigma"))
        assert own.dtype == covariance.dtype == np.float64


def test_statistics_of_inception_serve_fid_and_sfid_whatever_was_asked(
    tmp_path: Path, fake: str, real: str, inception: TinyInception
) -> None:
    make(real, "fid,kid", tmp_path / "s.npz")
    assert set(np.load(tmp_path / "s.npz").files) == {"protocol", "mu", "sigma", "mu_s", "sigma_s"}
    assert judge(fake, "sfid", str(tmp_path / "s.npz")).metrics == pytest.approx(judge(fake, "sfid", real).metrics)
    protocol = json.loads(str(np.load(tmp_path / "s.npz")["protocol"]))
    assert protocol["extractor"] == NAME and protocol["n"] == 37 and protocol["image_size"] == "8x8"
    assert protocol["images"] == real and len(protocol["images_sha256"]) == 64


def test_statistics_alone_are_not_enough_for_some_metrics(tmp_path: Path, fake: str, real: str) -> None:
    make(real, "frechet@pixels", tmp_path / "s.npz")
    path = str(tmp_path / "s.npz")
    for metrics in ("prc@pixels", "mmd@pixels"):
        refused(lambda metrics=metrics: judge(fake, f"frechet@pixels,{metrics}", path), "needs images", path)


def test_kid_and_prc_are_refused_before_a_feature_is_extracted(
    tmp_path: Path, fake: str, real: str, inception: TinyInception
) -> None:
    make(real, "fid", tmp_path / "s.npz")
    before = inception.calls
    for metrics in ("fid,kid", "fid,prc"):
        refused(lambda metrics=metrics: judge(fake, metrics, str(tmp_path / "s.npz")), "needs images")
    assert inception.calls == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resize": "clean"}, ["resize legacy", "this run uses clean"]),
        ({"dtype": "bfloat16"}, ["dtype float32", "this run uses bfloat16"]),
        ({"name": "inception-unknown"}, [f"extractor {NAME}", "this run uses inception-unknown"]),
        ({"classifies": False}, ["extractor_sha256 ", "this run uses "]),
    ],
)
def test_statistics_made_otherwise_are_refused_with_both_values(
    tmp_path: Path, fake: str, real: str, monkeypatch: pytest.MonkeyPatch, changes: dict, says: list[str]
) -> None:
    path = tmp_path / "s.npz"
    first = plant_inception(monkeypatch)
    make(real, "fid", path)
    second = plant_inception(monkeypatch, **changes)
    if "classifies" in changes:
        says = [says[0] + first.digest[:40], says[1] + second.digest[:40]]
    refused(lambda: judge(fake, "fid", str(path)), str(path), *says, "make the statistics again")
    refused(lambda: judge(fake, "kid,fid", str(path)), "needs images")


def test_statistics_of_another_network_are_refused(tmp_path: Path, fake: str, real: str, classifier: Path) -> None:
    make(real, "frechet@pixels", tmp_path / "s.npz")
    refused(
        lambda: judge(fake, f"frechet@{classifier}", str(tmp_path / "s.npz")),
        "extractor pixels",
        "this run uses tiny-classifier",
    )


def write_moments(path: Path, network: Any, pixels: np.ndarray, spatial: bool = False, **others: Any) -> str:
    """Statistics as others write them: pytorch-fid's, ADM's."""
    found = network(tensor(pixels), ["features", "spatial"])
    mean, covariance = (part.numpy() for part in moments(found["features"]))
    arrays = {"mu": mean, "sigma": covariance}
    if spatial:
        arrays |= dict(zip(("mu_s", "sigma_s"), (part.numpy() for part in moments(found["spatial"])), strict=True))
    np.savez(path, **arrays | others)
    return str(path)


def test_pytorch_fids_statistics_serve_inception_alone(
    tmp_path: Path, fake: str, real: str, inception: TinyInception
) -> None:
    path = write_moments(tmp_path / "theirs.npz", inception, REAL)
    report = judge(fake, "fid", path)
    assert report.metrics["fid"] == pytest.approx(judge(fake, "fid", real).metrics["fid"], rel=1e-9)
    (warning,) = [warning for warning in report.warnings if "protocol" in warning]
    assert path in warning and "legacy resize" in warning
    assert report.protocols["fid"]["reference"]["n"] is None and "N=unknown" in report.protocol_line("fid")
    refused(lambda: judge(fake, "frechet@pixels", path), path, "Inception's only")
    refused(lambda: judge(fake, "kid", path), "needs images")
    refused(lambda: judge(fake, "sfid", path), "sfid needs the spatial", path)


def test_the_warning_of_an_unknown_protocol_comes_once(tmp_path: Path, fake: str, inception: TinyInception) -> None:
    path = write_moments(tmp_path / "theirs.npz", inception, REAL, spatial=True)
    assert sum("protocol" in warning for warning in judge(fake, "fid,sfid,frechet@inception", path).warnings) == 1


def test_the_warning_of_an_unknown_protocol_does_not_hide_another_resize(
    tmp_path: Path, fake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = plant_inception(monkeypatch, resize="clean")
    path = write_moments(tmp_path / "theirs.npz", network, REAL)
    with pytest.raises(SettingError, match="clean"):
        judge(fake, "fid", path)


def test_adms_file_gives_its_moments_and_its_images(
    tmp_path: Path, fake: str, real: str, train: str, inception: TinyInception
) -> None:
    """Its moments are of the whole data set, its images a part of it: FID takes the first, KID and P/R the second."""
    path = write_moments(tmp_path / "adm.npz", inception, REAL, spatial=True, arr_0=TRAIN)
    found = judge(fake, "fid,sfid,kid,prc", path)
    whole, part = judge(fake, "fid,sfid,kid,prc", real), judge(fake, "fid,sfid,kid,prc", train)
    for name in ("fid", "sfid"):
        assert found.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-9)
        assert abs(found.metrics[name] - part.metrics[name]) > 1e-3
        assert found.protocols[name]["reference"]["sha256"] == sha256(Path(path))
    for name in ("kid", "kid_std", "kid_se", "precision", "recall"):
        assert found.metrics[name] == part.metrics[name]
        assert found.protocols[name]["reference"] == part.protocols[name]["reference"] | {"name": path}
    assert found.metrics["kid"] != whole.metrics["kid"]


def test_adms_images_serve_any_network(tmp_path: Path, fake: str, train: str, inception: TinyInception) -> None:
    path = write_moments(tmp_path / "adm.npz", inception, REAL, arr_0=TRAIN)
    assert judge(fake, "frechet@pixels", path).metrics == judge(fake, "frechet@pixels", train).metrics


def test_without_spatial_moments_adms_images_give_them(
    tmp_path: Path, fake: str, train: str, inception: TinyInception
) -> None:
    path = write_moments(tmp_path / "adm.npz", inception, REAL, arr_0=TRAIN)
    assert judge(fake, "sfid", path).metrics == judge(fake, "sfid", train).metrics


def test_fid_from_moments_extracts_no_reference(tmp_path: Path, fake: str, inception: TinyInception) -> None:
    path = write_moments(tmp_path / "adm.npz", inception, REAL, arr_0=TRAIN)
    seen = inception.calls
    judge(fake, "fid", path, batch_size=100)
    assert inception.calls == seen + 1


def test_moments_of_another_width_are_refused(tmp_path: Path, fake: str, inception: TinyInception) -> None:
    np.savez(tmp_path / "four.npz", mu=np.zeros(4), sigma=np.eye(4))
    refused(lambda: judge(fake, "fid", str(tmp_path / "four.npz")), "4 features", "gives 5")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"mu": np.zeros(4)}, ["mu and sigma", "[4] and [5, 5]", "(D,) and (D, D)"]),
        ({"mu": np.zeros((1, 5))}, ["[1, 5] and [5, 5]"]),
        ({"sigma": np.eye(5)[:4]}, ["[5] and [4, 5]"]),
        ({"mu": np.full(5, np.nan)}, ["mu or sigma", "not finite"]),
        ({"sigma": np.full((5, 5), np.inf)}, ["not finite"]),
        ({"mu": np.zeros(5, dtype=int)}, ["mu", "int64", "floats"]),
        ({"mu": np.zeros(5, dtype=complex)}, ["complex128", "floats"]),
        ({"mu": np.array([0.0] * 5, dtype=object)}, ["mu", "not a C-ordered array of numbers"]),
        ({"mu": np.array("text")}, ["mu", "<U4"]),
        ({"mu": np.float64(3)}, ["mu", "float64 ()"]),
        ({"mu": np.zeros((1, 1, 5))}, ["mu", "(1, 1, 5)"]),
        ({"mu": np.zeros(16385)}, ["16385", "16384"]),
        ({"mu_s": np.zeros(3), "sigma_s": np.eye(2)}, ["mu_s and sigma_s", "[3] and [2, 2]"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_odd_statistics_are_refused_in_one_line(tmp_path: Path, arrays: dict[str, Any], says: list[str]) -> None:
    np.savez(tmp_path / "odd.npz", **{"mu": np.zeros(5), "sigma": np.eye(5)} | arrays)
    refused(lambda: open_reference(str(tmp_path / "odd.npz")), "odd.npz", *says)


@pytest.mark.parametrize("keep", [0, 10, 300, 0.5, 0.9, -1])
def test_truncated_statistics_are_refused_in_one_line(tmp_path: Path, fake: str, real: str, keep: float) -> None:
    make(real, "frechet@pixels", tmp_path / "s.npz")
    content = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: int(keep if abs(keep) >= 1 or not keep else len(content) * keep)])
    refused(lambda: judge(fake, "frechet@pixels", str(tmp_path / "cut.npz")), "cut.npz", "damaged", "get it again")


def test_flipped_bits_are_noticed(tmp_path: Path, fake: str, real: str) -> None:
    make(real, "frechet@pixels", tmp_path / "s.npz")
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    refused(lambda: judge(fake, "frechet@pixels", str(tmp_path / "flipped.npz")), "flipped.npz", "damaged")


def test_damaged_compressed_statistics_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez_compressed(path, mu=np.random.default_rng(0).normal(size=300), sigma=np.eye(300))
    content = path.read_bytes()
    for start in range(40, len(content) // 2, 40):
        path.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
        refused(lambda: open_reference(str(path)), "s.npz")


@pytest.mark.parametrize("protocol", ["", "[1]", "nonsense", '{"extractor"', "[" * 5000, "null"])
def test_an_unreadable_protocol_counts_as_none(
    tmp_path: Path, fake: str, inception: TinyInception, protocol: str
) -> None:
    path = write_moments(tmp_path / "s.npz", inception, REAL, protocol=np.array(protocol))
    assert any("does not record its protocol" in warning for warning in judge(fake, "fid", path).warnings)


def test_an_empty_protocol_array_counts_as_none(tmp_path: Path, inception: TinyInception) -> None:
    path = write_moments(tmp_path / "s.npz", inception, REAL, protocol=np.array([], dtype="U5"))
    assert open_reference(path).statistics is not None


def test_statistics_are_of_one_network(tmp_path: Path, fake: str, inception: TinyInception) -> None:
    for metrics in ("fid,frechet@pixels", "kid", "prc@pixels"):
        refused(lambda metrics=metrics: make(fake, metrics, tmp_path / "s.npz"), "of one extractor", "--metrics fid")
    assert not (tmp_path / "s.npz").exists()


def test_statistics_of_one_image_are_refused(tmp_path: Path) -> None:
    one = write_npz(tmp_path / "one.npz", FAKE[:1])
    refused(lambda: make(one, "frechet@pixels", tmp_path / "s.npz"), "at least 2 images")
    assert not (tmp_path / "s.npz").exists()


def test_statistics_are_read_under_the_name_they_were_written_to(tmp_path: Path, fake: str, real: str) -> None:
    make(real, "frechet@pixels", tmp_path / "real.stats")
    judge(fake, "frechet@pixels", str(tmp_path / "real.stats"))


# ---- what cannot be computed


@pytest.mark.parametrize(
    ("number", "metrics", "options", "says"),
    [
        (3, "prc@pixels", {}, ["3 neighbours", "at least 4 images", "has 3"]),
        (5, "prc@pixels", {"neighbours": 5}, ["5 neighbours", "at least 6", "has 5"]),
        (1, "frechet@pixels", {}, ["frechet of 1 image", "at least 2"]),
        (1, "mmd@pixels", {}, ["mmd of 1 image", "at least 2"]),
        (1, "fid", {}, ["fid of 1 image"]),
        (9, "is", {}, ["9 images", "split in 10", "--splits"]),
    ],
)
def test_too_few_images_are_refused(
    tmp_path: Path, real: str, inception: TinyInception, number: int, metrics: str, options: dict, says: list[str]
) -> None:
    few = write_npz(tmp_path / "few.npz", FAKE[:number])
    refused(lambda: judge(few, metrics, real, **options), *says)
    assert inception.calls <= 1  # of the reference; the images were not looked at


def test_just_enough_images_do(tmp_path: Path, real: str, inception: TinyInception) -> None:
    judge(write_npz(tmp_path / "four.npz", FAKE[:4]), "prc@pixels", real)
    judge(write_npz(tmp_path / "two.npz", FAKE[:2]), "fid,kid", real)
    judge(write_npz(tmp_path / "ten.npz", FAKE[:10]), "is")


@pytest.mark.parametrize("metrics", ["prc@pixels", "mmd@pixels", "frechet@pixels"])
def test_too_small_a_reference_is_refused(tmp_path: Path, fake: str, metrics: str) -> None:
    one = write_npz(tmp_path / "one.npz", REAL[:1])
    with pytest.raises(SettingError, match="at least"):
        judge(fake, metrics, one)


@pytest.mark.parametrize("metrics", ["fid", "sfid", "kid", "prc", "frechet@pixels", "mmd@pixels"])
def test_distances_need_a_reference(fake: str, inception: TinyInception, metrics: str) -> None:
    refused(lambda: judge(fake, metrics), metrics.partition("@")[0], "--reference")


def test_scores_need_no_reference(fake: str, inception: TinyInception, classifier: Path) -> None:
    assert set(judge(fake, f"is,accuracy@{classifier}").metrics) == {"is", "is_std", f"accuracy@{classifier}"}


@pytest.mark.parametrize("metrics", ["mmd@pixels", "prc@pixels", "memorization@pixels", "frechet@pixels"])
def test_features_of_different_widths_are_refused(
    tmp_path: Path, fake: str, metrics: str, request: pytest.FixtureRequest
) -> None:
    """Pixels of 8 x 8 pictures cannot be compared with those of 6 x 6."""
    other = write_npz(tmp_path / "other.npz", pictures(9, side=6))
    with pytest.raises(SettingError):
        judge(fake, metrics, other, train=other)


def test_grey_pictures_among_coloured_ones_have_pixels_too(tmp_path: Path, real: str) -> None:
    mixed = FAKE.copy()
    mixed[:8] = mixed[:8, :, :, :1]
    found = judge(write_npz(tmp_path / "mixed.npz", mixed), "frechet@pixels", real, batch_size=8).metrics
    ours, theirs = (tensor(p).flatten(1).float() / 255 for p in (mixed, REAL))
    assert found["frechet@pixels"] == pytest.approx(frechet(ours, theirs), rel=1e-6)


# ---- cached and shared work


def test_features_are_extracted_once(fake: str, real: str, inception: TinyInception) -> None:
    first = judge(fake, "fid,kid", real, batch_size=10)
    assert inception.calls == 4 + 4
    again = judge(fake, "fid,kid,prc", real, batch_size=10)
    assert inception.calls == 8
    assert all(again.metrics[name] == value for name, value in first.metrics.items())
    judge(fake, "is", batch_size=10)
    assert inception.calls == 12  # another layer


def test_an_interrupted_evaluation_goes_on_where_it_was(
    fake: str, real: str, inception: TinyInception, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = TinyInception.__call__

    def interrupted(self: TinyInception, images: Tensor, layers: Any) -> dict[str, Tensor]:
        if self.calls == 6:
            raise KeyboardInterrupt
        return call(self, images, layers)

    monkeypatch.setattr(TinyInception, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge(fake, "fid", real, batch_size=10)
    monkeypatch.setattr(TinyInception, "__call__", call)
    found = judge(fake, "fid", real, batch_size=10)
    assert inception.calls == 8
    whole = judge(fake, "fid", real, batch_size=10, cache=Path(real).parent / "fresh")
    assert found.metrics == whole.metrics


def test_one_evaluator_judges_many_sets(fake: str, real: str, train: str, inception: TinyInception) -> None:
    evaluator = evaluator_of("fid,kid", real, batch_size=100)
    reports = [evaluator.run(open_images(path)) for path in (fake, train)]
    assert inception.calls == 3
    assert [report.metrics for report in reports if report] == [
        judge(p, "fid,kid", real).metrics for p in (fake, train)
    ]


def test_only_the_main_process_reports(tmp_path: Path, fake: str, real: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have extracted their part, and neither judge nor write."""
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    evaluator = evaluator_of("frechet@pixels", real)
    assert evaluator.run(open_images(fake)) is None
    make(real, "frechet@pixels", tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists()


def test_an_evaluator_may_be_built_by_hand(fake: str, real: str) -> None:
    """As the Python interface: nothing of the command line."""
    asked = [Asked("frechet@pixels", "frechet", METRICS["frechet"], "pixels")]
    report = Evaluator(asked, {"pixels": Pixels()}, open_reference(real)).run(open_images(fake))
    assert report is not None and report.metrics == judge(fake, "frechet@pixels", real).metrics
