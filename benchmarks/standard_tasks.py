"""What `megatron-sip-evaluate tasks` found, question by question, against transformers on the same questions.

    megatron-sip-evaluate tasks --model MODEL --dtype float32 --tasks piqa --include-path SETS --limit 300 --output O/piqa.json
    python benchmarks/standard_tasks.py O/piqa.json --model MODEL --include-path SETS --limit 300

The command's answers are read from what it kept beside its results: with the same flags nothing is asked again. lm-eval's `hf`
model answers in float32 on the CPU; its answers are kept too, so that a stopped comparison goes on. The report grows by the
tasks of the files that are named. An answer is the choice with the highest log-likelihood; a tie is a question whose two best
are nearer than TIE.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import LM, CachingLM
from lm_eval.models.huggingface import HFLM
from machine import describe_machine, format_table, write_report

from megatron_sip.evaluation.commands.tasks import answers_key, model_length
from megatron_sip.evaluation.lm_eval_engine import EngineLM
from megatron_sip.evaluation.lm_eval_tasks import load_tasks, run_tasks
from megatron_sip.evaluation.results import read_results
from megatron_sip.evaluation.served_model import Model, local_model
from megatron_sip.judge.cache import AnswerCache
from megatron_sip.rollout.pool import PoolSettings

RESULTS = Path(__file__).parent / "results" / "standard_tasks_smollm2.json"
NOWHERE = "http://127.0.0.1:9"
TIE = 1e-3
Answers = dict[tuple[str, int], np.ndarray]
"""By task and question the log-likelihood of each choice."""


def answers(lm: LM, name: str, include_path: Sequence[Path], limit: int) -> tuple[Answers, float]:
    """The answers to a task's first questions, and the share that is right."""
    tasks = load_tasks([name], include_path, None)
    found = run_tasks(lm, tasks, limit)
    score = (found["results"].get(name) or found["groups"][name])["acc,none"]
    samples = ((task, sample) for task, samples in found["samples"].items() for sample in samples)
    return {
        (task, sample["doc_id"]): np.array([value for value, _ in sample["filtered_resps"]]) for task, sample in samples
    }, score


def compared(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """Of the questions that both were asked: equal answers, ties among the others, and how far log-likelihoods are apart."""
    both = [(ours[key], theirs[key]) for key in theirs]
    other = [(one, two) for one, two in both if one.argmax() != two.argmax()]
    ties = sum(float(np.diff(np.sort(two))[-1]) < TIE for _, two in other)
    gap = max(float(np.abs(one - two).max()) for one, two in both)
    return {"questions": len(both), "equal": len(both) - len(other), "ties": ties, "largest_gap": round(gap, 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="what the command wrote, its kept answers beside it")
    parser.add_argument("--model", type=Path, required=True, help="its HF folder")
    parser.add_argument("--include-path", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, required=True, help="as the command was told")
    parser.add_argument("--transformers-limit", type=int, help="fewer questions for transformers")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    model = local_model(given.model, "float32")
    hf = HFLM(str(given.model), device="cpu", dtype="float32", batch_size=8)
    report: dict[str, Any] = (
        json.loads(given.json.read_bytes()) if given.json.exists() else {"tasks": {}, "commands": {}}
    )
    report |= {"machine": describe_machine(), "model": given.model.name, "dtype": "float32", "limit": given.limit}
    for path in given.results:
        theirs = CachingLM(hf, str(path.with_name(path.name + ".transformers.sqlite")))
        results = read_results(path)
        names = [result.dataset for result in results.results]
        about = {name: results.about[name] for name in ("requests", "seconds")}
        report["commands"][" ".join(names)] = about | {"few_shot": results.about["few_shot"][names[0]]}
        for result in results.results:
            own, score = answers(kept_answers(path, model), result.dataset, given.include_path, given.limit)
            assert score == result.value, "other questions than the command's"
            started = time.perf_counter()
            limit = given.transformers_limit or given.limit
            others, other_score = answers(theirs, result.dataset, given.include_path, limit)  # type: ignore[arg-type]
            numbers = {
                "score": score,
                "interval": result.interval,
                "questions": len(own),
                "of_transformers": other_score,
            }
            numbers["transformers_seconds"] = round(time.perf_counter() - started, 1)
            report["tasks"][result.dataset] = numbers | {"compared": compared(own, others)}
            write_report(given.json, report)
    show(report)


def kept_answers(results: Path, model: Model) -> EngineLM:
    """The model of a command that is finished: whatever it is asked has been answered."""
    length = model_length(model)
    kept = AnswerCache(results.with_name(results.name + ".answers.sqlite"))
    return EngineLM(
        [NOWHERE], model.tokenizer, length, PoolSettings(attempts=1, deadline_s=5.0), kept, answers_key(model, length)
    )


def show(report: dict[str, Any]) -> None:
    header = ("task", "questions", "score", "transformers", "asked both", "equal", "ties", "largest gap")
    rows = [
        (name, task["questions"], task["score"], task["of_transformers"], *task["compared"].values())
        for name, task in report["tasks"].items()
    ]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
