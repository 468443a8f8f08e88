"""The memory of engines that share their GPUs with the trainer: given up while it trains, taken again before a push.

SGLang frees the pages behind weights and key-value cache and keeps their addresses (its --enable-memory-saver; without it,
as on a CPU, the calls change nothing). What was in them is gone: prefix caches are flushed, and weights come with the push.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError

log = logging.getLogger(__name__)

TAGS = {"tags": ["kv_cache", "weights"]}


class EngineMemory:
    """Of all engines at `urls`, which nobody else asks for anything. An engine that fails is logged: the push finds it too."""

    def __init__(self, urls: Sequence[str], timeout_s: float, key: str | None = None) -> None:
        self._urls = urls
        self._timeout_s = timeout_s
        self._key = key
        self._released: dict[str, Any] = {}  # by URL, when the process started

    def release(self) -> None:
        """Abort what an engine still works at, such as calls that were given up, and free its memory."""
        self._on(self._urls, self._release)

    def resume(self) -> None:
        """Take the memory again; an engine that was started again meanwhile has its own already."""
        self._on([*self._released], self._resume)
        self._released = {}

    def _on(self, urls: Sequence[str], action: Callable[[str], None]) -> None:
        if not urls:
            return
        with ThreadPoolExecutor(len(urls), thread_name_prefix="engine-memory") as threads:
            for url, done in [(url, threads.submit(action, url)) for url in urls]:
                if error := done.exception():
                    log.warning("%s: its memory could not be given to the trainer, or taken again: %s", url, error)

    def _release(self, url: str) -> None:
        started = self._started(url)
        self._call(url, "/pause_generation", {"mode": "abort"})
        # Waits until nothing runs: SGLang ends at a release while something does.
        self._call(url, "/flush_cache?timeout=10")
        self._call(url, "/release_memory_occupation", TAGS)
        self._released[url] = started

    def _resume(self, url: str) -> None:
        if self._started(url) == self._released[url]:  # SGLang ends when it is to resume what it has not released
            self._call(url, "/resume_memory_occupation", TAGS)

    def _started(self, url: str) -> Any:
        info = call(url, "GET", "/server_info", timeout_s=self._timeout_s, key=self._key)
        if not isinstance(info, dict):
            raise RequestError("bad-response", f"{url}/server_info is none: {str(info)[:200]}")
        return info.get("startup_time")

    def _call(self, url: str, path: str, body: Any = None) -> None:
        call(url, "POST", path, body or {}, timeout_s=self._timeout_s, key=self._key)
