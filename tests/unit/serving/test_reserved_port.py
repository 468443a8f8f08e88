"""A port is kept for a server that is still loading, or is started again."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_sip.serving.launch import HOST, LocalServer, ServerSettings, ServerStartError, reserve_port


def test_nobody_gets_a_reserved_port_but_who_listens_at_it() -> None:
    with reserve_port() as reserved, socket.socket() as other:
        address = reserved.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
        for _ in range(2):  # a server that ended may come again
            with socket.create_server(address):  # sets SO_REUSEADDR
                socket.create_connection(address).close()


async def test_the_servers_that_it_is_for_listen_at_it() -> None:
    with reserve_port() as reserved:
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), HOST, reserved.getsockname()[1])
        server.close()
        await server.wait_closed()
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        assert TCPStore(HOST, port, world_size=1, is_master=True).port == port


def test_a_server_s_port_is_its_own_between_its_starts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    server = LocalServer(ServerSettings(tmp_path, log_file=tmp_path / "server.log"))
    monkeypatch.setattr(server, "_command", lambda: ["false"])
    urls = []
    for again in (False, True, False):
        with pytest.raises(ServerStartError, match="ended with status 1"):
            server.start(again=again)
        urls.append(server.url)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, int(server.url.rpartition(":")[2])))
    assert len(set(urls)) == 1
