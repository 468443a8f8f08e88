"""Plan a run before it has any GPU: memory, seconds by phase, who waits, the best split of the GPUs, days.

    python -m megatron_sip.plan --policy llama-1.4b --judge llama-3.1-8b --gpus 64 --preset safety [flags of the trainer]
    python -m megatron_sip.plan --policy HF_DIR --judge HF_DIR2 --gpus 16 --gpu H200 --roles 8 2 6 --preset quality
    python -m megatron_sip.plan ... --from-run runs/a          # as fast as that run was, by phase

docs/plan.md has the formulas. Figures are bounds from above as --dry-run's are, but for written answers (--answer-share).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sip.config.checks import explained
from megatron_sip.console import say
from megatron_sip.errors import ArgumentError
from megatron_sip.files import write_atomically
from megatron_sip.planning.calibration import factors_of, measured_seconds
from megatron_sip.planning.devices import DEVICES, Efficiency, Factors
from megatron_sip.planning.memory import server_capacity
from megatron_sip.planning.settings import Planable, read_command, read_run
from megatron_sip.planning.shapes import ModelShape, model_folder, read_shape
from megatron_sip.planning.split import Planned, Search, best_split, plan_split, roles_with_work
from megatron_sip.planning.tables import describe
from megatron_sip.planning.timing import ORDERS, Cluster, Machine, Order, Servers
from megatron_sip.planning.work import Serving, Work, step_work
from megatron_sip.training.metrics_writer import read_metrics


def command_line() -> argparse.ArgumentParser:
    """The planner's own flags; all others are the trainer's."""
    parser = argparse.ArgumentParser(
        "python -m megatron_sip.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    defaults = Efficiency()
    parser.add_argument("--policy", metavar="MODEL", help="HF folder with a config.json, or a size such as llama-1.4b; "
                        "or give the trainer's --hf-config or --pretrained-checkpoint")  # fmt: skip
    parser.add_argument("--judge", metavar="MODEL", help="the same of judge and rewriter; the policy's unless given")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of all roles together; needed but with --gpu cpu")
    parser.add_argument("--gpu", choices=DEVICES, default="H100", help="their kind (default H100)")
    parser.add_argument("--roles", type=int, nargs=3, metavar=("TRAINER", "ENGINES", "JUDGE"), help="GPUs by role, planned "
                        "beside the best split")  # fmt: skip
    parser.add_argument(
        "--engine-tp", type=int, metavar="N", help="GPUs of one engine; the fewest that fit unless given"
    )
    parser.add_argument("--judge-tp", type=int, metavar="N", help="GPUs of one judge")
    parser.add_argument(
        "--order",
        choices=ORDERS,
        help="how phases follow each other (default: as the run's would, on arrival, with "
        "--max-staleness 1 one step ahead)",
    )
    parser.add_argument("--answer-share", type=float, default=0.5, metavar="SHARE", help="part of their room that written "
                        "verdicts and rewrites fill (default 0.5, a guess)")  # fmt: skip
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name}-efficiency", type=float, default=value, metavar="SHARE", help=f"default {value}")
    parser.add_argument("--from-run", type=Path, metavar="RUN_DIR", help="a run on the same kind of GPU, with the same judge: "
                        "its seconds by phase correct the formulas")  # fmt: skip
    parser.add_argument("--run-roles", type=int, nargs=3, metavar=("TRAINER", "ENGINES", "JUDGE"), help="that run's GPUs, "
                        "where its command does not say")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go, too")
    return parser


@dataclass(frozen=True, slots=True)
class Request:
    """The command line, understood."""

    planable: Planable
    work: Work
    machine: Machine
    search: Search
    order: Order


def understand(own: argparse.Namespace, rest: Sequence[str]) -> Request:
    """What is to be planned. Raises ArgumentError."""
    policy = ["--hf-config", str(model_folder(own.policy))] if own.policy else []
    planable = read_command([*rest, *policy])
    judge = read_shape(model_folder(own.judge)) if own.judge else planable.policy
    shares = {name: getattr(own, f"{name}_efficiency") for name in asdict(Efficiency())}
    for name, share in (*shares.items(), ("answer share", own.answer_share)):
        if not 0 < share <= 1:
            raise ArgumentError(f"{name} {share}: a share is above 0 and at most 1")
    machine = Machine(planable.policy, judge, Efficiency(**shares))
    device, work = DEVICES[own.gpu], step_work(planable.settings, own.answer_share)
    if own.gpus is None and not device.shared:
        raise ArgumentError("--gpus N is needed: the GPUs of all roles together")
    if own.from_run:
        machine = replace(machine, factors=run_factors(own, machine))
    return Request(
        planable,
        work,
        machine,
        Search(
            own.gpus or roles_with_work(work),
            device,
            planable.parallel,
            planable.tensor,
            planable.pipeline,
            own.engine_tp,
            own.judge_tp,
        ),
        own.order or ("one step ahead" if planable.settings.run.max_staleness else "on arrival"),
    )


def run_factors(own: argparse.Namespace, machine: Machine) -> Factors:
    """How a run's phases compare with the formulas for its own settings and GPUs. Raises ArgumentError."""
    run, processes = read_run(own.from_run)
    tensor, pipeline = run.tensor or 1, run.pipeline or 1
    engine_tp, judge_tp = own.engine_tp or 1, own.judge_tp or 1
    trainers, engines, judges = own.run_roles or (processes, run.engines * engine_tp, run.judges * judge_tp)
    parallel = replace(run.parallel, tensor=tensor, pipeline=pipeline, data=max(1, trainers // (tensor * pipeline)))
    cluster = Cluster(DEVICES[own.gpu], parallel, Servers(engines, engine_tp), Servers(judges, judge_tp))
    metrics = own.from_run / "metrics.jsonl"
    with explained("--from-run"):
        steps = read_metrics(metrics) if metrics.is_file() else []
    seconds = measured_seconds(steps, cluster.device.shared)
    return factors_of(seconds, step_work(run.settings, own.answer_share), replace(machine, policy=run.policy), cluster)


def figures(request: Request, planned: Planned) -> dict[str, Any]:
    """A division as JSON has it: seconds, bytes, shares; roles without GPUs are left out."""
    steps, times, cluster = request.planable.settings.run.steps, planned.phases, planned.cluster
    gpus = {"trainer": cluster.trainer.ranks, "engines": cluster.engines.gpus, "judge": cluster.judges.gpus}
    work = request.work
    served = {
        "engines": (cluster.engines, request.machine.policy, work.rollouts),
        "judge": (cluster.judges, request.machine.judge, work.judge if work.judge.prefilled else work.rewrites),
    }
    return {
        "gpus": {role: count for role, count in gpus.items() if count},
        "trainer": asdict(cluster.trainer),
        "servers": {role: server_figures(request, cluster, *served[role]) for role in served if gpus[role]},
        "memory of a trainer rank": planned.memory,
        "seconds": {name: seconds for name, seconds in asdict(times).items() if seconds},
        "step": {order: times.step(order) for order in ORDERS},
        "idle": {role: share for role, share in times.idle(request.order).items() if gpus[role]},
        "days": {order: steps * times.step(order) / 86400 for order in ORDERS},
    }


def server_figures(
    request: Request, cluster: Cluster, servers: Servers, shape: ModelShape, work: Serving
) -> dict[str, float]:
    """One server of a role: what fits, and what the leaders' calls in flight bring."""
    memory = request.machine.efficiency.memory * cluster.device.memory * servers.tensor
    found = {"GPUs each": servers.tensor, "GB of weights": shape.served_bytes / 1e9}
    if not work.length:  # it only reads: what it reads is not held
        return found
    return found | {
        "sequences that fit": server_capacity(shape, memory, work.held),
        "sequences a step": work.sequences / servers.count,
        "asked for at once": work.asked_at_once(servers.count),
    }


def plan(words: Sequence[str]) -> dict[str, Any]:
    """The whole plan, as JSON has it. Raises ArgumentError."""
    own, rest = command_line().parse_known_args(words)
    request = understand(own, rest)
    best = best_split(request.work, request.machine, request.search, request.order)
    report = {
        "order": request.order,
        "steps": request.planable.settings.run.steps,
        "gpu": own.gpu,
        "counts of a step": dict(request.work.counts),
        "factors": asdict(request.machine.factors),
        "best": figures(request, best),
    }
    if own.roles:
        shown = " ".join(map(str, own.roles))
        if sum(own.roles) != request.search.gpus:
            raise ArgumentError(f"--roles {shown}: {sum(own.roles)} GPUs, --gpus says {request.search.gpus}")
        split = plan_split(request.work, request.machine, request.search, tuple(own.roles), request.order)
        if split is None:
            raise ArgumentError(f"--roles {shown}: a model does not fit, or the prompts do not divide")
        report["given"] = figures(request, split)
    if own.json:
        own.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(own.json, json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    """Print the plan."""
    say(describe(plan(sys.argv[1:])))


if __name__ == "__main__":
    main()
