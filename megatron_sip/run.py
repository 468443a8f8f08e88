"""What a run consists of on this rank, and how it is set up: cheap checks first, the model last."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from megatron.training.checkpointing import save_checkpoint
from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from megatron_sip.checkpoints.checksums import ChecksumWriter
from megatron_sip.checkpoints.folder import TRACKER, mend_checkpoint_folder, require_checkpoint, run_id
from megatron_sip.config.settings import RunSettings, Settings
from megatron_sip.console import say
from megatron_sip.data.tasks import Tasks
from megatron_sip.evaluation.held_out import HeldOutComparison
from megatron_sip.evaluation.suite_validation import SuiteValidation
from megatron_sip.evaluation.validation import Validation
from megatron_sip.experience.ahead import is_worth_keeping, made_for, pack, unpack
from megatron_sip.experience.leader import Leader, check_servers
from megatron_sip.experience.maker import Experience
from megatron_sip.experience.rounds import StepExperience
from megatron_sip.hf.checkpoint_model import require_same_model
from megatron_sip.hf.families import architecture
from megatron_sip.hf.folder import HF_SUBFOLDER, write_model_files
from megatron_sip.hf.weights import export_hf_weights
from megatron_sip.judge.python_functions import check_functions
from megatron_sip.judge.settings import function_of
from megatron_sip.metrics import Metrics, flatten
from megatron_sip.open_measurements import check_prompt_sets, open_comparison, open_suites, open_validation
from megatron_sip.open_servers import (
    clients,
    open_leader,
    open_time_sharing,
    open_weight_sync,
    share_urls,
    start_local_servers,
)
from megatron_sip.open_tasks import open_tasks
from megatron_sip.open_trainer import open_trainer
from megatron_sip.records import Task
from megatron_sip.rollout.handshake import WeightSyncError, version_of_run
from megatron_sip.rollout.weight_sync import WeightSync
from megatron_sip.run_state import RunState
from megatron_sip.serving.local_servers import LocalServers
from megatron_sip.step_watch import StepWatch
from megatron_sip.stop_signal import StopSignal
from megatron_sip.time_sharing import TimeSharing
from megatron_sip.training.checkpoints import require_whole_checkpoint, require_whole_weights, saving_explained
from megatron_sip.training.leaders import LeaderExchange
from megatron_sip.training.metrics_writer import MetricsWriter
from megatron_sip.training.reference_model import Reference, ReferenceStore, build_reference
from megatron_sip.training.resume import require_resumable, saved_run, what_is_new
from megatron_sip.training.trainer import PolicyTrainer, has_stepped

PUSHES_AGAIN = 2
"""Of weights that no engine took, when engines of this node are back."""
EXCHANGE_SECONDS = 8 * 3600.0
"""Ranks wait for each other while rank 0 tokenises a corpus, and a leader for its judge; both have deadlines of their own."""


@dataclass
class Run:
    """The parts of a run on this rank. `leader`, `tasks`, `writer`, `comparison`, `validation` are None on ranks without that
    duty."""

    settings: Settings
    state: RunState
    exchange: LeaderExchange
    trainer: PolicyTrainer
    reference: Reference | None
    reference_store: ReferenceStore
    tasks: Tasks | None
    leader: Leader | None
    weight_sync: WeightSync | None
    hf_config: Any
    writer: MetricsWriter | None
    comparison: HeldOutComparison | None
    validation: Validation | SuiteValidation | None
    checksums: ChecksumWriter
    troubles: list[str] = field(default_factory=list)
    """What ends the run, once its present step is saved; empty where another rank says it."""
    servers: LocalServers | None = None
    """Those of this node, on the rank that started them."""
    sharing: TimeSharing | None = None
    """With --colocate."""
    watch: StepWatch = field(default_factory=lambda: StepWatch(0.0, ""))
    unsaved_reference: int | None = None
    """Iteration at which the reference was updated, when no checkpoint has kept it since."""
    copied: tuple[int, int] | None = None
    """What the reference was last updated at, as `RunState.trained`."""
    served: int = 0
    """Iteration whose weights the engines have."""
    ahead: StepExperience | None = None
    """The present step's experience, where it was made while the step before it trained."""

    def my_tasks(self, ahead: int = 0) -> list[Task]:
        """This leader's share of the batch of tasks that is `ahead` of the present step's first; none behind the run's last.

        Contiguous, by replica; a function of the cursor alone.
        """
        assert self.tasks is not None
        run = self.settings.run
        if ahead >= (run.steps - self.state.iteration) * run.oversample:
            return []
        share = run.prompts // self.exchange.num_replicas
        first = self.state.consumed_samples + ahead * run.prompts
        return self.tasks.tasks(first + self.exchange.replica * share, share)

    def make_experience(self, stop: StopSignal, round_index: int = 0) -> Experience | None:
        """This leader's share of a round of this step's experience, None on other ranks and when a stop was requested."""
        return self.collect(self.begin_experience(stop, round_index))

    def begin_experience(
        self, stop: StopSignal, round_index: int = 0, behind: int = 0
    ) -> Future[Experience | None] | None:
        """Begin a round of the present step's experience or, with `behind`, the rounds that this one takes, of the next step's.

        The tasks of the round behind it are the next batch, whether this step asks for it or the next one.
        """
        if self.leader is None:
            return None
        batch = behind + round_index
        next_tasks = self.my_tasks(batch + 1) if self.settings.needs.rewriter else []
        step = self.state.iteration + bool(behind)
        tasks = self.my_tasks(batch)
        return self.leader.begin_experience(step, str(self.served), tasks, next_tasks, stop, round_index)

    def collect(self, under_way: Future[Experience | None] | None) -> Experience | None:
        """What was begun, once it is there."""
        self.watch.doing("making experience" if self.leader is not None else "waiting for the leaders' experience")
        if self.leader is None or under_way is None:
            return None
        made = self.leader.wait(under_way)
        if made is not None and self.tasks is not None:
            made.metrics.update(self.tasks.take_counts())
        return made

    def measure(self, stop: StopSignal) -> Metrics | None:
        """What validation finds of the present weights; None on other ranks than the first, and when a stop was requested."""
        self.watch.begins(f"validation after step {self.state.iteration}")
        if self.validation is None or self.leader is None:
            return None
        leader, engines, version = self.leader, self.leader.engines, str(self.state.iteration)
        assert engines is not None
        if isinstance(self.validation, SuiteValidation):
            judges = leader.eval_judge, leader.rating_judge
            return leader.judged(self.validation.measure(engines, *judges, version), stop, *judges)
        assert leader.judge is not None
        return leader.judged(self.validation.measure(engines, leader.judge, version), stop, leader.judge)

    def refresh_reference(self) -> None:
        """Copy the policy into the reference when --ref-update-interval says so; the next checkpoint keeps it.

        Not where it has not changed since the last copy, in steps without examples: these can be forgotten.
        """
        interval, state = self.settings.reference.update_interval, self.state
        if self.reference is None or not interval or state.iteration % interval or state.trained == self.copied:
            return
        self.reference.copy_policy()
        self.unsaved_reference = state.iteration
        state.note_trained()
        self.copied = state.trained

    def push_weights(self, *, require_all: bool = False) -> Metrics:
        """Give the engines the policy's weights; the version they then report is the run's name and the iteration.

        Returns, on every rank, how many engines did not take them. That none did, also after those that this run started were
        started again, or that a disk is full, joins the `troubles` of every rank; with `require_all` it raises WeightSyncError
        there, as soon as one engine is missing.
        """
        self.watch.doing("sending weights to the engines")
        if self.sharing is not None:
            self.sharing.to_engines()
        found = self._push(require_all)
        for _ in range(PUSHES_AGAIN):
            if not isinstance(found, str) or require_all or not self._engines_are_back():
                break
            found = self._push(require_all)
        self.served = self.state.iteration
        if isinstance(found, str):
            if require_all:
                raise WeightSyncError(found)
            self.troubles.append(found if self.settings.run.rank == 0 else "")
            return {}
        return {} if found is None else {"engines/unsynced": float(found)}

    def _push(self, require_all: bool) -> int | str | None:
        """How many engines did not take the weights, why none did, or None where there are none; the same on every rank."""
        mine: tuple[int, int, str] | None = None  # engines of this replica, how many did not take the weights, why
        if self.weight_sync is not None:
            engines = len(self.weight_sync.urls)
            weights = export_hf_weights(self.trainer.model, self.hf_config, every_replica=True)
            version = version_of_run(self.settings.rollouts.run_id, str(self.state.iteration))
            try:
                mine = engines, len(self.weight_sync.push(weights, version, require_all=require_all)), ""
            except (WeightSyncError, OSError, SafetensorError) as error:
                mine = engines, engines, str(error)
        told = [one for one in self.exchange.all_gather_from_leaders(mine) if one is not None]
        if not told:
            return None
        unsynced = sum(failed for _, failed, _ in told)
        if unsynced and (require_all or unsynced == sum(engines for engines, _, _ in told)):
            reasons = "; ".join(why for _, _, why in told if why)
            return f"the engines did not get the weights of step {self.state.iteration}: {reasons}"
        return unsynced

    def _engines_are_back(self) -> bool:
        """Whether this run started engines of which one answers, if need be after another start; the same on every rank."""
        back = self.servers is not None and self.servers.await_engines()
        return any(self.exchange.all_gather_from_leaders(back))

    def save_is_due(self) -> bool:
        """Whether a multiple of --save-interval was reached since the last checkpoint."""
        interval = self.settings.run.save_interval
        return self.state.iteration // interval > (self.state.last_saved or 0) // interval

    def save(self) -> None:
        """Save a checkpoint of the present iteration, unless the last one is of it already; first its reference."""
        if self.state.iteration == self.state.last_saved:
            return
        self.watch.begins(f"saving step {self.state.iteration}")
        save, trainer = self.settings.run.save, self.trainer
        with saving_explained(save, self.state.iteration):
            if self.reference is not None and self.unsaved_reference is not None:
                self.reference_store.save(self.reference, self.unsaved_reference)
                self.unsaved_reference = None
            self.state.experience_ahead = self.packed_ahead()
            self.state.write_into(get_args())  # which are part of the checkpoint
            stepped = self.exchange.any_rank(has_stepped(trainer.optimizer))
            get_args().optimizer_stepped = stepped
            save_checkpoint(
                self.state.iteration,
                trainer.model,
                trainer.optimizer if stepped else None,  # Megatron cannot save one without a state, or load it
                trainer.scheduler,
                0,
                checkpointing_context=trainer.checkpointing_context,
            )
        self.state.last_saved = self.state.iteration
        self.checksums.begin(save / f"iter_{self.state.iteration:07d}")

    def save_what_was_trained(self) -> None:
        """Save for a run that ends before its last step: without the empty steps since the last one that changed anything,
        whose tasks the same command then asks again."""
        if self.state.forget_empty_steps():
            self.ahead = None  # of the step behind the empty ones
        self.save()
        self.finish_saving()

    def packed_ahead(self) -> bytes | None:
        """The experience that the run which continues from the present step trains on first, equal on all ranks."""
        run = self.settings.run
        if self.ahead is None or not is_worth_keeping(self.ahead, run.min_usable_share):
            return None
        return pack(self.ahead, made_for(self.settings.experience.selection, run.prompts, run.oversample))

    def finish_saving(self) -> None:
        """Wait for the checksums of what was saved."""
        self.watch.begins(f"saving step {self.state.iteration}")
        self.checksums.finish()

    def write_metrics(self, metrics: Metrics, *, validation: bool = False) -> None:
        """Log the present step, or what validation found after it, on the rank that has the writer."""
        if self.writer is None:
            return
        try:
            write = self.writer.write_validation if validation else self.writer.write
            write(self.state.iteration, flatten(metrics))
        except OSError as error:
            self.troubles.append(f"{self.writer.path} took no more: {error.strerror or error}")


def set_up(settings: Settings, stack: contextlib.ExitStack) -> Run:
    """Check servers and data, build and load the model, connect the engines; `stack` gets everything to be closed.

    Raises:
        DataError, SettingsError, ServerStartError, RequestError: what the user can mend, before any training.
    """
    rank = settings.run.rank
    exchange = LeaderExchange(timeout_seconds=EXCHANGE_SECONDS)
    this_run = open_run_folder(settings.run, exchange)
    settings = replace(settings, rollouts=replace(settings.rollouts, run_id=this_run))
    named = bool(settings.urls)  # a wrong URL must not show only after hours of tokenising
    if rank == 0:
        check_prompt_sets(settings)
    if rank == 0 and not named and settings.judge is not None:  # nor a wrong function, which else `open_leader` tells
        check_functions(filter(None, map(function_of, settings.judge.criteria)))
    tokenizer = AutoTokenizer.from_pretrained(settings.run.hf_config)
    if named and rank == 0 and settings.local_servers.count:
        check_servers(clients(settings, settings.urls))
    servers = start_local_servers(settings, stack) if named else None
    urls = share_urls(settings, exchange, servers) if named else settings.urls
    leader = open_leader(settings, tokenizer, exchange, urls, stack) if named else None
    tasks, held_out = open_tasks(settings, tokenizer, exchange)
    if not named:
        servers = start_local_servers(settings, stack)  # in the background, while the model is built
    state, trainer, reference, store = load_policy(settings, exchange, tasks)
    if not named:
        urls = share_urls(settings, exchange, servers)
        leader = open_leader(settings, tokenizer, exchange, urls, stack)
    run = Run(
        settings=settings,
        state=state,
        exchange=exchange,
        trainer=trainer,
        reference=reference,
        reference_store=store,
        tasks=tasks,
        leader=leader,
        weight_sync=open_weight_sync(settings, urls.engines, exchange, stack),
        hf_config=AutoConfig.from_pretrained(settings.run.hf_config),
        writer=open_writer(settings.run, state.iteration, stack),
        comparison=open_comparison(settings, held_out, tokenizer),
        validation=open_suites(settings, held_out, tokenizer) or open_validation(settings, held_out, tokenizer),
        checksums=ChecksumWriter(rank),
        servers=servers,
        sharing=open_time_sharing(settings, urls.engines, exchange, servers),
        watch=StepWatch(settings.run.step_timeout_s, f"{settings.run.run_dir}/logs", rank),
        ahead=open_ahead(settings, state.experience_ahead),
    )
    run.push_weights(require_all=True)  # a wrong URL must not be taken for an engine that died
    if run.comparison is not None and leader is not None and leader.engines is not None:
        if state.iteration == 0:
            say(f"comparison: sampling {settings.held_out.prompts} held-out continuations of the initial policy")
            leader.apart(run.comparison.record_initial(leader.engines))
        run.comparison.check_initial()
    if isinstance(run.validation, SuiteValidation) and state.iteration:
        run.validation.check_initial()
    exchange.barrier()
    return run


def open_run_folder(run: RunSettings, exchange: LeaderExchange) -> str:
    """Mend the checkpoint folder after a kill and refuse weights that cannot be loaded, before anything costs time.

    Returns the run's name, the same on every rank.

    Raises:
        DataError: a checkpoint is not whole, or the one that the run starts from is of another model than --hf-config.
    """
    if run.rank == 0:
        for line in mend_checkpoint_folder(run.save, last_whole=run.load_last_whole):
            say(f"checkpoint: {line}")
    exchange.barrier()
    require_whole_checkpoint(run.save, exchange, run.rank, last_whole=run.load_last_whole)
    resumes = (run.save / TRACKER).exists()
    if run.pretrained_checkpoint is not None and not resumes:
        require_checkpoint(run.pretrained_checkpoint)
        require_whole_weights(run.pretrained_checkpoint, exchange, run.rank)
    start = run.save if resumes else run.pretrained_checkpoint
    if start is not None:
        wanted = architecture(AutoConfig.from_pretrained(run.hf_config))
        require_same_model(start, wanted, f"{run.hf_config}/config.json")
    if run.rank == 0:  # so that checkpoints convert back on their own
        write_model_files(run.hf_config, run.save / HF_SUBFOLDER, renew=not resumes)
    return str(exchange.all_gather_from_leaders(run_id(run.save) if run.rank == 0 else "")[0])


def open_ahead(settings: Settings, kept: bytes | None) -> StepExperience | None:
    """The experience that the checkpoint `kept` of the step behind it, where this run can train on it."""
    run = settings.run
    if kept is None:
        return None
    made = unpack(kept, made_for(settings.experience.selection, run.prompts, run.oversample))
    if made is not None and run.max_staleness:
        return made
    if run.rank == 0:
        say("experience: the next step's was made ahead by a run of other flags or another version; it is made again")
    return None


def load_policy(
    settings: Settings, exchange: LeaderExchange, tasks: Tasks | None
) -> tuple[RunState, PolicyTrainer, Reference | None, ReferenceStore]:
    """The policy at its last checkpoint (or its initial weights), and the reference that goes with it."""
    run, args = settings.run, get_args()
    fingerprint = exchange.all_gather_from_leaders(tasks.fingerprint() if tasks is not None else None)[0]
    saved = saved_run(run.save)
    if saved is not None:
        require_resumable(saved, args, fingerprint)
        args.no_load_optim = args.no_load_optim or not getattr(saved, "optimizer_stepped", True)
        if run.rank == 0:
            for line in what_is_new(saved, args):
                say(line)
    if run.rank == 0:
        say("policy: building the model and loading its weights")
    trainer = open_trainer(settings, exchange)
    state = RunState.loaded(args, saved, fingerprint)
    if run.rank == 0:
        say(f"policy: {origin_of_weights(run, state.iteration)}")
    store = ReferenceStore(run.save)
    store.forget_after(state.iteration)
    if not settings.objective.needs_reference:
        return state, trainer, None, store
    reference = build_reference(trainer.model, offload=settings.reference.offload)
    if state.iteration:
        store.load(reference, state.iteration)
    else:
        store.save(reference, 0)
    return state, trainer, reference, store


def origin_of_weights(run: RunSettings, iteration: int) -> str:
    """Where the policy's weights, which are loaded, come from."""
    if iteration:
        return f"continued at step {iteration} of {run.steps}, from {run.save}"
    if run.pretrained_checkpoint is not None:
        return f"starts from the weights of {run.pretrained_checkpoint}"
    return "starts from RANDOM weights: --hf-config gives only the architecture, --pretrained-checkpoint weights"


def open_writer(run: RunSettings, iteration: int, stack: contextlib.ExitStack) -> MetricsWriter | None:
    """On the last rank, where Megatron keeps its tensorboard and wandb writers."""
    if run.rank != dist.get_world_size() - 1:
        return None
    writer = MetricsWriter(run.run_dir, iteration, run.steps, get_tensorboard_writer(), get_wandb_writer())
    stack.callback(writer.close)
    return writer
