"""The servers that a run talks to: those of its own node started, and the ways to all of them opened."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.config.settings import Settings
from megatron_sip.console import say
from megatron_sip.experience.leader import ClientsSettings, Leader, rotated_urls
from megatron_sip.rollout.engine_memory import EngineMemory
from megatron_sip.rollout.sync_disk import DiskWeightSync
from megatron_sip.rollout.sync_distributed import DistributedWeightSync
from megatron_sip.rollout.weight_group import SyncSettings, address_for
from megatron_sip.rollout.weight_sync import SyncRank, WeightSync
from megatron_sip.serving.local_servers import LocalServers, ServerUrls
from megatron_sip.time_sharing import TimeSharing
from megatron_sip.training.leaders import LeaderExchange


def start_local_servers(settings: Settings, stack: contextlib.ExitStack) -> LocalServers | None:
    """Start this node's servers, if the run has any, in the background; None on all ranks but 0."""
    if settings.run.rank != 0:
        return None
    servers = LocalServers(settings.local_servers)
    if servers.description:
        say(f"servers: starting {servers.description} on this node; their logs are in {settings.run.run_dir}/logs")
    stack.callback(servers.stop)
    return servers


def share_urls(settings: Settings, exchange: LeaderExchange, servers: LocalServers | None) -> ServerUrls:
    """All ranks learn the URLs of servers that rank 0 started, once these are healthy."""
    waiting = time.monotonic()
    started = servers.urls() if servers is not None else ServerUrls()
    if servers is not None and servers.description:
        say(f"servers: ready, {time.monotonic() - waiting:.0f} s after all else")
    return settings.urls.completed_by(exchange.all_gather_from_leaders(started)[0])


def open_leader(
    settings: Settings, tokenizer: Any, exchange: LeaderExchange, urls: ServerUrls, stack: contextlib.ExitStack
) -> Leader | None:
    """The clients of engines and teacher, on leaders."""
    if not exchange.is_leader:
        return None
    share = settings.run.prompts // exchange.num_replicas
    urls = replace(urls, engines=rotated_urls(urls.engines, exchange.replica, share))
    leader = Leader(clients(settings, urls), settings.experience, tokenizer, exchange.replica)
    stack.callback(leader.close)
    return leader


def clients(settings: Settings, urls: ServerUrls) -> ClientsSettings:
    """A leader's clients of the servers at `urls`."""
    return replace(settings.clients(urls), goes_on=(settings.run.save / TRACKER).exists())


def open_weight_sync(
    settings: Settings, urls: Sequence[str], exchange: LeaderExchange, stack: contextlib.ExitStack
) -> WeightSync | None:
    """The way to this replica's share of the engines at `urls`; None where it has none.

    Each replica's ranks hold all weights between them. Over a disk the first replica brings them to all engines.
    """
    if not settings.needs.engines:
        return None
    on_disk = settings.rollouts.weight_sync == "disk"
    urls = shared_out(urls, exchange.replica, 1 if on_disk else exchange.num_replicas)
    if not urls:
        return None
    rank = SyncRank(
        source=parallel_state.get_tensor_model_parallel_rank() == 0,
        lead=exchange.is_leader,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        stages=parallel_state.get_pipeline_model_parallel_world_size(),
        exchange=exchange.all_gather_in_replica,
    )
    rollouts = settings.rollouts
    how = SyncSettings(
        # NCCL refuses two ranks on one GPU.
        backend="nccl" if torch.cuda.is_available() and not rollouts.colocate else "gloo",
        address=address_for(urls),
        bucket_bytes=rollouts.bucket_bytes,
        timeout_s=rollouts.timeout_s,
        key=rollouts.key(),
    )
    sync: WeightSync
    if on_disk:
        sync = DiskWeightSync(urls, rank, how, rollouts.sync_dir, settings.run.hf_config)
    else:
        sync = DistributedWeightSync(urls, rank, how)
    sync.connect()
    stack.callback(sync.close)
    return sync


def open_time_sharing(
    settings: Settings, urls: Sequence[str], exchange: LeaderExchange, servers: LocalServers | None
) -> TimeSharing | None:
    """The turns of trainer and engines with --colocate, else None."""
    if not settings.needs.engines or not settings.rollouts.colocate:
        return None
    engines = EngineMemory(urls, settings.rollouts.timeout_s, settings.rollouts.key())
    return TimeSharing(exchange, engines, servers)


def shared_out(urls: Sequence[str], replica: int, replicas: int) -> Sequence[str]:
    """Those of `urls` that are `replica`'s when the first `replicas` take turns; none for others."""
    return urls[replica::replicas] if replica < replicas else ()
