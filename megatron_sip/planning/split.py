"""The best division of GPUs into trainer, engines and judge, by trying all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_sip.errors import ArgumentError
from megatron_sip.planning.devices import Device
from megatron_sip.planning.memory import Parallel, server_capacity, trainer_memory
from megatron_sip.planning.shapes import ModelShape
from megatron_sip.planning.timing import Cluster, Machine, Order, Phases, Servers, phases, planned_rows
from megatron_sip.planning.work import Serving, Work

NODE, FEW = 8, 32
"""GPUs of a node, the unit in which the SLURM jobs divide them, and so many as are divided one by one."""
ENOUGH = 64
"""Sequences at once that a server should have room for: fewer leave its arithmetic idle."""


@dataclass(frozen=True, slots=True)
class Search:
    """What stays fixed: all `gpus`, the trainer's options but its sizes; tensor, pipeline, engine, judge: GPUs that share a
    model, None for the fewest that hold it."""

    gpus: int
    device: Device
    options: Parallel
    tensor: int | None = None
    pipeline: int | None = None
    engine: int | None = None
    judge: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A division, with what it comes to."""

    cluster: Cluster
    phases: Phases
    memory: dict[str, float]

    @property
    def shared(self) -> tuple[int, int]:
        """(GPUs that a copy of the trainer's model is on, stages)"""
        return self.cluster.trainer.tensor * self.cluster.trainer.pipeline, self.cluster.trainer.pipeline


def best_split(work: Work, machine: Machine, search: Search, order: Order) -> Planned:
    """The division with the shortest step.

    Raises:
        ArgumentError: in none of them every model fits.
    """
    found = [planned for split in splits(work, search) if (planned := plan_split(work, machine, search, split, order))]
    if not found:
        roles = roles_with_work(work)
        short = f", of which each of {roles} roles needs one" if search.gpus < roles else ""
        raise ArgumentError(
            f"--gpus {search.gpus}{short}: the models do not fit, however they are divided; take more GPUs"
        )
    return min(found, key=lambda planned: planned.phases.step(order))


def roles_with_work(work: Work) -> int:
    """How many of trainer, engines and judge have something to do."""
    return 1 + bool(work.rollouts.prefilled) + bool(work.judge.prefilled or work.rewrites.prefilled)


def splits(work: Work, search: Search) -> Iterator[tuple[int, int, int]]:
    """(trainer, engines, judge) in GPUs: whole nodes where there are several, but for the last role's; none without work."""
    unit, gpus = NODE if search.gpus > FEW else 1, search.gpus
    engines, judges = bool(work.rollouts.prefilled), bool(work.judge.prefilled or work.rewrites.prefilled)
    if not (engines or judges):
        yield gpus, 0, 0
        return
    for trainer in range(unit, gpus - unit + 1, unit):
        rest = gpus - trainer  # what is no whole node, too
        if not (engines and judges):
            yield trainer, rest * engines, rest * judges
            continue
        for sampling in range(unit, rest - unit + 1, unit):
            yield trainer, sampling, rest - sampling


def plan_split(
    work: Work, machine: Machine, search: Search, split: tuple[int, int, int], order: Order
) -> Planned | None:
    """One division, with the trainer's model on the fewest GPUs that hold it; None where a model does not fit."""
    trainer, *serving = split
    judged = work.judge if work.judge.prefilled else work.rewrites
    engines = servers_of(serving[0], search.engine, work.rollouts, machine.policy, machine, search.device)
    judges = servers_of(serving[1], search.judge, judged, machine.judge, machine, search.device)
    found: list[Planned] = []
    for tensor, pipeline in product(sizes(search.tensor, NODE), sizes(search.pipeline, machine.policy.layers)):
        data, rest = divmod(trainer, tensor * pipeline)
        if rest or not data or work.prompts % data:
            continue
        parallel = replace(search.options, tensor=tensor, pipeline=pipeline, data=data)
        rows, _ = planned_rows(work.training, data, math.lcm(search.device.row_multiple, tensor))
        memory = trainer_memory(machine.policy, work.training, parallel, rows)
        if sum(memory.values()) <= machine.efficiency.memory * search.device.memory:
            cluster = Cluster(search.device, parallel, engines, judges)
            found.append(Planned(cluster, phases(work, machine, cluster), memory))
    best = min(found, key=lambda planned: planned.shared, default=None)
    return best if best is not None and best.phases.step(order) < math.inf else None


def sizes(fixed: int | None, most: int) -> list[int]:
    """The `fixed` one, or powers of two up to `most`."""
    return [fixed] if fixed else [1 << power for power in range(most.bit_length())]


def servers_of(
    gpus: int, fixed: int | None, serving: Serving, shape: ModelShape, machine: Machine, device: Device
) -> Servers:
    """As many servers as possible: of so few GPUs each that they hold the model and ENOUGH sequences, or all there are."""
    for tensor in sizes(fixed, NODE):
        room = machine.efficiency.memory * device.memory * tensor
        holds = shape.served_bytes < room
        if holds and server_capacity(shape, room, serving.held) >= min(ENOUGH, serving.sequences):
            return Servers(gpus, tensor)
    return Servers(gpus, fixed or NODE)
