"""The flags of `redpajama`, `slimpajama` and `text`, the commands that make a corpus of raw shards."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_sip.config.flags import Flags, add_flags
from megatron_sip.config.unused_flags import refuse_unused
from megatron_sip.corpus.contamination import Contamination, EvaluationFile
from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.ngrams import NGRAM
from megatron_sip.corpus.quality import QualitySettings
from megatron_sip.corpus.rules import Rule
from megatron_sip.corpus.shards import Fields, shards_in
from megatron_sip.corpus.work import CorpusWork, make_corpus
from megatron_sip.data.rows import ENDINGS
from megatron_sip.data.source_files import parse_data_path
from megatron_sip.data.text_sources import SUPPORTED, is_text_source

SHARD_FLAGS: Flags = {
    "--data-path": ({"nargs": "+", "required": True, "metavar": "FILE"}, f"Shards or globs of them: {SUPPORTED}."),
    "--out": (
        {"required": True, "metavar": "DIR"},
        "Folder of documents/, shards/ and manifest.json. The same command goes on with what it holds.",
    ),
    "--workers": (
        {"type": int, "default": len(os.sched_getaffinity(0)), "metavar": "N"},
        "Processes; each makes a whole shard at a time.",
    ),
    "--on-broken": (
        {"choices": ["stop", "drop"], "default": "stop"},
        "At a row that is no record, a file that is cut short, two files that are not of each other: stop and name it; or "
        "drop the row, or what is left of the shard, and count it.",
    ),
}
FIELD_FLAGS: Flags = {
    "--text-field": ({"default": "text", "metavar": "NAME"}, "Field that holds the text; dots lead into objects."),
    "--id-field": ({"metavar": "NAME"}, "Field that holds the id. Default: file and row."),
    "--subset-field": ({"metavar": "NAME"}, "Field after which documents are counted. Default: the file's name."),
}
DECONTAMINATE_FLAGS: Flags = {
    "--decontaminate": (
        {"nargs": "+", "default": [], "metavar": "SET=FILE"},
        f"Drop documents that share {NGRAM} words in a row with an evaluation set, counted by set. A file ({ENDINGS}; or .txt, "
        "a text a line) counts with all of its texts, SET=FILE:FIELD with one field. Several files may be of one set.",
    ),
}
PAPER = QualitySettings("unsafe")


def _bounds(helps: dict[str, str]) -> Flags:
    """Flags for fields of QualitySettings, whose defaults are theirs."""
    places = {flag: flag.removeprefix("--").replace("-", "_") for flag in helps}
    return {flag: ({"type": float, "default": getattr(PAPER, places[flag])}, text) for flag, text in helps.items()}


BOUND_FLAGS = _bounds(
    {
        "--min-words": "Fewest words.",
        "--max-words": "Most words: as the paper's code has it; a comment in it says 10000.",
        "--min-word-length": "Least mean length of words, in characters.",
        "--max-word-length": "Greatest mean length of words.",
        "--max-symbol-ratio": "Most hash signs and ellipses for each word.",
        "--max-bullet-lines": "Greatest share of lines that begin with a bullet point.",
        "--max-top-2gram": "Greatest share of characters in the most frequent pair of words.",
    }
)
GOPHER_FLAGS = _bounds(
    {
        "--max-ellipsis-lines": "Greatest share of lines that end with an ellipsis.",
        "--max-words-without-letters": "Greatest share of words without a letter from a to z.",
        "--min-stop-words": "Fewest stop words; 0 for languages other than English, and in other scripts also "
        "--max-words-without-letters 1.",
    }
)
UNSAFE_FLAGS: Flags = {
    **_bounds({"--min-unsafe-words": "Fewest words of the list LDNOOBW."}),
    "--unsafe-tags": (
        {"choices": ["and", "or"], "default": PAPER.unsafe_tags},
        "These words and a domain on UT1's blacklist, as the paper's code says; or either, as its prose says.",
    ),
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """A kind of raw corpus. about: a line of help. fields: where its records hold what. filters: --keep, the default first."""

    about: str
    fields: Fields
    filters: tuple[str, ...]


CORPORA = {
    "redpajama": Corpus(
        "documents of RedPajama-V2, by their quality signals",
        Fields("raw_content"),
        ("gopher", "unsafe", "all"),
    ),
    "slimpajama": Corpus(
        "documents of SlimPajama",
        Fields("text", subset="meta.redpajama_set_name"),
        ("all", "gopher"),
    ),
    "text": Corpus("documents of any JSON lines or parquet", Fields("text"), ("all", "gopher")),
}


def add_corpus_flags(name: str) -> Callable[[argparse.ArgumentParser], None]:
    """What adds the flags of the command `name`, one of CORPORA."""
    corpus = CORPORA[name]

    def add(parser: argparse.ArgumentParser) -> None:
        add_flags(parser.add_argument_group("shards"), SHARD_FLAGS)
        add_flags(parser.add_argument_group("fields"), FIELD_FLAGS)
        group = parser.add_argument_group("what is kept")
        group.add_argument(
            "--keep",
            choices=corpus.filters,
            default=corpus.filters[0],
            help="gopher: the rules of quality (of signals, where there are some). unsafe: the paper's filter for unsafe "
            "documents. all: every document that is not empty.",
        )
        add_flags(group, DECONTAMINATE_FLAGS)
        add_flags(group, BOUND_FLAGS)
        add_flags(parser.add_argument_group("--keep gopher"), GOPHER_FLAGS)
        if "unsafe" in corpus.filters:
            add_flags(parser.add_argument_group("--keep unsafe"), UNSAFE_FLAGS)
        parser.set_defaults(text_field=corpus.fields.text, id_field=corpus.fields.id, subset_field=corpus.fields.subset)

    return add


def corpus_command(name: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """What makes the corpus that the flags of the command `name` tell of, down to its manifest."""

    def run(given: argparse.Namespace) -> dict[str, Any]:
        require_workers(given.workers)
        return make_corpus(corpus_work(name, given), Path(given.out), given.workers)

    return run


def require_workers(workers: int) -> None:
    """Raises CorpusError for fewer than one."""
    if workers < 1:
        raise CorpusError(f"--workers {workers}: at least 1 is needed")


def corpus_work(name: str, args: argparse.Namespace) -> CorpusWork:
    """What is to be made. Raises CorpusError, DataError, PrepareError, which name the flag or file."""
    quality = quality_settings(name, args)
    refuse_own_output(args.data_path, Path(args.out))
    is_redpajama = name == "redpajama"
    where = Fields(
        args.text_field, args.id_field, args.subset_field, is_redpajama and quality.keep != "all", is_redpajama
    )
    rules: tuple[Rule, ...] = quality.rules()
    settings: dict[str, Any] = {"fields": asdict(where), "quality": asdict(quality)}
    if args.decontaminate:
        contamination = Contamination.of([EvaluationFile.parse(given) for given in args.decontaminate])
        rules, settings = (*rules, contamination), {**settings, "decontaminate": contamination.summary}
    return CorpusWork(
        name, shards_in(text_files(args.data_path), where), where, rules, settings, args.on_broken == "drop"
    )


def quality_settings(name: str, args: argparse.Namespace) -> QualitySettings:
    """What is kept. Raises DataError for flags of another filter."""
    unused = {
        "all": (*BOUND_FLAGS, *GOPHER_FLAGS, *UNSAFE_FLAGS),
        "gopher": tuple(UNSAFE_FLAGS),
        "unsafe": tuple(GOPHER_FLAGS),
    }[args.keep]
    known = [flag for flag in unused if flag not in UNSAFE_FLAGS or "unsafe" in CORPORA[name].filters]
    refuse_unused(args, add_corpus_flags(name), known, f"with --keep {args.keep}")
    given = vars(args)
    return QualitySettings(**{each.name: given[each.name] for each in fields(QualitySettings) if each.name in given})


def refuse_own_output(data_path: list[str], out: Path) -> None:
    """Raises CorpusError where a pattern would name what is written: the same command would then be given other files."""
    written = [(out / name).absolute().parts for name in ("documents/0.jsonl.zst", "shards/0.json", "manifest.json")]
    for entry in data_path:
        pattern = Path(entry).expanduser().absolute().parts
        if any(_matches(parts, pattern) for parts in written):
            raise CorpusError(f"--out {out}: --data-path {entry!r} names the files in it, too: name another folder")


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or (not parts and pattern[0] != "**"):
        return not parts and not pattern
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def text_files(data_path: list[str]) -> tuple[Path, ...]:
    """The files that --data-path names, in order. Raises CorpusError, DataError."""
    specs = parse_data_path(data_path)
    if specs[0].weight is not None:
        raise CorpusError("--data-path: every document is read, so that weights mean nothing: leave them out")
    paths = [path for spec in specs for path in spec.paths]
    if stores := [path for path in paths if not is_text_source(path)]:
        raise CorpusError(f"--data-path {stores[0]}: tokens have no text: name text files ({SUPPORTED})")
    return tuple(paths)
