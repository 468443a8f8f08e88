"""What runs on the nodes of a SLURM job: the keeper of a server, the trainer's start, and what both get there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ports import kept_port
from workers import is_running

from megatron_sip.serving import node
from megatron_sip.serving.node import SOCKETS, interface_towards, node_variables

KEEPER = (sys.executable, "-m", "megatron_sip.serving.job_server")
KEY = "0123456789abcdef"
SERVER = """\
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print("asked", flush=True)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass
port, config = int(sys.argv[1]), sys.argv[-1]
print("args", open(config).read().strip(), "mode", oct(os.stat(config).st_mode & 0o777), flush=True)
print("caches", os.environ["TRITON_CACHE_DIR"], "key", os.environ.get("JOB_KEY"), flush=True)
print("pid", os.getpid(), flush=True)
if port == 0:
    sys.exit(9)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever(0.05)
"""


class Kept:
    """A keeper and the stand-in that it keeps."""

    def __init__(
        self, folder: Path, port: int, server: str = SERVER, load_s: float = 60.0, hang_s: float = 60.0
    ) -> None:
        self.folder, self.log, self.ready, self.port = folder, folder / "log", folder / "ready", port
        (folder / "server.py").write_text(server)
        flags = [
            f"--url=http://127.0.0.1:{port}",
            f"--log={self.log}",
            f"--ready={self.ready}",
            "--key-variable=JOB_KEY",
        ]
        flags += ["--max-failures", "3", "--restart-seconds", "0", "--peers", "127.0.0.1"]
        flags += [f"--load-seconds={load_s}", f"--hang-seconds={hang_s}"]
        self.process = subprocess.Popen(
            [*KEEPER, *flags, "--", sys.executable, folder / "server.py", str(port)],
            env={**os.environ, "JOB_KEY": KEY, "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def starts(self, count: int) -> list[int]:
        """The pids of the server's starts, once there are so many."""
        wait_until(lambda: self.shown().count("pid ") >= count)
        return [int(line.removeprefix("pid ")) for line in self.shown().splitlines() if line.startswith("pid ")]

    def shown(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def leftovers(self) -> list[Path]:
        return list(self.folder.glob("megatron_sip-*"))


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path, kept_port())
    yield made
    made.process.kill()
    made.process.communicate()


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_gets_its_key_by_a_file_and_shows_it_nowhere(kept: Kept) -> None:
    [pid] = kept.starts(1)
    assert 'args api-key: "***" mode 0o600' in kept.shown()
    assert f"caches {kept.leftovers()[0]}/triton key None" in kept.shown()
    for process in (pid, kept.process.pid):
        assert KEY not in Path(f"/proc/{process}/cmdline").read_text()
    kept.process.send_signal(signal.SIGUSR1)
    assert kept.process.wait(20) == 0
    assert not is_running(pid)
    assert kept.leftovers() == []


@pytest.mark.parametrize(
    ("number", "hang_s", "why"),
    [(signal.SIGKILL, 60.0, "ended with status 137.*"), (signal.SIGSTOP, 4.0, r"has answered nothing for \d+ s")],
)
def test_a_server_that_ends_or_hangs_is_started_again(
    tmp_path: Path, number: signal.Signals, hang_s: float, why: str
) -> None:
    kept = Kept(tmp_path, kept_port(), hang_s=hang_s)
    [first] = kept.starts(1)
    kept.ready.touch()
    if number is signal.SIGSTOP:
        wait_until(lambda: kept.shown().count("asked") >= 2)  # so the first answer is known: what loads is given time
    os.kill(first, number)
    second = kept.starts(2)[1]
    assert not is_running(first)
    kept.process.terminate()
    told = kept.process.communicate(timeout=20)[0]
    assert re.search(
        rf"servers: log at http://127.0.0.1:{kept.port} {why} and is started again, log {kept.log}\n", told
    )
    assert not is_running(second)


def test_a_server_that_ends_while_starting_is_not_started_again_and_later_is_given_up(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 0)
    assert kept.process.communicate(timeout=20)[0] == ""
    assert (kept.process.returncode, len(kept.starts(1))) == (1, 1)
    kept.ready.touch()
    kept = Kept(tmp_path, 0)
    told = kept.process.communicate(timeout=20)[0]
    assert re.search(
        r"error: log at \S+ ended with status 9 after \d s, 3 times in a row before it served for 10 minutes", told
    )
    assert f"Log {kept.log}, last lines:" in told
    assert (kept.process.returncode, len(kept.starts(1))) == (1, 4)
    assert kept.leftovers() == []


def test_a_server_that_never_gets_well_is_ended(tmp_path: Path) -> None:
    kept = Kept(tmp_path, kept_port(), SERVER.replace("send_response(200)", "send_response(503)"), load_s=2.0)
    kept.ready.touch()
    first = kept.starts(2)[0]
    kept.process.terminate()
    assert "was not healthy within 2 s and is started again" in kept.process.communicate(timeout=20)[0]
    assert not is_running(first)


def test_a_killed_keeper_leaves_no_server(kept: Kept) -> None:
    [pid] = kept.starts(1)
    kept.process.kill()
    wait_until(lambda: not is_running(pid))


TRAINER = """\
trap 'echo told; kill $!; exit 5' USR1
echo "$TRITON_CACHE_DIR $TORCHINDUCTOR_CACHE_DIR"
mkdir -p "$TORCHINDUCTOR_CACHE_DIR"
sleep 60 &
wait
"""


def test_a_trainer_gets_each_signal_once_and_leaves_no_caches(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sip.serving.on_node", "--peers", "127.0.0.1", "--", "bash", "-c", TRAINER],
        env={**os.environ, "TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": "/my/own"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    own, inductor = process.stdout.readline().split()
    assert own == "/my/own"
    wait_until(Path(inductor).is_dir)
    os.killpg(process.pid, signal.SIGUSR1)  # as SLURM does
    assert process.communicate(timeout=20)[0] == "told\n"
    assert process.returncode == 5
    assert list(tmp_path.iterdir()) == []


def test_a_site_s_file_of_nccl_comes_before_our_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "interface_towards", lambda _: "eth7")
    site = tmp_path / "nccl.conf"
    site.write_text("# cards\nNCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME = ib0\n")
    found = node_variables(tmp_path, ["other"], {}, [tmp_path / "none", site])
    assert found["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "NCCL_SOCKET_IFNAME" not in found
    site.write_text("#NCCL_SOCKET_IFNAME=ib0\n")
    assert node_variables(tmp_path, ["other"], {}, [site])["NCCL_SOCKET_IFNAME"] == "=eth7"


def test_sockets_use_the_interface_towards_other_hosts_unless_the_user_has_said_which(tmp_path: Path) -> None:
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    default = [fields[0] for fields in routes if fields[1] == "00000000"]
    elsewhere = "192.0.2.1"  # of documentation, never assigned
    assert interface_towards(["127.0.0.1", "localhost"]) is None
    if not default:
        with pytest.raises(OSError, match="unreachable"):
            interface_towards([elsewhere])
        return
    found = interface_towards(["127.0.0.1", elsewhere])
    assert found in default
    variables = node_variables(tmp_path, [elsewhere], {"NCCL_SOCKET_IFNAME": "ib0"})
    assert variables["GLOO_SOCKET_IFNAME"] == found
    assert "NCCL_SOCKET_IFNAME" not in variables
    assert not SOCKETS.keys() & node_variables(tmp_path, ["no-such-host.invalid"], {}).keys()
    assert node_variables(tmp_path, [elsewhere], {})["NCCL_SOCKET_IFNAME"] == f"={found}"
