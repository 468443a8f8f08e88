"""Requests in the order that makes most of engines' prefix caches: of several that share text one is answered first.

Requests of one context that are sent at once are computed in one batch, each by itself. So the first one of a context goes
alone; and of contexts that begin alike, such as questions behind the same examples, the first one of the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import batched

SHARED_CHARACTERS = 256
"""Of the beginnings of two contexts that are worth waiting for."""


async def send_sharing[T](
    of_context: Mapping[str, Sequence[T]], send: Callable[[int, T], Awaitable[None]], in_flight: int, engines: int
) -> None:
    """Send all requests, by context one or more; `send` is given the number of the engine's turn, and the request.

    in_flight: calls for each engine. At most 2 * in_flight * engines requests have been begun with and are not answered: so
    many that engines are busy, so few that what they share stays in their caches. What `send` raises first ends it.
    """
    calls, window = asyncio.Semaphore(in_flight * engines), _Window(2 * in_flight * engines)

    async def send_one(number: int, request: T) -> None:
        async with calls:  # its time begins with its turn
            await send(number, request)
        window.answered()

    async def send_contexts(tasks: asyncio.TaskGroup, number: int, contexts: Sequence[str]) -> None:
        first, *others = of_context[contexts[0]]
        await send_one(number, first)
        for place, request in enumerate(others, 1):
            tasks.create_task(send_one(number + place // in_flight, request))
        for context in contexts[1:]:
            tasks.create_task(send_contexts(tasks, number, [context]))

    try:
        async with asyncio.TaskGroup() as tasks:
            for number, contexts in enumerate(by_beginning(of_context, in_flight)):
                await window.admit(sum(len(of_context[context]) for context in contexts))
                tasks.create_task(send_contexts(tasks, number, contexts))
    except ExceptionGroup as errors:  # the first has ended the others
        raise errors.exceptions[0] from None


def by_beginning(contexts: Iterable[str], most: int) -> list[Sequence[str]]:
    """Different contexts in order, in groups that begin with the same SHARED_CHARACTERS; shorter ones are alone.

    A group has at most `most`, since one engine answers it: there are several of a beginning that more share.
    """
    groups: dict[str, list[str]] = {}
    for context in sorted(contexts):
        beginning = context[:SHARED_CHARACTERS] if len(context) >= SHARED_CHARACTERS else context
        groups.setdefault(beginning, []).append(context)
    return [group for own in groups.values() for group in batched(own, most)]


class _Window:
    """Admits groups of requests, in turn, while fewer than `most` of those admitted are unanswered."""

    def __init__(self, most: int) -> None:
        self._most, self._unanswered = most, 0
        self._room = asyncio.Event()

    async def admit(self, requests: int) -> None:
        while self._unanswered >= self._most:
            self._room.clear()
            await self._room.wait()
        self._unanswered += requests

    def answered(self) -> None:
        self._unanswered -= 1
        self._room.set()
