"""bfloat16 only where it is faster than float32: trainer and servers ask one function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from flag_cases import unchecked_settings

from megatron_sip.config.parse import compute_in_float32_where_faster
from megatron_sip.platform import number_format, sglang_cpu
from megatron_sip.serving.launch import LocalServer, ServerSettings
from megatron_sip.training import resume


def test_a_processor_with_avx2_alone_computes_in_float32() -> None:
    """Torch's own switches make any processor one."""
    code = "from megatron_sip.platform.number_format import bfloat16_pays; print(bfloat16_pays())"
    for switch in ({"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}):
        environment = {**os.environ, **switch, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("machine", "has", "pays"),
    [("x86_64", {"avx512_bf16": True}, True), ("x86_64", {"avx512_bf16": False}, False), ("aarch64", {}, True)],
)
def test_avx512_alone_computes_in_float32(
    machine: str, has: dict[str, bool], pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(number_format.platform, "machine", lambda: machine)
    assert number_format.bfloat16_pays() == pays


def test_a_gpu_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert number_format.bfloat16_pays()


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize(("bf16", "rank"), [(True, 0), (True, 1), (False, 0)])
def test_bf16_is_taken_back_with_one_line(
    pays: bool,
    bf16: bool,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(number_format, "bfloat16_pays", lambda: pays)
    args = Namespace(bf16=bf16, fp32_residual_connection=bf16, rank=rank, save=str(tmp_path))
    compute_in_float32_where_faster(args)
    assert args.bf16 == args.fp32_residual_connection == (bf16 and pays)
    told = "".join(capfd.readouterr())
    assert told.count("computes in float32") == told.count("\n") == int(bf16 and not pays and rank == 0)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize(
    ("kept", "computed"),
    [({"bf16": True}, True), ({"bf16": True, "bf16_taken_back": False}, True), ({"bf16_taken_back": True}, False)],
    ids=["earlier version", "bfloat16", "float32"],
)
def test_a_run_that_has_begun_keeps_its_format_on_any_processor(
    pays: bool, kept: dict[str, bool], computed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_format, "bfloat16_pays", lambda: pays)
    monkeypatch.setattr(resume, "saved_run", lambda save: Namespace(**kept))
    args = Namespace(bf16=True, fp32_residual_connection=True, rank=0, save="run")
    compute_in_float32_where_faster(args)
    assert args.bf16 == args.fp32_residual_connection == computed
    assert args.bf16_taken_back != computed


@pytest.mark.parametrize(
    ("pays", "dtype", "served"),
    [
        (True, "bfloat16", "bfloat16"),
        (True, "auto", "bfloat16"),
        (False, "bfloat16", "float32"),
        (False, "auto", "float32"),
        (False, "float16", "float16"),
    ],
)
def test_servers_compute_as_the_trainer_does(
    pays: bool, dtype: str, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_format, "bfloat16_pays", lambda: pays)
    monkeypatch.setattr(sglang_cpu, "has_accelerator", lambda: False)
    assert f"--dtype={served}" in LocalServer(ServerSettings("org/model", dtype=dtype))._command()


FLOAT32 = [{"dtype": "float32"}, {"torch_dtype": "float32"}, {"text_config": {"dtype": "float32"}}]
OTHERS: list[dict[str, Any]] = [{"dtype": "bfloat16"}, {"dtype": "float16"}, {}, {"text_config": None}]


@pytest.mark.parametrize(
    ("config", "served"), [*((config, "float32") for config in FLOAT32), *((config, "bfloat16") for config in OTHERS)]
)
def test_without_a_gpu_a_folder_of_float32_is_served_so(
    config: dict[str, Any], served: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SGLang's own choice for it is float16."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(number_format, "bfloat16_pays", lambda: True)
    monkeypatch.setattr(sglang_cpu, "has_accelerator", lambda: False)
    assert f"--dtype={served}" in LocalServer(ServerSettings(tmp_path, dtype="auto"))._command()
    monkeypatch.setattr(sglang_cpu, "has_accelerator", lambda: True)
    assert "--dtype=auto" in LocalServer(ServerSettings(tmp_path, dtype="auto"))._command()


def test_a_run_s_teacher_and_rewriter_keep_their_own_format_whatever_its_engines_have() -> None:
    servers = {"rollout_local": 1, "teacher_model": "judge", "rewriter_model": "writer"}
    made = unchecked_settings("--candidates", "rewrite", "rollout", "--local-engine-dtype", "float32", **servers)
    started = (made.local_servers.engine, made.local_servers.teacher, made.local_servers.rewriter)
    assert [server and server.dtype for server in started] == ["float32", "auto", "auto"]
