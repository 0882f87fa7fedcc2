"""What was made, on disk: files in one folder, and an index of them that can be searched.

Files are written before they are shown; the index can be rebuilt from them, since each carries its request.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vgen.types import Request

KEPT_DELETED_SECONDS = 7 * 24 * 3600.0  # until deleted files are removed from the disk
MOST = 200  # rows that a search gives
SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    path TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    words TEXT NOT NULL,
    request TEXT NOT NULL,
    created REAL NOT NULL,
    starred INTEGER NOT NULL DEFAULT 0,
    deleted REAL
);
CREATE INDEX IF NOT EXISTS by_owner ON items (owner, deleted, created);
"""


@dataclass(frozen=True)
class Entry:
    """A file of the library."""

    id: int
    path: Path
    kind: str  # "image" or "video"
    request: Request
    created: float
    starred: bool


class Library:
    """Files of all owners below one folder, and the index beside them. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.files = self.folder / "files"  # all that is served, to whoever knows its name: nothing else belongs here
        self.files.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(self.folder / "index.sqlite", check_same_thread=False)
        with self._writing() as database:
            database.executescript(SCHEMA)
        self.purge()

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def add(self, owner: str, path: Path, kind: str, request: Request, words: Sequence[str] = ()) -> int:
        """Enter a file that is there. `words` are what a search may find it by, beside its request."""
        text = " ".join([request.model, request.sampler or "", *(str(seed) for seed in request.seeds), *words]).lower()
        row = (owner, str(path.relative_to(self.folder)), kind, text, request.to_json(), time.time())
        with self._writing() as database:
            sql = "INSERT INTO items (owner, path, kind, words, request, created) VALUES (?, ?, ?, ?, ?, ?)"
            return int(database.execute(sql, row).lastrowid or 0)

    def search(self, owner: str, text: str = "", starred: bool = False, limit: int = MOST) -> list[Entry]:
        """An owner's files that have every word of `text`, the newest first."""
        where, values = ["owner = ?", "deleted IS NULL"], [owner]
        for word in text.lower().split()[:20]:
            where.append("words LIKE ? ESCAPE '\\'")
            values.append(f"%{_escape(word)}%")
        if starred:
            where.append("starred = 1")
        sql = f"SELECT id, path, kind, request, created, starred FROM items WHERE {' AND '.join(where)}"
        with self._lock:
            rows = self._database.execute(f"{sql} ORDER BY id DESC LIMIT ?", (*values, min(limit, MOST))).fetchall()
        return [entry for row in rows if (entry := self._entry(row)).path.is_file()]

    def get(self, owner: str, item: int) -> Entry | None:
        """An owner's file by its number; None where it is somebody else's, deleted or gone."""
        sql = (
            "SELECT id, path, kind, request, created, starred FROM items WHERE owner = ? AND id = ? AND deleted IS NULL"
        )
        with self._lock:
            row = self._database.execute(sql, (owner, item)).fetchone()
        entry = self._entry(row) if row else None
        return entry if entry is not None and entry.path.is_file() else None

    def star(self, owner: str, item: int, starred: bool) -> None:
        with self._writing() as database:
            database.execute("UPDATE items SET starred = ? WHERE owner = ? AND id = ?", (int(starred), owner, item))

    def delete(self, owner: str, items: Sequence[int]) -> float:
        """Hide files, which are removed a week later; returns the stamp that `restore` takes."""
        stamp = time.time()
        with self._writing() as database:
            for item in items:
                sql = "UPDATE items SET deleted = ? WHERE owner = ? AND id = ? AND deleted IS NULL"
                database.execute(sql, (stamp, owner, item))
        return stamp

    def restore(self, owner: str) -> int:
        """Undo an owner's last `delete`; how many files came back."""
        with self._writing() as database:
            sql = "SELECT MAX(deleted) FROM items WHERE owner = ?"
            (last,) = database.execute(sql, (owner,)).fetchone()
            if last is None:
                return 0
            sql = "UPDATE items SET deleted = NULL WHERE owner = ? AND deleted = ?"
            return database.execute(sql, (owner, last)).rowcount

    def purge(self, older_than: float = KEPT_DELETED_SECONDS) -> int:
        """Remove files that were deleted long ago from the disk; how many."""
        before = time.time() - older_than
        with self._writing() as database:
            rows = database.execute("SELECT id, path FROM items WHERE deleted < ?", (before,)).fetchall()
            for item, path in rows:
                (self.folder / path).unlink(missing_ok=True)
                database.execute("DELETE FROM items WHERE id = ?", (item,))
        return len(rows)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._database as database:
            yield database

    def _entry(self, row: tuple) -> Entry:
        item, path, kind, request, created, starred = row
        return Entry(item, self.folder / path, kind, Request.from_json(request), created, bool(starred))


def _escape(word: str) -> str:
    """A word as LIKE takes it literally."""
    for character in "\\%_":
        word = word.replace(character, f"\\{character}")
    return word
