"""Keeps a server of this node serving: it is started again when it has ended or hangs, until that happens too often.

A server hangs that leaves /health_generate without an answer for long. SGLang answers it as soon as anything comes out of its
model, whatever that was asked for by: one that is merely busy does not hang. The port stays, so that clients need not be told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sip.console import say
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.launch import ServerProcess, ServerStartError

LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class KeepSettings:
    """Times in seconds, as in examples/slurm_job.sh for servers of other nodes.

    poll_s: between two looks at the process. probe_s: from an answer to the next question. patience_s: for the answer; SGLang
    itself says after 20 s that nothing came. hung_s: without any, after which a server is ended; a CPU may read one prompt for
    minutes. pause_s: before a start. max_failures: ends in a row, each after serving for less than `settled_s`, for giving up.
    """

    poll_s: float = 1.0
    probe_s: float = 60.0
    patience_s: float = 30.0
    hung_s: float = 600.0
    pause_s: float = 5.0
    settled_s: float = 600.0
    max_failures: int = 5


class Keeper:
    """A thread that looks after one server until `close`, the run's end, or its giving it up."""

    def __init__(
        self,
        name: str,
        server: ServerProcess,
        give_up: Callable[[str], object],
        settings: KeepSettings | None = None,
        rests: Callable[[], bool] = lambda: False,
        restarts: Callable[[], bool] = lambda: True,
    ) -> None:
        """name: the server's, for people; it is started if it never was. give_up: called once, in the thread, with the
        reason. rests: whether the run ends, and servers with it, which are then left as they are. restarts: whether one that
        fails is started again, and not given up at once."""
        self._name = name
        self._server = server
        self._give_up = give_up
        self._settings = settings or KeepSettings()
        self._rests = rests
        self._restarts = restarts
        self._failures = 0
        self._serving_since = self._answered = time.monotonic()
        self._probe_at = self._answered + self._settings.probe_s
        self._over = False
        self._times = threading.Lock()
        self._closing = threading.Event()
        self._silent = False
        self._thread = threading.Thread(target=self._watch, name=f"keeper of {name}", daemon=True)
        self._thread.start()

    def ask(self) -> Callable[[], bool | None]:
        """Have the server asked now; what is returned tells if it has answered since (None: not yet, False: it never will)."""
        with self._times:
            asked = self._probe_at = time.monotonic()

        def answer() -> bool | None:
            over = self._over  # read first: an answer may come in between
            return self._answered > asked or (False if over else None)

        return answer

    def expect_silence(self, silent: bool) -> None:
        """While it is silent, the server is not asked whether it hangs; one that ends is started again all the same."""
        if not silent:
            self._note_answer()
        self._silent = silent

    @property
    def over(self) -> bool:
        """Whether it looks after the server no more: closed, at rest, or it has given it up."""
        return self._over

    def close(self) -> None:
        """Stop the server and look after it no more, also in the middle of a start."""
        self._closing.set()
        while self._thread.is_alive():
            self._server.stop()  # again and again: a start under way may only now have made its process
            self._thread.join(0.1)
        self._server.stop()

    def _watch(self) -> None:
        try:
            fault = self._start(again=False) if self._server.pid is None else None
            while not self._closing.is_set():
                if fault is not None:
                    if not self._clear(fault):
                        return
                    fault = self._start(again=True)
                elif self._closing.wait(self._settings.poll_s) or self._rests():
                    return
                else:
                    fault = self._fault()
        except Exception as error:  # a thread that ended without a word would leave the server unattended
            self._give_up(f"{self._name} at {self._server.url} cannot be looked after: {type(error).__name__}: {error}")
        finally:
            self._over = True

    def _fault(self) -> str | None:
        """What is wrong with the server now, in words that follow its name."""
        if (status := self._server.status) is not None:
            return f"ended with status {status}"
        if self._silent or time.monotonic() < self._probe_at:
            return None
        try:
            call(self._server.url, "GET", "/health_generate", timeout_s=self._settings.patience_s)
        except RequestError:
            silent = time.monotonic() - self._answered
            return None if silent < self._settings.hung_s else f"has answered nothing for {silent:.0f} s"
        self._note_answer()
        return None

    def _note_answer(self) -> None:
        with self._times:
            self._answered = time.monotonic()
            self._probe_at = self._answered + self._settings.probe_s

    def _clear(self, fault: str) -> bool:
        """End what is left of the server before its next start; False when there is none: it is given up, or the run ends."""
        settings = self._settings
        settled = self._answered - self._serving_since > settings.settled_s  # it served so long, and did not only hang
        self._failures = 1 if settled else self._failures + 1
        what = f"{self._name} at {self._server.url} {fault}"
        self._server.stop(grace_s=0.0)  # one that hangs does not end by itself
        if self._failures == settings.max_failures or not self._restarts():
            often = f"{self._failures} times in a row before it served for {settings.settled_s / 60:g} minutes"
            self._give_up(f"{what}, {often}, and is given up. {self._server.log_end()}")
            return False
        say(f"servers: {what} and is started again, log {self._server.log_file}")
        return not (self._closing.wait(settings.pause_s) or self._rests())

    def _start(self, again: bool) -> str | None:
        """Start the server; what was wrong if it does not serve then."""
        started = self._serving_since = time.monotonic()  # and has no answer since then, if it cannot be started
        try:
            self._server.start(again=again)
        except ServerStartError as error:
            return error.what
        except OSError as error:
            return f"could not be started ({error})"
        self._note_answer()
        self._serving_since = self._answered
        if again:
            say(f"servers: {self._name} is back after {self._answered - started:.0f} s")
        return None


def any_answers(keepers: Sequence[Keeper]) -> bool:
    """Wait until one of the servers answers, started again if it must be; False where all are given up, or there is none."""
    answers = [keeper.ask() for keeper in keepers]
    while True:
        found = [answer() for answer in answers]
        if True in found or None not in found:
            return True in found
        time.sleep(LOOK_S)
