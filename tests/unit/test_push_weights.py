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
    monkeypatch.setattr("megatron_sip.run.export_hf_weights", lambda *_, **__: iter(()))


class Sync:
    """A weight sync with four engines that misses those that `failed`."""

    urls = ("http://a", "http://b", "http://c", "http://d")

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


Outcome = tuple[int, int, str]


class Exchange:
    """Of three leaders: what this one says, and what the `others` do."""

    def __init__(self, *others: Outcome | None) -> None:
        self.others = others
        self.said: Any = None

    def all_gather_from_leaders(self, mine: Any) -> list[Any]:
        self.said = mine
        return [mine, *self.others]


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
    exchange = Exchange((1, 1, "no route"), None)
    assert run_of(sync, exchange).push_weights() == {"engines/unsynced": 3.0}
    assert (sync.required, exchange.said) == ([False], (4, 2, ""))
    assert sync.versions == {"ours-7"}
    # Of a replica without engines of its own:
    assert run_of(None, Exchange((4, 2, ""), (1, 1, "no route"))).push_weights() == {"engines/unsynced": 3.0}


def test_a_replica_that_loses_all_its_engines_is_trouble_only_when_the_others_have_lost_theirs() -> None:
    run = run_of(LostSync(1), Exchange((3, 2, ""), None))
    assert run.push_weights() == {"engines/unsynced": 6.0}
    run = run_of(LostSync(9), Exchange((3, 3, "no route"), None))
    run.troubles = []
    assert run.push_weights() == {}
    assert run.troubles == ["the engines did not get the weights of step 7: connection refused; no route"]


class Sharing:
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def to_engines(self) -> None:
        self.events.append("wake")


def test_engines_that_lent_their_memory_have_it_back_before_the_push() -> None:
    sync = LostSync(0)
    run = run_of(sync, Exchange())
    run.sharing = Sharing(sync.events)  # type: ignore[assignment]
    assert run.push_weights() == {"engines/unsynced": 0.0}
    assert sync.events == ["wake", "push"]


def test_the_first_push_requires_all() -> None:
    sync = Sync()
    assert run_of(sync, Exchange((2, 0, ""), None)).push_weights(require_all=True) == {"engines/unsynced": 0.0}
    assert sync.required == [True]
    with pytest.raises(WeightSyncError, match="did not get the weights of step 7: no route"):
        run_of(Sync(), Exchange((2, 2, "no route"), None)).push_weights(require_all=True)


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
    assert run_of(None, Exchange(None, None)).push_weights() == {}


def test_replicas_share_the_engines_out() -> None:
    from megatron_sip.open_servers import shared_out

    for replicas in (1, 2, 3, 8):
        shares = [shared_out(Sync.urls, replica, replicas) for replica in range(8)]
        assert sorted(url for share in shares for url in share) == list(Sync.urls)
        assert max(map(len, shares)) == -(-len(Sync.urls) // replicas)
