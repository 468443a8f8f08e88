"""Pairs of originals and spoilt suffixes: both orders, right verdicts, counted drops, disjoint roles, any format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prepare_cases import files_below, prose, read_lines, run, tokenizer_folder, write_documents, write_records

from megatron_sip.judge.prompts import builtin_prompt
from megatron_sip.prepare.rules import RULES
from megatron_sip.prepare.settings import PrepareError

SHORT_PROMPT = Path(__file__).parents[3] / "examples" / "short_quality.txt"
LENGTHS = ("--seq-length", "160", "--suffix-length", "64", "--min-prefix-length", "8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def quality(tokenizer: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    words = ("judgements", "--task", "quality", "--data-path", data, "--tokenizer", tokenizer, "--out", out)
    shares = () if "--role-shares" in more else ("--role-shares", "0,1,0")
    rules = () if "--corrupt" in more else ("--corrupt", "shuffle")
    return run(*words, *LENGTHS, *shares, *rules, *more)


def test_each_pair_is_shown_in_both_orders_with_the_original_s_label(tokenizer: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 40)
    words = (
        "judgements",
        "--task",
        "quality",
        "--data-path",
        data,
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "out",
    )
    manifest = run(*words, *LENGTHS, "--role-shares", "0,1,0", "--corrupt", *RULES)
    records = read_lines(tmp_path / "out" / "judgements.jsonl")
    pairs: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        pairs.setdefault(record["pair"], []).append(record)
        assert record["option_1" if record["verdict"] == "1" else "option_2"] == record["suffix"]
        assert record["option_1"] != record["option_2"]
        assert any(record["prefix"] + record["suffix"] in prose(i) for i in range(40))
        assert record["criterion"] == "quality"
        assert record["subset"].split("/")[0] == "reports"
    assert len(pairs) == 40
    for first, second in pairs.values():
        assert (first["option_1"], first["option_2"]) == (second["option_2"], second["option_1"])
        assert {first["verdict"], second["verdict"]} == {"1", "2"}
        assert first["split"] == second["split"]
    assert {record["subset"].split("/")[1] for record in records} == set(RULES)
    assert manifest["records"]["total"] == 80
    by_subset = Counter(record["subset"] for record in records)
    assert {name: sum(own.values()) for name, own in manifest["records"]["by_subset"].items()} == by_subset


def test_what_cannot_be_used_is_counted(tokenizer: Path, tmp_path: Path) -> None:
    texts = [prose(1), "", "   ", "short", "word " * 200]
    data = write_records(tmp_path / "some.jsonl", [{"text": text} for text in texts])
    manifest = quality(tokenizer, data, tmp_path / "out", "--corrupt", "numbers", "swap-entities")
    assert manifest["documents"]["read"] == 5
    assert manifest["dropped"] == {
        "empty": 2,
        "too-short": 1,
        "no-rule-applies": 1,
        "numbers": {"cannot-change": 1},
        "swap-entities": {"cannot-change": 1},
    }


def test_roles_share_no_document_and_together_have_them_all(tokenizer: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 60)
    found: dict[str, set[int]] = {}
    for role in ("policy", "judge", "rewriter"):
        quality(tokenizer, data, tmp_path / role, "--role", role, "--role-shares", "1,1,1", "--seq-length", "1000")
        texts = [r["prefix"] + r["suffix"] for r in read_lines(tmp_path / role / "judgements.jsonl")]
        found[role] = {i for i in range(60) if any(prose(i).startswith(text) for text in texts)}
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 60


def test_stream_mode_cuts_every_chunk_and_a_bound_ends_the_reading(tokenizer: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 30)
    manifest = quality(tokenizer, data, tmp_path / "out", "--task-mode", "stream", "--max-documents", "7")
    assert manifest["documents"]["used"] == 7
    assert manifest["records"]["total"] > 2 * 7


def test_pairs_may_be_asked_about_by_a_prompt_of_one_s_own(tokenizer: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 4)
    quality(tokenizer, data, tmp_path / "out", "--criterion", str(SHORT_PROMPT))
    assert {record["criterion"] for record in read_lines(tmp_path / "out" / "judgements.jsonl")} == {str(SHORT_PROMPT)}
    with pytest.raises(PrepareError, match="--criterion safety: a pairwise prompt with the verdicts 1 and 2 is needed"):
        quality(tokenizer, data, tmp_path / "other", "--criterion", "safety")


def test_a_prompt_file_is_found_from_any_folder(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 4)
    monkeypatch.chdir(SHORT_PROMPT.parent)
    quality(tokenizer, data, tmp_path / "out", "--criterion", SHORT_PROMPT.name)
    assert {record["criterion"] for record in read_lines(tmp_path / "out" / "judgements.jsonl")} == {str(SHORT_PROMPT)}


def test_unfinished_work_shows_no_file_of_records(tokenizer: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "short.jsonl", [{"text": "short"}])
    with pytest.raises(PrepareError, match="no record"):
        quality(tokenizer, data, tmp_path / "out")
    assert not list((tmp_path / "out").glob("made*"))
    assert (tmp_path / "out" / ".made.jsonl").exists()


def test_other_trainers_get_the_prompt_and_its_verdict(tokenizer: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 20)
    quality(tokenizer, data, tmp_path / "out", "--split", "1,1,0", "--format", "sip", "verl", "nemo-gym")
    records = read_lines(tmp_path / "out" / "judgements.jsonl")
    for split in ("train", "valid"):
        own = [record for record in records if record["split"] == split]
        rows = pq.read_table(tmp_path / "out" / "verl" / f"{split}.parquet").to_pylist()
        lines = read_lines(tmp_path / "out" / "nemo-gym" / f"{split}.jsonl")
        assert len(own) == len(rows) == len(lines) > 0
        for place, (record, row, line) in enumerate(zip(own, rows, lines, strict=True)):
            assert row["prompt"] == line["responses_create_params"]["input"]
            [message] = row["prompt"]
            assert message["role"] == "user"
            assert f"\n{record['option_1']}\n[end option 1 " in message["content"]
            assert row["reward_model"] == {"style": "rule", "ground_truth": record["verdict"]}
            assert (row["data_source"], row["ability"]) == ("megatron_sip/quality", "judging")
            assert (row["extra_info"]["index"], row["extra_info"]["pair"]) == (place, record["pair"])
            assert line["expected_answer"] == record["verdict"]
            rule = builtin_prompt("quality").rule
            assert rule is not None
            assert line["template_metadata"]["output_regex"] == f"(?i){rule.pattern.pattern}"
    assert pq.read_table(tmp_path / "out" / "verl" / "test.parquet").num_rows == 0


def test_the_same_again_changes_nothing_and_something_else_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 10)
    first = quality(tokenizer, data, tmp_path / "out")
    before = files_below(tmp_path / "out")
    assert quality(tokenizer, data, tmp_path / "out") == first
    assert files_below(tmp_path / "out") == before
    with pytest.raises(PrepareError, match="differs in reading"):
        quality(tokenizer, data, tmp_path / "out", "--seed", "5")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(PrepareError, match=r"already holds notes\.txt"):
        quality(tokenizer, data, tmp_path / "full")


def test_weights_of_files_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 3)
    with pytest.raises(PrepareError, match="weights mean nothing"):
        run(
            "judgements",
            "--task",
            "quality",
            "--data-path",
            "0.5",
            data,
            "--no-cut",
            "--out",
            tmp_path,
            "--corrupt",
            "repeat",
        )


def test_nothing_made_is_an_error_that_says_why(tokenizer: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "short.jsonl", [{"text": "short"}])
    with pytest.raises(PrepareError, match="dropped/too-short: 1"):
        quality(tokenizer, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--corrupt", "teacher"), "--teacher-url is needed"),
        (("--suffix-length", "500"), "--suffix-length 500"),
        (("--split", "x"), "--split 'x'"),
        (("--tokenizer", "nowhere"), "--tokenizer nowhere"),
    ],
)
def test_mistakes_name_their_flag(tokenizer: Path, tmp_path: Path, more: tuple[str, ...], told: str) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 3)
    with pytest.raises(ValueError, match=told):
        quality(tokenizer, data, tmp_path / "out", *more)
