"""Pushes of weights to engines that refuse, hang, die and come back: over real HTTP and gloo, without SGLang."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from ports import kept_port
from thread_exchange import ThreadExchange

from megatron_sip.hf.shards import write_parts
from megatron_sip.rollout import sync_disk, weight_group
from megatron_sip.rollout.sync_disk import DiskWeightSync, finish_folder
from megatron_sip.rollout.sync_distributed import DistributedWeightSync
from megatron_sip.rollout.weight_group import EngineGroup, SyncSettings, make_bucket
from megatron_sip.rollout.weight_sync import SyncRank, WeightSyncError
from megatron_sip.serving import blocking_call as http
from megatron_sip.serving.failures import RequestError

QUICK = SyncSettings(timeout_s=3.0, control_timeout_s=3.0)
CPU = torch.device("cpu")


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeEngine()) for _ in range(2)]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    folder = tmp_path / "template"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"head": torch.full((3, 2), value, dtype=torch.bfloat16), "norm": torch.full((5,), value)}


def push(sync: DistributedWeightSync | DiskWeightSync, step: int, *, require_all: bool = False) -> dict[str, str]:
    return sync.push(tensors(step).items(), version=str(step), require_all=require_all)


class BlockedGroup:
    """As NCCL does while the engine has not entered: neither the broadcast nor its abort returns."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def broadcast(self, *_: Any) -> None:
        self.released.wait(30)

    def abort(self) -> None:
        self.released.wait(30)


@pytest.mark.parametrize(
    ("refused", "timeout_s", "expected"),
    [(True, 20.0, "400.*out of memory"), (False, 1.0, "(took no weights|gave no answer) within 1 s")],
    ids=["refused", "silent"],
)
def test_a_broadcast_that_is_never_entered_ends_with_the_requests_error_or_at_the_deadline(
    refused: bool, timeout_s: float, expected: str, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, path = engines[0], "/update_weights_from_distributed"
    if refused:
        engine.answers[path] = 400, {"message": "out of memory"}
    else:
        engine.silent.add(path)
    monkeypatch.setattr(weight_group, "ABORT_S", 0.2)
    blocked = BlockedGroup()
    group = EngineGroup(engine.url, "stage0", SyncSettings(timeout_s=timeout_s, control_timeout_s=1.0))
    monkeypatch.setattr(weight_group, "backend_group", lambda *_: blocked)
    engine.answers["/init_weights_update_group"] = 200, {"success": True}
    group.check()
    group.join()
    started = time.monotonic()
    with pytest.raises(RequestError, match=expected):
        group.broadcast(make_bucket(list(tensors(1.0).items()), CPU))
    assert time.monotonic() - started < 20.0
    assert not group.joined  # the next push makes another group
    blocked.released.set()


def two_stages(urls: list[str], settings: SyncSettings, versions: Sequence[int | Callable[[], None]]) -> list[Any]:
    """Two sources connect and push `versions` (or call what stands between them); the last push's failures, of each."""
    exchange = ThreadExchange(2)

    def run(stage: int) -> dict[str, str]:
        rank = SyncRank(lead=stage == 0, stage=stage, stages=2, exchange=partial(exchange, stage))
        failed: dict[str, str] = {}
        with closing(DistributedWeightSync(urls, rank, settings)) as sync:
            sync.connect()
            for version in versions:
                if isinstance(version, int):
                    failed = sync.push(stage_tensors(stage, version), str(version), require_all=False)
                elif exchange(stage, None) and stage == 0:
                    version()
        return failed

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2)))


def stage_tensors(stage: int, version: int) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Four tensors of each stage; a stage has its own."""
    for owner in range(2):
        for number in range(4):
            yield f"{owner}.{number}", torch.full((4,), version + number / 8) if owner == stage else None


def at_once(spans: list[tuple[str, str, float, float]]) -> list[tuple[str, str]]:
    """The groups of each two spans that overlap in time."""
    ordered = sorted(spans, key=lambda span: span[2])
    return [(a[1], b[1]) for i, a in enumerate(ordered) for b in ordered[i + 1 :] if b[2] < a[3]]


def test_stages_take_turns_and_communicators_are_made_one_after_the_other() -> None:
    with ExitStack() as stack:
        engines = [stack.enter_context(FakeEngine()) for _ in range(3)]
        for engine in engines:
            engine.delay_s = 0.03

        def restart_two() -> None:
            for engine in engines[:2]:
                engine.die()
                engine.start()

        settings = SyncSettings(timeout_s=10.0, bucket_bytes=32)  # two tensors a bucket
        assert two_stages([engine.url for engine in engines], settings, [1, 2, restart_two, 3]) == [{}, {}]
        spans = [span for engine in engines for span in engine.spans]
        joins = [span for span in spans if span[0] == "/init_weights_update_group"]
        sent = [span for span in spans if span[0] == "/update_weights_from_distributed"]
        assert (len(joins), len(sent)) == (2 * (3 + 2), 2 * 3 * 3 * 2)
        assert at_once(joins) == []
        stage = {group: group.split("-")[1] for _, group, _, _ in spans}
        pairs = at_once(sent)
        assert [pair for pair in pairs if len({stage[group] for group in pair}) > 1] == []
        firsts = [min((span for span in sent if span[1] == group), key=lambda span: span[2]) for group in stage]
        assert at_once(firsts) == []
        assert pairs  # what is not first goes to all engines together
        expected = {f"{owner}.{number}": [3 + number / 8] * 4 for owner in range(2) for number in range(4)}
        for engine in engines:
            assert {name: tensor.tolist() for name, tensor in engine.weights.items()} == expected
            assert engine.version == "3"


def test_the_next_bucket_is_gathered_while_one_flies(
    engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, gathered = engines[0].answer, threading.Semaphore(0)
    waited: list[bool] = []

    def answer_once_the_next_is_gathered(path: str, body: Any) -> Any:
        if path == "/update_weights_from_distributed":
            waited.append(gathered.acquire(timeout=2))
        return answer(path, body)

    def gather(step: int) -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(5):
            yield str(number), torch.full((4,), step + number / 8)
            if number:  # the one before is full, and has left
                gathered.release()
        gathered.release()

    settings = SyncSettings(bucket_bytes=16)
    with closing(DistributedWeightSync([engines[0].url], SyncRank(), settings)) as sync:
        sync.push(gather(0), "0")  # the first one makes the communicator, alone
        gathered = threading.Semaphore(0)
        monkeypatch.setattr(engines[0], "answer", answer_once_the_next_is_gathered)
        sync.push(gather(1), "1")
    assert waited == [True] * 5
    assert [float(engines[0].weights[str(number)][0]) for number in range(5)] == [1 + n / 8 for n in range(5)]


def test_an_engine_that_one_stage_gave_up_on_gets_nothing_from_the_next(engines: list[FakeEngine]) -> None:
    live, hung = engines

    def hang() -> None:
        hung.silent.add("/update_weights_from_distributed")

    settings = SyncSettings(timeout_s=4.0, bucket_bytes=32)
    failures = two_stages([engine.url for engine in engines], settings, [1, hang, 2])
    assert [list(failed) for failed in failures] == [[hung.url]] * 2
    assert (live.version, hung.version) == ("2", "1")
    sent = [body["names"] for path, body in hung.calls if path == "/update_weights_from_distributed"]
    assert sent[4:] == [["0.0", "0.1"]]


def test_a_call_that_never_returns_does_not_keep_the_process_alive() -> None:
    program = (
        "import threading; from megatron_sip.rollout.daemon import in_daemon_thread; "
        "in_daemon_thread(threading.Event().wait, 'stuck'); print('ended')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "ended\n"


def test_disk_push_names_a_load_format(engines: list[FakeEngine], template: Path, tmp_path: Path) -> None:
    """SGLang would otherwise take the one it was started with, and refuse `dummy`."""
    engine = engines[0]
    sync = DiskWeightSync([engine.url], SyncRank(), QUICK, folder=tmp_path / "weights", template=template)
    sync.connect()
    push(sync, 1)
    body = next(body for path, body in engine.calls if path == "/update_weights_from_disk")
    assert body["load_format"] == "auto"
    assert engine.version == "1"


def test_an_old_folder_that_cannot_be_removed_stays_until_a_later_push(
    engines: list[FakeEngine], template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, ignore_errors: bool = False) -> None:
        if path.name.startswith("weights-"):
            raise OSError(39, "Directory not empty")

    folder = tmp_path / "weights"
    sync = DiskWeightSync([engines[0].url], SyncRank(), QUICK, folder=folder, template=template)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_sip.rollout.sync_disk.shutil.rmtree", busy)
        for version in range(1, 5):
            push(sync, version)
    assert len(list(folder.glob("weights-*"))) == 4
    push(sync, 5)
    assert len(list(folder.glob("weights-*"))) == sync_disk.KEPT_FOLDERS
    assert engines[0].version == "5"


@pytest.mark.parametrize("broken", ["begin_folder", "finish_folder"])
def test_a_disk_that_fails_the_lead_ends_the_push_on_every_rank(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """The others would wait for the lead in the next exchange, for hours."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sync_disk, broken, full)
    exchange = ThreadExchange(2)

    def pushed(rank: int) -> str:
        place = SyncRank(lead=rank == 0, stage=rank, stages=2, exchange=partial(exchange, rank))
        sync = DiskWeightSync(["http://127.0.0.1:9"], place, QUICK, folder=tmp_path / "weights", template=template)
        try:
            push(sync, 1)
        except (OSError, WeightSyncError) as error:
            return str(error)
        finally:
            exchange(rank, None)  # both are out: nobody waits in an exchange
        return "no error"

    with ThreadPoolExecutor(2) as threads:
        lead, other = threads.map(pushed, range(2))
    assert "No space left on device" in lead
    assert "No space left on device" in other


def test_a_pushed_folder_holds_nothing_of_the_template_s_weights(template: Path, tmp_path: Path) -> None:
    foreign = {"pytorch_model.bin.index.json", "pytorch_model.bin", "q4.gguf", "weights.pkl", "README.md", "events.log"}
    for name in ("model.safetensors.index.json", *foreign):
        (template / name).write_text("of the weights that training began with")
    (tmp_path / "staged").mkdir()
    parts = [part for owner in "ab" for part in write_parts([(owner, torch.ones(2))], tmp_path / "staged", owner, 99)]
    finish_folder(tmp_path / "staged", tmp_path / "final", template, parts)
    found = {file.name for file in (tmp_path / "final").iterdir()}
    assert not found & foreign
    assert "config.json" in found
    assert json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())["weight_map"].keys() == {
        "a",
        "b",
    }


@pytest.mark.parametrize("kind", ["distributed", "disk"])
def test_a_dead_engine_is_reported_and_left_out_and_comes_back_with_the_new_weights(
    kind: str, engines: list[FakeEngine], template: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live, mortal = engines
    urls = [live.url, mortal.url]
    sync: DistributedWeightSync | DiskWeightSync
    if kind == "distributed":
        sync = DistributedWeightSync(urls, SyncRank(), QUICK)
    else:
        sync = DiskWeightSync(urls, SyncRank(), QUICK, folder=tmp_path / "weights", template=template)
    sync.connect()
    with caplog.at_level(logging.WARNING), closing(sync):
        assert push(sync, 0, require_all=True) == {}
        mortal.die()
        with pytest.raises(WeightSyncError, match=f"'1' did not reach 1 engine.*{mortal.url}"):
            push(sync, 1, require_all=True)
        for step in (2, 3):
            assert set(push(sync, step)) == {mortal.url}
            assert live.version == str(step)
        mortal.start()
        assert mortal.version == "default"  # made-up weights; nobody who asks for version 3 takes its answers
        assert push(sync, 4) == {}
        assert push(sync, 5) == {}
    assert [engine.version for engine in engines] == ["5", "5"]
    if kind == "distributed":
        for engine in engines:
            assert {name: tensor.tolist() for name, tensor in engine.weights.items()} == {
                name: tensor.tolist() for name, tensor in tensors(5).items()
            }
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("weight_sync")]
    assert len(messages) == 2  # once when it is lost and once when it is back
    assert mortal.url in messages[0]
    assert "1 of 2 engines are left out" in messages[0]
    assert messages[1].endswith(f"had missed some: {mortal.url}")


@pytest.mark.parametrize("kind", ["distributed", "disk"])
@pytest.mark.parametrize(("paused", "updating"), [(True, False), (True, True), (False, True), (False, False)])
def test_a_client_opens_by_ending_what_a_killed_trainer_left(
    kind: str, paused: bool, updating: bool, engines: list[FakeEngine], template: Path, tmp_path: Path
) -> None:
    engines[1].paused, engines[1].updating = paused, updating
    urls = [engine.url for engine in engines]
    sync: DistributedWeightSync | DiskWeightSync
    if kind == "distributed":
        sync = DistributedWeightSync(urls, SyncRank(), QUICK)
    else:
        sync = DiskWeightSync(urls, SyncRank(), QUICK, folder=tmp_path / "weights", template=template)
    with closing(sync):
        sync.connect()
        assert not any(engine.paused or engine.updating for engine in engines)
        assert push(sync, 1) == {}
        assert not any(engine.paused or engine.updating for engine in engines)


def test_an_engine_that_stays_in_another_trainers_update_is_named(engines: list[FakeEngine]) -> None:
    engines[1].silent.add("/end_weight_update")
    sync = DistributedWeightSync([engine.url for engine in engines], SyncRank(), SyncSettings(timeout_s=0.5))
    with pytest.raises(WeightSyncError, match=rf"{engines[1].url}: still in the weight update .* after 0.5 s") as error:
        sync.connect()
    assert engines[0].url not in str(error.value)


def test_a_push_that_reaches_no_engine_is_an_error_that_names_all(engines: list[FakeEngine]) -> None:
    sync = DistributedWeightSync([engine.url for engine in engines], SyncRank(), QUICK)
    push(sync, 0)
    for engine in engines:
        engine.die()
    with pytest.raises(WeightSyncError, match="did not reach 2 engine") as error:
        push(sync, 1)
    assert all(engine.url in str(error.value) for engine in engines)


def test_an_engine_that_hangs_keeps_its_old_version_and_rejoins(engines: list[FakeEngine]) -> None:
    live, hung = engines
    sync = DistributedWeightSync([live.url, hung.url], SyncRank(), QUICK)
    push(sync, 0)
    hung.silent.add("/update_weights_from_distributed")
    assert set(push(sync, 1)) == {hung.url}
    assert (live.version, hung.version) == ("1", "0")
    assert "/continue_generation" in [path for path, _ in hung.calls[-3:]]  # it serves on, under its old version
    hung.silent.clear()
    assert push(sync, 2) == {}
    assert (live.version, hung.version) == ("2", "2")
    sync.close()


def test_a_node_that_is_switched_off_costs_the_connection_timeout_only(
    engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "CONNECT_S", 0.3)
    patient = SyncSettings(timeout_s=60.0)
    with silent_port() as port:
        sync = DistributedWeightSync([engines[0].url, f"http://127.0.0.1:{port}"], SyncRank(), patient)
        started = time.monotonic()
        failed = push(sync, 1)
        assert time.monotonic() - started < 20.0
    assert list(failed) == [f"http://127.0.0.1:{port}"]
    assert "no connection within 0.3 s" in failed[f"http://127.0.0.1:{port}"]
    assert engines[0].version == "1"
    sync.close()


@contextmanager
def silent_port() -> Iterator[int]:
    """A port whose full queue of connections drops every further one, like a host that is not there."""
    with ExitStack() as stack:
        listener, *fillers = (stack.enter_context(socket.socket()) for _ in range(4))
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])


def test_calls_ignore_a_proxy_of_the_environment(engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"http://127.0.0.1:{kept_port()}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, dead)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert http.call(engines[0].url, "GET", "/model_info", timeout_s=5.0)["weight_version"] == "default"
