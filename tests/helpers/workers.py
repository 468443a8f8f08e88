"""What tests of whole processes share: how these are started, and a small model. Also Llama 3's rotation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from preloaded import Started, start

from megatron_sip.serving.launch import LocalServer

TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def save_tiny_llama(folder: Path, seed: int, dtype: Any = None, **changes: Any) -> Path:
    """A float32 Llama of random weights, of values that `dtype` holds, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA | changes))
    model.to(dtype or torch.float32).to(torch.float32).save_pretrained(folder)
    return folder


def kill_server(server: LocalServer) -> None:
    """End a server whose state nobody needs: SGLang looks only every 5 s whether it was asked to end."""
    if server.alive():
        assert server.pid is not None
        os.killpg(server.pid, signal.SIGKILL)
    server.stop()


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def group_members(process_group: int) -> list[int]:
    """Pids in a process group that are not zombies."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(state[2]) == process_group and state[0] != "Z":
                members.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return members


def launch(*program: str, output: IO[Any], processes: int = 1, fresh: bool = False) -> subprocess.Popen[Any] | Started:
    """Start `python PROGRAM...` with one OpenMP thread a process, in a session of its own; with several processes as ranks.

    fresh: by its command line, under torchrun when there is more than one process, and not from what is preloaded.
    """
    started = None if fresh else start(program, output, processes)
    if started is not None:
        return started
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), *program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_program(
    *program: str, processes: int = 1, timeout: float = 300.0, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """What `launch` starts, when it has ended, with all that it showed."""
    with tempfile.TemporaryFile() as shown:
        process = launch(*program, output=shown, processes=processes, fresh=fresh)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        shown.seek(0)
        return subprocess.CompletedProcess(program, status, shown.read().decode(errors="replace"))


def run_worker(
    script: Path, *arguments: str | Path, processes: int = 1, timeout: float = 300.0, fresh: bool = False
) -> str:
    """What a script prints, with several processes as ranks; fails with the end of it."""
    done = run_program(str(script), *map(str, arguments), processes=processes, timeout=timeout, fresh=fresh)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout
