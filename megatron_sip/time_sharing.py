"""GPUs that trainer and engines share in turns (--colocate): who has their memory in which part of a step.

    experience: engines -> to_trainer: train -> to_engines: push weights, then the next experience

The trainer keeps weights, gradients and optimizer; what it gives back is what a step's activations took.
"""

from __future__ import annotations

import torch

from megatron_sip.rollout.engine_memory import EngineMemory
from megatron_sip.serving.local_servers import LocalServers
from megatron_sip.training.leaders import LeaderExchange


class TimeSharing:
    """This rank's part in it. servers: on the rank that started the engines, which alone tells them; None on the others."""

    def __init__(self, exchange: LeaderExchange, engines: EngineMemory, servers: LocalServers | None) -> None:
        self._exchange = exchange
        self._engines = engines
        self._servers = servers

    def to_trainer(self) -> None:
        """Once the experience of all replicas is there: engines free their memory. Collective."""
        if self._servers is not None:
            self._servers.expect_silent_engines(True)
            self._engines.release()
        self._exchange.barrier()

    def to_engines(self) -> None:
        """The trainer frees what it can, and engines take theirs again. Collective; the weights are pushed next."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._exchange.barrier()
        if self._servers is not None:
            self._engines.resume()
            self._servers.expect_silent_engines(False)
        self._exchange.barrier()  # no replica may send weights to an engine that has no memory yet
