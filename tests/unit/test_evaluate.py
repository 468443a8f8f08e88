"""Comparisons by megatron-sip-evaluate: the paper's protocol as its defaults, ends that count, refusals."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from fake_judge import FakeJudge, quality_of
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.evaluate import command_line, main
from megatron_sip.evaluation import judging
from megatron_sip.evaluation.commands.compare import compare_settings, compared
from megatron_sip.evaluation.commands.rate import rate_settings, rated
from megatron_sip.evaluation.generation import ENDED, FORMAT, Generation, read_generations
from megatron_sip.evaluation.judging import Judged, JudgingError, told
from megatron_sip.evaluation.majority import majority
from megatron_sip.evaluation.results import Result, read_results
from megatron_sip.records import Group


def write(path: Path, texts: list[str], finish: str = "length", **header: Any) -> Path:
    lines = [
        {
            "index": i,
            "document": f"0:{i}",
            "prefix": f"Text {i} ",
            "suffix": "x",
            "text": text,
            "ids": [3],
            "finish_reason": finish,
        }
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"format": FORMAT, **header}, *lines]))
    return path


async def judge_files(judge: FakeJudge, words: list[str]) -> list[Judged]:
    """What the command of `words` finds with its own defaults, but for the server's kind."""
    async with judge as server:
        given = command_line().parse_args(
            [*words, "--teacher-url", server.url, "--teacher-api", "openai", "--teacher-name", "fake"]
        )
        if given.command == "compare":
            files = read_generations(given.base), read_generations(given.model)
            return [await compared(one, *files) for one in compare_settings(given)]
        return [await rated(one, read_generations(given.generations)) for one in rate_settings(given)]


def compare_files(base: Path, model: Path, judge: FakeJudge, *flags: str) -> Result:
    [judged] = asyncio.run(judge_files(judge, ["compare", str(base), str(model), *flags]))
    return judged.result(read_generations(model), seed=0)


def rate_file(path: Path, judge: FakeJudge, *flags: str) -> tuple[Judged, Result]:
    [judged] = asyncio.run(judge_files(judge, ["rate", str(path), *flags]))
    return judged, judged.result(read_generations(path), seed=0)


def test_eight_judgements_four_in_each_order_and_a_judge_of_places_decides_nothing(tmp_path: Path) -> None:
    base = write(tmp_path / "base.jsonl", ["q=0.1", "q=0.2"], dataset="standard")
    model = write(tmp_path / "model.jsonl", ["q=0.8", "q=0.9"], dataset="standard")
    first = FakeJudge(answer=lambda prompt: "Conclusion: Option 1")
    found = compare_files(base, model, first)
    assert (found.measure, found.dataset, found.value) == ("quality", "standard", 0.5)
    assert [body["n"] for body in first.bodies] == [4] * 4  # two pairs in both orders
    assert {body["temperature"] for body in first.bodies} == {0.7}
    assert {body.get("top_p", 1) for body in first.bodies} == {1}
    assert len({prompt.split("[begin option 1")[1] for prompt in first.prompts}) == 4


@pytest.mark.parametrize(
    ("criterion", "verdict"),
    [
        ("quality", "Conclusion: Option {}"),
        ("coherence", "ANSWER: {}"),
        ("factscore", '{{"reasoning": "it is so", "label": "{}"}}'),
        ("halueval", '{{"reasoning": "it is so", "label": "{}"}}'),
    ],
)
def test_the_better_model_wins_all(tmp_path: Path, criterion: str, verdict: str) -> None:
    base, model = write(tmp_path / "base.jsonl", ["q=0.1"] * 3), write(tmp_path / "model.jsonl", ["q=0.8"] * 3)
    labels = "12" if criterion == "quality" else "AB"

    def answer(prompt: str) -> str:
        one, other = (quality_of(prompt.split(f"[begin option {place} ")[1]) for place in (1, 2))
        return verdict.format(labels[int(one < other)])

    found = compare_files(base, model, FakeJudge(answer=answer), "--criteria", criterion)
    assert (found.value, found.samples, found.failed) == (1.0, 3, 0)
    assert found.measure == ("factuality" if criterion in ("factscore", "halueval") else criterion)
    assert compare_files(model, base, FakeJudge(answer=answer), "--criteria", criterion).value == 0.0
    if criterion != "quality":
        tie = FakeJudge(answer=lambda _: verdict.format("TIE"))
        assert compare_files(base, model, tie, "--criteria", criterion).value == 0.5


def test_a_judge_that_never_prefers_the_first_is_told_as_one_that_always_does() -> None:
    counters = {"verdicts/quality": 8.0, "first-shown-preferred/quality": 0.0, "cached": 0.0}
    assert told(counters, "quality") == {"judgements": 8.0, "first shown preferred": 0.0}


def test_a_pair_judged_in_one_order_alone_is_no_preference(tmp_path: Path) -> None:
    """The judge answers only where the better one comes first: with a shrunken fit that would be a win."""
    base, model = (
        write(tmp_path / "base.jsonl", ["q=0.1", "q=0.9"]),
        write(tmp_path / "model.jsonl", ["q=0.8", "q=0.9"]),
    )

    def answer(prompt: str) -> str:
        return "Conclusion: Option 1" if quality_of(prompt.split("[begin option 1 ")[1]) > 0.5 else "I cannot say."

    [judged] = asyncio.run(judge_files(FakeJudge(answer=answer), ["compare", str(base), str(model)]))
    assert judged.values == [None, 0.5]  # the second texts are equal, and tie unasked
    assert judged.about["judgements missing"] == 4
    assert judged.result(read_generations(model), seed=0).failed == 1
    with pytest.raises(JudgingError, match="none of 2 generations got a verdict"):
        replace(judged, values=[None, None]).result(read_generations(model), seed=0)


def test_safety_is_what_most_votes_say_and_a_missing_vote_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", ["v=YYYNN", "v=NNNNY", "v=YYN??", "v=YN???", "v=Y????"], dataset="toxigen")

    def edits(body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        """Five votes as the text says; what is missing is missing again when it is asked for once more."""
        votes = body["messages"][0]["content"].split("v=")[1][:5]
        said = [{"Y": "YES", "N": "NO"}.get(vote, "unclear") for vote in votes if body["n"] == 5 or vote == "?"]
        choices = [{"message": {"content": f"FINAL DECISION: {word}"}} for word in said]
        return reply | {"choices": choices}

    judged, found = rate_file(path, FakeJudge(answer=lambda _: "", edits=edits))
    assert judged.values == [1.0, 0.0, 1.0, None, None]  # of the last two less than half the votes are there
    assert (found.measure, found.dataset, found.samples, found.failed) == ("safety", "toxigen", 3, 2)
    assert found.value == pytest.approx(2 / 3)
    assert judged.about["judgements missing"] == 2 + 3 + 4
    assert (judged.about["votes"], judged.about["temperature"], judged.about["top_p"]) == (5, 1.0, 1.0)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1))
def test_a_majority_is_more_than_half_and_a_tie_counts_half(votes: list[float]) -> None:
    share = Fraction(int(sum(votes)), len(votes))
    assert majority(votes) == (0.5 if share == Fraction(1, 2) else float(share > Fraction(1, 2)))


def test_factuality_is_the_mean_of_its_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", ["Definite", "Possible", "No", "No"])

    def answer(prompt: str) -> str:
        word = prompt.split("[begin candidate ")[1].split("\n")[1]
        return json.dumps({"reasoning": "so", "label": f"{word} Hallucination"})

    judged, found = rate_file(path, FakeJudge(answer=answer), "--criteria", "factuality:v4", "--judge-votes", "3")
    assert judged.values == [0.0, 0.5, 1.0, 1.0]
    assert (found.measure, found.value, found.failed) == ("factuality", 0.625, 0)
    assert (judged.about["votes"], judged.about["temperature"]) == (3, 0.7)
    judged, _ = rate_file(path, FakeJudge(answer=answer), "--criteria", "factuality:v4")
    assert judged.about["votes"] == 8  # section 3.3


def test_what_results_say_of_the_judgements_is_what_was_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", ["q=0.1"])
    other = write(tmp_path / "other.jsonl", ["q=0.2"])
    for votes in (2, 6):
        judge = FakeJudge(answer=lambda prompt: "Conclusion: Option 1")
        [judged] = asyncio.run(judge_files(judge, ["compare", str(path), str(other), "--judge-votes", str(votes)]))
        assert (judged.about["votes"], judged.about["in each order"]) == (votes, votes // 2)
        assert [body.get("n", 1) for body in judge.bodies] == [votes // 2] * 2


def test_one_criterion_s_way_of_judging_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    words = ["compare", "a", "b", "--criteria", "quality", "coherence", "--teacher-url", "http://127.0.0.1:1"]
    given = command_line().parse_args([*words, "--judge-verdict", "coherence=soft"])
    quality, coherence = compare_settings(given)
    assert (quality.mode("quality"), coherence.mode("coherence")) == ("hard", "soft")
    given = command_line().parse_args([*words, "--judge-verdict", "soft", "coherence=hard"])
    assert [one.default_verdict for one in compare_settings(given)] == ["soft", "hard"]


def test_soft_safety_is_a_probability_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", ["v"])
    words = ["rate", str(path), "--judge-verdict", "soft", "--teacher-url", "http://127.0.0.1:1"]
    [settings] = rate_settings(command_line().parse_args(words))

    class Soft:
        def __init__(self, *_: object, **__: object) -> None:
            self.weights, self.model = {"safety": 1.0}, "m"

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def check(self) -> None: ...

        def counters(self) -> dict[str, float]:
            return {}

        async def score(self, groups: list[Group], **_: object) -> list[Group]:
            return [replace(group, scores=[0.55], verdicts={"safety": [[0, 0.55]]}) for group in groups]

    with patch.object(judging, "Judge", Soft):
        found = asyncio.run(rated(settings, read_generations(path)))
    assert found.values == [0.55]
    assert found.about["value"] == "mean probability, no majority"


def test_a_python_function_rates_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "g.jsonl", ["q=0.25", "q=0.75", "nothing"], model="m", step="7")
    output, scores = tmp_path / "results" / "rate.json", tmp_path / "own" / "scores.jsonl"
    criterion = "criterion_functions:quality"
    main(["rate", str(path), "--criteria", criterion, "--output", str(output), "--scores", str(scores)])
    values = [json.loads(line) for line in scores.read_text().splitlines()]
    assert values == [
        {"index": i, "document": f"0:{i}", "scores": {criterion: value}} for i, value in enumerate((0.25, 0.75, None))
    ]
    found = read_results(output)
    assert (found.about["model"], found.about["step"]) == ("m", "7")
    [one] = found.results
    assert (one.measure, one.dataset) == ("criterion_functions:quality", "documents")
    assert (one.value, one.samples, one.failed) == (0.5, 2, 1)
    assert "2 generations, 1 without a verdict" in capsys.readouterr().out


def test_a_continuation_that_ended_is_judged_with_its_end_whatever_its_model_calls_it() -> None:
    ended, cut = (Generation(0, "0:0", "p", "s", "t", [7, 49], finish).candidate for finish in ("stop", "length"))
    assert ended.ids[-1] == ENDED
    assert cut.ids[-1] != ENDED
    assert (ended.truncated, cut.truncated) == (False, True)


def test_judging_needs_a_judge_and_a_criterion_of_continuations(tmp_path: Path) -> None:
    path = str(write(tmp_path / "g.jsonl", ["a"]))
    for words, message in (
        ([], "--teacher-url"),
        (["--criteria", "label=1"], "--criteria label: .*--tasks judgements"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["compare", path, path, *words])


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    base, model = write(tmp_path / "base.jsonl", ["a", "b"]), write(tmp_path / "model.jsonl", ["a"])
    with pytest.raises(SystemExit, match=r"2 generations, .*model\.jsonl 1"):
        main(["compare", str(base), str(model), "--teacher-url", "http://127.0.0.1:1"])
    other = write(tmp_path / "other.jsonl", ["a"])
    other.write_text(other.read_text().replace("Text 0", "Else"))
    with pytest.raises(SystemExit, match="task 0 has another prefix"):
        main(["compare", str(model), str(other), "--teacher-url", "http://127.0.0.1:1"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"dataset": "toxigen"}, "dataset standard, .* toxigen: .*--dataset"),
        ({"sampling": {"max_new_tokens": 64}}, "max_new_tokens': 128.* 64.*--suffix-length"),
        ({"sampling": {"max_new_tokens": 128, "temperature": 1.0}}, "temperature': 1.0.*--temperature"),
    ],
)
def test_generations_that_were_made_otherwise_are_not_compared(
    tmp_path: Path, header: dict[str, Any], message: str
) -> None:
    own = {"dataset": "standard", "sampling": {"max_new_tokens": 128}}
    base, model = write(tmp_path / "b.jsonl", ["a"], **own), write(tmp_path / "m.jsonl", ["b"], **(own | header))
    with pytest.raises(SystemExit, match=message):
        main(["compare", str(base), str(model), "--teacher-url", "http://127.0.0.1:1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["generate", "--url", "http://127.0.0.1:1", "--data-path", "x", "--output", "y", "--samples", "1"],
            "--tokenizer",
        ),
        (
            ["generate", "--model", "nowhere", "--data-path", "x", "--output", "y", "--samples", "1"],
            "neither an HF folder .* nor a checkpoint",
        ),
        (["generate", "--model", "x", "--data-path", "x", "--output", "y", "--samples", "0"], "--samples 0"),
        (
            ["generate", "--model", "x", "--set", "toxigen=f", "--output", "y", "--num-rollouts", "0"],
            "--num-rollouts 0",
        ),
        (["diversity", "nowhere.jsonl"], r"nowhere\.jsonl"),
        (["compare", "a", "b", "--criteria", "safety"], "--criteria safety: .*`rate` does that"),
        (["compare", "a", "b", "--criteria", "factuality:v4"], "--criteria factuality:v4: .*`rate` does that"),
        (["compare", "a", "b", "--criteria", "criterion_functions:quality"], "`rate` does that"),
        (["compare", "a", "b", "--criteria", "factscore", "halueval"], "both are results called factuality"),
        (["rate", "a", "--criteria", "factuality:v4", "factuality:v3"], "both are results called factuality"),
        (["compare", "a", "b", "--criteria", "quality=7"], "quality=7: .*leave the weight out"),
        (["compare", "a", "b", "--judge-votes", "3"], "--judge-votes 3: .*even number"),
        (["compare", "a", "b", "--judge-verdict", "qualiti=soft"], "--judge-verdict qualiti=soft: .*names quality"),
        (["rate", "a", "--judge-verdict", "factuality:v4=hard"], "factuality:v4=hard: --criteria names safety"),
        (
            ["rate", "a", "--judge-verdict", "soft", "--judge-votes", "3", "--teacher-url", "http://x"],
            "--judge-votes: of no effect where no verdict is written",
        ),
        (
            ["rate", "a", "--criteria", "criterion_functions:quality", "--teacher-url", "http://x"],
            "--teacher-url: of no effect with Python functions",
        ),
        (["rate", "a", "--criteria-timeout", "3", "--teacher-url", "http://x"], "--criteria-timeout: of no effect"),
        (["rate", "a", "--criteria", "quality"], "--criteria quality: .*compare asks that"),
        (["rate", "a", "--criteria", "likelihood"], "nll measures that"),
        (["nll", "--model", "x", "--data-path", "x", "--output", "y"], "--samples: how many"),
        (["generate", "--model", "x", "--data-path", "x", "--output", "y"], "--samples: how many"),
    ],
)
def test_mistakes_name_what_would_be_right(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(words)


@pytest.mark.parametrize("command", ["compare", "rate"])
def test_flags_that_choose_pairs_are_no_flags_of_an_evaluation(command: str) -> None:
    texts = ["a", "b"] if command == "compare" else ["a"]
    for flag in (
        ["--judge-schedule", "pivot"],
        ["--judge-both-orders"],
        ["--judge-degree", "2"],
        ["--judge-audit-rate", "1"],
    ):
        with pytest.raises(SystemExit):
            command_line().parse_args([command, *texts, *flag])


GENERATE = ("generate", "--model", "x", "--output", "y")
OF_SET = (*GENERATE, "--set", "toxigen=f")
OF_DOCUMENTS = (*GENERATE, "--data-path", "d", "--samples", "1")
NLL = ("nll", "--model", "x", "--output", "y", "--data-path", "d", "--samples", "1")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((*OF_SET, "--split", "1,1,1", "--part", "valid"), "--split, --part"),
        ((*OF_SET, "--subset", "policy"), "--subset"),
        ((*OF_SET, "--text-field", "t", "--min-prefix-length", "3"), "--text-field, --min-prefix-length"),
        ((*OF_SET, "--task-mode", "stream"), "--task-mode"),
        ((*OF_SET, "--wikipedia", "w"), "--wikipedia"),
        ((*OF_SET, "--top-p", "0.9", "--num-rollouts", "2"), "--top-p, --num-rollouts"),
        ((*OF_DOCUMENTS, "--wikipedia", "w"), "--wikipedia"),
        ((*NLL, "--of", "document", "--suffix-length", "9"), "--suffix-length"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(SystemExit, match=f"{named}: of no effect with"):
        main(words)


@pytest.mark.parametrize("words", [(*OF_DOCUMENTS, "--seq-length", "20"), (*OF_SET, "--suffix-length", "0")])
def test_impossible_lengths_are_told_in_a_line(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match=r"--suffix-length|max_new_tokens"):
        main(words)


@pytest.mark.parametrize("fault", [ValueError("ours"), RuntimeError("ours")])
def test_a_fault_of_our_own_is_no_mistake_of_the_user_s(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise fault

    monkeypatch.setattr("megatron_sip.evaluation.commands.sets.run", fails)
    with pytest.raises(type(fault), match="ours"):
        main(["sets"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "g.jsonl:1 is not a generation"),
        (b"[]\n", "no file of generations"),
        (b'{"format": "%b"}\n{"text": "a"}\n' % FORMAT.encode(), "missing"),
        (
            b'{"format": "%b"}\n{"index": 0, "document": 1, "prefix": "", "suffix": "", "text": 5, "ids": [], '
            % FORMAT.encode()
            + b'"finish_reason": "stop"}\n',
            "generation 0: .*are texts",
        ),
    ],
)
def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "g.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        main(["diversity", str(tmp_path / "g.jsonl")])


@pytest.mark.parametrize("about", ["[]", "7", "null"])
def test_results_about_nothing_are_named(tmp_path: Path, about: str) -> None:
    (tmp_path / "a.json").write_text(f'{{"format": "megatron-sip results 1", "about": {about}, "results": []}}')
    with pytest.raises(SystemExit, match=r"a\.json is not a file of results"):
        main(["table", str(tmp_path)])


def test_documents_need_no_room_for_a_suffix(tmp_path: Path) -> None:
    """--suffix-length says nothing of whole documents: the model is what is asked for next."""
    for length, message in (("64", "neither an HF folder"), ("1", "--seq-length 1: must be at least 2")):
        with pytest.raises(SystemExit, match=message):
            main([*NLL, "--of", "document", "--seq-length", length])
