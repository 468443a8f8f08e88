"""`roles`: a corpus whose every document is for one role and one split, by a hash of its text (data/roles.py)."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sip.corpus.counting import mark_of, summed
from megatron_sip.corpus.folder import CorpusFolder, made_of, name_of, read_documents, shards_of, writing_documents
from megatron_sip.corpus.workers import Tick, work_on
from megatron_sip.data.corpus_files import CorpusFile
from megatron_sip.data.role_corpus import COMMAND, shares_json
from megatron_sip.data.roles import ROLES, SPLITS, Shares, text_key

log = logging.getLogger(__name__)

PARTS = tuple((role, split) for role in ROLES for split in SPLITS)


@dataclass(frozen=True, slots=True)
class RolesWork:
    """corpus: folder of the documents. shares: what each role, and each split of it, gets."""

    corpus: Path
    out: Path
    shares: Shares
    workers: int = 1


def divide(work: RolesWork) -> dict[str, Any]:
    """The manifest of the corpus with roles. Raises CorpusError, DataError."""
    shards = shards_of(work.corpus)
    if (made_by := CorpusFolder(work.corpus).manifest()["command"]) != "dedup":
        log.warning(
            "--data-path %s: %s made it, not dedup: nearly the same text may be in several roles and splits",
            work.corpus,
            made_by,
        )
    about = {
        "command": COMMAND,
        "settings": shares_json(work.shares),
        "made_from": made_of(work.corpus),
    }
    with CorpusFolder.open(work.out, about) as folder:
        left = [shard for shard in shards if folder.mark(name_of(shard.path)) is None]
        if not left and folder.is_finished():
            return folder.manifest()
        work_on(
            left, partial(divide_shard, folder, work.shares), work.workers, sum(each.bytes for each in left), COMMAND
        )
        found, _ = summed(folder, (name_of(shard.path) for shard in shards))
        return folder.finish({**about, **found})


def divide_shard(folder: CorpusFolder, shares: Shares, shard: CorpusFile, tick: Tick) -> None:
    """Write each document of a shard to the file of its role and split, and then the shard's mark. Raises DataError."""
    shard.check()
    name = name_of(shard.path)
    counts: Counter[str] = Counter()
    paths = {part: folder.documents(name, "/".join(part)) for part in PARTS}
    with ExitStack() as stack:
        writers = {part: stack.enter_context(writing_documents(path)) for part, path in paths.items()}
        for document in read_documents(shard.path, tick):
            key = text_key(document.text)
            part = shares.role(key), shares.split(key)
            writers[part](document)
            counts["documents/read"] += 1
            counts["documents/kept"] += 1
            counts[f"by_subset/{document.subset}"] += 1
            counts[f"by_role/{'/'.join(part)}"] += 1
    folder.mark_done(name, mark_of(folder, [shard.path], paths.values(), counts))
