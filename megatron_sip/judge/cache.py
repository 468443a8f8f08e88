"""Answers on disk, so that a resumed or repeated step asks nothing twice.

One sqlite table; reads come in batches, writes are collected and committed together. Several processes may share a
file, also on a network file system with working locks (hence no write-ahead log). Failures are never stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import orjson

from megatron_sip.errors import UserError
from megatron_sip.judge.calls import Answer

log = logging.getLogger(__name__)

_BATCH = 500  # keys in one SELECT; sqlite allows more, but long statements gain nothing
FLUSH_SECONDS = 2.0
"""What a killed process loses at most."""
LOCK_SECONDS = 5.0
"""How long another process's lock is waited for; requests wait as well."""
ASIDE_SECONDS = 60.0
KEPT_IN_MEMORY = 200_000
"""Answers that wait for the file to be usable again."""
COLUMNS = ["key", "value", "made"]
PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
"""Errors that say nothing about the file's content."""


class CacheError(UserError, RuntimeError):
    """A cache file that cannot be used; the message names it."""


def cache_key(material: bytes) -> bytes:
    return hashlib.blake2b(material, digest_size=16).digest()


class AnswerCache:
    """A persistent dict of answers. `max_entries` bounds the file: beyond it the oldest go, a few with each commit.

    A `path` that is a folder, or has no suffix, gets a file `answers.sqlite` inside. Where the file cannot be used for now
    (a full disk, another process that keeps it locked) the cache steps aside for ASIDE_SECONDS: nothing is found and what
    is put waits in memory. `counts` says how often ("cache-failures") and what did not fit there ("cache-lost"); a value
    that cannot be read counts as not there ("cache-unreadable"). The first of each is logged.

    Raises CacheError when the file is no database of answers.
    """

    def __init__(
        self,
        path: Path,
        max_entries: int = 20_000_000,
        pending_limit: int = 2_000,
        counts: Counter[str] | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter() if counts is None else counts
        self._pending: dict[bytes, bytes] = {}
        self._pending_limit = pending_limit
        self._flushed_at = time.monotonic()
        self._aside_until = 0.0
        if path.is_dir() or (not path.suffix and path.name != ":memory:"):
            path = path / "answers.sqlite"
        self._path = path
        self._max_entries = max_entries
        self._opened = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False, isolation_level=None)
            with self._steps_aside():
                self._open()
        except (sqlite3.Error, OSError) as error:
            raise CacheError(f"judge cache {path}: {error}; move the file away or name another one") from error

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """The stored answers among `keys`; keys without one are left out."""
        found = {key: self._pending[key] for key in keys if key in self._pending}
        with self._steps_aside() as usable:
            for begin in range(0, len(keys) if usable else 0, _BATCH):
                part = keys[begin : begin + _BATCH]
                marks = ",".join("?" * len(part))
                found.update(self._db.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", part))
        answers = {key: self._read(value) for key, value in found.items()}
        return {key: answer for key, answer in answers.items() if answer is not None}

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
        with self._steps_aside() as usable:
            if usable:
                self._write(rows)
                self._pending.clear()
        while len(self._pending) > KEPT_IN_MEMORY:
            self._pending.pop(next(iter(self._pending)))
            self.counts["cache-lost"] += 1

    def close(self) -> None:
        """Flush, and close the file."""
        self.flush()
        if self._pending:
            log.warning("judge cache %s: %d answers could not be kept", self._path, len(self._pending))
        self._db.close()

    def _open(self) -> None:
        """Make or check the table. Raises sqlite3.Error, CacheError."""
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB NOT NULL, made INTEGER NOT NULL)"
        )
        columns = [name for _, name, *_ in self._db.execute("PRAGMA table_info(answers)")]
        if columns != COLUMNS:
            raise CacheError(
                f"judge cache {self._path} has a table of answers with the columns {', '.join(columns)}, not "
                f"{', '.join(COLUMNS)}: it is of another program or version; move the file away or name another one"
            )
        self._opened = True

    def _write(self, rows: Sequence[tuple[bytes, bytes, int]]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
            self._prune(2 * len(rows))
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _steps_aside(self) -> Iterator[bool]:
        """Whether the file may be used now; what it refuses meanwhile keeps it from being asked again for a while."""
        if time.monotonic() < self._aside_until:
            yield False
            return
        try:
            if not self._opened and self._aside_until:
                self._open()
            yield True
        except sqlite3.Error as error:
            if not self._opened and not self._aside_until and _primary_code(error) not in PASSING:
                raise
            self._aside_until = time.monotonic() + ASIDE_SECONDS
            self._count("cache-failures", f"is left aside, and tried again every {ASIDE_SECONDS:.0f} s: {error}")

    def _read(self, value: bytes) -> Answer:
        try:
            answer = orjson.loads(value)
        except (orjson.JSONDecodeError, TypeError):
            answer = None
        if isinstance(answer, int | float | list):
            return answer
        self._count("cache-unreadable", "holds a value that is no answer; it is asked for again")
        return None

    def _count(self, name: str, told: str) -> None:
        self.counts[name] += 1
        if self.counts[name] == 1:  # the first of its kind is worth a line, not a flood
            log.warning("judge cache %s %s", self._path, told)

    def _prune(self, most: int) -> None:
        """Remove the oldest rows beyond the bound, at most so many: all the work waits meanwhile. Row numbers grow as rows are
        written, and say without a scan how many there are at most."""
        (first,) = self._db.execute("SELECT MIN(rowid) FROM answers").fetchone()
        (last,) = self._db.execute("SELECT MAX(rowid) FROM answers").fetchone()
        beyond = last - first + 1 - self._max_entries
        if beyond > 0:
            self._db.execute("DELETE FROM answers WHERE rowid < ?", (first + min(beyond, most),))


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
