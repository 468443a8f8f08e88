"""No API key reaches what a run leaves behind, also where servers fail and show it in every way that we know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hostile_replies import FAILURES
from raw_server import RawServer, reply_of
from training import output, steps, train

from megatron_sip.serving.launch import LocalServer
from megatron_sip.serving.loop_thread import LoopThread

KEYS = {"JUDGE_KEY": "sk-judge-6f1d0c5b9a", "ENGINE_KEY": "sk-engine-2e8a7740fd"}
STEPS = 4

pytestmark = pytest.mark.slow


class FailingTeacher:
    """Rewrites and judges; before each good answer it fails, in another way each time."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._fails_now = False

    def __call__(self, request: bytes) -> Iterable[bytes]:
        if request.startswith(b"GET"):
            return [reply_of({"data": [{"id": "teacher", "max_model_len": 8192}]})]
        self._fails_now = not self._fails_now
        if self._fails_now:
            self.failed.append(list(FAILURES)[len(self.failed) % len(FAILURES)])
            return FAILURES[self.failed[-1]](request)
        body = json.loads(request.partition(b"\r\n\r\n")[2])
        choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": "Conclusion: Option 1"}}
        return [reply_of({"choices": [choice] * body.get("n", 1)})]


def test_no_file_of_a_run_holds_a_key(
    corpus: Path, tiny_llama_dir: Path, tiny_engine: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**KEYS, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    run, teacher = tmp_path / "run", FailingTeacher()
    server = RawServer(teacher)
    flags = (
        *("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus)),
        *("--objective", "dpo", "--candidates", "suffix", "rewrite", "rollout", "--num-rollouts", "1"),
        *("--criteria", "quality=1", "--judge-verdict", "hard", "--judge-votes", "2"),
        *("--rollout-url", tiny_engine.url, "--rollout-key-variable", "ENGINE_KEY"),
        *("--teacher-api", "openai", "--teacher-name", "teacher", "--teacher-key-variable", "JUDGE_KEY"),
        *("--teacher-context", "8192"),
        *("--train-iters", str(STEPS), "--save-interval", "2", "--save-groups", str(run / "groups")),
        *("--tensorboard-dir", str(run / "tensorboard"), "--wandb-project", "keys", "--wandb-exp-name", "run"),
        *("--wandb-save-dir", str(run), "--verbose"),
    )
    loop = LoopThread("teacher")
    try:
        loop.run(server.__aenter__())
        train(run, *flags, "--teacher-url", server.url, "--logging-level", "10")
    finally:
        loop.close()
    assert set(teacher.failed) == set(FAILURES)
    assert all(KEYS["JUDGE_KEY"].encode() in request for request in server.requests if request.startswith(b"POST"))
    assert len(steps(run)) == STEPS
    assert "judge call failed" in output(run)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = {path.suffix for path in files}
    assert {".log", ".jsonl", ".json", ".html", ".wandb", ".distcp", ".zst"} <= written
    assert [path for path in files if any(key.encode() in path.read_bytes() for key in KEYS.values())] == []
