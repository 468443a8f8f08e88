"""Public sets of prompts, read from local files in the formats they are published in (paper section 3.3).

A `Prompt` is what the model continues and, where the set has one, what its answer is held against.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.data.rows import ENDINGS, read_rows
from megatron_sip.errors import DataError
from megatron_sip.files import described

PASSAGE_SEPARATOR = "####SPECIAL####SEPARATOR####"
"""Between the passages of a page in FActScore's database."""
PAGE_CHARACTERS = 16_000
"""Of a Wikipedia page its beginning is the reference: a judge must have room for it beside two answers."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """prefix: what the model continues. suffix: the reference, "" without one. document: equal for dependent prompts."""

    prefix: str
    suffix: str
    document: str


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A set that `generate --set NAME=FILE` reads. Every text here is for people."""

    about: str
    file: str
    columns: str
    published: str
    judged_by: str
    read: Callable[[Path, Path | None], Iterator[Prompt]]


def read_prompts(name: str, path: Path, wikipedia: Path | None = None) -> list[Prompt]:
    """All prompts of the set `name` in `path`; wikipedia: FActScore's database.

    Raises DataError: no such set, a file of another kind or without a column, or without any prompt of the set.
    """
    if name not in PROMPT_SETS:
        raise DataError(
            f"--set {name}: there are {', '.join(PROMPT_SETS)}; `megatron-sip-evaluate sets` tells about them"
        )
    found = PROMPT_SETS[name]
    try:
        prompts = list(found.read(path, wikipedia))
    except DataError as error:
        raise DataError(f"--set {name}: {error}. It reads {found.file} with {found.columns}") from error
    if not prompts:
        raise DataError(f"--set {name}: {path} holds no prompt of this set")
    return prompts


def _realtoxicityprompts(path: Path, _: Path | None) -> Iterator[Prompt]:
    for row in read_rows(path):
        document = row.text("filename") if row.has("filename") else str(row.number)
        yield Prompt(row.text("prompt.text"), row.text("continuation.text", empty=True), document)


def _toxigen(path: Path, _: Path | None) -> Iterator[Prompt]:
    for row in read_rows(path):
        yield Prompt(without_bytes_mark(row.text("text", "prompt")), "", str(row.number))


def without_bytes_mark(text: str) -> str:
    """Of what Python writes of bytes, as annotated_train.csv has its texts, the text; anything else as it is."""
    if not re.fullmatch(r"b(['\"]).*\1", text, flags=re.DOTALL):
        return text
    try:
        return str(ast.literal_eval(text).decode(errors="replace"))
    except (SyntaxError, ValueError):
        return text


def _xstest(safe: bool) -> Callable[[Path, Path | None], Iterator[Prompt]]:
    def read(path: Path, _: Path | None) -> Iterator[Prompt]:
        for row in read_rows(path):
            if row.has("label"):
                label = row.text("label")
                if label not in ("safe", "unsafe"):
                    raise DataError(f"{row.where}: label {label!r} is neither safe nor unsafe")
                is_safe = label == "safe"
            else:  # the first version has no labels
                is_safe = not row.text("type").startswith("contrast_")
            if is_safe == safe:
                yield Prompt(
                    row.text("prompt"), "", row.text("id") if isinstance(row.values.get("id"), str) else str(row.number)
                )

    return read


def _halueval_qa(path: Path, _: Path | None) -> Iterator[Prompt]:
    for row in read_rows(path):
        prefix = f"{row.text('knowledge')}\n\nQuestion: {row.text('question')}\nAnswer:"
        yield Prompt(prefix, " " + row.text("right_answer"), str(row.number))


def _halueval_dialogue(path: Path, _: Path | None) -> Iterator[Prompt]:
    for row in read_rows(path):
        prefix = f"{row.text('knowledge')}\n\n{row.text('dialogue_history').rstrip()} [Assistant]:"
        yield Prompt(prefix, " " + row.text("right_response"), str(row.number))


def _halueval_summarization(path: Path, _: Path | None) -> Iterator[Prompt]:
    for row in read_rows(path):
        yield Prompt(f"{row.text('document')}\n\nSummary:", " " + row.text("right_summary"), str(row.number))


def _factscore(path: Path, wikipedia: Path | None) -> Iterator[Prompt]:
    if wikipedia is None or not wikipedia.is_file():
        raise DataError(f"--wikipedia {wikipedia}: the database with the pages of these people is needed")
    with described(path, "a list of titles, one a line"):
        names = [name.strip() for name in path.read_text(encoding="utf-8").splitlines() if name.strip()]
    with contextlib.closing(sqlite3.connect(f"{wikipedia.absolute().as_uri()}?mode=ro", uri=True)) as database:
        for name in names:
            try:
                page = database.execute("SELECT text FROM documents WHERE title = ?", (name,)).fetchone()
            except sqlite3.Error as error:
                raise DataError(f"--wikipedia {wikipedia}: no table documents(title, text): {error}") from error
            if page is None:
                raise DataError(f"{path}: {name!r} is no title in {wikipedia}")
            yield Prompt(f"Tell me a bio of {name}.", page_text(page[0])[:PAGE_CHARACTERS], name)


def page_text(stored: str) -> str:
    """A page of FActScore's database as plain text: without the marks of its passages and sentences."""
    joined = stored.replace(PASSAGE_SEPARATOR, "")
    return re.sub(r"</?s>", "", re.sub(r"(?<=\S)(?:</?s>)+(?=\S)", " ", joined)).strip()


def _prefixes(path: Path, _: Path | None) -> Iterator[Prompt]:
    for row in read_rows(path):
        document = str(row.values.get("document") or row.text("id"))
        yield Prompt(row.text("prefix"), row.text("suffix"), document)


_OURS = "what `megatron-sip-prepare prefixes` writes"
_PREFIXES = ("a .jsonl file", "id, prefix, suffix, document", _OURS)
_HALUEVAL = "github.com/RUCAIBox/HaluEval, data/"
_XSTEST_FILE = f"xstest_prompts.csv (450 rows), or the first version; {ENDINGS}"
_XSTEST_COLUMNS = "id, prompt, and label (safe, unsafe) or type (unsafe ones begin with contrast_)"
_XSTEST = "github.com/paul-rottger/xstest"

PROMPT_SETS = {
    "standard": PromptSet(
        "prefixes of ordinary documents", *_PREFIXES, "compare --criteria quality coherence", _prefixes
    ),
    "unsafe": PromptSet("prefixes that all votes call unsafe", *_PREFIXES, "compare --criteria quality", _prefixes),
    "redpajama": PromptSet("the same, rated one by one", *_PREFIXES, "rate --criteria safety", _prefixes),
    "slimpajama": PromptSet("prefixes of SlimPajama", *_PREFIXES, "rate --criteria factuality:v4", _prefixes),
    "prefixes": PromptSet("any other prefixes; --dataset names them", *_PREFIXES, "any criterion", _prefixes),
    "realtoxicityprompts": PromptSet(
        "beginnings of sentences from the web; the web's continuation is the reference",
        f"prompts.jsonl, or the hub's parquet; {ENDINGS}",
        "prompt.text, continuation.text (scores may be null), filename",
        "allenai.org/data/real-toxicity-prompts; hub allenai/real-toxicity-prompts",
        "rate --criteria safety",
        _realtoxicityprompts,
    ),
    "toxigen": PromptSet(
        "statements about groups of people",
        f"annotated_test.csv (940 rows) or another part; {ENDINGS}",
        "text, or prompt",
        "hub toxigen/toxigen-data, after a form",
        "rate --criteria safety",
        _toxigen,
    ),
    "xstest-safe": PromptSet(
        "questions that only look unsafe (250)",
        _XSTEST_FILE,
        _XSTEST_COLUMNS,
        _XSTEST,
        "rate --criteria safety",
        _xstest(safe=True),
    ),
    "xstest-unsafe": PromptSet(
        "questions that are unsafe (200)",
        _XSTEST_FILE,
        _XSTEST_COLUMNS,
        _XSTEST,
        "rate --criteria safety",
        _xstest(safe=False),
    ),
    "halueval-qa": PromptSet(
        "questions about a passage, which stands before them; the right answer is the reference",
        f"qa_data.json; {ENDINGS}",
        "knowledge, question, right_answer",
        _HALUEVAL,
        "compare --criteria halueval",
        _halueval_qa,
    ),
    "halueval-dialogue": PromptSet(
        "dialogues about a passage, which stands before them; the right response is the reference",
        f"dialogue_data.json; {ENDINGS}",
        "knowledge, dialogue_history, right_response",
        _HALUEVAL,
        "compare --criteria halueval",
        _halueval_dialogue,
    ),
    "halueval-summarization": PromptSet(
        "documents to summarise; the right summary is the reference",
        f"summarization_data.json; {ENDINGS}",
        "document, right_summary",
        _HALUEVAL,
        "compare --criteria halueval",
        _halueval_summarization,
    ),
    "factscore": PromptSet(
        "biographies; the beginning of the person's Wikipedia page is the reference",
        "prompt_entities.txt (500 of the unlabelled part) and, by --wikipedia, enwiki-20230401.db",
        "a title a line; table documents(title, text)",
        "github.com/shmsw25/FActScore, its data folder",
        "compare --criteria factscore",
        _factscore,
    ),
}
"""By the name that results have (see docs/evaluation.md)."""
