"""Features: the same whatever the batch, the chunk or the number of processes; and never computed twice."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, python
from torch import Tensor

from vgen.evaluation.features import Features, FeatureStore, Wanted, extract, space_of
from vgen.evaluation.images import Batch
from vgen.types import SettingError


class Fake:
    """An extractor of whole numbers, exact in any batch. It notes how many images it was given, for which layers."""

    name = "fake"
    layers: tuple[str, ...] = ("features", "spatial", "logits")

    def __init__(self, preferred_batch: int = 1000, limit: int = 1000, digest: str = "0" * 64, **protocol: str) -> None:
        self.preferred_batch, self.limit, self.digest, self.protocol = preferred_batch, limit, digest, protocol
        self.error: type[BaseException] = torch.OutOfMemoryError
        self.fails_after = 1_000_000  # images
        self.bad: dict[int, float] = {}  # by the value of an image's first pixel
        self.calls: list[tuple[int, tuple[str, ...]]] = []

    @property
    def sizes(self) -> list[int]:
        return [size for size, _ in self.calls]

    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        self.calls.append((len(images), tuple(layers)))
        if len(images) > self.limit:
            raise self.error("too much")
        if sum(self.sizes) > self.fails_after:
            raise KeyboardInterrupt
        found = {layer: self.exact(images, layer) for layer in self.layers}  # more than was asked for is fine
        for i, image in enumerate(images):
            if (value := self.bad.get(int(image[0, 0, 0]))) is not None:
                found["features"][i, 1] = value
        return found

    @staticmethod
    def exact(images: Tensor, layer: str) -> Tensor:
        sums = images.long().sum((2, 3)).float()
        return {"features": sums, "spatial": -sums, "logits": sums[:, :2] + 1}[layer]


class Pictures:
    """Images in memory, each with its own number as first pixel. They note what was read, and by which thread."""

    name = "pictures"
    labels = label_names = None

    def __init__(self, number: int, cheap: bool = True, known: bool = False) -> None:
        rng = torch.Generator().manual_seed(7)
        self.pixels = torch.randint(256, (number, 3, 4, 5), generator=rng, dtype=torch.uint8)
        self.pixels[:, 0, 0, 0] = torch.arange(number)
        self.cheap, self.known = cheap, known
        self.columns: tuple[str, ...] = ("cost",) if known else ()
        self.facts: dict[str, Any] = {"size": "5x4"}
        self.warnings: list[str] = []
        self.reads: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.broken = -1

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, start: int, stop: int) -> Batch:
        self.reads.append((start, stop))
        self.threads.add(threading.get_ident())
        if start <= self.broken < stop:
            raise SettingError(f"cannot read picture {self.broken}")
        columns = {"cost": torch.arange(start, stop, dtype=torch.float64)} if self.known else {}
        return Batch(self.pixels[start:stop], columns)

    def identity(self, start: int, stop: int) -> str | None:
        content = self.pixels[start:stop].numpy().tobytes()
        return hashlib.sha256(b"known" + content).hexdigest() if self.known else None

    def describe(self, index: int) -> str:
        return f"picture {index}"


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "cache")


def wanted(extractor: Any, *layers: str) -> Wanted:
    return {"fake": (extractor, layers or ("features",))}


def files(store: FeatureStore, extractor: Any, layer: str = "features") -> list[Path]:
    """What is kept of a layer, oldest first."""
    found = (store.folder / space_of(extractor, layer)).rglob("*.safetensors")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


# ---- the same figures


@pytest.mark.parametrize("preferred", [1, 3, 64])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 11, 100])
def test_features_do_not_depend_on_batches_or_chunks(store: FeatureStore, preferred: int, batch_size: int) -> None:
    images, extractor = Pictures(11), Fake(preferred)
    found = extract(images, wanted(extractor, "features", "logits"), store, batch_size)
    assert len(found) == 11
    for layer in ("features", "logits"):
        assert torch.equal(found.all(extractor, layer), Fake.exact(images.pixels, layer))
        blocks = list(found.blocks(extractor, layer))
        assert [len(block) for block in blocks] == [min(batch_size, 11 - i) for i in range(0, 11, batch_size)]
    assert max(extractor.sizes) <= min(preferred, batch_size) and sum(extractor.sizes) == 11


def test_several_extractors_share_one_reading(store: FeatureStore) -> None:
    images, first, second = Pictures(10), Fake(), Fake(digest="1" * 64)
    found = extract(images, {"a": (first, ("features",)), "b": (second, ("spatial",))}, store, 4)
    assert images.reads == [(0, 4), (4, 8), (8, 10)]
    assert torch.equal(found.all(first, "features"), Fake.exact(images.pixels, "features"))
    assert torch.equal(found.all(second, "spatial"), Fake.exact(images.pixels, "spatial"))


def test_the_content_is_that_of_the_images_in_order(store: FeatureStore) -> None:
    """A report names the set by it: the same however it was cut, another for any other pixel, order or number."""

    def content(pixels: Tensor, batch_size: int = 64) -> str:
        images = Pictures(len(pixels))
        images.pixels = pixels
        return extract(images, {}, store, batch_size).content

    pixels = Pictures(11).pixels
    whole = content(pixels)
    assert len(whole) == 64 and {content(pixels, size) for size in (1, 3, 11)} == {whole}
    other = pixels.clone()
    other[5, 2, 3, 4] ^= 1
    changed = [other, pixels.flip(0), pixels[:10], torch.cat([pixels, pixels[:1]]), pixels.flip(-1)]
    assert len({whole, *(content(item) for item in changed)}) == 6


def test_copies_have_equal_digests_and_no_others(store: FeatureStore) -> None:
    images = Pictures(9)
    images.pixels[6] = images.pixels[1]
    digests = extract(images, {}, store, 4).records["digest"]
    assert digests.shape == (9,) and digests.dtype == torch.int64
    assert digests[6] == digests[1] and len(digests.unique()) == 8


# ---- the cache


def test_a_second_run_extracts_nothing(store: FeatureStore) -> None:
    images, extractor = Pictures(11), Fake()
    first = extract(images, wanted(extractor), store, 4)
    again = Fake()
    second = extract(Pictures(11), wanted(again), store, 4)
    assert again.calls == [] and extractor.sizes == [4, 4, 3]
    assert torch.equal(first.all(extractor, "features"), second.all(again, "features"))
    assert first.content == second.content and first.keys == second.keys


def test_an_equal_chunk_is_extracted_once(store: FeatureStore) -> None:
    """The cache goes by content: the same images in another set, or twice in one."""
    images, extractor = Pictures(8), Fake()
    images.pixels[4:] = images.pixels[:4]
    found = extract(images, wanted(extractor), store, 4)
    assert extractor.sizes == [4]
    assert torch.equal(found.all(extractor, "features"), Fake.exact(images.pixels, "features"))


def test_images_of_one_content_in_another_shape_are_others(store: FeatureStore) -> None:
    images, extractor = Pictures(4), Fake()
    extract(images, wanted(extractor), store)
    images.pixels = images.pixels.reshape(4, 3, 5, 4)
    extract(images, wanted(extractor), store)
    assert extractor.sizes == [4, 4]


def test_only_missing_layers_are_asked_for(store: FeatureStore) -> None:
    images, extractor = Pictures(6), Fake()
    extract(images, wanted(extractor, "features"), store, 4)
    found = extract(images, wanted(extractor, "logits", "features", "spatial"), store, 4)
    assert extractor.calls == [(4, ("features",)), (2, ("features",)), *((n, ("logits", "spatial")) for n in (4, 2))]
    for layer in extractor.layers:
        assert torch.equal(found.all(extractor, layer), Fake.exact(images.pixels, layer))


def test_an_interrupted_run_continues_where_it_was(store: FeatureStore) -> None:
    images, extractor = Pictures(11), Fake()
    extractor.fails_after = 6
    with pytest.raises(KeyboardInterrupt):
        extract(images, wanted(extractor), store, 3)
    assert extractor.sizes == [3, 3, 3] and len(files(store, extractor)) == 2
    again = Fake()
    found = extract(images, wanted(again), store, 3)
    assert again.sizes == [3, 2]
    assert torch.equal(found.all(again, "features"), Fake.exact(images.pixels, "features"))


@pytest.mark.parametrize(
    "other",
    [
        Fake(digest="f" + "0" * 63),
        Fake(resize="clean", dtype="float32"),
        Fake(resize="legacy", dtype="bfloat16"),
        type("Other", (Fake,), {"name": "other"})(resize="legacy", dtype="float32"),
    ],
    ids=["weights", "resize", "dtype", "name"],
)
def test_what_computes_otherwise_has_a_space_of_its_own(store: FeatureStore, other: Fake) -> None:
    images, extractor = Pictures(5), Fake(resize="legacy", dtype="float32")
    extract(images, wanted(extractor), store)
    extract(images, wanted(other), store)
    assert other.sizes == [5]
    assert space_of(other, "features") != space_of(extractor, "features") != space_of(extractor, "logits")


@pytest.mark.parametrize("name", ["package.module:factory", "../up", "a/b", "a b"])
def test_spaces_are_single_folders(store: FeatureStore, name: str) -> None:
    extractor = Fake()
    extractor.name = name
    extract(Pictures(2), wanted(extractor), store)
    (file,) = files(store, extractor)
    assert file.parent.parent.parent == store.folder


def test_nothing_half_written_stays(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    images, extractor = Pictures(5), Fake()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("vgen.evaluation.features.save_file", full)
        extract(images, wanted(extractor), store)
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


DAMAGE: list[Callable[[bytes], bytes]] = [lambda data: data[:-5], lambda data: b"", lambda data: b"\xff" * len(data)]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "empty", "noise"])
def test_a_damaged_file_of_features_is_computed_again(store: FeatureStore, damage: Callable[[bytes], bytes]) -> None:
    images, extractor = Pictures(11), Fake()
    extract(images, wanted(extractor), store, 4)
    victim = files(store, extractor)[1]
    victim.write_bytes(damage(victim.read_bytes()))
    again = Fake()
    found = extract(images, wanted(again), store, 4)
    assert torch.equal(found.all(again, "features"), Fake.exact(images.pixels, "features"))
    assert again.sizes == [4]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "empty", "noise"])
def test_features_that_are_damaged_after_the_look_are_removed(
    store: FeatureStore, damage: Callable[[bytes], bytes]
) -> None:
    images, extractor = Pictures(11), Fake()
    found = extract(images, wanted(extractor), store, 4)
    victim = files(store, extractor)[1]
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(RuntimeError, match="were damaged and are removed: run again"):
        found.all(extractor, "features")
    assert not victim.exists()


def test_features_that_vanish_are_missed_not_skipped(store: FeatureStore) -> None:
    images, extractor = Pictures(11), Fake()
    found = extract(images, wanted(extractor), store, 4)
    files(store, extractor)[1].unlink()
    with pytest.raises(RuntimeError, match="were damaged and are removed: run again"):
        found.all(extractor, "features")
    found = extract(images, wanted(extractor), store, 4)
    assert torch.equal(found.all(extractor, "features"), Fake.exact(images.pixels, "features"))
    assert extractor.sizes == [4, 4, 3, 4]


# ---- images that are known before they are made


def test_images_that_cost_are_made_once(store: FeatureStore) -> None:
    images, extractor = Pictures(10, cheap=False, known=True), Fake()
    first = extract(images, wanted(extractor), store, 4)
    assert images.reads == [(0, 4), (4, 8), (8, 10)] and images.threads == {threading.get_ident()}
    assert first.records["cost"].tolist() == list(range(10))
    again = Pictures(10, cheap=False, known=True)
    second = extract(again, wanted(extractor), store, 4)
    assert again.reads == [] and extractor.sizes == [4, 4, 2]
    assert second.records.keys() == first.records.keys() == {"digest", "cost"}
    assert all(torch.equal(second.records[name], first.records[name]) for name in first.records)
    assert second.content == first.content
    assert torch.equal(second.all(extractor, "features"), Fake.exact(images.pixels, "features"))


def test_interrupted_making_continues_where_it_was(store: FeatureStore) -> None:
    images, extractor = Pictures(10, cheap=False, known=True), Fake()
    images.broken = 9
    with pytest.raises(SettingError, match="picture 9"):
        extract(images, wanted(extractor), store, 4)
    images.broken, images.reads = -1, []
    found = extract(images, wanted(extractor), store, 4)
    assert images.reads == [(8, 10)] and extractor.sizes == [4, 4, 2]
    assert found.records["cost"].tolist() == list(range(10))


def test_another_extractor_makes_them_again_and_keeps_the_record(store: FeatureStore) -> None:
    images, extractor = Pictures(4, cheap=False, known=True), Fake()
    extract(images, wanted(extractor), store)
    other = Fake(digest="1" * 64)
    found = extract(images, wanted(other), store)
    assert images.reads == [(0, 4)] * 2 and other.sizes == [4] and extractor.sizes == [4]
    assert found.records["cost"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "empty", "noise"])
def test_a_damaged_record_is_made_again(store: FeatureStore, damage: Callable[[bytes], bytes]) -> None:
    images, extractor = Pictures(10, known=True), Fake()
    first = extract(images, wanted(extractor), store, 4)
    victim = next((store.folder / "records").rglob("*.safetensors"))
    victim.write_bytes(damage(victim.read_bytes()))
    for read_again in (True, False):
        images.reads = []
        second = extract(images, wanted(extractor), store, 4)
        assert bool(images.reads) is read_again and extractor.sizes == [4, 4, 2]
        assert second.content == first.content and second.records["cost"].tolist() == list(range(10))


def test_a_record_without_what_is_measured_now_is_made_again(store: FeatureStore) -> None:
    """An older version measured less; its images and their features are the same."""
    images, extractor = Pictures(6, known=True), Fake()
    extract(images, wanted(extractor), store, 4)
    for path in (store.folder / "records").rglob("*.safetensors"):
        store.save("records", path.stem, {"digest": load_file(path)["digest"]})
    found = extract(images, wanted(extractor), store, 4)
    assert found.records["cost"].tolist() == list(range(6)) and extractor.sizes == [4, 2]
    images.reads = []
    assert extract(images, wanted(extractor), store, 4).records["cost"].tolist() == list(range(6))
    assert images.reads == []


# ---- features that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_name_the_image_and_keep_the_rest(store: FeatureStore, value: float) -> None:
    images, extractor = Pictures(11), Fake(preferred_batch=2)
    extractor.bad = {6: value, 7: value, 10: value}
    says = r"fake gave features .* not finite for 2 images, first picture 6: .* features extracted so far are kept"
    with pytest.raises(SettingError, match=says) as caught:
        extract(images, wanted(extractor), store, 4)
    assert "\n" not in str(caught.value)
    assert len(files(store, extractor)) == 1  # of the chunk before
    healed = Fake()
    found = extract(images, wanted(healed), store, 4)
    assert healed.sizes == [4, 3]
    assert torch.equal(found.all(healed, "features"), Fake.exact(images.pixels, "features"))


# ---- memory


def test_batches_are_halved_until_they_fit(store: FeatureStore) -> None:
    images, extractor = Pictures(20), Fake(preferred_batch=64, limit=3)
    found = extract(images, wanted(extractor), store, 10)
    assert extractor.sizes == [10, 5, 2, 2, 2, 2, 2, *[2] * 5]  # what fitted once is remembered
    assert torch.equal(found.all(extractor, "features"), Fake.exact(images.pixels, "features"))


def test_memory_that_ends_in_the_middle_costs_no_image(store: FeatureStore) -> None:
    """What was extracted of the chunk before memory ran out is neither lost nor taken twice."""

    class Shrinking(Fake):
        def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
            self.limit = 4 if len(self.calls) < 2 else 1
            return super().__call__(images, layers)

    images, extractor = Pictures(12), Shrinking(preferred_batch=4)
    found = extract(images, wanted(extractor), store, 12)
    assert extractor.sizes == [4, 4, 4, 2, 1, 1, 1, 1]
    assert torch.equal(found.all(extractor, "features"), Fake.exact(images.pixels, "features"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_does_not_suffice_for_one_image_is_an_error(
    store: FeatureStore, error: type[BaseException]
) -> None:
    extractor = Fake(limit=0)
    extractor.error = error
    with pytest.raises(error):
        extract(Pictures(5), wanted(extractor), store)
    assert extractor.sizes == [5, 2, 1]


def test_other_errors_are_not_tried_again(store: FeatureStore) -> None:
    extractor = Fake(limit=2)
    extractor.error = RuntimeError
    with pytest.raises(RuntimeError, match="too much"):
        extract(Pictures(5), wanted(extractor), store)
    assert extractor.sizes == [5]


def test_memory_of_the_cpu_is_memory_too(store: FeatureStore) -> None:
    class Greedy(Fake):
        def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
            found = super().__call__(images, layers)
            torch.empty(10**17 if len(images) > 2 else 1)
            return found

    images, extractor = Pictures(5), Greedy()
    found = extract(images, wanted(extractor), store)
    assert torch.equal(found.all(extractor, "features"), Fake.exact(images.pixels, "features"))


# ---- reading ahead


def test_every_chunk_is_read_once_and_ahead_where_that_is_cheap(store: FeatureStore) -> None:
    images, extractor = Pictures(11), Fake()
    found = extract(images, wanted(extractor), store, 3)
    assert images.reads == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert threading.get_ident() not in images.threads
    assert torch.equal(found.all(extractor, "features"), Fake.exact(images.pixels, "features"))


def test_the_next_chunk_is_read_while_this_one_is_extracted(store: FeatureStore) -> None:
    images = Pictures(9)

    class Waiting(Fake):
        """Extraction of the first chunk ends only when the second was read."""

        def __call__(self, images_: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
            if not self.calls:
                assert read.wait(20)
            return super().__call__(images_, layers)

    read, original = threading.Event(), images.read

    def note(start: int, stop: int) -> Batch:
        if start == 3:
            read.set()
        return original(start, stop)

    images.read = note  # type: ignore[method-assign]
    extract(images, wanted(Waiting()), store, 3)
    assert len(images.reads) == 3


@pytest.mark.parametrize("cheap", [True, False])
def test_errors_of_reading_arrive_with_the_work_before_kept(store: FeatureStore, cheap: bool) -> None:
    images, extractor = Pictures(9, cheap), Fake()
    images.broken = 4
    with pytest.raises(SettingError, match="cannot read picture 4"):
        extract(images, wanted(extractor), store, 3)
    assert extractor.sizes == [3] and len(files(store, extractor)) == 1


# ---- several processes

RANK_PROGRAM = """
import sys
from pathlib import Path

import torch
from test_features import Fake, Pictures, wanted

from vgen.evaluation.features import FeatureStore, extract, processes

for known in (False, True):
    for number in (3, 11):
        images, extractor = Pictures(number, cheap=not known, known=known), Fake(preferred_batch=3)
        store = FeatureStore(Path(f"cache-{known}-{number}"))
        found = extract(images, wanted(extractor, "features", "logits"), store, 4)
        result = {"features": found.all(extractor, "features"), "logits": found.all(extractor, "logits")}
        result |= {"content": found.content, "keys": found.keys, "records": found.records, "length": len(found)}
        result |= {"reads": images.reads, "sizes": extractor.sizes}
        torch.save(result, f"rank{processes().process_index}-{known}-{number}.pt")
"""


def same(features: Features, extractor: Fake, result: dict[str, Any]) -> bool:
    return (
        all(torch.equal(result[layer], features.all(extractor, layer)) for layer in ("features", "logits"))
        and (result["content"], result["keys"], result["length"]) == (features.content, features.keys, len(features))
        and result["records"].keys() == features.records.keys()
        and all(torch.equal(result["records"][name], features.records[name]) for name in features.records)
    )


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    """11 images in chunks of 4, a multiple of nothing; and 3 images, which leave the second process without work."""
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(
        *launcher, "program.py", cwd=tmp_path, path=[ROOT, ROOT / "tests"], CUDA_VISIBLE_DEVICES="", HOME=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for known in (False, True):
        for number, shares in ((11, [[(0, 4), (8, 11)], [(4, 8)]]), (3, [[(0, 3)], []])):
            images, extractor = Pictures(number, cheap=not known, known=known), Fake()
            store = FeatureStore(tmp_path / f"alone-{known}-{number}")
            alone = extract(images, wanted(extractor, "features", "logits"), store, 4)
            for rank in range(2):
                result = torch.load(tmp_path / f"rank{rank}-{known}-{number}.pt")
                assert same(alone, extractor, result)
                assert result["reads"] == shares[rank]  # every image by one process, none twice
                assert sum(result["sizes"]) == sum(stop - start for start, stop in shares[rank])
