"""Ways to bring weights from trainer to engines: measured over gloo on this machine, and by formula over NCCL.

    python benchmarks/weight_sync.py [--json FILE]

Sources and engines are processes. A source lays its tensors into buckets, as the trainer does, and broadcasts them; an engine
copies what it gets into its weights. `sources` of several: the trainer's replicas, each with a share of the engines.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import describe_machine, write_report

from megatron_sip.hf.shards import buckets
from megatron_sip.rollout.weight_group import make_bucket

MIB = 2**20
TENSORS, TENSOR_BYTES, BUCKET_BYTES = 64, 4 * MIB, 32 * MIB
ENGINES = 4
TIMEOUT = timedelta(seconds=120)
CARD, SHARE = 50.0, 0.7
"""GB/s of a GPU's own network card (400 Gbit/s), and the part of it that is used."""
JOBS = {  # examples/*.sbatch: GB of bfloat16 weights, engines, replicas, a step's seconds but for the push (docs/plan.md)
    "train_from_scratch.sbatch, 1.4B": (2.8, 8, 8, 6.5),
    "train_continual.sbatch, 1.4B": (2.8, 8, 8, 96.3),
    "train_judge.sbatch, 8B": (16.0, 32, 8, 50.9),
}


@dataclass(frozen=True)
class Way:
    """How a push goes."""

    groups: tuple[tuple[int, ...], ...]
    """The engines of each group."""
    sources: int = 1
    """They take the groups in turns."""
    ahead: bool = False
    """Whether the next bucket is made while one is on its way."""


WAYS = {
    "a group for each engine": Way(tuple((engine,) for engine in range(ENGINES))),
    "a group for each engine, next bucket made meanwhile": Way(
        tuple((engine,) for engine in range(ENGINES)), ahead=True
    ),
    "one group of all engines, next bucket made meanwhile": Way((tuple(range(ENGINES)),), ahead=True),
    "a group for each engine, from two replicas, next bucket made meanwhile": Way(
        tuple((engine,) for engine in range(ENGINES)), sources=2, ahead=True
    ),
}


def group_of(port: int, name: str, rank: int, size: int) -> Any:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, TIMEOUT)


def from_first() -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return options


def source(way: Way, port: int, number: int, times: Queue[float]) -> None:
    torch.set_num_threads(1)
    tensors = [(str(index), torch.randn(TENSOR_BYTES // 2).bfloat16()) for index in range(TENSORS)]
    groups = [
        group_of(port, str(engines), 0, 1 + len(engines))
        for place, engines in enumerate(way.groups)
        if place % way.sources == number
    ]
    for group in groups:
        group.barrier().wait()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    store.add("ready", 1)
    while store.add("ready", 0) < way.sources:  # they start together
        time.sleep(0.001)
    times.put(time.monotonic())
    with ThreadPoolExecutor(len(groups)) as threads:
        flying: list[Any] = []
        for bucket_tensors in buckets(iter(tensors), BUCKET_BYTES):
            data = make_bucket(bucket_tensors, torch.device("cpu")).data
            for sent in flying:
                sent.result()
            flying = [
                threads.submit(lambda one, data: one.broadcast([data], from_first()).wait(), one, data)
                for one in groups
            ]
            if not way.ahead:
                for sent in flying:
                    sent.result()
        for sent in flying:
            sent.result()
    for group in groups:
        group.barrier().wait()


def engine(way: Way, port: int, number: int, times: Queue[float]) -> None:
    torch.set_num_threads(1)
    engines = next(engines for engines in way.groups if number in engines)
    group = group_of(port, str(engines), 1 + engines.index(number), 1 + len(engines))
    weights = torch.empty(BUCKET_BYTES, dtype=torch.uint8)
    weights.zero_()
    group.barrier().wait()
    for _ in range(TENSORS * TENSOR_BYTES // BUCKET_BYTES):
        received = torch.empty(BUCKET_BYTES, dtype=torch.uint8)
        group.broadcast([received], from_first()).wait()
        weights.copy_(received)
    times.put(time.monotonic())
    group.barrier().wait()


def push_seconds(way: Way) -> float:
    """From the first source's start to the last engine's end."""
    context = multiprocessing.get_context("forkserver")  # which imports this file once
    times: Queue[float] = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    processes = [context.Process(target=source, args=(way, store.port, n, times)) for n in range(way.sources)]
    processes += [context.Process(target=engine, args=(way, store.port, n, times)) for n in range(ENGINES)]
    for process in processes:
        process.start()
    moments = [times.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return max(moments) - min(moments)


def over_nccl(gigabytes: float, engines: int, replicas: int, rest: float) -> dict[str, float]:
    """Seconds of a push, and parts of a step: a copy leaves a card for each engine or group that it serves."""
    copy = gigabytes / (CARD * SHARE)
    ways = {
        "a group for each engine, from the first replica": engines * copy,
        "a group for each engine, from all replicas": -(-engines // replicas) * copy,
        "one group of all engines": copy,
    }
    found = {way: round(seconds, 2) for way, seconds in ways.items()}
    return found | {f"{way}: of a step": round(seconds / (seconds + rest), 4) for way, seconds in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        for name, way in WAYS.items():
            seconds[name].append(round(push_seconds(way), 3))
    for name, measured in seconds.items():
        print(f"{name}: {statistics.median(measured):.3f} s")
    nccl = {name: over_nccl(*job) for name, job in JOBS.items()}
    if args.json is not None:
        size = {"megabytes": TENSORS * TENSOR_BYTES // MIB, "bucket_megabytes": BUCKET_BYTES // MIB, "engines": ENGINES}
        medians = {name: statistics.median(measured) for name, measured in seconds.items()}
        assumed = {"card_gb_s": CARD, "used_share": SHARE, "note": "each GPU has a card of its own; not measured"}
        gloo = size | {"median_seconds": medians, "seconds": seconds}
        report = {
            "machine": describe_machine(),
            "load_average_before": load,
            "gloo": gloo,
            "nccl_by_formula": {"assumed": assumed, **nccl},
        }
        write_report(args.json, report)


if __name__ == "__main__":
    main()
