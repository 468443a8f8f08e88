"""A leader's clients of engines and teacher, and the event loop that they live on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from megatron_sip.console import say
from megatron_sip.errors import ArgumentError
from megatron_sip.experience.maker import Experience, ExperienceMaker, ExperienceSettings
from megatron_sip.judge.base import AsksTeacher
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.rewriter import Rewriter, RewriterSettings
from megatron_sip.judge.settings import JudgeSettings
from megatron_sip.records import Task
from megatron_sip.rollout.handshake import ModelContract, end_open_update
from megatron_sip.rollout.pool import PoolSettings, SGLangPool
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.loop_thread import LoopThread
from megatron_sip.stop_signal import StopSignal

CONNECT_SECONDS = 10.0
PROBE_TEXT = "Self-improving pretraining: naïve façade, 12345 + 678 = ?\n\tΔοκιμή 测试"
"""Tokenised by us and by every engine; a difference means that they do not share a tokenizer."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The engines at `urls`, filled from the first on. context_length: tokens that each must take, prompt and answer."""

    urls: tuple[str, ...]
    pool: PoolSettings
    context_length: int


@dataclass(frozen=True, slots=True)
class ClientsSettings:
    """Which servers a leader asks, None: none of that kind. eval_judge: the held-out comparison's, if it is not `judge`.
    rating_judge: of answers to sets of prompts. goes_on: the run has worked before, and waits for servers that may be starting
    again, or of another job, as long as in a step."""

    engines: EngineSettings | None = None
    judge: JudgeSettings | None = None
    eval_judge: JudgeSettings | None = None
    rating_judge: JudgeSettings | None = None
    rewriter: RewriterSettings | None = None
    goes_on: bool = False

    def patience_s(self, asked: JudgeSettings | RewriterSettings) -> float:
        """How long these servers are waited for at the start."""
        return max(CONNECT_SECONDS, asked.deadline_s) if self.goes_on else CONNECT_SECONDS

    async def wait_for(self, engines: SGLangPool, *, tells: bool) -> None:
        """Return once all engines answer. Raises RequestError when they do not in time.

        tells: whether to say who is waited for.
        """
        try:
            await engines.wait_ready(CONNECT_SECONDS)
        except RequestError as error:
            patience_s = engines.settings.call_timeout_s
            if not self.goes_on or patience_s <= CONNECT_SECONDS:
                raise
            if tells:
                say(
                    f"engines: {error.detail}. They are waited for up to {patience_s:.0f} s, since this run has worked before"
                )
            await engines.wait_ready(patience_s - CONNECT_SECONDS)


def check_servers(settings: ClientsSettings) -> None:
    """Ask all servers whether they are there, so that a wrong URL shows before other servers are started.

    Raises:
        RequestError, EndpointError: one of them gave no answer within CONNECT_SECONDS, or its `patience_s`.
    """

    async def ask() -> None:
        if settings.engines is not None:
            async with SGLangPool(settings.engines.urls, settings.engines.pool) as engines:
                await settings.wait_for(engines, tells=True)
        for judge_settings in (settings.judge, settings.eval_judge, settings.rating_judge):
            if judge_settings is not None:
                async with Judge(judge_settings) as judge:
                    await judge.check(settings.patience_s(judge_settings))
        if settings.rewriter is not None:
            async with AsksTeacher(settings.rewriter.client) as rewriter:
                await rewriter.check(settings.patience_s(settings.rewriter))

    asyncio.run(ask())


def rotated_urls(urls: Sequence[str], replica: int, share: int) -> list[str]:
    """The engines' URLs in the order in which the leader of `replica` fills them with its `share` prompts a step.

    Each leader fills its engines evenly from the first on, and knows nothing of the others' prompts; in the same order
    they would all use the first ones.
    """
    start = replica * share % len(urls) if urls else 0
    return [*urls[start:], *urls[:start]]


class Leader:
    """One data-parallel leader's side of a step: an event loop, in its own thread, with the clients of engines and teacher."""

    def __init__(
        self, settings: ClientsSettings, experience: ExperienceSettings, tokenizer: Any, replica: int = 0
    ) -> None:
        self._replica = replica
        self._servers = settings
        self._loop = LoopThread("leader")
        self._clients = contextlib.AsyncExitStack()
        self.engines: SGLangPool | None = None
        self.judge: Judge | None = None
        self.eval_judge: Judge | None = None
        """The held-out comparison's, in the leader that makes it: the one of its own, or the teacher."""
        self.rating_judge: Judge | None = None
        rewriter: Rewriter | None = None
        seeded = False
        try:
            if settings.engines is not None:
                self.engines = self.run(self._open_engines(settings.engines, tokenizer))
                seeded = self.run(self.engines.take_seeds())
            if settings.judge is not None:
                self.judge = self.run(self._open_judge(settings.judge, tokenizer))
            self.eval_judge = self.judge
            if settings.eval_judge is not None and replica == 0:
                self.eval_judge = self.run(self._open_judge(settings.eval_judge, tokenizer))
            if settings.rating_judge is not None and replica == 0:
                self.rating_judge = self.run(self._open_judge(settings.rating_judge, tokenizer))
            if settings.rewriter is not None:
                length = experience.sampling.max_new_tokens
                rewriter = self.run(self._open_rewriter(settings.rewriter, tokenizer, length))
        except BaseException:
            self.close()
            raise
        own = replace(
            experience,
            replica=replica,
            samples=experience.samples if replica == 0 else None,
            rollout_seed=experience.rollout_seed if seeded else None,
        )
        self._askers = [asker for asker in (self.judge, rewriter) if asker is not None]
        self._maker = ExperienceMaker(own, tokenizer, self.engines, self.judge, rewriter)

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on this leader's loop."""
        return self._loop.run(work)

    def apart[T](self, work: Coroutine[Any, Any, T]) -> T:
        """`run` for calls that are no step's: they are not among the counts of the next one."""
        result = self.run(work)
        self._maker.forget_counts()
        return result

    def judged[T](self, work: Coroutine[Any, Any, T], stop: StopSignal, *judges: AsksTeacher | None) -> T | None:
        """What comes of work, apart from steps, that `judges` are asked for; None when a stop was requested, by us if one of
        them is gone."""
        return self.apart(stop.run(_unless_gone(work, stop, judges)))

    def begin_experience(
        self,
        step: int,
        version: str,
        tasks: Sequence[Task],
        next_tasks: Sequence[Task],
        stop: StopSignal,
        round_index: int = 0,
    ) -> Future[Experience | None]:
        """Begin this leader's share of a round of a step, its rollouts by weights of `version`; `wait` has what comes of it.

        Rewrites of `next_tasks`, the next batch, are then made while the policy trains: they need no rollouts.
        """
        making = self._maker.make(step, tasks, next_tasks, round_index, version)
        return self._loop.begin(stop.run(_unless_gone(making, stop, self._askers)))

    def wait(self, under_way: Future[Experience | None]) -> Experience | None:
        """The experience that was begun, or None when a stop was requested meanwhile."""
        return self._loop.wait(under_way)

    def close(self) -> None:
        """Close all connections; rewrites under way for a step that will not come are given up first."""
        self._loop.cancel_rest()
        self.run(self._clients.aclose())
        self._loop.close()

    async def _open_engines(self, settings: EngineSettings, tokenizer: Any) -> SGLangPool:
        engines = await self._clients.enter_async_context(SGLangPool(settings.urls, settings.pool))
        await self._servers.wait_for(engines, tells=self._replica == 0)
        if self._replica == 0:  # the others' checks wait for it; each of them doing so could break into our first push
            recovered = (
                asyncio.to_thread(end_open_update, url, settings.pool.call_timeout_s, settings.pool.key)
                for url in settings.urls
            )
            await asyncio.gather(*recovered)
        vocab_size = settings.pool.vocab_size
        assert vocab_size is not None
        contract = ModelContract(
            vocab_size=vocab_size,
            context_length=settings.context_length,
            probe_text=PROBE_TEXT,
            probe_ids=tuple(tokenizer.encode(PROBE_TEXT, add_special_tokens=False)),
        )
        try:
            await engines.check_compatible(contract)
        except ValueError as error:
            raise ArgumentError(f"--rollout-url: {error}") from None
        return engines

    async def _open_rewriter(self, settings: RewriterSettings, tokenizer: Any, suffix_length: int) -> Rewriter:
        rewriter = await self._clients.enter_async_context(Rewriter(self._told(settings), tokenizer, suffix_length))
        await rewriter.check(self._servers.patience_s(settings))
        return rewriter

    async def _open_judge(self, settings: JudgeSettings, tokenizer: Any) -> Judge:
        asked = Judge(self._told(settings), tokenizer.eos_token_id, ChatEncoder(tokenizer))
        judge = await self._clients.enter_async_context(asked)
        await judge.check(self._servers.patience_s(settings))
        return judge

    def _told[Asked: (JudgeSettings, RewriterSettings)](self, asked: Asked) -> Asked:
        """The first leader says who is waited for, and no other: all wait for the same servers."""
        if asked.client is None or self._replica == 0:
            return asked
        return replace(asked, client=replace(asked.client, tells=False))


async def _unless_gone[T](
    work: Coroutine[Any, Any, T], stop: StopSignal, askers: Sequence[AsksTeacher | None]
) -> T | None:
    """What comes of `work`; None where nobody is left of those that it asks. The run is then asked to stop: what they did not
    answer is lost to it, and would be to all that follows.
    """
    made = await work
    for asker in askers:
        if asker is not None and (gone := await asker.gone()) is not None:
            stop.request(gone)
            return None
    return made
