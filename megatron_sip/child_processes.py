"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1
"""Of <sys/prctl.h>."""


def kill_with_parent() -> None:
    """From now on the kernel kills this process when the thread that started it ends, however that comes about."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
