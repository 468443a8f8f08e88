"""Processes that are forked off one that has done the imports: not off this one, which has threads."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from unittest.mock import patch

IMPORTED = (
    *("killed_commands", "fake_engine"),
    *("megatron_sip.rollout.sync_disk", "megatron_sip.rollout.sync_distributed"),
)
"""What the processes of all tests run: the first test starts the one server of this process."""


def forks() -> ForkServerContext:
    """Its processes begin with IMPORTED imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # Python 3.12's server else does not find them
        ensure_running()
    return context
