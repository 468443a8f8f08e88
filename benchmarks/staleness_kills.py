"""kill -9 of trainer, engine and teacher, each once a run at random moments, in runs one step ahead: is anything lost?

    python benchmarks/staleness_kills.py --runs 10 --json benchmarks/results/staleness_kills.json

Each run must train on the rollouts of a run that nobody killed, to the same numbers, and on each task once; what differs ends
the script with an error. Runs that FILE has already are not made again: their seeds are counted from 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import describe_machine, write_report

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / folder) for folder in ("tests/integration", "tests/helpers", "tools")]

from fetch_smollm2 import DEFAULT_SAVE, fetch  # noqa: E402
from random_kills import (  # noqa: E402
    AHEAD,
    Victim,
    drawn_kills,
    engine_settings,
    require_each_task_once_a_step_ahead,
    require_equal,
    run_killed,
)
from training import output  # noqa: E402
from workers import kill_server, save_tiny_llama  # noqa: E402
from write_demo_corpus import write_corpus  # noqa: E402

from megatron_sip.serving.launch import LocalServer, ServerSettings  # noqa: E402

VICTIMS: tuple[Victim, ...] = ("trainer", "engine", "teacher")


def small_model(folder: Path) -> Path:
    """A made-up float32 Llama with SmolLM2's tokenizer, as the tests have it."""
    from transformers import AutoTokenizer

    sizes = {"vocab_size": 49152, "intermediate_size": 128, "max_position_embeddings": 512}
    save_tiny_llama(folder, 0, initializer_range=0.2, bos_token_id=1, eos_token_id=2, **sizes)
    AutoTokenizer.from_pretrained(fetch(DEFAULT_SAVE)).save_pretrained(folder)
    return folder


def killed_run(seed: int, folder: Path, flags: list[str], servers: dict[Victim, LocalServer]) -> dict[str, Any]:
    """A run with its kills, which went on as if there had been none. Raises AssertionError."""
    kills, run, began = drawn_kills(seed, VICTIMS), folder / f"run_{seed}", time.monotonic()
    run_killed(run, flags, kills, servers)
    require_each_task_once_a_step_ahead(run)
    require_equal(run, folder / "uninterrupted")
    resumed = output(run).count("successfully loaded checkpoint")
    found = [{**asdict(kill), "seconds": round(kill.seconds, 2)} for kill in kills]
    return {"seed": seed, "kills": found, "resumed": resumed, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes, after every run")
    args = parser.parse_args()
    known = json.loads(args.json.read_text())["runs"] if args.json.is_file() else []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model, text = small_model(folder / "model"), write_corpus(folder / "corpus.jsonl")
        judge = ServerSettings(model, dtype="float32", max_total_tokens=8192)
        steady = LocalServer(engine_settings(model))
        servers: dict[Victim, LocalServer] = {
            "engine": LocalServer(engine_settings(model)),
            "teacher": LocalServer(judge),
        }
        started = [steady, *servers.values()]
        try:
            with ThreadPoolExecutor(len(started)) as threads:
                list(threads.map(LocalServer.start, started))
            urls = ["--rollout-url", steady.url, servers["engine"].url, "--teacher-url", servers["teacher"].url]
            flags = ["--hf-config", str(model), "--data-path", str(text), *AHEAD, *urls]
            run_killed(folder / "uninterrupted", flags, [], servers)
            for seed in range(len(known) + 1, args.runs + 1):
                known.append(killed_run(seed, folder, flags, servers))
                print(f"run {seed} of {args.runs}: {known[-1]}", flush=True)
                report = {"kills": sum(len(run["kills"]) for run in known), "different": 0, "runs": known}
                write_report(args.json, {"machine": describe_machine(), **report})
        finally:
            for server in started:
                kill_server(server)


if __name__ == "__main__":
    main()
