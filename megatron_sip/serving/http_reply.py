"""What may be believed of a server's reply, and said about a failed one: bounded in size, without keys, never redirected.

For all HTTP clients of this package, asyncio and blocking alike.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from typing import Any

import aiohttp

MAX_REPLY_BYTES = 64 * 2**20
"""Of a reply's body, decompressed. Far above any honest one: a judge's is some kB, an engine's some MB."""
SECRET_CHARS = 8
"""Shorter keys are placeholders for servers that want any, such as EMPTY, and words that texts may hold."""
LOGPROB_SLACK = 1e-3
"""By which a log-prob may exceed 0: servers compute it in float32, or in bfloat16 and then round."""


class ReplyTooLongError(Exception):
    """A reply that went on after MAX_REPLY_BYTES."""


async def read_reply(response: aiohttp.ClientResponse, limit: int = MAX_REPLY_BYTES) -> bytes:
    """The body, decompressed piece by piece. Raises ReplyTooLongError after `limit` bytes, and aiohttp's errors."""
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limit:
            response.close()
            raise ReplyTooLongError(f"more than {limit / 2**20:g} MB in one reply")
        pieces.append(piece)
    return b"".join(pieces)


def plain(error: BaseException) -> str:
    """Type and text of an error; never its repr, in which aiohttp shows the request's headers, keys included."""
    text = str(error.message if isinstance(error, aiohttp.ClientResponseError) else error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def masked(text: str, key: str | None) -> str:
    """`text` without an API key that a server or an error may have put into it."""
    return text.replace(key, "***") if key and len(key) >= SECRET_CHARS else text


def masked_reply(content: bytes, key: str | None) -> bytes:
    """A reply's body without the key: errors quote replies, and a server may have echoed what it was sent."""
    return content.replace(key.encode(), b"***") if key and len(key) >= SECRET_CHARS else content


def printable(text: str) -> str:
    """`text` on one line, without characters that move a terminal's cursor or turn text round."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def key_from_environment(variable: str) -> str:
    """The API key that an environment variable holds. Raises ValueError, which names the variable and shows no key."""
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"environment variable {variable} holds no API key")
    if not key.isascii() or not key.isprintable() or key.split() != [key]:
        raise ValueError(
            f"the API key in environment variable {variable} has a line break, white space or another character that no "
            f'header can hold: set it anew, for example {variable}="$(tr -d "[:space:]" < FILE)"'
        )
    return key


def url_mistake(url: str) -> str | None:
    """What is wrong with the base URL of a server, or None. It never quotes user or password."""
    if not url.startswith(("http://", "https://")):
        return "a URL starts with http:// or https://"
    if url.split() != [url]:
        return "a URL holds no white space"
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    except ValueError:
        host = None
    if "@" in url.partition("://")[2].partition("/")[0]:
        return "a URL with user or password would be logged"
    if not host:
        return "a URL is http://HOST:PORT or https://HOST"
    if parts.query or parts.fragment:
        return "a server's URL ends before ? and #: paths are appended to it"
    return None


def shown_url(url: str) -> str:
    """A URL as it may be printed: without what may be user or password, and what follows a ? or #."""
    scheme, separator, rest = url.partition("://")
    _, at, rest = rest.rpartition("@")
    base = re.split(r"[?#]", rest, maxsplit=1)[0]
    return scheme + separator + "***@" * bool(at) + base + "?***" * (base != rest)


def is_logprob(value: Any) -> bool:
    """Whether a server's value can be the natural log of a probability."""
    return type(value) in (int, float) and -1e30 < value <= LOGPROB_SLACK
