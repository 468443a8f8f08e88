"""The trained policy against the initial one on the same held-out prefixes, and what keeps that honest.

A policy that only became surer of itself would be preferred too: where continuations are sampled, the initial policy is also
compared with itself at a lower temperature. That is the control: what a win rate has to be above before it shows learning.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sip.errors import DataError
from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.nll import suffix_nll
from megatron_sip.evaluation.win_rate import Comparison, WinRate, compare, continue_prefixes
from megatron_sip.experience.maker import ScoresGroups
from megatron_sip.files import described, read_json, write_atomically
from megatron_sip.records import Candidate, Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings

CONTROL_SHARE = 0.7
"""The control's temperature, of the compared continuations'."""


@dataclass(frozen=True, slots=True)
class Control:
    """The initial policy at `temperature` against itself at that of the comparison."""

    temperature: float
    win_rate: WinRate


@dataclass(frozen=True, slots=True)
class HeldOutOutcome:
    """What the comparison found. control: None where continuations are greedy, or the run began without one.

    distinct_3: of the initial and the trained policy's continuations, see `diversity`. suffix_nll: of both, nats a token of the
    true suffixes; None where the engines gave none, or the run began without.
    """

    win_rate: WinRate
    comparisons: list[Comparison]
    control: Control | None
    distinct_3: tuple[float, float]
    suffix_nll: tuple[float | None, float | None]


def save_continuations(path: Path, continuations: Sequence[Candidate | None]) -> None:
    """Write continuations as JSON; the file appears only when it is complete."""
    write_atomically(path, json.dumps([asdict(c) if c is not None else None for c in continuations]))


def load_continuations(path: Path) -> list[Candidate | None]:
    """Inverse of `save_continuations`."""
    with described(path, "the initial policy's continuations"):
        return [Candidate(**c) if c is not None else None for c in json.loads(path.read_bytes())]


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
        self._tokenizer = tokenizer
        self._initial = initial
        self._control = initial.with_name("control_continuations.json")
        self._initial_nll = initial.with_name("initial_nll.json")
        self._seed = seed

    async def record_initial(self, engines: SGLangPool) -> None:
        """Write the initial policy's continuations, the control's and the NLL of the suffixes, before the first step."""
        write_atomically(self._initial_nll, json.dumps(await self._nll(engines, "0")))
        if self._sampling.temperature > 0:
            save_continuations(self._control, await self._continue(engines, "0", self._control_sampling()))
        save_continuations(self._initial, await self._continue(engines, "0", self._sampling))

    def check_initial(self) -> None:
        """Before training: is there something to compare with at its end?

        Raises:
            DataError: the initial continuations are gone, or are of another number of prefixes.
        """
        if not self._initial.exists():
            raise DataError(
                f"{self._initial}: the initial policy's continuations are written at step 0, and are not there; continue "
                "with --win-rate-prompts 0, or with the --run-dir of the run's start"
            )
        recorded = len(load_continuations(self._initial))
        if recorded != len(self._tasks):
            raise DataError(f"{self._initial} holds {recorded} prefixes: continue with --win-rate-prompts {recorded}")

    async def finish(self, engines: SGLangPool, judge: ScoresGroups, version: str) -> HeldOutOutcome:
        """Continue with the weights of `version` and judge against the initial continuations, as the control's are."""
        before = load_continuations(self._initial)
        after = await self._continue(engines, version, self._sampling)
        win_rate, comparisons = await self._compare(judge, before, after)
        control = None
        if self._sampling.temperature > 0 and self._control.exists():
            found, _ = await self._compare(judge, before, load_continuations(self._control))
            control = Control(self._control_sampling().temperature, found)
        varied = [diversity([c.text for c in texts if c is not None])["distinct_3"] for texts in (before, after)]
        recorded = self._initial_nll
        initial_nll = read_json(recorded, "the initial policy's NLL") if recorded.exists() else None
        nll = (initial_nll, await self._nll(engines, version))
        return HeldOutOutcome(win_rate, comparisons, control, (varied[0], varied[1]), nll)

    async def _nll(self, engines: SGLangPool, version: str) -> float | None:
        mean, _ = await suffix_nll(engines, self._tasks, version)
        return mean.value if mean.weight else None

    def _control_sampling(self) -> SamplingSettings:
        return replace(self._sampling, temperature=CONTROL_SHARE * self._sampling.temperature)

    async def _compare(
        self, judge: ScoresGroups, before: Sequence[Candidate | None], after: Sequence[Candidate | None]
    ) -> tuple[WinRate, list[Comparison]]:
        return await compare(judge, self._tasks, self._documents, before, after, self._seed)

    async def _continue(self, engines: SGLangPool, version: str, sampling: SamplingSettings) -> list[Candidate | None]:
        return await continue_prefixes(engines, self._tasks, sampling, self._tokenizer, version)
