"""The studio's library: what was made is found, starred, deleted and brought back, each owner's apart."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vgen.app.library import Library
from vgen.types import Request


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    made = Library(tmp_path)
    yield made
    made.close()


def put(library: Library, name: str, owner: str = "a", words: tuple[str, ...] = (), **request: object) -> int:
    path = library.files / owner / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"a picture")
    given: dict = {"model": "fashion-var", "class_labels": [3], "seeds": [7], "sampler": "next-scale"} | request
    return library.add(owner, path, "image", Request(**given), words)


def names(library: Library, text: str = "", owner: str = "a", starred: bool = False) -> list[str]:
    return [entry.path.name for entry in library.search(owner, text, starred)]


def test_the_newest_come_first_with_their_requests(library: Library) -> None:
    put(library, "one.png")
    put(library, "two.png", seeds=[8])
    assert names(library) == ["two.png", "one.png"]
    assert library.search("a")[0].request.seeds == [8]


def test_every_word_must_be_found(library: Library) -> None:
    put(library, "bag.png", words=("bag",), seeds=[12])
    put(library, "boot.png", words=("ankle boot",), model="fashion-maskgit", sampler="halton")
    assert names(library, "boot") == names(library, "HALTON mask") == ["boot.png"]
    assert names(library, "bag 12") == ["bag.png"] and names(library, "bag halton") == []
    assert names(library, "%") == names(library, "_") == names(library, "\\") == []  # no wildcards
    assert names(library, "'; DROP TABLE items; --") == [] and len(names(library)) == 2


def test_stars(library: Library) -> None:
    first = put(library, "one.png")
    put(library, "two.png")
    library.star("a", first, True)
    library.star("b", first, False)  # not theirs
    assert names(library, starred=True) == ["one.png"]
    library.star("a", first, False)
    assert names(library, starred=True) == []


def test_what_is_deleted_comes_back_by_one_undo_for_each_deletion(library: Library) -> None:
    one, two, three = (put(library, f"{name}.png") for name in ("one", "two", "three"))
    library.delete("a", [one, two])
    library.delete("a", [three])
    assert names(library) == [] and library.get("a", one) is None
    assert library.restore("a") == 1 and names(library) == ["three.png"]
    assert library.restore("a") == 2 and names(library) == ["three.png", "two.png", "one.png"]
    assert library.restore("a") == 0


def test_owners_are_kept_apart(library: Library) -> None:
    item = put(library, "one.png")
    assert names(library, owner="b") == [] and library.get("b", item) is None
    library.delete("b", [item])
    assert library.restore("b") == 0 and names(library) == ["one.png"]


def test_only_what_was_deleted_long_ago_leaves_the_disk(library: Library) -> None:
    kept, gone = put(library, "kept.png"), put(library, "gone.png")
    library.delete("a", [gone])
    assert library.purge() == 0 and (library.files / "a" / "gone.png").is_file()
    assert library.purge(older_than=-1) == 1
    assert not (library.files / "a" / "gone.png").exists() and library.restore("a") == 0
    assert library.get("a", kept) is not None


def test_the_index_is_there_after_a_restart_and_files_that_vanished_are_left_out(tmp_path: Path) -> None:
    library = Library(tmp_path)
    put(library, "one.png")
    put(library, "two.png")
    library.close()
    (tmp_path / "files" / "a" / "two.png").unlink()
    library = Library(tmp_path)
    assert names(library) == ["one.png"]
    library.close()
