"""What a run consists of on this rank, and how it is set up from the flags: cheap checks first, the model last."""

from __future__ import annotations

import argparse
import contextlib
import socket
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.checkpointing import save_checkpoint
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from megatron_sip.checkpoints.checksums import ChecksumWriter
from megatron_sip.checkpoints.folder import TRACKER, mend_checkpoint_folder, require_checkpoint
from megatron_sip.config.checks import objective_settings
from megatron_sip.config.needs import needs_engines, needs_rewriter
from megatron_sip.console import say
from megatron_sip.data.documents import open_corpus
from megatron_sip.data.shared_texts import count_shared_texts
from megatron_sip.data.tasks import TaskSettings, TaskSource
from megatron_sip.data.tokenization import DEFAULT_CACHE, TokenizeSettings
from megatron_sip.evaluation.win_rate import HeldOutComparison
from megatron_sip.experience.leader import (
    Leader,
    LocalServers,
    StartedUrls,
    check_named_servers,
    rollout_key,
    rollout_sampling,
)
from megatron_sip.experience.maker import Experience
from megatron_sip.hf.checkpoint_model import require_same_model
from megatron_sip.hf.families import architecture
from megatron_sip.hf.folder import HF_SUBFOLDER, write_model_files
from megatron_sip.hf.weights import export_hf_weights
from megatron_sip.metrics import Metrics, flatten
from megatron_sip.records import Task
from megatron_sip.rollout.handshake import WeightSyncError
from megatron_sip.rollout.sync_disk import DiskWeightSync
from megatron_sip.rollout.sync_distributed import DistributedWeightSync
from megatron_sip.rollout.weight_group import SyncSettings
from megatron_sip.rollout.weight_sync import SyncRank, WeightSync
from megatron_sip.stop_signal import StopSignal
from megatron_sip.training.checkpoints import require_whole_checkpoint, require_whole_weights, saving_explained
from megatron_sip.training.leaders import LeaderExchange
from megatron_sip.training.metrics_writer import MetricsWriter
from megatron_sip.training.reference_model import Reference, ReferenceStore, build_reference
from megatron_sip.training.resume import require_resumable, saved_run, what_is_new
from megatron_sip.training.trainer import PolicyTrainer, TrainerSettings

EXCHANGE_SECONDS = 8 * 3600.0
"""Ranks wait for each other while rank 0 tokenises a corpus, and a leader for its judge; both have deadlines of their own."""


@dataclass
class Run:
    """The parts of a run on this rank. `leader`, `tasks`, `writer`, `comparison` are None on ranks without that duty."""

    args: argparse.Namespace
    exchange: LeaderExchange
    trainer: PolicyTrainer
    reference: Reference | None
    reference_store: ReferenceStore
    tasks: TaskSource | None
    leader: Leader | None
    weight_sync: WeightSync | None
    hf_config: Any
    writer: MetricsWriter | None
    comparison: HeldOutComparison | None
    checksums: ChecksumWriter
    troubles: list[str] = field(default_factory=list)
    """What ends the run, once its present step is saved; empty where another rank says it."""
    unsaved_reference: int | None = None
    """Iteration at which the reference was updated, when no checkpoint has kept it since."""

    def my_tasks(self, ahead: int = 0) -> list[Task]:
        """This leader's share of the step that is `ahead` of the present one, none after the last step.

        Contiguous, by replica; a function of the cursor alone.
        """
        assert self.tasks is not None
        if self.args.iteration + ahead >= self.args.train_iters:
            return []
        share = self.args.global_batch_size // self.exchange.num_replicas
        step = self.args.consumed_train_samples + ahead * self.args.global_batch_size
        return self.tasks.tasks(step + self.exchange.replica * share, share)

    def make_experience(self, stop: StopSignal) -> Experience | None:
        """This leader's share of the present step's experience, None on other ranks and when a stop was requested."""
        if self.leader is None:
            return None
        next_tasks = self.my_tasks(ahead=1) if needs_rewriter(self.args) else []
        return self.leader.make_experience(self.args.iteration, self.my_tasks(), next_tasks, stop)

    def refresh_reference(self) -> None:
        """Copy the policy into the reference when --ref-update-interval says so; the next checkpoint keeps it."""
        interval = self.args.ref_update_interval
        if self.reference is not None and interval and self.args.iteration % interval == 0:
            self.reference.copy_policy()
            self.unsaved_reference = self.args.iteration

    def push_weights(self, *, require_all: bool = False) -> Metrics:
        """Give the engines the policy's weights; the version they then report is the iteration.

        Returns, on every rank, how many engines did not take them. That none did, or that a disk is full, joins the
        `troubles` of every rank; with `require_all` it raises WeightSyncError there, as soon as one engine is missing.
        """
        unsynced: int | str | None = None
        if self.weight_sync is not None:
            weights = export_hf_weights(self.trainer.model, self.hf_config)
            try:
                unsynced = len(self.weight_sync.push(weights, str(self.args.iteration), require_all=require_all))
            except (WeightSyncError, OSError, SafetensorError) as error:
                unsynced = f"the engines did not get the weights of step {self.args.iteration}: {error}"
        found = self.exchange.all_gather_from_leaders(unsynced)[0]  # of the first replica, whose ranks push
        if isinstance(found, str):
            if require_all:
                raise WeightSyncError(found)
            self.troubles.append(found if self.args.rank == 0 else "")
            return {}
        return {} if found is None else {"engines/unsynced": float(found)}

    def save_is_due(self) -> bool:
        """Whether a multiple of --save-interval was reached since the last checkpoint."""
        last = self.args.last_saved_iteration or 0
        return self.args.iteration // self.args.save_interval > last // self.args.save_interval

    def save(self) -> None:
        """Save a checkpoint of the present iteration, unless the last one is of it already; first its reference."""
        if self.args.iteration == self.args.last_saved_iteration:
            return
        save, trainer = Path(self.args.save), self.trainer
        with saving_explained(save, self.args.iteration):
            if self.reference is not None and self.unsaved_reference is not None:
                self.reference_store.save(self.reference, self.unsaved_reference)
                self.unsaved_reference = None
            # The cursor, consumed_train_samples, is among Megatron's arguments, which are part of the checkpoint.
            save_checkpoint(
                self.args.iteration,
                trainer.model,
                trainer.optimizer,
                trainer.scheduler,
                0,
                checkpointing_context=trainer.checkpointing_context,
            )
        self.args.last_saved_iteration = self.args.iteration
        self.checksums.add(save / f"iter_{self.args.iteration:07d}")

    def finish_saving(self, *, wait: bool) -> None:
        """Commit the asynchronous saves that are done, or all of them when `wait`; their checksums follow."""
        with saving_explained(Path(self.args.save), self.args.last_saved_iteration or 0):
            maybe_finalize_async_save(blocking=wait, terminate=wait)
        self.checksums.proceed(wait=wait)

    def write_metrics(self, metrics: Metrics) -> None:
        """Log the present step, on the rank that has the writer."""
        if self.writer is None:
            return
        try:
            self.writer.write(self.args.iteration, flatten(metrics))
        except OSError as error:
            self.troubles.append(f"{self.writer.path} took no more: {error.strerror or error}")


def set_up(args: argparse.Namespace, stack: contextlib.ExitStack) -> Run:
    """Check servers and data, build and load the model, connect the engines; `stack` gets everything to be closed.

    Raises:
        DataError, SettingsError, ServerStartError, RequestError: what the user can mend, before any training.
    """
    exchange = LeaderExchange(timeout_seconds=EXCHANGE_SECONDS)
    open_run_folder(args, exchange)
    tokenizer = AutoTokenizer.from_pretrained(args.hf_config)
    urls = (args.rollout_url, args.teacher_url, args.rewriter_url, args.eval_judge_url)
    named = any(urls)  # a wrong URL must not show only after hours of tokenising
    if named and args.rank == 0 and (args.rollout_local or args.teacher_model or args.rewriter_model):
        check_named_servers(args)
    servers = start_local_servers(args, stack) if named else None
    leader = open_leader(args, tokenizer, exchange, servers, stack) if named else None
    tasks, held_out = open_tasks(args, tokenizer, exchange)
    if not named:
        servers = start_local_servers(args, stack)  # in the background, while the model is built
    with StopSignal.kept_from_children():
        get_write_results_queue()  # Megatron's checkpoint writers report through a process that a stop must not end
    trainer, reference, store = load_policy(args, exchange, tasks)
    if not named:
        leader = open_leader(args, tokenizer, exchange, servers, stack)
    run = Run(
        args=args,
        exchange=exchange,
        trainer=trainer,
        reference=reference,
        reference_store=store,
        tasks=tasks,
        leader=leader,
        weight_sync=open_weight_sync(args, exchange, stack),
        hf_config=AutoConfig.from_pretrained(args.hf_config),
        writer=open_writer(args, stack),
        comparison=open_comparison(args, held_out, tokenizer),
        checksums=ChecksumWriter(args.rank),
    )
    run.push_weights(require_all=True)  # a wrong URL must not be taken for an engine that died
    if run.comparison is not None and leader is not None and leader.engines is not None:
        if args.iteration == 0:
            say(f"comparison: sampling {args.win_rate_prompts} held-out continuations of the initial policy")
            leader.run(run.comparison.record_initial(leader.engines))
        run.comparison.check_initial()
    exchange.barrier()
    return run


def open_run_folder(args: argparse.Namespace, exchange: LeaderExchange) -> None:
    """Mend the checkpoint folder after a kill and refuse weights that cannot be loaded, before anything costs time.

    Raises:
        DataError: a checkpoint is not whole, or the one that the run starts from is of another model than --hf-config.
    """
    save, hf_dir = Path(args.save), Path(args.hf_config)
    if args.rank == 0:
        for line in mend_checkpoint_folder(save, last_whole=args.load_last_whole):
            say(f"checkpoint: {line}")
    exchange.barrier()
    require_whole_checkpoint(save, exchange, args.rank, last_whole=args.load_last_whole)
    resumes = (save / TRACKER).exists()
    if args.pretrained_checkpoint and not resumes:
        require_checkpoint(Path(args.pretrained_checkpoint))
        require_whole_weights(Path(args.pretrained_checkpoint), exchange, args.rank)
    start = save if resumes else args.pretrained_checkpoint
    if start is not None:
        wanted = architecture(AutoConfig.from_pretrained(hf_dir))
        require_same_model(Path(start), wanted, f"{hf_dir}/config.json")
    if args.rank == 0:  # so that checkpoints convert back on their own
        write_model_files(hf_dir, save / HF_SUBFOLDER, renew=not resumes)


def open_tasks(
    args: argparse.Namespace, tokenizer: Any, exchange: LeaderExchange
) -> tuple[TaskSource | None, TaskSource | None]:
    """(training tasks, held-out tasks) on leaders; rank 0 goes first, so that text is tokenised once."""
    settings = TaskSettings(
        seq_length=args.seq_length,
        suffix_length=args.suffix_length,
        mode=args.task_mode,
        seed=args.seed,
        min_prefix_length=args.min_prefix_length,
    )
    tokenizing = TokenizeSettings(
        text_field=args.text_field,
        prepend_bos=args.prepend_bos,
        cache_dir=Path(args.data_cache_path or DEFAULT_CACHE),
    )
    training = held_out = None
    for turn in (True, False):
        if exchange.is_leader and (args.rank == 0) == turn:
            if args.rank == 0:
                say(f"data: opening it; text is tokenised once and kept in {tokenizing.cache_dir}")
            corpus = open_corpus(args.data_path, tokenizer, tokenizing, vocab_size=args.vocab_size)
            splits = corpus.split(args.split)
            training = TaskSource(splits["train"], tokenizer, settings)
            if args.rank == 0:
                report = training.report(args.train_iters * args.global_batch_size)
                say(f"tasks: {tasks_line(report)}")
                print(f"tasks: {report}", flush=True)
                if args.win_rate_prompts:
                    held_out = TaskSource(splits["test"], tokenizer, settings)
                    around = (tokenizer.bos_token_id, tokenizer.eos_token_id)
                    shared = count_shared_texts(splits["train"], splits["test"], around, tokenizing.cache_dir)
                    say(f"data: {shared}")
        exchange.barrier()
    return training, held_out


def tasks_line(report: Mapping[str, Any]) -> str:
    """What a run's tasks are cut from, in a line; its log holds the rest of `TaskSource.report`."""
    passes = max(source["epochs"] for source in report["sources"])
    count = len(report["sources"])
    short = f", {report['too_short']:,} of them too short" if report["too_short"] else ""
    return (
        f"documents {report['documents']:,}{short}, tokens {report['tokens']:,}, sources {count}; epochs in this run "
        f"{passes:.2g}{' at most' * (count > 1)}"
    )


def start_local_servers(args: argparse.Namespace, stack: contextlib.ExitStack) -> LocalServers | None:
    """Start this node's servers, if the flags ask for any, in the background; None on all ranks but 0."""
    if args.rank != 0:
        return None
    servers = LocalServers(args)
    if servers.description:
        say(f"servers: starting {servers.description} on this node; their logs are in {args.run_dir}/logs")
    stack.callback(servers.stop)
    return servers


def open_leader(
    args: argparse.Namespace,
    tokenizer: Any,
    exchange: LeaderExchange,
    servers: LocalServers | None,
    stack: contextlib.ExitStack,
) -> Leader | None:
    """The clients of engines and teacher, on leaders. All ranks learn the URLs of servers that rank 0 started."""
    waiting = time.monotonic()
    started = servers.urls() if servers is not None else StartedUrls()
    if servers is not None and servers.description:
        say(f"servers: ready, {time.monotonic() - waiting:.0f} s after all else")
    found = exchange.all_gather_from_leaders(started)[0]
    args.rollout_url = args.rollout_url or found.engines
    args.teacher_url = args.teacher_url or found.teacher
    args.rewriter_url = args.rewriter_url or found.rewriter
    if not exchange.is_leader:
        return None
    leader = Leader(args, tokenizer, args.rollout_url, args.teacher_url, exchange.replica, args.rewriter_url)
    stack.callback(leader.close)
    return leader


def load_policy(
    args: argparse.Namespace, exchange: LeaderExchange, tasks: TaskSource | None
) -> tuple[PolicyTrainer, Reference | None, ReferenceStore]:
    """The policy at its last checkpoint (or its initial weights), and the reference that goes with it."""
    save = Path(args.save)
    args.task_fingerprint = exchange.all_gather_from_leaders(tasks.fingerprint() if tasks is not None else None)[0]
    saved = saved_run(save)
    if saved is not None:
        require_resumable(saved, args)
        if args.rank == 0:
            for line in what_is_new(saved, args):
                say(line)
    args.non_finite_steps = getattr(saved, "non_finite_steps", 0)
    objective = objective_settings(args)
    # Padding is masked: any id does that the embedding has, and a tokenizer's own may lie outside it.
    if args.rank == 0:
        say("policy: building the model and loading its weights")
    settings = TrainerSettings(args.row_length, args.global_batch_size, args.align_grad_reduce)
    trainer = PolicyTrainer(settings, objective, exchange, pad_id=0)
    if args.rank == 0:
        say(f"policy: {origin_of_weights(args)}")
    args.last_saved_iteration = args.iteration if args.iteration else None
    store = ReferenceStore(save)
    store.forget_after(args.iteration)
    if not objective.needs_reference:
        return trainer, None, store
    reference = build_reference(trainer.model, offload=args.ref_offload)
    if args.iteration:
        store.load(reference, args.iteration)
    else:
        store.save(reference, 0)
    return trainer, reference, store


def origin_of_weights(args: argparse.Namespace) -> str:
    """Where the policy's weights, which are loaded, come from."""
    if args.iteration:
        return f"continued at step {args.iteration} of {args.train_iters}, from {args.save}"
    if args.pretrained_checkpoint is not None:
        return f"starts from the weights of {args.pretrained_checkpoint}"
    return "starts from RANDOM weights: --hf-config gives only the architecture, --pretrained-checkpoint weights"


def open_weight_sync(
    args: argparse.Namespace, exchange: LeaderExchange, stack: contextlib.ExitStack
) -> WeightSync | None:
    """The way to the engines, on the ranks of the first replica, which hold all weights between them."""
    if not needs_engines(args) or exchange.replica != 0:
        return None
    rank = SyncRank(
        source=parallel_state.get_tensor_model_parallel_rank() == 0,
        lead=exchange.is_leader,
        name=f"stage{parallel_state.get_pipeline_model_parallel_rank()}",
        exchange=exchange.all_gather_in_replica,
    )
    settings = SyncSettings(
        backend="nccl" if torch.cuda.is_available() else "gloo",
        address=address_for(args.rollout_url),
        bucket_bytes=args.weight_sync_bucket_mb << 20,
        timeout_s=args.rollout_timeout,
        key=rollout_key(args),
    )
    sync: WeightSync
    if args.weight_sync == "disk":
        sync = DiskWeightSync(args.rollout_url, rank, settings, Path(args.weight_sync_dir), Path(args.hf_config))
    else:
        sync = DistributedWeightSync(args.rollout_url, rank, settings)
    sync.connect()
    stack.callback(sync.close)
    return sync


def address_for(urls: Sequence[str]) -> str:
    """This host's address as all servers at `urls` see it: one of this host reaches that of an interface, too."""
    addresses = [address_towards(url) for url in urls]
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])


def address_towards(url: str) -> str:
    """This host's address as the server at `url` sees it: that of the interface packets to it leave through."""
    target = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target.hostname, target.port or 80))  # a datagram socket sends nothing here
        return str(probe.getsockname()[0])


def open_writer(args: argparse.Namespace, stack: contextlib.ExitStack) -> MetricsWriter | None:
    """On the last rank, where Megatron keeps its tensorboard and wandb writers."""
    if args.rank != dist.get_world_size() - 1:
        return None
    writer = MetricsWriter(
        Path(args.run_dir), args.iteration, args.train_iters, get_tensorboard_writer(), get_wandb_writer()
    )
    stack.callback(writer.close)
    return writer


def open_comparison(args: argparse.Namespace, held_out: TaskSource | None, tokenizer: Any) -> HeldOutComparison | None:
    """The comparison with the initial policy, on rank 0 when --win-rate-prompts asks for it."""
    if held_out is None:
        return None
    sampling = rollout_sampling(args, num=1, temperature=args.win_rate_temperature)
    indices = range(args.win_rate_prompts)
    return HeldOutComparison(
        tasks=held_out.tasks(0, args.win_rate_prompts),
        documents=[held_out.document(index) for index in indices],
        sampling=sampling,
        tokenizer=tokenizer,
        initial=Path(args.run_dir) / "initial_continuations.json",
        seed=args.seed,
    )
