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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.guard import end, kill_with_parent, own_environment
from megatron_sip.serving.http_reply import key_from_environment
from megatron_sip.serving.node import node_variables, private_folder

STOP_S = 10.0
"""Seconds between SIGTERM and SIGKILL for a server that is to end."""
LONG_S = 600.0
"""A server that was well for longer, from its first good answer to its last, has not failed in a row with what was before."""
ANSWER_S = 25.0
"""SGLang itself answers 503 after 20 s in which its scheduler has said nothing."""
CHECK_S = 10.0
"""Between two questions to a server that is well."""
STOPS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class JobServerSettings:
    """Of one server at `url`: `max_failures` in a row give it up, `restart_s` are between an end and the next start.

    One that was healthy and has not been so for `hang_s` seconds hangs, as does one that was not within `load_s`.
    """

    url: str
    log: Path
    ready: Path
    max_failures: int
    restart_s: float
    load_s: float
    hang_s: float


class Health:
    """Asks a server in a thread whether it is well, as long as it is entered."""

    def __init__(self, url: str, check_s: float) -> None:
        self._url, self._check_s = url, check_s
        self._started = time.monotonic()
        self._first: float | None = None
        self._last: float | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Health:
        threading.Thread(target=self._ask, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def well_s(self) -> float:
        """Seconds from the first good answer to the last."""
        return 0.0 if self._first is None or self._last is None else self._last - self._first

    def complaint(self, load_s: float, hang_s: float) -> str | None:
        """Why it is to be ended: it has never been well for `load_s` seconds, or not any more for `hang_s`."""
        if self._last is None:
            late = time.monotonic() - self._started > load_s
            return f"was not healthy within {load_s:g} s" if late else None
        return f"answered nothing for {hang_s:g} s" if time.monotonic() - self._last > hang_s else None

    def _ask(self) -> None:
        while not self._ended.wait(self._check_s):
            asked = time.monotonic()
            with contextlib.suppress(RequestError):
                call(self._url, "GET", "/health_generate", timeout_s=ANSWER_S)
                self._first = asked if self._first is None else self._first
                self._last = asked


class JobServer:
    """The server's starts, one after the other."""

    def __init__(
        self,
        command: Sequence[str],
        settings: JobServerSettings,
        environment: Mapping[str, str],
        key: str,
        long_s: float = LONG_S,
    ) -> None:
        self._command, self._settings, self._environment = list(command), settings, environment
        self._key, self._long_s = key.encode(), long_s
        self._stop = threading.Event()

    def run(self) -> int:
        """Until it is to stop (0), or the server is given up (1)."""
        for number in STOPS:
            signal.signal(number, lambda *_: self._stop.set())
        failures, settings = 0, self._settings
        while True:
            why, well_s = self._serve()
            if why is None:
                return 0
            if not settings.ready.exists():
                return 1
            failures = 1 if well_s > self._long_s else failures + 1
            if failures == settings.max_failures:
                _tell(f"error: a server {why}, {failures} times in a row, and is given up, see {settings.log}")
                return 1
            _tell(f"a server {why} and is started again, see {settings.log}")
            if self._stop.wait(settings.restart_s):
                return 0

    def _serve(self) -> tuple[str | None, float]:
        """One start until its end: why it ended, None when it was to, and for how many seconds it was well."""
        process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=kill_with_parent,
            start_new_session=True,
        )
        assert process.stdout is not None
        logging = threading.Thread(target=self._log, args=(process.stdout,), daemon=True)
        logging.start()
        with Health(self._settings.url, min(CHECK_S, self._settings.hang_s / 4)) as health:
            complaint = None
            while not self._stop.wait(0.1) and process.poll() is None and complaint is None:
                complaint = health.complaint(self._settings.load_s, self._settings.hang_s)
        status = process.poll()
        end(process, process.pid, STOP_S if self._stop.is_set() else 0.0)
        logging.join(STOP_S)
        if self._stop.is_set():
            return None, health.well_s()
        ended = complaint if status is None else f"ended with status {status if status >= 0 else 128 - status}"
        return ended, health.well_s()

    def _log(self, shown: IO[bytes]) -> None:
        """What the server shows goes to its log, without the key."""
        with self._settings.log.open("ab", buffering=0) as log, shown:
            for line in shown:
                with contextlib.suppress(OSError):  # a full disk must not keep the server waiting for its log
                    log.write(line.replace(self._key, b"***") if self._key else line)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    how = JobServerSettings(
        *(given.url, given.log, given.ready, given.max_failures),
        *(given.restart_seconds, given.load_seconds, given.hang_seconds),
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
        return JobServer(command, how, environment, key).run()


if __name__ == "__main__":
    sys.exit(main())
