"""Real verdicts of a small teacher, for judge_schedules.py: sampled continuations, their likelihoods, soft verdicts.

    python benchmarks/judge_teacher.py --model ~/.cache/megatron_sip/SmolLM2-135M-Instruct [--json FILE]

Prefixes are 80 words from each of several documents of `pydoc_data.topics`; continuations are sampled from the teacher
itself at temperature 1. Starts its own SGLang server.
"""

from __future__ import annotations

import argparse
import asyncio
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from machine import describe_machine, write_report

from megatron_sip.judge.calls import ChoiceCall, LikelihoodCall
from megatron_sip.judge.prompts import builtin_prompt, fence_code
from megatron_sip.judge.settings import ClientSettings, Endpoint
from megatron_sip.judge.teacher import TeacherClient
from megatron_sip.serving.launch import LocalServer, ServerSettings

RESULTS = Path(__file__).parent / "results"
PREFIX_WORDS, NEW_TOKENS = 80, 32
JUDGED_CANDIDATES = 8


def prefixes(count: int, seed: int) -> list[str]:
    """The first words of `count` documents with enough of them."""
    documents = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text.split()) > 3 * PREFIX_WORDS]
    chosen = np.random.default_rng(seed).permutation(len(documents))[:count]
    return [" ".join(documents[i].split()[:PREFIX_WORDS]) for i in chosen]


async def continuations(url: str, prefix: str, count: int) -> list[str]:
    """`count` different sampled continuations; raises RuntimeError when the teacher gives fewer."""
    sampling = {"n": count + 4, "max_new_tokens": NEW_TOKENS, "temperature": 1.0}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session,
        session.post(f"{url}/generate", json={"text": prefix, "sampling_params": sampling}) as response,
    ):
        response.raise_for_status()
        texts = dict.fromkeys(output["text"] for output in await response.json() if output["text"].strip())
    if len(texts) < count:
        raise RuntimeError(f"only {len(texts)} of {count} different continuations for '{prefix[:40]}...'")
    return list(texts)[:count]


async def verdict_matrix(client: TeacherClient, prefix: str, texts: list[str], deadline: float) -> list[list[float]]:
    """P(first is preferred) for all ordered pairs under the quality prompt; the diagonal is 0.5."""
    prompt = builtin_prompt("quality")
    assert prompt.rule is not None
    code = fence_code(0, prefix, texts)
    pairs = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j]
    calls = [
        ChoiceCall(
            prompt.identity,
            prompt.fill({"prefix": prefix, "option_1": texts[i], "option_2": texts[j]}, code),
            prompt.rule,
        )
        for i, j in pairs
    ]
    answers = await client.ask(calls, 0, deadline)
    if any(not isinstance(answer, float) for answer in answers):
        raise RuntimeError("a verdict is missing; run again")
    matrix = np.full((len(texts), len(texts)), 0.5)
    for (i, j), answer in zip(pairs, answers, strict=True):
        matrix[i, j] = answer
    return [[round(float(value), 6) for value in row] for row in matrix]


async def measure_teacher(url: str, args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """See the module. `save` gets everything measured so far, again and again: it may take long on a small machine."""
    settings = ClientSettings((Endpoint(url),), str(args.model), call_timeout_s=600.0)
    deadline = asyncio.get_running_loop().time() + 3600
    likelihoods: list[list[float]] = []
    matrices: list[list[list[float]]] = []
    sampled: list[tuple[str, list[str]]] = []
    async with TeacherClient(settings) as client:
        await client.check()
        for prefix in prefixes(args.groups, args.seed):
            texts = await continuations(url, prefix, args.candidates)
            calls = [LikelihoodCall("benchmark", (prefix, text)) for text in texts]
            answers = await client.ask(calls, 0, deadline)
            likelihoods.append([round(float(answer), 6) for answer in answers if isinstance(answer, float)])
            sampled.append((prefix, texts))
            save({"mean_logprobs": likelihoods, "first_preferred": matrices})
        for prefix, texts in sampled[: args.judged]:
            matrices.append(await verdict_matrix(client, prefix, texts[:JUDGED_CANDIDATES], deadline))
            save({"mean_logprobs": likelihoods, "first_preferred": matrices})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--json", type=Path, default=RESULTS / "judge_teacher.json", help="report file")
    parser.add_argument("--groups", type=int, default=15)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--judged", type=int, default=3, help="groups with a verdict matrix")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.model = args.model.expanduser()
    facts = {"machine": describe_machine("cpu"), "model": args.model.name, "seed": args.seed}
    facts |= {"prefix_words": PREFIX_WORDS, "new_tokens": NEW_TOKENS}

    def save(measured: dict[str, Any]) -> None:
        print(f"{len(measured['mean_logprobs'])} groups, {len(measured['first_preferred'])} matrices", flush=True)
        write_report(args.json, facts | measured)

    with LocalServer(ServerSettings(args.model, context_length=2048)) as server:
        asyncio.run(measure_teacher(server.url, args, save))


if __name__ == "__main__":
    main()
