"""Runs that can be left alone: whatever happens to them and however they are divided, the same files are there."""

import json
import os
import random
import signal
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vgen import batch
from vgen.batch import ImageFiles, Shard, VideoFiles, plan, sample_to_files
from vgen.ledger import MANIFEST, RUN_FILE, read_manifest
from vgen.media import read_request
from vgen.outputs import pixel_hash
from vgen.shards import merge
from vgen.types import Request, SettingError

ALL = ImageFiles(formats=("png", "npz", "webdataset"))
ITEMS = plan([4, 2, 7], 7, seed=100)


class Camera:
    """A pipeline whose pictures follow from seed and class; slow or out of memory where it is told to be."""

    makes_videos = False

    def __init__(self, pause: float = 0.0, fits: int = 1000, side: int = 6) -> None:
        self.pause, self.fits, self.side = pause, fits, side
        self.batches: list[int] = []

    def __call__(self, class_labels: Any, seeds: list[int], sampler: Any = None, **settings: Any) -> SimpleNamespace:
        self.batches.append(len(seeds))
        if len(seeds) > self.fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        time.sleep(self.pause * len(seeds))
        labels = class_labels or [0] * len(seeds)
        shape = (self.side, self.side, 3)
        draws = [np.random.default_rng(key) for key in zip(seeds, labels, strict=True)]
        made = [draw.integers(0, 256, shape, np.uint8) for draw in draws]
        return SimpleNamespace(images=[Image.fromarray(picture) for picture in made], evaluations=5)

    def request(self, labels: Any, seeds: list[int], sampler: Any, settings: dict) -> Request:
        return Request(model="camera", class_labels=labels, seeds=seeds, settings=settings, sampler=sampler, vgen="1")


class Film(Camera):
    makes_videos = True

    def __call__(self, class_labels: Any, seeds: list[int], sampler: Any = None, **settings: Any) -> SimpleNamespace:
        images = super().__call__(class_labels, seeds).images
        clips = [[image, image.transpose(Image.Transpose.ROTATE_90)] for image in images]
        return SimpleNamespace(frames=clips, evaluations=8)


def make(out: Path, camera: Camera | None = None, items: Sequence[Any] = ITEMS, **named: Any) -> batch.Made:
    named = {"settings": {}, "batch_size": 4, "files": ALL} | named
    return sample_to_files(camera or Camera(), items, out, **named)


def content(folder: Path) -> dict[str, bytes]:
    """All files, manifests without the time each item took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    for name in found:
        if name.startswith("manifest"):
            lines = [json.loads(line) for line in found[name].splitlines()]
            found[name] = json.dumps([line | {"ms": 0} for line in lines]).encode()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return content(folder)


# ---- what a run writes


def test_a_run_is_its_files_and_two_records(tmp_path: Path) -> None:
    done = make(tmp_path)
    names = [item.name for item in ITEMS]
    assert [path.name for path in done.paths] == [*names, "samples.npz", "samples.tar"]
    assert sorted(content(tmp_path)) == sorted([*names, "samples.npz", "samples.tar", MANIFEST, RUN_FILE])
    assert (done.made, done.there) == (21, 0)
    facts = json.loads((tmp_path / RUN_FILE).read_text())
    assert facts["items"] == 21 and facts["first_seed"] == 100 and facts["classes"] == [2, 4, 7]
    assert facts["model"] == "camera" and facts["formats"] == ["npz", "png", "webdataset"]
    lines = read_manifest(tmp_path / MANIFEST)
    assert [line["index"] for line in lines] == list(range(21))
    assert lines[9]["seed"] == 109 and lines[9]["class"] == 2 and lines[9]["evaluations"] == 5
    picture = Image.open(tmp_path / names[9])
    assert lines[9]["pixels"] == pixel_hash(picture) and list(lines[9]["files"]) == [names[9]]


def test_the_array_is_what_adm_reads(tmp_path: Path) -> None:
    make(tmp_path)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    assert pixels.shape == (21, 6, 6, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == [4] * 7 + [2] * 7 + [7] * 7
    for row, item in zip(pixels, ITEMS, strict=True):
        assert np.array_equal(row, np.array(Image.open(tmp_path / item.name)))
    make(tmp_path / "plain", items=plan(None, 3, 0))
    with np.load(tmp_path / "plain" / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]  # no classes, no labels


def test_the_archive_is_a_web_dataset(tmp_path: Path) -> None:
    make(tmp_path)
    with tarfile.open(tmp_path / "samples.tar") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert list(members) == [item.stem + suffix for item in ITEMS for suffix in (".png", ".json")]
    for item in ITEMS:
        assert members[f"{item.stem}.png"] == (tmp_path / item.name).read_bytes()
        wanted = {"index": item.index, "class": item.class_label, "seed": item.seed}
        assert json.loads(members[f"{item.stem}.json"]) == wanted


@pytest.mark.parametrize("formats", [("npz",), ("webdataset",), ("png", "npz")])
def test_only_what_was_asked_for_is_written(tmp_path: Path, whole: dict[str, bytes], formats: tuple[str, ...]) -> None:
    make(tmp_path, files=ImageFiles(formats=formats))
    found = content(tmp_path)
    assert any(name.endswith(".png") for name in found) == ("png" in formats)
    for name, suffix in (("npz", "npz"), ("webdataset", "tar")):
        assert (f"samples.{suffix}" in found) == (name in formats)
        assert name not in formats or found[f"samples.{suffix}"] == whole[f"samples.{suffix}"]


@pytest.mark.parametrize("size", [1, 5, 64, None])
def test_files_do_not_depend_on_the_batch(tmp_path: Path, whole: dict[str, bytes], size: int | None) -> None:
    make(tmp_path, batch_size=size)
    assert content(tmp_path) == whole


# ---- batches that find their size


def test_a_batch_that_does_not_fit_is_halved(
    tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    camera = Camera(fits=3)
    make(tmp_path, camera, batch_size=16)
    assert camera.batches == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    assert content(tmp_path) == whole
    assert "16 at a time do not fit in memory, going on with 8" in capsys.readouterr().err


def test_an_item_that_does_not_fit_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        make(tmp_path, Camera(fits=0), batch_size=4)


def test_other_errors_are_no_matter_of_memory(tmp_path: Path) -> None:
    class Broken(Camera):
        def __call__(self, *given: Any, **named: Any) -> Any:
            self.batches.append(1)
            raise RuntimeError("a bug")

    camera = Broken()
    with pytest.raises(RuntimeError, match="a bug"):
        make(tmp_path, camera)
    assert camera.batches == [1]


def test_auto_grows_while_larger_batches_are_faster(tmp_path: Path) -> None:
    class Overhead(Camera):
        """A call takes as long whatever its batch."""

        def __call__(self, *given: Any, **named: Any) -> Any:
            time.sleep(0.02)
            return super().__call__(*given, **named)

    camera = Overhead()
    make(tmp_path / "a", camera, items=plan([0], 200, 0), batch_size=None, files=ImageFiles(formats=("npz",)))
    assert camera.batches[:3] == [16, 32, 64]
    steady = Camera(pause=0.001)  # as long for each item
    make(tmp_path / "b", steady, items=plan([0], 200, 0), batch_size=None, files=ImageFiles(formats=("npz",)))
    assert max(steady.batches) <= 64 and sum(steady.batches) == 200


# ---- going on


def killed(work: Callable[[], Any], after: float, number: int = signal.SIGKILL) -> int:
    """Run `work` in a process of its own and send it a signal after so many seconds; its status."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            work()
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(after)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_files(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    chance = random.Random(0)
    stopped = 0
    for attempt in range(40):
        size = chance.choice([1, 2, 5])
        work = partial(make, tmp_path, Camera(pause=0.01), batch_size=size)
        stopped += killed(work, chance.uniform(0.005, 0.06)) == -signal.SIGKILL
        left = {path.name for path in tmp_path.glob("*.png")}
        for name in left:
            assert (tmp_path / name).read_bytes() == whole[name], attempt  # whole, or absent
        if stopped == 20:
            break
    camera = Camera()
    done = make(tmp_path, camera)
    assert done.made == sum(camera.batches) and done.made + done.there == 21
    assert content(tmp_path) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_writes_what_it_has_sampled(tmp_path: Path, whole: dict[str, bytes], number: int) -> None:
    status = killed(lambda: make(tmp_path, Camera(pause=0.02), batch_size=2), 0.2, number)
    assert status == 130
    lines = read_manifest(tmp_path / MANIFEST)
    assert 0 < len(lines) < 21 and len(lines) == len(list(tmp_path.glob("*.png")))
    camera = Camera()
    done = make(tmp_path, camera)
    assert (done.there, done.made) == (len(lines), 21 - len(lines)) and sum(camera.batches) == done.made
    assert content(tmp_path) == whole


def test_a_finished_run_makes_nothing_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != MANIFEST}
    camera = Camera()
    done = make(tmp_path, camera)
    assert camera.batches == [] and (done.made, done.there) == (0, 21) and len(done.paths) == 23
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != MANIFEST}
    assert content(tmp_path) == whole


def test_a_file_that_is_gone_is_made_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    make(tmp_path)
    (tmp_path / ITEMS[3].name).unlink()
    camera = Camera()
    assert make(tmp_path, camera).made == 1 and camera.batches == [1]
    found = content(tmp_path)
    found.pop(MANIFEST)
    assert found == {name: value for name, value in whole.items() if name != MANIFEST}


def test_a_line_that_was_cut_off_is_repaired_and_said(
    tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    manifest = tmp_path / MANIFEST
    raw = manifest.read_bytes()
    manifest.write_bytes(raw[:-30])
    assert make(tmp_path).made >= 1
    assert "the last line of" in capsys.readouterr().err
    assert len(read_manifest(manifest)) == 21


def test_damage_elsewhere_in_the_manifest_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    lines = (tmp_path / MANIFEST).read_text().splitlines(keepends=True)
    lines[4] = "{broken\n"
    (tmp_path / MANIFEST).write_text("".join(lines))
    with pytest.raises(SettingError, match=r"line 5 of .*manifest\.jsonl is damaged"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"settings": {"top_k": 3}}, r'settings \{\} there, \{"top_k": 3\} now'),
        ({"items": plan([4, 2, 7], 7, seed=1)}, r"first_seed 100 there, 1 now; plan"),
        ({"items": plan([4], 7, seed=100)}, r"classes \[2, 4, 7\] there, \[4\] now; items 21 there, 7 now"),
        ({"files": ImageFiles()}, r"formats .* there, \[\"png\"\] now"),
    ],
)
def test_the_folder_of_another_run_is_left_alone(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    make(tmp_path)
    before = content(tmp_path)
    with pytest.raises(SettingError, match=rf"holds another run \(.*{says}.*choose another --out, or --overwrite"):
        make(tmp_path, **changes)
    assert content(tmp_path) == before


def test_overwrite_replaces_another_run(tmp_path: Path, whole: dict[str, bytes]) -> None:
    make(tmp_path, items=plan([4, 2, 7], 9, seed=3))
    make(tmp_path, overwrite=True)
    found = content(tmp_path)
    assert {name: found[name] for name in whole} == whole  # pictures of other names are left


def test_a_full_disk_stops_a_run_that_goes_on_later(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = batch.Archive.put, []

    def put(self: Any, item: Any, *others: Any) -> Any:
        calls.append(item)
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        return real(self, item, *others)

    with monkeypatch.context() as patch:
        patch.setattr(batch.Archive, "put", put)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path)
    assert len(read_manifest(tmp_path / MANIFEST)) == 7
    make(tmp_path)
    assert content(tmp_path) == whole


def test_no_more_than_a_few_batches_wait_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is."""
    camera, ahead, real = Camera(), [], batch.PictureFiles.add
    written = []

    def add(self: Any, *given: Any) -> Any:
        time.sleep(0.005)
        written.append(given[0])
        ahead.append(sum(camera.batches) - len(written))
        return real(self, *given)

    monkeypatch.setattr(batch.PictureFiles, "add", add)
    make(tmp_path, camera, items=plan([0], 60, 0), batch_size=2, files=ImageFiles())
    assert max(ahead) <= 2 * (batch.WAITING + 2)


# ---- shards


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("apart", [True, False], ids=["folders of their own", "one folder"])
def test_shards_and_a_merge_give_the_files_of_one_run(
    tmp_path: Path, whole: dict[str, bytes], count: int, apart: bool
) -> None:
    folders = [tmp_path / (str(k) if apart else "all") for k in range(count)]
    made: list[Path] = []
    for k in reversed(range(count)):
        made += make(folders[k], shard=Shard(k, count)).paths
    pictures = sorted(path.name for path in made if path.suffix == ".png")
    assert pictures == [item.name for item in ITEMS]
    if apart:
        merge(folders, tmp_path / "all")
    else:
        merge(folders[:1])
    assert content(tmp_path / "all") == whole


def test_a_merged_folder_is_complete(tmp_path: Path) -> None:
    for k in range(3):
        make(tmp_path, shard=Shard(k, 3))
    merge([tmp_path])
    for part in (None, Shard(1, 3)):
        camera = Camera()
        assert make(tmp_path, camera, shard=part).made == 0 and camera.batches == []


def test_a_shard_goes_on_like_a_run(tmp_path: Path, whole: dict[str, bytes]) -> None:
    killed(lambda: make(tmp_path, Camera(pause=0.01), batch_size=1, shard=Shard(1, 2)), 0.05)
    for k in range(2):
        make(tmp_path, shard=Shard(k, 2))
    merge([tmp_path])
    assert content(tmp_path) == whole


def test_other_numbers_of_shards_may_finish_a_run(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Pictures are taken over from whoever made them."""
    png = ImageFiles()
    make(tmp_path, shard=Shard(0, 4), files=png)
    camera = Camera()
    make(tmp_path, camera, shard=Shard(0, 2), files=png)
    assert sum(camera.batches) == 5  # 2, 6, ... of 0, 2, 4, ...
    make(tmp_path, shard=Shard(1, 2), files=png)
    merge([tmp_path])
    assert [line["index"] for line in read_manifest(tmp_path / MANIFEST)] == list(range(21))
    assert all((tmp_path / item.name).read_bytes() == whole[item.name] for item in ITEMS)


@pytest.mark.parametrize("formats", [("png",), ("npz",)])
def test_merging_into_an_array_reads_what_there_is(
    tmp_path: Path, whole: dict[str, bytes], formats: tuple[str, ...]
) -> None:
    for k in range(3):
        make(tmp_path / str(k), shard=Shard(k, 3), files=ImageFiles(formats=formats))
    merge([tmp_path / str(k) for k in range(3)], tmp_path / "all.npz")
    assert (tmp_path / "all.npz").read_bytes() == whole["samples.npz"]


def test_what_is_missing_twice_or_damaged_is_named(tmp_path: Path) -> None:
    folders = [tmp_path / str(k) for k in range(3)]
    for k, folder in enumerate(folders):
        make(folder, shard=Shard(k, 3))
    with pytest.raises(SettingError, match=r"items 1, 4, 7, 10, 13 and 2 more are missing of 21"):
        merge([folders[0], folders[2]], tmp_path / "all")
    make(tmp_path / "again", shard=Shard(1, 3))
    with pytest.raises(SettingError, match=r"items 1, 4, 7, 10, 13 and 2 more are in both .*1 and .*again"):
        merge([*folders, tmp_path / "again"], tmp_path / "all")
    make(tmp_path / "other", shard=Shard(1, 3), settings={"top_k": 1})
    with pytest.raises(SettingError, match=r"other holds another run \(settings"):
        merge([folders[0], tmp_path / "other", folders[2]], tmp_path / "all")
    with pytest.raises(SettingError, match="say where to, with --out"):
        merge(folders)
    with pytest.raises(SettingError, match=r"holds no run\.json"):
        merge([tmp_path])
    (folders[1] / ITEMS[4].name).write_bytes(b"\x89PNG")
    with pytest.raises(SettingError, match=rf"{ITEMS[4].name} is not what was written"):
        merge(folders, tmp_path / "all")
    (folders[1] / ITEMS[4].name).unlink()
    with pytest.raises(SettingError, match=rf"{ITEMS[4].name} is gone"):
        merge(folders, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_damaged_array_is_named(tmp_path: Path) -> None:
    npz = ImageFiles(formats=("npz",))
    for k in range(2):
        make(tmp_path / str(k), shard=Shard(k, 2), files=npz)
    path = tmp_path / "1" / "samples.1-of-2.npz"
    raw = bytearray(path.read_bytes())
    raw[400] ^= 1
    path.write_bytes(raw)
    with pytest.raises((SettingError, zipfile.BadZipFile), match=r"item 1 in|Bad CRC"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "all.npz")
    assert not (tmp_path / "all.npz").exists()


@pytest.mark.parametrize("text", ["2/2", "0/0", "-1/2", "a/b", "1", "1/", "0/1000000"])
def test_shards_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"write k/n, part k of n in 0"):
        Shard.parse(text)


def test_more_shards_than_items_leave_some_with_nothing(tmp_path: Path) -> None:
    items = plan([1], 2, 0)
    for k in range(3):
        make(tmp_path, items=items, shard=Shard(k, 3), files=ImageFiles())
    merge([tmp_path])
    assert len(read_manifest(tmp_path / MANIFEST)) == 2


# ---- videos


def test_videos_go_on_and_merge_too(tmp_path: Path) -> None:
    items, files = plan([1, 2], 2, 0), VideoFiles(formats=("gif", "png", "npz"), fps=5)
    sample_to_files(Film(side=16), items, tmp_path / "one", settings={}, files=files)
    for k in range(2):
        sample_to_files(Film(side=16), items, tmp_path / str(k), settings={}, files=files, shard=Shard(k, 2))
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "all")
    one, joined = content(tmp_path / "one"), content(tmp_path / "all")
    assert one == joined and read_request(tmp_path / "all" / f"{items[3].stem}.gif").seeds == [3]
    film = Film(side=16)
    done = sample_to_files(film, items, tmp_path / "one", settings={}, files=files)
    assert film.batches == [] and done.there == 4
    with pytest.raises(SettingError, match="this run is of videos"):
        merge([tmp_path / "one"], tmp_path / "x.npz")


# ---- beforehand


def test_an_estimate_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = batch.estimate(Camera(pause=0.01), ITEMS, settings={}, files=ALL, shard=Shard(1, 4))
    assert list(tmp_path.iterdir()) == []
    assert found["items"] == 21 and found["items_by_shard"] == [6, 5, 5, 5] and found["items_of_this_shard"] == 5
    assert found["evaluations_per_item"] == 5 and 0.01 <= found["seconds_per_item"] < 0.5
    assert found["seconds"] == pytest.approx(5 * found["seconds_per_item"])
    assert found["bytes"] == 5 * found["bytes_per_item"] > 5 * 108
    with pytest.raises(SettingError, match="has none of the 21 items"):
        batch.estimate(Camera(), ITEMS, settings={}, shard=Shard(30, 40))


def test_a_sheet_needs_pictures_of_a_whole_run(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="add png"):
        make(tmp_path, files=ImageFiles(formats=("npz",)), sheet_columns=3)
    with pytest.raises(SettingError, match="not of shard 0/2"):
        make(tmp_path, shard=Shard(0, 2), sheet_columns=3)
    make(tmp_path)
    make(tmp_path, sheet_columns=7)  # of pictures that were there
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("formats", [(), ("jpg",), ("png", "mp4")])
def test_unknown_formats_are_refused(formats: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match="format"):
        ImageFiles(formats=formats)
