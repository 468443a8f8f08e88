"""The cache of answers: what goes in comes out, in another process and after a crash too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_the_oldest_entries_go_when_the_file_is_full(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "cache.sqlite")
    cache.put_many((cache_key(str(i).encode()), float(i)) for i in range(100))
    cache.close()
    smaller = AnswerCache(tmp_path / "cache.sqlite", max_entries=40)
    assert len(smaller.get_many([cache_key(str(i).encode()) for i in range(100)])) == 40
    smaller.close()


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("this is not a database, but long enough to look like a file of its own" * 10)
    with pytest.raises(CacheError, match=r"notes\.txt"):
        AnswerCache(path)
