"""Keep one SGLang server of a job running on its node: started again when it ends, and when it hangs.

    python -m megatron_sip.serving.job_server --url URL --log FILE --ready FILE [...] -- command [argument ...]

Until the file `ready` exists the job waits for its servers, and the first end is final: most likely a setting is wrong.
SIGTERM and SIGUSR1 end the server, and this. The job's key, in an environment variable, reaches SGLang by a file that nobody
else can read: on a command line all users of the node would see it. The log shows it masked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.guard import own_environment
from megatron_sip.serving.http_reply import key_from_environment
from megatron_sip.serving.keeper import LOOK_S, Keeper, KeepSettings
from megatron_sip.serving.launch import ServerProcess
from megatron_sip.serving.node import node_variables, private_folder

STOP_S = 10.0
"""Seconds between SIGTERM and SIGKILL for a server that is to end."""
ANSWER_S = 25.0
"""SGLang itself answers 503 after 20 s in which its scheduler has said nothing."""
CHECK_S = 10.0
"""Between two questions to a server that is well."""


class JobServer(ServerProcess):
    """The server at `url` that `command` starts, within `load_s` seconds; the `key` is masked in its log."""

    def __init__(
        self, url: str, log: Path, command: Sequence[str], environment: Mapping[str, str], load_s: float, key: str
    ) -> None:
        super().__init__("the server", log, load_s)
        self._url, self._command, self._environment, self._key = url, list(command), environment, key.encode()
        self._logging: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return self._url

    def start(self, *, again: bool = False) -> Self:
        """Start it, behind what its log holds, and wait until it generates. Raises ServerStartError."""
        self._spawn(self._command, self._environment, subprocess.PIPE)
        assert self._process is not None
        assert self._process.stdout is not None
        logging = threading.Thread(target=self._log, args=(self._process.stdout,), daemon=True)
        logging.start()
        self._logging = logging
        self._wait_until_healthy()
        return self

    def stop(self, grace_s: float = STOP_S) -> None:
        """End it and all its processes, and its log."""
        super().stop(grace_s)
        if self._logging is not None:
            self._logging.join(STOP_S)

    def _answers(self) -> bool:
        try:
            call(self.url, "GET", "/health_generate", timeout_s=ANSWER_S)
        except RequestError:
            return False
        return True

    def _log(self, shown: IO[bytes]) -> None:
        """What the server shows goes to its log, without the key."""
        with self.log_file.open("ab", buffering=0) as log, shown:
            for line in shown:
                with contextlib.suppress(OSError):  # a full disk must not keep the server waiting for its log
                    log.write(line.replace(self._key, b"***") if self._key else line)


def keep(server: JobServer, ready: Path, settings: KeepSettings) -> int:
    """Until a signal ends it (0), or it is given up (1): at its first failure while the file `ready` is not there."""
    stop, reasons = threading.Event(), list[str]()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    keeper = Keeper(server.log_file.stem, server, reasons.append, settings, restarts=ready.exists)
    while not stop.wait(LOOK_S) and not keeper.over:
        pass
    keeper.close()
    if reasons and ready.exists():  # else the job waits for its servers, and shows the log's end itself
        print(f"error: {reasons[0]}", file=sys.stderr, flush=True)
    return 0 if stop.is_set() else 1


def command_line() -> argparse.ArgumentParser:
    """The flags; what is kept follows --."""
    parser = argparse.ArgumentParser(description="Keep one SGLang server of a job running on its node.")
    parser.add_argument("--url", required=True, help="where it will answer")
    parser.add_argument("--log", required=True, type=Path, help="where its output goes")
    parser.add_argument(
        "--ready", required=True, type=Path, help="file that is there once all of the job's servers are"
    )
    parser.add_argument("--max-failures", type=int, required=True)
    parser.add_argument("--restart-seconds", type=float, required=True)
    parser.add_argument("--load-seconds", type=float, required=True)
    parser.add_argument("--hang-seconds", type=float, required=True)
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable with the key that it is to demand")
    parser.add_argument("--peers", nargs="*", default=[], metavar="HOST", help="hosts that it talks to")
    parser.add_argument("command", nargs="+", help="after --")
    return parser


def main() -> int:
    given = command_line().parse_args()
    settings = KeepSettings(
        probe_s=min(CHECK_S, given.hang_seconds / 4),
        patience_s=min(ANSWER_S, given.hang_seconds),
        hung_s=given.hang_seconds,
        pause_s=given.restart_seconds,
        max_failures=given.max_failures,
    )
    with private_folder() as folder:
        environment = {**own_environment(), **node_variables(folder, given.peers, os.environ)}
        command, key = list(given.command), ""
        if given.key_variable is not None:
            key = key_from_environment(given.key_variable)
            del environment[given.key_variable]
            (folder / "key.yaml").touch(mode=0o600)
            (folder / "key.yaml").write_text(f"api-key: {json.dumps(key)}\n")
            command += ["--config", str(folder / "key.yaml")]
        server = JobServer(given.url, given.log, command, environment, given.load_seconds, key)
        return keep(server, given.ready, settings)


if __name__ == "__main__":
    sys.exit(main())
