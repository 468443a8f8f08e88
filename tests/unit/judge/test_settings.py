"""What the user may get wrong, and what the message says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from judge_cases import make_settings

from megatron_sip.judge import (
    Endpoint,
    Judge,
    ScheduleSettings,
    SettingsError,
    known_criteria,
    parse_criteria,
)
from megatron_sip.judge.prompts import builtin_prompt
from megatron_sip.judge.settings import LABELLED_CRITERIA
from megatron_sip.judge.teacher import TeacherClient


def test_weights_are_parsed() -> None:
    assert parse_criteria(["quality=1", "safety=0.5"]) == {"quality": 1.0, "safety": 0.5}
    assert parse_criteria(["likelihood"]) == {"likelihood": 1.0}
    assert parse_criteria(["factuality:v3=2"]) == {"factuality:v3": 2.0}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["niceness=1"], "unknown criterion 'niceness'; known criteria: coherence, copy, factscore"),
        (["quality=much"], "'much' is no number; write NAME=WEIGHT"),
        (["quality=0"], "must be a finite number above 0"),
        (["quality=inf"], "must be a finite number above 0"),
        (["quality=nan"], "must be a finite number above 0"),
        (["quality=1", "quality=2"], "'quality' is given twice"),
        (["factuality:v6=1"], "unknown criterion 'factuality:v6'"),
        (["corruption=1"], "unknown criterion 'corruption'"),
        (["missing/prompt.txt=1"], "there is no such prompt file"),
        ([], "no criteria given"),
    ],
)
def test_bad_criteria_say_what_would_be_right(items: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        parse_criteria(items)


def test_all_of_the_papers_criteria_are_known() -> None:
    versions = {f"factuality:v{v}" for v in range(1, 6)} | {f"factuality-noref:v{v}" for v in range(1, 5)}
    pairwise = {"quality", "coherence", "factscore", "halueval"}
    of_the_policy = pairwise | versions | {"safety", "likelihood", "factuality", "factuality-noref"}
    assert of_the_policy == set(known_criteria()) - set(LABELLED_CRITERIA)


def test_a_text_prompt_is_no_criterion(tmp_path: Path) -> None:
    path = tmp_path / "free.txt"
    path.write_text("+++\nname = 'free'\nkind = 'text'\n+++\nWrite something about {{prefix}}\n")
    with pytest.raises(SettingsError, match="pointwise or pairwise"):
        parse_criteria([f"{path}=1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoints": ()}, "at least one endpoint"),
        ({"criteria": {}}, "at least one criterion"),
        ({"votes": 0}, "votes 0"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"attempts": 0}, "attempts 0"),
        ({"deadline_s": 0.0}, "--judge-deadline 0.0"),
        ({"call_timeout_s": -1.0}, "--teacher-timeout -1.0"),
        ({"quorum": 0.0}, "quorum 0"),
        ({"quorum": 1.5}, "quorum 1.5"),
        ({"criteria": {"likelihood": 1.0}}, "likelihood needs an endpoint of kind sglang"),
        (
            {"endpoints": (Endpoint("http://a", "openai", "m1"), Endpoint("http://b", "openai", "m2"))},
            "may differ in their URLs only",
        ),
    ],
)
def test_impossible_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        make_settings("http://judge", **changes)


def test_impossible_endpoints_and_schedules() -> None:
    with pytest.raises(SettingsError, match="starts with http"):
        Endpoint("localhost:30000")
    with pytest.raises(SettingsError, match="neither sglang nor openai"):
        Endpoint("http://a", "grpc")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="there are: all_pairs"):
        ScheduleSettings("some_pairs")
    with pytest.raises(SettingsError, match="degree 3"):
        ScheduleSettings("circulant_bt", degree=3)
    with pytest.raises(SettingsError, match="pivot 'best'"):
        ScheduleSettings("pivot", pivot="best")  # type: ignore[arg-type]


def test_the_api_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint("http://a", "openai", api_key_env="JUDGE_TEST_KEY")
    monkeypatch.delenv("JUDGE_TEST_KEY", raising=False)
    with pytest.raises(SettingsError, match="JUDGE_TEST_KEY"):
        endpoint.api_key()
    monkeypatch.setenv("JUDGE_TEST_KEY", "secret-4711")
    judge_settings = make_settings(endpoints=(endpoint,))
    client = TeacherClient(judge_settings.client)
    assert client.pool.servers[0].headers["Authorization"] == "Bearer secret-4711"
    assert "secret-4711" not in repr(judge_settings) + repr(client.pool.servers) + repr(endpoint)


def test_prompts_hold_no_unfilled_slot() -> None:
    for name in known_criteria():
        if name not in ("likelihood", "label", "copy"):
            prompt = builtin_prompt(name)
            filled = "".join(prompt.fill(dict.fromkeys(prompt.slots, "text"), "c0de"))
            assert "{{" not in filled


def test_soft_verdicts_need_a_start_in_the_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "mood.txt"
    path.write_text(
        "+++\nname = 'mood'\nkind = 'pointwise'\npattern = '(up|down)'\n[values]\nup = 1\ndown = 0\n+++\n{{candidate}}\n"
    )
    with pytest.raises(SettingsError, match=r"soft verdicts need start"):
        Judge(make_settings("http://a", criteria={str(path): 1.0}, default_verdict="soft"))


def test_an_url_may_be_given_with_its_version() -> None:
    client = TeacherClient(make_settings("http://a:1/v1/", "http://b:2").client)
    assert [server.url for server in client.pool.servers] == ["http://a:1", "http://b:2"]
