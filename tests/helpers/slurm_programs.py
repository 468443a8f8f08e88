"""What a job on a real SLURM runs where no model is needed: an SGLang server and a trainer under torchrun, in a second.

`make_environment` makes the folder that a job is given as VENV. The server answers only who has its key. The trainer does steps
of `STEP_SECONDS`, each with the help of an engine and of a teacher, for which it waits; as the real one it saves every second
step, at the end and upon SIGUSR1 or SIGTERM, goes on behind its last checkpoint, and its ranks end when one of them does. After
step `HELD_AT` it waits for the file RUN/go, so that a test can do something in the middle.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STEP_SECONDS = 0.05
HELD_AT = 3
TRACKER = "latest_checkpointed_iteration.txt"
OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def make_environment(folder: Path) -> Path:
    """A folder whose bin/python and bin/torchrun are these programs."""
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "torchrun"):
        program = folder / "bin" / name
        other = f'case "$2" in megatron_sip.serving.*) exec {sys.executable} "$@" ;; esac'
        program.write_text(f'#!/bin/sh\n{other}\nexec {sys.executable} -S {__file__} "$@"\n')
        program.chmod(0o755)
    return folder


class Server(BaseHTTPRequestHandler):
    """Healthy, and refuses whoever has not the key."""

    key = ""

    def do_GET(self) -> None:
        if self.path == "/health_generate":
            print("asked", flush=True)
        known = self.path.startswith("/health") or self.headers.get("Authorization") == f"Bearer {self.key}"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Trainer:
    """A rank; the first does the steps, the others hold a connection to it."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._stop = self._done = False
        self._others: list[socket.socket] = []
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._request)

    def run(self) -> int:
        host, _, port = self._option("--rdzv-endpoint").partition(":")
        if self._option("--rdzv-conf") == "is_host=0":
            return self._follow((host, int(port)))
        nodes = int(self._option("--nnodes"))
        with socket.create_server((host, int(port))) as listening:
            self._others = [listening.accept()[0] for _ in range(nodes - 1)]
            for other in self._others:
                threading.Thread(target=self._end_with, args=(other,), daemon=True).start()
            return self._train()

    def _follow(self, first: tuple[str, int]) -> int:
        for _ in range(300):
            try:
                with socket.create_connection(first) as connection:
                    return int(connection.recv(3) != b"end")
            except ConnectionRefusedError:
                time.sleep(0.1)
        return 1

    def _end_with(self, other: socket.socket) -> None:
        other.recv(1)
        if not self._done:
            os._exit(1)

    def _train(self) -> int:
        run = Path(self._words[self._words.index("--save") + 1])
        last = int(self._words[self._words.index("--train-iters") + 1])
        dies_at = int(self._words[self._words.index("--dies-at") + 1]) if "--dies-at" in self._words else None
        tracker, metrics = run / TRACKER, run / "metrics.jsonl"
        step = int(tracker.read_text()) if tracker.exists() else 0
        kept = metrics.read_text().splitlines(keepends=True)[:step] if metrics.exists() else []
        metrics.write_text("".join(kept))
        while step < last and not self._stop:
            time.sleep(STEP_SECONDS)
            if step == HELD_AT and not (run / "go").exists():
                continue
            if not (self._asked("--rollout", step) and self._asked("--teacher", step)):
                break
            step += 1
            if step == dies_at:
                return 1
            with metrics.open("a") as file:
                file.write(
                    json.dumps({"step": step, "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}) + "\n"
                )
            if step % 2 == 0:
                save(tracker, step)
        save(tracker, step)
        if step == last:
            (run / "summary.json").write_text("{}")
        self._done = True
        for other in self._others:
            other.sendall(b"end")
        return int(self._stop)  # as torchrun after a signal

    def _asked(self, role: str, step: int) -> bool:
        """Whether one of its servers answered, before a stop was asked for."""
        urls = self._urls(f"{role}-url")
        key = os.environ[self._words[self._words.index(f"{role}-key-variable") + 1]]
        while not self._stop:
            for turn in range(len(urls)):
                try:
                    url = f"{urls[(step + turn) % len(urls)]}/generate"
                    OPEN(urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"}), timeout=1)
                    return True
                except urllib.error.HTTPError:
                    raise
                except OSError:
                    time.sleep(0.05)
        return False

    def _request(self, *_: object) -> None:
        self._stop = True

    def _option(self, name: str) -> str:
        return next(word.partition("=")[2] for word in self._words if word.startswith(f"{name}="))

    def _urls(self, name: str) -> list[str]:
        found = []
        for word in self._words[self._words.index(name) + 1 :]:
            if not word.startswith("http"):
                break
            found.append(word)
        return found


def save(tracker: Path, step: int) -> None:
    """Whole or not at all, also where the trainer is killed."""
    new = tracker.with_suffix(".new")
    new.write_text(str(step))
    new.rename(tracker)


def main(words: Sequence[str]) -> int:
    if "sglang.launch_server" not in words:
        return Trainer(words).run()
    given = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
    Server.key = Path(words[words.index("--config") + 1]).read_text().split('"')[1]
    ThreadingHTTPServer((given["host"], int(given["port"])), Server).serve_forever(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
