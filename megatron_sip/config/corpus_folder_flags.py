"""The flags of `dedup` and `roles`, the commands that make a corpus of a corpus, and what they are told by them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sip.config.corpus_flags import SHARD_FLAGS, require_workers
from megatron_sip.config.flags import Flags, add_flags
from megatron_sip.config.prepare_flags import READ_FLAGS, shares_of
from megatron_sip.corpus.dedup import DedupWork
from megatron_sip.corpus.minhash import DedupError, NearSettings
from megatron_sip.corpus.ngrams import NGRAM
from megatron_sip.corpus.roles import RolesWork
from megatron_sip.data.source_files import parse_data_path

CORPUS_FLAGS: Flags = {
    "--data-path": (
        {"required": True, "metavar": "DIR", "type": Path},
        "Corpus that redpajama, slimpajama, text or dedup finished.",
    ),
    "--out": ({"required": True, "metavar": "DIR", "type": Path}, "Folder of the new corpus and its manifest.json."),
    "--workers": SHARD_FLAGS["--workers"],
}
DEDUP_FLAGS: Flags = {
    "--similarity": (
        {"type": float, "default": NearSettings().similarity},
        "Texts whose sets of word n-grams are at least so alike (Jaccard) are near-duplicates.",
    ),
    "--ngram": ({"type": int, "default": NGRAM, "metavar": "WORDS"}, "Length of these n-grams."),
    "--exact-only": (
        {"action": "store_true"},
        "Only texts of the same words (without case and punctuation) are repetitions.",
    ),
    "--signatures": (
        {"nargs": "+", "metavar": "FILE"},
        "RedPajama-V2's minhash/*.parquet of the documents, in place of signatures made here: texts that share a band of "
        "signature_sim0.8 (or --similarity 0.7, 0.9, 1.0) are near-duplicates.",
    ),
}
MEMORY = (
    "Memory: 100 bytes a document, 200 for each band that it shares with another, and for each process 300 MB and 0.8 KB a "
    "document of its shard, which is a file; with --signatures 100 bytes a row of those files more. Disk, until it is "
    "finished: 0.8 KB a document."
)


def add_roles_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `roles`."""
    add_flags(parser, CORPUS_FLAGS)
    add_flags(parser, {name: READ_FLAGS[name] for name in ("--role-shares", "--split")})


def roles_work(args: argparse.Namespace) -> RolesWork:
    """What `roles` does. Raises UserError, naming the flag."""
    require_workers(args.workers)
    return RolesWork(args.data_path, args.out, shares_of(args), args.workers)


def add_dedup_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `dedup`."""
    add_flags(parser, CORPUS_FLAGS)
    add_flags(parser.add_argument_group("what repeats another document"), DEDUP_FLAGS)
    parser.epilog = MEMORY


def dedup_work(args: argparse.Namespace) -> DedupWork:
    """What `dedup` does. Raises UserError, naming the flag."""
    given = {
        "--similarity": args.similarity != NearSettings().similarity,
        "--ngram": args.ngram != NGRAM,
        "--signatures": args.signatures,
    }
    unused = [flag for flag, is_given in given.items() if args.exact_only and is_given]
    unused += ["--ngram"] if args.signatures and args.ngram != NGRAM and not args.exact_only else []
    if unused:
        beside = "--exact-only" if args.exact_only else "--signatures"
        raise DedupError(f"{', '.join(unused)}: of no effect with {beside}: leave out one or the other")
    near = None if args.exact_only else NearSettings(args.similarity, args.ngram)
    paths = (
        [path for spec in parse_data_path(args.signatures, "--signatures") for path in spec.paths]
        if args.signatures
        else ()
    )
    require_workers(args.workers)
    return DedupWork(args.data_path, args.out, near, tuple(paths), args.workers)
