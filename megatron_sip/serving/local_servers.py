"""The servers that a run starts on its own node, and the URLs of all that it talks to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from megatron_sip.serving.keeper import Keeper, any_answers
from megatron_sip.serving.launch import LocalServer, ServerSettings, start_servers, stop_servers
from megatron_sip.stop_signal import StopSignal

ENGINE_MARGIN = 8
"""SGLang takes no prompt that comes nearer than this to the end of its context, even if nothing is to be generated."""
ENGINE_FLAGS = ("--load-format=dummy", "--enable-fp32-lm-head")
"""The trainer pushes its weights before the first rollout, so engines need not read any; logits in float32 as here."""


@dataclass(frozen=True, slots=True)
class ServerUrls:
    """Where servers answer; empty for those that are not there, or not yet."""

    engines: Sequence[str] = ()
    teacher: Sequence[str] = ()
    rewriter: Sequence[str] = ()
    eval_judge: Sequence[str] = ()

    def __bool__(self) -> bool:
        return any((self.engines, self.teacher, self.rewriter, self.eval_judge))

    def completed_by(self, started: ServerUrls) -> ServerUrls:
        """These, and of `started` those of servers that are named by no URL here."""
        return ServerUrls(
            self.engines or started.engines,
            self.teacher or started.teacher,
            self.rewriter or started.rewriter,
            self.eval_judge or started.eval_judge,
        )


@dataclass(frozen=True, slots=True)
class LocalServerSettings:
    """What a run starts: `engines` times `engine`, `teachers` times `teacher`, a rewriter of its own; None: none of that kind.

    share_gpus: servers share the GPUs that the trainer leaves, or its last one. colocate: engines are on the trainer's GPUs.
    """

    engine: ServerSettings | None = None
    engines: int = 1
    teacher: ServerSettings | None = None
    teachers: int = 1
    rewriter: ServerSettings | None = None
    share_gpus: bool = False
    colocate: bool = False

    @property
    def count(self) -> int:
        """How many servers these are."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many engines, teachers and rewriters."""
        kinds = ((self.engine, self.engines), (self.teacher, self.teachers), (self.rewriter, 1))
        engines, teachers, rewriters = (count if server is not None else 0 for server, count in kinds)
        return engines, teachers, rewriters

    @property
    def description(self) -> str:
        """What is started, in words; empty when nothing is."""
        engines = "an engine" if self.engines == 1 else f"{self.engines} engines"
        teachers = "the teacher" if self.teachers == 1 else f"{self.teachers} teachers"
        named = ((self.engine, engines), (self.teacher, teachers), (self.rewriter, "the rewriter"))
        return " and ".join(name for server, name in named if server is not None)


class LocalServers:
    """The engines, teacher and rewriter of this node, started in the background while the model is being built."""

    def __init__(self, settings: LocalServerSettings) -> None:
        self.description = settings.description
        self._threads = ThreadPoolExecutor(3)
        gpus = spare_gpus(settings)
        engines, teachers, _ = settings.counts
        self._engines = self._start(settings.engine, gpus[:engines] if gpus else None, settings.engines)
        theirs = gpus[engines : engines + teachers] if gpus else None
        self._teacher = self._start(settings.teacher, theirs, settings.teachers)
        self._rewriter = self._start(settings.rewriter, gpus[-1:] if gpus else None)
        self._keepers: list[Keeper] = []
        self._engine_keepers: list[Keeper] = []

    def _start(
        self, server: ServerSettings | None, devices: tuple[int, ...] | None, count: int = 1
    ) -> Future[list[LocalServer]] | None:
        if server is None:
            return None
        return self._threads.submit(start_servers, count, replace(server, devices=devices))

    def urls(self) -> ServerUrls:
        """Once all of them are healthy. Raises what starting them raised."""
        found = [future.result() if future is not None else [] for future in self._futures()]
        return ServerUrls(*([server.url for server in servers] for servers in found))

    def keep(self, stop: StopSignal) -> None:
        """From now on, when all are healthy, start those again that end or hang, until the stop is requested: by us with the
        reason, if one has to be given up."""
        kinds = zip(("the engine", "the teacher", "the rewriter"), self._futures(), strict=True)
        for name, started in kinds:
            servers = started.result() if started is not None else []
            keepers = [Keeper(name, server, stop.request, rests=lambda: stop.requested) for server in servers]
            self._keepers += keepers
            if started is not None and started is self._engines:
                self._engine_keepers = keepers

    def await_engines(self) -> bool:
        """Wait until an engine answers, started again if it must be; False where all are given up, or none was started."""
        return any_answers(self._engine_keepers)

    def expect_silent_engines(self, silent: bool) -> None:
        """Whether engines answer nothing for now, see `Keeper.expect_silence`."""
        for keeper in self._engine_keepers:
            keeper.expect_silence(silent)

    def stop(self) -> None:
        """Stop whatever was started, all at the same time; waits for a first start under way."""
        if self._keepers:
            with ThreadPoolExecutor(len(self._keepers)) as threads:
                list(threads.map(Keeper.close, self._keepers))
        futures = [started for started in self._futures() if started is not None and started.exception() is None]
        stop_servers([server for started in futures for server in started.result()])
        self._threads.shutdown()

    def _futures(self) -> tuple[Future[list[LocalServer]] | None, ...]:
        return self._engines, self._teacher, self._rewriter


def spare_gpus(settings: LocalServerSettings) -> tuple[int, ...] | None:
    """A GPU for each server of this node, as indices among those that we see; None without GPUs."""
    import torch

    if not torch.cuda.is_available():
        return None
    first = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    gpus = torch.cuda.device_count() if settings.share_gpus else None
    if not settings.colocate:
        return server_gpus(first, settings.count, gpus)
    engines, _, _ = settings.counts
    return (*(engine % first for engine in range(engines)), *server_gpus(first, settings.count - engines, gpus))


def server_gpus(first: int, servers: int, shared: int | None) -> tuple[int, ...]:
    """The GPUs from `first` on, one a server; where the node's `shared` GPUs may be shared, those again and again.

    When the trainer's processes take all of them, servers are on its last one.
    """
    places = range(first, first + servers) if shared is None else range(min(first, shared - 1), shared)
    return tuple(places[server % len(places)] for server in range(servers))
