"""Seconds of a step by phase, from work, shapes and devices: the slower of arithmetic and memory, at a stated efficiency."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from megatron_sip.model.packing import plan_rows
from megatron_sip.planning.devices import Device, Efficiency, Factors
from megatron_sip.planning.memory import GRADIENT, Parallel, rank_parameters, server_capacity
from megatron_sip.planning.shapes import BF16, ModelShape
from megatron_sip.planning.work import Serving, Training, Work

Order = Literal["in turn", "on arrival", "one step ahead"]
"""How phases follow each other. in turn: all rollouts, then all judgements, then training. on arrival: a group is judged as
soon as its rollouts are there. one step ahead: and the next step's experience is made while this one trains. In all of them
rewrites are asked for a step ahead, while others train and sample. Roles that share processors take turns in any order."""
ORDERS: tuple[Order, ...] = ("in turn", "on arrival", "one step ahead")
OPTIMIZER_TRAFFIC = 40
"""Bytes a parameter that Adam reads and writes: gradient, master weight and moments there and back, the bf16 weight."""


@dataclass(frozen=True, slots=True)
class Servers:
    """`gpus` GPUs of a role, `tensor` of them a server."""

    gpus: int
    tensor: int = 1

    @property
    def count(self) -> int:
        """Servers."""
        return self.gpus // self.tensor


@dataclass(frozen=True, slots=True)
class Cluster:
    """Who has which GPUs, all of one kind."""

    device: Device
    trainer: Parallel
    engines: Servers
    judges: Servers


@dataclass(frozen=True, slots=True)
class Machine:
    """What formulas know of the models and of how well they run; factors: of a run that was measured."""

    policy: ModelShape
    judge: ModelShape
    efficiency: Efficiency = field(default_factory=Efficiency)
    factors: Factors = field(default_factory=Factors)


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of a step. rewrite: of the judge's servers, while others work; reference and train: of the trainer. shared:
    nothing goes on beside anything else."""

    rollout: float
    judge: float
    rewrite: float
    reference: float
    train: float
    sync: float
    shared: bool = False

    def step(self, order: Order) -> float:
        """Seconds of a whole step."""
        training, judging = self.reference + self.train, self.judge + self.rewrite
        if self.shared:
            return self.rollout + judging + training + self.sync
        experience = self.rollout + self.judge if order == "in turn" else max(self.rollout, self.judge)
        made = max(experience, training) if order == "one step ahead" else experience + training
        return max(made + self.sync, judging)

    def idle(self, order: Order) -> dict[str, float]:
        """The part of a step in which a role has nothing to do, by role."""
        step = self.step(order)
        busy = {
            "trainer": self.reference + self.train + self.sync,
            "engines": self.rollout + self.sync,
            "judge": self.judge + self.rewrite,
        }
        return {role: 1 - seconds / step for role, seconds in busy.items()}


def phases(work: Work, machine: Machine, cluster: Cluster) -> Phases:
    """A step's phases. A role without GPUs that has work takes for ever."""
    factors, policy = machine.factors, machine.policy
    reference, train = training_seconds(work.training, machine, cluster)
    weights = BF16 * policy.parameters
    sending = cluster.device.network * machine.efficiency.network
    copies = math.ceil(cluster.engines.count / cluster.trainer.data)  # of each replica; its stages take turns
    serve = [
        serving_seconds(serving, shape, servers, machine.efficiency, cluster)
        for serving, shape, servers in (
            (work.rollouts, policy, cluster.engines),
            (work.judge, machine.judge, cluster.judges),
            (work.rewrites, machine.judge, cluster.judges),
        )
    ]
    return Phases(
        rollout=factors.rollout * serve[0],
        judge=factors.judge * serve[1],
        rewrite=factors.judge * serve[2],
        reference=factors.reference * reference,
        train=factors.train * train,
        sync=factors.sync * weights * copies / sending,
        shared=cluster.device.shared,
    )


def serving_seconds(
    work: Serving, shape: ModelShape, servers: Servers, efficiency: Efficiency, cluster: Cluster
) -> float:
    """One role's servers: prefill, then decode steps of as many sequences as are asked for at once and fit, each step as long
    as its slower half."""
    device = cluster.device
    if not work.prefilled:
        return 0.0
    if not servers.count:
        return math.inf
    arithmetic = device.flops * efficiency.prefill * servers.tensor
    bandwidth = device.bandwidth * efficiency.decode * servers.tensor
    room = efficiency.memory * device.memory * servers.tensor
    if shape.served_bytes >= room:
        return math.inf
    prefill = shape.forward_flops(work.prefilled, work.context, work.predicted) / servers.count / arithmetic
    if not work.length:
        return prefill
    sequences = math.ceil(work.sequences / servers.count)
    asked = work.asked_at_once(servers.count)
    fitting = server_capacity(shape, room, work.held)
    batch = min(sequences, fitting, max(1.0, asked))
    if not batch:
        return math.inf
    read = (shape.read_bytes(batch) + batch * work.reads * shape.kv_bytes) / bandwidth
    computed = shape.forward_flops(batch, work.reads, batch) / arithmetic
    return prefill + max(1.0, sequences / batch) * work.length * (max(read, computed) + device.decode_step_s)


def training_seconds(work: Training, machine: Machine, cluster: Cluster) -> tuple[float, float]:
    """Seconds of (the reference's log-probs, the update) on each replica's rows, with the pipeline's bubble."""
    parallel, shape, device = cluster.trainer, machine.policy, cluster.device
    rows, length = planned_rows(work, parallel.data, math.lcm(device.row_multiple, parallel.tensor))
    bubble = (rows + parallel.pipeline - 1) / rows
    predicted = work.examples * work.branches * work.suffix / parallel.data / rows
    context = (work.prefix + work.suffix) / 2
    forward = rows * shape.forward_flops(length, context, predicted) * bubble / (parallel.tensor * parallel.pipeline)
    forward /= device.flops * machine.efficiency.train
    parameters = rank_parameters(shape, parallel)
    share = parallel.data if parallel.distributed else 1
    adam = OPTIMIZER_TRAFFIC * parameters / share / (device.bandwidth * machine.efficiency.decode)
    reduced = 2 * GRADIENT * parameters * (1 - 1 / parallel.data) / (device.network * machine.efficiency.network)
    update = (4 if parallel.recompute else 3) * forward + adam + reduced
    return (forward if work.reference else 0.0), update


@cache
def planned_rows(work: Training, data: int, multiple: int) -> tuple[int, int]:
    """(micro-batches of a replica, tokens of each): the trainer's own plan of such examples."""
    lengths = [(work.prefix, [work.suffix] * work.branches)] * work.examples
    plan = plan_rows(lengths, work.row_length, data, multiple_of=multiple)
    return plan.micro_batches, plan.row_length
