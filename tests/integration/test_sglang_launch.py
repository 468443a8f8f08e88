"""Real SGLang servers: they end with their parent however it ends, and a start that fails says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from workers import group_members

from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings
from megatron_sip.serving.launch import LocalServer, ServerSettings, ServerStartError, start_servers

PARENT = """
import sys, time
from megatron_sip.serving.launch import LocalServer, ServerSettings
server = LocalServer(ServerSettings(sys.argv[1], dtype="float32", max_total_tokens=4096)).start()
print(server.pid, flush=True)
time.sleep(600)
"""


def wait_until_empty(process_group: int, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (left := group_members(process_group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.server
def test_no_server_process_outlives_a_parent_that_is_killed(tiny_llama_dir: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tiny_llama_dir)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        process_group = int(parent.stdout.readline())
        assert len(group_members(process_group)) >= 4  # guard, HTTP server, scheduler, detokenizer
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert wait_until_empty(process_group, timeout_s=30) == []


@pytest.mark.server
def test_a_server_that_fails_to_start_says_why_with_the_tail_of_its_log(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    server = LocalServer(ServerSettings(tmp_path, start_timeout_s=200))
    with pytest.raises(ServerStartError, match=r"ended with status \d+ after") as failure:
        server.start()
    assert str(server.log_file) in str(failure.value)
    assert "Traceback" in server.log_file.read_text()
    assert not server.alive()


async def test_smollm2_continues_a_fact(smollm2_server: LocalServer, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    prefix = tokenizer("The capital of France is").input_ids
    async with SGLangPool([smollm2_server.url]) as pool:
        ((completion,),) = await pool.generate([prefix], SamplingSettings(max_new_tokens=3, temperature=0))
    assert "Paris" in tokenizer.decode(completion.ids)


def test_start_servers_refuses_what_cannot_work(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        start_servers(0, ServerSettings(tiny_llama_dir))
    with pytest.raises(ValueError, match="2 servers need that many devices, not 1"):
        start_servers(2, ServerSettings(tiny_llama_dir, devices=(0,)))
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        start_servers(1, ServerSettings(tmp_path / "missing"))
