"""An SGLang server without a GPU starts without what only a GPU could use."""

from __future__ import annotations

import subprocess
import sys

from megatron_sip.hf.families import FAMILIES
from megatron_sip.serving.launch import CPU_MODULE, ServerSettings, server_command


def module_of(command: list[str]) -> str:
    return command[command.index("-m") + 1]


def test_only_without_a_gpu() -> None:
    assert module_of(server_command(ServerSettings("model"), 30000, 29500, on_cpu=True)) == CPU_MODULE
    assert module_of(server_command(ServerSettings("model"), 30000, 29500, on_cpu=False)) == "sglang.launch_server"


def run(program: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_scheduler_imports_neither_megatron_nor_gpu_kernels() -> None:
    """As multiprocessing does in SGLang's processes: our module first, then SGLang's own."""
    program = f"""
import sys
import {CPU_MODULE}
import sglang.srt.managers.scheduler, sglang.srt.model_executor.model_runner
print(*sorted({{name.split(".")[0] for name, module in sys.modules.items() if module is not None}}))
print(*sorted(name for name, module in sys.modules.items() if module is not None and name.startswith("megatron.")))
"""
    packages, megatron = run(program).split("\n")[-3:-1]
    assert "sglang" in packages.split()
    assert not {"flashinfer", "flash_attn", "flash_mla"} & set(packages.split())
    assert not megatron


def test_a_policy_s_model_is_found_without_importing_all_others_which_are_found_too() -> None:
    program = f"""
import sys
import {CPU_MODULE}
from sglang.srt.models.registry import ModelRegistry
names = {[family.architecture for family in FAMILIES.values()]}
print([ModelRegistry.resolve_model_cls([name])[1] for name in names] == names, "sglang.srt.models.gemma2" in sys.modules)
print(ModelRegistry.resolve_model_cls(["Gemma2ForCausalLM"])[1], "sglang.srt.models.gemma2" in sys.modules)
"""
    assert run(program).split("\n")[-3:-1] == ["True False", "Gemma2ForCausalLM True"]
