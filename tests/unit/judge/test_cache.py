"""The cache of answers: what goes in comes out, in another process and after a crash too."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.judge import cache as cache_module
from megatron_sip.judge.cache import AnswerCache, CacheError, cache_key

ANSWERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.none() | st.floats(0, 1), max_size=5),
    st.lists(st.text()),
)


@given(st.dictionaries(st.binary(min_size=1, max_size=4), ANSWERS, max_size=30))
def test_round_trip(entries: dict[bytes, list[float | None]]) -> None:
    cache = AnswerCache(Path(":memory:"), pending_limit=7)
    keyed = {cache_key(material): answer for material, answer in entries.items()}
    for item in keyed.items():
        cache.put_many([item])
    assert cache.get_many([*keyed, cache_key(b"unknown")]) == keyed
    cache.flush()
    assert cache.get_many(list(keyed)) == keyed
    cache.close()


def test_survives_reopening_and_a_second_process_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.sqlite"
    first = AnswerCache(path)
    first.put_many([(b"k" * 16, [1.0, None])])
    first.flush()
    second = AnswerCache(path)
    assert second.get_many([b"k" * 16]) == {b"k" * 16: [1.0, None]}
    first.close()
    second.close()


def test_a_folder_gets_a_file_inside(tmp_path: Path) -> None:
    AnswerCache(tmp_path).close()
    AnswerCache(tmp_path / "new").close()
    assert (tmp_path / "answers.sqlite").exists()
    assert (tmp_path / "new" / "answers.sqlite").exists()


def test_many_keys_at_once(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "cache.sqlite")
    keys = [cache_key(str(i).encode()) for i in range(5000)]
    cache.put_many((key, float(i)) for i, key in enumerate(keys))
    assert cache.get_many(keys) == {key: float(i) for i, key in enumerate(keys)}
    cache.close()


def test_the_oldest_entries_go_when_the_file_is_full_a_few_at_a_time(tmp_path: Path) -> None:
    keys = [cache_key(str(i).encode()) for i in range(200)]
    cache = AnswerCache(tmp_path / "cache.sqlite")
    cache.put_many((key, float(i)) for i, key in enumerate(keys[:100]))
    cache.close()
    smaller = AnswerCache(tmp_path / "cache.sqlite", max_entries=40)
    kept = []
    for begin in range(100, 200, 10):
        smaller.put_many((key, float(begin + i)) for i, key in enumerate(keys[begin : begin + 10]))
        smaller.flush()
        found = sorted(smaller.get_many(keys).values())
        assert found == list(range(begin + 10 - len(found), begin + 10)), "the newest are there"
        kept.append(len(found))
    assert kept == [90, 80, 70, 60, 50, 40, 40, 40, 40, 40]
    smaller.close()


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("this is not a database, but long enough to look like a file of its own" * 10)
    with pytest.raises(CacheError, match=r"notes\.txt"):
        AnswerCache(path)


KEYS = [cache_key(str(number).encode()) for number in range(2000)]


def test_a_locked_file_is_left_aside_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.05)
    path = tmp_path / "cache.sqlite"
    cache = AnswerCache(path)
    cache.put_many([(KEYS[0], 0.5)])
    cache.flush()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for number in (1, 2):
        assert cache.get_many(KEYS[:1]) == {}  # asked again, not lost
        cache.put_many([(KEYS[number], float(number))])
        cache.flush()
        assert cache.get_many(KEYS[: number + 1])[KEYS[number]] == number
    assert cache.counts["cache-failures"] == 1  # while it is aside, requests do not wait for it again
    late = AnswerCache(path)  # a run that starts meanwhile
    late.put_many([(KEYS[3], 3.0)])
    assert late.get_many(KEYS[:4]) == {KEYS[3]: 3.0}
    other.execute("COMMIT")
    later = time.monotonic() + 100
    monkeypatch.setattr(time, "monotonic", lambda: later)
    late.close()
    cache.flush()
    assert cache.get_many(KEYS[:4]) == {KEYS[0]: 0.5, KEYS[1]: 1.0, KEYS[2]: 2.0, KEYS[3]: 3.0}
    cache.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2  # of each cache one
    assert all(f"judge cache {path} is left aside" in warning and "locked" in warning for warning in warnings)


def test_a_full_disk_costs_what_does_not_fit_into_memory_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "KEPT_IN_MEMORY", 1500)
    cache = AnswerCache(tmp_path / "cache.sqlite")
    cache._db.execute("PRAGMA max_page_count = 5")  # "database or disk is full" from then on
    for begin in range(0, 2000, 100):
        cache.put_many((key, ["text " * 20]) for key in KEYS[begin : begin + 100])
        cache.flush()
        cache._aside_until = 0.0
    found = cache.get_many(KEYS)
    assert set(found) >= set(KEYS[500:])
    assert cache.counts["cache-lost"] == 2000 - len(found) > 0
    assert cache.counts["cache-failures"] > 1
    cache.close()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "full" in warnings[0]
    assert "1500 answers could not be kept" in warnings[1]


def test_a_value_that_is_no_answer_is_asked_for_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.sqlite"
    cache = AnswerCache(path)
    cache.put_many((key, 1.0) for key in KEYS[:5])
    cache.flush()
    for key, value in zip(KEYS, (b"0.", b"\xff", b'{"a": 1}', "text"), strict=False):
        cache._db.execute("UPDATE answers SET value = ? WHERE key = ?", (value, key))
    assert cache.get_many(KEYS[:5]) == {KEYS[4]: 1.0}
    assert cache.counts["cache-unreadable"] == 4
    assert [f"judge cache {path} holds a value" in record.getMessage() for record in caplog.records] == [True]
    cache.close()


@pytest.mark.parametrize("columns", ["key BLOB, value BLOB", "id INTEGER, answer TEXT, made INTEGER"])
def test_another_schema_names_the_file(tmp_path: Path, columns: str) -> None:
    path = tmp_path / "cache.sqlite"
    other = sqlite3.connect(path)
    other.execute(f"CREATE TABLE answers ({columns})")
    other.close()
    with pytest.raises(CacheError, match=r"cache\.sqlite has a table of answers with the columns"):
        AnswerCache(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=f"judge cache {tmp_path / 'file' / 'cache.sqlite'}: "):
        AnswerCache(tmp_path / "file" / "cache.sqlite")
