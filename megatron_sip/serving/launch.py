"""Start SGLang servers on this machine, and be sure that they end.

    with LocalServer(ServerSettings(model_path="SmolLM2-135M-Instruct")) as server:
        ...  # POST to server.url + "/generate"

Each server runs under `serving.guard`, so it ends with this process however this process ends. Servers on other
machines are started by the user's own scheduler and given to the trainer as URLs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self

from tqdm import tqdm

from megatron_sip.console import bars, log_tail
from megatron_sip.errors import UserError
from megatron_sip.files import read_json
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.guard import end, own_environment

HOST = "127.0.0.1"
LOG_TAIL_LINES = 30
STOP_S = 5.0
"""Seconds between SIGTERM and SIGKILL."""

CPU_MODULE = "megatron_sip.platform.sglang_server_cpu"
# Of requests that come at once and begin alike, as a group's do at the judge, one goes first and the others reuse what it has
# computed: they are put behind the others, and a batch is too short to take them in as well.
SHARED_PREFILL = ("--schedule-policy=lpm", "--chunked-prefill-size=512")
CPU_FLAGS = (
    "--device=cpu",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--disable-overlap-schedule",
    "--sleep-on-idle",  # an idle server must leave its core to the trainer and to the other servers
    *SHARED_PREFILL,
)
# The tokens bound what SGLang takes of the machine's memory, which the trainer shares. What others take while the server
# starts counts against the fraction, and a trainer builds its model meanwhile: at 0.2 that kept a server from starting.
CPU_MEM_FRACTION = 0.7
CPU_MAX_TOTAL_TOKENS = 32768
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other sleep. OpenMP's default is to spin, on the core that the awaited thread needs when other
processes compute there too: a decode step then took 5 to 14 times as long."""


class ServerStartError(UserError, RuntimeError):
    """A server ended or stayed silent while starting, which `what` says; the message holds the tail of its log, too."""

    def __init__(self, message: str, what: str = "could not be started") -> None:
        super().__init__(message)
        self.what = what


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How to start one SGLang server.

    `mem_fraction` and `max_total_tokens` None leave the choice to SGLang on a GPU and to
    CPU_MEM_FRACTION and CPU_MAX_TOTAL_TOKENS without one.
    `memory_saver`: on a GPU, memory can be released and taken again.
    `dtype` is SGLang's; without a GPU it is what `served_dtype` makes of it.
    `devices` are the GPUs that the server may see, as indices among those that this process sees (None: all).
    `extra_args` are SGLang flags, passed as they are, last. `log_file` None makes a temporary file. `start_timeout_s`
    covers loading the weights.
    """

    model_path: str | Path
    dtype: str = "auto"
    mem_fraction: float | None = None
    max_total_tokens: int | None = None
    memory_saver: bool = False
    context_length: int | None = None
    seed: int | None = None
    devices: tuple[int, ...] | None = None
    extra_args: tuple[str, ...] = ()
    log_file: Path | None = None
    start_timeout_s: float = 1800.0


def server_command(settings: ServerSettings, port: int, store_port: int, on_cpu: bool) -> list[str]:
    """The command line of `python -m sglang.launch_server`, or its like without a GPU, for these settings."""
    mem_fraction, max_total_tokens = settings.mem_fraction, settings.max_total_tokens
    if on_cpu:
        mem_fraction = CPU_MEM_FRACTION if mem_fraction is None else mem_fraction
        max_total_tokens = CPU_MAX_TOTAL_TOKENS if max_total_tokens is None else max_total_tokens
    optional = {
        "--mem-fraction-static": mem_fraction,
        "--max-total-tokens": max_total_tokens,
        "--context-length": settings.context_length,
        "--random-seed": settings.seed,
    }
    return [
        sys.executable,
        "-m",
        CPU_MODULE if on_cpu else "sglang.launch_server",
        f"--model-path={settings.model_path}",
        f"--host={HOST}",
        f"--port={port}",
        *(() if _is_data_parallel(settings) else (f"--nccl-port={store_port}",)),
        f"--dtype={settings.dtype}",
        "--skip-server-warmup",
        "--log-level-http=warning",  # no line for each of the millions of requests of a run
        *(f"{flag}={value}" for flag, value in optional.items() if value is not None),
        *(CPU_FLAGS if on_cpu else ()),
        *(("--enable-memory-saver",) if settings.memory_saver and not on_cpu else ()),
        *settings.extra_args,
    ]


def _is_data_parallel(settings: ServerSettings) -> bool:
    """Then each part of the server needs a store of its own, whose port SGLang finds free, and binds later."""
    return any(flag.split("=")[0] in ("--dp-size", "--dp", "--data-parallel-size") for flag in settings.extra_args)


def server_environment(settings: ServerSettings) -> dict[str, str]:
    """The environment of the server: ours without the trainer's torchrun variables and threads, plus devices."""
    # With torchrun's variables SGLang would believe that it is a rank of the trainer.
    kept = PASSIVE_WAITING | own_environment()
    kept.pop("OMP_NUM_THREADS", None)
    # Log-probs of the model itself at any sampling temperature, comparable with the trainer's.
    kept["SGLANG_RETURN_ORIGINAL_LOGPROB"] = "1"
    if settings.context_length is not None:  # SGLang needs a little more than the tokens it is to generate
        kept["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if settings.devices is not None:
        kept["CUDA_VISIBLE_DEVICES"] = visible_devices(settings.devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return kept


def visible_devices(devices: Sequence[int], ours: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a child that gets `devices`, indices among those that we see.

    `ours` is this process's own value: None (we see all), or indices, UUIDs or MIG names separated by commas.
    Raises ValueError for a device that we do not see.
    """
    if ours is None:
        return ",".join(map(str, devices))
    names = [name.strip() for name in ours.split(",") if name.strip()]
    missing = [device for device in devices if not 0 <= device < len(names)]
    if missing:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={ours!r} holds {len(names)} GPUs, so a server cannot get number {missing[0]} of them: "
            "let every process see the trainer's GPUs and one more for each local server, or give --rollout-url"
        )
    return ",".join(names[device] for device in devices)


def reserve_port() -> socket.socket:
    """A free TCP port of this machine, kept from all who ask for any port until this socket is closed.

    A server loads for longer than a port that was found free stays so. The socket is bound and does not listen: with
    SO_REUSEADDR, which asyncio's servers and torch's store set too, another may listen at the port meanwhile.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((HOST, 0))
    return reserved


class ServerProcess(ABC):
    """A server of this machine that ends with this process, however that ends. name: for people, before its URL."""

    def __init__(self, name: str, log_file: Path, start_timeout_s: float) -> None:
        self.log_file = log_file
        self._name = name
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Base URL, without a slash at the end."""

    @abstractmethod
    def start(self, *, again: bool = False) -> Self:
        """Start it and wait until it is healthy; again: at the URL that it had, and behind what its log holds.

        Raises ServerStartError with the log's tail.
        """

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it is healthy."""

    @property
    def pid(self) -> int | None:
        """Process group id of the server (that of its guard), None when it was never started."""
        return None if self._process is None else self._process.pid

    @property
    def status(self) -> int | None:
        """With which it ended; None while it runs or was never started."""
        return None if self._process is None else self._process.poll()

    def alive(self) -> bool:
        """True while the server's process exists; says nothing about its health."""
        return self._process is not None and self.status is None

    def stop(self, grace_s: float = STOP_S) -> None:
        """End the server and all its processes: SIGTERM, then SIGKILL after `grace_s`. Safe to repeat."""
        if self._process is None:
            return
        end(self._process, self._process.pid, grace_s)
        self._process.wait()

    def log_end(self) -> str:
        """Where the log is, and its last lines, for people."""
        try:
            with self.log_file.open("rb") as log:
                tail = log_tail(log, count=LOG_TAIL_LINES)
        except OSError as error:
            return f"Log {self.log_file} cannot be read: {error.strerror}"
        return "\n".join([f"Log {self.log_file}, last lines:", *tail])

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_sip.serving.guard", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )

    def _wait_until_healthy(self) -> None:
        started = time.monotonic()
        while True:
            waited = time.monotonic() - started
            if (status := self.status) is not None:
                what = f"ended with status {status} after {waited:.0f} s"
            elif waited > self._start_timeout_s:
                what = f"was not healthy within {self._start_timeout_s:g} s"
            elif self._answers():
                return
            else:
                time.sleep(0.25)
                continue
            raise ServerStartError(f"{self._name} at {self.url} {what}. {self.log_end()}", what)


class LocalServer(ServerProcess):
    """One SGLang server process of this machine, at free ports that stay its own for as long as this object lives.

    A context manager; `start` and `stop` also work alone, and again.
    """

    def __init__(self, settings: ServerSettings) -> None:
        log_file = settings.log_file or Path(tempfile.mkdtemp(prefix="sglang-")) / "server.log"
        super().__init__(f"SGLang for {settings.model_path}", log_file, settings.start_timeout_s)
        self.settings = settings
        self._reserved = [reserve_port(), reserve_port()]
        self._port, self._store_port = (int(one.getsockname()[1]) for one in self._reserved)

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        return f"http://{HOST}:{self._port}"

    def start(self, *, again: bool = False) -> Self:
        """Start and wait until healthy; again: behind what the log holds.

        Raises ServerStartError (with the log's tail) or FileNotFoundError.
        """
        if self.alive():
            raise RuntimeError(f"the server at {self.url} is already running")
        _check_model_path(self.settings.model_path)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log_file.open("ab" if again else "wb") as log:
                self._spawn(self._command(), server_environment(self.settings), log)
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        # With torch, which checking flags does without.
        from megatron_sip.platform.sglang_cpu import has_accelerator

        settings, on_cpu = self.settings, not has_accelerator()
        dtype = served_dtype(settings.model_path, settings.dtype)
        return server_command(replace(settings, dtype=dtype), self._port, self._store_port, on_cpu)

    def _answers(self) -> bool:
        """Healthy, and really our server: one that was given our port by number could be the one that answers."""
        try:
            call(self.url, "GET", "/health", timeout_s=25)
            info = call(self.url, "GET", "/model_info", timeout_s=10)
        except RequestError:
            return False
        return isinstance(info, dict) and info.get("model_path") == str(self.settings.model_path)


def start_servers(count: int, settings: ServerSettings) -> list[LocalServer]:
    """Start `count` equal servers at once; all of them or, when one fails, none.

    Each gets its own log file (the name gets `.0`, `.1`, ... before its suffix) and, when `settings.devices` is given, one
    of them.
    """
    if count < 1:
        raise ValueError(f"the number of servers must be at least 1, not {count}")
    servers = [LocalServer(numbered(settings, index, count)) for index in range(count)]
    bar = tqdm(total=count, desc="SGLang servers", file=bars())
    with ThreadPoolExecutor(count) as threads, bar:
        futures = [threads.submit(server.start) for server in servers]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        stop_servers(servers)
        raise errors[0]
    return servers


def stop_servers(servers: Sequence[LocalServer]) -> None:
    """Stop several servers at the same time."""
    if servers:
        with ThreadPoolExecutor(len(servers)) as threads:
            list(threads.map(LocalServer.stop, servers))


def numbered(settings: ServerSettings, index: int, count: int) -> ServerSettings:
    """The settings of one of `count` servers: a log file, devices and a seed of its own, or all would draw alike."""
    if count == 1:
        return settings
    log_file, devices = settings.log_file, settings.devices
    if log_file is not None:
        log_file = log_file.with_name(f"{log_file.stem}.{index}{log_file.suffix}")
    if devices is not None:
        if len(devices) != count:
            raise ValueError(f"{count} servers need that many devices, not {len(devices)}")
        devices = devices[index : index + 1]
    seed = None if settings.seed is None else settings.seed + index
    return replace(settings, log_file=log_file, devices=devices, seed=seed)


def served_dtype(model_path: str | Path, dtype: str) -> str:
    """The number format in which this machine serves a model. Raises DataError for a config.json that cannot be read.

    Without a GPU bfloat16 becomes float32 on a processor that is faster so, and "auto" is float32 also where the folder names
    it: SGLang's own "auto" makes float16 of it, as its attention on GPUs needs, but no processor multiplies it.
    """
    # With torch, which checking flags does without.
    from megatron_sip.platform.number_format import bfloat16_pays
    from megatron_sip.platform.sglang_cpu import has_accelerator

    if has_accelerator() or dtype not in ("auto", "bfloat16"):
        return dtype
    kept = dtype == "auto" and _names_float32(Path(model_path) / "config.json")
    return "float32" if kept or not bfloat16_pays() else "bfloat16"


def _names_float32(path: Path) -> bool:
    config = read_json(path, "a model's configuration") if path.is_file() else {}
    names = ("dtype", "torch_dtype")  # as earlier versions of transformers call it
    parts = (config, config.get("text_config") or {})
    return any(part.get(name) == "float32" for part in parts for name in names)


def _check_model_path(model_path: str | Path) -> None:
    # A hub name such as "org/model" is SGLang's business; anything that looks like a path must be a checkpoint.
    path = Path(model_path)
    looks_local = path.is_absolute() or path.exists() or str(model_path).startswith((".", "~"))
    if looks_local and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{model_path} holds no config.json: give the folder of a Hugging Face checkpoint")
