"""The life of a SLURM job: train_continual.sbatch with stand-ins for srun, scontrol, curl and sleep on the PATH."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import kept_port
from tiny_tokenizer import byte_level_tokenizer
from transformers import LlamaConfig

REPO = Path(__file__).parents[3]

# A server that answers /health.
FAKE_SERVER = """\
import http.server, os, signal, sys
from pathlib import Path
run = Path(os.environ["FAKE_RUN"])
def note(text):
    with (run / "events").open("a") as file:
        file.write(text + "\\n")
def end(*_):
    note(f"server {port} stopped")
    os._exit(0)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path.startswith("/health") else 404)
        self.end_headers()
    def log_message(self, *args):
        pass
port = int(next(word for word in sys.argv if word.startswith("--port=")).partition("=")[2])
signal.signal(signal.SIGTERM, end)
note(f"server {port} started as {os.getpid()}")
if os.environ.get("FAKE_BROKEN_PORT") == str(port) or (run / f"broken {port}").exists():
    sys.exit("loading the model\\nout of memory")
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# srun and what it starts: the real keeper of a stand-in server, or a trainer that does what FAKE_TRAINER says. As the real
# one, it ends its task at once on SIGTERM, and forwards SIGUSR1.
FAKE_SRUN = """\
import os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
run = Path(os.environ["FAKE_RUN"])
def note(text):
    with (run / "events").open("a") as file:
        file.write(text + "\\n")
if "sglang.launch_server" in words:
    kept = words[words.index("megatron_sip.serving.job_server"):words.index("--")]
    server = words[words.index("sglang.launch_server"):]
    python = sys.executable
    os.execv(python, [python, "-m", *kept, "--", python, str(Path(__file__).with_name("server")), *server])
def killed(*_):
    note("trainer killed")
    os._exit(137)
mode = os.environ["FAKE_TRAINER"]
told = []
signal.signal(signal.SIGTERM, killed)
signal.signal(signal.SIGUSR1, lambda *_: told.append("stop"))
note("trainer started")
if mode.startswith("fail"):
    step = mode.partition("fail at step ")[2]
    if step:
        (run / "metrics.jsonl").write_text('{"step": %s, "loss": 1.0}\\n' % step)
    sys.exit(3)
if mode in ("stop", "last step", "stop without saving"):
    while not told:
        time.sleep(0.05)
if mode == "stop":
    note("trainer saved")
    (run / "latest_checkpointed_iteration.txt").write_text("7")
if mode in ("finish", "last step"):
    time.sleep(0.05)
    (run / "summary.json").write_text("{}")
sys.exit(1 if told else 0)  # as torchrun does after a signal
"""
FAKE_SCONTROL = """\
import os, sys
from pathlib import Path
if sys.argv[1:3] == ["show", "hostnames"]:
    print(sys.argv[3].replace(",", "\\n"))
elif "show" in sys.argv:
    print("JobId=42", "JobState=" + os.environ.get("FAKE_STATE", "RUNNING"), "Reason=None")
else:
    if "FAKE_REQUEUE_DISABLED" in os.environ:
        sys.exit("Requested operation is presently disabled")
    with (Path(os.environ["FAKE_RUN"]) / "events").open("a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
"""
REQUEUE = "requeue incomplete 42"
FAKE_CURL = """\
import sys, urllib.request
try:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[-1], timeout=5)
except OSError:
    sys.exit(7)
"""
# The script looks every second or two; what it waits for here takes tenths of a second.
FAKE_SLEEP = """\
import sys, time
time.sleep(float(sys.argv[1]) / 5)
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    made.end()


class Job:
    """A job of three "nodes", all of them this machine, with one GPU each."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        tools = folder / "bin"
        tools.mkdir()
        stand_ins = {
            "server": FAKE_SERVER,
            "srun": FAKE_SRUN,
            "scontrol": FAKE_SCONTROL,
            "curl": FAKE_CURL,
            "sleep": FAKE_SLEEP,
        }
        for name, source in stand_ins.items():
            (tools / name).write_text(f"#!{sys.executable}\n{source}")
            (tools / name).chmod(0o755)
        self.ports = [kept_port(), kept_port()]
        self._environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "FAKE_RUN": str(self.run_dir),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "localhost,localhost,localhost",
            "SLURM_SUBMIT_DIR": str(REPO),
        }
        self._process: subprocess.Popen[str] | None = None

    def start(self, trainer: str, *settings: str, **environment: str) -> subprocess.Popen[str]:
        own = {"POLICY": "p", "TEACHER_MODEL": "t", "DATA": "README.md", "RUN_DIR": str(self.run_dir)}
        own |= {"TRAINER_NODES": "1", "ENGINE_NODES": "1", "TEACHER_NODES": "1", "GPUS_PER_NODE": "1"}
        own |= {"ENGINE_PORT": str(self.ports[0]), "TEACHER_PORT": str(self.ports[1]), "RESTART_SECONDS": "0"}
        self._process = subprocess.Popen(
            ["bash", "examples/train_continual.sbatch", *(f"{name}={value}" for name, value in own.items()), *settings],
            env=self._environment | {"FAKE_TRAINER": trainer} | environment,
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self._process

    def again(self, trainer: str, **environment: str) -> int:
        """Start the requeued job, and wait for its end; its exit status."""
        process = self.start(trainer, **environment)
        process.communicate(timeout=60)
        return process.returncode

    def server_pids(self, port: int) -> list[int]:
        """Of all the starts of one server."""
        prefix = f"server {port} started as "
        return [int(event.removeprefix(prefix)) for event in self.events() if event.startswith(prefix)]

    def wait_for_start(self, port: int, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.server_pids(port)) < count:
            assert time.monotonic() < deadline, f"{port} did not start {count} times within 30 s, but {self.events()}"
            time.sleep(0.05)

    def save(self, step: int) -> None:
        (self.run_dir / "latest_checkpointed_iteration.txt").write_text(str(step))

    def requeues(self) -> int:
        return self.events().count(REQUEUE)

    def events(self) -> list[str]:
        path = self.run_dir / "events"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, event: str, after: int = 0) -> None:
        """Until `event` is among the events, the first `after` left aside."""
        deadline = time.monotonic() + 30
        while event not in self.events()[after:]:
            assert time.monotonic() < deadline, f"no '{event}' within 30 s, but {self.events()}"
            time.sleep(0.05)

    def shows(self, line: str) -> bool:
        """Whether the job prints a line that begins with the expression `line` within 60 s; it is killed if not."""
        assert self._process is not None
        assert self._process.stdout is not None
        late = threading.Timer(60, os.killpg, (self._process.pid, signal.SIGKILL))
        late.start()
        found = any(re.match(line, shown) for shown in self._process.stdout)
        late.cancel()
        return found

    def servers_stopped(self) -> bool:
        return {f"server {port} stopped" for port in self.ports} <= set(self.events())

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_finished_job_stops_its_servers(job: Job) -> None:
    process = job.start("finish")
    assert process.wait(60) == 0
    assert job.servers_stopped()
    assert job.requeues() == 0


def test_another_program_s_port_is_not_taken_for_a_server_of_the_job(job: Job) -> None:
    with socket.create_server(("127.0.0.1", job.ports[1])):
        process = job.start("finish")
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"port {job.ports[1]} of localhost belongs to another program" in output
    assert "trainer started" not in job.events()
    started = len(job.server_pids(job.ports[0]))  # it may have been too late
    assert job.events().count(f"server {job.ports[0]} stopped") == started


def test_trainer_that_fails_before_its_first_step_fails_the_job(job: Job) -> None:
    assert job.start("fail").wait(60) == 3
    assert job.servers_stopped()
    assert job.requeues() == 0


def test_time_limit_lets_the_trainer_save_then_requeues(job: Job) -> None:
    process = job.start("stop")
    job.wait_for("trainer started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    events = job.events()
    assert job.servers_stopped()
    assert "trainer killed" not in events
    assert events.index("trainer saved") < events.index(f"server {job.ports[0]} stopped")
    assert events[-1] == REQUEUE


def test_trainer_that_finishes_while_being_stopped_is_not_requeued(job: Job) -> None:
    process = job.start("last step")
    job.wait_for("trainer started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert job.servers_stopped()
    assert job.requeues() == 0


def test_trainer_that_fails_after_a_step_is_started_again_and_requeued_when_it_comes_no_further(job: Job) -> None:
    assert job.again("fail at step 3") == 0
    assert job.events().count("trainer started") == 2
    assert [len(job.server_pids(port)) for port in job.ports] == [1, 1]
    assert job.servers_stopped()
    assert job.events()[-1] == REQUEUE


def test_lines_that_a_resumed_trainer_keeps_are_no_step_of_its_own(job: Job) -> None:
    job.save(3)
    assert job.again("fail at step 3") == 3
    assert job.requeues() == 0


def test_job_that_was_requeued_before_survives_a_failure_before_the_first_step(job: Job) -> None:
    job.save(3)
    assert job.again("fail", SLURM_RESTART_COUNT="1") == 0
    assert job.again("fail", SLURM_RESTART_COUNT="2", FAKE_BROKEN_PORT=str(job.ports[1])) == 0
    assert job.requeues() == 2


@pytest.mark.parametrize(("trainer", "status"), [("fail at step 9", 3), ("stop without saving", 1)])
def test_job_without_progress_is_requeued_a_few_times_only(job: Job, trainer: str, status: int) -> None:
    def end() -> int:
        seen = len(job.events())
        process = job.start(trainer, "MAX_RESTARTS=1")
        if trainer == "stop without saving":
            job.wait_for("trainer started", seen)
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        return process.returncode

    assert [end(), end()] == [0, status]
    assert job.requeues() == 1
    job.save(5)  # then there was progress
    assert end() == 0
    assert job.requeues() == 2


def test_a_cancelled_job_says_nothing_of_requeueing(job: Job) -> None:
    process = job.start("stop", FAKE_STATE="COMPLETING")
    job.wait_for("trainer started")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped at step 7; the same command continues there" in output
    assert "requeue" not in output
    assert job.requeues() == 0


def test_a_stopped_job_that_may_not_be_requeued_has_not_failed(job: Job) -> None:
    process = job.start("stop", FAKE_REQUEUE_DISABLED="1")
    job.wait_for("trainer started")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped at step 7; the same command continues there" in output


def test_job_that_may_not_be_requeued_fails(job: Job) -> None:
    assert job.again("fail at step 3", FAKE_REQUEUE_DISABLED="1") == 3


def test_server_that_ends_is_started_again(job: Job) -> None:
    process = job.start("stop")
    job.wait_for("trainer started")
    port = job.ports[1]
    os.kill(job.server_pids(port)[0], signal.SIGKILL)
    job.wait_for_start(port, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    log = job.run_dir / "logs" / "teacher-localhost-0.log"
    told = rf"servers: teacher-localhost-0 at http://localhost:{port} ended with status 137.* and is started again, log {log}"
    assert re.search(told, output)
    assert "trainer saved" in job.events()
    assert len(job.server_pids(port)) == 2
    assert not is_alive(job.server_pids(port)[1])


def test_server_that_keeps_ending_is_given_up(job: Job) -> None:
    process = job.start("stop", "MAX_SERVER_FAILURES=3")
    job.wait_for("trainer started")
    port = job.ports[1]
    (job.run_dir / f"broken {port}").touch()
    os.kill(job.server_pids(port)[0], signal.SIGKILL)
    log = job.run_dir / "logs" / "teacher-localhost-0.log"
    often = "3 times in a row before it served for 10 minutes, and is given up"
    assert job.shows(
        rf"error: teacher-localhost-0 at \S+:{port} ended with status 1 after \d+ s, {often}. Log {log}, last lines:"
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert log.read_text().count("out of memory") == 2
    assert len(job.server_pids(port)) == 3
    assert process.returncode == 0  # the trainer can do with the others


def test_server_that_ends_while_starting_fails_the_job_and_names_its_log(job: Job) -> None:
    process = job.start("finish", FAKE_BROKEN_PORT=str(job.ports[1]))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    log = job.run_dir / "logs" / "teacher-localhost-0.log"
    assert (
        f"error: a server ended while starting, see {log}, which ends with:\nloading the model\nout of memory\n"
        in output
    )
    assert len(job.server_pids(job.ports[1])) == 1
    started = len(job.server_pids(job.ports[0]))  # it may have been too late
    assert job.events().count(f"server {job.ports[0]} stopped") == started
    assert "trainer started" not in job.events()


def test_job_with_too_few_nodes_says_what_to_ask_for(job: Job) -> None:
    process = job.start("finish", SLURM_JOB_NODELIST="localhost,localhost")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    sum_of_roles = "TRAINER_NODES + ENGINE_NODES + TEACHER_NODES + REWRITER_NODES = 3"
    assert f"the job has 2 nodes, but {sum_of_roles}: add --nodes=3 to sbatch" in output


def test_a_judge_that_nobody_serves_is_told_before_anything_is_started(job: Job, tmp_path: Path) -> None:
    """A dry run, which says what a run costs, does without one."""
    policy = tmp_path / "policy"
    byte_level_tokenizer().save_pretrained(policy / "hf")
    LlamaConfig(vocab_size=320, num_attention_heads=4, num_key_value_heads=4).save_pretrained(policy / "hf")
    (policy / "iter_0000000").mkdir()
    (policy / "iter_0000000" / "metadata.json").write_text("{}")
    (policy / "latest_checkpointed_iteration.txt").write_text("0")
    process = job.start("finish", f"POLICY={policy}", f"VENV={sys.prefix}", "TEACHER_NODES=0", "ENGINE_NODES=2")
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the judge or rewriter needs a server: give --teacher-url URL" in told
    assert "error: the trainer refuses these flags" in told
    assert job.events() == []
