"""The 13-gram rule against an oracle of plain sets; what files it reads; its flag, down to the manifest."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_cases import read_corpus
from duplicate_cases import grams
from hypothesis import given
from hypothesis import strategies as st
from prepare_cases import run, write_records

from megatron_sip.corpus.contamination import Contamination, EvaluationFile
from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.rules import Document
from megatron_sip.errors import DataError

QUESTION = "which of the two rivers that meet below the old bridge at Norwick is the longer one"
PASSAGE = "The harbour of Bellham was closed for nine years after the great storm tore its outer wall away."


def document(text: str) -> Document:
    return Document("0", text, "a")


def rule(folder: Path, **texts: list[str]) -> Contamination:
    """Of sets in text files, each called after its keyword."""
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return Contamination.of([EvaluationFile.parse(f"{name}={folder / name}.txt") for name in texts])


WORDS = st.lists(st.sampled_from(["a", "b"]), max_size=30)


@given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=1, max_size=3), WORDS)
def test_a_document_goes_by_the_first_set_that_it_shares_13_words_with(
    tmp_path_factory: pytest.TempPathFactory, first: list[list[str]], second: list[list[str]], words: list[str]
) -> None:
    sets = {"first": [*first, ["x"] * 13], "second": [*second, ["y"] * 13]}
    lines = {name: [" ".join(text) for text in texts] for name, texts in sets.items()}
    made = rule(tmp_path_factory.mktemp("sets"), **lines)
    expected = next((name for name, texts in sets.items() if any(grams(words) & grams(text) for text in texts)), None)
    assert made.reason(document(" ".join(words))) == expected
    assert pickle.loads(pickle.dumps(made)).reason(document("Y, " * 13)) == "second"


def test_texts_that_are_too_short_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rule(tmp_path, quiz=[QUESTION, "how long?", "why?"], other=[QUESTION])
    assert caplog.messages == [
        "--decontaminate quiz: 2 of its 3 texts have fewer than 13 words: no document goes for them"
    ]


def test_case_and_punctuation_do_not_hide_an_overlap_and_fewer_words_are_none(tmp_path: Path) -> None:
    made = rule(tmp_path, quiz=[QUESTION, "", "how long?"])
    assert made.reason(document(f"They asked: {QUESTION.upper()}?")) == "quiz"
    assert made.reason(document("so " + " ".join(QUESTION.split()[:12]) + " and so on")) is None
    assert {name: made.summary["quiz"][name] for name in ("texts", "too_short", "ngrams")} == {
        "texts": 2,
        "too_short": 1,
        "ngrams": 5,
    }


def test_every_text_of_a_row_counts_or_that_of_a_field(tmp_path: Path) -> None:
    rows = [{"q": {"passage": PASSAGE}, "choices": [{"text": QUESTION}], "id": 3}]
    path = write_records(tmp_path / "set.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    (tmp_path / "set:1.csv").write_text(f'id,passage\n3,"{PASSAGE}"\n')
    for name, overlapping in (
        (str(path), {PASSAGE, QUESTION}),
        (f"{path}:q.passage", {PASSAGE}),
        (str(tmp_path / "set.parquet"), {PASSAGE, QUESTION}),
        (str(tmp_path / "set:1.csv"), {PASSAGE}),
        (f"{tmp_path / 'set:1.csv'}:passage", {PASSAGE}),
    ):
        made = Contamination.of([EvaluationFile.parse(f"quiz={name}")])
        assert {text for text in (PASSAGE, QUESTION) if made.reason(document(text)) == "quiz"} == overlapping, name


def test_what_is_no_evaluation_set_is_named(tmp_path: Path) -> None:
    path = write_records(tmp_path / "set.jsonl", [{"question": "why?"}])
    for given_text in (f"{path}", f"quiz={tmp_path}/none.csv", f"=x={path}", f"quiz={path}x:question"):
        with pytest.raises(CorpusError, match="--decontaminate"):
            EvaluationFile.parse(given_text)
    with pytest.raises(DataError, match="row 1: no column 'answer'; found 'question'"):
        Contamination.of([EvaluationFile.parse(f"quiz={path}:answer")])
    (tmp_path / "list.json").write_text('[\n {"question": "why?"}\n]')
    with pytest.raises(DataError, match=r"list\.json: a JSON array: write each of its objects in a line of its own"):
        Contamination.of([EvaluationFile.parse(f"quiz={tmp_path / 'list.json'}")])
    (tmp_path / "half.csv").write_text('q,a\n"one two",3\n"oops,4\n')
    with pytest.raises(DataError, match=r"half\.csv: not a csv file with a header after line 2: "):
        Contamination.of([EvaluationFile.parse(f"quiz={tmp_path / 'half.csv'}")])
    with pytest.raises(DataError, match="quiz: none of its 1 texts has 13 words"):
        Contamination.of([EvaluationFile.parse(f"quiz={path}")])


def test_the_flag_counts_what_goes_by_set_and_the_manifest_says_what_was_compared(tmp_path: Path) -> None:
    texts = [PASSAGE, f"He said that {PASSAGE}", f"{QUESTION} and {PASSAGE}", "A text of its own. " * 9, QUESTION]
    data = write_records(tmp_path / "web.jsonl", [{"text": text} for text in texts])
    quiz = write_records(tmp_path / "quiz.jsonl", [{"question": QUESTION, "answer": "the Nor"}])
    (tmp_path / "facts.txt").write_text(PASSAGE)
    words = ("text", "--data-path", data, "--decontaminate", f"quiz={quiz}", f"facts={tmp_path / 'facts.txt'}")
    manifest = run(*words, "--out", tmp_path / "out")
    assert manifest["dropped"] == {"contaminated/quiz": 2, "contaminated/facts": 2}
    assert [found.text for [found] in read_corpus(tmp_path / "out").values()] == [texts[3]]
    sets = manifest["settings"]["decontaminate"]
    assert {name: (found["texts"], found["too_short"]) for name, found in sets.items()} == {
        "quiz": (2, 1),
        "facts": (1, 0),
    }
    quiz.write_text(json.dumps({"question": QUESTION + " of all"}) + "\n")
    with pytest.raises(CorpusError, match="differs in settings"):
        run(*words, "--out", tmp_path / "out")
