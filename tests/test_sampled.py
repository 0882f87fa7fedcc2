"""Images that a model makes for the evaluation: the very pixels of `vgen sample`, made once; reconstructions."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TOKENIZER, randomize, tiny_pipeline, write_folder
from torch import Tensor

import vgen
from vgen import __version__, hub
from vgen.batch import Item, plan, sample_to_files
from vgen.data import to_model_range, to_uint8, to_unit_range
from vgen.evaluation import sampled
from vgen.evaluation.features import FeatureStore, extract
from vgen.evaluation.images import Batch, image_digests, open_images
from vgen.evaluation.metrics import per_image_error
from vgen.evaluation.sampled import ReconstructedImages, SampledImages
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.types import CheckpointError, SettingError


class Fake:
    """A quick extractor."""

    name, digest, layers, preferred_batch = "fake", "0" * 64, ("features",), 64
    protocol: dict[str, str] = {}  # noqa: RUF012

    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        return {"features": images.long().sum((2, 3)).float()}


class Counted:
    """A pipeline that notes the seeds it was asked for."""

    def __init__(self, pipeline: NextScalePipeline) -> None:
        self.pipeline = pipeline
        self.batches: list[list[int]] = []
        self.limit = 1000

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __call__(self, **options: Any) -> Any:
        self.batches.append(options["seeds"])
        if len(options["seeds"]) > self.limit:
            raise torch.OutOfMemoryError
        return self.pipeline(**options)


@pytest.fixture(scope="module")
def pipeline() -> NextScalePipeline:
    return tiny_pipeline()


# ---- samples


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "guidance_scale": 1.0}, {"more_smooth": True}])
@pytest.mark.parametrize("labels", [[2, 0, 1], None])
def test_samples_are_the_files_that_vgen_sample_writes(
    pipeline: NextScalePipeline, tmp_path: Path, settings: dict[str, Any], labels: list[int] | None
) -> None:
    items = plan(labels, 3, seed=5)
    paths = sample_to_files(pipeline, items, tmp_path, settings=settings, batch_size=2).paths
    written = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
    assert len(written.flatten(1).unique(dim=0)) == len(items)
    images = SampledImages(pipeline, items, settings)
    assert len(images) == len(items)
    found = [images.read(start, stop).pixels for start, stop in ((0, len(items)), (1, 3))]
    assert found[0].dtype == torch.uint8 and torch.equal(found[0], written) and torch.equal(found[1], written[1:3])
    assert images.labels == (None if labels is None else [2, 2, 2, 0, 0, 0, 1, 1, 1])


def test_samples_tell_how_they_are_made_as_their_files_do(pipeline: NextScalePipeline, tmp_path: Path) -> None:
    items = plan([2, 0], 2, seed=5)
    sample_to_files(pipeline, items, tmp_path, settings={"top_k": 3})
    images = SampledImages(pipeline, items, {"top_k": 3})
    assert images.facts["sampling"] == open_images(str(tmp_path)).facts["sampling"]
    assert images.facts["sampling"]["top_k"] == 3
    assert images.facts["size"] == "8x8" and images.facts["seeds"] == "5..8" and images.warnings == []
    assert not images.cheap
    assert images.describe(2) == "the sample of class 0 and seed 7"


def test_every_sample_has_its_share_of_the_time_and_the_evaluations(
    pipeline: NextScalePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = pipeline(class_labels=[0, 1, 2, 0], seeds=[0, 1, 2, 3])
    ticks = iter(range(0, 1000, 6))
    monkeypatch.setattr("vgen.pipelines.base.time.monotonic", lambda: next(ticks))
    columns = SampledImages(pipeline, plan([0, 1, 2, 0], 1, 0), {}).read(0, 4).columns
    assert columns.keys() == {"seconds", "evaluations"}
    assert columns["seconds"].tolist() == [1.5] * 4
    assert columns["evaluations"].tolist() == [direct.evaluations] * 4 and direct.evaluations == 3
    assert all(column.dtype == torch.float64 for column in columns.values())


def test_settings_are_checked_before_anything_is_sampled(pipeline: NextScalePipeline) -> None:
    with pytest.raises(SettingError, match="top_p"):
        SampledImages(pipeline, plan([0], 1, 0), {"top_p": 7})
    with pytest.raises(SettingError, match="unknown"):
        SampledImages(pipeline, plan([0], 1, 0), {"colour": 7})
    with pytest.raises(SettingError, match="class 3 is outside"):
        SampledImages(pipeline, plan([3], 1, 0), {})


def test_the_sampler_is_handed_on(pipeline: NextScalePipeline) -> None:
    items = plan([0], 2, 0)
    default, named = (SampledImages(pipeline, items, {}, sampler) for sampler in (None, "next-scale"))
    assert torch.equal(default.read(0, 2).pixels, named.read(0, 2).pixels)
    assert default.identity(0, 2) == named.identity(0, 2)
    with pytest.raises(SettingError, match="unknown sampler 'other'"):
        SampledImages(pipeline, items, {}, "other")


def identity(pipeline: Any, items: Sequence[Item] | None = None, **settings: Any) -> str:
    found = SampledImages(pipeline, items or plan([0, 1], 2, 0), settings).identity(1, 3)
    assert found is not None
    return found


CHANGES: list[dict[str, Any]] = [
    {"guidance_scale": 3.0},
    {"guidance_schedule": "constant"},
    {"top_k": 3},
    {"top_p": 0.9},
    {"temperature": 0.9},
    {"temperature_schedule": "linear"},
    {"more_smooth": True},
]


def test_every_setting_is_among_the_changes(pipeline: NextScalePipeline) -> None:
    assert {name for change in CHANGES for name in change} == pipeline.resolve_settings({}).keys()


def test_what_decides_the_pixels_decides_the_identity(
    pipeline: NextScalePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that are kept must be those that would be made again."""
    known = identity(pipeline)
    assert identity(pipeline, **pipeline.resolve_settings({})) == known  # defaults that were spelt out
    others = [identity(pipeline, **change) for change in CHANGES]
    others += [identity(pipeline, plan(labels, 2, seed)) for labels, seed in (([0, 1], 1), ([0, 2], 0), (None, 0))]
    others += [identity(pipeline, plan([1, 0], 2, 0)), identity(tiny_pipeline(seed=5))]
    others += [identity(tiny_pipeline().to(torch.bfloat16)), identity(tiny_pipeline().to(torch.float64))]
    monkeypatch.setattr("vgen.pipelines.base.__version__", "0.0.0")
    others.append(identity(pipeline))
    assert len({known, *others}) == 1 + len(others)


def test_the_identity_is_of_these_images_alone(pipeline: NextScalePipeline) -> None:
    first = SampledImages(pipeline, plan([0, 1], 4, 0), {})
    second = SampledImages(pipeline, plan([0, 1], 4, 0)[2:], {})
    assert first.identity(2, 6) == second.identity(0, 4) != first.identity(2, 5)


def test_the_name_of_a_folder_changes_nothing(saved: Path, tmp_path: Path) -> None:
    """A model that was moved or renamed is the same model."""
    copy = shutil.copytree(saved, tmp_path / "renamed")
    first, second = vgen.load(saved), vgen.load(copy)
    assert first.source != second.source and identity(first) == identity(second)
    assert SampledImages(second, plan([0], 1, 0), {}).name == str(copy)


def test_a_second_evaluation_does_not_sample_again(pipeline: NextScalePipeline, tmp_path: Path) -> None:
    store, counted, wanted = FeatureStore(tmp_path), Counted(pipeline), {"fake": (Fake(), ("features",))}
    first = extract(SampledImages(counted, plan([0, 1], 5, 0), {}), wanted, store, 4)
    assert counted.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    second = extract(SampledImages(counted, plan([0, 1], 5, 0), {}), wanted, store, 4)
    assert len(counted.batches) == 3
    assert first.content == second.content and first.records.keys() == {"digest", "seconds", "evaluations"}
    assert all(torch.equal(first.records[name], second.records[name]) for name in first.records)
    pixels = SampledImages(pipeline, plan([0, 1], 5, 0), {}).read(0, 10).pixels
    assert torch.equal(second.all(Fake(), "features"), Fake()(pixels, ())["features"])
    extract(SampledImages(counted, plan([0, 1], 5, 0), {"top_k": 2}), wanted, store, 4)
    assert len(counted.batches) == 6


def test_more_samples_of_one_run_add_to_those_there(pipeline: NextScalePipeline, tmp_path: Path) -> None:
    store, counted, wanted = FeatureStore(tmp_path), Counted(pipeline), {"fake": (Fake(), ("features",))}
    extract(SampledImages(counted, plan([1], 8, 0), {}), wanted, store, 4)
    extract(SampledImages(counted, plan([1], 12, 0), {}), wanted, store, 4)
    assert counted.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_sampling_adapts_to_memory(pipeline: NextScalePipeline, tmp_path: Path) -> None:
    """Chunks are of 64 images; a large model has no room for so many at once."""
    counted = Counted(pipeline)
    counted.limit = 3
    wanted = {"fake": (Fake(), ("features",))}
    found = extract(SampledImages(counted, plan([0], 8, 0), {}), wanted, FeatureStore(tmp_path), 8)
    pixels = SampledImages(pipeline, plan([0], 8, 0), {}).read(0, 8).pixels
    assert torch.equal(found.all(Fake(), "features"), Fake()(pixels, ())["features"])


def test_samples_of_smaller_batches_are_the_same(pipeline: NextScalePipeline) -> None:
    counted = Counted(pipeline)
    counted.limit = 3
    items = plan([0, 2], 5, 0)
    found, whole = (SampledImages(pipe, items, {}).read(1, 9) for pipe in (counted, pipeline))
    assert [len(batch) for batch in counted.batches] == [8, 4, 2, 2, 4, 2, 2]
    assert torch.equal(found.pixels, whole.pixels) and found.columns.keys() == whole.columns.keys()
    assert all(len(column) == 8 for column in found.columns.values())
    counted.limit, counted.batches = 0, []
    with pytest.raises(torch.OutOfMemoryError):
        SampledImages(counted, items, {}).read(0, 4)
    assert [len(batch) for batch in counted.batches] == [4, 2, 1]


def test_other_errors_of_sampling_are_not_tried_again(pipeline: NextScalePipeline) -> None:
    calls: list[int] = []

    class Failing(Counted):
        def __call__(self, **options: Any) -> Any:
            calls.append(len(options["seeds"]))
            raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        SampledImages(Failing(pipeline), plan([0], 4, 0), {}).read(0, 4)
    assert calls == [4]


def test_samples_know_the_names_of_their_classes(pipeline: NextScalePipeline) -> None:
    assert SampledImages(pipeline, plan([0], 1, 0), {}).label_names == ["ant", "bee", "cat"]
    nameless = NextScalePipeline(pipeline.tokenizer, pipeline.generator)
    assert SampledImages(nameless, plan([0], 1, 0), {}).label_names is None


# ---- reconstructions


def tokenizer_of_16(channels: int = 1, seed: int = 0) -> MultiScaleVQ:
    """Of 16 x 16 images: SSIM's window is of 11."""
    model = MultiScaleVQ(**TOKENIZER | {"channel_multipliers": [1, 1, 2], "image_channels": channels})
    randomize(model, seed)
    return model.eval()


class Pictures:
    """Images in memory."""

    name, labels, label_names, cheap, columns = "pictures", [0, 1, 2, 0, 1], None, True, ()

    def __init__(self, number: int = 5, side: int = 16) -> None:
        rng = torch.Generator().manual_seed(1)
        self.pixels = torch.randint(256, (number, 3, side, side), generator=rng, dtype=torch.uint8)
        self.facts: dict[str, Any] = {"size": f"{side}x{side}"}
        self.warnings: list[str] = []

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, start: int, stop: int) -> Batch:
        return Batch(self.pixels[start:stop])

    def identity(self, start: int, stop: int) -> str | None:
        return None

    def describe(self, index: int) -> str:
        return f"picture {index}"


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstructions_are_those_of_the_tokenizer(channels: int) -> None:
    tokenizer, originals = tokenizer_of_16(channels), Pictures()
    images = ReconstructedImages(tokenizer, "vq", "d" * 64, originals)
    assert len(images) == 5 and images.labels == originals.labels and not images.cheap
    found = images.read(1, 4)
    tokens = tokenizer.encode(to_model_range(originals.pixels[1:4]))
    wanted = to_uint8(to_unit_range(tokenizer.decode(tokens)))
    assert found.pixels.shape == (3, 3, 16, 16) and found.pixels.dtype == torch.uint8
    assert torch.equal(found.pixels, wanted) and len(wanted.flatten(1).unique(dim=0)) == 3
    assert torch.equal(images.read(0, 5).pixels[1:4], wanted)


def test_reconstructions_are_measured_against_their_originals() -> None:
    originals = Pictures()
    found = ReconstructedImages(tokenizer_of_16(), "vq", "d" * 64, originals).read(1, 4)
    wanted = per_image_error(found.pixels, originals.pixels[1:4])
    assert found.columns.keys() == wanted.keys() | {"original"} == {"psnr", "ssim", "mse", "original"}
    assert all(torch.equal(found.columns[name], wanted[name]) for name in wanted)
    assert torch.equal(found.columns["original"], image_digests(originals.pixels[1:4]))
    error = (found.pixels[2].double() - originals.pixels[3].double()) / 255
    assert float(found.columns["psnr"][2]) == pytest.approx(-10 * float(error.square().mean().log10()))


def test_reconstructions_tell_by_what_they_were_made() -> None:
    images = ReconstructedImages(tokenizer_of_16().to(torch.float64), "my-vq", "d" * 64, Pictures())
    assert images.name == "my-vq of pictures" and images.describe(3) == "the reconstruction of picture 3"
    assert images.facts == {
        "files": "none, reconstructed",
        "size": "16x16",
        "sampling": {"tokenizer": "my-vq", "checkpoint": "d" * 16, "dtype": "float64", "device": "cpu"},
    }


def test_what_decides_a_reconstruction_decides_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(digest: str = "d" * 64, dtype: torch.dtype = torch.float32, change: int = 0) -> str | None:
        originals = Pictures()
        originals.pixels[2, 1, 3, 4] ^= change
        tokenizer = tokenizer_of_16().to(dtype)
        return ReconstructedImages(tokenizer, "vq", digest, originals).identity(1, 4)

    known, digest = found(), "d" * 63 + "e"  # that differs beyond what is shown of it
    others = [found(digest=digest), found(dtype=torch.float64), found(change=1)]
    images = ReconstructedImages(tokenizer_of_16(), "vq", "d" * 64, Pictures())
    others += [images.identity(1, 3), images.identity(0, 3)]
    monkeypatch.setattr(sampled, "__version__", "0.0.0")
    others.append(images.identity(1, 4))
    assert __version__ != "0.0.0" and None not in others and len({known, *others}) == 7
    monkeypatch.undo()
    assert images.identity(1, 4) == known


def test_the_name_of_a_tokenizer_changes_nothing() -> None:
    first, second = (ReconstructedImages(tokenizer_of_16(), name, "d" * 64, Pictures()) for name in ("a", "b"))
    assert first.identity(0, 5) == second.identity(0, 5)


def test_reconstructions_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = MultiScaleVQ.decode

    def note(self: MultiScaleVQ, tokens: Sequence[Tensor]) -> Tensor:
        decoded.append(len(tokens[0]))
        return decode(self, tokens)

    monkeypatch.setattr(MultiScaleVQ, "decode", note)
    store, wanted = FeatureStore(tmp_path), {"fake": (Fake(), ("features",))}
    images = ReconstructedImages(tokenizer_of_16(), "vq", "d" * 64, Pictures())
    first, second = (extract(images, wanted, store, 2) for _ in range(2))
    assert decoded == [2, 2, 1]
    assert torch.equal(first.records["psnr"], second.records["psnr"]) and len(second.records["psnr"]) == 5


def test_reconstructing_adapts_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = MultiScaleVQ.encode

    def greedy(self: MultiScaleVQ, images: Tensor) -> list[Tensor]:
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return encode(self, images)

    images = ReconstructedImages(tokenizer_of_16(), "vq", "d" * 64, Pictures())
    wanted = images.read(0, 5)
    monkeypatch.setattr(MultiScaleVQ, "encode", greedy)
    found = images.read(0, 5)
    assert torch.equal(found.pixels, wanted.pixels) and found.columns.keys() == wanted.columns.keys()
    assert all(torch.equal(found.columns[name], wanted.columns[name]) for name in wanted.columns)


def test_images_of_another_size_than_the_tokenizers_are_refused(tmp_path: Path) -> None:
    originals = open_images(str(write_folder(tmp_path, each=1, side=10)))
    with pytest.raises(SettingError, match=r"the tokenizer takes 16x16 images, but .* has 10x10"):
        ReconstructedImages(tokenizer_of_16(), "vq", "d" * 64, originals)


# ---- loading tokenizers


def test_a_tokenizer_comes_from_a_pipeline_or_by_itself(saved: Path) -> None:
    wanted = tiny_pipeline().tokenizer.state_dict()
    for name in (saved, str(saved / "tokenizer")):
        tokenizer, folder = hub.load_tokenizer(name)
        assert isinstance(tokenizer, MultiScaleVQ) and folder == saved / "tokenizer" and not tokenizer.training
        assert all(torch.equal(tokenizer.state_dict()[key], wanted[key]) for key in wanted)


def test_a_bundled_tokenizer_is_found_by_its_models_name() -> None:
    tokenizer, folder = hub.load_tokenizer("fashion-var")
    assert folder == hub.ZOO / "fashion-var" / "tokenizer" and tokenizer.image_size == 28


def test_a_tokenizer_takes_the_dtype_and_keeps_its_codes(saved: Path) -> None:
    tokenizer, _ = hub.load_tokenizer(saved, dtype="bfloat16", device="cpu")
    assert tokenizer.quant_conv.weight.dtype == torch.bfloat16
    assert tokenizer.codebook.weight.dtype == torch.float32
    assert torch.equal(tokenizer.codebook.weight, tiny_pipeline().tokenizer.codebook.weight)


def test_what_is_no_tokenizer_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is a VAR, no tokenizer: use one of MultiScaleVQ"):
        hub.load_tokenizer(saved / "generator")
    with pytest.raises(SettingError, match="is a ImageClassifier, no tokenizer"):
        hub.load_tokenizer(hub.ZOO / "fashion-classifier")
    with pytest.raises(SettingError, match="unknown model 'nothing'"):
        hub.load_tokenizer("nothing")
    with pytest.raises(SettingError, match=r"holds no model_index\.json"):
        hub.load_tokenizer(tmp_path)
    with pytest.raises(SettingError, match="dtype is 'int3'"):
        hub.load_tokenizer(saved, dtype="int3")


def test_a_pipeline_without_tokenizer_has_none_to_load(tmp_path: Path) -> None:
    NextScalePipeline(None, tiny_pipeline().generator).save_pretrained(tmp_path / "m")
    with pytest.raises(SettingError, match=r"holds no tokenizer: name a pipeline that has one"):
        hub.load_tokenizer(tmp_path / "m")


@pytest.mark.parametrize("content", ["", "[]", '{"scales": [1]}', "no json", '{"_class_name": []}'])
def test_a_damaged_configuration_is_no_tokenizer(saved: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(saved / "tokenizer", tmp_path / "tokenizer")
    (folder / "config.json").write_text(content)
    with pytest.raises(SettingError, match="no tokenizer"):
        hub.load_tokenizer(folder)


def test_damaged_weights_of_a_tokenizer_are_named(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "tokenizer", tmp_path / "vq")
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"vq.*get the model again"):
        hub.load_tokenizer(folder)
