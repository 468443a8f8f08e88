"""Small corpora, as the commands that make them leave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sip.corpus.counting import mark_of, summed
from megatron_sip.corpus.folder import SUFFIX, CorpusFolder, read_documents, writing_documents
from megatron_sip.corpus.rules import Document


def write_corpus(folder: Path, shards: Mapping[str, Sequence[str]]) -> Path:
    """A finished corpus: of each shard its texts."""
    with CorpusFolder.open(folder, {"made": "by a test"}) as corpus:
        for name, texts in shards.items():
            with writing_documents(corpus.documents(name)) as write:
                for number, text in enumerate(texts):
                    write(Document(f"{name}/{number}", text, f"{name}-subset"))
            corpus.mark_done(name, mark_of(corpus, [], [corpus.documents(name)], {"documents/kept": len(texts)}))
        corpus.finish({"command": "text", **summed(corpus, shards)[0]})
    return folder


def read_corpus(folder: Path) -> dict[str, list[Document]]:
    """Of each shard its documents; shards below other folders are called after these, too."""
    top = folder / "documents"
    paths = sorted(top.rglob(f"*{SUFFIX}"))
    return {str(path.relative_to(top)).removesuffix(SUFFIX): list(read_documents(path)) for path in paths}
