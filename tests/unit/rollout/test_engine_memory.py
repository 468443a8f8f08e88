"""Engines that give their memory to the trainer and take it again: what they are told, and in which order."""

from __future__ import annotations

import logging

import pytest
from fake_engine import FakeEngine

from megatron_sip.rollout.engine_memory import TAGS, EngineMemory

RELEASED = ["/server_info", "/pause_generation", "/flush_cache", "/release_memory_occupation"]
RESUMED = ["/server_info", "/resume_memory_occupation"]


def told(engine: FakeEngine) -> list[str]:
    paths = [path for path, _ in engine.calls]
    engine.calls.clear()
    return paths


def test_an_engine_is_idle_before_it_frees_its_memory_and_takes_the_same_again() -> None:
    with FakeEngine() as one, FakeEngine() as other:
        memory = EngineMemory([one.url, other.url], timeout_s=5.0)
        memory.resume()  # before the first step nothing is released
        assert (told(one), told(other)) == ([], [])
        for _ in range(2):
            memory.release()
            bodies = dict(one.calls)
            assert bodies["/pause_generation"] == {"mode": "abort"}
            assert bodies["/release_memory_occupation"] == TAGS
            assert (told(one), told(other)) == (RELEASED, RELEASED)
            memory.resume()
            assert dict(one.calls)["/resume_memory_occupation"] == TAGS
            assert (told(one), told(other)) == (RESUMED, RESUMED)


def test_an_engine_that_was_started_again_has_its_memory(caplog: pytest.LogCaptureFixture) -> None:
    with FakeEngine() as engine:
        memory = EngineMemory([engine.url], timeout_s=5.0)
        memory.release()
        engine.die()
        engine.start()
        engine.calls.clear()
        memory.resume()
        assert told(engine) == ["/server_info"]
        assert not caplog.records


def test_an_engine_that_is_gone_is_told_and_costs_the_others_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with FakeEngine() as live, FakeEngine() as dead, caplog.at_level(logging.WARNING):
        dead.die()
        memory = EngineMemory([dead.url, live.url], timeout_s=5.0)
        memory.release()
        memory.resume()
        assert told(live) == [*RELEASED, *RESUMED]
        [record] = caplog.records
        assert dead.url in record.getMessage()
