"""What a program of a job gets on its node: caches on the node's disk, and sockets on the network of the job's other nodes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
SOCKETS = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Each with what says that the name which follows is a whole one."""
NCCL_FILES = (Path("/etc/nccl.conf"), Path.home() / ".nccl.conf")
"""Where a site or user sets NCCL's variables; those of the environment come before them."""
SIOCGIFADDR = 0x8915


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """An empty folder in the node's temporary one (TMPDIR) that nobody else reads, and that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="megatron_sip-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def node_variables(
    folder: Path, peers: Sequence[str], given: Mapping[str, str], nccl_files: Sequence[Path] = NCCL_FILES
) -> dict[str, str]:
    """Variables for a program with its caches in `folder`, that talks to the hosts `peers`; none that is in `given` or a file
    of NCCL's."""
    variables = {name: str(folder / place) for name, place in CACHES.items()}
    with contextlib.suppress(OSError):  # a host without an IPv4 address, say: libraries choose, as they do without us
        if interface := interface_towards(peers):
            variables |= {name: mark + interface for name, mark in SOCKETS.items()}
    known = {*given, *(name for path in nccl_files for name in _set_in(path))}
    return {name: value for name, value in variables.items() if name not in known}


def _set_in(nccl_file: Path) -> set[str]:
    """Names of the variables that a file of NCCL's sets; none where it cannot be read."""
    try:
        lines = nccl_file.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {line.partition("=")[0].strip() for line in lines if "=" in line}


def interface_towards(hosts: Sequence[str]) -> str | None:
    """The network interface through which packets to the first of `hosts` that is another one leave; None if none is.

    Raises OSError for a host whose name is unknown, or to which no way leads.
    """
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # a datagram socket sends nothing here
            address = probe.getsockname()[0]
            if not address.startswith("127.") and address != socket.gethostbyname(host):
                return next((name for _, name in socket.if_nameindex() if _address(probe, name) == address), None)
    return None


def _address(any_socket: socket.socket, interface: str) -> str | None:
    """The IPv4 address of an interface."""
    request = struct.pack("256s", os.fsencode(interface))
    with contextlib.suppress(OSError):
        return socket.inet_ntoa(fcntl.ioctl(any_socket, SIOCGIFADDR, request)[20:24])
    return None
