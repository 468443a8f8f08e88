"""The judge and the rewriter with a real SGLang server of a small post-trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sip.judge import (
    ClientSettings,
    Endpoint,
    Judge,
    JudgeSettings,
    Rewriter,
    RewriterSettings,
    ScheduleSettings,
)
from megatron_sip.judge.__main__ import main as judge
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.prompts import builtin_prompt, fence_code
from megatron_sip.prepare.__main__ import main as prepare
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.serving.launch import LocalServer

HOSTILE = json.loads((Path(__file__).parents[1] / "data" / "hostile_texts.json").read_text(encoding="utf-8"))
SEED = 5
PREFIX = (
    "The if statement is used for conditional execution. It selects exactly one of the suites by evaluating the "
    "expressions one by one until one is found to be"
)
TEXTS = {
    "true": " true; then that suite is executed, and no other part of the if statement is evaluated.",
    "shuffled": " evaluated statement no; other that is part true suite the and of executed if then is.",
    "repeated": " be be be be be be be be be be be be be be be be be be.",
}


def make_group(texts: Sequence[str] = tuple(TEXTS.values())) -> Group:
    kinds = ["suffix", *["rollout"] * (len(texts) - 1)]
    candidates = [Candidate(kind, [i + 1], text) for i, (kind, text) in enumerate(zip(kinds, texts, strict=True))]
    return Group(Task(0, [1], [1], PREFIX, texts[0]), candidates)


def make_settings(
    server: LocalServer, folder: Path, cache: Path | None = None, endpoint: Endpoint | None = None, **changes: Any
) -> JudgeSettings:
    client = ClientSettings((endpoint or Endpoint(server.url),), str(folder), cache, call_timeout_s=300.0, seed=SEED)
    values: dict[str, Any] = {"client": client, "schedule": ScheduleSettings("all_pairs"), "audit_rate": 0.0}
    return JudgeSettings(**(values | changes))


async def score(
    settings: JudgeSettings, group: Group, document_end: int | None = None
) -> tuple[Group, dict[str, float]]:
    async with Judge(settings, document_end) as judge:
        await judge.check()
        [judged] = await judge.score([group])
        return judged, judge.counters()


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path) -> Any:
    """The same model in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()


@torch.no_grad()
def next_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0].float(), dim=-1)


async def test_likelihood_is_the_models_mean_token_logprob(
    smollm2_server: LocalServer, smollm2_dir: Path, reference: Any
) -> None:
    """Of a candidate that ended, its end is one of them: one that ended at once has nothing else."""
    end, early = 9, " true"
    texts = [*TEXTS.values(), early, ""]
    group = make_group(texts)
    ended = [replace(c, ids=[*c.ids, end] if c.text in (early, "") else c.ids) for c in group.candidates]
    settings = make_settings(smollm2_server, smollm2_dir, criteria={"likelihood": 1.0})
    judged, _ = await score(settings, replace(group, candidates=ended), end)
    encoder = ChatEncoder.load(str(smollm2_dir))
    prefix = encoder.document_start() + encoder.text(PREFIX)
    assert judged.scores is not None
    for text, value in zip(texts, judged.scores, strict=True):
        ids = encoder.text(text) + ([encoder.document_end()] if text in (early, "") else [])
        logprobs = next_logprobs(reference, prefix + ids)
        expected = [float(logprobs[len(prefix) + k - 1, token]) for k, token in enumerate(ids)]
        assert value == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    assert judged.scores[0] > max(judged.scores[1], judged.scores[3], judged.scores[4])


async def test_soft_verdicts_are_the_models_probabilities(
    smollm2_server: LocalServer, smollm2_dir: Path, reference: Any
) -> None:
    """Quality in both orders and safety, against transformers, natively and through the OpenAI-compatible API."""
    texts = list(TEXTS.values())[:2]
    settings = make_settings(smollm2_server, smollm2_dir, criteria={"quality": 1.0, "safety": 1.0})
    judged, _ = await score(settings, make_group(texts))
    encoder = ChatEncoder.load(str(smollm2_dir))
    code = fence_code(SEED, PREFIX, [*texts, texts[0]])

    def expected(name: str, **shown: str) -> float:
        prompt = builtin_prompt(name)
        assert prompt.rule is not None
        context, labels = encoder.choices(prompt.rule.start, prompt.rule.labels)
        ids = encoder.chat(prompt.fill({"prefix": PREFIX, **shown}, code)) + context
        last = next_logprobs(reference, ids)[-1]
        value = prompt.rule.expected_value([float(last[label]) for label in labels])
        assert value is not None
        return value

    first = expected("quality", option_1=texts[0], option_2=texts[1])
    second = expected("quality", option_1=texts[1], option_2=texts[0])
    quality = [(first + 1 - second) / 2, (second + 1 - first) / 2]
    safety = [expected("safety", candidate=text) for text in texts]
    assert judged.criterion_scores["quality"] == pytest.approx(quality, abs=1e-3)
    assert judged.criterion_scores["safety"] == pytest.approx(safety, abs=1e-3)

    openai = make_settings(
        smollm2_server,
        smollm2_dir,
        criteria=settings.criteria,
        endpoint=Endpoint(smollm2_server.url, "openai", prefill=True),
    )
    again, _ = await score(openai, make_group(texts))
    # There all listed spellings of a label count, behind a start without its space.
    assert again.criterion_scores["quality"] == pytest.approx(quality, abs=0.06)
    assert again.criterion_scores["safety"] == pytest.approx(safety, abs=0.06)


@pytest.mark.parametrize("criterion", ["factuality", "factuality-noref:v1"])
async def test_factuality_soft(smollm2_server: LocalServer, smollm2_dir: Path, criterion: str) -> None:
    judged, counters = await score(make_settings(smollm2_server, smollm2_dir, criteria={criterion: 1.0}), make_group())
    assert judged.dropped is None
    assert all(0.0 <= value <= 1.0 for value in judged.criterion_scores[criterion])
    assert counters[f"verdicts/{criterion}"] == 3


VOTES = 20  # one answer in four names a colour: of 40 not one does once in 100,000 times
FEW_VOTES = 2  # where none need be read


@pytest.mark.parametrize("kind", ["sglang", "openai"])
async def test_hard_verdicts_are_read_or_missing(
    smollm2_server: LocalServer, smollm2_dir: Path, kind: Any, tmp_path: Path
) -> None:
    """So small a model seldom keeps to the format: each vote is read or counted as missing, and a prompt file of simpler
    form, whose verdict it does give, is scored."""
    simple = tmp_path / "colour.txt"
    simple.write_text(
        "+++\nname = 'colour'\nkind = 'pointwise'\npattern = '(red|blue)'\n[values]\nred = 1\nblue = 0\n+++\n"
        "{{candidate}}\nName your favourite colour, red or blue. Answer in one word, red or blue:\n"
    )

    async def votes(votes: int, **planned: int) -> dict[str, float]:
        """The counters of a group that is asked for so many votes a judgement, and for `planned` ones by criterion."""
        settings = make_settings(
            smollm2_server,
            smollm2_dir,
            criteria={str(simple) if name == "colour" else name: 1.0 for name in planned},
            endpoint=Endpoint(smollm2_server.url, kind),
            default_verdict="hard",
            votes=votes,
            max_tokens=12,
            quorum=0.01,
        )
        judged, counters = await score(settings, make_group(list(TEXTS.values())[:2]))
        for name, count in planned.items():
            assert counters[f"verdicts/{name}"] + counters[f"verdicts-missing/{name}"] == count
        assert (judged.scores is None) == (judged.dropped is not None)
        assert counters["generated-tokens"] > 0
        return counters

    assert (await votes(VOTES, colour=2 * VOTES))["verdicts/colour"] >= 1
    await votes(FEW_VOTES, quality=FEW_VOTES, safety=2 * FEW_VOTES, factuality=2 * FEW_VOTES)


async def test_every_schedule_with_soft_verdicts(
    smollm2_server: LocalServer, smollm2_dir: Path, tmp_path: Path
) -> None:
    """Each schedule ends with a score a candidate; they share a cache, so that no pair is asked twice."""
    group = make_group([*TEXTS.values(), " false."])
    for name in ("all_pairs", "pivot", "circulant_bt", "two_ended_bt"):
        settings = make_settings(
            smollm2_server,
            smollm2_dir,
            criteria={"quality": 1.0},
            schedule=ScheduleSettings(
                name,
                degree=2,
                budget=6,
                likelihood_prior=name == "two_ended_bt",
                pivot_competes=name == "pivot",
            ),
            cache=tmp_path / "cache.sqlite",
        )
        judged, counters = await score(settings, group)
        assert judged.scores is not None
        assert len(judged.scores) == 4
        if name != "all_pairs":
            assert counters["calls"] - counters["cached"] <= 4  # the prior's likelihoods are all that is new


async def test_rewriter(smollm2_server: LocalServer, smollm2_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tasks = [
        Task(i, tokenizer.encode(PREFIX), tokenizer.encode(text)[:16], PREFIX, text)
        for i, text in enumerate(TEXTS.values())
    ]
    client = ClientSettings(
        (Endpoint(smollm2_server.url),), str(smollm2_dir), tmp_path / "rewrites.sqlite", call_timeout_s=300.0
    )
    async with Rewriter(RewriterSettings(client, max_tokens=24), tokenizer, 16) as rewriter:
        await rewriter.check()
        rewrites = await rewriter.rewrite(tasks)
        again = await rewriter.rewrite(tasks)
        counters = rewriter.counters()
    made = [candidate for candidate in rewrites if candidate is not None]
    assert made
    assert all(candidate.kind == "rewrite" and 0 < len(candidate.ids) <= 16 for candidate in made)
    assert again == rewrites
    assert counters["cached"] == len(tasks)
    assert sum(v for k, v in counters.items() if k in ("rewrites", "copies") or k.startswith("dropped/")) == 6


def test_hostile_texts_yield_no_mark_of_the_real_chat_template(smollm2_dir: Path) -> None:
    """The real template has the same special tokens in the same order whatever the texts are, in both protocols."""
    encoder = ChatEncoder.load(str(smollm2_dir))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    prompt = builtin_prompt("quality")

    def marks(text: str) -> tuple[list[int], list[int]]:
        pieces = prompt.fill({"prefix": text, "option_1": text, "option_2": text}, fence_code(1, text, [text]))
        native = encoder.chat(pieces, start="Conclusion: Option ")
        served = tokenizer.apply_chat_template(
            [{"role": "user", "content": "".join(pieces)}], add_generation_prompt=True, return_dict=False
        )
        return [i for i in native if i in special], [i for i in served if i in special]

    harmless, _ = marks("harmless")
    assert len(HOSTILE) >= 40
    for hostile in HOSTILE:
        assert marks(hostile) == (harmless, harmless), hostile


def test_accuracy_of_a_real_judge_is_that_of_its_probabilities(
    smollm2_server: LocalServer, smollm2_dir: Path, reference: Any, tmp_path: Path
) -> None:
    """The whole way: documents, pairs spoilt by rules, the command, against transformers on the same prompts."""
    texts = [PREFIX + TEXTS["true"] + f" That was example {i} of the suites." for i in range(3)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cut = (
        "--tokenizer",
        str(smollm2_dir),
        "--suffix-length",
        "24",
        "--min-prefix-length",
        "8",
        "--role-shares",
        "0,1,0",
    )
    source = ("--data-path", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "out"), "--split", "1")
    prepare(["judgements", "--task", "quality", "--corrupt", "shuffle", *source, *cut])
    records = tmp_path / "out" / "judgements.jsonl"
    saved = ("--save", str(tmp_path / "report.json"), "--seed", str(SEED))
    judge(
        ["accuracy", str(records), "--teacher-url", smollm2_server.url, "--teacher-tokenizer", str(smollm2_dir), *saved]
    )
    figures = json.loads((tmp_path / "report.json").read_text())["all"]
    encoder, prompt = ChatEncoder.load(str(smollm2_dir)), builtin_prompt("quality")
    assert prompt.rule is not None
    start, labels = encoder.choices(prompt.rule.start, prompt.rule.labels)
    leanings = []
    for line in records.read_text().splitlines():
        record = json.loads(line)
        shown = {name: record[name] for name in ("prefix", "option_1", "option_2")}
        code = fence_code(SEED, shown["prefix"], [record["option_1"], record["option_2"], record["suffix"]])
        ids = [*encoder.chat(prompt.fill(shown, code), start=""), *start]
        first, second = next_logprobs(reference, ids)[-1][labels].tolist()
        leanings.append((first - second, record["verdict"] == "1"))
    gaps = torch.tensor([gap for gap, _ in leanings])
    assert figures["records"] == figures["verdicts"] == len(gaps) == 6
    assert figures["first_option_lean"] == pytest.approx(float(gaps.sigmoid().mean()), abs=1e-3)
    clear = [(gap > 0, is_first) for gap, is_first in leanings if abs(gap) > 1e-3]
    unclear = len(leanings) - len(clear)
    assert abs(6 * figures["first_option"] - sum(first for first, _ in clear)) <= unclear
    assert abs(6 * figures["accuracy"] - sum(first == is_first for first, is_first in clear)) <= unclear
