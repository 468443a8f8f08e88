"""How a request to a server can fail: one list of kinds for judge, rewriter and engines, for asyncio and blocking calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

from megatron_sip.errors import UserError
from megatron_sip.serving.http_reply import masked, plain, printable

FailureKind = Literal[
    "timeout",  # no answer within the call's time
    "deadline",  # the whole request ran out of time, its retries included
    "connection",  # no connection: refused, or a name that is not resolved
    "disconnected",  # the connection broke, or spoke no HTTP
    "rate-limited",  # status 429, or every server had asked for more time than there was
    "server-error",  # another status that may pass
    "rejected",  # a status that will not: the request itself is wrong, or the server elsewhere
    "bad-response",  # status 200, and not what was asked for
    "aborted",  # an engine gave up the generation
    "stale-weights",  # an engine has other weights than were asked for
]
RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})
REFUSAL_BYTES = 4000
"""Of a refusal, to be read for what the server wants otherwise."""


class RequestError(UserError, RuntimeError):
    """A request without a usable answer.

    kind: for counting. detail: the URL, and what went wrong there. status: of HTTP, 0 where there was none.
    retry_after_s: what the server asked for, 0: nothing. refusal: the text of a 400 or 422.
    """

    def __init__(
        self, kind: FailureKind, detail: str, *, status: int = 0, retry_after_s: float = 0.0, refusal: str = ""
    ) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind: FailureKind = kind
        self.detail = detail
        self.status = status
        self.retry_after_s = retry_after_s
        self.refusal = refusal


class BadResponseError(Exception):
    """A reply with status 200 that is not what was asked for; the request is tried again."""

    def __init__(self, detail: str, kind: FailureKind = "bad-response") -> None:
        super().__init__(detail)
        self.kind: FailureKind = kind


@contextmanager
def readable() -> Iterator[None]:
    """Whatever a reply does to the parser inside is the reply's fault: BadResponseError."""
    try:
        yield
    except BadResponseError:
        raise
    except Exception as error:
        raise BadResponseError(f"not to be read: {plain(error)}") from None


def failure(kind: FailureKind, where: str, key: str | None, detail: str) -> RequestError:
    """`where`: the URL that was asked. `key` is not shown."""
    return RequestError(kind, f"{where}: {printable(masked(detail, key))[:500]}")


def status_failure(
    where: str, key: str | None, status: int, headers: Mapping[str, str], content: bytes
) -> RequestError:
    """Of a reply with another status than 200; `content` is its body, without the key."""
    if 300 <= status < 400:
        place = printable(masked(headers.get("Location", "elsewhere"), key))[:300]
        detail = f"{where}: status {status}: redirects to {place}, which is not followed: give that URL"
        return RequestError("rejected", detail, status=status)
    retried = status in RETRIED_STATUS
    kind: FailureKind = "rate-limited" if status == 429 else "server-error" if retried else "rejected"
    text = printable(content[:REFUSAL_BYTES].decode(errors="replace"))
    return RequestError(
        kind,
        f"{where}: status {status}: {text[:500]}",
        status=status,
        retry_after_s=retry_after(headers.get("Retry-After")) if retried else 0.0,
        refusal=text if status in (400, 422) else "",
    )


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for (a number or an HTTP date), 0 without or with a broken one."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
