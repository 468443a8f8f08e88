"""What a run makes of engines that did not take its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from flag_cases import unchecked_settings

from megatron_sip.platform.megatron import prepare_megatron
from megatron_sip.rollout.handshake import WeightSyncError
from megatron_sip.step_watch import StepWatch

if TYPE_CHECKING:
    from megatron_sip.run import Run


@pytest.fixture(autouse=True)
def _nothing_to_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The export asks for Megatron's groups, which are not there."""
    prepare_megatron()  # before anything imports Megatron
    monkeypatch.setattr("megatron_sip.run.export_hf_weights", lambda *_: iter(()))


class Sync:
    """A weight sync that misses the engines `failed`."""

    def __init__(self, *failed: str) -> None:
        self.failed = dict.fromkeys(failed, "connection refused")
        self.required: list[bool] = []
        self.versions: set[str] = set()

    def push(self, _: Any, version: str, *, require_all: bool) -> dict[str, str]:
        self.required.append(require_all)
        self.versions.add(version)
        return self.failed


class Restarted:
    """The servers of this node: an engine that is back each time, until it is given up after `times`."""

    def __init__(self, sync: LostSync, times: int) -> None:
        self.sync = sync
        self.times = times

    def await_engines(self) -> bool:
        self.sync.events.append("wait")
        self.times -= 1
        return self.times >= 0


class LostSync(Sync):
    """A weight sync of which the first `lost` pushes reach no engine."""

    def __init__(self, lost: int) -> None:
        super().__init__()
        self.lost = lost
        self.events: list[str] = []

    def push(self, _: Any, version: str, *, require_all: bool) -> dict[str, str]:
        self.events.append("push")
        self.lost -= 1
        if self.lost >= 0:
            raise WeightSyncError("connection refused")
        return {}


class Alone:
    """One process."""

    def all_gather_from_leaders(self, mine: Any) -> list[Any]:
        return [mine]


class Exchange:
    """Tells every rank what the first replica's leader, here `first`, says."""

    def __init__(self, first: int | None) -> None:
        self.first = first
        self.said: Any = None

    def all_gather_from_leaders(self, mine: Any) -> list[Any]:
        self.said = mine
        return [self.first, None]


class Trainer:
    model: tuple[Any, ...] = ()


def run_of(sync: Sync | None, exchange: Exchange | Alone) -> Run:
    from megatron_sip.run import Run, RunState

    parts: dict[str, Any] = dict.fromkeys(Run.__dataclass_fields__)
    settings = unchecked_settings()
    parts |= {
        "settings": replace(settings, rollouts=replace(settings.rollouts, run_id="ours")),
        "state": RunState(iteration=7),
        "trainer": Trainer,
        "weight_sync": sync,
        "exchange": exchange,
        "watch": StepWatch(0.0, ""),
    }
    return Run(**parts)


def test_training_goes_on_without_the_engines_that_failed_and_counts_them_on_every_rank() -> None:
    sync = Sync("http://a", "http://b")
    exchange = Exchange(2)
    assert run_of(sync, exchange).push_weights() == {"engines/unsynced": 2.0}
    assert (sync.required, exchange.said) == ([False], 2)
    assert sync.versions == {"ours-7"}
    assert run_of(None, exchange).push_weights() == {"engines/unsynced": 2.0}  # of another replica


def test_the_first_push_requires_all() -> None:
    sync = Sync()
    assert run_of(sync, Exchange(0)).push_weights(require_all=True) == {"engines/unsynced": 0.0}
    assert sync.required == [True]


@pytest.mark.parametrize(
    ("lost", "back", "events", "trouble"),
    [
        (0, 1, ["push"], False),
        (1, 1, ["push", "wait", "push"], False),
        (2, 5, ["push", "wait", "push", "wait", "push"], False),
        (3, 5, ["push", "wait", "push", "wait", "push"], True),
        (1, 0, ["push", "wait"], True),
    ],
)
def test_weights_that_no_engine_took_are_pushed_again_when_an_engine_of_this_node_is_back(
    lost: int, back: int, events: list[str], trouble: bool
) -> None:
    sync = LostSync(lost)
    run = run_of(sync, Alone())
    run.settings, run.servers, run.troubles = unchecked_settings(), Restarted(sync, back), []  # type: ignore[assignment]
    assert run.push_weights() == ({} if trouble else {"engines/unsynced": 0.0})
    assert sync.events == events
    assert bool(run.troubles) == trouble


def test_a_run_without_engines_counts_none() -> None:
    assert run_of(None, Exchange(None)).push_weights() == {}
