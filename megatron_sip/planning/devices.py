"""Kinds of GPUs, by their makers' data sheets, and how much of that a program gets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """memory: bytes. flops: dense bf16 a second. bandwidth: of its memory, bytes a second. network: of one device towards
    other nodes, bytes a second. decode_step_s: what a decode step takes beside reading and computing. shared: all roles run on
    the same one, so that none of their work goes on beside another's. row_multiple: of tokens, that a packed row has there."""

    memory: float
    flops: float
    bandwidth: float
    network: float
    decode_step_s: float = 0.002
    shared: bool = False
    row_multiple: int = 128


DEVICES = {
    "H100": Device(80e9, 989e12, 3.35e12, 50e9),
    "H200": Device(141e9, 989e12, 4.8e12, 50e9),
    "A100": Device(80e9, 312e12, 2.04e12, 25e9),
    "cpu": Device(16e9, 1e11, 20e9, 1e9, decode_step_s=0.28, shared=True, row_multiple=16),
}
"""SXM modules, one network card a GPU (400, 400, 200 Gbit/s). cpu: two cores with AVX2, float32 (docs/log.md has the
decode step)."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Which share of the data sheet is reached: guesses, to be replaced by a run's own factors (`--from-run`).

    train, prefill: of the FLOP/s. decode: of the memory's bandwidth. network: of the network's. memory: of a GPU's that a
    server takes (--mem-fraction-static of the SLURM jobs), and that a trainer may fill.
    """

    train: float = 0.35
    prefill: float = 0.4
    decode: float = 0.5
    network: float = 0.7
    memory: float = 0.85


@dataclass(frozen=True, slots=True)
class Factors:
    """Measured seconds of a phase over those that the formulas foresee, of some run; 1: as foreseen."""

    rollout: float = 1.0
    judge: float = 1.0
    reference: float = 1.0
    train: float = 1.0
    sync: float = 1.0
