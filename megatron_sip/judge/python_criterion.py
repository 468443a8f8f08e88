"""A criterion that is a Python function: a classifier, a word list, a reward model."""

from __future__ import annotations

import asyncio
import logging

from megatron_sip.judge.calls import Call
from megatron_sip.judge.criteria import Ask, CriterionScores, Sheet
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.python_functions import CallFailedError, FunctionProcesses
from megatron_sip.judge.settings import VerdictMode

log = logging.getLogger(__name__)


class PythonCriterion:
    """The function's number for each candidate, all of a group in one call. Asks no server.

    A candidate for which it gives None has no score, nor has any of a call that raises, crashes or takes too long.
    """

    mode: VerdictMode | None = None

    def __init__(self, name: str, processes: FunctionProcesses) -> None:
        self.name = name
        self._processes = processes
        self._told = False

    @property
    def answered_at(self) -> float:
        """When the function last answered, of time.monotonic(), which is the event loop's clock."""
        return self._processes.answered_at

    def check(self, encoder: ChatEncoder) -> None:
        """No server is asked."""

    def longest_call(self, sheet: Sheet) -> Call | None:
        """No server is asked."""
        return None

    async def start(self) -> None:
        """Raises FunctionError when the function cannot be imported."""
        await self._processes.start()

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        """Raises FunctionError when the function does not give one number from 0 to 1, or None, for each candidate."""
        texts = list(sheet.candidates[: sheet.contenders])
        patience = sheet.deadline - asyncio.get_running_loop().time()
        try:
            numbers = await self._processes.call(texts, sheet.prefix, sheet.original, patience, sheet.silence_s)
        except CallFailedError as failure:
            if not self._told:  # the first is worth a line, not a flood
                self._told = True
                log.warning("criterion %s: no scores from this call: %s", self.name, failure)
            return CriterionScores((None,) * len(texts), (0,) * len(texts), failure.kind, len(texts))
        values = tuple(() if number is None else (number,) for number in numbers)
        votes = tuple(map(len, values))
        missing = "no-number" if None in numbers else None
        return CriterionScores(tuple(numbers), votes, missing, len(texts), sum(votes), values=values)

    def close(self) -> None:
        """End the function's processes."""
        self._processes.close()
