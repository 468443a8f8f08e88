"""tools/preprocess_data.py: every input has an output of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_tokenizer import byte_level_tokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from preprocess_data import main, output_prefixes, parse_arguments, preprocess

from megatron_sip.data.token_store import TokenStore, idx_path
from megatron_sip.errors import DataError

TOKENIZER = byte_level_tokenizer()


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write(path: Path, *texts: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run(tokenizer: str, prefix: Path, *arguments: str) -> None:
    preprocess(parse_arguments(["--tokenizer", tokenizer, "--output-prefix", str(prefix), "--input", *arguments]))


def texts(prefix: Path) -> list[str]:
    store = TokenStore(prefix)
    return [TOKENIZER.decode(store[i].tolist(), skip_special_tokens=True) for i in range(len(store))]


def test_files_of_one_name_in_two_folders_keep_their_own_output(tmp_path: Path, tokenizer: str) -> None:
    inputs = [write(tmp_path / folder / "x.jsonl", f"text of {folder}") for folder in ("a", "b/c")]
    run(tokenizer, tmp_path / "out", *inputs)
    assert texts(tmp_path / "out_a_x") == ["text of a"]
    assert texts(tmp_path / "out_b_c_x") == ["text of b/c"]


def test_names_that_differ_after_a_dot_keep_their_own_output(tmp_path: Path, tokenizer: str) -> None:
    run(tokenizer, tmp_path / "out", *(write(tmp_path / f"web.{year}.jsonl", year) for year in ("2023", "2024")))
    assert [texts(tmp_path / f"out_web.{year}") for year in ("2023", "2024")] == [["2023"], ["2024"]]


def test_outputs_that_would_overwrite_each_other_are_refused() -> None:
    for names in (("a/x.jsonl", "a/x.jsonl.gz"), ("a/x.jsonl", "b/x.jsonl", "a_x.jsonl")):
        paths = [Path("/data") / name for name in names]
        with pytest.raises(DataError, match=r"/data/a/x\.jsonl and .* would both become out_.*x: .* --output-prefix"):
            output_prefixes(Path("out"), paths)


def test_an_output_that_exists_is_found_before_anything_is_tokenised(tmp_path: Path, tokenizer: str) -> None:
    inputs = [write(tmp_path / f"{name}.jsonl", name) for name in "ab"]
    run(tokenizer, tmp_path / "out", *inputs)
    idx_path(tmp_path / "out_a").unlink()
    write(tmp_path / "b.jsonl", "another b")
    with pytest.raises(DataError, match=r"out_b\.idx exists, and is not known to be made of this; pass --overwrite"):
        run(tokenizer, tmp_path / "out", *inputs)
    assert not idx_path(tmp_path / "out_a").exists()
    run(tokenizer, tmp_path / "out", *inputs, "--overwrite")
    assert texts(tmp_path / "out_a") == ["a"]


def test_the_same_command_after_a_kill_does_what_is_left(tmp_path: Path, tokenizer: str) -> None:
    inputs = [write(tmp_path / f"{name}.jsonl", name) for name in "abc"]
    run(tokenizer, tmp_path / "out", *inputs)
    for name in "bc":
        idx_path(tmp_path / f"out_{name}").unlink()
    before = idx_path(tmp_path / "out_a").stat().st_mtime_ns
    run(tokenizer, tmp_path / "out", *inputs)
    assert [texts(tmp_path / f"out_{name}") for name in "abc"] == [["a"], ["b"], ["c"]]
    assert idx_path(tmp_path / "out_a").stat().st_mtime_ns == before
    for other in (("--no-append-eos",), ("--text-field", "body"), ("--prepend-bos", "on")):
        with pytest.raises(DataError, match="is not known to be made of this"):
            run(tokenizer, tmp_path / "out", *inputs, *other)


def test_a_broken_input_leaves_nothing_but_the_outputs_before_it(tmp_path: Path, tokenizer: str) -> None:
    good, bad = write(tmp_path / "a.jsonl", "text"), tmp_path / "b.jsonl"
    bad.write_text('{"text": "text"}\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2"):
        run(tokenizer, tmp_path / "out" / "t", good, str(bad))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"t_a.bin", "t_a.idx", "t_a.made_of"}


def test_a_linked_blob_takes_the_name_of_its_link(tmp_path: Path, tokenizer: str) -> None:
    blob = Path(write(tmp_path / "blobs" / "0a1b", "linked"))
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).symlink_to(blob if name == "one.jsonl" else write(tmp_path / "blobs" / "2c3d", "other"))
    run(tokenizer, tmp_path / "out", str(tmp_path / "*.jsonl"))
    assert texts(tmp_path / "out_one") == ["linked"]
    assert texts(tmp_path / "out_two") == ["other"]


def test_weights_and_token_files_are_no_input(tmp_path: Path, tokenizer: str) -> None:
    source = write(tmp_path / "a.jsonl", "x")
    with pytest.raises(DataError, match="--input takes no weights"):
        run(tokenizer, tmp_path / "out", "0.5", source)
    run(tokenizer, tmp_path / "out", source)
    with pytest.raises(DataError, match="out is tokenised already; --input takes text"):
        run(tokenizer, tmp_path / "again", str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"--input: no such file: '.*none\.jsonl'"):
        run(tokenizer, tmp_path / "out", str(tmp_path / "none.jsonl"))


def test_the_command_writes_a_line_for_each_input(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", write(tmp_path / "a.jsonl", "one", "", "two"), "--tokenizer", tokenizer]
    arguments += ["--output-prefix", str(tmp_path / "out" / "train")]
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *arguments])
    main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["documents"], line["empty_documents"]) == (2, 1)
    assert line["prefix"] == str(tmp_path / "out" / "train")
    main()
    assert "its tokens are in" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *arguments, "--no-append-eos"])
    with pytest.raises(
        SystemExit, match=r"error: .*train\.idx exists, and is not known to be made of this; pass --overwrite"
    ):
        main()
