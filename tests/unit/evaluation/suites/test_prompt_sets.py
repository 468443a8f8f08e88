"""Public sets of prompts: each in the formats it is published in becomes the same prompts; what is wrong is named."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from set_files import write_page_database, write_set
from tiny_tokenizer import byte_level_tokenizer, metaspace_tokenizer

from megatron_sip.errors import DataError
from megatron_sip.evaluate import main
from megatron_sip.evaluation.suites.prompt_sets import PROMPT_SETS, Prompt, page_text, read_prompts
from megatron_sip.evaluation.suites.prompt_tasks import PromptTasks

Rows = Sequence[Mapping[str, Any]]
TOKENIZER = metaspace_tokenizer()


def write_rows(path: Path, rows: Rows) -> Path:
    """In the format that the ending says."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TOXIC = {"toxicity": None, "profanity": 0.25}
FIRST_XSTEST = [
    {"id": "v1-1", "type": "homonyms", "prompt": 'How do I kill\na "process"?', "note": ""},
    {"id": "v1-2", "type": "contrast_homonyms", "prompt": "How do I kill, a man?", "note": ""},
]
CASES: list[tuple[str, Rows, Sequence[str], list[Prompt]]] = [
    (
        "realtoxicityprompts",
        [
            {"filename": "a.txt", "prompt": {"text": "He said", **TOXIC}, "continuation": {"text": " no.", **TOXIC}},
            {"filename": "b.txt", "prompt": {"text": "She", **TOXIC}, "continuation": {"text": "", **TOXIC}},
        ],
        ("jsonl", "parquet"),
        [Prompt("He said", " no.", "a.txt"), Prompt("She", "", "b.txt")],
    ),
    (
        "toxigen",
        [{"text": "they, as they are", "target_group": "x", "toxicity_human": 2.0}],
        ("csv", "jsonl", "parquet"),
        [Prompt("they, as they are", "", "1")],
    ),
    ("toxigen", [{"prompt": "- a\n- b\n-", "generation": "c"}], ("csv", "jsonl"), [Prompt("- a\n- b\n-", "", "1")]),
    ("xstest-safe", FIRST_XSTEST, ("csv", "jsonl"), [Prompt('How do I kill\na "process"?', "", "v1-1")]),
    ("xstest-unsafe", FIRST_XSTEST, ("csv", "parquet"), [Prompt("How do I kill, a man?", "", "v1-2")]),
    (
        "xstest-unsafe",
        [
            {"id": "1", "prompt": "a?", "type": "homonyms", "label": "safe", "focus": "", "note": ""},
            {"id": "2", "prompt": "b?", "type": "contrast_homonyms", "label": "unsafe", "focus": "", "note": ""},
        ],
        ("csv",),
        [Prompt("b?", "", "2")],
    ),
    (
        "halueval-qa",
        [{"knowledge": "K.", "question": "Q?", "right_answer": "R", "hallucinated_answer": "H"}],
        ("json", "parquet"),
        [Prompt("K.\n\nQuestion: Q?\nAnswer:", " R", "1")],
    ),
    (
        "halueval-dialogue",
        [{"knowledge": "K.", "dialogue_history": "[Human]: hi ", "right_response": "R", "hallucinated_response": "H"}],
        ("json",),
        [Prompt("K.\n\n[Human]: hi [Assistant]:", " R", "1")],
    ),
    (
        "halueval-summarization",
        [{"document": "D.", "right_summary": "R", "hallucinated_summary": "H"}],
        ("json",),
        [Prompt("D.\n\nSummary:", " R", "1")],
    ),
    (
        "standard",
        [{"id": "7", "prefix": "P", "suffix": " s", "document": "d"}, {"id": "8", "prefix": "Q", "suffix": " t"}],
        ("jsonl",),
        [Prompt("P", " s", "d"), Prompt("Q", " t", "8")],
    ),
]


@pytest.mark.parametrize(
    ("name", "rows", "ending", "prompts"),
    [(name, rows, ending, prompts) for name, rows, endings, prompts in CASES for ending in endings],
)
def test_a_set_is_the_same_in_each_of_its_formats(
    tmp_path: Path, name: str, rows: Rows, ending: str, prompts: list[Prompt]
) -> None:
    assert read_prompts(name, write_rows(tmp_path / f"set.{ending}", rows)) == prompts


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_a_wrong_column_is_named_with_what_was_found(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / "set.jsonl", [{"texts": "x", "other": 1}])
    with pytest.raises(DataError, match=rf"--set {name}: .*") as caught:
        read_prompts(name, path)
    said = str(caught.value)
    if name == "factscore":
        assert "--wikipedia None" in said
    else:
        assert "row 1: no column" in said
        assert "found 'texts', 'other'" in said
    assert PROMPT_SETS[name].columns in said


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("toxigen", "a.csv", 'text\n"it\nnever ends', "not a csv file"),
        ("toxigen", "a.csv", "text\n", "no row"),
        ("toxigen", "a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl:2 is not a JSON object"),
        ("toxigen", "a.jsonl", '{"text": "a"}\n["b"]\n', "row 2 is no object"),
        ("toxigen", "a.jsonl", '{"text": "a"}\n{"text": null}\n', "row 2: column 'text' must be a text"),
        ("toxigen", "a.parquet", "x", "cannot be read as parquet"),
        ("toxigen", "a.txt", "x", "ends with .csv"),
        ("realtoxicityprompts", "a.jsonl", '{"prompt": "flat"}\n', "column 'prompt.text' must be a text"),
        ("xstest-safe", "a.csv", "id,prompt,label\n1,a?,maybe\n", "label 'maybe' is neither"),
        ("xstest-unsafe", "a.csv", "id,prompt,label\n1,a?,safe\n", "holds no prompt of this set"),
        ("toxicgen", "a.csv", "", "there are standard, unsafe"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, name: str, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(name, tmp_path / file)


def test_biographies_have_their_page_without_its_marks(tmp_path: Path) -> None:
    entities, pages = write_page_database(tmp_path, {"Ada Lovelace": "<s>Ada was born.</s><s>She wrote.</s>"})
    assert read_prompts("factscore", entities, pages) == [
        Prompt("Tell me a bio of Ada Lovelace.", "Ada was born. She wrote.", "Ada Lovelace")
    ]
    entities.write_text("Nobody\n")
    with pytest.raises(DataError, match="'Nobody' is no title"):
        read_prompts("factscore", entities, pages)
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE pages (title, text)")
    with pytest.raises(DataError, match="no table documents"):
        read_prompts("factscore", entities, tmp_path / "other.db")


@given(st.lists(st.text("ab c", min_size=1), min_size=1))
def test_passages_of_a_page_are_put_together_as_they_were_cut(passages: list[str]) -> None:
    assert page_text("####SPECIAL####SEPARATOR####".join(passages)) == "".join(passages).strip()


def draw(prompts: Sequence[Prompt], samples: int | None, seed: int = 1, room: int = 16) -> PromptTasks:
    return PromptTasks(prompts, TOKENIZER, samples=samples, room=room, prepend_bos="auto", seed=seed)


def test_a_limit_draws_the_beginning_of_one_order_that_the_seed_decides() -> None:
    prompts = [Prompt(f"The quick fox {i}", "", str(i)) for i in range(50)]
    whole, part = draw(prompts, None), draw(prompts, 20)
    documents = [whole.document(i)[0] for i in range(50)]
    assert sorted(map(int, documents)) == list(range(50))
    assert documents != [str(i) for i in range(50)]
    assert part.tasks(0, 20) == whole.tasks(0, 20)
    assert part.fingerprint() == whole.fingerprint() != draw(prompts, None, seed=2).fingerprint()
    assert [task.prefix_text.split()[-1] for task in part.tasks(0, 20)] == documents[:20]
    assert draw(prompts, 500).samples == 50


def test_of_a_long_prompt_the_model_gets_the_end_and_the_judge_all() -> None:
    prompts = [Prompt("The quick brown fox jumps over the lazy dog", "", "1")]
    [whole] = draw(prompts, None, room=1000).tasks(0, 1)
    tasks = draw(prompts, None, room=5)
    [cut] = tasks.tasks(0, 1)
    assert tasks.cut == 1
    assert draw(prompts, None, room=1000).cut == 0
    assert len(cut.prefix_ids) == 5
    assert cut.prefix_ids[-3:] == whole.prefix_ids[-3:]
    assert cut.prefix_text == whole.prefix_text == prompts[0].prefix


def test_another_tokenizer_makes_other_tasks_and_a_prompt_needs_room() -> None:
    """The fingerprint is what a file of generations is continued by."""
    prompts = [Prompt("The quick brown fox", "", "1")]
    how = {"samples": None, "room": 16, "prepend_bos": "off", "seed": 1}
    one, other = (PromptTasks(prompts, each, **how) for each in (TOKENIZER, byte_level_tokenizer()))  # type: ignore[arg-type]
    assert one.tasks(0, 1)[0].prefix_ids != other.tasks(0, 1)[0].prefix_ids
    assert one.fingerprint() != other.fingerprint()
    assert len(PromptTasks(prompts, TOKENIZER, **how | {"room": 1}).tasks(0, 1)[0].prefix_ids) == 1  # type: ignore[arg-type]
    with pytest.raises(DataError, match="leaves 1 tokens, BOS included, and none for a prompt"):
        PromptTasks(prompts, TOKENIZER, **how | {"room": 1, "prepend_bos": "on"})  # type: ignore[arg-type]


def test_a_list_of_titles_that_is_no_text_is_named(tmp_path: Path) -> None:
    entities, pages = write_page_database(tmp_path, {"Ada": "text"})
    entities.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"prompt_entities\.txt is not a list of titles"):
        read_prompts("factscore", entities, pages)


def test_toxigen_s_bytes_are_texts(tmp_path: Path) -> None:
    """As annotated_train.csv has them; a text that only begins like one stays."""
    texts = ["they are n\u00efce", "it's", "plain", "b'cause they're 'nice'"]
    written = [repr(texts[0].encode()), repr(texts[1].encode()), *texts[2:]]
    path = write_rows(tmp_path / "annotated_train.csv", [{"text": text, "target_group": "x"} for text in written])
    assert [prompt.prefix for prompt in read_prompts("toxigen", path)] == texts


def test_sets_lists_every_set_with_its_file_and_where_it_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sets"])
    said = capsys.readouterr().out
    for name, found in PROMPT_SETS.items():
        assert all(text in said for text in (f"{name}: ", found.file, found.columns, found.published))


def test_the_files_that_tests_make_are_of_every_set(tmp_path: Path) -> None:
    for name in PROMPT_SETS:
        path, wikipedia = write_set(tmp_path, name, 3)
        assert len(read_prompts(name, path, wikipedia)) == 3
