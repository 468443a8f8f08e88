"""SGLang engines as a model of lm-eval: log-likelihoods and greedy texts for its tasks, in the way that costs least.

Only the continuation's log-probs are asked for (`logprob_start_len` is the context's last token), so that a context which
others share, as few-shot examples are, comes from the engine's prefix cache (`shared_contexts`). Texts become tokens, and long
ones are cut, as lm-eval's own `hf` model does it: its scores are the same numbers. What was answered is kept on disk at once;
an answer that cannot be had ends the evaluation, and is never a score.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_sip.console import bars
from megatron_sip.errors import DataError
from megatron_sip.evaluation.shared_contexts import send_sharing
from megatron_sip.judge.cache import AnswerCache, cache_key
from megatron_sip.rollout.pool import PoolSettings
from megatron_sip.serving.failures import readable
from megatron_sip.serving.http import HttpPool, Request
from megatron_sip.serving.server import Server
from megatron_sip.serving.sglang_wire import GENERATE_PATH, Result, generate_body, logprob, read_results

ANSWER_TOKENS = 256
"""Of a text whose task names no limit, as lm-eval's own models have it."""


class EngineLM(LM):
    """The model that engines at `urls` serve.

    max_length: tokens of context and continuation that the model sees; a longer context loses its beginning. answers: what
    was answered before, by `identity`, which says what model it is. counts: requests "asked" of the engines and "kept" from
    before, and of the prompts asked "prompt_tokens" and those "cached_tokens" that the engines had.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: Any,
        max_length: int,
        settings: PoolSettings,
        answers: AnswerCache,
        identity: bytes,
    ) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter(asked=0, kept=0, prompt_tokens=0, cached_tokens=0)
        self._urls, self._tokenizer, self._max_length = list(urls), tokenizer, max_length
        self._settings, self._kept, self._identity = settings, answers, identity
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._start = end if start is None else start
        self._start_text = tokenizer.decode(self._start)

    # ---- what lm-eval calls ----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-prob, and whether greedy decoding would write it."""
        found = self._answer("loglikelihood", requests, self._loglikelihood)
        return [(total, bool(greedy)) for total, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-prob of each text, in windows of the model's length."""
        return [total for (total,) in self._answer("loglikelihood_rolling", requests, self._rolling)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy text behind each context, up to its task's stop strings or limit."""
        return [text for (text,) in self._answer("generate_until", requests, self._generate)]

    # ---- asking ----------------------------------------------------------------------------------------------------

    def _answer(
        self, kind: str, requests: Sequence[Instance], ask: Callable[..., Awaitable[list[Any]]]
    ) -> list[list[Any]]:
        """An answer for each request, from disk or from the engines. Raises RequestError, DataError."""
        keys = [cache_key(self._identity + orjson.dumps([kind, request.args])) for request in requests]
        found: dict[bytes, Any] = dict(self._kept.get_many(keys))
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        self.counts["kept"] += len(set(keys)) - len(new)
        of_context: dict[str, list[bytes]] = {}
        for key, request in new.items():
            of_context.setdefault(request.args[0], []).append(key)
        settings, engines = self._settings, len(self._urls)

        async def work_all() -> None:
            pool = HttpPool(
                [Server(url, settings.key) for url in self._urls],
                concurrency=settings.max_concurrency * engines,
                call_timeout_s=settings.call_timeout_s,
                connect_timeout_s=settings.connect_timeout_s,
                policy=settings.policy,
            )

            async def work(number: int, key: bytes) -> None:
                request = new[key]
                try:
                    found[key] = await ask(pool, number, *request.args)
                except DataError as error:
                    raise DataError(f"{request.task_name}, question {request.doc_id}: {error}") from error
                self._kept.put_many([(key, found[key])])
                bar.update()

            async with pool:
                with tqdm(total=len(set(keys)), initial=len(found), desc=kind, unit="request", file=bars()) as bar:
                    await send_sharing(of_context, work, settings.max_concurrency, engines)

        try:
            asyncio.run(work_all())
        finally:
            self._kept.flush()
        return [found[key] for key in keys]

    async def _ask[T](self, pool: HttpPool, number: int, body: dict[str, Any], read: Callable[[Result], T]) -> T:
        """What `read` finds in the engine's result. Requests of one number, of a group, go to one engine."""

        def parse(reply: Any) -> tuple[T, tuple[int, int, int]]:
            with readable():
                [result] = read_results(reply, 1)
                result.require_whole()
                return read(result), result.token_counts()

        data = orjson.dumps(body)
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        answer, (prompt, cached, _) = await pool.send(Request(number, GENERATE_PATH, lambda _: data, parse), deadline)
        self.counts.update(asked=1, prompt_tokens=prompt, cached_tokens=cached)
        return answer

    async def _score(self, pool: HttpPool, number: int, context: list[int], continuation: list[int]) -> list[float]:
        """[log-prob of the continuation behind the context, 1.0 if it is what greedy decoding writes]."""
        if not 0 < len(continuation) <= self._max_length:
            raise DataError(
                f"a continuation of {len(continuation)} tokens: a model of {self._max_length} tokens scores 1 to so many"
            )
        ids = (context + continuation)[-(self._max_length + 1) :]

        def read(result: Result) -> list[float]:
            total = sum(logprob(value) for value in result.prompt_logprobs(continuation))
            return [total, float(result.prompt_top_ids(len(continuation)) == continuation)]

        sampling = {"max_new_tokens": 0, "temperature": 0.0}
        start = len(ids) - len(continuation) - 1
        body = generate_body(ids, sampling, logprobs_from=start, top_logprobs=1)
        return await self._ask(pool, number, body, read)

    # ---- the three kinds -------------------------------------------------------------------------------------------

    async def _loglikelihood(self, pool: HttpPool, number: int, context: str, continuation: str) -> list[float]:
        return await self._score(pool, number, *self._encode_pair(context, continuation))

    async def _rolling(self, pool: HttpPool, number: int, text: str) -> list[float]:
        windows = get_rolling_token_windows(self._encode(text), self._start, self._max_length, context_len=1)
        parts = [await self._score(pool, number, *make_disjoint_window(window)) for window in windows]
        return [sum(total for total, _ in parts)]

    async def _generate(self, pool: HttpPool, number: int, context: str, how: dict[str, Any]) -> list[str]:
        wanted: Any = normalize_gen_kwargs(how, ANSWER_TOKENS)
        if wanted.get("temperature"):
            raise DataError(f"a task that samples, at temperature {wanted['temperature']}: only greedy texts are made")
        limit = wanted["max_gen_toks"]
        if limit >= self._max_length:
            raise DataError(f"a task whose texts have up to {limit} tokens: the model's length is {self._max_length}")
        ids = self._encode(context)[-(self._max_length - limit) :] or [self._start]
        stops = [stop for stop in wanted["until"] if stop]

        def read(result: Result) -> list[str]:
            text = str(result.text)
            for stop in stops:
                text = text.partition(stop)[0]
            return [text]

        body = generate_body(ids, {"max_new_tokens": limit, "temperature": 0.0, "stop": stops})
        return await self._ask(pool, number, body, read)

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer adds, unless the text begins with its first one."""
        special = {"add_special_tokens": False} if text.startswith(self._start_text) else {}
        return list(self._tokenizer.encode(text, **special))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of the context and of what the two together add to it; spaces between them belong to the continuation."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if stripped:
            ids = self._encode(stripped)
            return ids, self._encode(stripped + continuation)[len(ids) :]
        ids = list(self._tokenizer.encode(continuation, add_special_tokens=False))
        return (ids[:1], ids[1:]) if ids[:1] == [self._start] else ([self._start], ids)
