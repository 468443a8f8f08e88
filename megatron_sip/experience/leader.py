"""The servers a run talks to, and the leader's clients for them, all made from the flags."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from megatron_sip.config.checks import ArgumentError
from megatron_sip.config.flags import Role
from megatron_sip.config.needs import (
    candidate_kinds,
    local_servers,
    needs_engines,
    needs_eval_judge,
    needs_judge,
    needs_rewriter,
    needs_teacher,
)
from megatron_sip.config.settings import judge_settings, rewriter_role, rewriter_settings
from megatron_sip.experience.maker import Experience, ExperienceMaker, ExperienceSettings
from megatron_sip.experience.samples import SampleLog
from megatron_sip.experience.selection import SelectionSettings
from megatron_sip.judge.base import AsksTeacher
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.rewriter import Rewriter
from megatron_sip.judge.settings import JudgeSettings
from megatron_sip.records import CandidateKind, Task
from megatron_sip.rollout.handshake import ModelContract, end_open_update
from megatron_sip.rollout.pool import PoolSettings, SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings
from megatron_sip.serving.http_reply import key_from_environment
from megatron_sip.serving.launch import LocalServer, ServerSettings, start_servers, stop_servers
from megatron_sip.serving.loop_thread import LoopThread
from megatron_sip.stop_signal import StopSignal

CONNECT_SECONDS = 10.0
ENGINE_MARGIN = 2
"""SGLang stops a request this many tokens before the end of its context."""
ENGINE_FLAGS = ("--load-format=dummy", "--enable-fp32-lm-head")
"""The trainer pushes its weights before the first rollout, so engines need not read any; logits in float32 as here."""
PROBE_TEXT = "Self-improving pretraining: naïve façade, 12345 + 678 = ?\n\tΔοκιμή 测试"
"""Tokenised by us and by every engine; a difference means that they do not share a tokenizer."""


class StartedUrls(NamedTuple):
    """URLs of the servers that this run has started."""

    engines: Sequence[str] = ()
    teacher: Sequence[str] = ()
    rewriter: Sequence[str] = ()


class LocalServers:
    """The engines, teacher and rewriter of this node, started in the background while the model is being built."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._servers: list[LocalServer] = []
        self._threads = ThreadPoolExecutor(3)
        started: list[str] = []
        logs = Path(args.run_dir) / "logs"
        context = args.seq_length + ENGINE_MARGIN
        gpus = spare_gpus(args)
        self._engines: Future[list[LocalServer]] | None = None
        self._teacher: Future[list[LocalServer]] | None = None
        self._rewriter: Future[list[LocalServer]] | None = None
        if args.rollout_local and needs_engines(args):
            engine = self._settings(args, args.hf_config, logs / "engine.log", context, ENGINE_FLAGS)
            engine = replace(engine, devices=gpus[: args.rollout_local] if gpus else None)
            gpus = gpus[args.rollout_local :] if gpus else None
            self._engines = self._threads.submit(start_servers, args.rollout_local, engine)
            started.append("an engine" if args.rollout_local == 1 else f"{args.rollout_local} engines")
        if args.teacher_model and needs_teacher(args):
            teacher = self._settings(args, args.teacher_model, logs / "teacher.log", None, ())
            teacher = replace(teacher, devices=gpus[:1] if gpus else None)
            self._teacher = self._threads.submit(start_servers, 1, teacher)
            started.append("the teacher")
        if args.rewriter_model and needs_rewriter(args):
            rewriter = self._settings(args, args.rewriter_model, logs / "rewriter.log", None, ())
            rewriter = replace(rewriter, devices=gpus[-1:] if gpus else None)
            self._rewriter = self._threads.submit(start_servers, 1, rewriter)
            started.append("the rewriter")
        self.description = " and ".join(started)
        """What is being started, in words; empty when nothing is."""

    @staticmethod
    def _settings(
        args: argparse.Namespace, model: str, log_file: Path, context: int | None, extra: tuple[str, ...]
    ) -> ServerSettings:
        return ServerSettings(
            model_path=model,
            dtype=args.local_engine_dtype,
            mem_fraction=args.local_server_memory,
            max_total_tokens=args.local_engine_tokens,
            context_length=context,
            seed=args.seed,
            log_file=log_file,
            extra_args=extra,
        )

    def urls(self) -> StartedUrls:
        """Once all of them are healthy. Raises what starting them raised."""
        found = [future.result() if future is not None else [] for future in self._futures()]
        return StartedUrls(*([server.url for server in servers] for servers in found))

    def stop(self) -> None:
        """Stop whatever was started; waits for a start under way."""
        for started in self._futures():
            if started is not None and started.exception() is None:
                stop_servers(started.result())
        self._threads.shutdown()

    def _futures(self) -> tuple[Future[list[LocalServer]] | None, ...]:
        return self._engines, self._teacher, self._rewriter


def spare_gpus(args: argparse.Namespace) -> tuple[int, ...] | None:
    """A GPU for each server of this node, as indices among those that we see; None without GPUs."""
    if not torch.cuda.is_available():
        return None
    first = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    shared = torch.cuda.device_count() if args.local_server_memory is not None else None
    return server_gpus(first, local_servers(args), shared)


def server_gpus(first: int, servers: int, shared: int | None) -> tuple[int, ...]:
    """The GPUs from `first` on, one a server; where the node's `shared` GPUs may be shared, those again and again.

    When the trainer's processes take all of them, servers are on its last one.
    """
    places = range(first, first + servers) if shared is None else range(min(first, shared - 1), shared)
    return tuple(places[server % len(places)] for server in range(servers))


def check_named_servers(args: argparse.Namespace) -> None:
    """Ask the servers given as URLs whether they are there, so that a wrong one shows before other servers are started.

    Raises:
        RequestError, EndpointError: one of them gave no answer within CONNECT_SECONDS.
    """

    async def ask() -> None:
        if args.rollout_url and needs_engines(args):
            async with SGLangPool(args.rollout_url, PoolSettings(key=rollout_key(args))) as engines:
                await engines.wait_ready(CONNECT_SECONDS)
        judges: list[tuple[bool, Role]] = [(needs_judge(args), "teacher"), (needs_eval_judge(args), "eval_judge")]
        for needed, role in judges:
            if needed and (urls := getattr(args, f"{role}_url")):
                async with Judge(judge_settings(args, urls, role)) as judge:
                    await judge.check(CONNECT_SECONDS)
        if needs_rewriter(args) and (urls := getattr(args, f"{rewriter_role(args)}_url")):
            async with AsksTeacher(rewriter_settings(args, urls).client) as rewriter:
                await rewriter.check(CONNECT_SECONDS)

    asyncio.run(ask())


def rotated_urls(urls: Sequence[str], replica: int, share: int) -> list[str]:
    """The engines' URLs in the order in which the leader of `replica` fills them with its `share` prompts a step.

    Each leader fills its engines evenly from the first on, and knows nothing of the others' prompts; in the same order
    they would all use the first ones.
    """
    start = replica * share % len(urls)
    return [*urls[start:], *urls[:start]]


def rollout_key(args: argparse.Namespace) -> str | None:
    """What the engines demand as a bearer token; checked when the flags were."""
    return key_from_environment(args.rollout_key_variable) if args.rollout_key_variable else None


def rollout_sampling(args: argparse.Namespace, *, num: int, temperature: float) -> SamplingSettings:
    """How the engines sample `num` continuations a prefix."""
    return SamplingSettings(max_new_tokens=args.suffix_length, temperature=temperature, top_p=args.rollout_top_p, n=num)


def experience_settings(args: argparse.Namespace, replica: int) -> ExperienceSettings:
    """The flags that the leaders' experience depends on."""
    kinds = cast("tuple[CandidateKind, ...]", candidate_kinds(args))
    return ExperienceSettings(
        kinds=kinds,
        sampling=rollout_sampling(args, num=args.num_rollouts, temperature=args.rollout_temperature),
        selection=SelectionSettings(
            objective=args.objective,
            candidates=kinds,
            sft_target=args.sft_target,
            fixed_roles=tuple(args.dpo_pair) if args.dpo_pair is not None else None,
            seed=args.seed,
        ),
        rollout_start_step=args.rollout_start_step,
        replica=replica,
        record=Path(args.save_groups) if args.save_groups else None,
        replay=Path(args.replay_groups) if args.replay_groups else None,
        samples=SampleLog.of(Path(args.run_dir), args.train_iters) if replica == 0 else None,
    )


class Leader:
    """One data-parallel leader's side of a step: an event loop, in its own thread, with the clients of engines and teacher."""

    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer: Any,
        engine_urls: Sequence[str],
        teacher_urls: Sequence[str],
        replica: int,
        rewriter_urls: Sequence[str] = (),
    ) -> None:
        self._replica = replica
        self._loop = LoopThread("leader")
        self._clients = contextlib.AsyncExitStack()
        self.engines: SGLangPool | None = None
        self.judge: Judge | None = None
        self.eval_judge: Judge | None = None
        """The held-out comparison's, in the leader that makes it: the one of its own, or the teacher."""
        rewriter: Rewriter | None = None
        seeded = False
        try:
            if needs_engines(args):
                share = args.global_batch_size // args.data_parallel_size
                rotated = rotated_urls(engine_urls, replica, share)
                self.engines = self.run(self._open_engines(args, tokenizer, rotated))
                seeded = self.run(self.engines.take_seeds())
            if needs_judge(args):
                self.judge = self.run(self._open_judge(judge_settings(args, teacher_urls), tokenizer.eos_token_id))
            self.eval_judge = self.judge
            if needs_eval_judge(args) and replica == 0:
                own = judge_settings(args, args.eval_judge_url, "eval_judge")
                self.eval_judge = self.run(self._open_judge(own, tokenizer.eos_token_id))
            if needs_rewriter(args):
                urls = rewriter_urls if rewriter_role(args) == "rewriter" else teacher_urls
                rewriter = self.run(self._open_rewriter(args, tokenizer, urls))
        except BaseException:
            self.close()
            raise
        settings = replace(experience_settings(args, replica), rollout_seed=args.seed if seeded else None)
        self._maker = ExperienceMaker(settings, tokenizer, self.engines, self.judge, rewriter)

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on this leader's loop."""
        return self._loop.run(work)

    def make_experience(
        self, step: int, tasks: Sequence[Task], next_tasks: Sequence[Task], stop: StopSignal
    ) -> Experience | None:
        """This leader's share of a step, or None when a stop was requested meanwhile.

        Rewrites of `next_tasks`, the next step's, are then made while the policy trains: they need no rollouts.
        """
        return self.run(stop.run(self._maker.make(step, tasks, next_tasks)))

    def close(self) -> None:
        """Close all connections; rewrites under way for a step that will not come are given up first."""
        self._loop.cancel_rest()
        self.run(self._clients.aclose())
        self._loop.close()

    async def _open_engines(self, args: argparse.Namespace, tokenizer: Any, urls: Sequence[str]) -> SGLangPool:
        settings = PoolSettings(
            call_timeout_s=args.rollout_timeout,
            deadline_s=3 * args.rollout_timeout,
            max_concurrency=max(1, args.rollout_concurrency // len(urls)),
            key=rollout_key(args),
            vocab_size=args.vocab_size,
        )
        engines = await self._clients.enter_async_context(SGLangPool(urls, settings))
        await engines.wait_ready(CONNECT_SECONDS)
        if self._replica == 0:  # the others' checks wait for it; each of them doing so could break into our first push
            recovered = (
                asyncio.to_thread(end_open_update, url, args.rollout_timeout, rollout_key(args)) for url in urls
            )
            await asyncio.gather(*recovered)
        contract = ModelContract(
            vocab_size=args.vocab_size,
            context_length=args.seq_length + ENGINE_MARGIN,
            probe_text=PROBE_TEXT,
            probe_ids=tuple(tokenizer.encode(PROBE_TEXT, add_special_tokens=False)),
        )
        try:
            await engines.check_compatible(contract)
        except ValueError as error:
            raise ArgumentError(f"--rollout-url: {error}") from None
        return engines

    async def _open_rewriter(self, args: argparse.Namespace, tokenizer: Any, urls: Sequence[str]) -> Rewriter:
        settings = rewriter_settings(args, urls)
        rewriter = await self._clients.enter_async_context(Rewriter(settings, tokenizer, args.suffix_length))
        await rewriter.check(CONNECT_SECONDS)
        return rewriter

    async def _open_judge(self, settings: JudgeSettings, document_end: int | None) -> Judge:
        judge = await self._clients.enter_async_context(Judge(settings, document_end))
        await judge.check(CONNECT_SECONDS)
        return judge
