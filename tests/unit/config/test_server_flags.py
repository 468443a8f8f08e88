"""Servers of a rewriter and of a last judge of their own; without them both are the teacher's work."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from fake_judge import FakeJudge
from flag_cases import arguments, settings
from judge_cases import make_group
from test_arguments import refusal
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.config.needs import Needs
from megatron_sip.config.teacher_settings import judge_settings, rating_settings
from megatron_sip.experience.leader import PROBE_TEXT, Leader
from megatron_sip.judge.rewriter import Rewriter
from megatron_sip.records import Task
from megatron_sip.serving.launch import LocalServer, ServerSettings, server_command
from megatron_sip.serving.local_servers import LocalServers, spare_gpus

OWN_REWRITER = (
    *("--rewriter-url", "http://rewriter:1", "--rewriter-api", "openai", "--rewriter-name", "big"),
    *("--rewriter-reasoning-tokens", "99", "--rewriter-tokenizer", "tok", "--rewriter-requests-per-second", "3"),
)
REWRITES = ("--candidates", "suffix", "rewrite", "rollout")


def test_without_servers_of_its_own_the_rewriter_is_the_teacher() -> None:
    made = settings(*REWRITES, "--teacher-tokenizer", "teacher-tok", "--teacher-context", "4096")
    rewriter = made.clients(made.urls).rewriter
    assert rewriter is not None
    [endpoint] = rewriter.client.endpoints
    assert (endpoint.url, endpoint.context_tokens) == ("http://teacher:30000", 4096)
    assert rewriter.client.tokenizer == "teacher-tok"


def test_a_rewriter_of_its_own_takes_nothing_from_the_teacher() -> None:
    teacher_flags = ("--teacher-prefill", "--teacher-api", "openai", "--teacher-name", "j", "--criteria", "quality")
    made = settings(*REWRITES, *OWN_REWRITER, *teacher_flags)
    clients = made.clients(made.urls)
    assert clients.rewriter is not None
    assert clients.judge is not None
    client = clients.rewriter.client
    [own] = client.endpoints
    assert own.url == "http://rewriter:1"
    assert (own.kind, own.model, own.prefill, own.reasoning_tokens, own.requests_per_s) == (
        "openai",
        "big",
        False,
        99,
        3.0,
    )
    assert client.tokenizer == "tok"
    [teacher] = clients.judge.client.endpoints
    assert (teacher.model, teacher.prefill, teacher.reasoning_tokens) == ("j", True, 0)


def test_a_run_that_only_rewrites_needs_no_teacher_with_a_rewriter_of_its_own() -> None:
    assert not settings("--dpo-pair", "rewrite", "suffix", *OWN_REWRITER, teacher_url=None).needs.teacher


def test_a_last_judge_of_its_own() -> None:
    flags = ("--win-rate-prompts", "5", "--eval-judge-url", "http://last:1", "--eval-judge-api", "openai")
    own = ("--eval-judge-name", "gpt", "--criteria", "quality")
    made = settings("--objective", "sft", *flags, *own, teacher_url=None)
    assert made.needs.eval_judge
    assert not made.needs.judge
    last = made.clients(made.urls).eval_judge
    assert last is not None
    assert [(e.url, e.model) for e in last.client.endpoints] == [("http://last:1", "gpt")]
    assert Needs.from_args(arguments(*flags, "--eval-judge-name", "gpt")).judge


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rewriter-api", "openai"), "--rewriter-api openai needs --rewriter-name"),
        (("--eval-judge-api", "openai"), "--eval-judge-api openai needs --eval-judge-name"),
        (("--rewriter-model", "/nowhere"), "--rewriter-model /nowhere: no config.json there"),
        (
            ("--colocate",),
            "--colocate releases the memory of engines that the run starts itself: give --rollout-local N",
        ),
        (("--teacher-replicas", "2"), "--teacher-replicas is of the servers that --teacher-model starts"),
        (("--teacher-replicas", "0"), "--teacher-replicas 0: at least 1 server"),
        (("--colocate", "--max-staleness", "1"), "--colocate and --max-staleness 1 exclude each other"),
        (("--rewriter-url", "rewriter"), "--rewriter-url rewriter: a URL starts with http"),
        ((*REWRITES, *OWN_REWRITER, "--rewriter-context", "0"), "--rewriter-context: endpoint http://rewriter:1"),
        (
            ("--win-rate-prompts", "1", "--eval-judge-url", "http://last", "--eval-judge-reasoning-tokens", "-1"),
            "--eval-judge-reasoning-tokens: endpoint http://last",
        ),
        (
            (
                *("--win-rate-prompts", "1", "--eval-judge-url", "http://last"),
                *("--eval-judge-api", "openai", "--eval-judge-name", "m"),
            ),
            "likelihood needs an endpoint of kind sglang",
        ),
    ],
)
def test_mistakes_name_the_role_s_own_flag(flags: tuple[str, ...], message: str) -> None:
    assert message in refusal(*flags)


@pytest.mark.parametrize(
    ("given", "calls"),
    [((), (640 // 4, 2 * 32)), (("--judge-concurrency", "100", "--rollout-concurrency", "80"), (25, 2 * 10))],
)
def test_calls_in_flight_are_divided_among_replicas(given: tuple[str, ...], calls: tuple[int, int]) -> None:
    teachers = [f"http://judge{index}:30000" for index in range(10)]
    made = settings("--criteria", "quality=1", "--teacher-url", *teachers, *given, data_parallel_size=4)
    clients = made.clients(replace(made.urls, engines=("http://a:1", "http://b:1")))
    assert clients.judge is not None
    assert clients.judge.client is not None
    assert clients.engines is not None
    assert (clients.judge.client.in_flight, 2 * clients.engines.pool.max_concurrency) == calls


def test_calls_in_flight_are_at_least_one() -> None:
    assert "--rollout-concurrency 0" in refusal("--rollout-concurrency", "0")
    told = refusal("--rollout-concurrency", "7", rollout_url=["http://a:1", "http://b:1"], data_parallel_size=4)
    assert "--rollout-concurrency 7: at least 8 is needed, one for each of 2 engines and 4 data-parallel" in told


def test_whom_the_first_leader_asks_alone_gets_all_calls_from_it() -> None:
    args = arguments("--criteria", "quality=1", data_parallel_size=4)
    own = judge_settings(args, "eval_judge").client
    rating = rating_settings(args, "teacher").client
    shared = judge_settings(args, "teacher").client
    assert own is not None
    assert rating is not None
    assert shared is not None
    assert [client.in_flight for client in (own, rating, shared)] == [256, 256, 64]


def test_engines_beside_the_trainer_take_a_part_of_its_gpus_and_can_free_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings("--colocate", "--rollout-local", "3", rollout_url=None)
    servers = made.local_servers
    assert made.rollouts.colocate
    assert servers.engine is not None
    assert (servers.engine.mem_fraction, servers.engine.memory_saver, servers.share_gpus) == (0.4, True, True)
    stores = [word for word in server_command(servers.engine, 1, 2, on_cpu=False) if word.startswith("--nccl-port")]
    assert stores == ["--nccl-port=2"]
    parallel = replace(servers.engine, extra_args=("--dp-size=2",))
    assert not [word for word in server_command(parallel, 1, 2, on_cpu=False) if word.startswith("--nccl-port")]
    assert "--enable-memory-saver" in server_command(servers.engine, 1, 2, on_cpu=False)
    assert "--enable-memory-saver" not in server_command(servers.engine, 1, 2, on_cpu=True)
    own = settings("--colocate", "--rollout-local", "1", "--local-server-memory", "0.3", rollout_url=None)
    assert own.local_servers.engine is not None
    assert own.local_servers.engine.mem_fraction == 0.3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    two_kinds = replace(servers, teacher=servers.engine)
    assert spare_gpus(two_kinds) == (0, 1, 0, 2)  # the teacher is behind the trainer's
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert spare_gpus(two_kinds) == (0, 0, 0, 0)


def test_a_local_rewriter_is_one_server_more(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    made = settings(*REWRITES, "--rewriter-model", str(tmp_path), "--rollout-local", "2", rollout_url=None)
    assert made.local_servers.count == 3
    assert made.local_servers.description == "2 engines and the rewriter"


def test_teachers_of_this_node_each_have_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    own = (
        "--teacher-model",
        str(tmp_path),
        "--teacher-replicas",
        "3",
        "--rollout-local",
        "2",
        "--criteria",
        "likelihood",
    )
    made = settings(*own, rollout_url=None, teacher_url=None)
    assert made.local_servers.counts == (2, 3, 0)
    assert made.local_servers.description == "2 engines and 3 teachers"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    started: dict[tuple[str, int], tuple[int, ...] | None] = {}

    def start(count: int, server: ServerSettings) -> list[LocalServer]:
        assert server.log_file is not None
        started[server.log_file.stem, count] = server.devices
        return []

    monkeypatch.setattr("megatron_sip.serving.local_servers.start_servers", start)
    servers = LocalServers(replace(made.local_servers, rewriter=made.local_servers.teacher))
    servers.stop()
    assert started == {("engine", 2): (2, 3), ("teacher", 3): (4, 5, 6), ("teacher", 1): (7,)}


async def test_each_role_asks_its_own_servers() -> None:
    task = Task(0, [1, 2], [3], "Once upon a", " time")
    async with FakeJudge() as teacher, FakeJudge(answer=lambda prompt: "Once upon a day") as rewriter:
        flags = ("--rewriter-url", rewriter.url, "--rewriter-api", "openai", "--rewriter-name", "r")
        made = settings(*REWRITES, "--teacher-url", teacher.url, "--criteria", "likelihood", *flags)
        asked = made.clients(made.urls).rewriter
        assert asked is not None
        async with Rewriter(asked, byte_level_tokenizer(), 8) as own:
            [candidate] = await own.rewrite([task])
        assert candidate is not None
        assert candidate.text == " day"
        assert rewriter.bodies[0]["model"] == "r"
        assert teacher.requests == 0


async def test_the_last_judge_of_its_own_makes_the_comparison(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    with FakeEngine() as engine:
        engine.answers |= {
            "/v1/models": (200, {"data": [{"max_model_len": 10**6}]}),
            "/generate": (400, {"error": "valid range is [0, 320)"}),
            "/tokenize": (200, {"tokens": tokenizer.encode(PROBE_TEXT, add_special_tokens=False)}),
        }
        async with FakeJudge() as teacher, FakeJudge() as last:
            flags = [
                *("--teacher-api", "openai", "--teacher-name", "t"),
                *("--judge-verdict", "hard", "--criteria", "quality"),
            ]
            flags += ["--eval-judge-url", last.url, "--eval-judge-api", "openai", "--eval-judge-name", "e"]
            flags += ["--win-rate-prompts", "2", "--rollout-url", engine.url, "--teacher-url", teacher.url]
            made = settings(*flags, vocab_size=320, run_dir=str(tmp_path), train_iters=1)
            clients = made.clients(made.urls)
            leader = await asyncio.to_thread(Leader, clients, made.experience, tokenizer, 0)
            other = await asyncio.to_thread(Leader, clients, made.experience, tokenizer, 1)
            try:
                assert leader.judge is not leader.eval_judge
                assert leader.eval_judge is not None
                await asyncio.to_thread(leader.run, leader.eval_judge.score([make_group(0, [0.4, 0.9])]))
                assert (teacher.requests, last.bodies[0]["model"]) == (0, "e")
                assert other.eval_judge is other.judge  # only the first leader compares
            finally:
                await asyncio.to_thread(leader.close)
                await asyncio.to_thread(other.close)
