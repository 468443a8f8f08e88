"""Tasks: contiguous cuts, determinism in (seed, index), epochs that cover everything once, exact texts, clear errors."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import MULTILINGUAL, byte_level_tokenizer, metaspace_tokenizer

from megatron_sip.data.continuation_text import continuation_texts
from megatron_sip.data.documents import Corpus, DocumentSource
from megatron_sip.data.tasks import TaskMode, TaskSettings, TaskSource
from megatron_sip.data.token_store import TokenStoreWriter
from megatron_sip.errors import DataError

BYTES, METASPACE = byte_level_tokenizer(), metaspace_tokenizer()
VOCAB = 1_000_000


class NumberTokenizer:
    """Decodes ids to numbers, so that tests can say where in which document a text comes from."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f" {i}" for i in ids)


def numbered_corpus(folder: Path, sources: list[list[int]], weights: list[Fraction] | None = None) -> Corpus:
    """Sources of documents with the given lengths; the tokens of all documents are 0, 1, 2, ... in turn."""
    made, token = [], 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, lengths in enumerate(sources):
        with TokenStoreWriter(folder / f"s{number}", np.int32) as writer:
            for length in lengths:
                writer.add(np.arange(token, token + length, dtype=np.int32), np.asarray([length], np.int32))
                token += length
        made.append(DocumentSource(f"s{number}", [folder / f"s{number}"], []))
    return Corpus(tuple(made), tuple(weights or [Fraction(1)] * len(made)), VOCAB)


def task_source(corpus: Corpus, mode: TaskMode = "random", **changes: int) -> TaskSource:
    numbers = {"seq_length": 24, "suffix_length": 8} | changes
    return TaskSource(corpus, NumberTokenizer(), TaskSettings(mode=mode, **numbers))  # type: ignore[arg-type]


many_lengths = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(lambda lengths: max(lengths) >= 32)
no_folder_check = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)


@pytest.fixture
def fresh_folder(tmp_path: Path):
    numbers = iter(range(10_000))
    return lambda: tmp_path / str(next(numbers))


# ---------------------------------------------------------------- the cut


@no_folder_check
@given(many_lengths, st.sampled_from(["random", "stream"]), st.integers(1, 12), st.integers(0, 99), st.integers(0, 500))
def test_a_task_is_a_contiguous_piece_of_one_document(
    fresh_folder, lengths: list[int], mode: TaskMode, min_prefix: int, seed: int, index: int
) -> None:
    tasks = task_source(numbered_corpus(fresh_folder(), [lengths]), mode, min_prefix_length=min_prefix, seed=seed)
    task = tasks.task(index)
    ids = task.prefix_ids + task.suffix_ids
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert len(task.suffix_ids) == 8
    assert min_prefix <= len(task.prefix_ids) <= 16
    ends = np.cumsum(lengths)
    document = int(np.searchsorted(ends, task.suffix_ids[0], side="right"))
    start = int(ends[document]) - lengths[document]
    assert start <= ids[0]
    assert ids[-1] < ends[document]
    assert ids[0] == max(start, task.suffix_ids[0] - 16)  # the longest prefix that is allowed
    if mode == "stream":
        assert (task.suffix_ids[0] - start) % 8 == 0


@no_folder_check
@given(many_lengths, st.integers(1, 20), st.integers(0, 99))
def test_stream_gives_every_chunk_exactly_once_an_epoch_in_turn(
    fresh_folder, lengths: list[int], min_prefix: int, seed: int
) -> None:
    min_prefix = min(min_prefix, 16)
    tasks = task_source(numbered_corpus(fresh_folder(), [lengths]), "stream", min_prefix_length=min_prefix, seed=seed)
    starts = np.cumsum(lengths) - lengths
    expected = [
        int(start) + chunk * 8
        for start, length in zip(starts, lengths, strict=True)
        for chunk in range(1, length // 8)
        if chunk * 8 >= min_prefix
    ]
    (per_epoch,) = tasks.tasks_per_epoch
    assert per_epoch == len(expected)
    for epoch in (0, 3):
        seen = [task.suffix_ids[0] for task in tasks.tasks(epoch * per_epoch, per_epoch)]
        assert sorted(seen) == expected
        for a, b in itertools.pairwise(seen):  # within a document, the next chunk follows
            assert b == a + 8 or np.searchsorted(starts, a, "right") != np.searchsorted(starts, b, "right")


@no_folder_check
@given(many_lengths, st.integers(2, 30), st.integers(0, 99))
def test_whole_predicts_every_token_but_a_document_s_first_once_an_epoch(
    fresh_folder, lengths: list[int], seq_length: int, seed: int
) -> None:
    tasks = TaskSource(
        numbered_corpus(fresh_folder(), [lengths]),
        NumberTokenizer(),  # type: ignore[arg-type]
        TaskSettings.whole(seq_length, seed),
    )
    (per_epoch,) = tasks.tasks_per_epoch
    starts = set((np.cumsum(lengths) - lengths).tolist())
    for epoch in (0, 3):
        made = tasks.tasks(epoch * per_epoch, per_epoch)
        assert sorted(i for task in made for i in task.suffix_ids) == sorted(set(range(sum(lengths))) - starts)
        for task in made:
            assert len(task.prefix_ids) == 1
            assert [*task.prefix_ids, *task.suffix_ids] == list(
                range(task.prefix_ids[0], task.prefix_ids[0] + 1 + len(task.suffix_ids))
            )
            assert len(task.suffix_ids) < seq_length
    assert tasks.report()["too_short"] == sum(length < 2 for length in lengths)


@no_folder_check
@given(many_lengths, st.integers(0, 99))
def test_random_visits_every_document_once_an_epoch(fresh_folder, lengths: list[int], seed: int) -> None:
    tasks = task_source(numbered_corpus(fresh_folder(), [lengths]), seed=seed)
    long_enough = [i for i, length in enumerate(lengths) if length >= 9]
    assert tasks.tasks_per_epoch == [len(long_enough)]
    ends = np.cumsum(lengths)
    for epoch in range(2):
        drawn = tasks.tasks(epoch * len(long_enough), len(long_enough))
        assert sorted(int(np.searchsorted(ends, t.suffix_ids[0], "right")) for t in drawn) == long_enough


def test_random_cuts_are_uniform_and_new_each_epoch(tmp_path: Path) -> None:
    tasks = task_source(numbered_corpus(tmp_path, [[28]]))
    cuts = Counter(task.suffix_ids[0] for task in tasks.tasks(0, 4000))
    assert sorted(cuts) == list(range(1, 21))  # from a prefix of 1 to a suffix that ends the document
    assert all(130 < count < 275 for count in cuts.values())  # 200 expected, 5 standard deviations


# ---------------------------------------------------------------- determinism


def test_any_order_any_instance_same_task(tmp_path: Path) -> None:
    weights = [Fraction(2, 3), Fraction(1, 3)]
    for mode in ("random", "stream"):
        forward = task_source(numbered_corpus(tmp_path / mode, [[40, 9, 33], [50, 60]], weights), mode)
        again = task_source(numbered_corpus(tmp_path / mode, [[40, 9, 33], [50, 60]], weights), mode)
        expected = forward.tasks(0, 100)
        assert [again.task(i) for i in reversed(range(100))] == expected[::-1]
        assert again.tasks(40, 10) == expected[40:50]
        assert [task.index for task in expected] == list(range(100))
        assert forward.fingerprint() == again.fingerprint()


def test_another_process_draws_the_same_tasks(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [[40, 9, 33, 77, 100]])
    ours = task_source(corpus).tasks(0, 50)
    program = (
        "import pickle, sys; from pathlib import Path; import test_tasks as t;"
        "tasks = t.task_source(t.numbered_corpus(Path(sys.argv[1]), [[40, 9, 33, 77, 100]])).tasks(0, 50);"
        "sys.stdout.buffer.write(pickle.dumps(tasks))"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path / "other")]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)
    assert pickle.loads(done.stdout) == ours


def test_seeds_change_tasks_but_not_the_held_out_documents(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [[40] * 50])
    drawn = [task_source(corpus.split("8,2")["valid"], seed=seed).tasks(0, 10) for seed in (1, 2)]
    assert [t.suffix_ids for t in drawn[0]] != [t.suffix_ids for t in drawn[1]]
    documents = [sorted(t.suffix_ids[0] // 40 for t in tasks) for tasks in drawn]
    assert documents[0] == documents[1]


def test_the_fingerprint_sees_settings_and_documents(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path / "a", [[40, 50]])
    prints = [
        task_source(corpus).fingerprint(),
        task_source(corpus, seed=2).fingerprint(),
        task_source(corpus, "stream").fingerprint(),
        task_source(corpus.split("1,1")["train"]).fingerprint(),
        task_source(numbered_corpus(tmp_path / "b", [[40, 51]])).fingerprint(),
    ]
    assert len(set(prints)) == 5


# ---------------------------------------------------------------- blends and reports


def test_weights_decide_the_proportions_and_epochs(tmp_path: Path) -> None:
    tasks = task_source(numbered_corpus(tmp_path, [[40] * 10, [40] * 90], [Fraction(3), Fraction(1)]))
    first = [task.suffix_ids[0] < 400 for task in tasks.tasks(0, 200)]
    for n in range(1, 201):
        assert abs(sum(first[:n]) - 0.75 * n) < 1
    report = tasks.report(num_tasks=200)
    assert [source["epochs"] for source in report["sources"]] == [15.0, pytest.approx(50 / 90)]


def test_the_report_counts_what_cannot_be_cut(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [[40, 8, 3, 0, 9], [30, 15]], [Fraction(1), Fraction(1)])
    report = task_source(corpus).report()
    assert (report["documents"], report["tokens"]) == (7, 105)
    assert (report["too_short"], report["too_short_tokens"]) == (3, 11)
    assert report["tasks_per_epoch"] == 4
    stream = task_source(corpus, "stream").report()
    assert (stream["too_short"], stream["tasks_per_epoch"]) == (5, 4 + 2)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suffix_length": 24}, "--suffix-length 24 leaves 0 tokens of --seq-length 24 for the prefix"),
        ({"suffix_length": 30}, "shorten the suffix"),
        ({"min_prefix_length": 17}, "leaves 16 tokens of --seq-length 24 for the prefix, which needs at least 17"),
        ({"suffix_length": 0}, "--suffix-length must be at least 1, got 0"),
        ({"min_prefix_length": 0}, "must be at least 1, got 0"),
        ({"mode": "strem"}, "--task-mode must be random, stream or whole, got 'strem'"),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSettings(**({"seq_length": 24, "suffix_length": 8} | changes))


def test_no_document_is_long_enough(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [[5, 15, 8]])
    with pytest.raises(
        DataError, match=r"s0 \(all split\): none of its 3 documents .* longest has 15 tokens, a stream"
    ):
        task_source(corpus, "stream")
    with pytest.raises(DataError, match=r"needs 17 \(--suffix-length 16 .*--seq-length 24\); shorten"):
        task_source(corpus, suffix_length=16)
    with pytest.raises(DataError, match=r"s0 \(test split\): no document; .*--split"):
        task_source(corpus.split("1,1")["test"])
    mixed = numbered_corpus(tmp_path / "mixed", [[50], [5]])
    with pytest.raises(DataError, match=r"s1 .* none of its 1 documents"):
        task_source(mixed)


def test_ids_beyond_the_vocabulary_and_negative_indices(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [[40, 40]])
    small = Corpus(corpus.sources, corpus.weights, vocab_size=50)
    with pytest.raises(DataError, match=r"s0\.bin: token id \d+, but the vocabulary has only 50"):
        task_source(small).tasks(0, 2)
    with pytest.raises(IndexError, match="must not be negative"):
        task_source(corpus).task(-1)


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("tokenizer", [BYTES, METASPACE], ids=["byte-level", "metaspace"])
@pytest.mark.parametrize(
    "text", [*MULTILINGUAL, "a literal \ufffd\ufffd replacement \ufffd", "  two  spaces \n\n\tlines "]
)
def test_prefix_and_suffix_texts_join_to_the_document_at_every_cut(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    for cut in range(1, len(ids)):
        for end in (cut + 1, min(cut + 7, len(ids)), len(ids)):
            prefix, suffix = continuation_texts(tokenizer, ids[:cut], ids[cut:end], ids[end : end + 3])
            shown = prefix + suffix
            assert text.startswith(shown)
            assert text == shown or end < len(ids)
            # at most one character, unfinished at `end`, is left out
            assert len(tokenizer(shown, add_special_tokens=False).input_ids) >= end - 3
            assert text.startswith(prefix)
            assert len(tokenizer(prefix, add_special_tokens=False).input_ids) >= cut - 3


def test_special_tokens_are_not_shown() -> None:
    ids = [BYTES.bos_token_id, *BYTES(" the lazy dog", add_special_tokens=False).input_ids, BYTES.eos_token_id]
    assert continuation_texts(BYTES, ids[:3], ids[3:]) == (BYTES.decode(ids[1:3]), BYTES.decode(ids[3:-1]))


@pytest.mark.parametrize("tokenizer", [BYTES, METASPACE], ids=["byte-level", "metaspace"])
def test_a_prefix_cut_inside_a_character_starts_clean(tmp_path: Path, tokenizer) -> None:
    ids = tokenizer("色は匂へど散りぬるを我が世誰ぞ常ならむ" * 5, add_special_tokens=False).input_ids
    with TokenStoreWriter(tmp_path / "s", np.int32) as writer:
        writer.add(np.asarray(ids), np.asarray([len(ids)], np.int32))
    corpus = Corpus((DocumentSource("s", [tmp_path / "s"], []),), (Fraction(1),), len(tokenizer))
    tasks = TaskSource(corpus, tokenizer, TaskSettings(24, 8)).tasks(0, 200)
    assert any(tokenizer.decode(task.prefix_ids).startswith("\ufffd") for task in tasks)
    for task in tasks:
        assert "\ufffd" not in task.prefix_text + task.suffix_text
        assert task.prefix_text + task.suffix_text in "色は匂へど散りぬるを我が世誰ぞ常ならむ" * 5
