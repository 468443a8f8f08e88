"""How a run is set up before its model exists: what is checked first, and which errors are the user's to mend."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_run import FakeExchange
from flag_cases import unchecked_settings
from tiny_tokenizer import byte_level_tokenizer
from transformers import LlamaConfig

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.errors import DataError, UserError
from megatron_sip.hf.families import architecture
from megatron_sip.hf.folder import write_model_files
from megatron_sip.judge.cache import AnswerCache, CacheError
from megatron_sip.platform.megatron import prepare_megatron

prepare_megatron()  # before anything imports Megatron

from megatron_sip import open_trainer  # noqa: E402
from megatron_sip import run as run_module  # noqa: E402
from megatron_sip.experience import leader as services  # noqa: E402
from megatron_sip.hf import checkpoint_model  # noqa: E402
from megatron_sip.rollout import weight_group  # noqa: E402
from megatron_sip.training.reference_model import ReferenceStore  # noqa: E402

ALL = ("--win-rate-prompts", "1", "--candidates", "suffix", "rewrite", "rollout")


class EndOfTestError(Exception):
    """Raised by the first part that is not faked."""


def raises_the_end(*_: Any, **__: Any) -> None:
    raise EndOfTestError


def set_up(monkeypatch: pytest.MonkeyPatch, **servers: Any) -> list[str]:
    """The order in which a run's parts are opened, up to its model."""
    calls: list[str] = []

    def opens(name: str, result: Any = None) -> Any:
        return lambda *_: calls.append(name) or result

    monkeypatch.setattr(run_module, "LeaderExchange", lambda timeout_seconds: FakeExchange())
    monkeypatch.setattr(run_module, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: None))
    monkeypatch.setattr(run_module, "open_run_folder", opens("check weights"))
    monkeypatch.setattr(run_module, "open_leader", opens("connect"))
    monkeypatch.setattr(run_module, "open_tasks", opens("tokenise", (None, None)))
    monkeypatch.setattr(run_module, "start_local_servers", opens("start servers"))
    monkeypatch.setattr(run_module, "check_servers", opens("ask"))
    monkeypatch.setattr(run_module, "load_policy", opens("load", (None, None, None, None)))
    monkeypatch.setattr(run_module, "open_weight_sync", raises_the_end)
    none = {"rollout_url": None, "teacher_url": None}
    with contextlib.suppress(EndOfTestError):
        run_module.set_up(unchecked_settings(*ALL, **(none | servers)), contextlib.ExitStack())
    return calls


def test_a_url_is_checked_before_anything_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_up(monkeypatch, rollout_url=["http://e"]) == [
        *("check weights", "start servers", "connect", "tokenise", "load"),
    ]


@pytest.mark.parametrize(
    "servers",
    [
        {"eval_judge_url": ["http://j"], "teacher_model": "m"},
        {"rewriter_url": ["http://r"], "rollout_local": 1},
        {"teacher_url": ["http://t"], "rollout_local": 1},
        {"rollout_url": ["http://e"], "teacher_model": "m"},
    ],
)
def test_a_url_is_asked_before_a_server_of_this_node_is_started(
    monkeypatch: pytest.MonkeyPatch, servers: dict[str, Any]
) -> None:
    assert set_up(monkeypatch, **servers) == ["check weights", "ask", "start servers", "connect", "tokenise", "load"]


ONLY_REWRITES = ("--objective", "sft", "--sft-target", "rewrite", "--win-rate-prompts", "0")


@pytest.mark.parametrize(
    ("flag", "more"),
    [
        ("--rollout-url", ALL),
        ("--teacher-url", ALL),
        ("--teacher-url", ONLY_REWRITES),
        ("--rewriter-url", ALL),
        ("--eval-judge-url", ALL),
    ],
)
def test_a_server_given_as_url_that_is_down_is_named(
    monkeypatch: pytest.MonkeyPatch, flag: str, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr(services, "CONNECT_SECONDS", 0.1)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        none = {"rollout_url": None, "teacher_url": None, flag[2:].replace("-", "_"): [url]}
        settings = unchecked_settings(*more, **none)
        with pytest.raises(UserError, match=url):
            services.check_servers(settings.clients(settings.urls))


def test_engines_here_and_elsewhere_meet_at_an_address_that_both_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weight_group.address_for(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
    towards = {"http://127.0.0.1:1": "127.0.0.1", "http://engine:1": "10.0.0.7"}
    monkeypatch.setattr(weight_group, "address_towards", towards.__getitem__)
    assert weight_group.address_for(list(towards)) == "10.0.0.7"


def test_where_the_weights_come_from_is_said() -> None:
    assert "RANDOM weights" in run_module.origin_of_weights(unchecked_settings(train_iters=9).run, 0)
    run = unchecked_settings(train_iters=9, pretrained_checkpoint="ckpt").run
    assert run_module.origin_of_weights(run, 0) == "starts from the weights of ckpt"
    assert run_module.origin_of_weights(run, 4) == "continued at step 4 of 9, from run"


def test_servers_of_this_node_start_after_tokenising_while_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = set_up(monkeypatch, rollout_local=1, teacher_model="judge")
    assert calls == ["check weights", "tokenise", "start servers", "load", "connect"]


def test_a_reference_that_was_never_saved_is_explained(tmp_path: Path) -> None:
    """As in a run of rf-nll that is continued as dpo."""
    with pytest.raises(DataError, match=r"reference: .* iteration 20 .* --pretrained-checkpoint") as caught:
        ReferenceStore(tmp_path).load(SimpleNamespace(), 20)  # type: ignore[arg-type]
    assert isinstance(caught.value, UserError)


def test_a_broken_judge_cache_is_the_user_s_to_mend(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_text("no database" * 100)
    with pytest.raises(CacheError, match=r"answers\.sqlite") as caught:
        AnswerCache(tmp_path)
    assert isinstance(caught.value, UserError)


def test_the_token_cache_lies_where_data_cache_path_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level_tokenizer()
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words that make many tokens " * 20}) + "\n")
    settings = unchecked_settings(
        **{"seq_length": 32, "suffix_length": 8, "task_mode": "random", "seed": 1, "min_prefix_length": 4},
        **{"data_path": [str(tmp_path / "a.jsonl")], "text_field": "text", "split": "1", "vocab_size": len(tokenizer)},
        **{"data_cache_path": str(tmp_path / "cache"), "rank": 0, "train_iters": 1, "global_batch_size": 1},
        **{"win_rate_prompts": 0, "prepend_bos": "auto"},
    )
    tasks, held_out = run_module.open_tasks(settings, tokenizer, FakeExchange())  # type: ignore[arg-type]
    assert tasks is not None
    assert held_out is None
    assert re.search(
        r"^tasks: documents 1, tokens \d+, sources 1; epochs in this run 1$", capsys.readouterr().out, re.M
    )
    assert list((tmp_path / "cache").glob("a.jsonl-*/tokens.bin"))


def test_held_out_texts_that_training_has_too_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": f"the same words {i % 2}, many tokens of them " * 20}) + "\n" for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    tokenizer = byte_level_tokenizer()
    settings = unchecked_settings(
        **{"seq_length": 32, "suffix_length": 8, "task_mode": "random", "seed": 1, "min_prefix_length": 4},
        **{"data_path": [str(tmp_path / "a.jsonl")], "text_field": "text", "split": "3,0,1", "prepend_bos": "auto"},
        **{"data_cache_path": str(tmp_path / "cache"), "rank": 0, "train_iters": 1, "global_batch_size": 1},
        **{"win_rate_prompts": 1, "vocab_size": len(tokenizer)},
    )
    run_module.open_tasks(settings, tokenizer, FakeExchange())  # type: ignore[arg-type]
    assert "data: 2 of 2 held-out documents have the same text as a training document: " in capsys.readouterr().out


def test_rows_are_padded_with_an_id_that_every_embedding_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer's own padding token may have been added beyond the model's vocabulary."""
    (tmp_path / "hf").mkdir()
    given: dict[str, Any] = {}

    def trainer(*_: Any, **keywords: Any) -> None:
        given.update(keywords)
        raise EndOfTestError

    monkeypatch.setattr(open_trainer, "PolicyTrainer", trainer)
    for module in (run_module, open_trainer):
        monkeypatch.setattr(module, "get_args", lambda: argparse.Namespace(align_grad_reduce=True))
    settings = unchecked_settings(save=str(tmp_path / "run"), hf_config=str(tmp_path / "hf"))
    with pytest.raises(EndOfTestError):
        run_module.load_policy(settings, FakeExchange(), None)  # type: ignore[arg-type]
    assert given == {"pad_id": 0}


def test_files_of_a_run_that_never_saved_are_not_those_of_the_next_model(tmp_path: Path) -> None:
    """The folder hf/ is what checkpoints are exported with."""
    source, target = tmp_path / "model", tmp_path / "run" / "hf"
    source.mkdir()
    target.mkdir(parents=True)
    (source / "config.json").write_text("this")
    for name in ("config.json", "tokenizer.model"):
        (target / name).write_text("another model's")
    write_model_files(source, target, renew=True)
    assert {file.name: file.read_text() for file in target.iterdir()} == {"config.json": "this"}
    write_model_files(target, target, renew=True)
    assert (target / "config.json").read_text() == "this"
    (target / "model.safetensors").write_text("somebody's only copy")
    (target / "tokenizer.json").write_text("and its tokenizer")
    write_model_files(source, target, renew=True)
    assert {file.name for file in target.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.mark.parametrize("resumes", [True, False])
def test_weights_of_another_model_are_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    hf_dir, save, pretrained = tmp_path / "hf", tmp_path / "run", tmp_path / "pretrained"
    LlamaConfig(vocab_size=512).save_pretrained(hf_dir)
    save.mkdir()
    pretrained.mkdir()
    (pretrained / TRACKER).write_text("release")
    if resumes:
        (save / TRACKER).write_text("20")
    saved = argparse.Namespace(**(architecture(LlamaConfig(vocab_size=520)) | {"layernorm_epsilon": 1e-6}))
    asked: list[Path] = []
    monkeypatch.setattr(checkpoint_model, "saved_arguments", lambda folder: asked.append(folder) or saved)
    for check in ("mend_checkpoint_folder", "require_whole_checkpoint", "require_whole_weights"):
        monkeypatch.setattr(run_module, check, lambda *_, **__: [])
    settings = unchecked_settings(
        **{"save": str(save), "hf_config": str(hf_dir), "pretrained_checkpoint": str(pretrained)},
        **{"rank": 0, "load_last_whole": False},
    )
    with pytest.raises(
        DataError, match=r"another model than .*hf/config.json: --vocab-size 520 there, 512 here"
    ) as error:
        run_module.open_run_folder(settings.run, FakeExchange())  # type: ignore[arg-type]
    assert isinstance(error.value, UserError)
    assert asked == [save if resumes else pretrained]
    assert not (save / "hf").exists()  # which would say that the checkpoints are of this model


@pytest.mark.parametrize("place", ["nowhere", "pretrained/iter_0000020"])
def test_a_pretrained_checkpoint_that_is_none_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "pretrained" / "iter_0000020").mkdir(parents=True)
    settings = unchecked_settings(
        **{"save": str(tmp_path / "run"), "hf_config": "hf", "pretrained_checkpoint": str(tmp_path / place)},
        **{"rank": 0, "load_last_whole": False},
    )
    with pytest.raises(DataError, match=f"--pretrained-checkpoint .*{place} holds no checkpoint: it has no {TRACKER}"):
        run_module.open_run_folder(settings.run, FakeExchange())  # type: ignore[arg-type]


def test_config_and_tokenizer_are_copied_once_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "run" / "hf"
    source.mkdir()
    kept = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "modeling_own.py"]
    weights = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "optimizer.pt", "q4.gguf"]
    for name in [*kept, *weights, "README.md", "weights.pkl", ".gitattributes"]:
        (source / name).write_text("first")
    write_model_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(kept)
    (source / "config.json").write_text("second")
    write_model_files(source, target)
    assert (target / "config.json").read_text() == "first"
