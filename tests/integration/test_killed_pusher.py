"""kill -9 of a trainer inside a push leaves an engine that runs elsewhere as it was; the next trainer can use it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from forks import forks
from push_worker import open_sync, push_forever
from safetensors.torch import load_file
from workers import kill_server

from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import Failure, SamplingSettings
from megatron_sip.rollout.weight_sync import WeightSync, WeightSyncError
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.launch import LocalServer

pytestmark = pytest.mark.slow

KILLS = {"distributed": 14, "disk": 6}


@pytest.fixture
def engine(tiny_engine: LocalServer) -> Iterator[LocalServer]:
    """The session's engine; one that is left hanging, whatever the test says of it, is started anew for the other tests."""
    yield tiny_engine
    try:
        call(tiny_engine.url, "GET", "/health_generate", timeout_s=20.0)
    except RequestError:
        kill_server(tiny_engine)
        tiny_engine.start()


def connected(sync: WeightSync) -> bool:
    """False when the kill came while a bucket was on its way and the engine waits for the rest: docs/slurm.md says to restart.

    gloo tells a receiver that its sender is gone only between messages; one whose header has come waits for its time-out.
    """
    try:
        sync.connect()
    except WeightSyncError as error:
        if "still in the weight update of another trainer" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("kind", sorted(KILLS))
async def test_after_a_kill_at_any_moment_of_a_push_the_next_client_pushes_and_the_engine_generates(
    kind: str, engine: LocalServer, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    url = engine.url  # a restart keeps it
    tensors = load_file(tiny_llama_dir / "model.safetensors")
    processes = forks()
    moments = random.Random(kind)
    sampling = SamplingSettings(max_new_tokens=2, temperature=0)
    inside = 0  # kills that came in the middle of a push
    seconds = None  # of an undisturbed connection and push
    for number in range(KILLS[kind]):
        ours, theirs = processes.Pipe(duplex=False)
        worker = processes.Process(target=push_forever, args=(kind, url, tiny_llama_dir, tmp_path, theirs))
        worker.start()
        theirs.close()  # so that its end ends a `recv` here
        assert ours.recv() == "begins"
        started = time.monotonic()
        said = []
        if seconds is None:
            said = [ours.recv(), ours.recv()]
            assert said == ["joined", "ended"]
            seconds = time.monotonic() - started
        else:
            time.sleep(moments.uniform(0.0, seconds))
        worker.kill()
        worker.join()
        with suppress(EOFError):
            while ours.poll():
                said.append(ours.recv())
        inside += said == ["joined"]
        with closing(open_sync(kind, url, tiny_llama_dir, tmp_path)) as sync:
            if not connected(sync):
                assert kind == "distributed"
                kill_server(engine)
                engine.start()
                sync.connect()
            sync.push(tensors.items(), version=f"{kind} {number}")
        async with SGLangPool([url]) as pool:
            (found,) = await pool.generate([[1, 504, 3575]], sampling, weight_version=f"{kind} {number}")
        assert not isinstance(found, Failure), found
    assert inside or kind == "disk"  # where joining takes no time
