"""What `megatron-sip-prepare dedup` finds of planted near-duplicates, how fast, in how much memory.

    python benchmarks/dedup.py --documents 50000

Of texts of 400 made-up words some have a partner further on that shares 13-grams with it to a known degree (Jaccard
similarity), or is the same but for case and punctuation. Recall and precision are of the partners that should go: those alike
to 0.8 and more. Beside it stands what datasketch's own index of the same signatures takes.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from machine import describe_machine, format_table, write_report
from prepare_corpus import measured, resident_mb

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from duplicate_cases import jaccard, planted_pair, vocabulary

from megatron_sip.corpus.counting import mark_of, summed
from megatron_sip.corpus.folder import CorpusFolder, read_documents, shards_of, writing_documents
from megatron_sip.corpus.minhash import PLACES, NearSettings, Signer, band_keys, similarity
from megatron_sip.corpus.near_duplicates import originals
from megatron_sip.corpus.rules import Document

RESULTS = Path(__file__).parent / "results" / "dedup_cpu.json"
SHARDS, WORDS, PAIRS, BOUND = 8, 400, 1000, 0.8
SIMILARITIES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.5)
INDEXED = 20_000


def make_corpus(folder: Path, count: int) -> dict[str, float]:
    """Of each partner, by its id, how alike it is to the text that it is made of. Partners stand behind all of these."""
    words, draws = vocabulary(0), random.Random(0)
    firsts, partners = [], []
    alike: dict[str, float] = {}
    for wanted in SIMILARITIES:
        for number in range(PAIRS):
            first, second = planted_pair(words, wanted, number, WORDS)
            firsts.append(("", " ".join(first)))
            partners.append((f"near-{wanted}-{number}", " ".join(second)))
            alike[partners[-1][0]] = jaccard(first, second)
    for number in range(PAIRS):
        text = " ".join(draws.choices(words, k=WORDS))
        firsts.append(("", text))
        partners.append((f"exact-{number}", text.capitalize() + "."))
        alike[partners[-1][0]] = 1.0
    while len(firsts) + len(partners) < count:
        firsts.append(("", " ".join(draws.choices(words, k=WORDS))))
    draws.shuffle(firsts)
    draws.shuffle(partners)
    documents = [*firsts, *partners]
    with CorpusFolder.open(folder, {"made": "dedup benchmark"}) as corpus:
        size = -(-len(documents) // SHARDS)
        for shard in range(SHARDS):
            with writing_documents(corpus.documents(str(shard))) as write:
                for number, (name, text) in enumerate(documents[shard * size : (shard + 1) * size]):
                    write(Document(name or f"{shard}/{number}", text, str(shard)))
            corpus.mark_done(str(shard), mark_of(corpus, [], [corpus.documents(str(shard))], {}))
        corpus.finish({"command": "text", **summed(corpus, map(str, range(SHARDS)))[0]})
    return alike


def found(out: Path, alike: dict[str, float], documents: int) -> dict[str, Any]:
    """Which partners went, by similarity; recall and precision of those that should have."""
    kept = {document.id for file in shards_of(out) for document in read_documents(file.path)}
    gone = {name for name in alike if name not in kept}
    planted = Counter(name.rpartition("-")[0] for name in alike)
    shares = {kind: sum(name.startswith(f"{kind}-") for name in gone) / count for kind, count in planted.items()}
    near = [name for name in gone if name.startswith("near")]
    wanted = [name for name in alike if name.startswith("near") and alike[name] >= BOUND]
    return {
        "share_dropped": dict(sorted(shares.items())),
        "recall": sum(name in gone for name in wanted) / len(wanted),
        "precision": sum(alike[name] >= BOUND for name in near) / len(near),
        "recall_at_0.9": shares["near-0.9"],
        "wrongly_dropped_at_0.7": shares["near-0.7"],
        "others_dropped": documents - len(kept) - len(gone),
    }


def indexes() -> dict[str, dict[str, float]]:
    """Of INDEXED signatures, what finding repetitions takes a document: by sorted keys, and by datasketch's index."""
    settings, draws = NearSettings(BOUND), np.random.default_rng(0)
    signatures = draws.integers(0, 1 << 32, (INDEXED, PLACES), np.uint32)
    assert Signer(settings).signature(["a"]).dtype == signatures.dtype
    figures = {}

    def measure(name: str, work: Any) -> None:
        before, start = resident_mb(os.getpid()), time.perf_counter()
        result = work()
        seconds, after = time.perf_counter() - start, resident_mb(os.getpid())
        figures[name] = {"us_a_document": seconds / INDEXED * 1e6, "bytes_a_document": (after - before) * 1e6 / INDEXED}
        del result

    def by_sorting() -> Any:
        keys = band_keys(signatures, settings.rows)
        everyone = np.ones(INDEXED, bool)
        return keys, originals(keys, everyone, lambda i, others: similarity(signatures[i], signatures[others]) >= BOUND)

    def by_datasketch() -> Any:
        index = MinHashLSH(num_perm=PLACES, params=(PLACES // settings.rows, settings.rows))
        for number, signature in enumerate(signatures):
            sketch = MinHash(PLACES, hashvalues=signature, scheme="affine32", permutations=shared)
            if not index.query(sketch):
                index.insert(number, sketch)
        return index

    shared = MinHash(PLACES).permutations
    measure("sorted_keys", by_sorting)
    measure("datasketch_index", by_datasketch)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        alike = make_corpus(root / "corpus", given.documents)
        words = ["dedup", "--data-path", str(root / "corpus")]
        runs = [measured(words, root / f"out-{workers}", workers) for workers in given.workers]
        report = {
            "documents": given.documents,
            "words_a_document": WORDS,
            "pairs_of_each_similarity": PAIRS,
            "runs": [asdict(run) for run in runs],
            **found(root / f"out-{given.workers[0]}", alike, runs[0].documents),
            "index": indexes(),
        }
    print(
        format_table(
            ["planted", "dropped"], [[kind, f"{share:.1%}"] for kind, share in report["share_dropped"].items()]
        )
    )
    write_report(RESULTS, {"machine": describe_machine(), **report})


if __name__ == "__main__":
    main()
