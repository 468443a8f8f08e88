"""Models and SGLang servers that the integration tests share; each server is started once for the whole session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from fetch_smollm2 import DEFAULT_SAVE, fetch
from workers import kill_server, save_tiny_llama
from write_demo_corpus import write_corpus

from megatron_sip.serving.launch import SHARED_PREFILL, LocalServer, ServerSettings
from megatron_sip.serving.local_servers import ENGINE_FLAGS

SERVERS = {"smollm2_server", "tiny_llama_server", "tiny_engine", "victim"}
"""Fixtures that start one; tests that start one otherwise bear the mark themselves."""


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and not SERVERS.isdisjoint(item.fixturenames):
            item.add_marker("server")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, fetched once for this machine."""
    return fetch(DEFAULT_SAVE)


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest, smollm2_dir: Path, tiny_llama_dir: Path
) -> Iterator[dict[str, Future[LocalServer]]]:
    """By fixture, the servers that the session's tests use: all are started when the first is needed."""
    used = {name for item in request.session.items if isinstance(item, pytest.Function) for name in item.fixturenames}
    tiny = ServerSettings(tiny_llama_dir, dtype="float32", max_total_tokens=8192)
    settings = {
        # In float32 on every processor: what bfloat16's rounding gives differs from one to the next.
        "smollm2_server": ServerSettings(smollm2_dir, dtype="float32", context_length=2048, max_total_tokens=16384),
        # A test looks at what requests share, which without these flags a GPU's server computes again.
        "tiny_llama_server": replace(tiny, extra_args=SHARED_PREFILL),
        "tiny_engine": replace(tiny, context_length=512, extra_args=ENGINE_FLAGS),
    }
    with ThreadPoolExecutor(len(settings)) as threads:  # one that starts leaves a core idle
        started = {name: threads.submit(LocalServer(server).start) for name, server in settings.items() if name in used}
        yield started
    for future in started.values():
        if future.exception() is None:
            kill_server(future.result())


@pytest.fixture(scope="session")
def smollm2_server(servers: dict[str, Future[LocalServer]]) -> LocalServer:
    """A running SGLang float32 server of SmolLM2-135M-Instruct; its `.url` is the base URL. Do not change its weights."""
    return servers["smollm2_server"].result()


@pytest.fixture(scope="session")
def tiny_llama_server(servers: dict[str, Future[LocalServer]]) -> LocalServer:
    """A running float32 server of `tiny_llama_dir`; tests may change its weights, so each states what it expects."""
    return servers["tiny_llama_server"].result()


@pytest.fixture(scope="session")
def tiny_engine(servers: dict[str, Future[LocalServer]]) -> LocalServer:
    """The engine that whole runs push their weights to, with made-up weights as a run starts its own.

    Other tests rely on the weights of the other servers.
    """
    return servers["tiny_engine"].result()


@pytest.fixture(scope="session")
def tiny_llama_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up float32 Llama (2 layers, 4 heads, 2 KV heads, untied) with SmolLM2's tokenizer, as a folder.

    Its weights are large enough that the next token is far from uniform.
    """
    folder = tmp_path_factory.mktemp("tiny_llama")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": 49152, "intermediate_size": 128, "max_position_embeddings": 512}
    save_tiny_llama(folder, 0, initializer_range=0.2, **sizes, **ids)
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data: Python's own language reference."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "topics.jsonl")
