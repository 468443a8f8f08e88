"""Answers on disk, so that a resumed or repeated step asks nothing twice.

One sqlite table; reads come in batches, writes are collected and committed together. Several processes may share a
file, also on a network file system with working locks (hence no write-ahead log). Failures are never stored.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import orjson

from megatron_sip.judge.calls import Answer

_BATCH = 500  # keys in one SELECT; sqlite allows more, but long statements gain nothing
FLUSH_SECONDS = 2.0
"""What a killed process loses at most."""


class CacheError(RuntimeError):
    """A cache file that cannot be used; the message names it."""


def cache_key(material: bytes) -> bytes:
    return hashlib.blake2b(material, digest_size=16).digest()


class AnswerCache:
    """A persistent dict of answers. `max_entries` bounds the file: the oldest entries go when it is opened.

    A `path` that is a folder, or has no suffix, gets a file `answers.sqlite` inside. Raises CacheError when the file
    cannot be opened as a database.
    """

    def __init__(self, path: Path, max_entries: int = 20_000_000, pending_limit: int = 2_000) -> None:
        self._pending: dict[bytes, bytes] = {}
        self._pending_limit = pending_limit
        self._flushed_at = time.monotonic()
        if path.is_dir() or (not path.suffix and path.name != ":memory:"):
            path = path / "answers.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB NOT NULL, made INTEGER NOT NULL)"
            )
            self._prune(max_entries)
        except sqlite3.Error as error:
            raise CacheError(f"judge cache {path}: {error}; move the file away or name another one") from error

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """The stored answers among `keys`; keys without one are left out."""
        found = {key: self._pending[key] for key in keys if key in self._pending}
        for begin in range(0, len(keys), _BATCH):
            part = keys[begin : begin + _BATCH]
            marks = ",".join("?" * len(part))
            found.update(self._db.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", part))
        return {key: orjson.loads(value) for key, value in found.items()}

    def put_many(self, entries: Iterable[tuple[bytes, Answer]]) -> None:
        """Remember answers; they reach the disk at `flush`, after `pending_limit` of them, or after FLUSH_SECONDS."""
        for key, answer in entries:
            self._pending[key] = orjson.dumps(answer)
        if len(self._pending) >= self._pending_limit or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit what was put."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        now = int(time.time())
        rows = [(key, value, now) for key, value in self._pending.items()]
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
        self._db.execute("COMMIT")
        self._pending.clear()

    def close(self) -> None:
        self.flush()
        self._db.close()

    def _prune(self, max_entries: int) -> None:
        (count,) = self._db.execute("SELECT COUNT(*) FROM answers").fetchone()
        if count > max_entries:
            self._db.execute(
                "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY made, key LIMIT ?)",
                (count - max_entries,),
            )
