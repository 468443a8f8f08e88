"""Plots and report of a run folder: complete, cut short, or with hostile text in it."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_sip.errors import DataError
from megatron_sip.evaluation.held_out import HeldOutOutcome
from megatron_sip.evaluation.outcome import write_outcome
from megatron_sip.evaluation.plots import LIGHT, MAX_BARS, available_plots, binned_seconds, moving_average, series
from megatron_sip.evaluation.report import dropped_counts, read_comparisons, result_rows, write_report
from megatron_sip.evaluation.win_rate import Comparison, WinRate

ALL_PLOTS = {"rollout_chosen_rate", "scores", "preferences", "log_ratio", "loss", "seconds", "engine_difference"}
HOSTILE = '<script>alert("x")</script> & <img src=http://evil.example/a.png> \'"'


def make_step(number: int) -> dict[str, float]:
    metrics = {f"score/{kind}": 0.5 for kind in ("suffix", "rewrite", "rollout")}
    metrics |= {"chosen_rate/rollout": 0.25, "reward_margin": 0.1 * number, "reward_accuracy": 0.5}
    metrics |= {"chosen_reward": 0.0, "rejected_reward": -0.1, "rollout_logratio": 0.01, "loss": 0.7, "grad_norm": 1.0}
    metrics |= {"engine_logprob_abs_diff": 0.01, "groups": 8.0, "examples": 6.0, "dropped/tied": 2.0}
    metrics |= {"seconds/rollout": 3.0, "seconds/judge": 2.0, "seconds/train": 1.0, "seconds/total": 7.0}
    return {"step": number, **metrics}


def make_comparison(number: int) -> dict[str, Any]:
    texts = {"prefix": f"prefix {number}", "before": f"old text {number}", "after": f"new text {number}"}
    return {**texts, "score_before": -2.0, "score_after": -1.5}


def make_run(
    folder: Path,
    steps: list[dict[str, float]],
    summary: dict[str, Any] | None = None,
    comparisons: list[dict[str, Any]] | None = None,
) -> str:
    """Write a run folder and its report; returns the page."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if comparisons is not None:
        (folder / "comparisons.jsonl").write_text("".join(json.dumps(line) + "\n" for line in comparisons))
    write_report(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def make_summary() -> dict[str, Any]:
    measured = {"win_rate": 0.713, "win_rate_ci95": [0.652, 0.77], "prompts": 200, "prompts_without_verdict": 3}
    chosen = {"final_rollout_chosen_rate": 0.25, "final_rollout_chosen_chance": 16 / 17}
    return {"steps": 3, "seconds": 21.0, **measured, "mean_scores": [-2.0, -1.5], **chosen}


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self.open else data


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_complete_run_has_every_plot_and_a_self_contained_page(tmp_path: Path) -> None:
    source = make_run(
        tmp_path, [make_step(n) for n in (1, 2, 3)], make_summary(), [make_comparison(n) for n in range(1, 6)]
    )
    page = Page(source)
    assert {path.stem for path in (tmp_path / "plots").glob("*.png")} == ALL_PLOTS
    assert all(png_size(path)[0] > 1000 for path in (tmp_path / "plots").glob("*.png"))
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(ALL_PLOTS)
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "srcset", "href")]
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in addresses)
    assert "url(" not in source
    assert "@import" not in source
    assert page.open == []  # every tag is closed
    for text in (
        "71.3% (95% interval 65.2% to 77.0%, 200 held-out prefixes)",
        "-2 and -1.5",
        "25.0% (by chance 94.1%)",
        "18 of 24 prompts",
    ):
        assert text in page.text
    assert [f"new text {n}" in page.text for n in range(1, 6)] == [True] * 3 + [False] * 2


def test_texts_of_the_run_cannot_become_markup(tmp_path: Path) -> None:
    hostile = {**make_comparison(1), "prefix": HOSTILE, "before": HOSTILE, "after": HOSTILE}
    page = Page(make_run(tmp_path, [{"step": 1, f"dropped/{HOSTILE}": 1.0}], make_summary(), [hostile]))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert page.text.count(HOSTILE) == 4


def test_line_separators_inside_texts_do_not_end_a_line(tmp_path: Path) -> None:
    make_run(tmp_path, [make_step(0)])
    separators = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\r\n")
    texts = [f"one{separator}two" for separator in separators] + ["b"]
    win_rate = WinRate(0.5, (0.4, 0.6), 8, 8, 0, (0.25, 0.75), {"quality": 0.5})
    comparisons = [Comparison(text, text, text, 0.25, 0.75) for text in texts]
    write_outcome(tmp_path, HeldOutOutcome(win_rate, comparisons, None, (0.5, 0.5), (None, 3.0)))
    assert [line["before"] for line in read_comparisons(tmp_path)] == texts


def test_unfinished_run_gets_a_report_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(make_step(1)) + '\n{"step": 2, "lo')
    write_report(tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "1 step, not finished" in text
    assert "measured when the run ends" in text
    assert "no held-out comparison" in text


def test_run_without_any_step_says_so(tmp_path: Path) -> None:
    assert "No step has been finished yet." in make_run(tmp_path, [])
    assert list((tmp_path / "plots").iterdir()) == []


@pytest.mark.parametrize(
    ("metric", "plot"),
    [
        ("chosen_rate/rollout", "rollout_chosen_rate"),
        ("rollout_logratio", "log_ratio"),
        ("engine_logprob_abs_diff", "engine_difference"),
    ],
)
def test_missing_metric_omits_its_plot(metric: str, plot: str) -> None:
    steps = [{name: value for name, value in make_step(n).items() if name != metric} for n in (1, 2)]
    assert {plot.name for plot in available_plots(steps)} == ALL_PLOTS - {plot}


def test_plot_with_one_of_two_panels_missing_is_shorter(tmp_path: Path) -> None:
    heights = []
    for rewards in ({"reward_margin": 0.1}, {"reward_margin": 0.1, "reward_accuracy": 0.5}):
        make_run(tmp_path, [{"step": 1, **rewards}])
        heights.append(png_size(tmp_path / "plots/preferences.png")[1])
    assert heights[0] < heights[1]


def test_the_result_says_what_its_interval_covers_and_when_it_says_little(tmp_path: Path) -> None:
    steps = [make_step(1)]
    parts = {"quality": 0.7, "safety": 0.726}
    few = dict(result_rows(steps, {**make_summary(), "documents": 7, "win_rate_by_criterion": parts}))
    assert "not another training run" in few["What the interval covers"]
    assert "only 7 documents" in few["Warning"]
    assert few["Win rate by criterion"] == "quality 70.0%, safety 72.6%"
    assert "Warning" not in dict(result_rows(steps, {**make_summary(), "documents": 20}))


def test_candidates_that_were_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    lost = {"judge/candidates/dropped/quality-too-few-verdicts": 3.0, "judge/candidates/dropped/safety-deadline": 0.0}
    text = Page(make_run(tmp_path, [{"step": 1, **lost}, {"step": 2, **lost}])).text
    assert re.search(r"candidates left out: quality-too-few-verdicts\s*6", text)
    assert "safety-deadline" not in text


def test_the_chosen_rate_is_drawn_beside_what_chance_gives() -> None:
    steps = [{**make_step(n), "chosen_chance/rollout": 16 / 17} for n in (1, 2)]
    axis = Figure().subplots()
    next(plot for plot in available_plots(steps) if plot.name == "rollout_chosen_rate").draw(steps, [axis], LIGHT)
    [chance] = [line for line in axis.get_lines() if line.get_label() == "by chance"]
    assert list(chance.get_ydata()) == [16 / 17, 16 / 17]


def test_sft_run_has_only_its_own_plots() -> None:
    assert {p.name for p in available_plots([{"step": 1, "loss": 2.0, "seconds/train": 1.0}])} == {"loss", "seconds"}


def test_long_prefix_is_cut_at_its_start(tmp_path: Path) -> None:
    comparison = {**make_comparison(1), "prefix": "start " + "x" * 5000 + " end"}
    text = Page(make_run(tmp_path, [{"step": 1}], make_summary(), [comparison])).text
    assert "start " not in text
    assert re.search(r"… x{690,}.* end", text)


def test_sample_without_verdict_shows_no_score(tmp_path: Path) -> None:
    comparison = {**make_comparison(1), "score_before": None, "score_after": None}
    text = Page(make_run(tmp_path, [{"step": 1}], make_summary(), [comparison])).text
    assert text.count("no verdict") == 2


def test_dropped_prompts_add_up_over_steps_most_frequent_first(tmp_path: Path) -> None:
    steps = [{"step": 1, "dropped/a": 1.0, "groups": 5.0}, {"step": 2, "dropped/b": 3.0, "groups": 5.0}]
    assert list(dropped_counts(steps).items()) == [("b", 3.0), ("a", 1.0)]
    assert "30.00%" in make_run(tmp_path, steps)


def test_win_rate_that_was_not_asked_for_is_named_as_such() -> None:
    assert ("Win rate over the initial policy", "not measured (--win-rate-prompts 0)") in result_rows(
        [], {"steps": 1, "win_rate": None, "win_rate_ci95": None, "prompts": 0}
    )


def test_moving_average_is_the_trailing_mean_of_known_values() -> None:
    values = np.random.default_rng(0).normal(size=50)
    values[[7, 20, 21]] = np.nan
    expected = [np.nanmean(values[max(0, i - 9) : i + 1]) for i in range(50)]
    np.testing.assert_allclose(moving_average(values, 10), expected, rtol=1e-12)
    assert np.isnan(moving_average(np.array([np.nan, 1.0]), 2)).tolist() == [True, False]


def test_series_skips_steps_without_the_metric() -> None:
    x, y = series([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": 4.0}], "a")
    assert (x.tolist(), y.tolist()) == ([1.0, 3.0], [2.0, 4.0])


@pytest.mark.parametrize("count", [1, 79, 80, 81, 1000])
def test_bars_of_time_lose_no_second(count: int) -> None:
    rng = np.random.default_rng(count)
    steps = [
        {"step": n, "seconds/train": t, "seconds/total": t + 1.0} for n, t in enumerate(rng.random(count), start=1)
    ]
    phases, centres, widths, seconds = binned_seconds(steps)
    assert phases == ["train", "other"]
    assert len(centres) == min(count, MAX_BARS)
    steps_a_bar = widths / 0.85
    assert seconds[0] @ steps_a_bar == pytest.approx(sum(step["seconds/train"] for step in steps))
    assert seconds[1] @ steps_a_bar == pytest.approx(count)


BROKEN = {
    "metrics.jsonl": ["prefix,score\n1,2\n", '{"step": 1, "loss": "high"}\n', "\x00" * 20 + "\n"],
    "summary.json": ["", '{"win_rate": 0.', "[]", '{"win_rate": "x", "win_rate_ci95": 3}', '{"win_rate": 0.5}'],
    "comparisons.jsonl": ['{"prefix": "a", "bef', '{"prefix": "a"}\n', "17\n", "\x00\n"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, found in BROKEN.items() for content in found])
def test_a_file_that_is_cut_short_or_foreign_is_named(name: str, content: str, tmp_path: Path) -> None:
    make_run(tmp_path, [make_step(1)], make_summary(), [make_comparison(1)])
    (tmp_path / "report.html").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / name))) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_the_command(tmp_path: Path) -> None:
    tool = [sys.executable, "-m", "megatron_sip.evaluation.report", str(tmp_path)]
    refused = subprocess.run(tool, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert f"{tmp_path}/metrics.jsonl is not there: name the folder" in refused.stderr
    (tmp_path / "metrics.jsonl").write_text("of another program\n")
    refused = subprocess.run(tool, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert f"error: {tmp_path}/metrics.jsonl: no line is a step of a run" in refused.stderr
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    done = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{tmp_path}/report.html and 1 plots in {tmp_path}/plots\n"


def test_validations_of_judge_and_rewriter_are_drawn_and_told_from_first_to_last(tmp_path: Path) -> None:
    """The paper's figures 5, 6 and 7; step 0 is the initial policy's and no step of the run."""
    shares = (
        "accuracy/quality",
        "accuracy/safety",
        "first-option/quality",
        "reward/safe",
        "reward/unsafe",
        "overlap/safe",
    )
    measured = {f"validation/{name}": place / 10 for place, name in enumerate(shares)}
    last = make_step(2) | {name: value + 0.25 for name, value in measured.items()}
    page = Page(make_run(tmp_path, [{"step": 0, **measured}, make_step(1), last]))
    assert {"validation_accuracy", "validation_reward", "validation_overlap"} <= {
        path.stem for path in (tmp_path / "plots").glob("*.png")
    }
    assert "Self-Improving Pretraining, 2 steps" in page.text
    assert "Held-out records: accuracy safety0.100 (step 0), 0.350 (step 2)" in page.text
