"""--max-staleness 0 against 1: seconds a step, how long the trainer waits, and on the demo what is learnt.

    python benchmarks/staleness.py demo --steps 10 --json benchmarks/results/staleness_cpu.json
    python benchmarks/staleness.py slow-judge --steps 8 --json benchmarks/results/staleness_cpu.json

demo: its own settings; trainer, engine and judge share the processor. slow-judge: the demo's model, short texts, and a made-up
judge that takes no processor and SECONDS for every answer, as one on other machines would. FILE keeps what the other part said.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from machine import describe_machine, format_table, write_report

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests/helpers"), str(REPO / "tools")]

from app_server import AppServer  # noqa: E402
from fetch_smollm2 import DEFAULT_SAVE, fetch  # noqa: E402

from megatron_sip.serving.loop_thread import LoopThread  # noqa: E402

JUDGE_SECONDS = 10.0
PHASES = ("rollout", "judge", "waiting", "reference", "train", "sync", "total")
WAITING = ("rollout", "judge", "waiting")
SHORT = ("--seq-length", "192", "--suffix-length", "24", "--num-rollouts", "2", "--global-batch-size", "4")


class SlowJudge(AppServer):
    """Answers every judgement after JUDGE_SECONDS, with a verdict that hangs on its words alone."""

    def __init__(self) -> None:
        super().__init__({"POST /v1/chat/completions": self._complete, "GET /v1/models": self._models})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "slow"}]})

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(JUDGE_SECONDS)
        option = 1 + zlib.crc32(body["messages"][0]["content"].encode()) % 2
        choice = {"message": {"role": "assistant", "content": f"Conclusion: Option {option}"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        return web.json_response({"choices": [choice] * body.get("n", 1), "usage": usage})


@contextmanager
def slow_judge() -> Iterator[str]:
    """Its URL, while it serves."""
    loop, judge = LoopThread("judge"), SlowJudge()
    loop.run(judge.start())
    try:
        yield judge.url
    finally:
        loop.run(judge.stop())
        loop.close()


def command(part: str, run_dir: Path, judge_url: str) -> list[str]:
    """What runs a part's training in `run_dir`."""
    if part == "demo":
        return ["examples/demo.sh", "--run-dir", str(run_dir), "--"]
    model, text = str(fetch(DEFAULT_SAVE)), str(run_dir / "corpus.jsonl")
    subprocess.run([sys.executable, "tools/write_demo_corpus.py", "--save", text], cwd=REPO, check=True)
    judge = (
        "--teacher-url",
        judge_url,
        "--teacher-api",
        "openai",
        "--teacher-name",
        "slow",
        "--criteria",
        "quality=1",
        "--judge-verdict",
        "hard",
    )
    own = ("--preset", "examples/demo.args", "--win-rate-prompts", "0", "--judge-votes", "1", *SHORT, *judge)
    return [sys.executable, "-m", "megatron_sip", model, text, "--run-dir", str(run_dir), *own]


def run(part: str, staleness: int, steps: int, run_dir: Path, judge_url: str) -> dict[str, Any]:
    """One run from its beginning. Raises CalledProcessError."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    length = ("--train-iters", str(steps), "--lr-warmup-iters", "2", "--save-interval", "100")
    flags = [*command(part, run_dir, judge_url), *length, "--max-staleness", str(staleness)]
    subprocess.run(flags, cwd=REPO, env=environment, check=True)
    return report_of(run_dir)


def report_of(run_dir: Path) -> dict[str, Any]:
    """Medians of the steps but the first, which begins with nothing made, and the last, which makes nothing ahead."""
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = steps[1:-1]
    seconds = {
        phase: round(statistics.median(step.get(f"seconds/{phase}", 0.0) for step in timed), 2) for phase in PHASES
    }
    waited = [sum(step.get(f"seconds/{phase}", 0.0) for phase in WAITING) / step["seconds/total"] for step in timed]
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "steps": len(steps),
        "step_seconds": {phase: value for phase, value in seconds.items() if value},
        "trainer_idle": round(statistics.median(waited), 3),
        "staleness": [step["staleness"] for step in steps],
        **{name: summary[name] for name in ("win_rate", "win_rate_ci95", "prompts") if name in summary},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["demo", "slow-judge"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where the report goes, beside that of the other part")
    parser.add_argument("--run-dir", type=Path, default=REPO / "build/staleness-benchmark")
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    with slow_judge() as url:
        runs = {
            str(staleness): run(args.part, staleness, args.steps, args.run_dir.resolve() / str(staleness), url)
            for staleness in (0, 1)
        }
    rows = [(staleness, found["step_seconds"]["total"], found["trainer_idle"]) for staleness, found in runs.items()]
    print(format_table(("staleness", "s a step", "trainer waits"), rows))
    if args.json is not None:
        known = json.loads(args.json.read_text()) if args.json.is_file() else {}
        judge = {"judge_seconds": JUDGE_SECONDS} if args.part == "slow-judge" else {}
        part = {"machine": describe_machine(), "load_average_before": load, **judge, "runs": runs}
        write_report(args.json, known | {args.part: part})


if __name__ == "__main__":
    main()
