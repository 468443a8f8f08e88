"""Servers of this node are started again when they end or hang, on their port, and end with the trainer whenever it dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from stub_server import StubServer
from workers import is_running

from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.keeper import Keeper, KeepSettings, any_answers
from megatron_sip.serving.local_servers import LocalServers, LocalServerSettings
from megatron_sip.stop_signal import StopSignal

QUICK = KeepSettings(poll_s=0.02, probe_s=0.05, patience_s=5.0, hung_s=30.0, pause_s=0.02, max_failures=3)
IMPATIENT = replace(QUICK, patience_s=0.3, hung_s=0.4)
"""For servers that hang: another one that the machine lets wait is taken for hung too, and started once more."""

PARENT = """
import sys, time
from pathlib import Path
from stub_server import StubServer
from megatron_sip.serving.keeper import Keeper, KeepSettings
server = StubServer(Path(sys.argv[1])).start()
keeper = Keeper("the teacher", server, print, KeepSettings(poll_s=0.01, pause_s=0.0, max_failures=1000))
print(server.url, flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StubServer]:
    server = StubServer(tmp_path).start()
    yield server
    server.stop()


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)


def test_a_server_that_is_killed_is_back_at_its_url_and_its_log_goes_on(
    server: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url
    given_up: list[str] = []
    keeper = Keeper("the teacher", server, given_up.append, QUICK)
    os.kill(server.pids()[0], signal.SIGKILL)
    wait_until(lambda: not is_running(server.pids()[0]))
    assert any_answers([keeper])
    assert server.url == url
    assert call(url, "GET", "/health", timeout_s=5)
    assert server.log_file.read_text().count("serving") == 2
    said = capsys.readouterr().out
    assert f"servers: the teacher at {url} ended with status 137 and is started again" in said
    assert "the teacher is back" in said
    keeper.close()
    assert not given_up
    assert len(server.pids()) == 2
    assert not any(map(is_running, server.pids()))


def test_a_server_that_answers_its_health_and_generates_nothing_is_started_again(server: StubServer) -> None:
    (server.folder / "hangs").touch()
    keeper = Keeper("the engine", server, pytest.fail, replace(IMPATIENT, max_failures=100))
    wait_until(lambda: len(server.pids()) >= 2)
    (server.folder / "hangs").unlink()
    assert any_answers([keeper])
    assert not is_running(server.pids()[0])
    keeper.close()


def test_a_server_that_is_silent_for_less_than_the_bound_is_left_alone(server: StubServer) -> None:
    keeper = Keeper("the engine", server, pytest.fail, KeepSettings(poll_s=0.01, probe_s=0.01, hung_s=600.0))
    (server.folder / "hangs").touch()
    time.sleep(0.3)
    (server.folder / "hangs").unlink()
    assert any_answers([keeper])
    keeper.close()
    assert len(server.pids()) == 1


def test_a_server_that_is_to_be_silent_is_not_asked_and_is_asked_again_afterwards(server: StubServer) -> None:
    keeper = Keeper("the engine", server, pytest.fail, replace(IMPATIENT, max_failures=100))
    keeper.expect_silence(True)
    (server.folder / "hangs").touch()
    time.sleep(0.5)
    assert len(server.pids()) == 1
    keeper.expect_silence(False)
    wait_until(lambda: len(server.pids()) >= 2)
    (server.folder / "hangs").unlink()
    assert any_answers([keeper])
    keeper.close()


def test_a_stopped_process_is_ended_and_started_again(server: StubServer) -> None:
    os.kill(server.pids()[0], signal.SIGSTOP)
    keeper = Keeper("the teacher", server, pytest.fail, replace(IMPATIENT, max_failures=100))
    assert any_answers([keeper])
    keeper.close()
    assert len(server.pids()) >= 2
    assert not is_running(server.pids()[0])


def test_one_that_ends_again_and_again_is_given_up_with_the_reason(server: StubServer) -> None:
    (server.folder / "broken").touch()
    given_up: list[str] = []
    keeper = Keeper("the teacher", server, given_up.append, QUICK)
    os.kill(server.pids()[0], signal.SIGKILL)
    wait_until(lambda: bool(given_up))
    assert not any_answers([keeper])
    [reason] = given_up
    told = r" ended with status 1 after \d+ s, 3 times in a row before it served for 10 minutes, and is given up\. Log "
    assert re.match(f"the teacher at {server.url}{told}", reason)
    assert f"Log {server.log_file}, last lines:" in reason
    assert reason.endswith("broken")
    assert len(server.pids()) == 3
    keeper.close()


def test_one_that_hangs_after_every_start_is_given_up(server: StubServer) -> None:
    """It takes as long to be found hung as another has to serve: 600 s of the defaults."""
    assert KeepSettings().hung_s == KeepSettings().settled_s
    (server.folder / "hangs").touch()
    given_up: list[str] = []
    keeper = Keeper("the engine", server, given_up.append, replace(IMPATIENT, settled_s=IMPATIENT.hung_s))
    wait_until(lambda: bool(given_up))
    keeper.close()
    assert re.search(r"has answered nothing for \d+ s, 3 times in a row", given_up[0])
    assert len(server.pids()) == 3


def test_one_that_served_for_long_between_its_failures_is_not_given_up(server: StubServer) -> None:
    keeper = Keeper("the teacher", server, pytest.fail, replace(QUICK, settled_s=0.2, max_failures=2))
    for ends in (1, 2, 3):
        os.kill(server.pids()[-1], signal.SIGKILL)
        wait_until(lambda ends=ends: len(server.pids()) > ends)
        assert any_answers([keeper])
        time.sleep(0.4)
        assert any_answers([keeper])
    keeper.close()
    assert len(server.pids()) == 4


def test_one_that_was_never_started_is_and_is_given_up_at_once_where_nothing_is_to_be_restarted(tmp_path: Path) -> None:
    server, given_up = StubServer(tmp_path), list[str]()
    keeper = Keeper("the teacher", server, given_up.append, QUICK, restarts=lambda: False)
    assert any_answers([keeper])
    os.kill(server.pids()[0], signal.SIGKILL)
    wait_until(lambda: bool(given_up))
    keeper.close()
    assert "ended with status 137" in given_up[0]
    assert len(server.pids()) == 1


def test_an_unexpected_error_gives_the_server_up_with_a_word(
    server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: StubServer, *, again: bool) -> None:
        raise ValueError("an odd config.json")

    monkeypatch.setattr(StubServer, "start", broken)
    given_up: list[str] = []
    keeper = Keeper("the teacher", server, given_up.append, QUICK)
    os.kill(server.pids()[0], signal.SIGKILL)
    wait_until(lambda: keeper.over)
    assert [told.partition(" cannot ")[2] for told in given_up] == ["be looked after: ValueError: an odd config.json"]
    keeper.close()


def test_once_the_run_ends_servers_are_left_as_they_are(server: StubServer) -> None:
    keeper = Keeper("the engine", server, pytest.fail, QUICK, rests=lambda: True)
    os.kill(server.pids()[0], signal.SIGKILL)
    assert not any_answers([keeper])
    keeper.close()
    assert len(server.pids()) == 1


def done[T](result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def test_the_run_s_engines_are_waited_for_and_not_its_teacher(tmp_path: Path) -> None:
    """Of two engines one that answers is enough, where the other one hangs."""
    stubs = []
    for name in ("teacher", "hung", "engine"):
        (tmp_path / name).mkdir()
        stubs.append(StubServer(tmp_path / name).start())
    teacher, hung, engine = stubs
    (hung.folder / "hangs").touch()
    remote, local = LocalServers(LocalServerSettings()), LocalServers(LocalServerSettings())
    remote._teacher = done([teacher])
    local._engines = done([hung, engine])
    try:
        for servers in (remote, local):
            servers.keep(StopSignal())
        assert not remote.await_engines()
        assert local.await_engines()
    finally:
        remote.stop()
        local.stop()
    assert not any(stub.alive() for stub in stubs)


def test_close_ends_a_start_under_way(server: StubServer) -> None:
    keeper = Keeper("the teacher", server, pytest.fail, QUICK)
    os.kill(server.pids()[0], signal.SIGKILL)
    wait_until(lambda: len(server.pids()) == 2 or not server.alive())
    keeper.close()
    assert not server.alive()
    wait_until(lambda: not any(map(is_running, server.pids())))


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.1, 0.3])
def test_killed_in_a_restart_the_trainer_leaves_no_server(tmp_path: Path, delay_s: float) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # pytest's own, with tests/helpers
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    [first] = StubServer(tmp_path).pids()
    os.kill(first, signal.SIGKILL)
    time.sleep(delay_s)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    in_folder = lambda: [  # noqa: E731
        entry
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if str(tmp_path).encode() in read(entry) and b"stub_server.py" in read(entry)
    ]
    wait_until(lambda: not in_folder())


def read(path: Path) -> bytes:
    """Nothing of a file that is gone."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
