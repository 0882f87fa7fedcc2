"""What a run of samples is and what of it is there, in files that outlive the process.

run.json says what makes the run's files what they are; manifest.jsonl has a line for each finished item. Shards of a
run write manifests of their own, which are joined once all is done. Lines are appended after the files they tell of are
whole, so that whatever happens at worst an item is made twice.
"""

import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.files import atomic_file
from vgen.types import SettingError

RUN_FILE = "run.json"
MANIFEST = "manifest.jsonl"
SHARD_MANIFEST = re.compile(r"manifest\.\d+-of-\d+\.jsonl")
MAX_SHARDS = 100_000
MAX_SHOWN = 5  # differences in a message

Line = dict[str, Any]  # index, class, seed, pixels (sha256), files (name: sha256), evaluations, ms


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of a run: the items whose index leaves that remainder. Raises SettingError."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_SHARDS or not 0 <= self.index < self.count:
            raise SettingError(
                f"shard is {self.index}/{self.count}: write k/n, part k of n in 0..n-1, as 0/4, 1/4, 2/4 and 3/4"
            )

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From "k/n"."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if not found:
            raise SettingError(f"shard is {text!r}: write k/n, part k of n in 0..n-1, as 0/4, 1/4, 2/4 and 3/4")
        return cls(int(found[1]), int(found[2]))

    @property
    def infix(self) -> str:
        """What its files have in their names."""
        return "" if self.count == 1 else f".{self.index}-of-{self.count}"

    @property
    def manifest(self) -> str:
        """The name of its list of what is done."""
        return f"manifest{self.infix}.jsonl"

    def takes(self, index: int) -> bool:
        """Whether item `index` of the run is its to make."""
        return index % self.count == self.index


class Ledger:
    """The files of one shard's progress, in a folder that may hold other shards too.

    Args:
        folder: of the run; made where it is not there.
        facts: what decides the files of the whole run, as JSON can hold it.
        shard: whose lines are added.
        overwrite: forget what the folder holds of any run.

    Raises SettingError where the folder holds another run, naming what differs.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], shard: Shard, overwrite: bool = False) -> None:
        self.folder, self.facts, self.path = folder, facts, folder / shard.manifest
        self.overwrite, self.begun = overwrite, False
        if not overwrite:
            check_same(folder, facts)
        self.lines = {} if overwrite else {line["index"]: line for line in read_all(folder)}

    def begin(self) -> None:
        """Make the folder's records, now that there is something to put in: a run that is refused leaves nothing."""
        if self.begun:
            return
        if self.overwrite:
            forget(self.folder)
        if not (self.folder / RUN_FILE).is_file():
            with atomic_file(self.folder / RUN_FILE) as partial:
                partial.write_text(json.dumps(self.facts, indent=1, sort_keys=True) + "\n")
        self.begun = True

    def add(self, lines: Iterable[Line]) -> None:
        """Append lines of finished items, whole and on the disk when this returns."""
        self.begin()
        added = list(lines)
        with self.path.open("a") as file:
            file.write(_text(added))
            file.flush()
            os.fsync(file.fileno())
        self.lines |= {line["index"]: line for line in added}

    def join(self) -> None:
        """One manifest, in order, in place of all that the folder has; for a complete run."""
        found = {line["index"]: line for line in read_all(self.folder)}
        write_manifest(self.folder, [found[index] for index in sorted(found)])


def check_same(folder: Path, facts: dict[str, Any]) -> None:
    """Raise SettingError where a folder holds a run of other facts."""
    path = folder / RUN_FILE
    if not path.is_file():
        return
    there = read_facts(folder)
    differing = [name for name in sorted(there.keys() | facts.keys()) if there.get(name) != facts.get(name)]
    if differing:
        shown = [f"{name} {_short(there.get(name))} there, {_short(facts.get(name))} now" for name in differing]
        more = f", and {len(shown) - MAX_SHOWN} more" if len(shown) > MAX_SHOWN else ""
        raise SettingError(
            f"{folder} holds another run ({'; '.join(shown[:MAX_SHOWN])}{more}): choose another --out, or --overwrite"
        )


def read_facts(folder: Path) -> dict[str, Any]:
    """What run.json says. Raises SettingError where there is none that vgen wrote."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise SettingError(f"{folder} holds no {RUN_FILE}: it is no folder that 'vgen sample' wrote")
    try:
        facts = json.loads(path.read_text())
    except (ValueError, RecursionError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is damaged: choose another --out, or --overwrite") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("items"), int):
        raise SettingError(f"{path} was not written by vgen: choose another --out, or --overwrite")
    return facts


def read_all(folder: Path) -> list[Line]:
    """The lines of all manifests in a folder, a last line that was cut off left out and removed."""
    return [line for path in manifests(folder) for line in read_manifest(path)]


def manifests(folder: Path) -> list[Path]:
    """The lists of what is done in a folder, of a whole run or of its parts; none where there is no such folder."""
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.glob("manifest*.jsonl"))
    return [folder / name for name in names if name == MANIFEST or SHARD_MANIFEST.fullmatch(name)]


def read_manifest(path: Path) -> list[Line]:
    """The lines of one manifest. A broken last line, left by a process that was killed, is cut off, and said.

    Raises SettingError for any other damage.
    """
    raw = path.read_bytes()
    lines: list[Line] = []
    place = 0
    while place < len(raw):
        end = raw.find(b"\n", place) + 1
        line = _parse(raw[place:end]) if end else None
        if line is None:
            if end and end < len(raw):
                raise SettingError(f"line {len(lines) + 1} of {path} is damaged: remove it, or use --overwrite")
            print(f"vgen: the last line of {path} was cut off and is removed", file=sys.stderr)
            os.truncate(path, place)
            break
        lines.append(line)
        place = end
    return lines


def _parse(raw: bytes) -> Line | None:
    """A line, or None for what is no line of ours."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("index"), int) or not isinstance(line.get("files"), dict):
        return None
    return line


def write_manifest(folder: Path, lines: Iterable[Line]) -> None:
    """A folder's one manifest, in place of all that it has."""
    with atomic_file(folder / MANIFEST) as partial:
        partial.write_text(_text(lines))
    for path in manifests(folder):
        if path.name != MANIFEST:
            path.unlink(missing_ok=True)


def _text(lines: Iterable[Line]) -> str:
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)


def forget(folder: Path) -> None:
    """Remove what says that a folder holds a run, and its files of many items; the others are replaced one by one."""
    large = (path for pattern in ("samples*.npz", "samples*.tar", ".samples*") for path in folder.glob(pattern))
    for path in (*manifests(folder), folder / RUN_FILE, *large):
        path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
