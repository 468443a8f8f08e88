"""evidence/study.py: parts are done once, killed ones go on, and what ends otherwise is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pytest

from evidence import study
from evidence.study import PYTHON, ROOT, SERVED_URL, Part, StudyError, Work, do_parts, is_done, paragraph, table

LOG = "import sys, pathlib; log = pathlib.Path(sys.argv[1]) / 'log'; log.open('a').write(sys.argv[2] + chr(10)); "
TOUCH = LOG + "(pathlib.Path(sys.argv[1]) / sys.argv[2]).touch()"


def part(folder: Path, name: str, code: str = TOUCH, **more: object) -> Part:
    return Part(name, ((PYTHON, "-c", code, str(folder), name),), (folder / name,), **more)  # type: ignore[arg-type]


def log(folder: Path) -> list[str]:
    path = folder / "log"
    return path.read_text().split() if path.exists() else []


def test_a_part_is_done_once(tmp_path: Path) -> None:
    parts = [part(tmp_path, "one"), part(tmp_path, "two")]
    first = do_parts(parts, tmp_path)
    assert do_parts(parts, tmp_path) == first
    assert list(first.seconds) == ["one", "two"]
    assert min(first.seconds.values()) > 0
    assert (len(first.commits), len(first.processors)) == (1, 1)
    assert log(tmp_path) == ["one", "two"]
    (tmp_path / "two").unlink()
    again = do_parts(parts, tmp_path).seconds
    assert (again["one"], again["two"] > first.seconds["two"]) == (
        first.seconds["one"],
        True,
    )  # the seconds of both times
    assert log(tmp_path) == ["one", "two", "two"]


def test_a_record_of_an_earlier_version_is_of_an_unknown_processor(tmp_path: Path) -> None:
    parts = [part(tmp_path, "one"), part(tmp_path, "two")]
    do_parts(parts, tmp_path)
    records = json.loads((tmp_path / study.DONE).read_text())
    del records["one"]["processors"], records["two"]["processors"]
    records["two"]["done"] = False
    (tmp_path / study.DONE).write_text(json.dumps(records))
    assert do_parts(parts, tmp_path).processors[0] == "unknown"
    assert len(do_parts(parts, tmp_path).processors) == 2


def test_a_dry_run_only_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert do_parts([part(tmp_path, "one")], tmp_path / "new", dry_run=True) == Work({}, (), ())
    assert (log(tmp_path), (tmp_path / "new").exists()) == ([], False)
    assert f"{tmp_path} one" in capsys.readouterr().out


def test_after_a_kill_the_same_call_goes_on(tmp_path: Path) -> None:
    """The second part hangs until a file is there; the driver is killed meanwhile, and nothing of it is left running."""
    hang = LOG + "import time\nwhile not (pathlib.Path(sys.argv[1]) / 'go').exists(): time.sleep(0.05)\n" + TOUCH
    parts = f"[{part(tmp_path, 'one')!r}, {part(tmp_path, 'two', hang)!r}, {part(tmp_path, 'three')!r}]"
    script = f"from pathlib import Path, PosixPath\nfrom evidence.study import *\ndo_parts({parts}, Path({str(tmp_path)!r}))\n"
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as driver:
        wait_for(lambda: log(tmp_path)[1:2] == ["two"])
        os.killpg(driver.pid, signal.SIGKILL)
    wait_for(lambda: not running(str(tmp_path)))
    assert log(tmp_path) == ["one", "two"]
    (tmp_path / "go").touch()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert log(tmp_path) == ["one", "two", "two", "two", "three"]  # the part that hung, and its end


def test_a_sigterm_reaches_what_a_script_runs_and_is_waited_for(tmp_path: Path) -> None:
    """As the judge's script: a shell that waits for a trainer, which saves before it ends."""
    trainer = tmp_path / "trainer.py"
    trainer.write_text(
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*_): time.sleep(0.5); (folder / 'saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(folder / 'started').touch()\ntime.sleep(60)\n"
    )
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/bash\nset -e\ntrap : TERM\npython {trainer}\n[ -f {tmp_path}/one ] || exit 0\n")
    script.chmod(0o755)
    words = f"[Part('one', (({str(script)!r},),), (Path({str(tmp_path / 'one')!r}),))]"
    code = f"from pathlib import Path\nfrom evidence.study import *\ndo_parts({words}, Path({str(tmp_path)!r}))\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE) as driver:
        wait_for((tmp_path / "started").exists)
        driver.terminate()
        _, said = driver.communicate()
    assert (tmp_path / "saved").exists()
    assert b"it was stopped; the same command continues" in said


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(argument: str) -> bool:
    """Whether a process has the argument in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument in path.read_bytes().decode(errors="replace").split("\0"):
                return True
        except OSError:
            continue
    return False


def test_another_command_needs_another_folder(tmp_path: Path) -> None:
    do_parts([part(tmp_path, "one")], tmp_path)
    other = part(tmp_path, "one", TOUCH + "; print()")
    with pytest.raises(StudyError, match="'one' was done by other commands"):
        do_parts([other], tmp_path)
    do_parts([other], tmp_path, dry_run=True)  # its commands name what a dry run has not fetched


def test_a_part_is_by_all_commits_that_had_a_share_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, code in (("a", "raise SystemExit(3)"), ("b", TOUCH)):
        monkeypatch.setattr(study, "commit", lambda number=number: number)
        with suppress(StudyError):
            found = do_parts([part(tmp_path, "one", code)], tmp_path)
    assert found.commits == ("a", "b")


def test_a_failure_and_a_stop_are_told_and_not_done(tmp_path: Path) -> None:
    failing = part(tmp_path, "one", "raise SystemExit(3)")
    with pytest.raises(StudyError, match="'one' ended with status 3"):
        do_parts([failing, part(tmp_path, "two")], tmp_path)
    stopped = part(tmp_path, "one", LOG)
    with pytest.raises(StudyError, match="it was stopped; the same command continues"):
        do_parts([stopped, part(tmp_path, "two")], tmp_path)
    assert log(tmp_path) == ["one"]
    assert not is_done(stopped, tmp_path)
    assert json.loads((tmp_path / "parts.json").read_text())["one"]["seconds"] > 0


def test_what_nobody_needs_afterwards_is_removed_when_the_part_is_done(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "iter").mkdir(parents=True)
    failing = part(tmp_path, "one", "raise SystemExit(3)", removed=(tmp_path / "checkpoints",))
    with pytest.raises(StudyError):
        do_parts([failing], tmp_path)
    assert (tmp_path / "checkpoints").exists()
    do_parts([part(tmp_path, "one", removed=(tmp_path / "checkpoints", tmp_path / "nowhere"))], tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_served_model_is_there_for_all_commands_of_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Path] = []

    class Stub:
        url = "http://127.0.0.1:7"

        def __init__(self, settings: study.ServerSettings) -> None:
            served.append(Path(settings.model_path))

        def __enter__(self) -> Stub:
            return self

        def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
            served.append(Path("ended"))

    monkeypatch.setattr(study, "LocalServer", Stub)
    told = tuple((PYTHON, "-c", LOG, str(tmp_path), f"{SERVED_URL}/{place}") for place in "ab")
    do_parts([Part("asked", told, (tmp_path / "log",), served=tmp_path / "model")], tmp_path)
    assert log(tmp_path) == ["http://127.0.0.1:7/a", "http://127.0.0.1:7/b"]
    assert served == [tmp_path / "model", Path("ended")]


def test_scripts_find_this_python(tmp_path: Path) -> None:
    code = "import pathlib, shutil, sys; pathlib.Path(sys.argv[1]).write_text(shutil.which('python'))"
    do_parts([Part("one", ((PYTHON, "-c", code, str(tmp_path / "found")),), (tmp_path / "found",))], tmp_path)
    assert (tmp_path / "found").read_text() == str(Path(sys.executable).with_name("python"))


def test_markdown_is_laid_out() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    told = paragraph("word " * 30, "`--a-flag-that-is-long`")
    assert max(map(len, told.splitlines())) <= 120
    assert "`--a-flag-that-is-long`" in told
