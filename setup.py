"""Builds the log-prob and attention kernels in csrc/; everything else about the package is in pyproject.toml.

A C++ compiler is enough. With nvcc and a CUDA build of torch the CUDA kernels are built too, whether or not there is a
GPU; MEGATRON_SIP_CUDA=0 leaves them out and =1 insists on them.
"""

from __future__ import annotations

import os
import shutil

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

CUDA_ARCHITECTURES = ("80", "90")

CPU_SOURCES = [
    "csrc/bindings.cpp",
    "csrc/instruction_dispatch.cpp",
    "csrc/logprob_cpu.cpp",
    "csrc/row_avx512.cpp",
    "csrc/row_avx2.cpp",
    "csrc/row_portable.cpp",
    "csrc/tree_attention_avx512bf16.cpp",
    "csrc/tree_attention_cpu.cpp",
]
CUDA_SOURCES = ["csrc/logprob_cuda.cpp", "csrc/logprob_cuda.cu"]


def with_cuda() -> bool:
    """Whether the CUDA kernels are to be built; an error where they are insisted on and cannot be."""
    choice = os.environ.get("MEGATRON_SIP_CUDA", "0")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"MEGATRON_SIP_CUDA must be 0, 1 or auto, got {choice!r}")
    found = (
        torch.version.cuda is not None and CUDA_HOME is not None and shutil.which(f"{CUDA_HOME}/bin/nvcc") is not None
    )
    if choice == "1" and not found:
        raise SystemExit(f"MEGATRON_SIP_CUDA=1, but torch's CUDA is {torch.version.cuda} and CUDA_HOME is {CUDA_HOME}")
    return found and choice != "0"


def kernels(cuda: bool) -> CppExtension | CUDAExtension:
    """The extension module `megatron_sip._kernels`."""
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", "-g0"]
    if not cuda:
        return CppExtension(
            "megatron_sip._kernels", CPU_SOURCES, extra_compile_args={"cxx": cxx}, extra_link_args=["-fopenmp"]
        )
    names = ",".join(f"sm_{number}" for number in CUDA_ARCHITECTURES)
    return CUDAExtension(
        "megatron_sip._kernels",
        CPU_SOURCES + CUDA_SOURCES,
        define_macros=[("MEGATRON_SIP_CUDA_ARCHITECTURES", f'"{names}"')],
        extra_compile_args={
            "cxx": cxx,
            "nvcc": [
                "-O3",
                "-std=c++17",
                "--Werror=all-warnings",
                "--use_fast_math=false",
                *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES),
                f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}",
            ],
        },
        extra_link_args=["-fopenmp"],
    )


setup(ext_modules=[kernels(with_cuda())], cmdclass={"build_ext": BuildExtension})
