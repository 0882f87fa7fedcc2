"""`vgen sample` and `vgen merge` on runs that are stopped, divided and put together."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import Result, Run, python

from vgen.ledger import MANIFEST, RUN_FILE

FLAGS = ("--classes", "0,2", "--per-class", "3", "--seed", "7")
NAMES = [f"{i:06}_c{0 if i < 3 else 2:04}_s{7 + i}.png" for i in range(6)]


def content(folder: Path) -> dict[str, bytes]:
    """All files, the manifest without times."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    lines = [json.loads(line) | {"ms": 0} for line in found[MANIFEST].splitlines()]
    return found | {MANIFEST: json.dumps(lines).encode()}


def refused(result: Result, *says: str) -> None:
    assert result.code == 2 and result.out == "" and len(result.err.splitlines()) == 1, result
    assert all(part in result.err for part in says), result.err


def test_a_run_goes_on_and_says_what_it_did(run: Run, saved: Path) -> None:
    done = run("sample", saved, *FLAGS, "--out", "a", "--json")
    assert json.loads(done.out) == {"out": "a", "files": 6, "made": 6, "there": 0}
    Path("a", NAMES[4]).unlink()
    again = run("sample", saved, *FLAGS, "--out", "a", "--json")
    assert json.loads(again.out) == {"out": "a", "files": 6, "made": 1, "there": 5}
    assert run("sample", saved, *FLAGS, "--out", "a").out.splitlines() == [str(Path("a", name)) for name in NAMES]


def test_another_run_in_the_folder_is_wrong_usage(run: Run, saved: Path) -> None:
    run("sample", saved, *FLAGS, "--out", "a")
    before = content(Path("a"))
    refused(run("sample", saved, *FLAGS, "--out", "a", "--top-k", 3), "a holds another run", "settings", "--overwrite")
    assert content(Path("a")) == before
    assert run("sample", saved, *FLAGS, "--out", "a", "--top-k", 3, "--overwrite").code == 0
    assert content(Path("a")) != before


def test_four_shards_and_a_merge_are_one_run(run: Run, saved: Path) -> None:
    formats = ("--format", "png,npz,webdataset")
    run("sample", saved, *FLAGS, *formats, "--out", "one")
    for k in range(4):
        done = run("sample", saved, *FLAGS, *formats, "--out", f"part{k}", "--shard", f"{k}/4")
        assert done.code == 0 and all(f"part{k}" in line for line in done.out.splitlines())
    merged = run("merge", *(f"part{k}" for k in range(4)), "--out", "all")
    assert merged.code == 0 and len(merged.out.splitlines()) == 8
    assert content(Path("all")) == content(Path("one"))
    run("merge", *(f"part{k}" for k in range(4)), "--out", "all.npz")
    assert Path("all.npz").read_bytes() == Path("one", "samples.npz").read_bytes()
    refused(run("merge", "part0", "part1", "--out", "half"), "items 2, 3 are missing of 6")
    refused(run("merge", "nowhere", "--out", "x"), "nowhere holds no run.json")
    assert not Path("half").exists()


def test_two_processes_are_one_run(run: Run, saved: Path, tmp_path: Path) -> None:
    """torchrun divides a run and puts it together, its sheet too."""
    flags = [*FLAGS, "--format", "png,npz", "--batch-size", "2"]
    run("sample", saved, *flags, "--out", "one", "--sheet")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vgen.cli"]
    here = Path.cwd()
    done = python(
        *launcher, "sample", str(saved), *flags, "--out", "two", "--sheet",
        cwd=here, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="", HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [str(Path("two", name)) for name in [*NAMES, "samples.npz"]]
    assert content(Path("two")) == content(Path("one"))


def test_a_dry_run_prints_a_plan_and_writes_nothing(run: Run, saved: Path) -> None:
    done = run("sample", saved, *FLAGS, "--out", "a", "--shard", "1/4", "--dry-run")
    found = json.loads(done.out)
    assert found["items"] == 6 and found["items_by_shard"] == [2, 2, 1, 1] and found["items_of_this_shard"] == 2
    assert found["evaluations_per_item"] == 3 and found["seconds"] > 0 and found["bytes"] > 0
    assert found["run"]["settings"]["top_k"] == 0 and list(Path().iterdir()) == []


@pytest.mark.parametrize("flags", [("--batch-size", "auto"), ("--batch-size", "5", "--decode-batch-size", "2")])
def test_how_it_is_made_does_not_show(run: Run, saved: Path, flags: tuple[str, ...]) -> None:
    run("sample", saved, *FLAGS, "--out", "a")
    run("sample", saved, *FLAGS, "--out", "b", *flags)
    assert content(Path("a")) == content(Path("b"))


def test_formats_of_images(run: Run, saved: Path) -> None:
    done = run("sample", saved, *FLAGS, "--out", "a", "--format", "npz")
    assert done.out.splitlines() == [str(Path("a", "samples.npz"))]
    assert sorted(path.name for path in Path("a").iterdir()) == [MANIFEST, RUN_FILE, "samples.npz"]
    with np.load("a/samples.npz") as arrays:
        assert arrays["arr_0"].shape == (6, 8, 8, 3) and arrays["arr_1"].tolist() == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--shard", "4/4"), "shard is 4/4: write k/n, part k of n in 0..n-1"),
        (("--shard", "half"), "shard is 'half'"),
        (("--format", "bmp"), "unknown format 'bmp': use one or more of png, npz, webdataset"),
        (("--format", "mp4"), "unknown format 'mp4'"),
        (("--format", ","), "no format was named"),
        (("--fps", "5"), "have no frames per second: leave out --fps"),
        (("--batch-size", "many"), "--batch-size 'many': write a whole number, or auto"),
        (("--batch-size", "0"), "batch-size is 0"),
        (("--decode-batch-size", "0"), "--decode-batch-size is 0"),
        (("--sheet", "--shard", "0/2"), "a sheet is of a whole run"),
        (("--sheet", "--format", "npz"), "add png"),
        (("--classes", "9"), "class 9 is outside 0..2"),
    ],
)
def test_wrong_flags_are_named_and_make_no_folder(run: Run, saved: Path, flags: tuple[str, ...], says: str) -> None:
    refused(run("sample", saved, "--out", "a", *flags), says)
    assert list(Path().iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(run: Run, saved: Path) -> None:
    Path("a").mkdir(mode=0o500)
    done = run("sample", saved, "--out", "a")
    assert done.code == 1 and "Permission denied" in done.err and "Traceback" not in done.err


def test_a_file_in_place_of_the_folder_is_named(run: Run, saved: Path) -> None:
    Path("a").write_text("")
    done = run("sample", saved, "--out", "a")
    assert done.code == 1 and done.err.splitlines()[-1].startswith("vgen: ") and "Traceback" not in done.err


def test_a_manifest_cut_off_in_its_last_line_is_repaired(run: Run, saved: Path) -> None:
    run("sample", saved, *FLAGS, "--out", "a")
    manifest = Path("a", MANIFEST)
    manifest.write_bytes(manifest.read_bytes()[:-9])
    done = run("sample", saved, *FLAGS, "--out", "a", "--json")
    assert done.code == 0 and json.loads(done.out)["made"] == 1 and "was cut off and is removed" in done.err
