"""An engine's weight-update API over real HTTP, with a real gloo group behind it, which can die and come back."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any, Self

import torch
import torch.distributed as dist

from megatron_sip.serving.launch import reserve_port

WAIT = timedelta(seconds=10)
Answer = tuple[int, Any]


class FakeEngine:
    """Keeps the weights that it is sent, and `calls`, the paths that were asked for, each with its body.

    `answers` (status, value) replace what a path answers; a path in `silent` never answers. Like SGLang it refuses to end
    an update that is not open, or to open a second one, and lets generations wait while it is paused.
    """

    def __init__(self, port: int = 0) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.answers: dict[str, Answer] = {}
        self.silent: set[str] = set()
        self.spans: list[tuple[str, str, float, float]] = []
        self.delay_s = 0.0
        self.key: str | None = None
        self._released = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._reserved = reserve_port()  # while it is dead too
        self._port = port or int(self._reserved.getsockname()[1])
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """A new process with made-up weights, at the same URL."""
        self.version, self.started = "default", time.time()
        self.weights: dict[str, torch.Tensor] = {}
        self.groups: dict[str, Any] = {}
        self.paused = self.updating = False
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        """Connections are refused from now on, and the groups are gone."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for group in self.groups.values():
            group.abort()
        self.groups = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self.die()

    def answer(self, path: str, body: Any) -> Answer:
        self.calls.append((path, body))
        if path in self.silent:
            self._released.wait(30)
        while path == "/generate" and self.paused and not self._released.wait(0.01):
            pass
        if path in self.answers:
            return self.answers[path]
        if path in ("/begin_weight_update", "/end_weight_update"):
            if self.updating == path.startswith("/begin"):
                state = (
                    "a weight-update session is already open" if self.updating else "no weight-update session is open"
                )
                return 400, {"success": False, "message": state}
            self.updating = not self.updating
        elif path in ("/pause_generation", "/continue_generation"):
            self.paused = path.startswith("/pause")
        elif path in ("/init_weights_update_group", "/update_weights_from_distributed"):
            begin = time.monotonic()
            if path.startswith("/init"):
                self.groups[body["group_name"]] = joined_group(body)
            else:
                self.weights |= received(self.groups[body["group_name"]], body)
            time.sleep(self.delay_s)
            self.spans.append((path, body["group_name"], begin, time.monotonic()))
        elif path == "/update_weights_from_disk":
            self.version = body["weight_version"]
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path in ("/server_info", "/model_info"):
            return 200, {"startup_time": self.started, "tp_size": 1, "weight_version": self.version}
        return 200, {"success": True}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or "{}")
                allowed = engine.key is None or self.headers.get("Authorization") == f"Bearer {engine.key}"
                refused = 401, {"error": f"wrong key {self.headers.get('Authorization')}"}
                status, value = engine.answer(self.path.partition("?")[0], body) if allowed else refused
                raw = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST  # noqa: N815 (the name that http.server looks for)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def serve(port: int, asked: Connection) -> None:
    """An engine in a process of its own, to be killed; whatever comes through `asked` is answered with what it has."""
    with FakeEngine(port) as engine:
        asked.send(engine.url)
        while True:
            asked.recv()
            asked.send((engine.version, digests(engine.weights)))


def digests(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of each tensor's bytes."""
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in weights.items()}


def joined_group(body: dict[str, Any]) -> dist.ProcessGroupGloo:
    """The engine's side of the group, under the store prefixes of torch's process-group helper."""
    name = body["group_name"]
    store = dist.TCPStore(body["master_address"], body["master_port"], is_master=False, timeout=WAIT)
    prefixed = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
    return dist.ProcessGroupGloo(prefixed, body["rank_offset"], body["world_size"], WAIT)


def received(group: dist.ProcessGroupGloo, body: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of one flattened bucket."""
    dtypes = [getattr(torch, name) for name in body["dtypes"]]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
    data = torch.empty(sum(sizes), dtype=torch.uint8)
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([data], options).wait()
    parts = zip(body["names"], data.split(sizes), dtypes, body["shapes"], strict=True)
    return {name: part.view(dtype).reshape(shape) for name, part, dtype, shape in parts}
