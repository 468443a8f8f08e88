"""A server of a test's own on a free port of this machine."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Self

from aiohttp import web

from megatron_sip.serving.launch import HOST, reserve_port

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AppServer:
    """Serves `routes`, "METHOD /path" -> handler. An async context manager; may be stopped and started again."""

    def __init__(self, routes: dict[str, Handler]) -> None:
        self._routes = routes
        self._reserved: socket.socket | None = None  # between a stop and a start too
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    @property
    def _port(self) -> int:
        return 0 if self._reserved is None else int(self._reserved.getsockname()[1])

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def start(self) -> Self:
        """Listen, on the port of the last time if there was one."""
        if self._reserved is None:
            self._reserved = reserve_port()
        app = web.Application()
        for route, handler in self._routes.items():
            app.router.add_route(*route.split(), handler)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self._port, reuse_address=True).start()
        return self

    async def stop(self) -> None:
        """Drop all connections at once, like a killed process."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
