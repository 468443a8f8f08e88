"""evaluation/shared_contexts.py: what several requests share is answered once before the others are sent; nothing is lost."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.evaluation.shared_contexts import SHARED_CHARACTERS, by_beginning, send_sharing

CONTEXT = st.text("ab", max_size=4).map(lambda text: text * 100)


@given(st.lists(CONTEXT, unique=True), st.integers(1, 4))
def test_contexts_of_one_beginning_are_a_group(contexts: list[str], most: int) -> None:
    groups = by_beginning(contexts, most)
    assert sorted(context for group in groups for context in group) == sorted(contexts)
    for group in groups:
        assert len({context[:SHARED_CHARACTERS] for context in group}) == 1
        assert len(group) == 1 or min(map(len, group)) >= SHARED_CHARACTERS
        assert len(group) <= most
    full = [group[0][:SHARED_CHARACTERS] for group in groups if len(group) < most]
    assert len(set(full)) == len(full)  # the last group of a beginning alone is smaller


@given(
    st.dictionaries(CONTEXT, st.integers(1, 5)),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_every_request_is_sent_once_and_the_first_of_a_context_alone(
    counts: dict[str, int], in_flight: int, engines: int
) -> None:
    requests = {context: [(context, i) for i in range(count)] for context, count in counts.items()}
    flying: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    engines_of: dict[str, set[int]] = {}

    async def send(number: int, request: tuple[str, int]) -> None:
        context, _ = request
        assert answered[context] or not flying[context]
        engines_of.setdefault(context, set()).add(number % engines)
        flying[context] += 1
        assert flying.total() <= in_flight * engines
        await asyncio.sleep(0)
        flying[context] -= 1
        answered[context] += 1

    asyncio.run(send_sharing(requests, send, in_flight, engines))
    assert answered == Counter(counts)
    assert all(len(engines_of[context]) <= 1 + count // in_flight for context, count in counts.items())


def test_so_many_requests_are_begun_with_that_engines_are_busy() -> None:
    """Contexts of two requests: while none is answered as many first ones are sent as may be in flight."""
    requests = {f"question {i}": [2 * i, 2 * i + 1] for i in range(100)}
    most, flying = 0, 0

    async def send(number: int, request: int) -> None:
        nonlocal most, flying
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.001)
        flying -= 1

    asyncio.run(send_sharing(requests, send, 8, 2))
    assert most == 16


def test_an_error_ends_it_at_once() -> None:
    sent: list[int] = []

    async def send(number: int, request: int) -> None:
        sent.append(request)
        await asyncio.sleep(0.001 * request)
        raise ValueError(f"request {request}")

    requests = {f"question {i:02}": [i, 100 + i] for i in range(50)}
    with pytest.raises(ValueError, match="request 0"):
        asyncio.run(send_sharing(requests, send, 4, 1))
    assert sorted(sent) == [0, 1, 2, 3]
