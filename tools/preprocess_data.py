"""Tokenise text offline into Megatron's PREFIX.bin/.idx.

    python tools/preprocess_data.py --input 'data/*.jsonl.zst' --tokenizer HF_DIR --output-prefix data/train

Reads .jsonl, .ndjson, .json (one object per line; also .gz and .zst) and .parquet. A single file becomes PREFIX.bin/.idx,
several become PREFIX_<name>.bin/.idx, one pair per file; where two have the same name, their folders become part of it
(a/x.jsonl b/x.jsonl: PREFIX_a_x, PREFIX_b_x). The same command after a kill leaves out the files that are done: what each pair
was made of stands beside it in .made_of. Training reads either with `--data-path PREFIX`; it would also
tokenise the text by itself, once, into its cache. Megatron reads the pairs too.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_sip.data.source_files import parse_data_path
from megatron_sip.data.text_sources import is_text_source, source_suffix
from megatron_sip.data.token_store import bin_path, idx_path
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeSettings, tokenize_file
from megatron_sip.errors import DataError
from megatron_sip.files import move_into_place, read_json, write_atomically


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="text files or quoted globs")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer: a folder or a model name")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--text-field", default="text", help="JSON field or parquet column of the text (default: text)")
    parser.add_argument("--no-append-eos", action="store_true", help="do not end documents with the EOS token")
    parser.add_argument(
        "--prepend-bos",
        choices=("auto", "on", "off"),
        default="auto",
        help="begin documents with BOS; auto (default): if the tokenizer puts one before plain text",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: as the file's size calls for (default)")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return parser.parse_args(arguments)


def preprocess(arguments: argparse.Namespace) -> None:
    """Tokenise every input; an output appears only when it is complete. Raises `DataError` for bad input."""
    from transformers import AutoTokenizer

    settings = TokenizeSettings(
        text_field=arguments.text_field,
        append_eos=not arguments.no_append_eos,
        prepend_bos=arguments.prepend_bos,
        workers=arguments.workers,
    )
    specs = parse_data_path(arguments.input, "--input")
    if specs[0].weight is not None:
        raise DataError("--input takes no weights: they belong to the training run's --data-path")
    sources = [path for spec in specs for path in spec.paths]
    for source in sources:
        if not is_text_source(source):
            raise DataError(f"{source} is tokenised already; --input takes text")
    outputs = output_prefixes(arguments.output_prefix, sources)
    encoder = DocumentEncoder.of(AutoTokenizer.from_pretrained(arguments.tokenizer), settings)
    wanted = [made_of(source, encoder, settings) for source in sources]
    done = [not arguments.overwrite and is_done(prefix, what) for prefix, what in zip(outputs, wanted, strict=True)]
    for prefix, is_there in zip(outputs, done, strict=True):
        if idx_path(prefix).exists() and not (is_there or arguments.overwrite):
            raise DataError(
                f"{idx_path(prefix)} exists, and is not known to be made of this; pass --overwrite, or choose another "
                "--output-prefix"
            )
    arguments.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    for source, prefix, what, is_there in zip(sources, outputs, wanted, done, strict=True):
        if is_there:
            print(f"{source}: its tokens are in {prefix} already", file=sys.stderr)
            continue
        staged = prefix.with_name(prefix.name + ".partial")
        report = tokenize_file(source, staged, encoder, settings)
        idx_path(prefix).unlink(missing_ok=True)  # a kill between the two renames must not leave an old one
        move_into_place(bin_path(staged), bin_path(prefix))
        write_atomically(record_path(prefix), json.dumps(what) + "\n")
        move_into_place(idx_path(staged), idx_path(prefix))
        print(json.dumps(asdict(replace(report, source=str(source))) | {"prefix": str(prefix)}))


def made_of(source: Path, encoder: DocumentEncoder, settings: TokenizeSettings) -> dict[str, Any]:
    """What a pair depends on."""
    stat = source.stat()
    content = {"source": str(source.resolve()), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
    return content | {"tokenizer": encoder.fingerprint(), "text_field": settings.text_field}


def is_done(prefix: Path, what: dict[str, Any]) -> bool:
    """Whether the pair is there, and made of this. Raises DataError for a record that is none."""
    record = record_path(prefix)
    there = all(path.exists() for path in (bin_path(prefix), idx_path(prefix), record))
    return there and read_json(record, "what a token store was made of") == what


def record_path(prefix: Path) -> Path:
    """Where that is written: before the pair has its names, so that no pair stands with another one's record."""
    return prefix.with_name(prefix.name + ".made_of")


def output_prefixes(prefix: Path, sources: Sequence[Path]) -> list[Path]:
    """One prefix a source: `prefix` itself for a single one, else with the source's name, or with its folders and name
    below their common folder where two have the same name. Raises `DataError` where even those are equal."""
    if len(sources) == 1:
        return [prefix]
    names = [source.name[: -len(source_suffix(source))] for source in sources]
    if len(set(names)) < len(names):
        common = Path(os.path.commonpath([source.parent for source in sources]))
        folders = [source.parent.relative_to(common).parts for source in sources]
        names = ["_".join((*parts, name)) for parts, name in zip(folders, names, strict=True)]
    seen: dict[str, Path] = {}
    for name, source in zip(names, sources, strict=True):
        if name in seen:
            raise DataError(
                f"{seen[name]} and {source} would both become {prefix.name}_{name}: tokenise one of them by itself, with "
                "another --output-prefix"
            )
        seen[name] = source
    return [prefix.with_name(f"{prefix.name}_{name}") for name in names]


def main() -> None:
    try:
        preprocess(parse_arguments())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
