"""The identity of an evaluated model: what makes other answers is another one, wherever it is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from tiny_tokenizer import byte_level_tokenizer, metaspace_tokenizer

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.errors import DataError
from megatron_sip.evaluate import command_line
from megatron_sip.evaluation import served_model
from megatron_sip.evaluation.commands.tasks import answers_key
from megatron_sip.evaluation.served_model import Model, open_model, served_identity
from megatron_sip.hf.converted import ConversionFailedError, Export


def opened(*words: str) -> Model:
    return open_model(command_line().parse_args(["tasks", "--tasks", "t", "--output", "o", *words]))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """An HF folder with a tokenizer, and one with another tokenizer alone."""
    model, other = tmp_path / "model", tmp_path / "other"
    byte_level_tokenizer().save_pretrained(model)
    metaspace_tokenizer().save_pretrained(other)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return model, other


def test_other_weights_dtype_or_tokenizer_are_another_model(folders: tuple[Path, Path]) -> None:
    model, other = folders
    usual = opened("--model", str(model)).header()
    assert usual == opened("--model", str(model)).header()
    assert usual["model"] == str(model)
    others = [
        opened("--model", str(model), "--dtype", "float16").header(),
        opened("--model", str(model), "--tokenizer", str(other)).header(),
    ]
    (model / "model.safetensors").write_bytes(b"WEIGHTS")  # exported anew in its place
    others.append(opened("--model", str(model)).header())
    changed = [{name for name in usual if usual[name] != one[name]} for one in others]
    assert changed == [{"dtype"}, {"tokenizer"}, {"weights"}]


def answers(engine: FakeEngine, path: str = "org/model", **server: Any) -> None:
    engine.answers["/model_info"] = 200, {"model_path": path, "weight_version": "default"}
    engine.answers["/server_info"] = 200, {"dtype": "bfloat16", "quantization": None} | server


def test_a_served_model_is_what_its_engine_says_wherever_it_listens(folders: tuple[Path, Path]) -> None:
    with FakeEngine() as one, FakeEngine() as two:
        for engine in (one, two):
            answers(engine)
        name, identity = served_identity([one.url])
        assert (name, identity) == served_identity([two.url]) == served_identity([one.url, two.url])
        assert name == "org/model"
        assert one.url not in json.dumps(identity)
        for other in ({"dtype": "float32"}, {"quantization": "fp8"}, {"path": "org/other"}):
            answers(two, **other)
            assert served_identity([two.url])[1] != identity
            with pytest.raises(DataError, match="name engines of one model"):
                served_identity([one.url, two.url])
        answers(two)
        two.answers["/model_info"] = 200, {"model_path": "org/model", "weight_version": "8"}
        assert served_identity([two.url])[1] != identity
        answers(two, path=str(folders[0]))
        before = served_identity([two.url])
        (folders[0] / "model.safetensors").write_bytes(b"WEIGHTS")
        assert served_identity([two.url]) != before
        two.answers["/model_info"] = 200, {"status": "ok"}
        with pytest.raises(DataError, match="no SGLang engine"):
            served_identity([two.url])


def test_answers_are_kept_by_what_is_served_not_by_where(folders: tuple[Path, Path]) -> None:
    keys = []
    for dtype in ("bfloat16", "bfloat16", "float32"):
        with FakeEngine() as engine:
            answers(engine, dtype=dtype)
            model = opened("--url", engine.url, "--tokenizer", str(folders[1]))
        keys.append(answers_key(model, 96))
    assert keys[0] == keys[1] != keys[2]
    assert answers_key(model, 95) != keys[2]


def test_a_checkpoint_is_its_export_of_its_step(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (run := folders[0].parent / "run").mkdir()
    (run / TRACKER).write_text("7")
    monkeypatch.setattr(
        served_model, "exported_model", lambda checkpoint: Export(folders[0], "7", f"key of {checkpoint}")
    )
    model = opened("--model", str(run))
    assert (model.name, model.folder, model.step) == (str(run), folders[0], "7")
    assert model.header()["weights"] == f"key of {run}"

    def fails(_: Path) -> Export:
        raise ConversionFailedError("it is damaged")

    monkeypatch.setattr(served_model, "exported_model", fails)
    with pytest.raises(DataError, match=f"--model {run}: it is damaged"):
        opened("--model", str(run))


def test_engines_have_their_own_dtype(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="--dtype: of no effect with --url"):
        opened("--url", "http://127.0.0.1:1", "--tokenizer", str(folders[1]), "--dtype", "float32")
    with pytest.raises(DataError, match="nowhere: no tokenizer there"):
        opened("--url", "http://127.0.0.1:1", "--tokenizer", "nowhere")
    with pytest.raises(DataError, match="--concurrency 0: a number above 0"):
        opened("--model", str(folders[0]), "--concurrency", "0")
