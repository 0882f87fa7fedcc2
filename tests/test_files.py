"""Reading files that anybody may have written; writing files that are whole or absent."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vgen.files import atomic_file, atomic_folder, read_tensors, safetensors_header, sha256
from vgen.types import CheckpointError

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}


class Trap:
    """Pickles into a call that would create a file if it were ever unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple:
        return (open, (str(self.victim), "w"))


# ---- writing


def test_an_atomic_file_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_file(target) as partial:
        partial.write_text("whole")
        assert not target.exists() and partial.parent == target.parent  # same file system: the rename is atomic
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, kind: type[BaseException]) -> None:
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(kind), atomic_file(target) as partial:
        partial.write_text("half")
        raise kind("stop")
    assert target.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_fills_up_at_the_end_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_file(tmp_path / "file.txt") as partial:
        partial.write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_written_files_get_ordinary_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as partial:
            partial.write_text("x")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_an_atomic_folder_replaces_the_old_one_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as partial:
        (partial / "old").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(target) as partial:
        (partial / "new").write_text("2")
        raise RuntimeError("stop")
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_folder(target) as partial:
        (partial / "new").write_text("2")
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]  # nothing of the old one is mixed in
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- reading


@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "torch"])
@pytest.mark.parametrize("name", ["state.safetensors", "state.pth", "lies.bin"])
def test_tensors_are_read_by_content_not_by_name(tmp_path: Path, name: str, write: Callable[..., None]) -> None:
    write(STATE, tmp_path / name)
    found = read_tensors(tmp_path / name)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) and found[key].dtype == STATE[key].dtype for key in STATE)


def test_the_old_torch_format_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path / "old.pth")["a"], STATE["a"])


def test_nested_checkpoints_keep_their_nesting(tmp_path: Path) -> None:
    torch.save({"trainer": {"vae_local": STATE}}, tmp_path / "run.pth")
    assert torch.equal(read_tensors(tmp_path / "run.pth")["trainer"]["vae_local"]["b"], STATE["b"])


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_never_run(tmp_path: Path, zipped: bool) -> None:
    victim, path = tmp_path / "victim", tmp_path / "trap.pth"
    torch.save({"a": STATE["a"], "trap": Trap(victim)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="never run"):
        read_tensors(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert victim.exists()


def test_a_bare_pickle_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "victim")))
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "trap.pkl")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "torch"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, write: Callable[..., None], keep: float) -> None:
    path = tmp_path / "cut.pth"
    write({"a": torch.randn(1000), "b": torch.randn(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 no zip", bytes(range(256)) * 40])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="noise"):
        read_tensors(path)


def test_a_lone_tensor_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "one.pth")
    with pytest.raises(CheckpointError, match="Tensor, not a dictionary"):
        read_tensors(tmp_path / "one.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_tensors(tmp_path / "none.pth")


def test_the_header_is_read_without_the_tensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "s", metadata={"who": "me"})
    header = safetensors_header(tmp_path / "s")
    assert header is not None
    assert header["a"]["shape"] == [2, 3] and header["__metadata__"] == {"who": "me"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 62) + b"{}",  # a length beyond the file
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)
def test_other_content_has_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    assert safetensors_header(tmp_path / "s") is None


def test_the_hash_covers_all_files_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"abc")
    second.write_bytes(b"def")
    assert sha256(first) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(first, second) != sha256(second, first)
