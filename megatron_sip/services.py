"""The servers a run talks to, and the leader's clients for them, all made from the flags."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from megatron_sip.arguments import candidate_kinds, needs_engines, needs_teacher
from megatron_sip.experience import Experience, ExperienceMaker, ExperienceSettings
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.rewriter import Rewriter
from megatron_sip.judge.settings import Endpoint, JudgeSettings, ScheduleSettings, parse_criteria
from megatron_sip.learning.selection import SelectionSettings
from megatron_sip.rollout.launch import LocalServer, ServerSettings, start_servers, stop_servers
from megatron_sip.rollout.sglang import SamplingSettings, SGLangPool
from megatron_sip.samples import CandidateKind, Task
from megatron_sip.stop_signal import StopSignal


class LocalServers:
    """The engines and the teacher of this node, started in the background while the model is being built."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._servers: list[LocalServer] = []
        self._threads = ThreadPoolExecutor(2)
        logs = Path(args.run_dir) / "logs"
        context = args.seq_length + 1
        self._engines: Future[list[LocalServer]] | None = None
        self._teacher: Future[list[LocalServer]] | None = None
        if args.rollout_local and needs_engines(args):
            # The trainer pushes its weights before the first rollout, so the engines need not read any.
            engine = self._settings(args, args.hf_config, logs / "engine.log", context, ("--load-format=dummy",))
            self._engines = self._threads.submit(start_servers, args.rollout_local, engine)
        if args.teacher_model and needs_teacher(args):
            teacher = self._settings(args, args.teacher_model, logs / "teacher.log", None, ())
            self._teacher = self._threads.submit(start_servers, 1, teacher)

    @staticmethod
    def _settings(
        args: argparse.Namespace, model: str, log_file: Path, context: int | None, extra: tuple[str, ...]
    ) -> ServerSettings:
        return ServerSettings(
            model_path=model,
            dtype=args.local_engine_dtype,
            max_total_tokens=args.local_engine_tokens,
            context_length=context,
            seed=args.seed,
            log_file=log_file,
            extra_args=extra,
        )

    def urls(self) -> tuple[list[str], list[str]]:
        """(engine URLs, teacher URLs), once all of them are healthy. Raises what starting them raised."""
        engines = self._engines.result() if self._engines is not None else []
        teacher = self._teacher.result() if self._teacher is not None else []
        return [server.url for server in engines], [server.url for server in teacher]

    def stop(self) -> None:
        """Stop whatever was started; waits for a start under way."""
        for started in (self._engines, self._teacher):
            if started is not None and started.exception() is None:
                stop_servers(started.result())
        self._threads.shutdown()


def rollout_sampling(args: argparse.Namespace, *, num: int, temperature: float) -> SamplingSettings:
    """How the engines sample `num` continuations a prefix."""
    return SamplingSettings(max_new_tokens=args.suffix_length, temperature=temperature, top_p=args.rollout_top_p, n=num)


def experience_settings(args: argparse.Namespace) -> ExperienceSettings:
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
    )


def judge_settings(args: argparse.Namespace, urls: Sequence[str]) -> JudgeSettings:
    """The judge that the flags describe, at `urls`."""
    return JudgeSettings(
        criteria=parse_criteria(args.criteria),
        endpoints=teacher_endpoints(args, urls),
        votes=args.judge_votes,
        schedule=ScheduleSettings(name=args.judge_schedule),
        temperature=args.judge_temperature,
        top_p=args.judge_top_p,
        deadline_s=args.judge_deadline,
        concurrency=args.judge_concurrency,
        seed=args.seed,
        tokenizer=args.teacher_model,
        cache_path=Path(args.judge_cache) if args.judge_cache is not None else None,
    )


def teacher_endpoints(args: argparse.Namespace, urls: Sequence[str]) -> tuple[Endpoint, ...]:
    """The teacher's servers as the judge and the rewriter address them."""
    model = args.teacher_name or "default"
    return tuple(Endpoint(url, args.teacher_api, model, api_key_env=args.teacher_key_variable) for url in urls)


class Leader:
    """One data-parallel leader's side of a step: an event loop with the clients of engines and teacher."""

    def __init__(
        self, args: argparse.Namespace, tokenizer: Any, engine_urls: Sequence[str], teacher_urls: Sequence[str]
    ) -> None:
        self._args = args
        self._tokenizer = tokenizer
        self._runner = asyncio.Runner()
        self.engines: SGLangPool | None = None
        self.judge: Judge | None = None
        rewriter: Rewriter | None = None
        if needs_engines(args):
            self.engines = self.run(self._open_engines(engine_urls))
        if needs_teacher(args):
            settings = judge_settings(args, teacher_urls)
            self.judge = self.run(self._open_judge(settings))
            if "rewrite" in candidate_kinds(args):
                rewriter = self.run(self._open_rewriter(settings))
        self._rewriter = rewriter
        self._maker = ExperienceMaker(experience_settings(args), tokenizer, self.engines, self.judge, rewriter)

    def run(self, work: Any) -> Any:
        """Run a coroutine on this leader's loop."""
        return self._runner.run(work)

    def make_experience(self, step: int, tasks: Sequence[Task], stop: StopSignal) -> Experience | None:
        """This leader's share of a step, or None when a stop was requested meanwhile."""
        return cast("Experience | None", self.run(stop.run(self._maker.make(step, tasks))))

    def close(self) -> None:
        """Close all connections."""
        for client in (self._rewriter, self.judge, self.engines):
            if client is not None:
                self.run(client.__aexit__(None, None, None))
        self._runner.close()
