"""Replies that are no answer, some of which show the key that they were asked with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from raw_server import JSON, reply_of

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"


def chunks(pieces: Iterable[bytes], head: bytes = CHUNKED) -> Iterator[bytes]:
    yield head + b"\r\n"
    for piece in pieces:
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def echo(request: bytes) -> bytes:
    return next(line for line in request.split(b"\r\n") if line.lower().startswith(b"authorization"))


FAILURES: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "long header": lambda request: [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9000 + b"\r\n\r\n{}"],
    "ssh": lambda request: [b"SSH-2.0-OpenSSH_9.6\r\n"],
    "no http": lambda request: [b"\x16\x03\x01\x00\xff" * 20],
    "broken chunk": lambda request: [CHUNKED + b"\r\nzz\r\n"],
    "broken gzip": lambda request: chunks([b"no gzip"], CHUNKED + b"Content-Encoding: gzip\r\n"),
    "cut off": lambda request: [JSON + b"Content-Length: 100\r\n\r\n{"],
    "closed": lambda request: [],
    "redirect to a key": lambda request: [b"HTTP/1.1 302 F\r\nLocation: http://a/?" + echo(request) + b"\r\n\r\n"],
    "echo in a 401": lambda request: [reply_of({"error": echo(request).decode()}, b"HTTP/1.1 401 No\r\n")],
    "echo in a 400": lambda request: [reply_of({"error": echo(request).decode()}, b"HTTP/1.1 400 No\r\n")],
    "echo in a 500": lambda request: [reply_of({"error": echo(request).decode()}, b"HTTP/1.1 500 No\r\n")],
    "echo in a reason": lambda request: [b"HTTP/1.1 200 " + echo(request) + b"\r\n" + b"bad header\r\n\r\n"],
    "echo as a version": lambda request: [echo(request) + b"\r\n\r\n"],
    "echo as a value": lambda request: [
        reply_of(
            {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": echo(request).decode()}]}}]}
        )
    ],
    "wrong type": lambda request: [reply_of({"choices": echo(request).decode()})],
}
