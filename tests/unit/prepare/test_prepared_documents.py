"""Documents of a role: whole, once, in a file for each split, so that what a policy is trained on is nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
from prepare_cases import files_below, prose, read_lines, run, write_documents

from megatron_sip.data.roles import SPLITS

SHARES = ("--role-shares", "1,1,1", "--split", "2,1,1")


def test_the_policy_s_documents_are_no_other_role_s_and_each_split_has_a_file(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 60)
    roles = ("policy", "judge", "rewriter")
    for role in roles:
        run("documents", "--role", role, "--data-path", data, *SHARES, "--out", tmp_path / role)
    rules = ("--task", "quality", "--corrupt", "shuffle", "--no-cut")
    run("judgements", *rules, "--data-path", data, *SHARES, "--out", tmp_path / "judgements")
    found = {
        (role, split): {record["text"] for record in read_lines(tmp_path / role / f"{split}.jsonl")}
        for role in roles
        for split in SPLITS
    }
    assert all(found.values())
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 60
    assert set().union(*found.values()) == {prose(i) for i in range(60)}
    judged = read_lines(tmp_path / "judgements" / "judgements.jsonl")
    for split in SPLITS:
        assert {one["suffix"] for one in judged if one["split"] == split} <= found["judge", split]


def test_documents_keep_their_subset_and_the_manifest_counts_them(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "reports.jsonl", 20)
    words = ("documents", "--data-path", data, *SHARES, "--out", tmp_path / "out")
    manifest = run(*words)
    records = [record for split in SPLITS for record in read_lines(tmp_path / "out" / f"{split}.jsonl")]
    assert {record["subset"] for record in records} == {"reports"}
    assert manifest["records"]["total"] == manifest["documents"]["used"] == len(records) > 0
    assert "by_label" not in manifest["records"]
    before = files_below(tmp_path / "out")
    assert run(*words) == manifest
    assert files_below(tmp_path / "out") == before


@pytest.mark.parametrize("flag", ["--prefix-field", "--label-field", "--tokenizer"])
def test_what_documents_have_no_use_for_is_no_flag_of_theirs(flag: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run("documents", "--data-path", tmp_path, flag, "x", "--out", tmp_path)
