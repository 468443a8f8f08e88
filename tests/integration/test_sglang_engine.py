"""Real SGLang: sampling and log-probs against transformers, compatibility checks, weight sync."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_exchange import ThreadExchange
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import kill_server

from megatron_sip.rollout.engine_memory import EngineMemory
from megatron_sip.rollout.handshake import ModelContract
from megatron_sip.rollout.pool import PoolSettings, SGLangPool
from megatron_sip.rollout.sampling import Failure, SamplingSettings, read_completions, sampling_body
from megatron_sip.rollout.sync_disk import DiskWeightSync
from megatron_sip.rollout.sync_distributed import DistributedWeightSync
from megatron_sip.rollout.weight_group import SyncSettings
from megatron_sip.rollout.weight_sync import SyncRank, WeightSync, WeightSyncError
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.launch import LocalServer
from megatron_sip.serving.local_servers import ENGINE_MARGIN

PREFIX = [1, 504, 3575, 282, 4649, 314]
LONG_PREFIX = [17 + i % 300 for i in range(200)]
SETTINGS = SyncSettings(timeout_s=20.0, bucket_bytes=1 << 20)  # several buckets for the tiny model


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> Any:
    """The tiny model in transformers, float32; tests must leave its weights as they are."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def logprobs_of(model: Any, prefix: list[int], continuation: list[int]) -> list[float]:
    """Log-probs of the continuation's tokens by a plain forward pass, reduced in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prefix + continuation])).logits[0].double()
    table = logits.log_softmax(-1)
    return [table[len(prefix) - 1 + i, token].item() for i, token in enumerate(continuation)]


def scaled(model: Any, factor: float) -> Any:
    """A copy of the model with all weights times `factor`."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(factor)
    return changed


def named_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """What an export yields on a source rank, with the gap that it has on ranks that own nothing of a tensor."""
    yield "model.layers.99.other_stage.weight", None
    yield from model.state_dict().items()


async def test_greedy_ids_and_their_logprobs_equal_transformers(tiny_llama_server: LocalServer, reference: Any) -> None:
    prefixes = [PREFIX, PREFIX[:2], list(range(100, 160)), LONG_PREFIX]
    async with SGLangPool([tiny_llama_server.url]) as pool:
        greedy = SamplingSettings(max_new_tokens=12, temperature=0)
        results = await pool.generate(prefixes, greedy)
        again = await pool.generate([LONG_PREFIX], greedy)
        assert pool.counters.cached_tokens >= 190
    for prefix, completions in zip([*prefixes, LONG_PREFIX], results + again, strict=True):
        assert not isinstance(completions, Failure)
        expected = reference.generate(torch.tensor([prefix]), do_sample=False, max_new_tokens=12)
        assert completions[0].ids == expected[0, len(prefix) :].tolist()
        assert completions[0].logprobs == pytest.approx(logprobs_of(reference, prefix, completions[0].ids), abs=1e-4)


async def test_logprobs_of_given_tokens_equal_transformers_and_leave_a_shared_prefix_in_the_cache(
    tiny_llama_server: LocalServer, reference: Any
) -> None:
    prefix = [23 + i % 211 for i in range(150)]
    continuations = [[5, 6, 7], [8], [300 + i for i in range(40)]]
    async with SGLangPool([tiny_llama_server.url]) as pool:
        first = await pool.logprobs([prefix], continuations[:1])
        others = await pool.logprobs([prefix] * 2, continuations[1:])
        assert pool.counters.cached_tokens >= 2 * 148
    for continuation, found in zip(continuations, first + others, strict=True):
        assert found == pytest.approx(logprobs_of(reference, prefix, continuation), abs=1e-4)


async def test_a_prompt_may_come_as_near_to_the_end_of_the_context_as_the_margin_says(tiny_engine: LocalServer) -> None:
    context = call(tiny_engine.url, "GET", "/server_info", timeout_s=20)["context_length"]
    async with SGLangPool([tiny_engine.url]) as pool:
        [found] = await pool.logprobs([[5]], [[7] * (context - ENGINE_MARGIN - 1)])
    assert not isinstance(found, Failure), found


def test_what_a_judge_s_prompts_share_is_computed_once(tiny_llama_server: LocalServer) -> None:
    """8 groups of 5 candidates with log-probs, as likelihood asks for them: 5,120 tokens, 2,048 different ones."""
    counts = [tokens_computed(tiny_llama_server.url, seed) for seed in (5, 6, 7)]
    # Batches that are formed while requests still arrive share less; in the order of arrival it would be some 4,400.
    assert 2048 <= min(counts) < 3900


def tokens_computed(url: str, seed: int) -> int:
    ids = torch.randint(3, 300, (8, 6, 96), generator=torch.Generator().manual_seed(seed)).tolist()
    body = {
        "input_ids": [group[0] + tail[:32] for group in ids for tail in group[1:]],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [95] * 40,
    }
    metas = [answer["meta_info"] for answer in call(url, "POST", "/generate", body, timeout_s=60)]
    return sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)


@pytest.mark.parametrize(("temperature", "seeds"), [(1.0, None), (0.6, None), (1.0, [2**63 - 1])])
async def test_sampled_logprobs_are_the_models_own_at_any_temperature(
    tiny_llama_server: LocalServer, reference: Any, temperature: float, seeds: list[int] | None
) -> None:
    settings = SamplingSettings(max_new_tokens=8, temperature=temperature, n=4)
    async with SGLangPool([tiny_llama_server.url]) as pool:
        assert not await pool.take_seeds()  # on CPU SGLang has no deterministic inference
        (completions,) = await pool.generate([PREFIX], settings, seeds=seeds)
    assert not isinstance(completions, Failure)
    assert len(completions) == 4
    assert len({tuple(completion.ids) for completion in completions}) > 1
    for completion in completions:
        assert len(completion.ids) == len(completion.logprobs) == 8
        assert completion.logprobs == pytest.approx(logprobs_of(reference, PREFIX, completion.ids), abs=1e-4)


def test_a_stop_token_ends_the_completion_and_stays_in_it(tiny_llama_server: LocalServer) -> None:
    greedy = SamplingSettings(max_new_tokens=6, temperature=0)

    def asked(**sampling: Any) -> Any:
        body = sampling_body(PREFIX, greedy)
        body["sampling_params"] |= sampling
        reply = call(tiny_llama_server.url, "POST", "/generate", body, timeout_s=60)
        return read_completions(reply, greedy, None, None)[0][0]

    full = asked(ignore_eos=True)
    stop = full.ids[3]
    ended = asked(stop_token_ids=[stop])
    first = full.ids.index(stop) + 1
    assert ended.ids == full.ids[:first]
    assert ended.logprobs == pytest.approx(full.logprobs[:first], abs=1e-4)
    assert (full.finish_reason, ended.finish_reason) == ("length", "stop")


async def test_an_engine_with_another_vocabulary_context_or_tokenizer_is_refused(
    tiny_llama_server: LocalServer, tiny_llama_dir: Path
) -> None:
    text = "Naïve café: 1+1=2\n\tdef f(x): return x"
    ids = tuple(AutoTokenizer.from_pretrained(tiny_llama_dir)(text, add_special_tokens=False).input_ids)
    async with SGLangPool([tiny_llama_server.url]) as pool:
        await pool.check_compatible(ModelContract(49152, 512, text, ids))
        for contract, message in (
            (ModelContract(50000, 512, text, ids), "vocabulary of 49152 tokens.*50000"),
            (ModelContract(49152, 2048, text, ids), "context of 512 tokens, training needs 2048"),
            (ModelContract(49152, 512, text, ids[:-1]), "another tokenizer"),
        ):
            with pytest.raises(ValueError, match=message):
                await pool.check_compatible(contract)


async def test_a_request_beyond_the_context_is_a_failure_with_the_engines_words(tiny_llama_server: LocalServer) -> None:
    async with SGLangPool([tiny_llama_server.url]) as pool:
        (lost,) = await pool.generate([[5] * 600], SamplingSettings(max_new_tokens=2))
    assert isinstance(lost, Failure)
    assert lost.kind == "http-4xx"
    assert "512" in lost.reason


async def assert_serves(url: str, model: Any, version: str) -> None:
    """The engine's log-probs are this model's, also for a prefix that it cached under older weights."""
    async with SGLangPool([url], PoolSettings(attempts=1)) as pool:
        sampling = SamplingSettings(max_new_tokens=4, n=3)
        (sampled,) = await pool.generate([PREFIX], sampling, weight_version=version)
        assert not isinstance(sampled, Failure), sampled
        for completion in sampled:
            assert completion.logprobs == pytest.approx(logprobs_of(model, PREFIX, completion.ids), abs=1e-4)
        (refused,) = await pool.generate([PREFIX], sampling, weight_version="not-this-one")
        assert isinstance(refused, Failure)
        assert refused.kind == "stale-weights"


@pytest.mark.parametrize("kind", ["distributed", "disk"])
async def test_pushed_weights_are_served_and_old_caches_are_gone(
    kind: str,
    tiny_llama_server: LocalServer,
    tiny_engine: LocalServer,
    tiny_llama_dir: Path,
    reference: Any,
    tmp_path: Path,
) -> None:
    url = (
        tiny_llama_server.url if kind == "distributed" else tiny_engine.url
    )  # this one started with --load-format=dummy
    sync: WeightSync
    if kind == "distributed":
        sync = DistributedWeightSync([url], SyncRank(), SETTINGS)
    else:
        sync = DiskWeightSync([url], SyncRank(), SETTINGS, folder=tmp_path, template=tiny_llama_dir)
    sync.connect()
    try:
        for step, factor in enumerate((1.05, 0.9, 1.0)):
            changed = scaled(reference, factor)
            assert sync.push(named_tensors(changed), version=f"{kind}-{step}") == {}
            await assert_serves(url, changed, f"{kind}-{step}")
    finally:
        sync.close()
    if kind == "disk":
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["weights-disk-1", "weights-disk-2"]
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "weights-disk-2", dtype=torch.float32)
        for name, tensor in reference.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], tensor)


def engine_workers(server: LocalServer) -> list[int]:
    """Pids of the server's scheduler processes, which hold the model."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == server.pid and "scheduler" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


async def test_a_hung_engine_ends_the_push_in_time_and_rejoins_at_the_next(
    tiny_llama_server: LocalServer, reference: Any
) -> None:
    url = tiny_llama_server.url
    sync = DistributedWeightSync([url], SyncRank(), SyncSettings(timeout_s=4.0, bucket_bytes=1 << 20))
    sync.connect()
    workers = engine_workers(tiny_llama_server)
    assert workers
    consumed = 0

    def export_while_the_engine_hangs() -> Iterator[tuple[str, torch.Tensor | None]]:
        nonlocal consumed
        for name, tensor in named_tensors(reference):
            consumed += 1
            if consumed == 6:
                for pid in workers:
                    os.kill(pid, signal.SIGSTOP)
            yield name, tensor

    started = time.monotonic()
    try:
        with pytest.raises(WeightSyncError, match=f"'never'.*1 engine.*{url}"):
            sync.push(export_while_the_engine_hangs(), version="never")
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - started < 40
    assert consumed == len(reference.state_dict()) + 1  # the other ranks' collectives were not left waiting
    assert call(url, "GET", "/model_info", timeout_s=20)["weight_version"] != "never"

    changed = scaled(reference, 1.02)
    recovered = DistributedWeightSync([url], SyncRank(), SyncSettings(timeout_s=30.0))
    recovered.push(named_tensors(changed), version="after-hang")
    await assert_serves(url, changed, "after-hang")
    recovered.close()
    sync.close()


async def test_an_engine_that_restarts_with_made_up_weights_is_left_out_and_rejoins(
    tiny_llama_server: LocalServer, tiny_engine: LocalServer, reference: Any
) -> None:
    urls = [tiny_llama_server.url, tiny_engine.url]
    sync = DistributedWeightSync(urls, SyncRank(), SETTINGS)
    sync.connect()
    try:
        both = scaled(reference, 1.03)
        sync.push(named_tensors(both), version="both")
        for url in urls:
            await assert_serves(url, both, "both")
        kill_server(tiny_engine)
        one = scaled(reference, 0.97)
        assert set(sync.push(named_tensors(one), version="one", require_all=False)) == {urls[1]}
        await assert_serves(urls[0], one, "one")
        tiny_engine.start()
        assert tiny_engine.url == urls[1]
        async with SGLangPool(urls) as pool:
            found = await pool.generate([PREFIX] * 4, SamplingSettings(max_new_tokens=2), weight_version="one")
        assert not any(isinstance(completions, Failure) for completions in found)
        assert pool.counters.calls == 4  # none to the engine that has other weights
        assert sync.push(named_tensors(reference), version="both-again", require_all=False) == {}
        for url in urls:
            await assert_serves(url, reference, "both-again")
    finally:
        sync.close()


async def test_an_engine_lends_its_memory_and_serves_what_is_pushed_then(
    tiny_engine: LocalServer, reference: Any
) -> None:
    url, changed = tiny_engine.url, scaled(reference, 1.01)
    memory = EngineMemory([url], timeout_s=30.0)
    with closing(DistributedWeightSync([url], SyncRank(), SETTINGS)) as sync:
        for model, version in ((reference, "before"), (changed, "after")):
            memory.release()
            with pytest.raises(RequestError, match="no answer within 1 s"):
                call(url, "POST", "/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}}, timeout_s=1)
            memory.resume()
            sync.push(named_tensors(model), version=version)
            await assert_serves(url, model, version)


def test_two_sources_each_send_their_pipeline_stage(tiny_llama_server: LocalServer, reference: Any) -> None:
    url = tiny_llama_server.url
    changed = scaled(reference, 1.01)
    board = ThreadExchange(2)
    reports: list[Any] = [None, None]
    names = list(changed.state_dict())

    def stage(index: int) -> None:
        rank = SyncRank(source=True, lead=index == 0, stage=index, stages=2, exchange=lambda v: board(index, v))
        sync = DistributedWeightSync([url], rank, SETTINGS)
        sync.connect()
        own = [
            (n, changed.state_dict()[n] if (i < len(names) // 2) == (index == 0) else None) for i, n in enumerate(names)
        ]
        reports[index] = sync.push(own, version="two-stages")
        sync.close()

    threads = [threading.Thread(target=stage, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert reports == [{}, {}]
    body = {"input_ids": [*PREFIX, 260], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    reply = call(url, "POST", "/generate", {**body, "logprob_start_len": len(PREFIX) - 1}, timeout_s=30)
    found = reply["meta_info"]["input_token_logprobs"][1][0]
    assert found == pytest.approx(logprobs_of(changed, PREFIX, [260])[0], abs=1e-4)


# Last of the file, so that the shared server ends with the weights of its folder.
def test_a_failing_export_raises_and_leaves_the_engine_usable(tiny_llama_server: LocalServer, reference: Any) -> None:
    url = tiny_llama_server.url
    sync = DistributedWeightSync([url], SyncRank(), SETTINGS)

    def breaking() -> Iterator[tuple[str, torch.Tensor | None]]:
        yield from list(named_tensors(reference))[:4]
        raise FloatingPointError("a weight is not finite")

    with pytest.raises(FloatingPointError, match="not finite"):
        sync.push(breaking(), version="broken")
    assert call(url, "GET", "/model_info", timeout_s=20)["weight_version"] != "broken"
    sync.push(named_tensors(reference), version="mended")
    assert call(url, "GET", "/model_info", timeout_s=20)["weight_version"] == "mended"
    sync.close()
