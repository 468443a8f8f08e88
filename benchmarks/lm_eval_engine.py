"""lm-eval's tasks on one engine by our adapter and by lm-eval's own `sglang-generate`: scores, time, cached tokens.

    python benchmarks/lm_eval_engine.py --include-path ~/.cache/megatron_sip/eval_sets [--json FILE]

Both ask the same server, with as many requests in flight, for the same questions, by turns and each time with an empty cache.
`sglang-generate` asks for log-probs from the prompt's first token on, so that nothing of it can come from the cache; it is told
the tokenizer that both use. The seconds are those of lm-eval's whole evaluation, the building of requests included.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lm_eval.api.model import LM
from lm_eval.models.sglang_generate_API import SGLANGGENERATEAPI
from machine import describe_machine, format_table, write_report
from transformers import AutoTokenizer

from megatron_sip.evaluation.lm_eval_engine import EngineLM
from megatron_sip.evaluation.lm_eval_tasks import Tasks, load_tasks, run_tasks
from megatron_sip.judge.cache import AnswerCache
from megatron_sip.rollout.pool import PoolSettings
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.launch import LocalServer, ServerSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from fetch_smollm2 import DEFAULT_SAVE, fetch

RESULTS = Path(__file__).parent / "results" / "lm_eval_engine_cpu.json"
LENGTH, IN_FLIGHT = 2048, 16
OURS, THEIRS = "megatron_sip", "sglang-generate"


class Counted(SGLANGGENERATEAPI):
    """lm-eval's own model; what its replies say of cached tokens is added up."""

    counts: ClassVar[Counter[str]] = Counter()

    @staticmethod
    def parse_logprobs(outputs: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for output in outputs if isinstance(outputs, list) else [outputs]:
            meta = output["meta_info"]
            Counted.counts.update(prompt_tokens=meta["prompt_tokens"], cached_tokens=meta["cached_tokens"])
        return list(SGLANGGENERATEAPI.parse_logprobs(outputs, *args, **kwargs))


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation. answers: by task and question the log-likelihood of each choice."""

    seconds: float
    prompt_tokens: int
    cached_tokens: int
    scores: dict[str, float]
    answers: dict[tuple[str, int], list[float]]


@contextlib.contextmanager
def model(kind: str, url: str, folder: Path) -> Iterator[tuple[LM, Counter[str]]]:
    """One of the two, and the tokens that it will have counted."""
    if kind == OURS:
        with tempfile.TemporaryDirectory() as work, contextlib.closing(AnswerCache(Path(work) / "kept.sqlite")) as kept:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            ours = EngineLM([url], tokenizer, LENGTH, PoolSettings(max_concurrency=IN_FLIGHT), kept, b"benchmark")
            yield ours, ours.counts
    else:
        Counted.counts.clear()
        where = {"base_url": f"{url}/generate", "model": str(folder), "max_length": LENGTH + 1}
        yield Counted(num_concurrent=IN_FLIGHT, **where), Counted.counts


def evaluated(kind: str, url: str, folder: Path, tasks: Tasks, limit: int) -> Run:
    """Run the tasks with an empty cache."""
    call(url, "POST", "/flush_cache", timeout_s=60)
    started = time.perf_counter()
    with model(kind, url, folder) as (lm, counts):
        found = run_tasks(lm, tasks, limit)
    seconds = time.perf_counter() - started
    scores = {name: (found["results"].get(name) or found["groups"][name])["acc,none"] for name in tasks.groups}
    answers = {
        (task, sample["doc_id"]): [value for value, _ in sample["filtered_resps"]]
        for task, samples in found["samples"].items()
        for sample in samples
    }
    return Run(seconds, counts["prompt_tokens"], counts["cached_tokens"], scores, answers)


def compare(runs: dict[str, Sequence[Run]]) -> dict[str, Any]:
    """Figures of each, and how far the two are apart."""
    report: dict[str, Any] = {}
    for kind, own in runs.items():
        seconds = statistics.median(run.seconds for run in own)
        report[kind] = {
            "seconds": [round(run.seconds, 1) for run in own],
            "questions_per_s": round(len(own[0].answers) / seconds, 3),
            "prompt_tokens": own[0].prompt_tokens,
            "cached_share": round(statistics.median(run.cached_tokens / run.prompt_tokens for run in own), 4),
            "scores": own[0].scores,
        }
    ours, theirs = runs[OURS][0], runs[THEIRS][0]
    gaps = [
        abs(one - other)
        for key in ours.answers
        for one, other in zip(ours.answers[key], theirs.answers[key], strict=True)
    ]
    report["largest_log_likelihood_gap"] = max(gaps)
    report["times_as_fast"] = round(report[OURS]["questions_per_s"] / report[THEIRS]["questions_per_s"], 2)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--include-path", type=Path, required=True, help="what tools/fetch_eval_sets.py wrote")
    parser.add_argument("--tasks", nargs="+", default=["mmlu_anatomy"])
    parser.add_argument("--zero-shot", nargs="+", default=["hellaswag", "arc_easy"])
    parser.add_argument("--limit", type=int, default=6, help="questions of each task")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    folder = fetch(DEFAULT_SAVE)
    paths = [given.include_path.expanduser()]
    parts = {"5-shot": load_tasks(given.tasks, paths, 5), "0-shot": load_tasks(given.zero_shot, paths, None)}
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "model": "SmolLM2-135M-Instruct, float32",
        "limit": given.limit,
    }
    with LocalServer(ServerSettings(folder, dtype="float32", context_length=LENGTH + 8)) as server:
        for part, tasks in parts.items():
            runs: dict[str, list[Run]] = {OURS: [], THEIRS: []}
            for _ in range(given.rounds):
                for kind, own in runs.items():
                    own.append(evaluated(kind, server.url, folder, tasks, given.limit))
            report[part] = {"tasks": list(tasks.groups)} | compare(runs)
            rows = [
                (kind, *(report[part][kind][name] for name in ("questions_per_s", "cached_share"))) for kind in runs
            ]
            print(part, format_table(("", "questions/s", "cached share"), rows), sep="\n")
    write_report(given.json, report)


if __name__ == "__main__":
    main()
