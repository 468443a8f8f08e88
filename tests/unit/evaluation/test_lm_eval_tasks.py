"""megatron-sip-evaluate tasks: an error is never a score and loses no answer; presets; what is a result; refusals."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from app_server import AppServer
from lm_eval.api.instance import Instance
from lm_eval_cases import CHOICE, SCORED, WRITTEN, write_tasks
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.errors import DataError
from megatron_sip.evaluate import main
from megatron_sip.evaluation.lm_eval_engine import EngineLM
from megatron_sip.evaluation.lm_eval_tasks import FEW_SHOT, PRESETS, Tasks, as_results, first_questions, load_tasks
from megatron_sip.evaluation.results import Result
from megatron_sip.evaluation.tables import WEIGHTS
from megatron_sip.evaluation.win_rate import wilson_interval
from megatron_sip.judge.cache import AnswerCache
from megatron_sip.rollout.pool import PoolSettings
from megatron_sip.serving.failures import RequestError

TOKENIZER = byte_level_tokenizer()
PATIENCE = PoolSettings(attempts=1, backoff_s=0.01, deadline_s=5.0, down_s=0.01, max_concurrency=1)


def scored(body: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """What SGLang answers: each token has the log-prob -1 and is not the likeliest."""
    ids = body["input_ids"][body["logprob_start_len"] :]
    entries = [[-1.0, token, None] for token in ids]
    top = [[[-0.5, token + 1, None]] for token in ids]
    meta = {"finish_reason": {"type": "length"}, "input_token_logprobs": entries, "input_top_logprobs": top}
    return {"text": "", "meta_info": meta | {"prompt_tokens": len(body["input_ids"]), "cached_tokens": 1} | changed}


def ask(
    answer: Callable[[dict[str, Any]], Any], cache: Path, words: list[str]
) -> tuple[Any, list[dict[str, Any]], EngineLM]:
    """The log-likelihoods (or the error) of `words` behind a context, what was asked, and the model."""
    bodies: list[dict[str, Any]] = []

    async def generate(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        value = answer(bodies[-1])
        return web.json_response(value) if isinstance(value, dict) else web.Response(status=value)

    async def work() -> tuple[Any, EngineLM]:
        async with AppServer({"POST /generate": generate}) as server:
            with contextlib.closing(AnswerCache(cache)) as kept:
                model = EngineLM([server.url], TOKENIZER, 64, PATIENCE, kept, b"model")
                requests = [Instance("loglikelihood", {}, ("a b", word), place) for place, word in enumerate(words)]
                try:
                    return await asyncio.to_thread(model.loglikelihood, requests), model
                except RequestError as error:
                    return error, model

    found, model = asyncio.run(work())
    return found, bodies, model


def test_only_the_continuation_is_asked_for_and_an_answer_once(tmp_path: Path) -> None:
    found, bodies, model = ask(scored, tmp_path / "kept.sqlite", [" c", " d e", " c"])
    tokens = [len(TOKENIZER.encode(text)) - len(TOKENIZER.encode("a b")) for text in ("a b c", "a b d e")]
    assert found == [(-tokens[0], False), (-tokens[1], False), (-tokens[0], False)]
    assert [len(body["input_ids"]) - body["logprob_start_len"] - 1 for body in bodies] == tokens
    assert {(body["sampling_params"]["max_new_tokens"], body["top_logprobs_num"]) for body in bodies} == {(0, 1)}
    assert (model.counts["asked"], model.counts["kept"], model.counts["cached_tokens"]) == (2, 0, 2)
    again, bodies, model = ask(scored, tmp_path / "kept.sqlite", [" c", " d e"])
    assert (again, bodies, model.counts["kept"]) == (found[:2], [], 2)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda body: 500, "server-error"),
        (lambda body: 400, "rejected"),
        (lambda body: scored(body, finish_reason={"type": "abort", "message": "gone"}), "aborted"),
        (
            lambda body: scored(body, input_token_logprobs=[[None, token, None] for token in body["input_ids"][-2:]]),
            "bad-response",
        ),
        (lambda body: scored(body, input_token_logprobs=[[float("-1e999"), 1, None]] * 2), "bad-response"),
        (lambda body: scored(body, input_top_logprobs=[]), "bad-response"),
    ],
    ids=["fails", "refuses", "aborts", "no log-prob", "other tokens", "no likeliest"],
)
def test_an_error_ends_it_and_keeps_what_was_answered(tmp_path: Path, answer: Any, kind: str) -> None:
    first, _, _ = ask(scored, tmp_path / "kept.sqlite", [" c"])
    found, bodies, _ = ask(answer, tmp_path / "kept.sqlite", [" c", " d"])
    assert isinstance(found, RequestError)
    assert found.kind == kind
    assert len(bodies) == 1
    again, bodies, _ = ask(scored, tmp_path / "kept.sqlite", [" c", " d"])
    assert again[0] == first[0]
    assert again[1][0] < 0
    assert len(bodies) == 1


def test_what_contexts_share_is_computed_once_before_others_are_asked(tmp_path: Path) -> None:
    """Until a context's first request is answered none other with it is sent, and none of its group until the group's first."""
    examples = "The examples that all questions of a subject stand behind. " * 8
    contexts = [f"{subject} {examples} {question}" for subject in ("One", "Two") for question in "abc"] + [
        "Short",
        "brief",
    ]
    beginnings = {
        text: TOKENIZER.encode(text, add_special_tokens=False)
        for text in (*contexts, f"One {examples}", f"Two {examples}")
    }
    flying: list[list[int]] = []
    answered: list[list[int]] = []
    most = 0

    async def generate(request: web.Request) -> web.Response:
        nonlocal most
        body = await request.json()
        ids = body["input_ids"]
        own = [text for text, start in beginnings.items() if ids[: len(start)] == start]
        for start in map(beginnings.__getitem__, own):
            together = [other for other in flying if other[: len(start)] == start]
            assert not together or any(done[: len(start)] == start for done in answered), "computed twice"
        flying.append(ids)
        most = max(most, len(flying))
        await asyncio.sleep(0.02)
        flying.remove(ids)
        answered.append(ids)
        return web.json_response(scored(body))

    async def work() -> None:
        async with AppServer({"POST /generate": generate}) as server:
            with contextlib.closing(AnswerCache(tmp_path / "kept.sqlite")) as kept:
                settings = replace(PATIENCE, max_concurrency=16)
                model = EngineLM([server.url], TOKENIZER, 1024, settings, kept, b"model")
                pairs = [(context, f" {choice}") for choice in "wxyz" for context in contexts]
                requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
                assert len(await asyncio.to_thread(model.loglikelihood, requests)) == len(pairs)

    asyncio.run(work())
    assert len(answered) == 4 * len(contexts)
    assert most > 4


def test_presets_are_the_paper_s_tasks_and_mmlu_has_five_examples() -> None:
    assert set(PRESETS["standard"]) == set(WEIGHTS["standard"])
    assert FEW_SHOT == {"mmlu": 5}


def test_few_shot_is_the_task_s_own_the_flag_s_or_none(tmp_path: Path) -> None:
    files = write_tasks(tmp_path / "tasks")
    own = json.loads((files / f"{WRITTEN}.yaml").read_text())
    (files / f"{WRITTEN}.yaml").write_text(json.dumps(own | {"num_fewshot": 0}))
    for flag, expected in ((None, 0), (2, 2)):
        loaded = load_tasks([CHOICE, WRITTEN], [files], flag).loaded["tasks"]
        assert [loaded[name].config.num_fewshot for name in (CHOICE, WRITTEN)] == [expected, 0]


def test_a_task_of_two_names_is_refused_and_a_name_given_twice_is_one(tmp_path: Path) -> None:
    files = write_tasks(tmp_path / "tasks")
    own = json.loads((files / f"{CHOICE}.yaml").read_text())
    for name in ("sub_a", "sub_b"):
        (files / f"{name}.yaml").write_text(json.dumps(own | {"task": name}))
    how = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (files / "both.yaml").write_text(json.dumps({"group": "both", "task": ["sub_a", "sub_b"], **how}))
    assert load_tasks(["both", CHOICE, "both"], [files], None).groups == {"both": ["sub_a", "sub_b"], CHOICE: [CHOICE]}
    for names in (["both", "sub_a"], ["sub_a", "both"]):
        with pytest.raises(DataError, match=f"--tasks {names[0]} {names[1]}: both ask sub_a"):
            load_tasks(names, [files], None)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_examples_that_would_be_the_questions_are_refused(split: str, tmp_path: Path) -> None:
    files = write_tasks(tmp_path / "tasks")
    own = json.loads((files / f"{CHOICE}.yaml").read_text())
    del own["fewshot_split"], own["fewshot_config"]
    own |= {"test_split": None, f"{split}_split": "test"}
    (files / f"{CHOICE}.yaml").write_text(json.dumps(own))
    with pytest.raises(DataError, match=f"--num-fewshot 2: {CHOICE} has no examples but the questions"):
        load_tasks([CHOICE], [files], 2)
    assert load_tasks([CHOICE], [files], 0).groups == {CHOICE: [CHOICE]}
    (files / f"{CHOICE}.yaml").write_text(json.dumps(own | {"training_split": "dev"}))
    assert load_tasks([CHOICE], [files], 2).loaded["tasks"][CHOICE].config.num_fewshot == 2


def test_a_group_without_a_number_of_its_own_is_its_tasks(tmp_path: Path) -> None:
    files = write_tasks(tmp_path / "tasks")
    (files / "list.yaml").write_text(json.dumps({"group": "list", "task": [CHOICE, WRITTEN]}))
    assert load_tasks(["list"], [files], None).groups == {CHOICE: [CHOICE], WRITTEN: [WRITTEN]}


def test_a_question_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    with contextlib.closing(AnswerCache(tmp_path / "kept.sqlite")) as kept:
        model = EngineLM(["http://127.0.0.1:1"], TOKENIZER, 64, PATIENCE, kept, b"model")
        empty = Instance("loglikelihood", {}, ("a b", ""), 0, metadata=("colours", 7, 1))
        with pytest.raises(DataError, match="colours, question 7: a continuation of 0 tokens"):
            model.loglikelihood([empty])


def test_a_limit_is_divided_over_a_group_s_tasks() -> None:
    sizes = {"piqa": 9, "mmlu_a": 5, "mmlu_b": 1}
    loaded = {"tasks": {name: SimpleNamespace(eval_docs=range(size)) for name, size in sizes.items()}}
    found = first_questions(Tasks({"piqa": ["piqa"], "mmlu": ["mmlu_a", "mmlu_b"]}, loaded), 5)
    assert {name: len(places) for name, places in found.items()} == {"piqa": 5, "mmlu_a": 3, "mmlu_b": 1}
    assert found["mmlu_a"] == [0, 1, 2]


def test_a_group_is_a_result_by_accuracy_over_all_its_questions_and_perplexity_is_none() -> None:
    found = {
        "results": {
            "piqa": {"acc,none": 0.75, "acc_stderr,none": "N/A", "acc_norm,none": 0.5, "alias": "piqa"},
            "truthfulqa_mc1": {"acc,none": 0.25},
            "sip_scored": {"word_perplexity,none": 17.5},
        },
        "groups": {"mmlu": {"acc,none": 0.4, "sample_len": 30}},
        "n-samples": {name: {"effective": 10} for name in ("piqa", "truthfulqa_mc1", "sip_scored", "mmlu_a", "mmlu_b")},
    }
    names = {"piqa": ["piqa"], "truthfulqa_mc1": ["truthfulqa_mc1"], SCORED: [SCORED], "mmlu": ["mmlu_a", "mmlu_b"]}
    results, metrics = as_results(Tasks(names, {}), found)
    assert results == [
        Result("standard", "piqa", 0.75, 10, wilson_interval(0.75, 10)),
        Result("factuality", "truthfulqa-mc1", 0.25, 10, wilson_interval(0.25, 10)),
        Result("standard", "mmlu", 0.4, 20, wilson_interval(0.4, 20)),
    ]
    assert metrics["piqa"] == {"acc": 0.75, "acc_norm": 0.5}
    assert metrics[SCORED] == {"word_perplexity": 17.5}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "sip_colour"], "sip_colour: lm-eval has no such task; near: sip_colours"),
        (["--tasks", CHOICE, "--limit", "0"], "--limit 0: at least 1"),
        (["--tasks", "broken"], "broken: .*gone.jsonl.*--include-path"),
        (["--tasks", CHOICE, "--include-path", "nowhere"], "--include-path nowhere: no folder with task files"),
    ],
)
def test_mistakes_are_named_before_anything_is_served(tmp_path: Path, words: list[str], told: str) -> None:
    files = write_tasks(tmp_path / "tasks")
    task = json.loads((files / f"{CHOICE}.yaml").read_text())
    gone = {"task": "broken", "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}
    (files / "broken.yaml").write_text(json.dumps(task | gone))
    where = [
        "--model",
        str(tmp_path / "no model"),
        "--include-path",
        str(files),
        "--output",
        str(tmp_path / "out.json"),
    ]
    with pytest.raises(SystemExit, match=told):
        main(["tasks", *where, *words])
    assert not (tmp_path / "out.json").exists()
