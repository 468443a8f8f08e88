"""Criteria that are Python functions: their numbers count, and whatever else they do is no reward."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge
from flag_cases import settings as run_settings
from judge_cases import make_group, make_settings

from megatron_sip.judge import Judge, JudgeSettings, SettingsError, parse_criteria
from megatron_sip.judge.python_functions import (
    CallFailedError,
    FunctionError,
    FunctionProcesses,
    check_functions,
    named_functions,
    require_package,
)
from megatron_sip.records import Candidate, Group
from megatron_sip.stop_signal import StopSignal

QUALITY, OBEYS = "criterion_functions:quality", "criterion_functions:obeys"


def saying(*texts: str) -> Group:
    group = make_group(0, [0.1])
    return replace(group, candidates=[Candidate("rollout", [i], text) for i, text in enumerate(texts)])


async def alone(name: str, groups: Sequence[Group], **changes: Any) -> tuple[list[Group], dict[str, float]]:
    """As a judge of this function alone leaves the groups; first come, first judged."""
    async with Judge(JudgeSettings({name: 1.0}, None, **changes)) as judge:
        await judge.check()
        judged = [group for one in groups for group in await judge.score([one])]
        return judged, judge.counters()


async def test_its_numbers_enter_the_weighted_sum_with_served_criteria() -> None:
    criteria = {"safety": 1.0, QUALITY: 0.5, "criterion_functions:known": 2.0}
    async with FakeJudge() as server, Judge(make_settings(server.url, criteria=criteria)) as judge:
        await judge.check(5.0)
        [judged] = await judge.score([make_group(0, [0.3, 0.8, 0.8, 0.1], unsafe=frozenset([3]))])
    assert judged.scores == pytest.approx([1 + 0.15 + 2, 1 + 0.4, 1 + 0.4, 0.05])
    assert judged.criterion_scores[QUALITY] == [0.3, 0.8, 0.8, 0.1]
    assert judged.verdicts[QUALITY] == [[0, 0.3], [1, 0.8], [3, 0.1]]  # equal texts are asked about once


async def test_a_candidate_without_a_number_is_dropped_and_counted() -> None:
    [judged], counters = await alone(QUALITY, [saying("q=0.5", "none", "q=0.25")])
    assert [candidate.text for candidate in judged.candidates] == ["q=0.5", "q=0.25"]
    assert judged.scores == [0.5, 0.25]
    assert counters[f"candidates/dropped/{QUALITY}-no-number"] == 1
    assert (counters[f"verdicts/{QUALITY}"], counters[f"verdicts-missing/{QUALITY}"]) == (2, 1)


async def test_a_call_that_hangs_raises_or_crashes_is_a_missing_score_and_the_next_one_is_answered() -> None:
    orders = ["go", "hang", "go", "raise", "go", "crash", "go"]
    started = time.monotonic()
    judged, counters = await alone(OBEYS, [saying(f"a {order}", "b") for order in orders], function_timeout_s=1.0)
    assert [group.scores for group in judged[::2]] == [[0.25, 0.25]] * 4
    reasons = [group.dropped for group in judged[1::2]]
    assert reasons == [f"judge-{OBEYS}-{kind}" for kind in ("timeout", "raised", "crashed")]
    assert all(group.scores is None for group in judged[1::2])
    assert counters[f"groups/dropped/judge-{OBEYS}-timeout"] == 1
    assert time.monotonic() - started < 60.0


async def test_one_whose_process_does_not_start_again_is_a_missing_score_and_later_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sometimes.py").write_text(
        f"import os\nif os.path.exists({str(tmp_path / 'down')!r}): raise OSError('no memory')\n"
        "def number(texts, prefix, reference):\n    if texts == ['crash']: os._exit(3)\n    return [0.5] * len(texts)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    processes = FunctionProcesses("sometimes:number", 60.0, 1)
    try:
        await processes.start()
        for texts in (["crash"], ["text"]):
            with pytest.raises(CallFailedError, match="does not start again" if texts == ["text"] else "ended"):
                await processes.call(texts, "", "", 60.0)
            (tmp_path / "down").touch()
        (tmp_path / "down").unlink()
        assert await processes.call(["text"], "", "", 60.0) == [0.5]
    finally:
        processes.close()


async def test_a_slow_function_drops_nothing() -> None:
    """The last call waits for all the others, longer than any may wait for an answer."""
    groups = [saying(f"{i} slowly", "b") for i in range(10)]
    async with Judge(JudgeSettings({OBEYS: 1.0}, None, deadline_s=1.0)) as judge:
        await judge.check()
        started = time.monotonic()
        judged = await judge.score(groups)
        assert time.monotonic() - started > 1.0
    assert [group.dropped for group in judged] == [None] * 10


async def test_no_call_takes_longer_than_the_step_s_deadline() -> None:
    groups = [saying(f"{i} hang", "b") for i in range(4)]
    async with Judge(JudgeSettings({OBEYS: 1.0}, None, deadline_s=0.5, function_timeout_s=60.0)) as judge:
        await judge.check()
        started = time.monotonic()
        judged = await judge.score(groups)
        assert time.monotonic() - started < 20.0
    assert {group.dropped for group in judged} == {f"judge-{OBEYS}-timeout"}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("nothing", "gave a NoneType: one number or None for each text is needed"),
        ("short", "gave 1 numbers for 2 texts"),
        ("words", "gave 'good': a number from 0 to 1, or None, is needed"),
        ("large", "gave 1.5: a number from 0 to 1"),
        ("nan", "gave nan: a number from 0 to 1"),
    ],
)
async def test_an_answer_that_is_no_list_of_numbers_is_an_error_that_names_the_function(
    order: str, message: str
) -> None:
    with pytest.raises(FunctionError, match=f"'{OBEYS}' {message}"):
        await alone(OBEYS, [saying(f"a {order}", "b")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "'no_such_module:f' cannot be imported: there is no module 'no_such_module'"),
        ("no_such.module.f:g.h", "there is no module 'no_such'"),
        ("nicely", "or package.module:function"),
    ],
)
def test_a_package_that_is_not_there_is_told_when_flags_are_read(name: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_criteria([f"{name}=1"])
    assert str(caught.value).startswith("--criteria")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("criterion_functions.nothing:f", "cannot be imported: ModuleNotFoundError"),
        ("criterion_functions:nothing", "cannot be imported: AttributeError"),
        ("criterion_functions:NOT_A_FUNCTION", "is no function but a int"),
    ],
)
def test_what_cannot_be_imported_is_told_by_a_process_that_tries(name: str, message: str) -> None:
    """As a user error, before anything is trained."""
    with pytest.raises(FunctionError, match=f"'{name}' {message}"):
        check_functions([QUALITY, name])


def test_a_file_of_the_current_folder_is_found_by_a_console_script_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_me.py").write_text("raise ValueError('imported')\n")
    own = str(Path(__file__).parents[3])
    monkeypatch.setattr(sys, "path", [name for name in sys.path if name not in ("", own)])
    with pytest.raises(FunctionError, match="there is no module 'beside_me' that is installed or in"):
        require_package("beside_me:number")
    monkeypatch.chdir(tmp_path)
    require_package("beside_me:number")
    assert sys.path[-1] == str(tmp_path)


def test_flags_are_read_without_importing_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may load a model, or CUDA before Megatron is prepared; in each of a node's trainers."""
    code = "import multiprocessing, os\nassert multiprocessing.parent_process() is not None\nos._exit(4)\n"
    (tmp_path / "heavy_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_settings("--criteria", "heavy_model:f=1", teacher_url=None).judge is not None
    assert "heavy_model" not in sys.modules
    with pytest.raises(FunctionError, match=r"'heavy_model:f' cannot be imported: its process ended \(exit status 4\)"):
        check_functions(["heavy_model:f"])


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
async def test_a_stop_is_the_run_s_and_not_its_processes(number: signal.Signals) -> None:
    """SLURM, torchrun and terminals send it to all: a step under way is judged to its end."""
    processes = FunctionProcesses(QUALITY, 60.0, 1)
    try:
        await processes.start()
        process = processes._workers[0]._process
        os.kill(process.pid, number)
        assert await processes.call(["q=0.5"], "", "") == [0.5]
        assert processes._workers[0]._process is process
    finally:
        processes.close()


async def test_a_package_names_its_functions_by_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "nice-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nice\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[megatron_sip.criteria]\nnice = criterion_functions:Model.score\nsafety = criterion_functions:quality\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    named_functions.cache_clear()
    try:
        assert parse_criteria(["nice=2"]) == {"nice": 2.0}
        [judged], _ = await alone("nice", [saying("a", "b")])
        assert (judged.scores, judged.criterion_scores) == ([1.0, 1.0], {"nice": [1.0, 1.0]})
        with pytest.raises(SettingsError, match="--criteria safety: it asks a judge's servers"):
            JudgeSettings({"safety": 1.0}, None)  # our own names come first
    finally:
        named_functions.cache_clear()


def test_a_run_whose_criteria_are_functions_needs_no_teacher() -> None:
    made = run_settings(
        "--criteria", f"{QUALITY}=1", "--criteria-timeout", "7", "--criteria-processes", "3", teacher_url=None
    )
    assert not made.needs.teacher
    assert made.judge is not None
    assert (made.judge.client, made.judge.function_timeout_s, made.judge.function_processes) == (None, 7.0, 3)
