"""Shards in several processes, with a bar that counts documents while they are worked on."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext
from typing import Any

from tqdm import tqdm

from megatron_sip.child_processes import kill_with_parent
from megatron_sip.console import bars
from megatron_sip.corpus.folder import CorpusError

_POLL_S = 0.2
_BYTES_PER_PROCESS = 1 << 22
"""Of input, at least: a process takes a second to start."""

Tick = Callable[[int, int], object]
"""Called with how many more documents, and bytes of input, are behind."""
type Work[T] = Callable[[T, Tick], object]
"""What is done to a shard, however it is described; both can be pickled."""


def work_on[T](shards: Sequence[T], work: Work[T], processes: int, total: int, title: str) -> None:
    """Call `work` on each shard, in up to `processes` processes; the first error ends all of them. total: bytes of input.

    Raises CorpusError where a process dies, and what `work` raises.
    """
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, file=bars()) as bar:
        shown = 0

        def show(documents: int, size: int) -> None:
            nonlocal shown
            shown += documents
            rate = round(shown / max(bar.format_dict["elapsed"], 1e-3))
            bar.set_postfix(documents=shown, per_s=rate, refresh=False)
            bar.update(size)

        processes = min(processes, len(shards), -(-total // _BYTES_PER_PROCESS))
        if processes > 1:
            _in_processes(shards, work, processes, show)
        else:
            for shard in shards:
                work(shard, show)


def _in_processes[T](shards: Sequence[T], work: Work[T], processes: int, show: Tick) -> None:
    context = multiprocessing.get_context("spawn")
    counters = _Counters.new(context)
    with ProcessPoolExecutor(processes, context, _start, (work, counters)) as pool:
        others = set(multiprocessing.active_children())
        waiting: set[Future[None]] = {pool.submit(_run, shard) for shard in shards}
        try:
            while waiting:
                done, waiting = wait(waiting, _POLL_S, FIRST_COMPLETED)
                show(*counters.take())
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise CorpusError(
                f"a process died (out of memory?): give the command again, with fewer --workers than {processes}"
            ) from error
        finally:
            if waiting:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()


@dataclass(frozen=True, slots=True)
class _Counters:
    """Shared by the processes: what none has shown yet."""

    documents: Any
    bytes: Any

    @classmethod
    def new(cls, context: SpawnContext) -> _Counters:
        return cls(context.Value("q", 0), context.Value("q", 0))

    def add(self, documents: int, size: int) -> None:
        for counter, more in ((self.documents, documents), (self.bytes, size)):
            with counter.get_lock():
                counter.value += more

    def take(self) -> tuple[int, int]:
        taken = self.documents.value, self.bytes.value
        self.add(-taken[0], -taken[1])
        return taken


class _Worker:
    """The state of one worker process, set once by the pool's initializer."""

    work: tuple[Work[Any], Tick]


def _start(work: Work[Any], counters: _Counters) -> None:
    kill_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    _Worker.work = work, counters.add


def _run(shard: Any) -> None:
    work, tick = _Worker.work
    work(shard, tick)
