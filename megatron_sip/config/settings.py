"""The settings of a run, made of its flags once: what each room is told. Behind `Settings.from_args` nobody reads flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_sip.config.held_out import HeldOutSettings, ValidationSettings, held_out_settings, validation_settings
from megatron_sip.config.needs import Needs, criteria_of
from megatron_sip.config.teacher_settings import judge_settings, rating_settings, replicas, rewriter_settings
from megatron_sip.data.roles import DocumentRole
from megatron_sip.data.tasks import TaskSettings
from megatron_sip.data.tokenization import DEFAULT_CACHE, TokenizeSettings
from megatron_sip.experience.control import Control
from megatron_sip.experience.kind_steps import KindSteps
from megatron_sip.experience.leader import ClientsSettings, EngineSettings
from megatron_sip.experience.maker import ExperienceSettings
from megatron_sip.experience.samples import SampleLog
from megatron_sip.experience.selection import SelectionSettings
from megatron_sip.judge.labelled_tasks import LabelledSettings
from megatron_sip.judge.prompts import read_prompt_file
from megatron_sip.judge.rewriter import RewriterSettings
from megatron_sip.judge.settings import (
    LIKELIHOOD,
    JudgeSettings,
    SettingsError,
    parse_criteria,
    parse_verdicts,
)
from megatron_sip.rollout.pool import PoolSettings
from megatron_sip.rollout.sampling import SamplingSettings
from megatron_sip.serving.calls_in_flight import share_of_calls
from megatron_sip.serving.http_reply import key_from_environment
from megatron_sip.serving.launch import ServerSettings
from megatron_sip.serving.local_servers import ENGINE_FLAGS, ENGINE_MARGIN, LocalServerSettings, ServerUrls
from megatron_sip.training.objectives.settings import ObjectiveSettings

COLOCATED_MEMORY = 0.4
"""Of a GPU's memory, for a server beside the trainer, which keeps its weights and optimizer; not tried on a GPU."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Where a run lives and how long it is.

    save: its checkpoints. run_dir: all else that it writes. hf_config: the policy's config and tokenizer.
    pretrained_checkpoint: its initial weights, None for random ones. prompts: of a step, of all replicas together.
    oversample: the most rounds of so many tasks that a step may ask for. save_interval: in steps. rank: this process's number.
    min_usable_share: of a step's groups, see `is_representative`. step_timeout_s: see `StepWatch`. max_staleness: steps that
    experience is made ahead, 0 or 1.
    """

    save: Path
    run_dir: Path
    hf_config: Path
    pretrained_checkpoint: Path | None
    steps: int
    prompts: int
    save_interval: int
    seed: int
    rank: int
    load_last_whole: bool = False
    oversample: int = 1
    min_usable_share: float = 0.5
    step_timeout_s: float = 0.0
    max_staleness: int = 0


@dataclass(frozen=True, slots=True)
class DataSettings:
    """paths: sources, with weights. split: shares of train, valid and test. vocab_size: all token ids are below it.

    labelled: how labelled records become tasks, None for documents. subset: whose documents of corpora with roles, which have
    splits of their own; None for other sources.
    """

    paths: tuple[str, ...]
    split: str
    vocab_size: int
    tasks: TaskSettings
    tokenizing: TokenizeSettings
    labelled: LabelledSettings | None = None
    subset: DocumentRole | None = None


@dataclass(frozen=True, slots=True)
class LearningRate:
    """As Megatron's schedule was told, for people to read. warmup: in steps."""

    peak: float
    end: float
    decay: str
    warmup: int


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """update_interval: steps between two copies of the policy, 0: never. offload: its weights wait in host memory."""

    update_interval: int = 0
    offload: bool = False


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How engines are reached and fed. concurrency: calls in flight of all `replicas` together, None: by the number of engines.

    context_length: tokens that an engine must take, prompt and answer. weight_sync: see --weight-sync; sync_dir: for disk.
    run_id: the run's name, known once its folder is open.
    colocate: engines share the trainer's GPUs, see `TimeSharing`.
    """

    timeout_s: float
    concurrency: int | None
    replicas: int
    key_variable: str | None
    vocab_size: int
    context_length: int
    weight_sync: Literal["distributed", "disk"]
    sync_dir: Path
    bucket_bytes: int
    run_id: str = ""
    colocate: bool = False

    def key(self) -> str | None:
        """What the engines demand as a bearer token; checked when the flags were."""
        return key_from_environment(self.key_variable) if self.key_variable else None

    def engines(self, urls: tuple[str, ...]) -> EngineSettings:
        """A leader's side of the engines at `urls`."""
        pool = PoolSettings(
            call_timeout_s=self.timeout_s,
            deadline_s=3 * self.timeout_s,
            max_concurrency=max(1, share_of_calls(self.concurrency, len(urls), self.replicas) // len(urls)),
            key=self.key(),
            vocab_size=self.vocab_size,
            run_id=self.run_id,
        )
        return EngineSettings(urls, pool, self.context_length)


@dataclass(frozen=True, slots=True)
class Settings:
    """All of a run. row_length: tokens of the longest packed row; one that was not given is the shortest that holds a group.
    branches_per_row: see TrainerSettings. urls: of the servers that the flags name.

    judge, eval_judge, rating_judge, rewriter: None where nobody is asked; servers that are yet to be started have a made-up URL
    in them.
    """

    run: RunSettings
    needs: Needs
    data: DataSettings
    objective: ObjectiveSettings
    reference: ReferenceSettings
    row_length: int
    row_length_given: bool
    branches_per_row: int | None
    learning_rate: LearningRate
    experience: ExperienceSettings
    rollouts: RolloutSettings
    held_out: HeldOutSettings
    validation: ValidationSettings
    judge: JudgeSettings | None
    eval_judge: JudgeSettings | None
    rating_judge: JudgeSettings | None
    rewriter: RewriterSettings | None
    local_servers: LocalServerSettings
    urls: ServerUrls

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        """What `parse_arguments` returns, as settings. Raises ValueError (SettingsError) that names the flag."""
        needs, tasks = Needs.from_args(args), task_settings(args)
        return cls(
            run=run_settings(args),
            needs=needs,
            data=DataSettings(
                tuple(args.data_path),
                args.split,
                args.vocab_size,
                tasks,
                tokenize_settings(args),
                labelled_settings(args) if args.tasks != "documents" else None,
                args.subset,
            ),
            objective=objective_settings(args),
            reference=ReferenceSettings(args.ref_update_interval, args.ref_offload),
            row_length=args.row_length,
            row_length_given=args.row_length_given,
            branches_per_row=args.branches_per_row,
            learning_rate=LearningRate(args.lr, args.min_lr, args.lr_decay_style, args.lr_warmup_iters),
            experience=experience_settings(args),
            rollouts=rollout_settings(args),
            held_out=held_out_settings(args),
            validation=validation_settings(args),
            judge=judge_settings(args) if needs.judge else None,
            eval_judge=judge_settings(args, "eval_judge") if needs.eval_judge else None,
            rating_judge=rating_settings(args, needs.rater_role) if needs.rates else None,
            rewriter=rewriter_settings(args) if needs.rewriter else None,
            local_servers=local_server_settings(args),
            urls=ServerUrls(*(tuple(getattr(args, f"{role}_url") or ()) for role in URL_ROLES)),
        )

    def clients(self, urls: ServerUrls) -> ClientsSettings:
        """A leader's clients of the servers that the run needs, of those which are at `urls`."""
        rewriter_urls = urls.rewriter if self.needs.own_rewriter else urls.teacher
        raters = urls.eval_judge if self.needs.own_eval_judge else urls.teacher
        return ClientsSettings(
            engines=self.rollouts.engines(tuple(urls.engines)) if self.needs.engines and urls.engines else None,
            judge=_judge_at(self.judge, urls.teacher),
            eval_judge=_judge_at(self.eval_judge, urls.eval_judge),
            rating_judge=_judge_at(self.rating_judge, raters),
            rewriter=replace(self.rewriter, client=self.rewriter.client.at(rewriter_urls))
            if self.rewriter is not None and rewriter_urls
            else None,
        )


def _judge_at(judge: JudgeSettings | None, urls: Sequence[str]) -> JudgeSettings | None:
    """The judge at these servers; None while it has none, one that asks none as it is."""
    if judge is None or judge.client is None:
        return judge
    return replace(judge, client=judge.client.at(tuple(urls))) if urls else None


URL_ROLES = ("rollout", "teacher", "rewriter", "eval_judge")
"""For each there is a flag --ROLE-url; in the order of `ServerUrls`."""


def run_settings(args: argparse.Namespace) -> RunSettings:
    """Folders, length, seed."""
    return RunSettings(
        save=Path(args.save),
        run_dir=Path(args.run_dir),
        hf_config=Path(args.hf_config),
        pretrained_checkpoint=Path(args.pretrained_checkpoint) if args.pretrained_checkpoint else None,
        steps=args.train_iters,
        prompts=args.global_batch_size,
        save_interval=args.save_interval,
        seed=args.seed,
        rank=args.rank,
        load_last_whole=args.load_last_whole,
        oversample=args.grpo_oversample,
        min_usable_share=args.min_usable_share,
        step_timeout_s=args.step_timeout,
        max_staleness=args.max_staleness,
    )


def task_settings(args: argparse.Namespace) -> TaskSettings:
    """How documents are cut. Raises ValueError."""
    if args.task_mode == "whole":
        return TaskSettings.whole(args.seq_length, args.seed)
    return TaskSettings(
        seq_length=args.seq_length,
        suffix_length=args.suffix_length,
        mode=args.task_mode,
        seed=args.seed,
        min_prefix_length=args.min_prefix_length,
    )


def tokenize_settings(args: argparse.Namespace) -> TokenizeSettings:
    """How text becomes tokens, and where they are kept."""
    return TokenizeSettings(
        text_field=args.text_field,
        prepend_bos=args.prepend_bos,
        cache_dir=Path(args.data_cache_path or DEFAULT_CACHE),
    )


def labelled_settings(args: argparse.Namespace) -> LabelledSettings:
    """How labelled records become tasks. Raises SettingsError."""
    default_verdict, verdicts = parse_verdicts(args.judge_verdict)
    return LabelledSettings(
        kind=args.tasks,
        max_prompt=args.max_prompt_length or args.seq_length - args.suffix_length,
        max_answer=args.suffix_length,
        prefix_chars=args.judge_prefix_chars,
        default_verdict=default_verdict,
        verdicts=verdicts,
        seed=args.seed,
        rewrite_prompt=Path(args.rewrite_prompt) if args.rewrite_prompt else None,
    )


def objective_settings(args: argparse.Namespace) -> ObjectiveSettings:
    """The objective and its constants. Raises ValueError for one out of its range."""
    return ObjectiveSettings(
        objective=args.objective,
        beta=args.dpo_beta,
        nll_coef=args.dpo_nll_coef,
        label_smoothing=args.dpo_label_smoothing,
        dpo_loss=args.dpo_loss,
        clip_low=args.grpo_clip_low,
        clip_high=args.grpo_clip_high,
        kl_coef=args.grpo_kl_coef,
        grpo_length=args.grpo_length,
        grpo_constant=args.suffix_length,
        mismatch_correction=args.mismatch_correction,
    )


def selection_settings(args: argparse.Namespace) -> SelectionSettings:
    """Which candidates compete, and for what. Raises ValueError."""
    return SelectionSettings(
        objective=args.objective,
        candidates=Needs.from_args(args).kinds,
        sft_target=args.sft_target,
        fixed_roles=tuple(args.dpo_pair) if args.dpo_pair is not None else None,
        seed=args.seed,
        control=control_settings(args),
        truncated=args.truncated_answers,
        spread_normalization=args.grpo_spread_normalization,
    )


def control_settings(args: argparse.Namespace) -> Control | None:
    """The control texts, None without --control-token. Raises ValueError."""
    name = args.control_token
    if name is None:
        if args.control_text:
            raise SettingsError("--control-text belongs to --control-token CRITERION, which is not given")
        return None
    if name not in parse_criteria(criteria_of(args)):
        raise SettingsError(
            f"--control-token {name} is not among --criteria {' '.join(criteria_of(args))}; add it there"
        )
    if name == LIKELIHOOD and args.control_threshold >= 0:
        raise SettingsError(
            f"--control-threshold {args.control_threshold:g}: likelihood is a mean log-prob, below 0; give such a threshold"
        )
    filed = read_prompt_file(Path(name)).name if name.endswith(".txt") else name
    return Control.of(filed, tuple(args.control_text) if args.control_text else None, args.control_threshold)


def kind_steps(args: argparse.Namespace) -> KindSteps:
    """At which steps each kind is a candidate."""
    return KindSteps(args.rollout_start_step, args.suffix_end_step, args.rewrite_end_step)


def rollout_sampling(args: argparse.Namespace) -> SamplingSettings:
    """How rollouts are sampled; `n` is 1 where there are none. Raises ValueError."""
    return SamplingSettings(
        max_new_tokens=args.suffix_length,
        temperature=args.rollout_temperature,
        top_p=args.rollout_top_p,
        n=max(1, args.num_rollouts),
    )


def experience_settings(args: argparse.Namespace) -> ExperienceSettings:
    """What the leaders' experience depends on, as the first of them keeps it. Raises ValueError."""
    return ExperienceSettings(
        kinds=Needs.from_args(args).kinds,
        sampling=rollout_sampling(args),
        selection=selection_settings(args),
        kind_steps=kind_steps(args),
        record=Path(args.save_groups) if args.save_groups else None,
        replay=Path(args.replay_groups) if args.replay_groups else None,
        samples=SampleLog.of(Path(args.run_dir), args.train_iters),
        rollout_seed=args.seed,
    )


def rollout_settings(args: argparse.Namespace) -> RolloutSettings:
    """How engines are reached, and get their weights."""
    return RolloutSettings(
        timeout_s=args.rollout_timeout,
        concurrency=args.rollout_concurrency,
        replicas=replicas(args),
        key_variable=args.rollout_key_variable,
        vocab_size=args.vocab_size,
        context_length=args.seq_length + ENGINE_MARGIN,
        weight_sync=args.weight_sync,
        sync_dir=Path(args.weight_sync_dir),
        bucket_bytes=args.weight_sync_bucket_mb << 20,
        colocate=args.colocate,
    )


def local_server_settings(args: argparse.Namespace) -> LocalServerSettings:
    """The servers that this run starts."""
    memory = COLOCATED_MEMORY if args.colocate and args.local_server_memory is None else args.local_server_memory
    needs, logs = Needs.from_args(args), Path(args.run_dir or args.save) / "logs"
    common = ServerSettings(
        model_path=args.hf_config or "",
        dtype=args.local_engine_dtype,
        mem_fraction=memory,
        max_total_tokens=args.local_engine_tokens,
        seed=args.seed,
    )
    engine = replace(
        common,
        log_file=logs / "engine.log",
        context_length=args.seq_length + ENGINE_MARGIN,
        extra_args=ENGINE_FLAGS,
        memory_saver=args.colocate,
    )
    theirs = replace(common, dtype="auto")  # what a small judge learnt in float32 another format would round away
    teacher = replace(theirs, model_path=args.teacher_model or "", log_file=logs / "teacher.log")
    rewriter = replace(theirs, model_path=args.rewriter_model or "", log_file=logs / "rewriter.log")
    return LocalServerSettings(
        engine=engine if args.rollout_local and needs.engines else None,
        engines=args.rollout_local,
        teacher=teacher if args.teacher_model and needs.teacher else None,
        teachers=args.teacher_replicas,
        rewriter=rewriter if args.rewriter_model and needs.rewriter else None,
        share_gpus=memory is not None,
        colocate=args.colocate,
    )
