"""Processes that are forked off one that has done the imports: not off this one, which has threads."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running

import pytest

IMPORTED = (
    *("killed_commands", "fake_engine"),
    *("megatron_sip.rollout.sync_disk", "megatron_sip.rollout.sync_distributed"),
)
"""What the processes of all tests run: the first test starts the one server of this process."""


@functools.cache
def forks() -> ForkServerContext:
    """Its processes begin with IMPORTED imported, which the server passes over in silence where it cannot."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.12's server does not get it otherwise
        patch.setenv("OMP_NUM_THREADS", "1")  # a fork is without the threads of what it is forked off
        ensure_running()
    return context
