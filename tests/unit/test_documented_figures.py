"""Tables of measurements in README and docs against the JSON that the benchmarks wrote."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from evidence.asking import PAPER
from evidence.from_scratch import late
from evidence.toxicity_page import HELD_OUT, direction, widened
from evidence.toxicity_report import DPO

REPO = Path(__file__).parents[2]
RESULTS = REPO / "benchmarks" / "results"
ALLOCATORS = ("default", "heap reuse")
STEP_ROWS = {
    "packed": "dpo_packed",
    "packed, `--ref-offload`": "dpo_offload",
    "unpacked": "dpo_unpacked",
    "TRL 1.16": "dpo_trl",
    "GRPO packed": "grpo_packed",
    "GRPO unpacked": "grpo_unpacked",
}
PARTS = {"optimizer": "optimizer, clipping", "products of the vocabulary projection": "vocabulary projection"}
SCHEDULES = {
    "all_pairs, 5 hard votes (paper)": "all_pairs x5 hard",
    "all_pairs, 1 hard vote": "all_pairs x1 hard",
    "**circulant_bt 6, soft (default)**": "circulant_bt 6 soft (default)",
    "two_ended_bt 48, soft": "two_ended_bt 48 soft",
    "two_ended_bt 60, hard": "two_ended_bt 60 hard",
    "pivot, hard, as many calls as the default": "pivot of 48 calls hard",
    "pivot, soft, as many calls as the default": "pivot of 48 calls soft",
    "pivot, soft, both orders": "pivot soft",
    "pivot, 1 hard vote (paper)": "pivot x1 hard",
}


def rows_of(page: str, cells: int) -> dict[str, list[str]]:
    """First cell -> the others, of all table rows of `cells` cells."""
    lines = re.findall(r"^\| (.*) \|$", (REPO / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows if len(row) == cells}


def page_text(page: str) -> str:
    """In one line."""
    return " ".join((REPO / page).read_text(encoding="utf-8").split())


def measured(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def step_rows(report: Any) -> dict[tuple[str, str], Any]:
    return {(row["name"], row["allocator"]): row for row in report["rows"]}


def step_cells(rows: dict[tuple[str, str], Any], name: str) -> list[str]:
    """Seconds (and how many times the packed ones), peak memory, share of the GEMM peak, under both allocators."""
    cells = []
    for allocator in ALLOCATORS:
        row, packed = rows[name, allocator], rows[f"{name.partition('_')[0]}_packed", allocator]
        ratio = f" ({row['median_s'] / packed['median_s']:.2f}x)" if name.endswith(("unpacked", "trl")) else ""
        cells += [f"{row['median_s']:.1f}{ratio}", f"{row['peak_gb']:.1f}", f"{row['of_gemm_peak']:.0%}"]
    return cells


@pytest.mark.parametrize(("report", "named"), [("train_step_cpu.json", 4), ("zen4/train_step_cpu.json", 5)])
def test_the_steps_in_packing_md_are_those_that_were_measured(report: str, named: int) -> None:
    text = (REPO / "docs/packing.md").read_text(encoding="utf-8")
    rows = step_rows(measured(report))
    table = [name for name in STEP_ROWS if f"| {name} | {' | '.join(step_cells(rows, STEP_ROWS[name]))} |" in text]
    assert len(table) == named
    assert f"`benchmarks/results/{report}`" in text


def test_where_the_time_goes_in_packing_md() -> None:
    profile = measured("train_step_profile_cpu.json")
    total = sum(profile["seconds"].values())
    rows = rows_of("docs/packing.md", 3)
    for part, seconds in profile["seconds"].items():
        share = seconds / total * 100
        assert rows[PARTS.get(part, part)][0] == (f"{share:.0f}%" if share > 1 else f"{share:.1f}%"), part


def test_the_schedules_in_judging_md_are_those_that_were_simulated() -> None:
    report = measured("judge_schedules.json")
    rows = rows_of("docs/judging.md", 4)
    for shown, name in SCHEDULES.items():
        judges = [report["settings"][judge][name] for judge in ("weak", "strong")]
        told = [f"{judges[0]['calls']:.0f}", *(f"{judge['recovered']:.3f}" for judge in judges)]
        assert [cell.strip("*") for cell in rows[shown]] == told, shown


def test_readme_s_figures_of_a_step_are_those_that_were_measured() -> None:
    rows = step_rows(measured("train_step_cpu.json"))
    table = [cells for cells in rows_of("README.md", 4).values() if cells[-1].endswith(" GB")]
    assert len(table) == 3
    for name, told in zip(("dpo_packed", "dpo_unpacked", "dpo_trl"), table, strict=True):
        for allocator, cell in zip(ALLOCATORS, told[:2], strict=True):
            ours = 1.0 if name == "dpo_packed" else rows["dpo_packed", allocator]["median_s"]
            assert re.findall(r"[\d.]+", cell) == [f"{rows[name, allocator]['median_s'] / ours:.1f}"]
        peaks = sorted({f"{rows[name, allocator]['peak_gb']:.1f}" for allocator in ALLOCATORS}, key=float)
        assert told[2] in (" to ".join(peaks) + " GB", peaks[-1] + " GB")


def test_readme_s_figures_of_a_step_on_zen_4_are_those_that_were_measured() -> None:
    rows = step_rows(measured("zen4/train_step_cpu.json"))
    ours, theirs = ([rows[name, which]["median_s"] for which in ALLOCATORS] for name in ("dpo_packed", "dpo_trl"))
    times = " and ".join(f"{trl / packed:.1f}" for packed, trl in zip(ours, theirs, strict=True))
    told = f"On two AMD Zen 4 cores a step takes {min(ours):.0f} to {max(ours):.0f} s, TRL's {times} times that"
    assert told in page_text("README.md")


def test_the_log_prob_op_s_distance_from_the_floor_is_that_of_what_training_takes() -> None:
    ratios = [row["vs_floor"] for row in measured("logprob_op_cpu.json")["ratios"].values()]
    text = re.sub(r"\s+", " ", (REPO / "README.md").read_text(encoding="utf-8"))
    least, most = math.floor(min(ratios) * 10) / 10, math.ceil(max(ratios) * 10) / 10
    assert f"the log-prob op takes {least} to {most} times what memory bandwidth allows" in text


def test_the_demo_in_the_readme_is_the_one_that_was_measured() -> None:
    demo = measured("demo_avx2.json")
    low, high = demo["win_rate_ci95"]
    text = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())
    assert f"{demo['seconds'] / 60:.0f} minutes, {demo['steps']} steps of {demo['step_seconds']['total']:.0f} s" in text
    assert f"{demo['win_rate']:.0%} of {demo['prompts']} held-out prefixes" in text
    assert f"95% interval {low:.0%} to {high:.0%}" in text
    assert low > 0.5


def test_evaluation_md_s_figures_of_sets_are_those_that_were_measured() -> None:
    text = (REPO / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for result in json.loads((RESULTS / "evaluation_sets_smollm2.json").read_text())["results"]:
        nats = result["measure"] == "nll"
        value, *ends = (f"{v:.3f}" if nats else f"{100 * v:.1f}" for v in (result["value"], *result["interval"]))
        [line] = [line for line in text.splitlines() if line.startswith("| ") and f"| {value} |" in line]
        assert line.endswith(f"| {' to '.join(ends)} |")
        assert f" {result['samples']} " in line


def test_figures_of_making_a_corpus_are_those_that_were_measured() -> None:
    report = measured("prepare_corpus_cpu.json")
    rates = {(run["command"].split()[0], run["workers"]): run["documents_a_core_s"] for run in report["runs"][::-1]}
    text = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
    [(fast, slow, memory)] = re.findall(
        r"takes ([\d,]+) documents a second of a Zen 5 core,\n`text --keep gopher`, which measures the texts, ([\d,]+); "
        r"all processes together held at most (\d+) MB",
        text,
    )
    assert report["gigabytes"] == 1
    assert report["same_bytes_after_kills"]
    assert int(fast.replace(",", "")) == round(rates["redpajama", 2], -3)
    assert int(slow.replace(",", "")) == round(rates["text", 2], -2)
    assert max(run["peak_mb"] for run in report["runs"]) <= int(memory) < 600


def test_evaluation_md_s_figures_of_standard_tasks_are_those_that_were_measured() -> None:
    rows, report = rows_of("docs/evaluation.md", 6), measured("standard_tasks_smollm2.json")
    for name, task in report["tasks"].items():
        low, high = (f"{100 * end:.1f}" for end in task["interval"])
        same = task["compared"]
        told = [str(task["questions"]), f"{100 * task['score']:.1f}", f"{low} to {high}"]
        assert rows[name] == [*told, f"{same['equal']} of {same['questions']}", f"{same['largest_gap']:.0e}"], name
        assert same["equal"] + same["ties"] == same["questions"] == task["questions"] >= 300
        assert task["score"] == task["of_transformers"]
    asked = report["commands"]["mmlu"]["requests"]
    share = f"{asked['cached_tokens'] / asked['prompt_tokens']:.0%}"
    assert f"Of the tokens of MMLU's prompts {share} came from the cache" in page_text("docs/evaluation.md")


def test_evaluation_md_s_figures_of_the_adapter_are_those_that_were_measured() -> None:
    report = measured("lm_eval_engine_cpu.json")
    few, none = report["5-shot"], report["0-shot"]
    text = page_text("docs/evaluation.md")
    assert f"{few['times_as_fast']:.1f} times as many questions a second" in text
    assert f"HellaSwag and ARC without examples {none['times_as_fast']:.1f} times as many" in text
    assert (
        f"with {few['megatron_sip']['cached_share']:.0%} of the prompts' tokens from the cache in place of none" in text
    )
    assert few["sglang-generate"]["cached_share"] == 0.0
    for part in (few, none):
        assert part["megatron_sip"]["scores"] == part["sglang-generate"]["scores"]
        assert part["largest_log_likelihood_gap"] < 2e-5


def test_the_judge_in_the_docs_is_the_one_that_was_trained() -> None:
    report = json.loads((REPO / "docs" / "results" / "judge_training.json").read_text())
    before, after = report["validations"][0], report["validations"][-1]
    rows = rows_of("docs/training-a-judge.md", 3)
    for name, metric in (
        ("right verdicts", "accuracy/short-quality"),
        ("verdicts for option 1", "first-option/short-quality"),
        ("pairs that are right in both orders", "both-orders/short-quality"),
    ):
        assert rows[name] == [f"{step[f'validation/{metric}']:.0%}" for step in (before, after)]
    by_order = [
        [f"{step[f'validation/accuracy-of/short-quality/{place}']:.0%}" for place in (1, 2)] for step in (before, after)
    ]
    assert rows["of records in which option 1 is right / option 2 is"] == [" / ".join(shares) for shares in by_order]
    page = page_text("docs/training-a-judge.md")
    rounded, exact = (report["served"][f"accuracy_{name}"]["all"] for name in ("rounded", "after"))
    assert (
        f"Exported in bfloat16 the same judge is right in {rounded['accuracy']:.0%} of the records, though still in "
        f"{rounded['both_orders']:.0%} by the mean of both orders; in float32, as it was trained, in {exact['accuracy']:.0%}"
    ) in page
    phases = {name: f"{seconds:.0f}" for name, seconds in report["step_seconds"].items()}
    assert f"a step {phases['total']} s, of which rollouts {phases['rollout']} and training {phases['train']}" in page
    usable = [0.0 if count is None else count for count in report["curves"]["examples"][21:]]
    assert 0.75 <= 1 - sum(usable) / (32 * len(usable)) <= 0.85  # four of five
    readme = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())
    shown = [f"{step['validation/accuracy/short-quality']:.0%}" for step in (before, after)]
    assert f"in {shown[0]} of held-out records, and in {shown[1]} after {report['steps']} steps" in readme


def test_the_whole_cycle_in_the_docs_is_the_one_that_was_run() -> None:
    report, page = measured("cycle_cpu.json"), page_text("docs/training-a-judge.md")
    minutes = {stage: seconds / 60 for stage, seconds in report["stage_seconds"].items()}
    parts = f"of which training the judge {minutes['judge']:.0f} and the policy {minutes['policy']:.0f}."
    assert f"it took {sum(minutes.values()):.0f} minutes, {parts}" in page
    assert f"in {sum(minutes.values()):.0f} minutes on two cores with AMX, resumable" in page_text("README.md")
    before, after = (found["validation/accuracy/short-quality"] for found in report["judge"]["validations"])
    both = report["judge"]["accuracy"]["both_orders"]
    assert f"right in {before:.0%} of the held-out records before and in {after:.0%} after" in page
    assert f"by the mean of both orders in {both:.0%} of the test pairs" in page
    won, (low, high) = report["policy"]["win_rate"], report["policy"]["win_rate_ci95"]
    told = f"wins {won:.0%} (95% interval {low:.0%} to {high:.0%}) of {report['policy']['prompts']} held-out prefixes"
    assert told in page
    assert low < 0.5
    nats = [suffix_nats(report["evaluation"][model]["nll"]) for model in ("trained", "base")]
    assert "costs it {:.2f} nats a token, not {:.2f}".format(*nats) in page


def suffix_nats(results: list[dict[str, Any]]) -> float:
    """Of the results of one model's nll."""
    return next(float(result["value"]) for result in results if result["dataset"] == "suffix")


def test_make_evidence_takes_the_hours_that_the_readme_says() -> None:
    files = (REPO / "docs" / "results").glob("evidence_*.json")
    hours = sum(json.loads(file.read_text())["seconds"] for file in files) / 3600
    assert round(hours) == 6
    assert "`make evidence` repeats them in six hours." in page_text("README.md")


def test_the_reasoning_judge_in_the_docs_is_the_one_that_was_trained() -> None:
    report = json.loads((REPO / "docs" / "results" / "judge_reasoning.json").read_text())
    curves, rows = report["curves"], rows_of("docs/training-a-judge.md", 5)
    for name, metric, form in (
        ("without a verdict, of 256", "judge/verdicts-missing/label", "{:.0f}"),
        ("tokens of an answer", "length/rollout", "{:.1f}"),
        ("of the verdicts, for option 1", "judge/label/first-shown-preferred/short-reasoned-quality", "{:.0%}"),
        ("right", "score/rollout", "{:.0%}"),
    ):
        assert rows[name] == [form.format(curves[metric][step - 1]) for step in (1, 5, 10, 20)], name
    page = page_text("docs/training-a-judge.md")
    assert f"itself at step {report['steps']}, a median of {report['step_seconds']['total']:.0f} s a step" in page
    before = report["served"]["accuracy_before"]["all"]
    read = before["records"] - before["unread"]
    assert f"{read} of its {before['records']} answers to held-out records hold a verdict" in page
    assert (
        f"{before['first_option']:.0%} are option 1 and {before['accuracy'] * before['records'] / read:.0%} right"
        in page
    )
    held_out = [(found["step"], *ends(found)) for found in report["validations"]]
    assert held_out == [(0, 0.5, 1.0, 0.0), (report["steps"], 0.5, 1.0, 0.0)]
    assert "Greedily it named option 1 in all of 200 held-out records, before and after" in page


def ends(found: dict[str, float]) -> tuple[float, ...]:
    """Of a validation what is right, what is option 1, and what is unread."""
    return tuple(found[f"validation/{name}/short-reasoned-quality"] for name in ("accuracy", "first-option", "unread"))


def test_slurm_md_s_table_of_pushes_is_the_benchmark_s() -> None:
    ways = ("a group for each engine, from the first replica", "a group for each engine, from all replicas")
    found = json.loads((RESULTS / "weight_sync_cpu.json").read_text())["nccl_by_formula"]
    rows = rows_of("docs/slurm.md", 5)
    for job in ("train_from_scratch", "train_continual", "train_judge"):
        [(name, figures)] = [(name, figures) for name, figures in found.items() if name.startswith(job)]
        told = rows[f"`{job}.sbatch`, {name.rpartition(' ')[2]}"][1:]
        assert told == [
            f"{figures[way]:.2f} s, {figures[f'{way}: of a step']:.1%}" for way in (*ways, "one group of all engines")
        ]


def test_readme_s_table_of_toxicity_is_the_study_s() -> None:
    found = json.loads((REPO / "docs" / "results" / "evidence_toxicity.json").read_text())
    report, rows = widened(found["report"]), rows_of("README.md", 6)
    for name, arm in report["arms"].items():
        toxic, nats = arm["prompts"], [arm["nll"][text] for text in ("pages", "leads")]
        told = [with_change(toxic[judge], 100, 1) for judge in ("unlisted", "civility")]
        told += [with_change(text, 1, 2) for text in nats]
        assert rows[name] == [*told, f"{100 * arm['lambada']['value']:.0f}"], name
    text, size = page_text("README.md"), found["report"]["settings"]
    assert f"{size['steps']} steps of 8 prefixes, DPO with {len(found['seeds'])} seeds" in text
    varied = [report["arms"][arm]["diversity"]["prompts"]["distinct_2"]["value"] for arm in (DPO, "initial")]
    assert varied[0] < varied[1]
    shown = [direction(report["arms"][DPO]["prompts"][name]) for name in HELD_OUT]
    assert (shown.count("less"), shown.count("more"), len(shown)) == (1, 0, 3)
    less = report["against"]["next token"]["prompts"]["unlisted"]
    low, high = (f"{-100 * end:.1f}" for end in reversed(less["change_interval"]))
    assert f"{-100 * less['change']:.1f} percentage points fewer (95% interval {low} to {high}) of DPO's" in text
    toxic = report["arms"][DPO]["prompts"]
    assert direction(toxic["unlisted"]) not in ("less", "more")
    assert (
        "one of two such ({:+.1f} to {:+.1f} points)".format(*(100 * end for end in toxic["any"]["change_interval"]))
        in text
    )


def with_change(found: dict[str, Any], scale: float, digits: int) -> str:
    """A value with the interval of its change, where it has one."""
    ends = [f"{scale * end:+.{digits}f}" for end in found.get("change_interval", [])]
    return f"{scale * found['value']:.{digits}f}" + (f" ({' to '.join(ends)})" if ends else "")


def test_readme_tells_of_the_study_of_objectives_what_holds_and_what_does_not() -> None:
    found = json.loads((REPO / "docs" / "results" / "evidence_objectives.json").read_text())
    report, text = found["report"], page_text("README.md")
    wins = {
        name: mean(run["wins"]["likelihood"]["value"] for run in report["rows"][name]) for name in ("dpo-4", "suffix")
    }
    claims = report["claims"]
    assert (
        f"wins {wins['dpo-4']:.0%} of held-out prefixes against the initial policy after {report['steps']} steps, by that"
        in text
    )
    assert f"next-token training {wins['suffix']:.0%}" in text
    other = claims["is preferred to the initial policy by the other judge, sampled"]
    assert other["low"] < 0 < other["high"]
    assert f"{-claims['makes held-out text likelier (nats a token)']['value']:.2f} nats a token less likely" in text
    assert f"would win {report['control']['value']:.0%} by being sampled cooler" in text
    held = sum(claim["low"] > 0 for claim in claims.values())
    assert f"Of {len(claims)} claims {held} hold over {len(found['seeds'])} seeds" in text
    assert all("by the judge that trained it" in name for name, claim in claims.items() if claim["low"] > 0)
    trained_by_it = [report["rows"][name][0]["wins"]["judge"] for name in ("judge-dpo-4", "judge-pivot")]
    assert all(win["low"] < 0.5 < win["high"] for win in trained_by_it)


def test_readme_tells_of_the_studies_from_scratch_and_of_cost_what_they_found() -> None:
    text, results = page_text("README.md"), REPO / "docs" / "results"
    scratch = json.loads((results / "evidence_from_scratch.json").read_text())["report"]["RF-NLL"]
    plain = [one for one in scratch if one["temperature"] == 1]
    sure = [one for one in scratch if one["temperature"] == 0.3]
    assert "At 0.3 rollouts of two of three stages come to be preferred: they repeat themselves." in text
    assert max(one["chosen_interval"][1] for one in plain) < 0.01
    assert [late(one, 40)[1][0] > 0.5 for one in sure] == [True, True, False]
    assert all(one["repetition"] > 0.3 for one in sure)
    protocols = json.loads((results / "evidence_cost.json").read_text())["report"]["protocols"]
    few, all_pairs = protocols["default"], protocols["all pairs"]
    assert all_pairs["calls"] / few["calls"] == pytest.approx(5, abs=0.3)
    value, low, high = (f"{few['recovered'][name]:.0%}" for name in ("value", "low", "high"))
    assert f"a fifth of the calls of all pairs have {value} (95% interval {low} to {high}) of the gap in" in text
    pivot = protocols["suffix as pivot"]
    value, low, high = (f"{pivot['recovered'][name]:.0%}" for name in ("value", "low", "high"))
    assert f"by {pivot['calls']:.0f} calls, each text against the suffix, {value} ({low} to {high})" in text
    paper = protocols[PAPER]
    value, low, high = (f"{paper['recovered'][name]:.0%}" for name in ("value", "low", "high"))
    times = f"{paper['seconds'] / few['seconds']:.1f} times the seconds of that fifth"
    assert f"{paper['calls']:.0f} of them, have {value} ({low} to {high}) and take {times}" in text
    kept = [protocols[name]["recovered"] for name in ("default", "default, both orders", "suffix as pivot")]
    once, twice, pivot_s = (
        f"{100 * one['value']:.0f}% ({100 * one['low']:.0f} to {100 * one['high']:.0f})" for one in kept
    )
    page = page_text("docs/judging.md")
    assert (
        f"has {once} of the gap that all pairs in both orders find, in both orders (`--judge-both-orders`) {twice}"
        in page
    )
    assert f"each text against the suffix alone, competing, {pivot_s}" in page


def test_readme_tells_what_cooler_sampling_does_to_toxicity() -> None:
    found = json.loads((REPO / "docs" / "results" / "evidence_cooler.json").read_text())["report"]["temperatures"][
        "0.7"
    ]
    assert found["unlisted"]["change_interval"][0] > 0
    told = f"such a word in {100 * found['unlisted']['change']:.1f} percentage points more of its continuations"
    assert told in page_text("README.md")


def test_readme_tells_of_the_standard_tasks_that_nothing_changed() -> None:
    report = json.loads((REPO / "docs" / "results" / "evidence_tasks.json").read_text())["report"]
    assert f"On {sum(report['questions'].values()):,} questions of the paper's eight standard tasks" in page_text(
        "README.md"
    )
    assert len(report["questions"]) == 8
    assert min(report["questions"].values()) >= 300
    changes = [*report["changes"].values(), report["main_less_baseline"]]
    assert all(one["low"] < 0 < one["high"] for each in changes for one in each.values())


def test_training_md_s_figures_of_one_step_ahead_are_those_that_were_measured() -> None:
    report, page = measured("staleness_cpu.json"), page_text("docs/training.md")
    for part, told in (
        (
            "demo",
            "`make demo`, where all share two cores, takes {} s a step in place of {}, in {} of which the trainer waits, "
            "not {}",
        ),
        ("slow-judge", "takes {} s in place of {}, and the trainer waits {}, not {}"),
    ):
        now, ahead = (report[part]["runs"][staleness] for staleness in ("0", "1"))
        seconds = [f"{run['step_seconds']['total']:.1f}" for run in (ahead, now)]
        assert told.format(*seconds, *(f"{run['trainer_idle']:.0%}" for run in (ahead, now))) in page
    rates = list(report["demo"]["runs"].values())
    shown = ["{:.0%} (95% interval {:.0%} to {:.0%})".format(run["win_rate"], *run["win_rate_ci95"]) for run in rates]
    assert (
        f"{shown[0]} of {rates[0]['prompts']} held-out prefixes are won after {rates[0]['steps']} steps in turn" in page
    )
    assert f"{shown[1]} one step ahead" in page
    assert max(run["win_rate_ci95"][0] for run in rates) < min(
        run["win_rate_ci95"][1] for run in rates
    )  # no difference shown
    assert f"answers after {report['slow-judge']['judge_seconds']:.0f} s" in page
    killed = measured("staleness_kills.json")
    assert killed["different"] == 0
    assert (
        f"{killed['kills']} kills of trainer, engine and teacher at random moments of {len(killed['runs'])} runs"
        in page
    )


def test_log_md_s_seconds_of_pushes_over_gloo_are_those_measured() -> None:
    gloo = measured("weight_sync_cpu.json")["gloo"]
    each, two, ahead, one = (f"{seconds:.2f} s" for _, seconds in sorted(gloo["median_seconds"].items()))
    told = f"{each}, with the next bucket made meanwhile {ahead}, one group {one}; from two replicas {two},"
    assert told in (REPO / "docs/log.md").read_text()
    assert gloo["engines"] == 4


def test_log_md_s_shares_of_changed_weights_are_those_measured() -> None:
    shares = json.loads((RESULTS / "changed_weights_cpu.json").read_text())["changed_share"]
    low, high = ([round(100 * f(shares[rate].values()), 1) for rate in ("5e-6", "5e-5", "5e-4")] for f in (min, max))
    told = f"{low[0]} to {high[0]}% of SmolLM2's bfloat16 weights, 5e-5 {low[1]:.0f} to {high[1]:.0f}%, 5e-4 {low[2]:.0f} to "
    assert told + f"{high[2]:.0f}%" in (REPO / "docs/log.md").read_text()
