"""Each kind of preset makes one real training step on the demo's data: real parser, Megatron, engine, judge and rewriter.

One preset stands for those that differ from it in numbers alone; test_presets checks what each of them comes to.

A preset's objective, candidates, criteria, schedule, votes and learning rate are its own. Overridden are sizes (batch,
lengths, model; 2 rollouts for 8 and 16, since all pairs of 17 candidates take this teacher minutes), and the verdict: a
teacher of 135M parameters hardly ever writes one, so that its probabilities are read. What it does write is asked for by
the cases named `PRESET:hard`. The cases share a cache of answers: the rewrite of a suffix is the same for all of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from paper_presets import PAPER, paper_criteria
from workers import run_worker

from megatron_sip.serving.launch import LocalServer

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("presets_worker.py")
MOST_ROLLOUTS, FEW_ROLLOUTS = 4, 2
KINDS = (
    *("from-scratch-baseline", "safety-sft-rewrite", "safety-sft-rollout"),
    *("from-scratch-suffix-rewrite", "safety-rf-nll-suffix-rewrite-1"),
    *("safety-dpo-rewrite-over-rollout", "safety-suffix-rewrite-2", "factuality-2", "quality-pivot-8"),
)
"""sft on each kind of target, rf-nll without and with rollouts, dpo by fixed roles, on all candidates, by factuality, on a
pivot."""
HARD = ("quality-2", "factuality-2", "safety-suffix-1")
AUDITED = "quality-pivot-8:audited"
THINKING_SFT, THINKING_RL = "thinking-sft", "thinking-rl"
END_MARK = "g"
"""Of a thought: a text that a policy with made-up weights writes now and then."""
SIZES = (
    *("--split", "70,0,30", "--seq-length", "56", "--suffix-length", "8"),
    *("--train-iters", "1", "--lr-warmup-iters", "0", "--logging-level", "40"),
)


def paper_rollouts(preset: str) -> int:
    return (PAPER[preset][2] if preset in PAPER else None) or 0


def rollouts_here(preset: str) -> int:
    return FEW_ROLLOUTS if paper_rollouts(preset) > MOST_ROLLOUTS else paper_rollouts(preset)


def sizes(preset: str) -> list[str]:
    """One prompt where it is judged often, two where the only rewrite may be missing."""
    capped = ["--num-rollouts", str(FEW_ROLLOUTS)] if paper_rollouts(preset) > MOST_ROLLOUTS else []
    return ["--global-batch-size", "1" if paper_rollouts(preset) > 2 else "2", *capped]


@pytest.fixture(scope="module")
def results(
    corpus: Path,
    tiny_llama_dir: Path,
    tiny_engine: LocalServer,
    smollm2_server: LocalServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """What the worker wrote for each case."""
    work = tmp_path_factory.mktemp("presets")
    soft, hard = ["--judge-verdict", "soft"], ["--judge-max-tokens", "6", "--global-batch-size", "1"]
    hard += ["--teacher-reasoning-tokens", "0"]
    cases = {preset: [*sizes(preset), *soft] for preset in KINDS}
    cases |= {f"{preset}:hard": [*sizes(preset), *hard] for preset in HARD}
    thoughts = write_thoughts(corpus, work / "thoughts.jsonl")
    cases[THINKING_SFT] = ["--global-batch-size", "4"]
    cases[THINKING_RL] = ["--data-path", str(thoughts), "--global-batch-size", "2", "--num-rollouts", "8", *soft]
    cases[AUDITED] = [*sizes("quality-pivot-8"), "--num-rollouts", str(MOST_ROLLOUTS), *soft, "--judge-audit-rate", "1"]
    flags = [
        *("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus), *SIZES),
        *("--rollout-url", tiny_engine.url, "--teacher-url", smollm2_server.url),
        *("--judge-cache", str(work / "answers"), "--weight-sync", "disk"),
    ]
    (work / "setup.json").write_text(json.dumps({"flags": flags, "cases": cases}))
    run_worker(WORKER, work / "setup.json", work / "results.jsonl", timeout=1800.0)
    return {result["preset"]: result for result in map(json.loads, (work / "results.jsonl").read_text().splitlines())}


def write_thoughts(corpus: Path, path: Path) -> Path:
    """A place in the middle of each document's first words."""
    texts = [json.loads(line)["text"][:400] for line in corpus.read_text().splitlines()[:8]]
    marks = {"start_mark": "(", "end_mark": END_MARK, "split": "train"}
    records = [{"prefix": text[:200], "suffix": text[200:], **marks} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("preset", KINDS)
def test_a_preset_makes_a_step_of_its_own_kind(results: dict[str, dict[str, Any]], preset: str) -> None:
    result = results[preset]
    metrics, examples = result["metrics"], result["examples"]
    objective, kinds, _, _ = PAPER[preset]
    assert result["objective"] == objective
    assert examples, {name: value for name, value in metrics.items() if name.startswith("dropped/")}
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    assert result["changed"] > 0.9  # a norm's weights may have no gradient
    if objective == "dpo":  # policy and reference are still equal: log 2
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-3)
    for roles, found in examples:
        assert roles == (["chosen", "rejected"] if objective == "dpo" else ["target"])
        assert set(found) <= set(kinds)
        if preset == "safety-dpo-rewrite-over-rollout":
            assert found == ["rewrite", "rollout"]
        if objective == "sft":
            assert found == list(kinds)


@pytest.mark.parametrize("preset", KINDS)
def test_a_preset_asks_its_own_judge(results: dict[str, dict[str, Any]], preset: str) -> None:
    _, kinds, _, judged = PAPER[preset]
    metrics = results[preset]["metrics"]
    groups = metrics["groups"]
    asked = {name.removeprefix("judge/verdicts/") for name in metrics if name.startswith("judge/verdicts/")}
    assert asked == (paper_criteria(preset) if judged else set())
    if judged:
        most = rollouts_here(preset) + len(set(kinds) - {"rollout"})
        pairs = most if "pivot" in preset else most * (most - 1) // 2  # the pivot is none of them
        assert 0 < metrics["judge/verdicts/quality"] <= 2 * pairs * groups  # soft: each pair in both orders
        assert metrics["judge/verdicts/quality"] % 2 == 0
        for criterion in asked - {"quality"}:
            assert 0 < metrics[f"judge/verdicts/{criterion}"] <= most * groups
        assert 0 < metrics["judge/latency-p50-s"] <= metrics["judge/latency-p95-s"] <= metrics["judge/latency-p99-s"]
    rewrites = [value for name, value in metrics.items() if name in ("rewriter/rewrites", "rewriter/copies")]
    assert (sum(rewrites) > 0) == ("rewrite" in kinds)


def test_a_step_on_documents_with_thoughts(results: dict[str, dict[str, Any]]) -> None:
    result = results[THINKING_SFT]
    metrics = result["metrics"]
    assert result["examples"] == [[["target"], ["suffix"]]] * 4
    assert metrics["packing/tokens"] > 4 * 8  # whole pieces, not suffixes
    assert metrics["loss"] == pytest.approx(metrics["nll"])
    assert metrics["grad_norm"] > 0
    assert not [name for name in metrics if name.startswith(("judge/", "rollout/"))]


def test_a_step_of_thoughts_of_the_policy_s_own(results: dict[str, dict[str, Any]]) -> None:
    """Rollouts of thought, mark and text; a real judge's probability that the text says what the true one says."""
    result = results[THINKING_RL]
    metrics = result["metrics"]
    assert result["objective"] == "grpo"
    assert result["examples"]
    assert {role for roles, _ in result["examples"] for role in roles} == {"sampled"}
    assert 0 < metrics["thought/ended"] <= 1
    assert metrics["thought/ended"] == pytest.approx(1 - metrics["judge/similarity/no-end-mark"])
    assert 1 <= metrics["thought/length"] <= 8  # tokens of a rollout
    assert 0 < metrics["thought/reward"] < metrics["thought/ended"]  # one that never ends has said nothing
    assert 0 < metrics["judge/verdicts/similarity"] <= 16
    assert metrics["grad_norm"] > 0
    assert result["changed"] > 0.9


def test_a_run_logs_its_agreement_with_all_pairs(results: dict[str, dict[str, Any]]) -> None:
    metrics = results[AUDITED]["metrics"]
    assert metrics["judge/audit/quality/groups"] == metrics["groups"]
    assert 0 <= metrics["judge/audit/quality/same-best"] <= metrics["groups"]
    assert 0 <= metrics["judge/audit/quality/same-worst"] <= metrics["groups"]


@pytest.mark.parametrize("preset", HARD)
def test_a_preset_s_own_written_verdicts_are_asked_for(results: dict[str, dict[str, Any]], preset: str) -> None:
    """Five votes a judgement, six of a pair of two; each is read or missing, and a group without enough is dropped."""
    result = results[f"{preset}:hard"]
    metrics, groups = result["metrics"], result["metrics"]["groups"]
    for criterion in paper_criteria(preset):
        votes = metrics[f"judge/verdicts/{criterion}"] + metrics[f"judge/verdicts-missing/{criterion}"]
        assert votes == (6 if criterion == "quality" else 2 * 5) * groups
    assert metrics["judge/generated-tokens"] > 0
    dropped = {name: value for name, value in metrics.items() if name.startswith("dropped/")}
    assert len(result["examples"]) + sum(dropped.values()) == groups
    assert all("too-few-verdicts" in name for name in dropped)
