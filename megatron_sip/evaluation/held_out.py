"""The trained policy against the initial one on the same held-out prefixes, and what keeps that honest.

A policy that only became surer of itself would be preferred too: where continuations are sampled, the initial policy is also
compared with itself at a lower temperature. That is the control: what a win rate has to be above before it shows learning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.initial_policy import InitialPolicy, InitialPolicyFile
from megatron_sip.evaluation.nll import suffix_nll
from megatron_sip.evaluation.win_rate import Comparison, WinRate, compare, continue_prefixes
from megatron_sip.experience.maker import ScoresGroups
from megatron_sip.records import Candidate, Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings

log = logging.getLogger(__name__)

CONTROL_SHARE = 0.7
"""The control's temperature, of the compared continuations'."""


@dataclass(frozen=True, slots=True)
class Control:
    """The initial policy at `temperature` against itself at that of the comparison."""

    temperature: float
    win_rate: WinRate


@dataclass(frozen=True, slots=True)
class HeldOutOutcome:
    """What the comparison found. control: None where continuations are greedy.

    distinct_3: of the initial and the trained policy's continuations, see `diversity`. suffix_nll: of both, nats a token of the
    true suffixes that the engines could tell of both; None where there was none.
    """

    win_rate: WinRate
    comparisons: list[Comparison]
    control: Control | None
    distinct_3: tuple[float, float]
    suffix_nll: tuple[float | None, float | None]


class HeldOutComparison:
    """The trained policy against the initial one on fixed held-out prefixes, through the same engines and judge."""

    def __init__(
        self,
        tasks: Sequence[Task],
        documents: Sequence[Hashable],
        sampling: SamplingSettings,
        tokenizer: Any,
        initial: Path,
        seed: int,
    ) -> None:
        self._tasks = tasks
        self._documents = documents
        self._sampling = sampling
        self._cooler = replace(sampling, temperature=CONTROL_SHARE * sampling.temperature)
        self._tokenizer = tokenizer
        self._initial = InitialPolicyFile(initial, tasks, sampling, "--win-rate-prompts")
        self._seed = seed

    async def record_initial(self, engines: SGLangPool) -> None:
        """Write what the initial policy says, and what its suffixes cost it, before the first step."""
        nll = await self._nll(engines, "0")
        control = await self._continue(engines, "0", self._cooler) if self._sampling.temperature > 0 else []
        self._initial.write(InitialPolicy(await self._continue(engines, "0", self._sampling), control, nll))

    def check_initial(self) -> None:
        """Before training: is there something to compare with at its end? Raises DataError."""
        self._initial.read()

    async def finish(self, engines: SGLangPool, judge: ScoresGroups, version: str) -> HeldOutOutcome:
        """Continue with the weights of `version` and judge against the initial continuations, as the control's are."""
        initial = self._initial.read()
        after = await self._continue(engines, version, self._sampling)
        win_rate, comparisons = await self._compare(judge, initial.continuations, after)
        control = None
        if initial.control:
            found, _ = await self._compare(judge, initial.continuations, initial.control)
            control = Control(self._cooler.temperature, found)
        varied = [
            diversity([c.text for c in texts if c is not None])["distinct_3"]
            for texts in (initial.continuations, after)
        ]
        nll = await self._nll(engines, version)
        both = [
            task for task, before, now in zip(self._tasks, initial.nll, nll, strict=True) if None not in (before, now)
        ]
        of_both = [nats_per_token(self._tasks, values, both) for values in (initial.nll, nll)]
        return HeldOutOutcome(win_rate, comparisons, control, (varied[0], varied[1]), (of_both[0], of_both[1]))

    async def _nll(self, engines: SGLangPool, version: str) -> list[float | None]:
        found, failed = await suffix_nll(engines, self._tasks, version)
        if failed:
            log.warning(
                "held-out comparison: %d of %d suffixes have no log-prob: %s", failed.total(), len(found), dict(failed)
            )
        return found

    async def _compare(
        self, judge: ScoresGroups, before: Sequence[Candidate | None], after: Sequence[Candidate | None]
    ) -> tuple[WinRate, list[Comparison]]:
        return await compare(judge, self._tasks, self._documents, before, after, self._seed)

    async def _continue(self, engines: SGLangPool, version: str, sampling: SamplingSettings) -> list[Candidate | None]:
        return await continue_prefixes(engines, self._tasks, sampling, self._tokenizer, version)


def nats_per_token(tasks: Sequence[Task], nll: Sequence[float | None], of: Sequence[Task]) -> float | None:
    """The mean over the tokens of the suffixes of the tasks `of`, which all have a value; None without any."""
    wanted = {task.index for task in of}
    total = math.fsum(nats for task, nats in zip(tasks, nll, strict=True) if task.index in wanted and nats is not None)
    tokens = sum(len(task.suffix_ids) for task in of)
    return total / tokens if tokens else None
