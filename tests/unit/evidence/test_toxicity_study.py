"""evidence/toxicity.py: its text is apart, its commands are understood, and its report and page are what its files say."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_cases import understood
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import byte_level_tokenizer
from transformers import LlamaConfig

from evidence import toxicity_report
from evidence.study import ROOT, Place, StudyError, is_done
from evidence.toxicity import PREFIXES_A_STEP, STUDY, folder, folders, parts
from evidence.toxicity_page import direction, draw, section, widened
from evidence.toxicity_report import CRITERIA, DPO, INITIAL, TEXTS, compared, distinct_change, interval, nats
from evidence.toxicity_text import MANIFEST, PREFIX, SEED, SUFFIX, is_held_out, write_safest
from evidence.toxicity_text import parts as text_parts
from megatron_sip.data.documents import open_splits
from megatron_sip.data.tasks import TaskSettings, TaskSource
from megatron_sip.data.tokenization import TokenizeSettings
from megatron_sip.evaluation.generation import FORMAT
from megatron_sip.evaluation.results import Result, write_results
from megatron_sip.records import Task


def page(name: str, subset: str) -> dict[str, str]:
    return {"id": name, "text": f"The text of {name}", "subset": subset}


def test_held_out_pages_are_not_learnt() -> None:
    offensive, clean = ([page(f"{kind}:{i}", kind) for i in range(100)] for kind in ("offensive", "clean"))
    made = text_parts(offensive, clean)
    learnt = {one["text"] for one in made["train"]}
    assert not any(is_held_out(text) for text in learnt)
    assert {one["text"] for one in made["clean"]} == {one["text"] for one in clean if is_held_out(one["text"])}
    assert sum(one["subset"] == "offensive" for one in made["train"]) * 2 == len(made["train"])


def test_the_safest_pieces_are_what_a_run_with_long_prefixes_then_cuts(tmp_path: Path) -> None:
    """Each document of the store has one cut, whose suffix is the one that was judged: the half with the most letters a."""
    tokenizer = byte_level_tokenizer()
    words = ["banana cabana", "misty hills of", "a salad at sea", "tiny glyphs in"]
    pages = [
        {"text": " ".join([words[i % 4]] * 30) + f" {i}", "subset": ("clean", "offensive")[i % 2]} for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))

    def scores(texts: list[str]) -> list[float]:
        return [float(text.count("a")) for text in texts]

    counts = write_safest(tmp_path / "train.jsonl", tmp_path / "safest", tokenizer, 10, scores)
    assert counts == {"clean": 10}

    def tasks_of(path: Path, count: int) -> list[Task]:
        corpus = open_splits(["train"], [str(path)], "1,0,0", None, tokenizer, TokenizeSettings())["train"]
        return TaskSource(corpus, tokenizer, TaskSettings(PREFIX + SUFFIX, SUFFIX, "random", SEED, PREFIX)).tasks(
            0, count
        )

    def pieces(tasks: list[Task]) -> list[tuple[list[int], list[int]]]:
        return sorted((task.prefix_ids, task.suffix_ids) for task in tasks)

    drawn = tasks_of(tmp_path / "train.jsonl", 20)
    drawn.sort(key=lambda task: (-task.suffix_text.count("a"), task.index))
    assert pieces(tasks_of(tmp_path / "safest", 10)) == pieces(drawn[:10])


@pytest.fixture(name="place")
def place_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(ROOT)  # which presets' paths start from
    model = tmp_path / "model"
    byte_level_tokenizer().save_pretrained(model)
    LlamaConfig(vocab_size=320).save_pretrained(model)
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "leads.jsonl").write_text(json.dumps({"text": "A lead."}) + "\n")
    return Place(tmp_path / "run", seeds=(1, 2), smollm2=model, wiki_leads=tmp_path / "leads.jsonl")


def test_commands_are_understood_by_their_programs(place: Place) -> None:
    programs = understood(parts(place), place.smollm2, place.wiki_leads)
    assert programs[:3] == ["tools/fetch_toxicity.py", "tools/fetch_eval_sets.py", "evidence.toxicity_text"]
    assert (programs.count("megatron_sip"), programs.count("megatron_sip.evaluate")) == (4, 5 * 9)


def test_there_are_as_many_safest_pieces_as_the_run_takes() -> None:
    lines = (ROOT / "evidence" / "toxicity.args").read_text().splitlines()
    lengths = (f"--seq-length {PREFIX + SUFFIX}", f"--suffix-length {SUFFIX}", f"--global-batch-size {PREFIXES_A_STEP}")
    assert set(lengths) <= set(lines)


def test_an_evaluation_serves_the_model_that_the_training_before_it_leaves(place: Place) -> None:
    made = parts(place)
    for training, evaluation in zip(made[2::2], made[3::2], strict=True):
        assert evaluation.served is not None
        assert evaluation.served / "config.json" in training.results
        assert not is_done(evaluation, STUDY.folder(place))


PROMPTS, ROLLOUTS = 6, 2


def write_texts(path: Path, texts: list[str]) -> None:
    """As `generate` does, of PROMPTS prompts in turn."""
    rest = {"prefix": "", "suffix": "", "ids": [1], "finish_reason": "length"}
    lines = [{"index": i, "document": str(i % PROMPTS), "text": text, **rest} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"format": FORMAT}, *lines]))


def write_arm(out: Path, toxic: float, nats: float, right: int = 4, bland: bool = False) -> None:
    """Files of an arm: every second continuation of each prompt has the toxicity `toxic` by all judges, the others none; of 10
    passages the first `right` have the right end. bland: all continuations are the same."""
    out.mkdir(parents=True)
    for text in TEXTS:
        lines = [
            {"index": i, "document": str(i % PROMPTS), "scores": dict.fromkeys(CRITERIA, 1 - toxic * (i >= PROMPTS))}
            for i in range(PROMPTS * ROLLOUTS)
        ]
        (out / f"{text}.scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        shares = [Result("diversity", name, toxic, 12) for name in ("distinct_2", "repetition")]
        write_results(out / f"{text}.diversity.json", {"words": 10 * nats}, shares)
        texts = ["all the same" if bland else f"a{i} b{i} c{i}" for i in range(PROMPTS * ROLLOUTS)]
        write_texts(out / f"{text}.jsonl", texts)
    for text in ("pages", "leads"):
        rows: list[dict[str, Any]] = [{"format": "header"}]
        rows += [{"index": i, "document": str(i), "tokens": 1 + i, "nll": nats * (1 + i)} for i in range(4)]
        (out / f"{text}.nll.json.document.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"question": i, "prompt_hash": f"h{i}", "acc": float(i < right)} for i in range(10)]
    (out / "lambada.json.questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    steps = [{"step": step, **{f"chosen_{what}/rollout": 0.75 for what in ("rate", "chance")}} for step in (1, 2)]
    for step in steps:
        step |= {"rejected_rate/rollout": 0.9, "spread/evidence.criteria:civility": 0.3}
    (out / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


@pytest.fixture(name="report")
def report_of(place: Place) -> dict[str, Any]:
    arms = folders(place)
    for arm, toxic, cost in ((INITIAL, 0.5, 3.0), ("next token", 0.75, 2.9), ("safest suffixes", 0.5, 2.95)):
        write_arm(arms[arm][0], toxic, cost)
    for out, toxic in zip(arms[DPO], (0.25, 0.0), strict=True):
        write_arm(out, toxic, 3.25, right=1, bland=True)
    text = folder(place) / "text"
    text.mkdir()
    counts = {name: {"offensive": 7, "clean": 9} for name in ("train", "safest", "clean")}
    (text / MANIFEST).write_text(json.dumps(counts))
    return STUDY.report(place)


def test_a_report_holds_means_over_seeds_and_changes_from_the_initial_model(report: dict[str, Any]) -> None:
    initial, dpo = report["arms"][INITIAL], report["arms"][DPO]
    assert initial["prompts"]["civility"] == {"value": 0.25, "interval": [0.25, 0.25]}
    assert (dpo["prompts"]["civility"]["value"], dpo["prompts"]["civility"]["change"]) == (0.0625, -0.1875)
    assert dpo["prompts"]["civility"]["by_seed"] == [0.125, 0.0]
    assert dpo["clean"]["any"]["value"] == 0.125  # the worst continuation of each prompt: 0.25, and 0 of the other seed
    assert (dpo["nll"]["pages"]["value"], dpo["nll"]["pages"]["change"]) == (3.25, 0.25)
    assert dpo["nll"]["leads"]["change_interval"] == [0.25, 0.25]
    assert (initial["lambada"]["value"], dpo["lambada"]["value"], dpo["lambada"]["change"]) == (0.4, 0.1, -0.3)
    assert dpo["lambada"]["change_interval"][1] <= 0.0
    varied = dpo["diversity"]["prompts"]["distinct_2"]
    assert (varied["change"], varied["change_interval"]) == (
        -0.9167,
        [-0.9167, -0.9167],
    )  # 2 of 24 pairs of words, not all
    assert (initial["words"]["clean"], dpo["words"]["clean"]) == (30.0, 32.5)
    assert report["against"]["next token"]["prompts"]["civility"]["change"] == -0.3125
    assert report["against"]["safest suffixes"]["nll"]["pages"] == {"change": 0.3, "change_interval": [0.3, 0.3]}
    assert json.loads(json.dumps(report)) == report


def test_pieces_of_a_document_are_one_of_the_interval_s_items(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"format": "header"}]
    rows += [
        {"document": name, "tokens": count, "nll": nll}
        for name, count, nll in (("a", 1, 4.0), ("b", 2, 2.0), ("a", 3, 8.0))
    ]
    (tmp_path / "pages.nll.json.document.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values, tokens = nats([tmp_path], "pages")
    assert (values.tolist(), tokens.tolist()) == ([[3.0, 1.0]], [4.0, 2.0])


def test_page_and_figure_say_what_the_report_says(report: dict[str, Any], tmp_path: Path) -> None:
    widths = widened(report)["arms"][DPO]["prompts"]["civility"]["change_interval"]
    half = math.hypot(0.0625, 12.706 * 0.125 / 2)  # over prompts and seeds, and Student's over both seeds
    assert widths == pytest.approx([-0.1875 - half, -0.1875 + half], abs=1e-4)
    text = section(report).replace("\n", " ")
    assert "by its criterion: no difference that the interval shows." in text
    dpo = report["arms"][DPO]
    for found in (*dpo["prompts"].values(), *dpo["clean"].values(), dpo["diversity"]["prompts"]["distinct_2"]):
        found["by_seed"] = [found["value"]] * 2  # seeds that agree add nothing
    text = section(report).replace("\n", " ")
    arms = re.findall(r"\| (initial|next token|safest suffixes|DPO) \|", text)
    assert arms == ["initial", "next token", "safest suffixes", "DPO"] * 3
    assert "| DPO | 6.2 (-18.8, -25.0 to -12.5) | 12.5 (-37.5, -50.0 to -25.0) |" in text
    assert (
        "by what it was not trained by: LDNOOBW: less; severity list: less; hatesonar: less; by its criterion: less."
        in text
    )
    assert "Its nats a token: clean pages: more; Wikipedia leads: more." in text
    assert "LAMBADA: no difference that the interval shows; distinct-2 behind toxic prompts: less." in text
    assert "those of the safer half of pieces, by alt-profanity-check, 9 of clean and 7 of offensive pages" in text
    assert "| DPO less safest suffixes | -18.8 (-25.0 to -12.5) |" in text
    assert "chosen in 75% of DPO's groups, by chance 75%" in text
    draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_change_of_distinct_2_has_the_interval_of_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts from one source it holds 0 nearly always, and is as wide as what other draws of the prompts give."""
    monkeypatch.setattr(sys.modules[__name__], "PROMPTS", 60)
    rng = np.random.default_rng(7)
    found = []
    for _ in range(60):
        for name in ("one", "other"):
            (tmp_path / name).mkdir(exist_ok=True)
            texts = [" ".join(f"w{word}" for word in rng.zipf(1.5, 12) % 50) for _ in range(120)]
            write_texts(tmp_path / name / "prompts.jsonl", texts)
        found.append(distinct_change([tmp_path / "one"], [tmp_path / "other"], "prompts"))
    held = [each["change_interval"][0] <= 0 <= each["change_interval"][1] for each in found]
    widths = [each["change_interval"][1] - each["change_interval"][0] for each in found]
    assert sum(held) >= 52
    assert 0.8 < np.mean(widths) / (2 * 1.96 * np.std([each["change"] for each in found])) < 1.3


def test_one_seed_has_a_page_too(report: dict[str, Any], place: Place, tmp_path: Path) -> None:
    alone = json.loads(json.dumps(STUDY.report(replace(place, seeds=(1,)))))
    assert "it is the mean of 1 seed, the other arms" in section(alone).replace("\n", " ")
    draw(alone, tmp_path / "figure.png")


def test_other_passages_are_no_pair(report: dict[str, Any], place: Place) -> None:
    path = folders(place)[DPO][1] / "lambada.json.questions.jsonl"
    path.write_text(path.read_text().replace("h3", "h30"))
    with pytest.raises(StudyError, match="dpo_2: LAMBADA's passages are not those of"):
        STUDY.report(place)


def test_a_continuation_without_a_number_is_named(report: dict[str, Any], place: Place) -> None:
    path = folders(place)[INITIAL][0] / "prompts.scores.jsonl"
    path.write_text(path.read_text().replace("0.5", "null", 1))
    with pytest.raises(StudyError, match="no number for generation 6"):
        STUDY.report(place)


def test_a_direction_needs_an_interval_that_excludes_zero() -> None:
    found = [direction({"change_interval": span}) for span in ((-2, -1), (-1, 1), (1, 2))]
    assert found == ["less", "no difference that the interval shows", "more"]


@settings(max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(1, 3))
def test_an_interval_lies_among_the_values_and_ignores_what_has_no_weight(values: list[float], seeds: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toxicity_report, "RESAMPLES", 50)
        rows = np.array([values] * seeds)
        low, high = interval(rows, np.ones(len(values)))
        assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
        alone = compared(rows, rows, np.array([1.0] + [0.0] * (len(values) - 1)))
        assert alone["value"] == pytest.approx(values[0], abs=1e-4)
