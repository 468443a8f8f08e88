"""How one node's GPUs are divided between trainer, engines and teacher. Pure arithmetic; `one_node` measures and starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.errors import UserError

TRAINING_COPIES = 10
"""Bytes a trainer holds a byte of bf16 weights: weights, float32 gradients and master weights, Adam's two moments, and the
DPO reference."""
TRAINING_SHARE = 0.66
"""Of a GPU's memory, for these; the rest is for activations."""
ENGINES, TEACHERS = 1, 2
"""GPUs of these roles for one of the trainer's: within a factor of two of the planner's best division, whichever way rollouts
are judged (tests); but for what it counts from each model, protocol and GPU, see docs/plan.md."""
WEIGHTS_SHARE = 0.85
"""Of a server's memory, at most for its weights; the rest is for its KV cache."""


class LayoutError(UserError, ValueError):
    """The models do not fit; the message says which, and what would."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run asks of its node. policy_bytes, teacher_bytes: of the bf16 weights, of the largest teacher. prompts: a step's.

    engines, teacher, rewriter: what is to be started here. samples, judges: whether engines and teacher work in every step, or
    at the end alone. own_*: what the user says, 0: nothing. shares: whether servers may share GPUs however many there are.
    """

    policy_bytes: int
    teacher_bytes: int
    prompts: int
    engines: bool = True
    teacher: bool = True
    rewriter: bool = False
    samples: bool = True
    judges: bool = True
    own_engines: int = 0
    own_teachers: int = 0
    own_tensor: int = 0
    own_pipeline: int = 0
    shares: bool = False

    @property
    def servers(self) -> tuple[int, int, int]:
        """The fewest engines, teachers and rewriters."""
        engines = (self.own_engines or 1) * self.engines
        return engines, (self.own_teachers or 1) * self.teacher, int(self.rewriter)


@dataclass(frozen=True, slots=True)
class Layout:
    """Processes of the trainer, of which `tensor_parallel` share each layer, and servers, one a GPU.

    server_memory: where servers share GPUs, the part of a GPU that each of them takes.
    """

    trainers: int
    tensor_parallel: int
    engines: int
    teachers: int
    rewriters: int = 0
    server_memory: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.trainers} trainer process" + "es" * (self.trainers > 1)]
        parts += [f"tensor parallel {self.tensor_parallel}"] if self.tensor_parallel > 1 else []
        parts += [f"{self.engines} engine" + "s" * (self.engines > 1)] if self.engines else []
        parts += ["the teacher" if self.teachers == 1 else f"{self.teachers} teachers"] if self.teachers else []
        parts += ["the rewriter"] if self.rewriters else []
        shared = f"; servers share GPUs, {self.server_memory:.0%} of one each" if self.server_memory else ""
        return ", ".join(parts) + shared


def plan_layout(gpus: Sequence[int], demand: Demand) -> Layout:
    """A layout for GPUs with these bytes of memory each; no GPUs mean one process on the CPU.

    Where there are enough every process has a GPU of its own, of the rewriter's servers there is one, and the other GPUs are
    divided as ENGINES and TEACHERS say, once the trainer has those that the policy needs. On fewer the servers share all but
    the first one (see `server_gpus`), on a single one all share it.

    Raises:
        LayoutError: a model is too large for this, or the prompts of a step do not divide among the replicas.
    """
    engines, teachers, rewriters = demand.servers
    servers, kinds = engines + teachers + rewriters, demand.engines + demand.teacher + demand.rewriter
    if not gpus:
        return Layout(1, 1, engines, teachers, rewriters)
    memory = min(gpus)
    if len(gpus) <= kinds:
        alone = len(gpus) == 1
        together = -(-servers // max(1, len(gpus) - 1))
        share = round((0.5 if alone else 0.9) / together, 2)
        _require_server(demand, share * memory)
        _tensor_parallel(1, memory * (1 - share * together if alone else 1), demand)
        return Layout(1, 1, engines, teachers, rewriters, share)
    _require_server(demand, memory)
    tensor_parallel = demand.own_tensor or _tensor_parallel(_power_of_two(len(gpus) - kinds), memory, demand)
    replica = tensor_parallel * (demand.own_pipeline or 1)
    weights = 1 + ENGINES * (demand.engines and demand.samples) + TEACHERS * (demand.teacher and demand.judges)
    most = max(1, min((len(gpus) - rewriters) // weights, len(gpus) - servers))
    replicas = max(1, _power_of_two(most) // replica)
    while demand.prompts % replicas:
        replicas //= 2
    trainers = replicas * replica
    if trainers + servers > len(gpus) and not demand.shares:
        raise LayoutError(
            f"{len(gpus)} GPUs do not hold {trainers} of the trainer and {servers} servers: lower --rollout-local, "
            "--teacher-replicas or what the trainer's model is split into, or let servers share GPUs (--local-server-memory)"
        )
    engines, teachers = _divided(len(gpus) - rewriters - trainers, demand)
    return Layout(trainers, tensor_parallel, engines, teachers, rewriters)


def _divided(spare: int, demand: Demand) -> tuple[int, int]:
    """(engines, teachers) on so many GPUs."""
    if not (demand.engines and demand.teacher):
        return (demand.own_engines or spare) * demand.engines, (demand.own_teachers or spare) * demand.teacher
    wanted = spare  # a teacher that works at the end alone needs one GPU
    if demand.judges:
        wanted = spare * ENGINES // (ENGINES + TEACHERS) if demand.samples else 1
    engines = demand.own_engines or max(1, min(wanted, spare - (demand.own_teachers or 1)))
    return engines, demand.own_teachers or max(1, spare - engines)


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def _tensor_parallel(trainers: int, memory: float, demand: Demand) -> int:
    needed = TRAINING_COPIES * demand.policy_bytes / (demand.own_pipeline or 1)
    size = 1
    while needed / size > TRAINING_SHARE * memory:
        size *= 2
        if size > trainers:
            raise LayoutError(
                f"training takes about {_gb(needed)} for the policy, {trainers} GPU{'s' * (trainers > 1)} of "
                f"{_gb(memory)} would train it: take a smaller model or more GPUs, or serve rollouts and judgements elsewhere "
                "(--rollout-url, --teacher-url)"
            )
    return size


def _require_server(demand: Demand, memory: float) -> None:
    models = (
        ("policy", demand.policy_bytes, demand.engines),
        ("teacher", demand.teacher_bytes, demand.teacher or demand.rewriter),
    )
    for name, size, wanted in models:
        if wanted and size > WEIGHTS_SHARE * memory:
            raise LayoutError(
                f"the {name}'s weights ({_gb(size)}) do not fit into the {_gb(memory)} that its server would have: serve it "
                f"elsewhere and give {'--teacher-url' if name == 'teacher' else '--rollout-url'}"
            )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
