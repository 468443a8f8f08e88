"""What a LocalServer starts in tests that need no model: a process that says what SGLang says about its health.

    python stub_server.py PORT FOLDER

It writes its pid into FOLDER/starts. While FOLDER/broken is there it ends at its start, while FOLDER/hangs is there with
status 1 it leaves /health_generate as SGLang does when nothing comes out of its model: with status 503.
"""

from __future__ import annotations

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_sip.serving.launch import LocalServer, ServerSettings


class StubServer(LocalServer):
    """A LocalServer whose program is this file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ServerSettings("stub", log_file=folder / "server.log", start_timeout_s=20))
        self.folder = folder

    def _command(self) -> list[str]:
        return [sys.executable, __file__, str(self._port), str(self.folder)]

    def pids(self) -> list[int]:
        """Of all processes that were started, in order."""
        path = self.folder / "starts"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def main(port: int, folder: Path) -> None:
    """Serve until killed."""
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    if (folder / "broken").exists():
        sys.exit("broken")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if self.path == "/health_generate" and (folder / "hangs").exists() else 200)
            self.end_headers()
            self.wfile.write(b'{"model_path": "stub"}')

    print("serving", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
