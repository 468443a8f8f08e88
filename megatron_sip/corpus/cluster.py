"""A corpus on many nodes: a step for datatrove (the extra `cluster-data`), whose executors start its tasks by SLURM.

    SlurmPipelineExecutor([MakeShards(work, out)], tasks=500, ...).run()

Tasks share nothing but the folder, in which they write what the command on one node writes: shards, each with its mark. That
command, given afterwards, makes what is missing and writes the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from megatron_sip.corpus.folder import CorpusFolder
from megatron_sip.corpus.work import CorpusWork, make_shard


class MakeShards(PipelineStep):
    """Makes every `world_size`-th shard of a work as far as it is not there. Raises CorpusError for a folder of other work."""

    name, type = "documents that the rules keep", "megatron_sip"

    def __init__(self, work: CorpusWork, out: Path) -> None:
        super().__init__()
        self.work, self.out = work, out
        with CorpusFolder.open(out, work.identity()):
            pass

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """A task; yields nothing. Its statistics are the counts of its shards."""
        folder = CorpusFolder(self.out)
        for shard in self.work.shards[rank::world_size]:
            if folder.mark(shard.name) is None:
                make_shard(self.work, folder, shard, lambda documents, size: None)
            for name, count in (folder.mark(shard.name) or {"counts": {}})["counts"].items():
                self.stat_update(name, value=count)
        yield from ()
