"""Tokenise text offline into Megatron's PREFIX.bin/.idx.

    python tools/preprocess_data.py --input 'data/*.jsonl.zst' --tokenizer HF_DIR --output-prefix data/train

Reads .jsonl, .ndjson, .json (one object a line; also .gz and .zst) and .parquet. A single file becomes PREFIX.bin/.idx,
several become PREFIX_<name>.bin/.idx, one pair a file. Training reads either with `--data-path PREFIX`; it would also
tokenise the text by itself, once, into its cache. Megatron reads the pairs too.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from megatron_sip.data.documents import parse_data_path
from megatron_sip.data.errors import DataError
from megatron_sip.data.text_sources import is_text_source
from megatron_sip.data.token_store import bin_path, idx_path
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeSettings, tokenize_file


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="text files or quoted globs")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer: a folder or a model name")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--text-field", default="text", help="JSON field or parquet column of the text (default: text)")
    parser.add_argument("--no-append-eos", action="store_true", help="do not end documents with the EOS token")
    parser.add_argument("--prepend-bos", action="store_true", help="start documents with the BOS token")
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
    sources = [path for spec in parse_data_path(arguments.input) for path in spec.paths]
    for source in sources:
        if not is_text_source(source):
            raise DataError(f"{source} is tokenised already; --input takes text")
    encoder = DocumentEncoder.of(AutoTokenizer.from_pretrained(arguments.tokenizer), settings)
    arguments.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    for source in sources:
        prefix = arguments.output_prefix
        if len(sources) > 1:
            prefix = prefix.with_name(f"{prefix.name}_{source.name.split('.')[0]}")
        if idx_path(prefix).exists() and not arguments.overwrite:
            raise DataError(f"{idx_path(prefix)} exists; pass --overwrite, or choose another --output-prefix")
        staged = prefix.with_name(prefix.name + ".partial")
        report = tokenize_file(source, staged, encoder, settings)
        bin_path(staged).rename(bin_path(prefix))
        idx_path(staged).rename(idx_path(prefix))
        print(json.dumps(asdict(replace(report, source=str(source))) | {"prefix": str(prefix)}))


def main() -> None:
    try:
        preprocess(parse_arguments())
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
