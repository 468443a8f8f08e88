"""The planner against tensors that exist, memory and steps that were measured, and the jobs whose defaults it justifies."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_sip import plan as planner
from megatron_sip.config.dry_run import prompt_cost, step_cost
from megatron_sip.errors import ArgumentError
from megatron_sip.hf.families import tensor_maps, tensor_shape
from megatron_sip.model.packing import ROW_MULTIPLE
from megatron_sip.one_node.layout import TRAINING_COPIES
from megatron_sip.planning.calibration import factors_of, measured_seconds
from megatron_sip.planning.devices import DEVICES, Efficiency
from megatron_sip.planning.memory import Parallel, activation_bytes, rank_parameters, server_capacity, trainer_memory
from megatron_sip.planning.settings import Planable, read_command
from megatron_sip.planning.shapes import MODELS, read_shape, shape_of
from megatron_sip.planning.split import Search, best_split, plan_split, splits
from megatron_sip.planning.tables import describe
from megatron_sip.planning.timing import ORDERS, Cluster, Machine, Phases, Servers, phases
from megatron_sip.planning.work import Serving, Work, step_work
from megatron_sip.training.metrics_writer import read_metrics

REPO = Path(__file__).parents[3]
RESULTS = REPO / "benchmarks" / "results"
SAFETY = ("--policy", "llama-1.4b", "--judge", "llama-3.1-8b", "--preset", "safety", "--use-distributed-optimizer")
WITHIN = 0.3


def product_of(sizes: dict[str, int]) -> int:
    count = 1
    for size in sizes.values():
        count *= size
    return count


@pytest.mark.parametrize("name", ["llama-1.4b", "llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "smollm2-135m"])
def test_parameters_are_those_of_the_converter_s_tensors(name: str) -> None:
    config, shape = AutoConfig.from_pretrained(MODELS / name), read_shape(MODELS / name)
    tensors = [tensor_shape(tensor, config) for entry in tensor_maps(config) for tensor in entry.hf]
    norms = sum(product_of(sizes) for sizes in tensors if len(sizes) == 1)
    assert shape.parameters + norms == sum(map(product_of, tensors))


def test_an_expert_model_reads_few_experts_for_one_token_and_all_for_many() -> None:
    shape = read_shape(MODELS / "gpt-oss-120b")
    assert shape.parameters == pytest.approx(117e9, rel=0.02)  # as published, 5.1 billion of them active
    assert shape.forward_flops(1, 0, 1) / 2 == pytest.approx(5.1e9, rel=0.1)
    assert shape.read_bytes(1) < 0.1 * shape.read_bytes(1000)
    assert shape.read_bytes(1000) == pytest.approx(shape.served_bytes, rel=0.02)


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ArgumentError, match=r"config\.json.*num_attention_heads"):
        read_shape(tmp_path)


def test_a_resting_trainer_takes_what_was_measured() -> None:
    """Of SmolLM2 with its reference and one replica: `resting_gb` of the benchmark, which has the process itself in it."""
    shape = read_shape(MODELS / "smollm2-135m")
    work = command("--hf-config", str(MODELS / "smollm2-135m"))[1].training
    memory = trainer_memory(shape, work, Parallel(), 1)
    resting = sum(memory[part] for part in ("weights", "gradients", "optimizer", "reference"))
    assert resting == TRAINING_COPIES * 2 * shape.parameters
    report = json.loads((RESULTS / "train_step_cpu.json").read_text())
    measured = next(row["resting_gb"] for row in report["rows"] if row["name"] == "dpo_packed") * 1e9
    assert 0.85 * measured < resting < measured


def test_ranks_hold_their_part_and_recomputation_keeps_less() -> None:
    shape = read_shape(MODELS / "llama-3.1-8b")
    whole = rank_parameters(shape, Parallel())
    assert whole == shape.parameters
    for tensor, pipeline in product((1, 2, 4), (1, 2, 4)):
        parallel = Parallel(tensor, pipeline, sequence=True)
        ranks = tensor * pipeline
        assert whole / ranks <= rank_parameters(shape, parallel) <= whole / ranks + shape.table_parameters / tensor
        assert activation_bytes(shape, parallel, 2048, 64) == pytest.approx(
            activation_bytes(shape, Parallel(), 2048, 1) / tensor
        )
    assert activation_bytes(shape, Parallel(recompute=True), 2048, 1) < 0.15 * activation_bytes(
        shape, Parallel(), 2048, 1
    )
    work = command("--hf-config", str(MODELS / "llama-3.1-8b"), "--preset", "safety")[1].training
    alone, spread = (
        trainer_memory(shape, work, Parallel(data=8, distributed=d), 1)["optimizer"] for d in (False, True)
    )
    assert alone == 8 * spread


def command(*flags: str) -> tuple[Planable, Work]:
    planable = read_command(flags)
    return planable, step_work(planable.settings, 1.0)


def test_the_counts_are_the_dry_run_s() -> None:
    planable, work = command("--hf-config", str(MODELS / "llama-1.4b"), "--preset", "safety")
    assert work.counts == step_cost(planable.settings, prompt_cost(planable.settings))
    assert (work.rollouts.sequences, work.rollouts.length) == (256 * 16, 128)
    assert work.judge.sequences == 256 * (680 + 85)
    assert work.judge.length == 512
    assert work.training.examples * (work.training.prefix + 2 * work.training.suffix) == 256 * (1920 + 2 * 128)


def demo(*flags: str) -> tuple[Work, Machine, Cluster]:
    """The demo's settings on one computer without a GPU, with whatever flags come behind."""
    folder = str(MODELS / "smollm2-135m")
    planable, work = command("--preset", str(REPO / "examples/demo.args"), "--hf-config", folder, *flags)
    cluster = Cluster(DEVICES["cpu"], planable.parallel, Servers(1), Servers(1))
    return work, Machine(planable.policy, planable.policy), cluster


def test_from_one_phase_of_the_demo_the_formulas_foresee_its_step() -> None:
    """Of the measured step only the reference's pass, a tenth of it, goes in, as a rate of arithmetic; a decode step is that of
    docs/log.md, not measured in the demo. What comes out are the other phases and the whole."""
    work, machine, cluster = demo()
    real = json.loads((RESULTS / "demo_avx2.json").read_text())["step_seconds"]
    rate = machine.efficiency.train * phases(work, machine, cluster).reference / real["reference"]
    assert f"{DEVICES['cpu'].decode_step_s} s" in (REPO / "docs/log.md").read_text()
    foreseen = phases(work, replace(machine, efficiency=Efficiency(train=rate, prefill=rate)), cluster)
    assert foreseen.step("on arrival") == pytest.approx(real["total"], rel=WITHIN)
    said = f"is {foreseen.step('on arrival'):.0f} s for the step's {real['total']:.0f}"
    assert said in (REPO / "docs/plan.md").read_text()
    for phase in ("rollout", "judge", "train"):
        assert getattr(foreseen, phase) == pytest.approx(real[phase], rel=WITHIN)


PLANNED = json.loads((RESULTS / "plan_demo.json").read_text())


@pytest.mark.parametrize(
    ("seen", "planned", "told"),
    [
        ("small", "demo", "from a run of other lengths, rollouts and batch {} s for {}"),
        ("demo", "small", "the other way round {} s for {} (`benchmarks/results/plan_demo.json`)"),
    ],
)
def test_from_one_run_s_metrics_the_step_of_another_is_foreseen(seen: str, planned: str, told: str) -> None:
    """Two runs with other lengths, rollouts and batch on one computer: rates of one, the other's step."""
    work, machine, cluster = demo(*PLANNED["runs"][seen]["flags"])
    factors = factors_of(measured_seconds(PLANNED["runs"][seen]["steps"], shared=True), work, machine, cluster)
    other, _, _ = demo(*PLANNED["runs"][planned]["flags"])
    foreseen = phases(other, replace(machine, factors=factors), cluster).step("on arrival")
    real = measured_seconds(PLANNED["runs"][planned]["steps"])["total"]
    assert foreseen == pytest.approx(real, rel=WITHIN)
    assert abs(measured_seconds(PLANNED["runs"][seen]["steps"])["total"] - real) > WITHIN * real  # they do differ
    assert told.format(round(foreseen), round(real)) in " ".join((REPO / "docs/plan.md").read_text().split())


def test_from_run_reads_a_folder_and_its_own_step_comes_out(tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"--preset": "safety", "--pretrained-checkpoint": str(MODELS / "smollm2-135m")}
    run.mkdir()
    record = {
        "command": "torchrun --nproc-per-node 2 -m megatron_sip.train",
        "settings": settings,
        "initial_weights": "random",
    }
    (run / "run.json").write_text(json.dumps(record))
    seconds = {"rollout": 3.0, "judge": 20.0, "reference": 0.5, "train": 2.0, "sync": 0.5}
    steps = [
        {"step": n, "seconds/total": 26.0, **{f"seconds/{name}": s for name, s in seconds.items()}} for n in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert measured_seconds(read_metrics(run / "metrics.jsonl"))["total"] == 26.0
    flags = ("--policy", "smollm2-135m", "--preset", "safety", "--gpus", "8", "--roles", "2", "2", "4")
    report = planner.plan(
        [*flags, "--from-run", str(run), "--run-roles", "2", "2", "4", "--json", str(tmp_path / "a.json")]
    )
    assert report["given"]["seconds"] == pytest.approx(seconds)
    assert report["given"]["step"]["in turn"] == pytest.approx(26.0)
    assert json.loads((tmp_path / "a.json").read_text()) == report
    # The same run by its own record: URLs are of servers, each of as many GPUs as --engine-tp and --judge-tp say.
    urls = {f"--{role}-url": " ".join(f"http://{role}:{port}" for port in (1, 2)) for role in ("rollout", "teacher")}
    (run / "run.json").write_text(
        json.dumps(record | {"command": "megatron-sip model text", "processes": 2, "settings": settings | urls})
    )
    parallel = ("--judge-tp", "2", "--engine-tp", "1")
    assert planner.plan([*flags, *parallel, "--from-run", str(run)])["given"]["seconds"] == pytest.approx(seconds)
    (run / "metrics.jsonl").write_text("no step\n")
    with pytest.raises(ArgumentError, match=r"--from-run.*no line is a step"):
        planner.plan([*flags, "--from-run", str(run)])
    (run / "run.json").unlink()
    with pytest.raises(ArgumentError, match=r"--from-run.*no run\.json"):
        planner.plan([*flags, "--from-run", str(run)])


def test_of_judging_beside_rollouts_all_its_seconds_count() -> None:
    step = {"step": 1.0, "seconds/total": 9.0, "seconds/rollout": 5.0, "seconds/judge": 1.0, "seconds/judging": 4.0}
    assert measured_seconds([step, step])["judge"] == 4.0
    assert measured_seconds([step, step], shared=True)["judge"] == 1.0  # the rest is in the rollouts' seconds


def test_one_step_is_no_measurement() -> None:
    with pytest.raises(ArgumentError, match="fewer than two steps"):
        measured_seconds([{"step": 1, "seconds/total": 3.0}])


def test_orders_and_idle_shares_by_hand() -> None:
    times = Phases(rollout=2, judge=5, rewrite=1, reference=1, train=3, sync=1)
    assert [times.step(order) for order in ORDERS] == [12, 10, 6]
    assert times.idle("one step ahead") == pytest.approx({"trainer": 1 / 6, "engines": 1 / 2, "judge": 0})
    rewriting = replace(times, rewrite=9)  # beside all else, of the same servers as the judgements
    assert [rewriting.step(order) for order in ORDERS] == [14, 14, 14]


def test_on_shared_processors_everything_takes_its_turn() -> None:
    times = Phases(rollout=2, judge=5, rewrite=1, reference=1, train=3, sync=1, shared=True)
    assert {times.step(order) for order in ORDERS} == {13}
    assert times.idle("on arrival")["judge"] == pytest.approx(7 / 13)
    assert {name for name, device in DEVICES.items() if device.shared} == {"cpu"}
    work, machine, cluster = demo()
    assert phases(work, machine, cluster).shared
    assert not phases(work, machine, replace(cluster, device=DEVICES["H100"])).shared


@pytest.mark.parametrize(
    ("flags", "order"),
    [((), "on arrival"), (("--max-staleness", "1"), "one step ahead"), (("--order", "in turn"), "in turn")],
)
def test_phases_follow_each_other_as_in_the_run_unless_said_otherwise(flags: tuple[str, ...], order: str) -> None:
    assert planner.plan([*SAFETY, "--gpus", "8", *flags])["order"] == order


def test_the_best_split_is_the_best_of_all() -> None:
    planable, work = command("--hf-config", str(MODELS / "llama-1.4b"), "--preset", "safety")
    machine = Machine(planable.policy, read_shape(MODELS / "llama-3.1-8b"))
    search = Search(7, DEVICES["H100"], planable.parallel)
    all_splits = [(t, e, 7 - t - e) for t in range(1, 6) for e in range(1, 7 - t)]
    assert sorted(splits(work, search)) == sorted(all_splits)
    for gpus in (36, 100):  # which are no whole nodes
        assert all(sum(split) == gpus for split in splits(work, replace(search, gpus=gpus)))
        alone = replace(work, rollouts=Serving(), judge=Serving(), rewrites=Serving())
        assert list(splits(alone, replace(search, gpus=gpus))) == [(gpus, 0, 0)]
        sampled = list(splits(replace(alone, rollouts=work.rollouts), replace(search, gpus=gpus)))
        assert sampled[0] == (8, gpus - 8, 0)
    for order in ORDERS:
        steps = [found.phases.step(order) for s in all_splits if (found := plan_split(work, machine, search, s, order))]
        assert len(steps) > 5
        assert best_split(work, machine, search, order).phases.step(order) == min(steps)
    with pytest.raises(ArgumentError, match="--gpus 2, of which each of 3 roles needs one: the models do not fit"):
        best_split(work, machine, replace(search, gpus=2), "on arrival")


def test_a_server_holds_as_many_sequences_as_its_memory_without_the_weights() -> None:
    shape = shape_of(
        {"num_attention_heads": 2, "hidden_size": 4, "num_hidden_layers": 3, "intermediate_size": 8, "vocab_size": 16}
    )
    assert shape.kv_bytes == 2 * 2 * 3 * 2 * 2
    assert server_capacity(shape, shape.served_bytes + 5 * 10 * shape.kv_bytes, 10) == 5
    assert server_capacity(shape, shape.served_bytes - 1, 10) == 0


JOBS = {
    "train_continual.sbatch": ["--policy", "llama-1.4b", "--preset", "safety"],
    "train_from_scratch.sbatch": ["--policy", "llama-1.4b", "--preset", "from-scratch"],
    "train_judge.sbatch": ["--policy", "llama-3.1-8b", "--preset", "judge"],
    "train_rewriter.sbatch": ["--policy", "llama-3.1-8b", "--preset", "rewriter"],
}


@pytest.mark.parametrize("script", JOBS)
def test_the_jobs_divide_their_nodes_nearly_as_well_as_the_best_split_and_plan_md_says_so(script: str) -> None:
    text = (REPO / "examples" / script).read_text()
    job = {name: int(count) for name, count in re.findall(r"^([A-Z_]+)=(\d+)", text, re.MULTILINE)}
    calls = re.findall(r"(--judge-concurrency) (\d+)", text)
    nodes = [job[f"{role}_NODES"] for role in ("TRAINER", "ENGINE", "TEACHER")]
    words = ["--judge", "llama-3.1-8b", "--seq-length", str(job["SEQ_LENGTH"]), "--use-distributed-optimizer"]
    words += ["--tensor-model-parallel-size", str(job["TENSOR_PARALLEL"]), *(word for flag in calls for word in flag)]
    words += ["--sequence-parallel"] if job["TENSOR_PARALLEL"] > 1 else []
    gpus = [8 * count for count in nodes]
    report = planner.plan([*JOBS[script], *words, "--gpus", str(sum(gpus)), "--roles", *map(str, gpus)])
    best, given = (report[split]["step"][report["order"]] for split in ("best", "given"))
    assert best <= given < 1.05 * best
    idle, days = report["given"]["idle"]["trainer"], report["given"]["days"][report["order"]]
    row = f"| `{script}` | {', '.join(map(str, nodes))} | {given:.1f} s | {days:.1f} | {idle:.0%} |"
    assert row in (REPO / "docs/plan.md").read_text()


def test_plan_md_s_command_and_figures_of_runs_are_the_planner_s() -> None:
    page = (REPO / "docs/plan.md").read_text()
    [command_line] = re.findall(r"^python -m megatron_sip\.plan (.*)$", page, re.MULTILINE)
    shown = describe(planner.plan(command_line.split()))
    for line in (
        "GPUs: trainer",
        "GB a rank: optimizer",
        "a step, one step ahead",
        "idle, on arrival: judge",
        "2,000 steps, on arrival",
    ):
        assert re.search(rf"^  {re.escape(line)} .* \S+", shown, re.MULTILINE), line
    cheap = planner.plan([*SAFETY, "--gpus", "16", "--judge-schedule", "circulant_bt", "--judge-verdict", "soft"])[
        "best"
    ]
    assert f"16 GPUs make the continued\npretraining's step in {cheap['step']['on arrival']:.0f} s." in page
    node = ["--policy", "llama-3.2-1b", "--judge", "llama-3.1-8b", "--gpus", "8", "--roles", "2", "2", "4"]
    node += ["--preset", "continual", "--criteria", "quality=1", "safety=1"]
    cheaply = ["--judge-schedule", "circulant_bt", "--judge-verdict", "soft"]
    days = [planner.plan([*node, *flags])["given"]["days"]["on arrival"] for flags in (cheaply, [])]
    readme = " ".join((REPO / "README.md").read_text().split())
    assert f"on 8 H100 the first command takes {days[0]:.1f} days by the planner" in readme
    assert f"without the two `--judge` flags, {days[1]:.0f}." in readme
    cycle = ["--policy", "llama-1.4b", "--judge", "llama-3.1-8b", "--gpus", "8", "--roles", "2", "2", "4"]
    cycle += ["--preset", "quality-16", "--teacher-reasoning-tokens", "0"]  # as examples/cycle.sh --size paper has it
    days = [planner.plan([*cycle, *flags])["given"]["days"]["on arrival"] for flags in ([], cheaply)]
    told = f"a policy of 1.4B by a judge of 8B in {days[0]:.0f} days so, and in {days[1]:.1f} with"
    assert told in " ".join((REPO / "docs/training-a-judge.md").read_text().split())
    words = ("--policy", "llama-1.4b", "--judge", "gpt-oss-120b", "--preset", "quality", "--use-distributed-optimizer")
    large = planner.plan([*words, "--gpus", "512", "--roles", "8", "8", "496", "--judge-tp", "2"])["given"]
    told = f"512 H100, {large['step']['on arrival']:.0f} s a step and {large['days']['on arrival']:.1f} days by the planner"
    assert told in (REPO / "docs/slurm.md").read_text()


def test_rows_are_multiples_of_what_the_trainer_s_are() -> None:
    found = {"cpu" if name == "cpu" else "cuda": device.row_multiple for name, device in DEVICES.items()}
    assert found == ROW_MULTIPLE


def test_a_judge_that_only_reads_fits_into_its_gpus_too() -> None:
    """One token a verdict: nothing is held but the weights, 141 GB of them, and they need two GPUs of 80."""
    cheap = ("--judge-schedule", "circulant_bt", "--judge-verdict", "soft")
    words = ["--policy", "llama-1.4b", "--judge", "llama-3.1-70b", "--preset", "safety", *cheap]
    best = planner.plan([*words, "--gpus", "64"])["best"]
    assert best["servers"]["judge"]["GPUs each"] == 4  # 85% of two GPUs are 136 GB
    assert set(best["servers"]["judge"]) == {"GPUs each", "GB of weights"}
    with pytest.raises(ArgumentError, match="the models do not fit"):
        planner.plan([*words, "--gpus", "3", "--judge-tp", "1"])


def test_on_one_computer_the_roles_are_counted_and_else_gpus_are_needed() -> None:
    words = ["--policy", "smollm2-135m", "--preset", f"{REPO}/examples/demo.args"]
    told = planner.plan([*words, "--gpu", "cpu"])
    assert told["best"] == planner.plan([*words, "--gpu", "cpu", "--gpus", "3"])["best"]
    with pytest.raises(ArgumentError, match="--gpus N is needed"):
        planner.plan(words)
    with pytest.raises(ArgumentError, match="--gpus 2, of which each of 3 roles needs one"):
        planner.plan([*words, "--gpus", "2"])


def test_what_cannot_be_planned_is_named() -> None:
    for flags, message in (
        (["--policy", "llama-9b"], "llama-9b: no folder with a config.json, nor a known size; known are gpt-oss-120b"),
        (["--policy", "llama-1.4b", "--answer-share", "0"], "answer share 0.0: a share is above 0"),
        (
            ["--policy", "llama-1.4b", "--preset", "safety", "--roles", "1", "1", "1"],
            "--roles 1 1 1: 3 GPUs, --gpus says 8",
        ),
        (
            ["--policy", "llama-3.1-8b", "--preset", "safety", "--roles", "1", "1", "6"],
            "--roles 1 1 6: a model does not fit",
        ),
        (["--policy", "llama-1.4b", "--num-rollout", "3"], "is --num-rollouts meant"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            planner.plan(["--gpus", "8", *flags])


def test_more_calls_in_flight_fill_servers_until_they_are_full() -> None:
    steps = []
    for calls in (64, 256, 1024, 1 << 20, 1 << 21):
        report = planner.plan([*SAFETY, "--gpus", "64", "--roles", "8", "8", "48", "--judge-concurrency", str(calls)])
        steps.append(report["given"]["seconds"]["judge"])
    assert steps[0] > steps[1] > steps[2] > steps[3] == steps[4]
