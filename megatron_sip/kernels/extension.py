"""The built C++ and CUDA kernels, `megatron_sip._kernels`: whether they are there, and what of them runs here."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


def _load() -> ModuleType | None:
    """The built kernels, or None without them. One that is there but does not load is an error, not a fallback."""
    try:
        return importlib.import_module("megatron_sip._kernels")
    except ModuleNotFoundError:
        return None


extension = _load()


def compiled_devices() -> tuple[str, ...]:
    """Dispatch keys ("CPU", "CUDA") that the extension's log-prob kernels serve; empty when it is not built."""
    if extension is None:
        return ()
    return ("CPU", "CUDA") if extension.cuda_architectures() else ("CPU",)


def missing_cuda_kernels() -> str | None:
    """A line for the user of a GPU where the log-prob op's CUDA kernels are not built: what runs instead, how to build them."""
    if "CUDA" in compiled_devices():
        return None
    return (
        "the log-prob op has no CUDA kernels built: plain torch takes its place, many times slower and with float64 copies of "
        f"the logits; with nvcc of CUDA {torch.version.cuda} on the PATH, build it in the checkout: "
        "MEGATRON_SIP_CUDA=1 uv pip install --no-build-isolation --no-deps --editable ."
    )


def processor_runs(kernels: str) -> bool:
    """Are these CPU kernels ("bf16_layers", "tree_attention") built, on a processor that runs them?"""
    supported = getattr(torch.ops.megatron_sip, f"{kernels}_supported", None)
    return supported is not None and bool(supported())
