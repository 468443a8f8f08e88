"""Judgements per second of one process against a server that answers at once, and its memory over many calls.

    python benchmarks/judge_client.py [--json FILE] [--calls 200000]

The server is a bare loopback process with canned answers, so what is measured is the client: prompts, cache keys, requests,
parsing, schedules, scores. "openai hard" makes one HTTP request for each pair and vote, the worst case; "openai hard, 5
votes" asks for five votes per request; "sglang soft" batches the pairs of a prompt. Caching on disk is on where it says so.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import orjson
import uvloop
from machine import describe_machine, format_table, write_report

from megatron_sip.judge import ClientSettings, Endpoint, Judge, JudgeSettings, ScheduleSettings
from megatron_sip.records import Candidate, Group, Task

RESULTS = Path(__file__).parent / "results"
CANDIDATES = 17
PREFIX_WORDS, CANDIDATE_WORDS = 1400, 95  # about 1,900 and 128 tokens of English


class CannedServer(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, reduced to what the judge's client sends."""

    def connection_made(self, transport: Any) -> None:
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = int(head.rpartition(b"content-length:")[2].split(b"\r\n")[0]) if b"content-length:" in head else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            answer = sglang_reply(body) if b"/generate" in head[:40] else openai_reply(body)
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)


def openai_reply(body: bytes) -> bytes:
    """As many verdicts as the request asks for; the count is the first `"n":` in it."""
    found = re.search(rb'"n":(\d+)', body)
    count = int(found[1]) if found else 1
    choices = [{"message": {"content": f"Both go on well.\n\nConclusion: Option {1 + k % 2}"}} for k in range(count)]
    return orjson.dumps({"choices": choices, "usage": {"prompt_tokens": 2300, "completion_tokens": 9 * count}})


def sglang_reply(body: bytes) -> bytes:
    """A soft verdict for every prompt of the batch."""
    request = orjson.loads(body)
    first, second = request["token_ids_logprob"][0]
    meta = {"prompt_tokens": 2300, "completion_tokens": 1}
    meta |= {"output_token_ids_logprobs": [[[-0.5, first, None], [-1.0, second, None]]]}
    return orjson.dumps([{"text": "1", "meta_info": meta}] * len(request["input_ids"]))


def serve(port: Any, ready: Event) -> None:
    """Run the server until the process is ended."""

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(CannedServer, "127.0.0.1", 0)
        port.value = server.sockets[0].getsockname()[1]
        ready.set()
        await server.serve_forever()

    uvloop.run(forever())


@contextmanager
def canned_server() -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    port, ready = context.Value("i", 0), context.Event()
    process = context.Process(target=serve, args=(port, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(30):
            raise RuntimeError("the canned server did not start within 30 s")
        yield f"http://127.0.0.1:{port.value}"
    finally:
        process.terminate()
        process.join()


def make_group(index: int) -> Group:
    """A prompt of the paper's size, all texts different."""
    prefix = f"{index} " + "some words of a document " * (PREFIX_WORDS // 5)
    texts = [f"{index}.{k} " + "other words that go on " * (CANDIDATE_WORDS // 5) for k in range(CANDIDATES)]
    return Group(Task(index, [1], [2], prefix, texts[0]), [Candidate("rollout", [1], text) for text in texts])


async def run_case(settings: JudgeSettings, verdicts: int, chunk: int) -> dict[str, float]:
    """Score groups until `verdicts` verdicts have come; seconds, verdicts per second, memory growth in MB."""
    async with Judge(settings) as judge:
        index, begin, cpu = 0, time.perf_counter(), time.process_time()
        after_warm_up = 0.0
        while (done := judge.counters().get("verdicts/quality", 0.0)) < verdicts:
            groups = await judge.score([make_group(index + k) for k in range(chunk)])
            if any(group.dropped for group in groups):
                raise RuntimeError(f"dropped: {next(group.dropped for group in groups if group.dropped)}")
            index += chunk
            after_warm_up = after_warm_up or resident_mb()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        return {
            "verdicts": done,
            "requests": float(judge.counters()["requests"]),
            "seconds": seconds,
            "verdicts_per_s": done / seconds,
            "requests_per_s": judge.counters()["requests"] / seconds,
            "cpu_s_per_1000_verdicts": 1000 * cpu_seconds / done,
            "resident_growth_mb": resident_mb() - after_warm_up,
            "latency_p50_s": judge.counters()["latency-p50-s"],
            "latency_p99_s": judge.counters()["latency-p99-s"],
        }


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def cases(url: str, tokenizer: str | None, cache: Path) -> dict[str, JudgeSettings]:
    openai = JudgeSettings(
        criteria={"quality": 1.0},
        client=ClientSettings((Endpoint(url, "openai"),), concurrency=128),
        votes=1,
        default_verdict="hard",
        schedule=ScheduleSettings("all_pairs"),
        audit_rate=0.0,
    )
    found = {
        "openai hard, 1 vote": openai,
        "openai hard, 1 vote, disk cache": replace(openai, client=replace(openai.client, cache_path=cache)),
        "openai hard, 5 votes": replace(openai, votes=5),
    }
    if tokenizer is not None:
        native = replace(
            openai,
            client=replace(openai.client, endpoints=(Endpoint(url),), tokenizer=tokenizer),
            default_verdict="soft",
        )
        found["sglang soft, both orders"] = native
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "judge_client.json", help="report file")
    parser.add_argument("--calls", type=int, default=200_000, help="verdicts of the long run for memory")
    parser.add_argument("--short", type=int, default=30_000, help="verdicts of each other run")
    parser.add_argument("--tokenizer", default=None, help="tokenizer folder for the sglang case (none: left out)")
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    load = os.getloadavg()[0]
    with canned_server() as url, tempfile.TemporaryDirectory() as folder:
        for name, settings in cases(url, args.tokenizer, Path(folder) / "cache.sqlite").items():
            wanted = args.calls if name == "openai hard, 1 vote" else args.short
            rows[name] = uvloop.run(run_case(settings, wanted, 16))
    header = ("case", "verdicts", "verdicts/s", "requests/s", "CPU s/1000", "memory growth MB", "p99 ms")
    table = [
        (
            name,
            int(row["verdicts"]),
            row["verdicts_per_s"],
            row["requests_per_s"],
            row["cpu_s_per_1000_verdicts"],
            row["resident_growth_mb"],
            1e3 * row["latency_p99_s"],
        )
        for name, row in rows.items()
    ]
    print(format_table(header, table))
    write_report(args.json, {"machine": describe_machine("cpu") | {"load_average_before": load}, "cases": rows})


if __name__ == "__main__":
    main()
