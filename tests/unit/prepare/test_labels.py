"""Safe or not: unanimous votes of a judge, or the documents' own labels; balanced, counted, never guessed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge, truthful_answer
from prepare_cases import ask, files_below, prose, read_lines, run, tokenizer_folder, write_records
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.prepare.settings import PrepareError

EVERYTHING = ("--role-shares", "0,1,0", "--role", "judge", "--no-cut")


def texts(count: int, unsafe_every: int = 4) -> list[dict[str, Any]]:
    """Every so many is unsafe, by its text and by its label."""
    marks = [i % unsafe_every == 0 for i in range(count)]
    return [{"text": prose(i, 2) + " unsafe" * bad, "toxic": "yes" if bad else "no"} for i, bad in enumerate(marks)]


async def test_eight_of_eight_votes_label_a_text_and_labels_are_balanced(tmp_path: Path) -> None:
    data = write_records(tmp_path / "texts.jsonl", texts(40))
    words = ("judgements", "--task", "safety", "--data-path", data, *EVERYTHING, "--out", tmp_path / "out")
    async with FakeJudge() as judge:
        manifest = await ask(judge, *words, "--split", "1")
        assert {body["n"] for body in judge.bodies} == {8}
        asked = judge.requests
        assert await ask(judge, *words, "--split", "1") == manifest
        assert judge.requests == asked
    assert await ask(judge, *words, "--split", "1") == manifest  # nor is a server needed then
    records = read_lines(tmp_path / "out" / "judgements.jsonl")
    assert Counter(record["verdict"] for record in records) == {"YES": 10, "NO": 10}
    assert all(record["verdict"] == ("NO" if "unsafe" in record["candidate"] else "YES") for record in records)
    assert manifest["records"]["made"] == 40
    assert {record["criterion"] for record in records} == {"safety"}


async def test_votes_that_disagree_or_are_missing_make_no_record(tmp_path: Path) -> None:
    data = write_records(tmp_path / "texts.jsonl", texts(8))
    turns = itertools.count()

    def edits(body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        """One vote of every second answer is the other one; of every fourth there is none to read."""
        turn, message = next(turns), reply["choices"][3]["message"]
        if turn % 4 == 1:
            message["content"] = "FINAL DECISION: " + ("YES" if "NO" in message["content"] else "NO")
        if turn % 4 == 3:
            for choice in reply["choices"]:
                choice["message"]["content"] = "Hard to say."
        return reply

    async with FakeJudge(edits=edits) as judge:
        manifest = await ask(
            judge,
            *("judgements", "--task", "safety", "--data-path", data, *EVERYTHING, "--unbalanced"),
            *("--out", tmp_path / "out", "--judge-concurrency", "1"),
        )
    dropped = manifest["dropped"]
    assert dropped["votes-disagree"] > 0
    assert manifest["records"]["total"] + sum(dropped.values()) == 8


def test_labels_of_the_documents_need_no_judge(tmp_path: Path) -> None:
    records = [*texts(20), {"text": prose(99)}, {"text": prose(98), "toxic": None}]
    data = write_records(tmp_path / "texts.jsonl", records)
    label = ("--label-field", "toxic", "--safe-labels", "no", "--unsafe-labels", "yes")
    words = ("rewrites", "--data-path", data, "--no-cut", "--role-shares", "0,0,1", *label, "--split", "1")
    manifest = run(*words, "--out", tmp_path / "all")
    made = read_lines(tmp_path / "all" / "rewrites.jsonl")
    assert Counter(record["safe"] for record in made) == {True: 15, False: 5}
    assert all(record["safe"] == ("unsafe" not in record["suffix"]) for record in made)
    assert manifest["dropped"] == {"no-label": 2}
    run(*words, "--out", tmp_path / "even", "--balance", "--format", "sip", "verl", "nemo-gym")
    even = read_lines(tmp_path / "even" / "rewrites.jsonl")
    assert Counter(record["safe"] for record in even) == {True: 5, False: 5}
    lines = read_lines(tmp_path / "even" / "nemo-gym" / "train.jsonl")
    assert [line["metadata"]["safe"] for line in lines] == [record["safe"] for record in even]
    assert all(
        even[i]["suffix"].split()[0] in lines[i]["responses_create_params"]["input"][0]["content"] for i in range(10)
    )


def test_records_that_are_cut_already_keep_their_prefix(tmp_path: Path) -> None:
    rows = [{"before": f"Beginning {i} and", "after": f" end {i}.", "ok": i % 2 == 0} for i in range(6)]
    data = write_records(tmp_path / "cut.jsonl", rows)
    fields = ("--text-field", "after", "--prefix-field", "before", "--label-field", "ok")
    run("rewrites", "--data-path", data, *fields, "--role-shares", "0,0,1", "--out", tmp_path / "out")
    made = read_lines(tmp_path / "out" / "rewrites.jsonl")
    assert [(r["prefix"], r["suffix"], r["safe"]) for r in made] == [(r["before"], r["after"], r["ok"]) for r in rows]


def test_continuations_of_one_prefix_are_one_role_s_and_in_one_split(tmp_path: Path) -> None:
    rows = [{"before": f"Beginning {i // 40} and", "after": f" end {i}.", "ok": True} for i in range(480)]
    data = write_records(tmp_path / "cut.jsonl", rows)
    fields = ("--text-field", "after", "--prefix-field", "before", "--label-field", "ok")
    shares = ("--role-shares", "1,1,1", "--split", "1,1,1")
    found = Counter[tuple[str, str, str]]()
    for role in ("policy", "judge", "rewriter"):
        run("rewrites", "--data-path", data, *fields, *shares, "--role", role, "--out", tmp_path / role)
        made = read_lines(tmp_path / role / "rewrites.jsonl")
        found += Counter((record["prefix"], role, record["split"]) for record in made)
    assert list(found.values()) == [40] * 12


def test_records_without_any_prefix_go_by_their_text(tmp_path: Path) -> None:
    rows = [{"before": "", "after": f"Text {i}.", "ok": True} for i in range(60)]
    data = write_records(tmp_path / "cut.jsonl", rows)
    fields = ("--text-field", "after", "--prefix-field", "before", "--label-field", "ok")
    manifest = run("rewrites", "--data-path", data, *fields, "--role-shares", "1,0,1", "--out", tmp_path / "out")
    assert 15 < manifest["documents"]["used"] < 45


def test_subsets_are_called_after_a_field_and_broken_characters_are_replaced(tmp_path: Path) -> None:
    """Fields inside objects too; half a surrogate pair, which JSON can spell, could not be written."""
    rows = [
        {"text": f"Text {i}.", "before": "a\ud800", "ok": True, "meta": {"set": "wiki" if i % 2 else "book"}}
        for i in range(4)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ("--prefix-field", "before", "--label-field", "ok", "--subset-field", "meta.set")
    manifest = run("rewrites", "--data-path", data, *fields, "--role-shares", "0,0,1", "--out", tmp_path / "out")
    made = read_lines(tmp_path / "out" / "rewrites.jsonl")
    assert [record["subset"] for record in made] == ["book", "wiki"] * 2
    assert {record["prefix"] for record in made} == {"a?"}
    assert manifest["records"]["by_subset"].keys() == {"book", "wiki"}


def test_truth_values_may_be_named_as_json_spells_them(tmp_path: Path) -> None:
    data = write_records(tmp_path / "texts.jsonl", [{"text": prose(i), "toxic": i % 2 == 0} for i in range(6)])
    words = ("rewrites", "--data-path", data, "--no-cut", "--role-shares", "0,0,1", "--label-field", "toxic")
    run(*words, "--safe-labels", "false", "--unsafe-labels", "true", "--out", tmp_path / "out")
    assert [record["safe"] for record in read_lines(tmp_path / "out" / "rewrites.jsonl")] == [False, True] * 3


def test_a_split_with_one_label_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"text": prose(i), "ok": True} for i in range(40)]
    words = ("--no-cut", "--role-shares", "0,0,1", "--split", "1,1", "--label-field", "ok", "--out")
    first = write_records(tmp_path / "first.jsonl", rows)
    run("rewrites", "--data-path", first, *words, tmp_path / "all")
    splits = [record["split"] for record in read_lines(tmp_path / "all" / "rewrites.jsonl")]
    mixed = [
        row | {"ok": split == "valid" or i % 4 > 0} for i, (row, split) in enumerate(zip(rows, splits, strict=True))
    ]
    data = write_records(tmp_path / "mixed.jsonl", mixed)
    manifest = run("rewrites", "--data-path", data, "--balance", *words, tmp_path / "out")
    unsafe = sum(not row["ok"] for row in mixed)
    train = splits.count("train")
    assert manifest["records"]["by_label"] == {label: {"train": unsafe} for label in ("True", "False")}
    assert manifest["records"]["left_out_to_balance"] == {"True": {"train": train - 2 * unsafe, "valid": 40 - train}}


def test_of_rewrites_it_is_balance_that_may_be_left_out(tmp_path: Path) -> None:
    data = write_records(tmp_path / "texts.jsonl", [{"text": prose(i), "ok": True} for i in range(5)])
    words = ("rewrites", "--data-path", data, "--no-cut", "--label-field", "ok", "--role-shares", "0,0,1")
    with pytest.raises(PrepareError, match=r"all 5 records have safe = True.*leave out --balance"):
        run(*words, "--balance", "--out", tmp_path / "out")


@pytest.mark.parametrize("count", [-1, 0])
def test_fewer_documents_than_one_are_refused(tmp_path: Path, count: int) -> None:
    data = write_records(tmp_path / "texts.jsonl", texts(4))
    with pytest.raises(PrepareError, match=f"--max-documents {count}: at least 1"):
        run("rewrites", "--no-cut", "--data-path", data, "--max-documents", str(count), "--out", tmp_path / "out")


def test_records_that_cannot_be_balanced_are_not_lost(tmp_path: Path) -> None:
    data = write_records(tmp_path / "texts.jsonl", [{"text": prose(i), "ok": True} for i in range(5)])
    words = ("judgements", "--task", "safety", "--data-path", data, *EVERYTHING, "--label-field", "ok")
    words = (*words, "--out", tmp_path / "out")
    with pytest.raises(PrepareError, match="all 5 records have verdict = YES"):
        run(*words)
    manifest = run(*words, "--unbalanced", "--format", "sip", "verl")
    assert manifest["records"]["total"] == 5
    assert manifest["documents"]["read"] == 5
    with pytest.raises(PrepareError, match="differs in balance, formats"):
        run(*words)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--label-field", "toxic"), "record 1: the label 'yes' .* --safe-labels"),
        ((), "--teacher-url is needed"),
        (("--label-field", "toxic", "--safe-labels", "no", "yes"), "safe = True"),
    ],
)
def test_labels_that_say_nothing_are_named(tmp_path: Path, more: tuple[str, ...], told: str) -> None:
    data = write_records(tmp_path / "texts.jsonl", texts(4))
    balance = ("--balance",) if "--safe-labels" in more else ()
    words = ("rewrites", "--data-path", data, "--no-cut", "--role-shares", "0,0,1", *more, *balance)
    with pytest.raises(PrepareError, match=told):
        run(*words, "--out", tmp_path / "out")


@pytest.mark.parametrize("command", [("rewrites",), ("judgements", "--task", "safety")])
def test_a_label_is_no_piece_s(tmp_path: Path, command: tuple[str, ...]) -> None:
    data = write_records(tmp_path / "texts.jsonl", texts(4))
    words = (
        *command,
        "--data-path",
        data,
        "--tokenizer",
        tmp_path,
        "--label-field",
        "toxic",
        "--out",
        tmp_path / "out",
    )
    with pytest.raises(PrepareError, match=r"--label-field toxic.*--no-cut, or --prefix-field"):
        run(*words)


async def test_a_teacher_s_spoilt_version_is_read_after_its_mark_or_counted(tmp_path: Path) -> None:
    data = write_records(tmp_path / "texts.jsonl", [{"text": prose(i, 2)} for i in range(24)])

    def answer(prompt: str) -> str:
        original = prompt.split("[begin continuation")[1].split("\n")[1]
        match int(original.split()[1].strip(".")) % 6:
            case 0:
                return f"I make it false.\n\nMODIFIED CONTINUATION:\n{original.replace('Report', 'Novel')}"
            case 1:
                return "No mark here."
            case 2:
                return f"MODIFIED CONTINUATION:\n{original}"
            case 3:
                return "MODIFIED CONTINUATION: Too short."
            case 4:
                return "I'm sorry, but I can't help with that."
        return f"**MODIFIED CONTINUATION:**\n\n{original.replace('bridge', 'tower')} Twice."

    async with FakeJudge(answer=answer) as judge:
        manifest = await ask(
            judge,
            *("judgements", "--task", "quality", "--data-path", data, *EVERYTHING),
            *("--corrupt", "teacher", "--out", tmp_path / "out"),
        )
    records = read_lines(tmp_path / "out" / "judgements.jsonl")
    assert len(records) == 2 * 8
    assert all(record["subset"] == "texts/teacher" for record in records)
    spoilt = [record["option_2"] for record in records if record["verdict"] == "1"]
    assert sum("Novel" in text for text in spoilt) == 4
    assert manifest["dropped"]["teacher"] == {"no-mark": 4, "unchanged": 4, "other-length": 4, "refused": 4}


async def test_a_spoilt_version_breaks_off_where_a_continuation_does(tmp_path: Path) -> None:
    rows = [{"before": f"Report {i} says:", "after": prose(i, 2)[:80]} for i in range(6)]
    data = write_records(tmp_path / "cut.jsonl", rows)
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")

    def answer(prompt: str) -> str:
        original = prompt.split("[begin continuation")[1].split("\n")[1]
        return f"MODIFIED CONTINUATION:\n{original.replace('e', 'o')} And so it goes on, to a good end."

    async with FakeJudge(answer=answer) as judge:
        fields = (
            "--text-field",
            "after",
            "--prefix-field",
            "before",
            "--tokenizer",
            tokenizer,
            "--role-shares",
            "0,1,0",
        )
        words = ("judgements", "--task", "quality", "--data-path", data, *fields, "--corrupt", "teacher")
        await ask(judge, *words, "--out", tmp_path / "out")
    lengths = [
        [len(byte_level_tokenizer().encode(record[name])) for name in ("suffix", "option_2")]
        for record in read_lines(tmp_path / "out" / "judgements.jsonl")
        if record["verdict"] == "1"
    ]
    assert len(lengths) == 6
    assert all(abs(spoilt - original) <= 2 for original, spoilt in lengths)


async def test_what_the_judge_answered_is_not_asked_again_after_a_stop(tmp_path: Path) -> None:
    """The cache stands with the records; a folder without progress goes on from it."""
    data = write_records(tmp_path / "texts.jsonl", texts(12))
    words = ("judgements", "--task", "safety", "--data-path", data, *EVERYTHING, "--out", tmp_path / "out")
    async with FakeJudge(answer=truthful_answer) as judge:
        await ask(judge, *words)
        made, asked = files_below(tmp_path / "out"), judge.requests
        for name in made:
            (tmp_path / "out" / name).unlink()
        await ask(judge, *words)
        assert judge.requests == asked
    assert files_below(tmp_path / "out") == made
